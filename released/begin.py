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
from released.models import Source, first_rows
from released.names import Report


def expect(source: Source, families: tuple, what: str) -> None:
    if source.family not in families:
        raise ValueError(f"it is {source.family.about}; {what} is expected here")


def expect_heads(settings: dict, wants: int) -> None:
    """ValueError where a config.json has another number of heads: no shape tells it."""
    has = settings.get("num_attention_heads", wants)
    if has != wants:
        raise ValueError(f"a transformer with heads {has}, but the model's has {wants}")


def is_roberta(source: Source) -> bool:
    """RoBERTa has one token type, and counts positions from 2; BERT has two, and counts from 0."""
    kind = source.settings.get("model_type")
    if kind:
        return kind == "roberta"
    return any(key.endswith("token_type_embeddings.weight") and len(tensor) == 1
               for key, tensor in source.state.items())


CLIP_BLOCK = r"(?:visual\.transformer\.resblocks|encoder\.layers|blocks)\."


def clip_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """CLIP's ViT without its last block, for FLM."""
    expect(source, (names.CLIP, names.CLIP_TRANSFORMERS, names.CLIP_TIMM), "CLIP")
    settings = plain_dict(source.settings.get("vision_config")) or source.settings
    expect_heads(settings, model.config.vit_heads)
    activation = settings.get("hidden_act", "quick_gelu")
    if source.family is names.CLIP_TRANSFORMERS and activation != "quick_gelu":
        raise ValueError(f"a ViT with {activation}; OpenAI's, with quick_gelu, is expected")
    standard = [names.canonical(key, source.family.aliases) for key in source.state]
    blocks = [re.match(CLIP_BLOCK + r"(\d+)\.", key) for key in standard]
    last = max(int(block[1]) for block in blocks if block)
    unused = {rf"{CLIP_BLOCK}{last}\.": "CLIP's last block, which FLM does without"}
    return names.translate(source.state, source.family, report, source.path, unused)


def vit_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """A ViT, for ViLT, whose blocks and positions began as one."""
    expect(source, (names.VIT, names.TIMM), "a ViT of timm or transformers")
    expect_heads(source.settings, model.config.heads)
    unused = {}
    if not model.config.mpp:
        unused[r"mask_token$"] = "masked patch prediction, which the model does not do"
    return names.translate(source.state, source.family, report, source.path, unused)


def text_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """RoBERTa's or BERT's embeddings and first layers, for FLM.

    BERT's positions are shifted by RoBERTa's two special ones. FLM's LayerNorms have RoBERTa's eps,
    1e-5; BERT's have 1e-12.
    """
    expect(source, (names.BERT,), "RoBERTa or BERT")
    c, path = model.config, source.path
    expect_heads(source.settings, c.text_heads)
    kept = "|".join(str(layer) for layer in range(c.text_layers))
    unused = {rf"encoder\.layer\.(?!(?:{kept})\.)": f"a layer above the first {c.text_layers}"}
    found, called = names.translate(source.state, source.family, report, path, unused)
    first_rows("embed.token_type", 1, found, called, report, path)
    if not is_roberta(source):
        name = "embed.position.weight"
        report.add("grown", called[name], "BERT's positions, after RoBERTa's two special ones",
                   path)
        special = model.embed.position.weight.detach()[:2].to(found[name].device)
        found[name] = torch.cat([special, found[name]])
    return found, called


def bert_embeddings(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """BERT's embeddings alone, for ViLT."""
    expect(source, (names.BERT,), "BERT")
    if is_roberta(source):
        raise ValueError("RoBERTa; ViLT begins from BERT, whose positions count from 0")
    unused = {r"encoder\.": "ViLT takes BERT's embeddings alone"}
    found, called = names.translate(source.state, source.family, report, source.path, unused)
    first_rows("embed.token_type", 1, found, called, report, source.path)
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
            raise ValueError(f"{name} {has}, but the model has {wants}")
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


# -- tensors of another size -----------------------------------------------------------------------

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
