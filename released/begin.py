"""What a model begins from: CLIP, a ViT, RoBERTa, BERT, or a checkpoint of the same backbone.

`clip_parts`, `vit_parts`, `text_parts` and `bert_embeddings` return (our name -> tensor, our name
-> the file's names) and account for every tensor of the file, as models.py does for whole models.
`adapt` makes a tensor of another size fit where that has a meaning.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import flm
import layers
import vilt
from released import names
from released.files import plain_dict
from released.models import Source, first_rows, sizes, without_batch
from released.names import Report


def expect(source: Source, families: tuple, what: str) -> None:
    if source.family not in families:
        found = source.family.about if source.family else "a checkpoint of this project"
        raise ValueError(f"{source.path}: {found}; {what} is expected here")


def expect_sizes(source: Source, what: str, rows: tuple) -> None:
    """ValueError where a size differs. rows: (its name, the file's, the model's)"""
    for name, has, wants in rows:
        if has != wants:
            raise ValueError(f"{source.path}: a {what} with {name} {has}, "
                             f"but the model's has {wants}")


CLIP_BLOCK = r"(?:visual\.transformer\.resblocks|(?:vision_model\.)?encoder\.layers|blocks)\."


def clip_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """CLIP's ViT without its last block, for FLM."""
    expect(source, (names.CLIP, names.CLIP_TRANSFORMERS, names.CLIP_TIMM), "CLIP")
    c, path = model.config, source.path
    stored = plain_dict(source.settings.get("vision_config")) or source.settings
    blocks = [re.match(CLIP_BLOCK + r"(\d+)\.", name) for name in source.state]
    depth = len({block[1] for block in blocks if block})
    unused = {rf"{CLIP_BLOCK}{depth - 1}\.": "CLIP's last block, which FLM does without"}
    found, called = names.translate(source.state, source.family, report, path, unused)
    without_batch(found, "vit.cls", "vit.position")
    size, _ = sizes(found, path)
    expect_sizes(source, "ViT", (
        ("patches", size("vit.patch.weight", 2), c.patch_size),
        ("width", size("vit.patch.weight"), c.vit_width),
        ("heads", stored.get("num_attention_heads", c.vit_heads), c.vit_heads)))
    if depth - 1 != c.vit_layers:
        raise ValueError(f"{path}: a ViT of {depth} blocks, of which FLM uses {depth - 1}, "
                         f"but the model has {c.vit_layers}")
    activation = stored.get("hidden_act", "quick_gelu")
    if source.family is names.CLIP_TRANSFORMERS and activation != "quick_gelu":
        raise ValueError(f"{path}: a ViT with {activation}; OpenAI's, with quick_gelu, is expected")
    return found, called


def vit_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """A ViT, for ViLT, whose blocks and positions began as one."""
    expect(source, (names.VIT, names.TIMM), "a ViT of timm or transformers")
    c = model.config
    unused = {}
    if not c.mpp:
        unused[r"mask_token$"] = "masked patch prediction, which the model does not do"
    found, called = names.translate(source.state, source.family, report, source.path, unused)
    without_batch(found, "cls", "mask_token", "position")
    size, _ = sizes(found, source.path)
    expect_sizes(source, "ViT", (
        ("patches", size("patch.weight", 2), c.patch_size),
        ("width", size("patch.weight"), c.width),
        ("heads", source.settings.get("num_attention_heads", c.heads), c.heads)))
    return found, called


def text_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """RoBERTa's or BERT's embeddings and first layers, for FLM.

    RoBERTa counts positions from 2 (row 1 is padding's), BERT from 0: its rows are shifted by two.
    FLM's LayerNorms have RoBERTa's eps, 1e-5; BERT's have 1e-12.
    """
    expect(source, (names.BERT,), "RoBERTa or BERT")
    c, path = model.config, source.path
    kept = "|".join(str(layer) for layer in range(c.text_layers))
    deeper = rf"(?:roberta\.|bert\.)?encoder\.layer\.(?!(?:{kept})\.)"
    unused = {deeper: f"a layer above the first {c.text_layers}"}
    found, called = names.translate(source.state, source.family, report, path, unused)
    size, count = sizes(found, path)
    expect_sizes(source, "text transformer", (
        ("width", size("embed.word.weight", 1), c.text_width),
        ("layers", count("text_layers."), c.text_layers),
        ("heads", source.settings.get("num_attention_heads", c.text_heads), c.text_heads),
        ("feed-forward", size("text_layers.0.mlp.0.weight"), 4 * c.text_width)))
    one_type = size("embed.token_type") == 1
    kind = source.settings.get("model_type") or ("roberta" if one_type else "bert")
    first_rows("embed.token_type", 1, found, called, report, source)
    if kind != "roberta":
        name = "embed.position.weight"
        report.add("grown", called[name], "BERT's positions, after RoBERTa's two special ones",
                   path)
        special = model.embed.position.weight.detach()[:2].to(found[name].device)
        found[name] = torch.cat([special, found[name]])
    return found, called


def bert_embeddings(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """BERT's embeddings alone, for ViLT."""
    expect(source, (names.BERT,), "BERT")
    unused = {r"(?:roberta\.|bert\.)?encoder\.": "ViLT takes BERT's embeddings alone"}
    found, called = names.translate(source.state, source.family, report, source.path, unused)
    size, _ = sizes(found, source.path)
    kind = source.settings.get("model_type", "bert")
    if kind != "bert" or size("embed.token_type") == 1:
        raise ValueError(f"{source.path}: RoBERTa; ViLT begins from BERT, "
                         f"whose positions count from 0")
    first_rows("embed.token_type", 1, found, called, report, source)
    return found, called


# -- a checkpoint of the same backbone -------------------------------------------------------------

# Parts of our models that may be missing, in a model or in the checkpoint that it begins from.
PARTS = {
    r"head\.": "the task's own head",
    r"vocab_head\.": "the vocabulary head",
    r"itm_head\.": "image-text matching",
    r"pooler\.": "the class vector",
    r"patch_head\.|mask_token$": "masked patch prediction",
    r"text_reconstructor\.|fusion_reconstructor\.|stream_type$": "the reconstructor "
                                                                 "and its streams",
}


def part_of(name: str) -> str | None:
    for pattern, part in PARTS.items():
        if re.match(pattern, name):
            return part
    return None


def head_fields(config: flm.Config | vilt.Config) -> list[str]:
    """The fields of a Config that no shape tells."""
    return ["vit_heads", "text_heads", "heads"] if isinstance(config, flm.Config) else ["heads"]


def keep_fitting_parts(config: flm.Config | vilt.Config, found: dict, called: dict,
                       model: nn.Module, report: Report, path: Path) -> None:
    """Drops from `found` what the model has no place for, or refuses the checkpoint.

    config, found, called: the checkpoint, of the same backbone, as its whole model would be read.
    """
    c, own = model.config, model.state_dict()
    # What shapes do not tell: as many heads, and, if both reconstruct, beside the same layers.
    alike = head_fields(c)
    if c.objective == config.objective == "flm":
        alike += ["reconstructor_text_layers", "reconstructor_fusion_layers"]
    for name in alike:
        has, wants = getattr(config, name), getattr(c, name)
        if has != wants:
            raise ValueError(f"{path}: {name} {has}, but the model has {wants}")
    same_head = (config.head, config.answers) == (c.head, c.answers)
    for name in list(found):
        part = part_of(name)
        has_place = name in own and (same_head or not name.startswith("head."))
        if part is None or has_place:
            continue
        tensor = found.pop(name)
        report.add("ignored", called[name], f"{part}: the model has none, or another", path)
        if c.head == "retrieval" and name.startswith("itm_head.") and not same_head:
            head = name.removeprefix("itm_")    # class 1 of image-text matching: they match
            found[head], called[head] = tensor[1:], called[name]
            report.add("grown", called[head],
                       "the ranking head starts as image-text matching's class 1", path)


# -- the places of a model -------------------------------------------------------------------------

def check_place(tensor: torch.Tensor, place: torch.Tensor | None, name: str, path: str) -> None:
    """ValueError unless the model has a place of this shape for a tensor of a file."""
    if place is None:
        expected = "the model has no such tensor"
    else:
        expected = f"the model has {tuple(place.shape)}"
    if place is None or tensor.shape != place.shape:
        raise ValueError(f"{path}: {name} has the shape {tuple(tensor.shape)}; {expected}")


GROWING = ("embed.word.weight", "vocab_head.decoder.weight", "vocab_head.decoder.bias",
           "embed.position.weight")


def adapt(name: str, tensor: torch.Tensor, own: dict, keys: list[str], report: Report,
          path: str) -> torch.Tensor:
    """A tensor of a file, made to fit the model's where that makes sense. keys: its names there"""
    if name not in own or tensor.shape[1:] != own[name].shape[1:]:
        return tensor
    has, wants = len(tensor), len(own[name])
    if has == wants:
        return tensor
    if name in ("vit.position", "image_position", "position"):
        old, new = int((has - 1) ** 0.5), int((wants - 1) ** 0.5)
        how = "bilinear" if name == "position" else "bicubic"
        report.add("interpolated", keys, f"position grid, {old} x {old} -> {new} x {new}, {how}",
                   path)
        if how == "bicubic":
            return layers.resize_positions(tensor, (new, new))
        # ViLT stretches its grid over every picture, bilinearly, corner on corner; so does this.
        grid = tensor[1:].T.reshape(1, -1, old, old)                                # (1, D, g, g)
        grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
        return torch.cat([tensor[:1], grid.flatten(2)[0].T])                        # (1 + g², D)
    if name == "token_type" and wants == 3:
        report.add("grown", keys, "the second image's type starts as a copy of the first's", path)
        return torch.cat([tensor, tensor[1:]])
    if name in GROWING and wants > has:
        reason = f"{wants - has} rows beside the {has}: drawn at random"
        report.add("grown", keys, reason, path)
        return torch.cat([tensor, own[name][has:].to(tensor.device)])
    if name in ("token_type", "embed.position.weight"):
        report.add("taken", keys, f"its first {wants} of {has} rows", path)
        return tensor[:wants]
    return tensor
