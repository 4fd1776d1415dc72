"""Other people's names for the same tensors: FLM, ViLT, CLIP, RoBERTa, BERT, ViT, transformers.

    found, called = translate(state, FLM, Report(), "pretrain_4m.ckpt")
                                            # ours -> tensor, ours -> the file's names

Others store query, key and value of one attention as three tensors, or as one. Here they are two,
`q` and `kv`. One tensor may also stand under several names there. `Report` says what became of
each.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch


class Report:
    """What became of every tensor of a file, and which of the model's no file had. str() prints it.

    taken          as it is
    interpolated   a position grid, at another resolution
    grown          rows were added to it
    fresh          of the model and in no file: drawn at random, or started as the reason says
    ignored        of no use to the model
    """

    KINDS = ("taken", "interpolated", "grown", "fresh", "ignored")

    def __init__(self):
        self.entries = {}           # (file, name) -> (kind, reason)

    def add(self, kind: str, names: Iterable[str], reason: str = "", file: str | Path = "") -> None:
        """Says what became of tensors of a file, or of the model; the last word on each counts."""
        for name in names:
            self.entries[str(file), name] = (kind, reason)

    def reasons(self, kind: str) -> dict[str, list[str]]:
        """Reason -> the names that it holds for."""
        found = {}
        for (_, name), (its, reason) in self.entries.items():
            if its == kind:
                found.setdefault(reason, []).append(name)
        return found

    def names(self, kind: str) -> list[str]:
        return [name for names in self.reasons(kind).values() for name in names]

    def __str__(self):
        lines = []
        for kind in self.KINDS:
            for reason, names in self.reasons(kind).items():
                example = names[0] if len(names) == 1 else f"{names[0]}, …"
                why = f"  {reason} ({example})" if reason else ""
                lines.append(f"{kind:<13}{len(names):>5}{why}")
        return "\n".join(lines)


# -- tables: how a name begins there, and how it begins here ---------------------------------------

def pairs(text: str) -> dict[str, str]:
    """A table written as pairs `theirs ours`; N stands for a layer's number."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


def under(theirs: str, ours: str, table: dict) -> dict[str, str]:
    """The same table below a module that has these two names.

    >>> under("layer.N.", "blocks.N.", {"ln_1.": "norm1."})
    {'layer.N.ln_1.': 'blocks.N.norm1.'}
    """
    return {theirs + inner: ours + name for inner, name in table.items()}


BERT_ATTENTION = pairs("""
    self.query.     attention.q.            self.key.           attention.key.
    self.value.     attention.value.        output.dense.       attention.out.
    output.LayerNorm.   norm.
""")
BERT_LAYER = under("attention.", "self_", BERT_ATTENTION) | pairs("""
    intermediate.dense.     mlp.0.          output.dense.       mlp.2.
    output.LayerNorm.       mlp_norm.
""")
CROSS_LAYER = under("crossattention.", "cross_", BERT_ATTENTION) | BERT_LAYER
EMBEDDINGS = pairs("""
    word_embeddings.                word.           position_embeddings.        position.
    token_type_embeddings.weight    token_type      LayerNorm.                  norm.
""")
HEAD = pairs("""
    transform.dense.    dense.              transform.LayerNorm.    norm.
    decoder.            decoder.            bias                    decoder.bias
""")
CLIP_NAMES = pairs("""
    visual.class_embedding          vit.cls
    visual.positional_embedding     vit.position
    visual.conv1.                   vit.patch.
    visual.ln_pre.                  vit.norm_pre.
    visual.ln_post.                 vit.norm_post.
""") | under("visual.transformer.resblocks.N.", "vit.blocks.N.", pairs("""
    ln_1.           norm1.                  attn.in_proj_       attention.qkv.
    ln_2.           norm2.                  attn.out_proj.      attention.out.
    mlp.c_fc.       mlp.0.                  mlp.c_proj.         mlp.2.
"""))
FLM_NAMES = {
    **under("vit_model.", "", CLIP_NAMES),
    **under("text_transformer.embeddings.", "embed.", EMBEDDINGS),
    **under("text_transformer.encoder.layer.N.", "text_layers.N.", BERT_LAYER),
    **under("cross_modal_text_layers.N.", "fusion_layers.N.", CROSS_LAYER),
    **under("fusion_layers_bottom.N.", "text_reconstructor.N.", CROSS_LAYER),
    **under("fusion_layers_top.N.", "fusion_reconstructor.N.", CROSS_LAYER),
    **under("lm_score.", "vocab_head.", HEAD),
    **under("mlm_score.", "vocab_head.", HEAD),
    **pairs("""
        cross_modal_text_transform.         text_to_fusion.
        cross_modal_image_transform.        image_to_fusion.
        token_type_embeddings.weight        token_type
        token_type_embeddings_flm.weight    stream_type
        cross_modal_text_pooler_f.dense.    pooler.
        vqa_classifier.                     head.
        nlvr2_classifier.                   head.
        rank_output.                        head.
    """)}
# A single stream (objectives mlm, ar) reads its class vector from the text.
SINGLE_STREAM_NAMES = FLM_NAMES | {"cross_modal_text_pooler.dense.": "pooler."}

TIMM_NAMES = pairs("""
    cls_token               cls
    pos_embed               position
    mask_token              mask_token
    patch_embed.proj.       patch.
    norm.                   norm.
""") | under("blocks.N.", "blocks.N.", pairs("""
    norm1.          norm1.                  attn.qkv.           attention.qkv.
    norm2.          norm2.                  attn.proj.          attention.out.
    mlp.fc1.        mlp.0.                  mlp.fc2.            mlp.2.
"""))
TIMM_CLIP_NAMES = under("", "vit.", TIMM_NAMES) | {"norm_pre.": "vit.norm_pre.",
                                                   "norm.": "vit.norm_post."}
VILT_NAMES = {
    **under("transformer.", "", TIMM_NAMES),
    **under("text_embeddings.", "embed.", EMBEDDINGS),
    **under("mlm_score.", "vocab_head.", HEAD),
    **under("mpp_score.", "patch_head.", HEAD),
    **pairs("""
        token_type_embeddings.weight    token_type
        pooler.dense.                   pooler.
        itm_score.fc.                   itm_head.
        vqa_classifier.                 head.
        nlvr2_classifier.               head.
        rank_output.                    head.
    """)}

# transformers' ViT, and its ViLT. `export` reads the tables of the ViLT from right to left.
TRANSFORMERS_VIT = pairs("""
    embeddings.cls_token                        cls
    embeddings.position_embeddings              position
    embeddings.patch_embeddings.projection.     patch.
    layernorm.                                  norm.
""") | under("encoder.layer.N.", "blocks.N.", pairs("""
    layernorm_before.   norm1.              attention.attention.query.  attention.q.
    layernorm_after.    norm2.              attention.attention.key.    attention.key.
    intermediate.dense. mlp.0.              attention.attention.value.  attention.value.
    output.dense.       mlp.2.              attention.output.dense.     attention.out.
"""))
TRANSFORMERS_VILT = {
    **TRANSFORMERS_VIT,
    **under("embeddings.text_embeddings.", "embed.", EMBEDDINGS),
    **pairs("""
        embeddings.token_type_embeddings.weight     token_type
        embeddings.mask_token                       mask_token
        pooler.dense.                               pooler.
    """)}
TRANSFORMERS_HEADS = {
    **under("mlm_score.", "vocab_head.", HEAD),
    **under("mpp_score.", "patch_head.", HEAD),
    "itm_score.fc.": "itm_head.", "classifier.": "head.", "rank_output.": "head."}
TRANSFORMERS_CLIP = pairs("""
    embeddings.class_embedding              vit.cls
    embeddings.patch_embedding.             vit.patch.
    embeddings.position_embedding.weight    vit.position
    pre_layrnorm.                           vit.norm_pre.
    post_layernorm.                         vit.norm_post.
""") | under("encoder.layers.N.", "vit.blocks.N.", pairs("""
    layer_norm1.    norm1.                  self_attn.q_proj.       attention.q.
    layer_norm2.    norm2.                  self_attn.k_proj.       attention.key.
    mlp.fc1.        mlp.0.                  self_attn.v_proj.       attention.value.
    mlp.fc2.        mlp.2.                  self_attn.out_proj.     attention.out.
"""))
BERT_NAMES = {
    **under("embeddings.", "embed.", EMBEDDINGS),
    **under("encoder.layer.N.", "text_layers.N.", BERT_LAYER)}


# -- kinds of files --------------------------------------------------------------------------------

class Family(NamedTuple):
    about: str              # whose it is
    sign: str               # some name of such a file begins so
    names: dict
    aliases: dict = {}      # beginning of a name -> where the same tensors stand
    unused: dict = {}       # regular expression -> why no model has a place for it
    flag: str = ""          # of train.py, for a part of a model: what begins from it


CONSTANT = {r".*\.(position_ids|token_type_ids)$": "a constant"}
PROJECTION = "CLIP's projection, which comes after what is used"

OURS = Family("this project's", "", {"": ""})
FLM = Family(
    "FLM", "cross_modal_text_layers.", FLM_NAMES,
    {"text_transformer2.": "text_transformer.",
     "fusion_token_embedding.": "text_transformer.embeddings.",
     "cross_modal_text_layers_r.": "cross_modal_text_layers.",
     "cross_modal_layers.": "cross_modal_text_layers.",
     "cross_modal_text_transform_r.": "cross_modal_text_transform.",
     "cross_modal_text_transform_f.": "cross_modal_text_transform.",
     "lm_score_r.": "lm_score.", "lm_score_f.": "lm_score."},
    CONSTANT | {
        r"vit_model\.(?!visual\.)|vit_model\.visual\.proj$":
            "of CLIP's text side or its projection, never used",
        r"text_transformer\.pooler\.": "RoBERTa's own pooler, never used",
        r"cross_modal_image_pooler\.|lm_type_embeddings\.": "never used",
        r"itm_score(_flm)?\.": "image-text matching, which the original cannot train"})
VILT = Family("ViLT", "transformer.patch_embed.", VILT_NAMES, unused=CONSTANT)
VILT_TRANSFORMERS = Family(
    "ViLT, as transformers writes it", "embeddings.text_embeddings.",
    TRANSFORMERS_VILT | TRANSFORMERS_HEADS, {"vilt.": ""}, CONSTANT)
CLIP = Family(
    "CLIP, as OpenAI writes it", "visual.conv1.", CLIP_NAMES,
    unused={r"visual\.proj$": PROJECTION, r"(?!visual\.)": "CLIP's text side"}, flag="--vit")
CLIP_TRANSFORMERS = Family(
    "CLIP, as transformers writes it", "embeddings.patch_embedding.", TRANSFORMERS_CLIP,
    {"vision_model.": ""}, CONSTANT | {
        r"visual_projection\.": PROJECTION,
        r"text_model\.|text_projection\.|logit_scale$|logit_bias$": "CLIP's text side"}, "--vit")
CLIP_TIMM = Family("CLIP's ViT, as timm writes it", "norm_pre.", TIMM_CLIP_NAMES,
                   unused={r"head\.": PROJECTION}, flag="--vit")
VIT = Family(
    "ViT, as transformers writes it", "embeddings.patch_embeddings.", TRANSFORMERS_VIT,
    {"vit.": ""}, {r"pooler\.|classifier\.": "ViT's head",
                   r"embeddings\.mask_token$": "ViT's mask token"}, "--vit")
TIMM = Family("ViT, as timm writes it", "patch_embed.proj.", TIMM_NAMES,
              unused={r"head\.|head_drop|fc_norm\.|pre_logits\.": "ViT's head"}, flag="--vit")
BERT = Family(
    "BERT or RoBERTa", "embeddings.word_embeddings.", BERT_NAMES, {"roberta.": "", "bert.": ""},
    CONSTANT | {r"pooler\.": "the text model's own pooler",
                r"lm_head\.|cls\.|classifier\.|qa_outputs\.": "the text model's own heads"},
    "--text")
FAMILIES = (FLM, VILT, VILT_TRANSFORMERS, CLIP, CLIP_TRANSFORMERS, CLIP_TIMM, VIT, TIMM, BERT)


def family_of(state: dict) -> Family | None:
    """The first family whose sign one of these names has."""
    for family in FAMILIES:
        if any(canonical(key, family.aliases).startswith(family.sign) for key in state):
            return family
    return None


# -- translation -----------------------------------------------------------------------------------

def rename(key: str, table: dict) -> str | None:
    """A name of one side of a table -> the other side's, or None where the table has no such row.

    >>> rename("layer.3.ln_1.bias", {"layer.N.ln_1.": "blocks.N.norm1."})
    'blocks.3.norm1.bias'
    """
    number = re.search(r"\.\d+\.", key)
    if number:
        key = key.replace(number[0], ".N.", 1)
    for theirs, ours in table.items():
        if key.startswith(theirs):
            name = ours + key.removeprefix(theirs)
            return name.replace(".N.", number[0]) if number else name
    return None


def unwrapped(key: str) -> str:
    """A name without what wrappers put into it: `module.`, `model.`, `_orig_mod.`"""
    return re.sub(r"^(?:module\.|model\.)+", "", key.replace("_orig_mod.", ""))


def canonical(key: str, aliases: dict) -> str:
    """The name under which a tensor stands that may have several, or an old one."""
    for alias, name in aliases.items():
        if key.startswith(alias):
            key = name + key.removeprefix(alias)
            break
    # BERT's first files
    return (key.replace("LayerNorm.gamma", "LayerNorm.weight")
               .replace("LayerNorm.beta", "LayerNorm.bias"))


def translate(state: dict, family: Family, report: Report, path: str | Path,
              unused: dict | None = None) -> tuple[dict, dict]:
    """A state dict -> ({our name: tensor, float32}, {our name: [the file's names]}).

    unused: pattern -> reason: what, beside the family's own list, has no place in the model at
    hand. ValueError for an unknown name, for other than floating-point numbers, and for names that
    should mean the same tensor and do not.
    """
    unused = family.unused | (unused or {})
    standard = {key: canonical(key, family.aliases) for key in state}
    found, called = {}, {}
    for key in sorted(state, key=lambda key: standard[key] != key):     # tensors before aliases
        tensor = state[key]
        reasons = [why for pattern, why in unused.items() if re.match(pattern, standard[key])]
        if reasons:
            report.add("ignored", [key], reasons[0], path)
            continue
        name = rename(standard[key], family.names)
        if name is None:
            raise ValueError(f"{path}: unknown tensor {key} of shape {tuple(tensor.shape)} "
                             f"in a file of {family.about}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} holds {tensor.dtype}, "
                             f"expected floating-point numbers")
        if name.removeprefix("vit.") in ("cls", "mask_token", "position"):
            tensor = tensor.squeeze()       # others store them as (1, 1, D) and (1, N, D)
        if name in found:
            first, twin = called[name][0], found[name]
            shared = tensor.data_ptr() == twin.data_ptr()       # views of the same numbers
            if not shared and not torch.equal(tensor.to(twin.dtype), twin):
                raise ValueError(f"{path}: {key} and {first} should be the same tensor and differ; "
                                 f"a model that does not share these weights is not supported")
            report.add("ignored", [key], f"the same tensors as {first.split('.')[0]}", path)
            continue
        found[name], called[name] = tensor.detach(), [key]
        report.add("taken", [key], file=path)
    merge_projections(found, called)
    for name in found:      # one after the other: of half-precision files only one lies here twice
        found[name] = found[name].float().contiguous()
    return found, called


def check_finite(found: dict, called: dict, path: str | Path) -> None:
    """ValueError for NaN or infinite weights. Takes one pass (0.1 s a GB) and no memory."""
    for name, tensor in found.items():
        extremes = torch.stack(tensor.aminmax()) if tensor.numel() else tensor
        if not torch.isfinite(extremes).all():
            raise ValueError(f"{path}: {' + '.join(called[name])} holds NaN or infinite numbers")


def merge_projections(found: dict, called: dict) -> None:
    """Turns query, key and value as others store them into our `q` and `kv` ([key; value])."""
    for name in list(found):
        value = name.replace(".key.", ".value.")
        if ".qkv." in name:                 # [query; key; value] in one tensor
            tensor, keys = found.pop(name), called.pop(name)
            q, kv = tensor.split([len(tensor) // 3, len(tensor) - len(tensor) // 3])
            for part, rows in ((".q.", q), (".kv.", kv)):
                ours = name.replace(".qkv.", part)
                found[ours], called[ours] = rows, keys
        elif ".key." in name and value in found:
            ours = name.replace(".key.", ".kv.")
            found[ours] = torch.cat([found.pop(name), found.pop(value)])
            called[ours] = called.pop(name) + called.pop(value)
