"""A ViLT of ours -> a folder that transformers' from_pretrained opens."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import disk
import tokenizer
import vilt
from released import names
from released.whole import write_safetensors

ARCHITECTURES = {"none": "ViltModel", "vocab": "ViltForMaskedLM", "vqa": "ViltForQuestionAnswering",
                 "nlvr2": "ViltForImagesAndTextClassification",
                 "retrieval": "ViltForImageAndTextRetrieval"}
UNKNOWN_THERE = r"itm_head\.|patch_head\.|mask_token$"


def export(model: nn.Module, folder: str | Path) -> list[str]:
    """Writes config.json, model.safetensors and vocab.txt. Returns what transformers cannot use.

    That is a list of names of tensors, which transformers passes over, and of a tokenizer that is
    not written. `weights.load` gives back the same model: config.json also holds our own settings.

    transformers has one eps for all LayerNorms, and gets text_eps: the word embeddings, which are
    normalised first, have the smallest numbers. On a freshly drawn ViLT-B/32 that moves class
    vector and logits by 6e-6 at most; with eps for all it would be 7e-4.
    """
    if not isinstance(model.config, vilt.Config):
        raise ValueError("only a ViLT can be exported: transformers has no FLM")
    folder, tok = Path(folder), getattr(model, "tokenizer", None)
    write_safetensors(folder / "model.safetensors", their_tensors(model), {"format": "pt"})
    disk.write_text(folder / "config.json", json.dumps(their_config(model), indent=2) + "\n")
    left_out = [name for name in model.state_dict() if re.match(UNKNOWN_THERE, name)]
    if isinstance(tok, tokenizer.WordPiece):
        tok.save(folder)
    elif tok is not None:
        left_out.append("vocab.txt (the tokenizer is byte-level BPE)")
    return left_out


BACKBONE_NAMES = {ours: theirs for theirs, ours in names.TRANSFORMERS_VILT.items()}
HEAD_NAMES = {ours: theirs for theirs, ours in names.TRANSFORMERS_HEADS.items()}


def their_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors under transformers' names."""
    c, state = model.config, {}
    for name, tensor in model.state_dict().items():
        pieces = {name: tensor}
        if ".kv." in name:
            key, value = tensor.chunk(2)
            pieces = {name.replace(".kv.", ".key."): key, name.replace(".kv.", ".value."): value}
        elif name in ("cls", "position", "mask_token"):
            pieces = {name: tensor.view(1, -1, c.width)}                            # (1, N, D)
        for piece, values in pieces.items():
            state[their_name(piece, c.head)] = values.detach().cpu().clone().contiguous()
    return state


def their_name(name: str, head: str) -> str:
    inside = names.rename(name, BACKBONE_NAMES)
    if inside is not None:
        return inside if head == "none" else f"vilt.{inside}"
    outside = names.rename(name, HEAD_NAMES)
    if head != "retrieval":         # two of their heads are one of ours; the table gives the last
        outside = outside.replace("rank_output.", "classifier.")
    return outside


def their_config(model: nn.Module) -> dict:
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
