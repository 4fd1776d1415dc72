"""Other people's names for the same tensors: FLM, ViLT, CLIP, RoBERTa, BERT, ViT, transformers.

    found, called = translate(state, FLM, Report(), "pretrain_4m.ckpt")
                                            # ours -> tensor, ours -> the file's names

What others store otherwise than we do: query, key and value of one attention stand in three
tensors (or in one) there, and in two here, `q` and `kv`; one tensor may stand under several names
there. `Report` says what became of each.
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

    def names(self, kind: str) -> list[str]:
        return [name for (_, name), (its, _) in self.entries.items() if its == kind]

    def reasons(self, kind: str) -> dict[str, list[str]]:
        """Reason -> the names that it holds for."""
        found = {}
        for (_, name), (its, reason) in self.entries.items():
            if its == kind:
                found.setdefault(reason, []).append(name)
        return found

    def __str__(self):
        lines = []
        for kind in self.KINDS:
            for reason, names in self.reasons(kind).items():
                example = names[0] if len(names) == 1 else f"{names[0]}, …"
                why = f"  {reason} ({example})" if reason else ""
                lines.append(f"{kind:<13}{len(names):>5}{why}")
        return "\n".join(lines)


# -- rules -----------------------------------------------------------------------------------------
# A table maps the beginning of a foreign name, a regular expression, to ours and to the rules for
# what follows.

def pairs(text: str) -> dict:
    """A table written as lines `theirs ours`; N stands for a layer's number.

    >>> pairs("blocks.N.attn.proj. blocks.N.attention.out.")
    {'blocks\\\\.(\\\\d+)\\\\.attn\\\\.proj\\\\.': ('blocks.\\\\1.attention.out.', [])}
    """
    table = {}
    for line in text.strip().splitlines():
        theirs, ours = line.split()
        pattern = re.escape(theirs.replace(".N.", ".#.")).replace(r"\#", r"(\d+)")
        table[pattern] = (ours.replace(".N.", r".\1."), [])
    return table


def after(prefix: str, table: dict) -> dict:
    """The same table for names that may also have a prefix before them."""
    return {f"(?:{re.escape(prefix)})?" + theirs: ours for theirs, ours in table.items()}


BERT_LAYER = [
    (r"attention\.self\.query\.", "self_attention.q."),
    (r"attention\.self\.(key|value)\.", r"self_attention.\1."),
    (r"attention\.output\.dense\.", "self_attention.out."),
    (r"attention\.output\.LayerNorm\.", "self_norm."),
    (r"intermediate\.dense\.", "mlp.0."),
    (r"output\.dense\.", "mlp.2."),
    (r"output\.LayerNorm\.", "mlp_norm."),
]
CROSS_ATTENTION = [(r"cross" + theirs, ours.replace("self_", "cross_"))
                   for theirs, ours in BERT_LAYER[:4]]
CROSS_LAYER = CROSS_ATTENTION + BERT_LAYER
CLIP_BLOCK = [
    (r"ln_(\d)\.", r"norm\1."),
    (r"attn\.in_proj_", "attention.qkv."),
    (r"attn\.out_proj\.", "attention.out."),
    (r"mlp\.c_fc\.", "mlp.0."),
    (r"mlp\.c_proj\.", "mlp.2."),
]
EMBEDDINGS = [
    (r"word_embeddings\.", "word."),
    (r"position_embeddings\.", "position."),
    (r"token_type_embeddings\.weight", "token_type"),
    (r"LayerNorm\.", "norm."),
]
HEAD = [
    (r"transform\.dense\.", "dense."),
    (r"transform\.LayerNorm\.", "norm."),
    (r"decoder\.", "decoder."),
    (r"bias$", "decoder.bias"),
]
CLIP_VISUAL = [
    (r"class_embedding$", "cls"),
    (r"positional_embedding$", "position"),
    (r"conv1\.", "patch."),
    (r"ln_(pre|post)\.", r"norm_\1."),
]
CLIP_NAMES = {
    r"visual\.transformer\.resblocks\.(\d+)\.": (r"vit.blocks.\1.", CLIP_BLOCK),
    r"visual\.": ("vit.", CLIP_VISUAL),
}
FLM_NAMES = {
    r"vit_model\." + prefix: ours for prefix, ours in CLIP_NAMES.items()
} | {
    r"text_transformer\.embeddings\.": ("embed.", EMBEDDINGS),
    r"text_transformer\.encoder\.layer\.(\d+)\.": (r"text_layers.\1.", BERT_LAYER),
    r"cross_modal_text_layers\.(\d+)\.": (r"fusion_layers.\1.", CROSS_LAYER),
    r"fusion_layers_bottom\.(\d+)\.": (r"text_reconstructor.\1.", CROSS_LAYER),
    r"fusion_layers_top\.(\d+)\.": (r"fusion_reconstructor.\1.", CROSS_LAYER),
    r"cross_modal_text_transform\.": ("text_to_fusion.", []),
    r"cross_modal_image_transform\.": ("image_to_fusion.", []),
    r"token_type_embeddings\.weight": ("token_type", []),
    r"token_type_embeddings_flm\.weight": ("stream_type", []),
    r"cross_modal_text_pooler_f\.dense\.": ("pooler.", []),
    r"(?:lm|mlm)_score\.": ("vocab_head.", HEAD),
    r"(?:vqa|nlvr2)_classifier\.": ("head.", []),
    r"rank_output\.": ("head.", []),
}
# A single stream (objectives mlm, ar) reads its class vector from the text.
SINGLE_STREAM_NAMES = FLM_NAMES | {r"cross_modal_text_pooler\.dense\.": ("pooler.", [])}

TIMM_NAMES = pairs("""
    cls_token               cls
    pos_embed               position
    mask_token              mask_token
    patch_embed.proj.       patch.
    blocks.N.norm1.         blocks.N.norm1.
    blocks.N.attn.qkv.      blocks.N.attention.qkv.
    blocks.N.attn.proj.     blocks.N.attention.out.
    blocks.N.norm2.         blocks.N.norm2.
    blocks.N.mlp.fc1.       blocks.N.mlp.0.
    blocks.N.mlp.fc2.       blocks.N.mlp.2.
    norm.                   norm.
""")
TIMM_CLIP_NAMES = {theirs: (f"vit.{ours}", []) for theirs, (ours, _) in TIMM_NAMES.items()}
TIMM_CLIP_NAMES |= pairs("""
    norm_pre.               vit.norm_pre.
    norm.                   vit.norm_post.
""")
VILT_NAMES = {r"transformer\." + prefix: ours for prefix, ours in TIMM_NAMES.items()} | {
    r"text_embeddings\.": ("embed.", EMBEDDINGS),
    r"token_type_embeddings\.weight": ("token_type", []),
    r"pooler\.dense\.": ("pooler.", []),
    r"mlm_score\.": ("vocab_head.", HEAD),
    r"mpp_score\.": ("patch_head.", HEAD),
    r"itm_score\.fc\.": ("itm_head.", []),
    r"(?:vqa|nlvr2)_classifier\.": ("head.", []),
    r"rank_output\.": ("head.", []),
}

# transformers' ViT, and the transformer of its ViLT. `export` reads these lines from right to left.
TRANSFORMERS_VIT = """
    embeddings.cls_token                            cls
    embeddings.position_embeddings                  position
    embeddings.patch_embeddings.projection.         patch.
    encoder.layer.N.layernorm_before.               blocks.N.norm1.
    encoder.layer.N.attention.attention.query.      blocks.N.attention.q.
    encoder.layer.N.attention.attention.key.        blocks.N.attention.key.
    encoder.layer.N.attention.attention.value.      blocks.N.attention.value.
    encoder.layer.N.attention.output.dense.         blocks.N.attention.out.
    encoder.layer.N.layernorm_after.                blocks.N.norm2.
    encoder.layer.N.intermediate.dense.             blocks.N.mlp.0.
    encoder.layer.N.output.dense.                   blocks.N.mlp.2.
    layernorm.                                      norm.
"""
TRANSFORMERS_VILT = TRANSFORMERS_VIT + """\
    embeddings.text_embeddings.word_embeddings.              embed.word.
    embeddings.text_embeddings.position_embeddings.          embed.position.
    embeddings.text_embeddings.token_type_embeddings.weight  embed.token_type
    embeddings.text_embeddings.LayerNorm.                    embed.norm.
    embeddings.token_type_embeddings.weight                  token_type
    pooler.dense.                                            pooler.
    embeddings.mask_token                                    mask_token
"""
TRANSFORMERS_HEADS = """
    mlm_score.transform.dense.      vocab_head.dense.
    mlm_score.transform.LayerNorm.  vocab_head.norm.
    mlm_score.decoder.              vocab_head.decoder.
    mlm_score.bias                  vocab_head.decoder.bias
    itm_score.fc.                   itm_head.
    mpp_score.transform.dense.      patch_head.dense.
    mpp_score.transform.LayerNorm.  patch_head.norm.
    mpp_score.decoder.              patch_head.decoder.
    mpp_score.bias                  patch_head.decoder.bias
    classifier.                     head.
    rank_output.                    head.
"""
TRANSFORMERS_CLIP = """
    embeddings.class_embedding              vit.cls
    embeddings.patch_embedding.             vit.patch.
    embeddings.position_embedding.weight    vit.position
    pre_layrnorm.                           vit.norm_pre.
    post_layernorm.                         vit.norm_post.
    encoder.layers.N.layer_norm1.           vit.blocks.N.norm1.
    encoder.layers.N.self_attn.q_proj.      vit.blocks.N.attention.q.
    encoder.layers.N.self_attn.k_proj.      vit.blocks.N.attention.key.
    encoder.layers.N.self_attn.v_proj.      vit.blocks.N.attention.value.
    encoder.layers.N.self_attn.out_proj.    vit.blocks.N.attention.out.
    encoder.layers.N.layer_norm2.           vit.blocks.N.norm2.
    encoder.layers.N.mlp.fc1.               vit.blocks.N.mlp.0.
    encoder.layers.N.mlp.fc2.               vit.blocks.N.mlp.2.
"""
BERT_NAMES = {
    r"(?:roberta\.|bert\.)?embeddings\.": ("embed.", EMBEDDINGS),
    r"(?:roberta\.|bert\.)?encoder\.layer\.(\d+)\.": (r"text_layers.\1.", BERT_LAYER),
}


# -- kinds of files --------------------------------------------------------------------------------

class Family(NamedTuple):
    about: str              # whose it is
    sign: str               # a regular expression: some name of such a file begins so
    names: dict
    aliases: dict = {}      # beginning of a name -> where the same tensors stand
    unused: dict = {}       # regular expression -> why no model has a place for it


CONSTANT = {r".*\.(position_ids|token_type_ids)$": "a constant"}
PROJECTION = "CLIP's projection, which comes after what is used"

FLM = Family(
    "FLM", r"cross_modal_text_layers\.", FLM_NAMES,
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
        r"cross_modal_image_pooler\.": "never used",
        r"lm_type_embeddings\.": "never used",
        r"itm_score(_flm)?\.": "image-text matching, which the original cannot train"})
VILT = Family("ViLT", r"transformer\.patch_embed\.", VILT_NAMES, unused=CONSTANT)
VILT_TRANSFORMERS = Family(
    "ViLT, as transformers writes it", r"(?:vilt\.)?embeddings\.text_embeddings\.",
    after("vilt.", pairs(TRANSFORMERS_VILT)) | pairs(TRANSFORMERS_HEADS), unused=CONSTANT)
CLIP = Family(
    "CLIP, as OpenAI writes it", r"visual\.conv1\.", CLIP_NAMES,
    unused={r"visual\.proj$": PROJECTION, r"(?!visual\.)": "CLIP's text side"})
CLIP_TRANSFORMERS = Family(
    "CLIP, as transformers writes it", r"(?:vision_model\.)?embeddings\.patch_embedding\.",
    after("vision_model.", pairs(TRANSFORMERS_CLIP)),
    unused=CONSTANT | {
        r"visual_projection\.": PROJECTION,
        r"text_model\.|text_projection\.|logit_scale$|logit_bias$": "CLIP's text side"})
CLIP_TIMM = Family("CLIP's ViT, as timm writes it", r"norm_pre\.", TIMM_CLIP_NAMES,
                   unused={r"head\.": PROJECTION})
VIT = Family(
    "ViT, as transformers writes it", r"(?:vit\.)?embeddings\.patch_embeddings\.",
    after("vit.", pairs(TRANSFORMERS_VIT)),
    unused={r"(vit\.)?pooler\.|classifier\.": "ViT's head",
            r"embeddings\.mask_token$": "ViT's mask token"})
TIMM = Family("ViT, as timm writes it", r"patch_embed\.proj\.", TIMM_NAMES,
              unused={r"head\.|head_drop|fc_norm\.|pre_logits\.": "ViT's head"})
BERT = Family(
    "BERT or RoBERTa", r"(?:roberta\.|bert\.)?embeddings\.word_embeddings\.", BERT_NAMES,
    unused=CONSTANT | {
        r"(roberta\.|bert\.)?pooler\.": "the text model's own pooler",
        r"lm_head\.|cls\.|classifier\.|qa_outputs\.": "the text model's own heads"})
FAMILIES = (FLM, VILT, VILT_TRANSFORMERS, CLIP, CLIP_TRANSFORMERS, CLIP_TIMM, VIT, TIMM, BERT)


def family_of(state: dict) -> Family | None:
    """The first family whose sign one of these names has."""
    for family in FAMILIES:
        if any(re.match(family.sign, key) for key in state):
            return family
    return None


# -- translation -----------------------------------------------------------------------------------

def rename(key: str, table: dict) -> str | None:
    """A foreign tensor name -> ours, or None where the table has no rule for it."""
    for prefix, (ours, rules) in table.items():
        match = re.match(prefix, key)
        if match is None:
            continue
        ours, rest = match.expand(ours), key[match.end():]
        if not rules:
            return ours + rest
        for pattern, name in rules:
            inner = re.match(pattern, rest)
            if inner:
                return ours + inner.expand(name) + rest[inner.end():]
    return None


def unwrapped(state: dict, path: str | Path) -> dict:
    """The same tensors without what wrappers put into names: `module.`, `model.`, `_orig_mod.`"""
    result = {}
    for key, tensor in state.items():
        result[re.sub(r"^(?:module\.|model\.)+", "", key.replace("_orig_mod.", ""))] = tensor
    if len(result) < len(state):
        raise ValueError(f"{path}: holds tensors whose names differ only in module., model. "
                         f"or _orig_mod.")
    return result


def canonical(key: str, aliases: dict) -> str:
    """The name under which a tensor stands that may have several, or an old one."""
    for alias, name in aliases.items():
        if key.startswith(alias):
            key = name + key[len(alias):]
            break
    # BERT's first files
    return (key.replace("LayerNorm.gamma", "LayerNorm.weight")
               .replace("LayerNorm.beta", "LayerNorm.bias"))


def translate(state: dict, family: Family, report: Report, path: str | Path,
              unused: dict | None = None) -> tuple[dict, dict]:
    """A foreign state dict -> ({our name: tensor, float32}, {our name: [the file's names]}).

    `unused` (pattern -> reason) says what, beside the family's own list, has no place in the model
    at hand. An unknown name, one that lacks its other half, and names that should mean the same
    tensor and do not: ValueError.
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
        if name in found:
            first = called[name][0]
            if not same(tensor, found[name]):
                raise ValueError(f"{path}: {key} and {first} should be the same tensor and differ; "
                                 f"a model that does not share these weights is not supported")
            report.add("ignored", [key], f"the same tensors as {first.split('.')[0]}", path)
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} holds {tensor.dtype}, "
                             f"expected floating-point numbers")
        found[name], called[name] = tensor.detach(), [key]
        report.add("taken", [key], file=path)
    refuse_halves(found, called, path)
    ours = merge_projections(found)
    for name in ours:       # one after the other: of half-precision files only one lies here twice
        ours[name] = ours[name].float()
    return ours, {name: theirs_of(name, called) for name in ours}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are two tensors equal? Views of one storage are, without a look at their numbers."""
    if a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a.to(b.dtype), b)


def refuse_halves(found: dict, called: dict, path: str | Path) -> None:
    """ValueError for a key without its value, or a value without its key."""
    for name in found:
        for part, other in ((".key.", ".value."), (".value.", ".key.")):
            if part in name and name.replace(part, other) not in found:
                raise ValueError(f"{path}: has {called[name][0]} but not the {other.strip('.')} "
                                 f"that belongs to it")


def merge_projections(found: dict) -> dict:
    """Query, key and value as others store them -> our `q` and `kv` ([key; value])."""
    ours = {}
    for name, tensor in found.items():
        if ".key." in name:
            value = found[name.replace(".key.", ".value.")]
            ours[name.replace(".key.", ".kv.")] = torch.cat([tensor, value])
        elif ".qkv." in name:       # one tensor holds [query; key; value]
            q, kv = tensor.split([len(tensor) // 3, len(tensor) * 2 // 3])
            ours[name.replace(".qkv.", ".q.")] = q
            ours[name.replace(".qkv.", ".kv.")] = kv
        elif ".value." not in name:
            ours[name] = tensor
    return ours


def theirs_of(name: str, called: dict) -> list[str]:
    """The file's names of one of our tensors, which may be made of several, or a part of one."""
    candidates = [name]
    for ours, theirs in ((".kv.", ".key."), (".kv.", ".value."), (".kv.", ".qkv."),
                         (".q.", ".qkv.")):
        if ours in name:
            candidates.append(name.replace(ours, theirs))
    return [key for candidate in candidates for key in called.get(candidate, [])]
