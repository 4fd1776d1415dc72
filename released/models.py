"""Other people's models: which Config a file means, and which of its tensors are which of ours.

`flm_parts` and `vilt_parts` return (Config, our name -> tensor, our name -> the file's names, task)
and account for every tensor of the file.

Sizes come from the tensors. The number of heads leaves no trace in them. It comes from the
settings stored beside them, else from the rule of all these models, 64 dimensions a head. Where
the width is no multiple of 64, nothing is guessed.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import flm
import tokenizer
import vilt
from released import names
from released.files import plain_dict


@dataclass
class Source:
    """An opened checkpoint."""
    path: Path
    family: names.Family            # whose it is
    state: dict                     # its tensors, under its own names less those of wrappers
    settings: dict                  # of the run: hyper-parameters, or transformers' config.json
    contents: dict                  # all that the file holds
    folder: Path                    # where vocab.txt may lie
    files: list[Path]               # one, or those of a model in several files
    # Fields of the Config that the caller knows better than the file:
    told: dict = field(default_factory=dict)
    # Numbers of heads where neither file nor rule gives one:
    assumed: dict = field(default_factory=dict)
    tok: tokenizer.BPE | tokenizer.WordPiece | None = None
    answers: list | None = None

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.state)

    def about(self) -> dict:
        """Whose it is, and what it says of its recipe and data; None for what it does not say."""
        said = {name: value for name, value in self.settings.items() if isinstance(value, str)}
        datasets = self.settings.get("datasets")
        if not isinstance(datasets, list | tuple):
            datasets = []
        return {"whose": self.family.about,
                "recipe": said.get("recipe") or said.get("exp_name"),
                "data": said.get("data"),
                "datasets": [name for name in datasets if isinstance(name, str)]}

    def step(self) -> int:
        step = self.contents.get("step", self.contents.get("global_step", 0))
        return step if type(step) is int else 0


class Undrawn(torch.overrides.TorchFunctionMode):
    """Where models are made without drawing weights. (On the meta device, normal_ takes 150 MB.)"""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


def count(prefix: str, found: dict) -> int:
    """The number of layers under a prefix."""
    inner = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
    return len({name.split(".")[0] for name in inner})


def image_size_of(rows: int, patch_size: int) -> int:
    """The resolution of a position table of 1 + g² rows."""
    return int((rows - 1) ** 0.5) * patch_size


def first_rows(name: str, rows: int, found: dict, called: dict, report: names.Report,
               path: Path) -> None:
    """Cuts a table to the rows that the model uses."""
    if name in found and len(found[name]) > rows:
        reason = f"its first {rows} of {len(found[name])} rows; the others are never used"
        report.add("taken", called[name], reason, path)
        found[name] = found[name][:rows].clone()


def heads_of(name: str, width: int, source: Source, *stored: int | None) -> int:
    """A number of heads; `name` is its field of the Config.

    The caller's, else the first that is stored, else width / 64.
    """
    by_rule = width // 64 if width % 64 == 0 else None
    for value in (source.told.get(name), *stored, by_rule, source.assumed.get(name)):
        if value is not None:
            return value
    raise ValueError(f"{source.path}: does not say how many heads its layers of width {width} "
                     f"have; weights.load(path, {name}=N) tells it")


# -- whole models: FLM -----------------------------------------------------------------------------

def flm_task(source: Source) -> str:
    """The task that a released FLM file was trained for."""
    for prefix, task in (("vqa_classifier.", "vqa"), ("nlvr2_classifier.", "nlvr2"),
                         ("rank_output.", "retrieval")):
        if source.has(prefix):
            return task
    # A captioning model has the tensors of a pretrained one. Its settings tell, else its words:
    # RoBERTa's, <bos> and <eos>.
    stored = source.settings
    if stored:
        is_ar = plain_dict(stored.get("loss_names")).get("ar") and source.has("fusion_layers_top.")
        captions = bool(stored.get("get_caption_metric") or is_ar)
    else:
        words = source.state.get("text_transformer.embeddings.word_embeddings.weight", ())
        captions = len(words) == 50267
    return "caption" if captions else "pretrain"


def flm_objective(source: Source, task: str) -> tuple[str, dict, dict]:
    """-> (objective, table of names, pattern -> why the model has no place for these tensors)"""
    if task == "caption":
        return "ar", source.family.names, {
            r"fusion_layers_(top|bottom)\.|token_type_embeddings_flm\.|"
            r"cross_modal_text_pooler(_f)?\.": "captioning uses the forward stream only"}
    if source.has("fusion_layers_top."):
        return "flm", source.family.names, {
            r"cross_modal_text_pooler\.": "never used: the class vector is the reconstructor's"}
    is_mlm = source.has("mlm_score.") or not source.settings.get("is_causal_mask", True)
    return "mlm" if is_mlm else "ar", names.SINGLE_STREAM_NAMES, {
        r"token_type_embeddings_flm\.": "never used: there is one stream"}


def flm_parts(source: Source, report: names.Report) -> tuple[flm.Config, dict, dict, str]:
    """A released FLM checkpoint -> (Config, our tensors, our name -> the file's, task).

    Of a captioning model only the forward stream is kept, as objective ar: it does the decoding.
    """
    stored, task = source.settings, flm_task(source)
    objective, table, unused = flm_objective(source, task)
    if task not in ("pretrain", "caption"):
        unused[r"(lm|mlm)_score\."] = f"the vocabulary head, which task {task} does not use"
    found, called = names.translate(source.state, source.family._replace(names=table), report,
                                    source.path, unused)

    shape = {name: tensor.shape for name, tensor in found.items()}
    vit_width, _, _, patch = shape["vit.patch.weight"]
    width, text_width = shape["text_to_fusion.weight"]
    words = shape["embed.word.weight"][0]
    vit = plain_dict(stored.get("vit_config") or source.contents.get("vit_config"))  # rarely there
    vit_heads = [vit.get("heads"), stored.get("vit_heads")]
    if vit.get("head_dim"):
        vit_heads.append(vit_width // vit["head_dim"])
    heads = heads_of("heads", width, source,
                     stored.get("num_heads_fusion") or stored.get("num_heads"))
    # <mask> is RoBERTa's last word; captioning adds <bos> and <eos> after it.
    has_bos = task == "caption" and stored.get("add_new_bos_token", True)
    head = task
    if task in ("pretrain", "caption"):
        head = "vocab" if "vocab_head.decoder.weight" in found else "none"
    config = dict(
        objective=objective,
        image_size=image_size_of(shape["vit.position"][0], patch),
        patch_size=patch,
        vit_width=vit_width,
        vit_layers=count("vit.blocks.", found),
        vit_heads=heads_of("vit_heads", vit_width, source, *vit_heads),
        vocab_size=words,
        text_width=text_width,
        text_layers=count("text_layers.", found),
        text_heads=heads_of("text_heads", text_width, source,
                            heads if text_width == width else None),
        max_positions=shape["embed.position.weight"][0],
        mask_id=words - 3 if has_bos else words - 1,
        width=width,
        heads=heads,
        fusion_layers=count("fusion_layers.", found),
        reconstructor_text_layers=count("text_reconstructor.", found),
        reconstructor_fusion_layers=count("fusion_reconstructor.", found),
        dropout=stored.get("drop_rate", 0.1),
        corruption_rate=stored.get("span_corruption_rate", 0.0),
        head=head,
        answers=shape["head.3.weight"][0] if task == "vqa" else 0,
        pooler="pooler.weight" in found)
    return flm.Config(**config | source.told), found, called, task


# -- whole models: ViLT ----------------------------------------------------------------------------

# What a Config holds that tensors do not tell; `export` writes it into config.json. For some of it
# transformers has settings of its own.
SEEN_BY_TRANSFORMERS = ("eps", "text_eps", "dropout", "pad_id")
UNSEEN = ("max_patches", "cls_id", "sep_id", "mask_id", "init_std", "mask_rate", "wpa_weight",
          "patch_mask_rate")


def vilt_task(source: Source) -> str:
    """The task that a ViLT file was trained for."""
    for prefix, task in (("vqa_classifier.", "vqa"), ("nlvr2_classifier.", "nlvr2"),
                         ("rank_output.", "retrieval")):
        if source.has(prefix):
            return task
    if source.has("classifier."):       # transformers' name for both
        first = source.state.get("classifier.0.weight", torch.empty(1, 0))
        is_square = first.shape[0] == first.shape[-1]       # (2D, 2D) for nlvr2, (2D, D) for vqa
        return "nlvr2" if is_square else "vqa"
    return "pretrain"


def vilt_parts(source: Source, report: names.Report) -> tuple[vilt.Config, dict, dict, str]:
    """ViLT's own file, or transformers' -> (Config, our tensors, our name -> the file's, task)"""
    stored, path = source.settings, source.path
    transformers = source.family is names.VILT_TRANSFORMERS
    if transformers and stored.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"its config.json has hidden_act {stored['hidden_act']!r}; "
                         f"this ViLT has 'gelu'")
    ours = plain_dict(stored.get("flm_vilt")) if transformers else {}
    task = vilt_task(source)
    unused, has = {}, {}
    for name in ("mlm", "itm", "mpp"):
        has[name] = source.has(f"{name}_score.") and (task == "pretrain" or ours.get(name, False))
        unused[rf"{name}_score\."] = f"a head of pretraining, which task {task} does not use"
        if has[name]:
            del unused[rf"{name}_score\."]
    if not has["mpp"]:
        unused[r"transformer\.mask_token$"] = ("of masked patch prediction, which this model does "
                                               "not do")
    found, called = names.translate(source.state, source.family, report, path, unused)
    first_rows("embed.token_type", 1, found, called, report, path)
    first_rows("token_type", 3 if task == "nlvr2" else 2, found, called, report, path)
    if "vocab_head.dense.weight" in found and "vocab_head.decoder.weight" not in found:
        found["vocab_head.decoder.weight"] = found["embed.word.weight"].clone()
        report.add("fresh", ["vocab_head.decoder.weight"],
                   "a copy of the word embeddings, to which transformers ties it", path)
    if has["mpp"] and "mask_token" not in found:
        found["mask_token"] = torch.zeros_like(found["cls"])
        report.add("fresh", ["mask_token"], "zeros: the file has none", path)
    config = vilt_config(source, task, found) | {"itm": has["itm"], "mpp": has["mpp"]}
    config |= {name: ours[name] for name in UNSEEN if name in ours}
    if "transformers_version" not in stored:    # else transformers wrote it again: its own count
        config |= {name: ours[name] for name in SEEN_BY_TRANSFORMERS if name in ours}
    if transformers:
        source.answers = labels(stored) if task == "vqa" else None
        config |= read_vocabulary(source, config["vocab_size"])
    return vilt.Config(**config | source.told), found, called, task


def vilt_config(source: Source, task: str, found: dict) -> dict:
    """What sizes and settings say of a ViLT's Config."""
    stored = source.settings
    if source.family is names.VILT_TRANSFORMERS:
        heads, patches = stored.get("num_attention_heads"), stored.get("max_image_length")
        dropout = stored.get("hidden_dropout_prob", 0.1)
        eps = text_eps = stored.get("layer_norm_eps", 1e-12)        # one for all there
    else:
        heads, patches = stored.get("num_heads"), stored.get("max_image_len")
        dropout = stored.get("drop_rate", 0.1)
        eps, text_eps = vilt.Config.eps, vilt.Config.text_eps
    if patches is None or patches <= 0:
        patches = vilt.Config.max_patches
    head = task
    if task == "pretrain":
        head = "vocab" if "vocab_head.dense.weight" in found else "none"
    shape = {name: tensor.shape for name, tensor in found.items()}
    width, _, _, patch = shape["patch.weight"]
    return dict(
        image_size=image_size_of(shape["position"][0], patch),
        patch_size=patch,
        max_patches=patches,
        vocab_size=shape["embed.word.weight"][0],
        max_positions=shape["embed.position.weight"][0],
        pad_id=stored.get("pad_token_id") or 0,
        width=width,
        layers=count("blocks.", found),
        heads=heads_of("heads", width, source, heads or None),
        mlp_width=shape["blocks.0.mlp.0.weight"][0],
        eps=eps,
        text_eps=text_eps,
        dropout=dropout,
        head=head,
        answers=shape["head.3.weight"][0] if task == "vqa" else 0,
        pooler="pooler.weight" in found)


def read_vocabulary(source: Source, words: int) -> dict:
    """Opens the vocab.txt of a transformers folder -> the special tokens that it tells."""
    vocabulary = source.folder / "vocab.txt"
    if not vocabulary.is_file():
        return {}
    tok = source.tok = tokenizer.WordPiece.load(vocabulary)
    if len(tok) > words:
        raise ValueError(f"{vocabulary}: {len(tok)} words, but the model has {words}")
    return {"cls_id": tok.cls_id, "pad_id": tok.pad_id, "sep_id": tok.sep_id,
            "mask_id": tok.mask_id}


def labels(settings: dict) -> list[str] | None:
    """The answers that a config.json lists, in order; None where it only numbers them."""
    table = plain_dict(settings.get("id2label"))
    try:
        listed = [table[str(i)] for i in range(len(table))]
    except KeyError:
        raise ValueError("the id2label of its config.json is no table from 0, 1, … to answers"
                         ) from None
    if not all(isinstance(label, str) for label in listed):
        raise ValueError("the id2label of its config.json has answers that are no text")
    only_numbered = all(re.fullmatch(r"LABEL_\d+", label) for label in listed)
    return None if only_numbered else listed
