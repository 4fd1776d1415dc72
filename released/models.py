"""Other people's models: which Config an opened file means, and which of its tensors are which of ours.

`flm_parts` and `vilt_parts` read whole models; `clip_parts`, `vit_parts`, `text_parts` and `bert_embeddings` read what
pretraining begins from. All give (…, our name -> tensor, our name -> the file's names) and account for every tensor of
the file. Sizes come from the tensors. The number of heads leaves no trace in them: it comes from the settings stored
beside them, else from the rule of all these models, 64 dimensions a head; where the width is no multiple of 64,
nothing is guessed.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

import flm
from released import names
import vilt
from released.unpickle import shown


@dataclass
class Source:
    """An opened checkpoint."""
    path: Path
    family: names.Family | None     # whose it is; None: ours
    state: dict                     # its tensors, under its own names less those of wrappers
    settings: dict                  # the run's: a Lightning file's hyper-parameters, transformers' config.json
    contents: dict                  # all that the file holds
    folder: Path                    # where vocab.txt may lie
    told: dict = field(default_factory=dict)        # fields of the Config that the caller knows better than the file
    assumed: dict = field(default_factory=dict)     # numbers of heads where neither file nor rule gives one
    spare: dict = field(default_factory=dict)       # our name -> the rows of a table that the model does not use


def plain_dict(value):
    return value if isinstance(value, dict) else {}


def sizes(found, path):
    """-> size(name, axis), a side of one of our tensors, and count(prefix), the number of layers under a prefix."""
    def size(name, axis=0):
        if name not in found or found[name].dim() <= axis:
            raise ValueError(f"{path}: not complete; {name}, as it is called here, is missing or has another shape")
        return found[name].shape[axis]

    def count(prefix):
        return len({name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)})

    return size, count


def checked(kind, values, tensors):
    """A Config of these values, of a file of so many tensors; ValueError for an odd type, or a size that cannot be."""
    for known in fields(kind):
        value, expected = values.get(known.name, known.default), type(known.default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise ValueError(f"its {known.name} is {shown(value)}; {expected.__name__} is expected")
        if expected is int and not 0 <= value < (tensors + 1 if known.name.endswith("layers") else 2**31):
            raise ValueError(f"its {known.name} is {value}, which cannot be")
    return kind(**values)


def image_size_of(rows, patch_size, path):
    """The resolution of a position table of 1 + g² rows."""
    side = int((rows - 1) ** 0.5)
    if side ** 2 + 1 != rows:
        raise ValueError(f"{path}: a position table of {rows} rows is no square grid and a class token")
    return side * patch_size


def first_rows(name, rows, found, called, report, source):
    """Cuts a table to the rows that the model uses; the others go to source.spare."""
    if name in found and len(found[name]) > rows:
        report.add("taken", called[name], f"its first {rows} of {len(found[name])} rows; the others are never used",
                   source.path)
        source.spare[name] = found[name][rows:].clone()
        found[name] = found[name][:rows].clone()


def heads_of(name, width, source, *stored):
    """A number of heads (`name` its field of the Config): the caller's, the first that is stored, or width // 64."""
    for value in (source.told.get(name), *stored, width // 64 if width % 64 == 0 else None, source.assumed.get(name)):
        if value is not None:
            return value
    raise ValueError(f"{source.path}: does not say how many heads its layers of width {width} have; "
                     f"weights.load(path, {name}=N) tells it")


# ---------------------------------------------------------------------------------------------------------------------
# Whole models.

def flm_parts(source, report):
    """A released FLM checkpoint -> (Config, our tensors, our name -> the file's, task).

    Of a captioning model only the forward stream is kept, as objective ar: that is what decodes.
    """
    state, stored, path = source.state, source.settings, source.path
    has = lambda *prefixes: any(key.startswith(prefixes) for key in state)
    reconstructs, losses = has("fusion_layers_top."), plain_dict(stored.get("loss_names"))
    words = len(state.get("text_transformer.embeddings.word_embeddings.weight", ()))
    task = ("vqa" if has("vqa_classifier.") else "nlvr2" if has("nlvr2_classifier.") else
            "retrieval" if has("rank_output.") else "pretrain")
    if task == "pretrain" and (stored.get("get_caption_metric") or (losses.get("ar") and reconstructs) or
                               (not stored and words == 50267)):        # RoBERTa's words, <bos> and <eos>
        task = "caption"
    family = source.family
    if task == "caption":
        objective = "ar"
        unused = {r"fusion_layers_(top|bottom)\.|token_type_embeddings_flm\.|cross_modal_text_pooler(_f)?\.":
                  "captioning uses the forward stream only"}
    elif reconstructs:
        objective = "flm"
        unused = {r"cross_modal_text_pooler\.": "never used: the class vector is the reconstructor's"}
    else:
        objective = "mlm" if has("mlm_score.") or not stored.get("is_causal_mask", True) else "ar"
        unused = {r"token_type_embeddings_flm\.": "never used: there is one stream"}
        family = family._replace(names=names.SINGLE_STREAM_NAMES)
    if task not in ("pretrain", "caption"):
        unused[r"(lm|mlm)_score\."] = f"the vocabulary head, which task {task} does not use"
    found, called = names.translate(state, family, report, path, unused)

    size, count = sizes(found, path)
    patch, vit_width = size("vit.patch.weight", 2), size("vit.patch.weight")
    width, text_width = size("text_to_fusion.weight"), size("text_to_fusion.weight", 1)
    fusion_heads = stored.get("num_heads_fusion") or stored.get("num_heads")
    heads = heads_of("heads", width, source, fusion_heads)
    vit = plain_dict(stored.get("vit_config") or source.contents.get("vit_config"))     # rarely there
    vit_heads = heads_of("vit_heads", vit_width, source, vit.get("heads"), stored.get("vit_heads"),
                         vit_width // vit["head_dim"] if vit.get("head_dim") else None)
    config = dict(
        objective=objective, image_size=image_size_of(size("vit.position"), patch, path), patch_size=patch,
        vit_width=vit_width, vit_layers=count("vit.blocks."), vit_heads=vit_heads,
        vocab_size=size("embed.word.weight"), text_width=text_width, text_layers=count("text_layers."),
        text_heads=heads_of("text_heads", text_width, source, heads if text_width == width else None),
        max_positions=size("embed.position.weight"),
        # <mask> is RoBERTa's last word; captioning adds <bos> and <eos> after it
        mask_id=words - 1 - (2 if task == "caption" and stored.get("add_new_bos_token", True) else 0),
        width=width, heads=heads, fusion_layers=count("fusion_layers."),
        reconstructor_text_layers=count("text_reconstructor."),
        reconstructor_fusion_layers=count("fusion_reconstructor."),
        dropout=stored.get("drop_rate", 0.1), corruption_rate=stored.get("span_corruption_rate", 0.0),
        head=(task if task not in ("pretrain", "caption") else
              "vocab" if "vocab_head.decoder.weight" in found else "none"),
        answers=size("head.3.weight") if task == "vqa" else 0, pooler="pooler.weight" in found)
    return checked(flm.Config, config | source.told, len(found)), found, called, task


# What a Config holds that neither tensors nor transformers' settings tell; `weights.export` writes it into config.json.
UNSEEN = ("max_patches", "cls_id", "pad_id", "sep_id", "mask_id", "eps", "text_eps", "dropout", "init_std", "mask_rate",
          "wpa_weight", "patch_mask_rate")


def vilt_parts(source, report):
    """ViLT's own Lightning file, or transformers' ViLT -> (Config, our tensors, our name -> the file's, task)."""
    state, stored, path = source.state, source.settings, source.path
    transformers = source.family is names.VILT_TRANSFORMERS
    has = lambda *prefixes: any(key.startswith(prefixes) for key in state)
    if "classifier.weight" in state:
        raise ValueError(f"{path}: a ViltForTokenClassification, which serves no task of this project")
    for name, expected in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if transformers and stored.get(name, expected) != expected:
            raise ValueError(f"{path}: its config.json has {name} {stored[name]!r}; this ViLT has {expected!r}")
    first = state.get("classifier.0.weight", torch.empty(1, 0))     # (2D, D) for vqa, (2D, 2D) for nlvr2
    task = ("vqa" if has("vqa_classifier.") or (has("classifier.") and first.shape[0] != first.shape[-1]) else
            "nlvr2" if has("nlvr2_classifier.", "classifier.") else "retrieval" if has("rank_output.") else "pretrain")
    ours = plain_dict(stored.get("flm_vilt")) if transformers else {}
    itm, mpp = (has(f"{name}_score.") and (task == "pretrain" or ours.get(name, False)) for name in ("itm", "mpp"))
    unused = {} if mpp else {r"transformer\.mask_token$": "of masked patch prediction, which this model does not do"}
    if task != "pretrain":
        heads = "|".join(["mlm", *(name for name, its in (("itm", itm), ("mpp", mpp)) if not its)])
        unused[rf"({heads})_score\."] = f"a head of pretraining, which task {task} does not use"
    found, called = names.translate(state, source.family, report, path, unused)
    for name in {"cls", "mask_token", "position"} & found.keys():   # (1, 1, D) and (1, N, D) there
        while found[name].dim() > (2 if name == "position" else 1) and len(found[name]) == 1:
            found[name] = found[name][0]
    first_rows("embed.token_type", 1, found, called, report, source)
    first_rows("token_type", 3 if task == "nlvr2" else 2, found, called, report, source)

    size, count = sizes(found, path)
    if task == "nlvr2":
        images, labels = size("head.0.weight", 1) // size("patch.weight"), size("head.3.weight")
        if (images, labels) != (2, 2):
            raise ValueError(f"{path}: a classifier of {images} images a sentence into {labels} labels; "
                             f"NLVR2, which is known here, has 2 and 2")
    if "vocab_head.dense.weight" in found and "vocab_head.decoder.weight" not in found:
        found["vocab_head.decoder.weight"] = found["embed.word.weight"].clone()
        report.add("fresh", ["vocab_head.decoder.weight"],
                   "a copy of the word embeddings, to which transformers ties it", path)
    if mpp and "mask_token" not in found:
        found["mask_token"] = torch.zeros_like(found["cls"])
        report.add("fresh", ["mask_token"], "zeros: the file has none", path)
    patch, width = size("patch.weight", 2), size("patch.weight")
    heads = stored.get("num_attention_heads" if transformers else "num_heads")
    eps = stored.get("layer_norm_eps", 1e-12) if transformers else None         # one for all there
    patches = stored.get("max_image_length" if transformers else "max_image_len") or 0
    config = dict(
        image_size=image_size_of(size("position"), patch, path), patch_size=patch,
        max_patches=patches if patches > 0 else vilt.Config.max_patches,
        vocab_size=size("embed.word.weight"), max_positions=size("embed.position.weight"),
        pad_id=stored.get("pad_token_id") or 0, width=width, layers=count("blocks."),
        heads=heads_of("heads", width, source, heads or None),
        mlp_width=size("blocks.0.mlp.0.weight"), eps=eps or vilt.Config.eps, text_eps=eps or vilt.Config.text_eps,
        dropout=stored.get("hidden_dropout_prob" if transformers else "drop_rate", 0.1), mpp=mpp, itm=itm,
        head=task if task != "pretrain" else "vocab" if "vocab_head.dense.weight" in found else "none",
        answers=size("head.3.weight") if task == "vqa" else 0, pooler="pooler.weight" in found)
    if "transformers_version" in stored:        # transformers wrote it again: what it has a name for is as it says
        ours = {name: value for name, value in ours.items() if name not in ("eps", "text_eps", "dropout", "pad_id")}
    config |= {name: ours[name] for name in UNSEEN if name in ours}
    return checked(vilt.Config, config | source.told, len(found)), found, called, task


# ---------------------------------------------------------------------------------------------------------------------
# What pretraining begins from. -> (our tensors, our name -> the file's)

def expect(source, families, what):
    if source.family not in families:
        raise ValueError(f"{source.path}: {source.family.about if source.family else 'a checkpoint of this project'}; "
                         f"{what} is expected here")


def expect_sizes(source, what, sizes):
    """One sentence where a size of the file is not the model's: sizes are (its name, the file's, the model's)."""
    for name, has, wants in sizes:
        if has != wants:
            raise ValueError(f"{source.path}: a {what} with {name} {has}, but the model's has {wants}")


def clip_parts(source, model, report):
    """CLIP's ViT without its last block, for FLM."""
    expect(source, (names.CLIP, names.CLIP_TRANSFORMERS), "CLIP")
    c, path, stored = model.config, source.path, plain_dict(source.settings.get("vision_config")) or source.settings
    blocks = r"(?:visual\.transformer\.resblocks|(?:vision_model\.)?encoder\.layers)\."
    depth = len({match[1] for key in source.state if (match := re.match(blocks + r"(\d+)\.", key))})
    found, called = names.translate(source.state, source.family, report, path,
                                    {rf"{blocks}{depth - 1}\.": "CLIP's last block, which FLM does without"})
    size, _ = sizes(found, path)
    expect_sizes(source, "ViT", (
        ("patches", size("vit.patch.weight", 2), c.patch_size), ("width", size("vit.patch.weight"), c.vit_width),
        ("heads", stored.get("num_attention_heads", c.vit_heads), c.vit_heads)))
    if depth - 1 != c.vit_layers:
        raise ValueError(f"{path}: a ViT of {depth} blocks, of which FLM uses {depth - 1}, "
                         f"but the model has {c.vit_layers}")
    if source.family is names.CLIP_TRANSFORMERS and stored.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"{path}: a ViT with {stored['hidden_act']}; OpenAI's, with quick_gelu, is expected")
    return found, called


def vit_parts(source, model, report):
    """A ViT, for ViLT, whose blocks and positions began as one."""
    expect(source, (names.VIT, names.TIMM), "a ViT of timm or transformers")
    c = model.config
    unused = {} if c.mpp else {r"mask_token$": "masked patch prediction, which the model does not do"}
    found, called = names.translate(source.state, source.family, report, source.path, unused)
    for name in {"cls", "mask_token", "position"} & found.keys():
        found[name] = found[name].flatten(0, -2) if name == "position" else found[name].flatten()
    size, _ = sizes(found, source.path)
    expect_sizes(source, "ViT", (
        ("patches", size("patch.weight", 2), c.patch_size), ("width", size("patch.weight"), c.width),
        ("heads", source.settings.get("num_attention_heads", c.heads), c.heads)))
    return found, called


def text_parts(source, model, report):
    """RoBERTa's or BERT's embeddings and first layers, for FLM.

    RoBERTa counts positions from 2 (row 1 is padding's), BERT from 0: its rows are shifted by two. FLM's LayerNorms
    have RoBERTa's eps, 1e-5; BERT's have 1e-12.
    """
    expect(source, (names.BERT,), "RoBERTa or BERT")
    c, path = model.config, source.path
    deeper = rf"(?:roberta\.|bert\.)?encoder\.layer\.(?!(?:{'|'.join(map(str, range(c.text_layers)))})\.)"
    found, called = names.translate(source.state, source.family, report, path,
                                    {deeper: f"a layer above the first {c.text_layers}"})
    size, count = sizes(found, path)
    expect_sizes(source, "text transformer", (
        ("width", size("embed.word.weight", 1), c.text_width), ("layers", count("text_layers."), c.text_layers),
        ("heads", source.settings.get("num_attention_heads", c.text_heads), c.text_heads),
        ("feed-forward", size("text_layers.0.mlp.0.weight"), 4 * c.text_width)))
    kind = source.settings.get("model_type") or ("roberta" if size("embed.token_type") == 1 else "bert")
    first_rows("embed.token_type", 1, found, called, report, source)
    if kind != "roberta":
        name = "embed.position.weight"
        report.add("grown", called[name], "BERT's positions, after RoBERTa's two special ones", path)
        found[name] = torch.cat([model.embed.position.weight.detach()[:2].to(found[name].device), found[name]])
    return found, called


def bert_embeddings(source, model, report):
    """BERT's embeddings alone, for ViLT."""
    expect(source, (names.BERT,), "BERT")
    found, called = names.translate(source.state, source.family, report, source.path,
                                    {r"(?:roberta\.|bert\.)?encoder\.": "ViLT takes BERT's embeddings alone"})
    if source.settings.get("model_type", "bert") != "bert" or sizes(found, source.path)[0]("embed.token_type") == 1:
        raise ValueError(f"{source.path}: RoBERTa; ViLT begins from BERT, whose positions count from 0")
    first_rows("embed.token_type", 1, found, called, report, source)
    return found, called
