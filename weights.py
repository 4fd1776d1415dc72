"""Checkpoints: opens ours and other people's, saves ours so that a crash never leaves half a file.

    python weights.py info pretrain_4m.ckpt                 # what a file is, and what became of each of its tensors
    python weights.py convert pretrain_4m.ckpt flm.pt --tokenizer roberta-base      # anything that opens -> one of ours
    python weights.py convert runs/vilt/last.pt exported --to transformers          # a ViLT -> a transformers folder
    python weights.py download clip-b32                     # fetch a released file; without a name: what there is

    model = load("pretrain_4m.ckpt")                        # in eval mode, with .task .tokenizer .answer_list .report
    print(start(model, vit="ViT-B-32.pt", text="roberta-base"))     # begin pretraining as published

No file runs code (unpickle.py), and none is taken "more or less": every tensor is accounted for in a `names.Report`,
and what cannot be is an error that names it. Files are mapped, not read: until a weight is written to, it is a page of
its file. So a file that is open must not be changed in place; `save` never does, it writes a new one under the old name.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from released import download
import flm
import layers
from released import names
from released import models
import tokenizer
import vilt
from released.names import Report
from released.models import Source, checked, plain_dict
from released.unpickle import open_file, shown

FORMAT = "flm-vilt-1"
BACKBONES = {"flm": (flm.Config, flm.FLM), "vilt": (vilt.Config, vilt.ViLT)}


def backbone_of(config):
    """The name of a Config's model in checkpoints."""
    return next(name for name, (config_class, _) in BACKBONES.items() if type(config) is config_class)


def config_of(contents):
    """The Config of a checkpoint of ours, as `read` gave it."""
    return BACKBONES[contents["backbone"]][0](**contents["config"])     # `read` has looked at the names


def model_of(config):
    """The model that a Config describes, its weights freshly drawn."""
    return BACKBONES[backbone_of(config)][1](config)


# ---------------------------------------------------------------------------------------------------------------------
# Our own files.

def save(path, model, config, task, tokenizer_files, **more):
    """Writes a checkpoint: `model` a state dict, `config` a Config, `more` tensors and plain values (optimizer, …).

    `tokenizer_files` is what pack_tokenizer gives, or None. `more` may hold `answers`, the list of a VQA head.
    The file appears under its name only when all of it is on the disk.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; a checkpoint is a file")
    make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    contents = {"format": FORMAT, "backbone": backbone_of(config), "model": model, "config": asdict(config),
                "task": task, "tokenizer": tokenizer_files, **more}
    try:
        with open(partial, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder can be made here ({error.strerror})") from None


def read(path):
    """Opens a checkpoint of ours as a dict; ValueError in one sentence for anything else. Never runs code from it."""
    contents = open_file(path)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project (its format is {FORMAT!r})")
    missing = [key for key in ("backbone", "model", "config", "task", "tokenizer") if key not in contents]
    if not missing and not isinstance(contents["backbone"], str) or contents.get("backbone") not in BACKBONES:
        what = f"without {', '.join(missing)}" if missing else f"of the unknown model {shown(contents['backbone'])}"
        raise ValueError(f"{path}: a damaged checkpoint of this project, {what}")
    for key in ("config", "model"):
        if not isinstance(contents[key], dict) or not all(isinstance(name, str) for name in contents[key]):
            raise ValueError(f"{path}: a damaged checkpoint of this project; its {key} is {shown(contents[key])}")
    wrong = [name for name, tensor in contents["model"].items() if not isinstance(tensor, torch.Tensor)]
    answers = contents.get("answers") or []
    if wrong or not isinstance(contents["task"], str) or not isinstance(answers, (list, tuple)) or not all(
            isinstance(answer, str) for answer in answers):
        what = f"{wrong[0]} is no tensor" if wrong else "its task is no name, or its answers are no list of words"
        raise ValueError(f"{path}: a damaged checkpoint of this project; {what}")
    unknown = contents["config"].keys() - {field.name for field in fields(BACKBONES[contents["backbone"]][0])}
    if unknown:
        raise ValueError(f"{path}: its config has {sorted(unknown)}, which this version does not know")
    return contents


def load_exactly(model, state, path, called=(), assign=False):
    """Fills a model from a state dict that must have exactly its names and shapes; else one sentence says which not.

    called: our name -> the file's names, for that sentence. assign: the model gets these tensors, not copies.
    """
    own, called = model.state_dict(), dict(called)
    theirs = lambda key: " + ".join(called.get(key) or [key])
    missing, foreign = sorted(own.keys() - state.keys()), sorted(theirs(key) for key in state.keys() - own.keys())
    shapes = [f"{theirs(key)} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    problems = [f"{what}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}" for what, keys in
                (("lacks", missing), ("has unknown", foreign), ("has other shapes", shapes)) if keys]
    if problems:
        raise ValueError(f"{path}: does not fit the model; it {'; it '.join(problems)}")
    model.load_state_dict(state, assign=assign)


def pack_tokenizer(tok):
    """The tokenizer's files as {name: text}, to travel inside a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        tok.save(directory)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(directory).iterdir())}


def unpack_tokenizer(files):
    """What pack_tokenizer packed; None for a checkpoint without one. ValueError if it is none."""
    if not files:
        return None
    if not isinstance(files, dict) or not all(isinstance(part, str) for item in files.items() for part in item):
        raise ValueError("its tokenizer is no table of files")
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name, text in files.items():
                (Path(directory) / Path(name).name).write_text(text, encoding="utf-8")
            return tokenizer.load(directory)
        except (ValueError, OSError) as error:
            raise ValueError(f"its tokenizer: {str(error).replace(directory, '').lstrip('/:, ')}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Opening any file.

def open_source(path):
    """Opens a file, or a folder that transformers wrote. ValueError or FileNotFoundError in a sentence."""
    path = file = Path(path)
    if path.is_dir():
        files = [path / (name + more) for name in ("model.safetensors", "pytorch_model.bin")
                 for more in ("", ".index.json")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path}: neither model.safetensors nor pytorch_model.bin is in this folder")
    contents = open_parts(file) if file.name.endswith(".index.json") else open_file(file)
    if isinstance(contents, dict) and contents.get("format") == FORMAT:
        contents = read(file)
        state = names.unwrapped(contents["model"], path)
        return Source(path, None, state, plain_dict(contents.get("settings")), contents, file.parent)
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: not a checkpoint of this project, nor a table of tensors: {shown(contents)}")
    state = next((contents[key] for key in ("state_dict", "model") if isinstance(contents.get(key), dict)), contents)
    state = {key: tensor for key, tensor in state.items() if isinstance(key, str) and isinstance(tensor, torch.Tensor)}
    state = names.unwrapped(state, path)
    family = names.family_of(state)
    if family is None:
        what = f"{len(state)} tensors ({', '.join(list(state)[:3])}, …)" if state else "no tensors"
        raise ValueError(f"{path}: not a checkpoint of this project nor of another that is known here; it holds {what}")
    if family in (names.FLM, names.VILT):
        hyper = plain_dict(contents.get("hyper_parameters"))
        settings = hyper | plain_dict(contents.get("config")) | plain_dict(hyper.get("config"))
    else:
        settings = read_config(file.parent / "config.json")
    return Source(path, family, state, settings, contents, file.parent)


def open_parts(index):
    """The tensors of a model that transformers cut into several files: `index` names the file of each."""
    table = plain_dict(read_config(index).get("weight_map"))
    if not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index}: has no weight_map, the table of its tensors' files")
    contents = {}
    for name in sorted(set(table.values())):
        part = open_file(index.parent / Path(name).name)
        contents |= plain_dict(part)
    missing = sorted(table.keys() - contents.keys())
    if missing:
        raise ValueError(f"{index}: names {missing[0]}, which none of its files has")
    return contents


def read_config(path):
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    return settings if isinstance(settings, dict) else {}


def load(path, **overrides):
    """Opens a checkpoint of a whole model -> the model in eval mode, on the CPU, in float32, whatever wrote it.

    Ours; FLM's Lightning files (pretrained, VQAv2, NLVR2, captioning, retrieval; its masked and autoregressive
    baselines); ViLT's Lightning files; transformers' ViLT, a folder or a file. overrides: fields of the Config that no
    file stores and the rule gets wrong (the number of the ViT's heads).

    Memory: float32 files are mapped. What is stored in half precision is converted: that takes twice the file for the
    model and, while it is opened, the file's own pages beside it.

    The model has .task ("pretrain", "vqa", "nlvr2", "caption", "retrieval"), .tokenizer and .answer_list (None where
    the file has none), .step, .report (a names.Report), .about (whose, recipe, data). A fine-tuned one has .head.
    """
    source, report = open_source(path), Report()
    source.told = overrides
    backbone = (source.contents["backbone"] if source.family is None else
                "flm" if source.family is names.FLM else "vilt")
    unknown = overrides.keys() - {field.name for field in fields(BACKBONES[backbone][0])}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: {backbone} has no such setting")
    with one_sentence(source.path):
        config, found, called, task = model_parts(source, report)
        answers = tok = None
        if source.family is None:
            answers, tok = source.contents.get("answers"), unpack_tokenizer(source.contents["tokenizer"])
        elif source.family is names.VILT_TRANSFORMERS:
            config, tok = with_vocabulary(config, source.folder)
            config = replace(config, **overrides)
            answers = labels(source.settings) if task == "vqa" else None
        with torch.device("meta"), Undrawn():   # no memory, no time is spent on weights that the file's replace
            model = model_of(config)
        load_exactly(model, found, path, called, assign=True)
    model.task, model.tokenizer, model.answer_list, model.report = task, tok, answers, report
    if source.family is not None:
        model.spare_rows = source.spare         # for `export`, as is pad_token_id
    if source.family is names.VILT_TRANSFORMERS:
        model.pad_token_id = source.settings.get("pad_token_id", config.pad_id)
    step = source.contents.get("step", source.contents.get("global_step", 0))
    model.step = step if type(step) is int else 0
    text = lambda name: value if isinstance(value := source.settings.get(name), str) else None
    datasets = source.settings.get("datasets")
    model.about = {"whose": source.family.about if source.family else "this project's",
                   "recipe": text("recipe") or text("exp_name"), "data": text("data"),
                   "datasets": [name for name in datasets if isinstance(name, str)]
                   if isinstance(datasets, (list, tuple)) else []}
    return model.eval()


@contextmanager
def one_sentence(path):
    """Whatever a file's odd settings lead to becomes a ValueError that begins with its path."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError, RecursionError, MemoryError) as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path}: its settings describe no model ({type(error).__name__}: {first_line})") from error


class Undrawn(torch.overrides.TorchFunctionMode):
    """Where models are made without drawing their weights. (On the meta device, normal_ alone imports 150 MB.)"""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


def model_parts(source, report):
    """A whole model -> (Config, our tensors, our name -> the file's names, task)."""
    if source.family is names.FLM:
        return models.flm_parts(source, report)
    if source.family in (names.VILT, names.VILT_TRANSFORMERS):
        return models.vilt_parts(source, report)
    if source.family is not None:
        raise ValueError(f"{source.path}: {source.family.about}, a part of a model: {beginning(source)}")
    odd = next((name for name, tensor in source.state.items() if not tensor.is_floating_point()), None)
    if odd:
        raise ValueError(f"{source.path}: {odd} holds {source.state[odd].dtype}, expected floating-point numbers")
    report.add("taken", source.state, file=source.path)
    found = {name: tensor.float() for name, tensor in source.state.items()}
    config = checked(BACKBONES[source.contents["backbone"]][0], source.contents["config"] | source.told, len(found))
    return config, found, {name: [name] for name in found}, source.contents["task"]


def beginning(source):
    return f"train.py --{'text' if source.family is names.BERT else 'vit'} begins from it"


def with_vocabulary(config, folder):
    """The Config and the tokenizer of a transformers folder: vocab.txt tells the special tokens."""
    if not (folder / "vocab.txt").is_file():
        return config, None
    tok = tokenizer.WordPiece.load(folder / "vocab.txt")
    if len(tok) > config.vocab_size:
        raise ValueError(f"{folder / 'vocab.txt'}: {len(tok)} words, but the model has {config.vocab_size}")
    return replace(config, cls_id=tok.cls_id, pad_id=tok.pad_id, sep_id=tok.sep_id, mask_id=tok.mask_id), tok


def labels(settings):
    """The answers that a config.json lists, in order; None where it only numbers them."""
    table = plain_dict(settings.get("id2label"))
    if not all(re.fullmatch(r"\d+", str(number)) and isinstance(label, str) for number, label in table.items()):
        raise ValueError("the id2label of its config.json is no table from 0, 1, … to answers")
    listed = [label for _, label in sorted(table.items(), key=lambda item: int(item[0]))]
    return listed if any(not re.fullmatch(r"LABEL_\d+", label) for label in listed) else None


# ---------------------------------------------------------------------------------------------------------------------
# Beginning from what others trained.

# Parts of our models -> why one of them may be missing in a model, or in the checkpoint that it begins from.
PARTS = {
    r"head\.": "the task's own head", r"vocab_head\.": "the vocabulary head", r"itm_head\.": "image-text matching",
    r"pooler\.": "the class vector", r"patch_head\.|mask_token$": "masked patch prediction",
    r"text_reconstructor\.|fusion_reconstructor\.|stream_type$": "the reconstructor and its streams",
}


def part_of(name):
    return next((why for pattern, why in PARTS.items() if re.match(pattern, name)), None)


def start(model, vit=None, text=None, checkpoint=None):
    """Fills a freshly drawn model, in place, with what others trained -> Report. The model may stand on any device.

    vit, text: for pretraining. FLM takes CLIP's ViT, less its last block, and RoBERTa's or BERT's embeddings and first
    layers; ViLT takes all of a ViT, and BERT's embeddings alone.
    checkpoint: for fine-tuning, any file that `load` opens, of the same backbone; vit and text win over it.
    Position grids are interpolated to the model's resolution; a larger vocabulary keeps its fresh rows.
    """
    report, own, filled = Report(), model.state_dict(), set()
    is_flm = isinstance(model.config, flm.Config)
    for path, parts_of in ((checkpoint, checkpoint_parts), (vit, models.clip_parts if is_flm else models.vit_parts),
                           (text, models.text_parts if is_flm else models.bert_embeddings)):
        if not path:
            continue
        found, called = parts_of(open_source(path), model, report)
        for name, tensor in found.items():
            found[name] = tensor = adapt(name, tensor, own, called[name], report, path)
            if name not in own or tensor.shape != own[name].shape:
                expected = f"the model has {tuple(own[name].shape)}" if name in own else "the model has no such tensor"
                raise ValueError(f"{path}: {called[name][0]} has the shape {tuple(tensor.shape)}; {expected}")
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)
        filled |= found.keys()
    for name in own:
        if name not in filled:
            if checkpoint and part_of(name) is None:
                raise ValueError(f"{checkpoint}: has no {name}, which the model needs; are they of different sizes?")
            report.add("fresh", [name], f"{part_of(name) or name.split('.')[0]}: drawn at random", "the model")
    return report


def adapt(name, tensor, own, keys, report, path):
    """A tensor of a file, made to fit the model's where that has a meaning; else as it is. keys: its names there."""
    if name not in own or tensor.shape[1:] != own[name].shape[1:] or len(tensor) == len(own[name]):
        return tensor
    have, want = len(tensor), len(own[name])
    if name in ("vit.position", "image_position", "position"):
        old, new = (int((rows - 1) ** 0.5) for rows in (have, want))
        how = "bilinear" if name == "position" else "bicubic"
        report.add("interpolated", keys, f"position grid, {old} x {old} -> {new} x {new}, {how}", path)
        if how == "bicubic":
            return layers.resize_positions(tensor, (new, new))
        # ViLT stretches its grid over every picture, bilinearly and corner on corner; so does this.
        grid = tensor[1:].T.reshape(1, -1, old, old)                                                # (1, D, g, g)
        grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
        return torch.cat([tensor[:1], grid.flatten(2)[0].T])
    if name == "token_type" and want == 3:
        report.add("grown", keys, "the second image's type starts as a copy of the first's", path)
        return torch.cat([tensor, tensor[1:]])
    if name in ("embed.word.weight", "vocab_head.decoder.weight", "vocab_head.decoder.bias", "embed.position.weight") \
            and want > have:
        report.add("grown", keys, f"{want - have} rows beside the {have}: drawn at random", path)
        return torch.cat([tensor, own[name][have:].to(tensor.device)])
    if name in ("token_type", "embed.position.weight"):
        report.add("taken", keys, f"its first {want} of {have} rows", path)
        return tensor[:want]
    return tensor


def checkpoint_parts(source, model, report):
    """All of a checkpoint that a model has a place for -> (our tensors, our name -> the file's names)."""
    c, path, own = model.config, source.path, model.state_dict()
    source.assumed = {name: getattr(c, name) for name in ("vit_heads", "text_heads", "heads") if hasattr(c, name)}
    with one_sentence(path):
        config, found, called, _ = model_parts(source, report)
    if type(config) is not type(c):
        raise ValueError(f"{path}: a checkpoint of {backbone_of(config)}, but the model is {backbone_of(c)}")
    # What shapes do not tell: as many heads, and, if both reconstruct, layers beside the same layers.
    alike = ["vit_heads", "text_heads", "heads"] if isinstance(c, flm.Config) else ["heads"]
    if c.objective == config.objective == "flm":
        alike += ["reconstructor_text_layers", "reconstructor_fusion_layers"]
    for name in alike:
        if getattr(config, name) != getattr(c, name):
            raise ValueError(f"{path}: {name} {getattr(config, name)}, but the model has {getattr(c, name)}")
    same_head = (config.head, config.answers) == (c.head, c.answers)
    for name in list(found):
        if part_of(name) and (name not in own or (name.startswith("head.") and not same_head)):
            report.add("ignored", called[name], f"{part_of(name)}: the model has none, or another", path)
            if c.head == "retrieval" and name.startswith("itm_head.") and not same_head:
                head = name.removeprefix("itm_")        # class 1 of image-text matching = they belong together
                found[head], called[head] = found[name][1:], called[name]
                report.add("grown", called[head], "the ranking head starts as image-text matching's class 1", path)
            del found[name]
    return found, called


# ---------------------------------------------------------------------------------------------------------------------
# ViLT for transformers.

ARCHITECTURES = {"none": "ViltModel", "vocab": "ViltForMaskedLM", "vqa": "ViltForQuestionAnswering",
                 "nlvr2": "ViltForImagesAndTextClassification", "retrieval": "ViltForImageAndTextRetrieval"}


def export(model, folder):
    """Writes a ViLT as transformers' save_pretrained would: config.json, weights, vocab.txt. -> what it cannot use

    That is a list of names: tensors (they are in the file, and transformers passes over them), and a tokenizer that is
    not written. `load` gives back the same model: config.json also holds our own settings, as flm_vilt.

    transformers has one eps for all LayerNorms, and ours differ (Config.eps, Config.text_eps). It gets text_eps: the
    word embeddings, which are normalised first, have the smallest numbers. Measured on a freshly drawn ViLT-B/32, that
    moves class vector and logits by 6e-6 at most, the image's class token by 8e-4; with eps for all it would be 7e-4
    and 1e-3. (Its own copies of the released models have 1e-12.)
    """
    c, folder, tok = model.config, Path(folder), getattr(model, "tokenizer", None)
    if not isinstance(c, vilt.Config):
        raise ValueError("only a ViLT can be exported: transformers has no FLM")
    swap = lambda lines: "\n".join(" ".join(line.split()[::-1]) for line in lines.splitlines())
    backbone, heads = names.pairs(swap(names.TRANSFORMERS_VILT)), names.pairs(swap(names.TRANSFORMERS_HEADS))
    useless = r"itm_head\.|patch_head\.|mask_token$"
    state, left_out = {}, []
    # BERT's embeddings have two types, of which a ViLT uses the first
    spare = getattr(model, "spare_rows", {"embed.token_type": model.embed.token_type.detach()})
    for name, tensor in model.state_dict().items():
        if re.match(useless, name):
            left_out.append(name)
        if name in spare:
            tensor = torch.cat([tensor, spare[name].to(tensor.device)])
        pieces = {name: tensor}
        if ".kv." in name:
            pieces = {name.replace(".kv.", part): half for part, half in zip((".key.", ".value."), tensor.chunk(2))}
        elif name in ("cls", "position", "mask_token"):
            pieces = {name: tensor.view(1, -1, c.width)}
        for piece, values in pieces.items():
            theirs, prefix = names.rename(piece, backbone), "" if c.head == "none" else "vilt."
            if theirs is None:
                theirs, prefix = names.rename(piece, heads), ""
            if c.head != "retrieval":           # two of their heads are one of ours: the table gives the last
                theirs = theirs.replace("rank_output.", "classifier.")
            state[prefix + theirs] = values.detach().cpu().clone().contiguous()
    classes = ["False", "True"] if c.head == "nlvr2" else [f"LABEL_{i}" for i in range(c.answers or 2)]
    if c.head == "vqa":
        classes = getattr(model, "answer_list", None) or classes
    config = {
        "architectures": [ARCHITECTURES[c.head]], "model_type": "vilt", "vocab_size": c.vocab_size,
        "type_vocab_size": 1 + len(spare.get("embed.token_type", ())),
        "modality_type_vocab_size": len(model.token_type) + len(spare.get("token_type", ())),
        "pad_token_id": getattr(model, "pad_token_id", c.pad_id),
        "max_position_embeddings": c.max_positions, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "intermediate_size": c.mlp_width, "hidden_act": "gelu", "qkv_bias": True,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": 0.0, "initializer_range": c.init_std,
        "layer_norm_eps": c.text_eps, "image_size": c.image_size, "patch_size": c.patch_size, "num_channels": 3,
        "max_image_length": -1, "num_images": 2 if c.head == "nlvr2" else -1,
        # transformers wants to tie the vocabulary head to the embeddings; with both in the file it keeps them apart.
        "tie_word_embeddings": False,
        "id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)},
        "flm_vilt": asdict(c)}
    make_folder(folder)
    try:
        from safetensors.torch import save_file
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except ImportError:
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if isinstance(tok, tokenizer.WordPiece):
        tok.save(folder)
    elif tok is not None:
        left_out.append("vocab.txt (the tokenizer is byte-level BPE)")
    return left_out


# ---------------------------------------------------------------------------------------------------------------------
# Commands.

def describe(path):
    """What a file is -> lines of text."""
    source = open_source(path)
    if source.family not in (None, names.FLM, names.VILT, names.VILT_TRANSFORMERS):
        count = sum(tensor.numel() for tensor in source.state.values())
        return f"{path}\nwhose        {source.family.about}\nparameters   {count:,}\nuse          {beginning(source)}"
    model = load(path)
    c, about = model.config, model.about
    if isinstance(c, flm.Config):
        layers = (f"ViT {c.vit_layers} x {c.vit_width}, text {c.text_layers} x {c.text_width}, "
                  f"fusion {c.fusion_layers} x {c.width}")
        if c.objective == "flm":
            layers += f", reconstructor {c.reconstructor_text_layers} + {c.reconstructor_fusion_layers}"
    else:
        layers = f"{c.layers} x {c.width}, feed-forward {c.mlp_width}"
    data = ", ".join(filter(None, [about["data"], *about["datasets"]]))
    answers, tok = model.answer_list, model.tokenizer
    rows = {
        "whose": about["whose"],
        "model": f"{backbone_of(c)}, objective {c.objective}, head {c.head}{', itm' if c.itm else ''}",
        "task": model.task, "step": f"{model.step:,}", "recipe": about["recipe"], "data": data, "layers": layers,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "image": f"{c.image_size} pixels, patches of {c.patch_size}",
        "answers": f"{', '.join(answers[:5])}, … ({len(answers):,})" if answers else
                   f"{c.answers:,}; the file has no list of them" if c.answers else "",
        "tokenizer": f"{type(tok).__name__}, {len(tok):,} tokens" if tok else
                     f"none in the file; a vocabulary of {c.vocab_size:,}"}
    lines = [f"{name:<13}{value}" for name, value in rows.items() if value]
    return "\n".join([str(path), *lines, "tensors", str(model.report)])


def read_answers(path):
    """A JSON list of answers, or a table {number: answer}."""
    try:
        answers = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if isinstance(answers, dict):
        answers = [answers.get(str(i)) for i in range(len(answers))]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}: a JSON list of answers, or a table from 0, 1, … to answers, is expected")
    return answers


def convert(args):
    model = load(args.input)
    if args.tokenizer:
        model.tokenizer = tokenizer.load(args.tokenizer)
    if args.answers:
        model.answer_list = read_answers(args.answers)
        if len(model.answer_list) != model.config.answers:
            raise ValueError(f"{args.answers}: {len(model.answer_list)} answers, but the model has {model.config.answers}")
    print(model.report)
    if args.to == "transformers":
        left_out = export(model, args.output)
        print(f"wrote {args.output}, all LayerNorms with eps {model.config.text_eps}" +
              (f"; transformers goes without {', '.join(left_out)}" if left_out else ""))
        return
    save(args.output, model.state_dict(), model.config, model.task, model.tokenizer and pack_tokenizer(model.tokenizer),
         step=model.step, answers=model.answer_list, settings={k: v for k, v in model.about.items() if k != "whose"})
    print(f"wrote {args.output}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("info", help="print what a file is")
    p.add_argument("path")
    p.set_defaults(run=lambda args: print(describe(args.path)))
    p = commands.add_parser("convert", help="rewrite what opens as a checkpoint of ours, or a ViLT for transformers")
    p.add_argument("input")
    p.add_argument("output", help="a file; with --to transformers, a folder")
    p.add_argument("--to", choices=("ours", "transformers"), default="ours")
    p.add_argument("--tokenizer", metavar="DIR", help="folder of vocab.json and merges.txt, or vocab.txt, to go along")
    p.add_argument("--answers", metavar="FILE", help="JSON list of a VQA head's answers, to go along")
    p.set_defaults(run=convert)
    p = commands.add_parser("download", help="fetch released files")
    download.add_arguments(p)
    p.set_defaults(run=download.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"weights.py: {error}")


if __name__ == "__main__":
    main()
