"""A model of ours -> folders that transformers' from_pretrained opens.

    export(vilt, "exported")        # exported/: a ViLT of transformers, with its head
    export(flm, "exported")         # exported/vision: CLIPVisionModel; exported/text: RobertaModel
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import flm
import tokenizer
from released import names
from released.whole import write_safetensors
from storage import disk

ARCHITECTURES = {"none": "ViltModel", "vocab": "ViltForMaskedLM", "vqa": "ViltForQuestionAnswering",
                 "nlvr2": "ViltForImagesAndTextClassification",
                 "retrieval": "ViltForImageAndTextRetrieval"}
UNKNOWN_THERE = r"itm_head\.|patch_head\.|mask_token$"


def export(model: nn.Module, folder: str | Path) -> list[str]:
    """Writes a model for transformers. Returns what transformers cannot use, as a list of names.

    ValueError for what has no place there at all.
    """
    if isinstance(model.config, flm.Config):
        return export_flm(model, Path(folder))
    return export_vilt(model, Path(folder))


def write_folder(folder: Path, tensors: dict, config: dict) -> None:
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    disk.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def turned(table: dict) -> dict:
    """A table of names, to be read from ours to theirs."""
    return {ours: theirs for theirs, ours in table.items()}


def in_pieces(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor under its name; keys and values, one tensor here, as the two that they are there."""
    if ".kv." not in name:
        return {name: tensor}
    key, value = tensor.chunk(2)
    return {name.replace(".kv.", ".key."): key, name.replace(".kv.", ".value."): value}


def on_its_own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()


# -- ViLT ------------------------------------------------------------------------------------------

def export_vilt(model: nn.Module, folder: Path) -> list[str]:
    """Writes config.json, model.safetensors and vocab.txt. Returns what transformers cannot use.

    That is a list of names of tensors, which transformers passes over, and of a tokenizer that is
    not written. `weights.load` gives back the same model: config.json also holds our own settings.

    transformers has one eps for all LayerNorms, and gets text_eps: the word embeddings, which are
    normalised first, have the smallest numbers. On a freshly drawn ViLT-B/32 that moves class
    vector and logits by 6e-6 at most; with eps for all it would be 7e-4.
    """
    tok = getattr(model, "tokenizer", None)
    write_folder(folder, vilt_tensors(model), vilt_config(model))
    left_out = [name for name in model.state_dict() if re.match(UNKNOWN_THERE, name)]
    if isinstance(tok, tokenizer.WordPiece):
        tok.save(folder)
    elif tok is not None:
        left_out.append("vocab.txt (the tokenizer is byte-level BPE)")
    return left_out


BACKBONE_NAMES, HEAD_NAMES = turned(names.TRANSFORMERS_VILT), turned(names.TRANSFORMERS_HEADS)


def vilt_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors under transformers' names."""
    c, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if name in ("cls", "position", "mask_token"):
            tensor = tensor.view(1, -1, c.width)                                    # (1, N, D)
        for piece, values in in_pieces(name, tensor).items():
            state[vilt_name(piece, c.head)] = on_its_own(values)
    return state


def vilt_name(name: str, head: str) -> str:
    inside = names.rename(name, BACKBONE_NAMES)
    if inside is not None:
        return inside if head == "none" else f"vilt.{inside}"
    outside = names.rename(name, HEAD_NAMES)
    if head != "retrieval":         # two of their heads are one of ours; the table gives the last
        outside = outside.replace("rank_output.", "classifier.")
    return outside


def vilt_config(model: nn.Module) -> dict:
    """What config.json says."""
    c = model.config
    classes = [f"LABEL_{i}" for i in range(c.answers or 2)]
    if c.head == "nlvr2":
        classes = ["False", "True"]
    elif c.head == "vqa":
        classes = getattr(model, "answer_list", None) or classes
    return {
        "architectures": [ARCHITECTURES[c.head]],
        "model_type": "vilt",
        "vocab_size": c.vocab_size,
        "type_vocab_size": len(model.embed.token_type),
        "modality_type_vocab_size": len(model.token_type),
        "pad_token_id": c.pad_id,
        "max_position_embeddings": c.max_positions,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_dropout_prob": c.dropout,
        "initializer_range": c.init_std,
        "layer_norm_eps": c.text_eps,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_images": 2 if c.head == "nlvr2" else -1,
        # transformers wants to tie the vocabulary head to the embeddings; with both in the file it
        # keeps them apart.
        "tie_word_embeddings": False,
        "id2label": dict(enumerate(classes)),
        "flm_vilt": asdict(c),
    }


# -- FLM -------------------------------------------------------------------------------------------

def export_flm(model: nn.Module, folder: Path) -> list[str]:
    """Writes FOLDER/vision and FOLDER/text. Returns the modules that stay behind.

    vision, a CLIPVisionModel: `post_layernorm` of its last_hidden_state is `model.vit(images)`, all
    tokens; its pooler_output is the first of them. It has as many blocks as ours, one fewer than
    the CLIP that ours began from.

    text, a RobertaModel: the embeddings and the text layers, before the fusion. They know nothing
    of the image. With objective mlm its last_hidden_state is `model.encode_text(ids).streams`. The
    other objectives read through masks that RoBERTa does not make itself, but takes, as
    attention_mask (B, 1, L, L): masks.left_to_right_mask gives FLM's first stream,
    right_to_left_mask its second.

    RoBERTa's class has no place for the rest. Its layers have cross-attention all or none; here,
    the fusion layers alone have it. The reconstructor has no self-attention. The vocabulary head
    reads what comes out of the fusion: in a RobertaForMaskedLM it would read the text layers, which
    it was not trained on, so it is not written. The pooler that transformers adds would be drawn at
    random: from_pretrained(folder, add_pooling_layer=False).
    """
    c, tok = model.config, getattr(model, "tokenizer", None)
    if c.pad_id != 1:
        raise ValueError(f"padding has id {c.pad_id}, but RoBERTa counts positions from its id, "
                         "which must be 1")
    write_folder(folder / "vision", flm_tensors(model, "vit.", CLIP_NAMES, "vision_model."), {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": c.vit_width,
        "intermediate_size": 4 * c.vit_width,
        "num_hidden_layers": c.vit_layers,
        "num_attention_heads": c.vit_heads,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    })
    write_folder(folder / "text", flm_tensors(model, TEXT_SIDE, ROBERTA_NAMES, ""), {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "vocab_size": c.vocab_size,
        "type_vocab_size": 1,
        "bos_token_id": c.cls_id,
        "pad_token_id": c.pad_id,
        "eos_token_id": c.sep_id,
        "max_position_embeddings": c.max_positions,
        "hidden_size": c.text_width,
        "intermediate_size": 4 * c.text_width,
        "num_hidden_layers": c.text_layers,
        "num_attention_heads": c.text_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "layer_norm_eps": 1e-5,
        "initializer_range": c.init_std,
    })
    left_out = dict.fromkeys(name.split(".")[0] for name in model.state_dict()
                             if not name.startswith(("vit.", *TEXT_SIDE)))
    if isinstance(tok, tokenizer.BPE):
        tok.save(folder / "text")
    elif tok is not None:
        left_out["the tokenizer (it is WordPiece)"] = None
    return list(left_out)


CLIP_NAMES, ROBERTA_NAMES = turned(names.TRANSFORMERS_CLIP), turned(names.BERT_NAMES)
TEXT_SIDE = ("embed.", "text_layers.")


def flm_tensors(model: nn.Module, part: str | tuple, table: dict, prefix: str) -> dict:
    """The tensors whose names begin so, under transformers' names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(part):
            for piece, values in in_pieces(name, tensor).items():
                state[prefix + names.rename(piece, table)] = on_its_own(values)
    return state
