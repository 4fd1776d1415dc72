"""Checkpoints: tensors and plain values, written so that a crash never leaves half a file, opened without running code.

    save("runs/toy/last.pt", model=…, config=…)        # to a temporary name, then renamed
    model = load("runs/toy/last.pt")                    # a model in eval mode, with .task and .tokenizer
"""

import os
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

import flm
import tokenizer
import vilt

FORMAT = "flm-vilt-1"
BACKBONES = {"flm": (flm.Config, flm.FLM), "vilt": (vilt.Config, vilt.ViLT)}


def backbone_of(config):
    """The name of a Config's model in checkpoints."""
    return next(name for name, (config_class, _) in BACKBONES.items() if type(config) is config_class)


def model_of(config):
    """The model that a Config describes, its weights freshly drawn."""
    return BACKBONES[backbone_of(config)][1](config)


# ---------------------------------------------------------------------------------------------------------------------
# Our own files.

def save(path, model, config, task, tokenizer_files, **more):
    """Writes a checkpoint: `model` a state dict, `config` a Config, `more` tensors and plain values (optimizer, step, …).

    The file appears under its name only when all of it is on the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    contents = {"format": FORMAT, "backbone": backbone_of(config), "model": model, "config": asdict(config), "task": task,
                "tokenizer": tokenizer_files, **more}
    with open(partial, "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path):
    """Opens a checkpoint of ours as a dict; ValueError in one sentence for anything else. Never runs code from it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that opens safely ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project (its format is {FORMAT!r})")
    return contents


def load(path):
    """Opens a checkpoint -> the model in eval mode, with `.task`, `.tokenizer` and `.step` set."""
    contents = read(path)
    config_class, model_class = BACKBONES[contents["backbone"]]
    known = {field.name for field in fields(config_class)}
    unknown = set(contents["config"]) - known
    if unknown:
        raise ValueError(f"{path}: its config has {sorted(unknown)}, which this version does not know")
    model = model_class(config_class(**contents["config"]))
    load_exactly(model, contents["model"], path)
    model.task, model.tokenizer, model.step = contents["task"], unpack_tokenizer(contents["tokenizer"]), contents["step"]
    return model.eval()


def load_exactly(model, state, path):
    """Fills a model from a state dict that must have exactly its names and shapes; otherwise one sentence says which not."""
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
              for key in own if key in state and state[key].shape != own[key].shape]
    problems = [f"{what}: {', '.join(keys[:5])}{' …' if len(keys) > 5 else ''}" for what, keys in
                (("lacks", missing), ("has unknown", foreign), ("has other shapes", shapes)) if keys]
    if problems:
        raise ValueError(f"{path}: does not fit the model; it {'; it '.join(problems)}")
    model.load_state_dict(state)


def pack_tokenizer(tok):
    """The tokenizer's files as {name: text}, to travel inside a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        tok.save(directory)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(directory).iterdir())}


def unpack_tokenizer(files):
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            (Path(directory) / Path(name).name).write_text(text, encoding="utf-8")
        return tokenizer.load(directory)


# ---------------------------------------------------------------------------------------------------------------------
# Other people's names for the same tensors. A rule is (pattern, our name); query, key and value of one attention stand in
# three tensors there (or in one, CLIP's) and in two here, `q` and `kv`.

_BERT_LAYER = [
    (r"attention\.self\.query\.", "self_attention.q."), (r"attention\.self\.(key|value)\.", r"self_attention.\1."),
    (r"attention\.output\.dense\.", "self_attention.out."), (r"attention\.output\.LayerNorm\.", "self_norm."),
    (r"intermediate\.dense\.", "mlp.0."), (r"output\.dense\.", "mlp.2."), (r"output\.LayerNorm\.", "mlp_norm.")]
_CROSS_LAYER = [(r"cross" + pattern, name.replace("self_", "cross_")) for pattern, name in _BERT_LAYER[:4]] + _BERT_LAYER
_CLIP_BLOCK = [
    (r"ln_(\d)\.", r"norm\1."), (r"attn\.in_proj_", "attention.qkv."), (r"attn\.out_proj\.", "attention.out."),
    (r"mlp\.c_fc\.", "mlp.0."), (r"mlp\.c_proj\.", "mlp.2.")]
_EMBEDDINGS = [
    (r"word_embeddings\.", "word."), (r"position_embeddings\.", "position."),
    (r"token_type_embeddings\.weight", "token_type"), (r"LayerNorm\.", "norm.")]
_HEAD = [(r"transform\.dense\.", "dense."), (r"transform\.LayerNorm\.", "norm."), (r"decoder\.", "decoder."),
         (r"bias$", "decoder.bias")]
_CLIP_VISUAL = [
    (r"class_embedding", "cls"), (r"positional_embedding", "position"), (r"conv1\.", "patch."),
    (r"ln_(pre|post)\.", r"norm_\1.")]

# prefix in a released FLM state dict -> (prefix here, rules for what follows). Layers are numbered after the prefix.
FLM_NAMES = {
    r"vit_model\.visual\.transformer\.resblocks\.(\d+)\.": (r"vit.blocks.\1.", _CLIP_BLOCK),
    r"vit_model\.visual\.": ("vit.", _CLIP_VISUAL),
    r"text_transformer\.embeddings\.": ("embed.", _EMBEDDINGS),
    r"text_transformer\.encoder\.layer\.(\d+)\.": (r"text_layers.\1.", _BERT_LAYER),
    r"cross_modal_text_layers\.(\d+)\.": (r"fusion_layers.\1.", _CROSS_LAYER),
    r"fusion_layers_bottom\.(\d+)\.": (r"text_reconstructor.\1.", _CROSS_LAYER),
    r"fusion_layers_top\.(\d+)\.": (r"fusion_reconstructor.\1.", _CROSS_LAYER),
    r"cross_modal_text_transform\.": ("text_to_fusion.", []),
    r"cross_modal_image_transform\.": ("image_to_fusion.", []),
    r"token_type_embeddings\.weight": ("token_type", []),
    r"token_type_embeddings_flm\.weight": ("stream_type", []),
    r"cross_modal_text_pooler_f\.dense\.": ("pooler.", []),
    r"(?:lm|mlm)_score\.": ("vocab_head.", _HEAD),
}


def rename(key, names):
    """A foreign tensor name -> ours, or None where `names` has no rule for it."""
    for prefix, (ours, rules) in names.items():
        match = re.match(prefix, key)
        if match:
            ours, rest = match.expand(ours), key[match.end():]
            if not rules:
                return ours + rest
            for pattern, name in rules:
                inner = re.match(pattern, rest)
                if inner:
                    return ours + inner.expand(name) + rest[inner.end():]
    return None


def from_released_flm(state):
    """The state dict of a released FLM checkpoint -> ours.   Returns (state dict, names that have no place in the model)."""
    found, ignored = {}, []
    for key, tensor in state.items():
        name = rename(key, FLM_NAMES)
        if name is None:
            ignored.append(key)
        else:
            found[name] = tensor
    return merge_projections(found), ignored


def merge_projections(found):
    """Query, key and value tensors as others store them -> our `q` and `kv` ([key; value]), weights and biases."""
    ours = {}
    for name, tensor in found.items():
        if ".key." in name:
            ours[name.replace(".key.", ".kv.")] = torch.cat([tensor, found[name.replace(".key.", ".value.")]])
        elif ".qkv." in name:       # CLIP's in_proj is [query; key; value]
            q, kv = tensor.split([len(tensor) // 3, len(tensor) * 2 // 3])
            ours[name.replace(".qkv.", ".q.")], ours[name.replace(".qkv.", ".kv.")] = q, kv
        elif ".value." not in name:
            ours[name] = tensor
    return ours
