"""Where a model looks: its attention over a picture's patches, computed by hand.

    found = look(model, "photo.jpg", "a red star above a <mask>")
    found.tokens                                # ["<s>", "a", " red", …]
    found.maps["reconstructed"].layers          # (layers, n, h, w): of each word's query
    found.may_read[2]                           # what the query of " red" may read of each stream

Training uses fused kernels, which never hold the attention weights. Here each attention of the
model is watched while the model runs, and its weights are computed once more from its inputs. They
are averaged over the heads. Nothing of the model changes.

Attention says where a row takes its input from, not what it concludes from it.

Attention rollout follows the shares through all layers (Abnar & Zuidema, "Quantifying Attention
Flow in Transformers", ACL 2020). R holds how much of each row comes from each patch. At every
residual connection, half of a row stays and half comes from what its attention A reads:
R <- (R + A R_read) / 2.

Letters: B batch, L text length, n tokens of the text, `<s>` and `</s>` included, S streams,
Q queries, K keys, D width, d = D/heads, h x w patches, P = 1 + h w image tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import flm
import vilt
from layers import Attention, Mask, encode_batch_images
from predict import Picture, blanked_ids, device_of, finite, open_picture, picture_batch
from tasks import Model


@dataclass(frozen=True)
class Maps:
    """The shares of the patches in what each token's row reads.

    A row's shares add up to at most 1. The rest belongs to the image's class token, and to the text
    where a row reads both.
    """
    layers: Tensor                      # (layers, n, h, w)
    rolled_out: Tensor                  # (n, h, w)


@dataclass(frozen=True)
class Look:
    """What a model looked at while it read a text with a picture. All tensors are on the CPU."""
    picture: Tensor                     # uint8 (3, H, W), as the model saw it
    tokens: list[str]                   # n texts
    maps: dict[str, Maps]               # output, as flm.Fused names them -> its maps
    may_read: Tensor | None = None      # FLM: (n, 2n) bool, [left to right ; right to left]
    transport: Tensor | None = None     # ViLT: (n, h, w) where each word's mass is carried; 0 for
                                        # [CLS] and [SEP], which take no part

    def named_maps(self) -> dict[str, Tensor]:
        """All maps (n, h, w) by a name of their own: "reconstructed, layer 1", …"""
        named = {}
        for output, maps in self.maps.items():
            for i, layer in enumerate(maps.layers, 1):
                named[f"{output}, layer {i}"] = layer
            named[f"{output}, rolled out"] = maps.rolled_out
        if self.transport is not None:
            named["transport"] = self.transport
        return named


# -------------------------------------------------------------------------------------------------
# Attention by hand.

def attention_weights(attention: Attention, x: Tensor, memory: Tensor,
                      mask: Mask | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)): x (B, Q, D), memory (B, K, D) -> (B, heads, Q, K).

    A fully masked row has weights of 0.
    """
    B, Q, D = x.shape
    k, _ = attention.keys_and_values(memory)                            # (B, heads, K, d)
    q = attention.q(x).view(B, Q, attention.heads, -1).transpose(1, 2)  # (B, heads, Q, d)
    scores = q.float() @ k.float().transpose(2, 3) / q.shape[-1] ** 0.5     # (B, heads, Q, K)
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask.allowed[:, None], float("-inf"))
    return scores.softmax(-1) * mask.sighted[:, None]


@contextmanager
def watched(model: Model) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that gets the weights of every attention that runs during the block.

    It maps the attention's name in the model to (B, heads, Q, K). Where one runs several times, the
    last run counts.
    """
    weights, handles = {}, []

    def watch(name):
        def compute(attention, inputs, output):
            x, memory, *mask = inputs
            weights[name] = attention_weights(attention, x, memory, *mask)
        return compute

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            handles.append(module.register_forward_hook(watch(name)))
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------
# Maps of a picture.

def look(model: Model, picture: Picture, text: str) -> Look:
    """What a model looks at when it reads a text with a picture. The text may hold `<mask>`.

    FLM hides each word from its own query, and nothing else.
    FileNotFoundError or ValueError for a picture that cannot be read or a text that is too long.
    """
    return look_at(model, open_picture(picture, model.config), blanked_ids(model, text))


@torch.no_grad()
def look_at(model: Model, picture: Tensor, ids: Tensor) -> Look:
    """The same for a picture as predict.open_picture returns it, uint8 (3, H, W), and ids (1, n).

    ids: `<s>` and `</s>` included, without padding.
    """
    c = model.config
    batch = picture_batch(c, [picture], device_of(model))
    with watched(model) as weights:
        visual = encode_batch_images(model, batch)
        text = model.encode_text(ids)
        fused = model.fuse(visual, text)
    # One picture and one text: B = 1, but in the self-attention of FLM's streams, where B = S.
    weights = {name: finite(some.mean(1)).cpu() for name, some in weights.items()}  # (B, Q, K)
    tokens = [model.tokenizer.decode([token]) for token in ids[0].tolist()]
    h, w = (side // c.patch_size for side in picture.shape[1:])
    if isinstance(c, vilt.Config):
        _, plan = model.align(visual, text, fused, ids == c.sep_id)             # (1, h w, n)
        plan = plan[0].T.cpu()                                                  # (n, h w)
        shares = plan / plan.sum(1, keepdim=True).clamp(min=1e-9)
        return Look(picture.cpu(), tokens, vilt_maps(c, weights, (h, w)),
                    transport=shares.reshape(-1, h, w))
    may_read = None
    if c.objective == "flm":
        mask = text.query_mask
        may_read = (mask.allowed & mask.sighted)[0].cpu()                       # (n, 2n)
    return Look(picture.cpu(), tokens, flm_maps(c, weights, (h, w)), may_read)


def flm_maps(config: flm.Config, weights: dict[str, Tensor],
             grid: tuple[int, int]) -> dict[str, Maps]:
    """The maps of FLM and of the objectives that it is compared with.

    A query reads no patch itself. It reads rows of the streams, and these look at the picture. So
    its map of a layer is the product of both: what the rows that it reads look at in this layer.
    """
    names = {"flm": ("left_to_right", "right_to_left"), "mlm": ("reconstructed",)}
    names = names.get(config.objective, ("left_to_right",))                     # of the streams
    reconstructors = config.reconstructor_fusion_layers if config.objective == "flm" else 0
    if not config.fusion_layers:
        raise ValueError("a model without fusion layers does not look at the picture")

    rows, P = weights["fusion_layers.0.cross_attention"][0].shape               # S n, P
    # What each image token is made of, after the ViT.
    image = roll_out([weights[f"vit.blocks.{i}.attention"] for i in range(config.vit_layers)], P)
    streams, queries = torch.zeros(rows, P), torch.zeros(rows // len(names), P)
    stream_layers, query_layers = [], []
    for i in range(config.fusion_layers):
        own = torch.block_diag(*weights[f"fusion_layers.{i}.self_attention"])   # (S n, S n)
        at_image = weights[f"fusion_layers.{i}.cross_attention"][0]             # (S n, P)
        streams = (streams + own @ streams) / 2
        streams = (streams + at_image @ image) / 2
        stream_layers.append(at_image)
        beside = i - (config.fusion_layers - reconstructors)
        if beside >= 0 and reconstructors:
            reads = weights[f"fusion_reconstructor.{beside}.cross_attention"][0]    # (n, S n)
            queries = (queries + reads @ streams) / 2
            query_layers.append(reads @ at_image)
    found = {}
    if query_layers:
        found["reconstructed"] = as_maps(torch.stack(query_layers), queries, grid)
    streams = streams.chunk(len(names))                                         # S of (n, P)
    layers = torch.stack(stream_layers).chunk(len(names), dim=1)        # S of (layers, n, P)
    for name, of_layers, rolled_out in zip(names, layers, streams, strict=True):
        found[name] = as_maps(of_layers, rolled_out, grid)
    return found


def vilt_maps(config: vilt.Config, weights: dict[str, Tensor],
              grid: tuple[int, int]) -> dict[str, Maps]:
    """ViLT's maps: its blocks attend over [text ; image], and the words' rows are shown."""
    blocks = [weights[f"blocks.{i}.attention"] for i in range(config.layers)]   # (1, n + P, n + P)
    K = blocks[0].shape[1]
    n = K - 1 - grid[0] * grid[1]
    layers, rolled_out = torch.cat(blocks), roll_out(blocks, K)
    return {"reconstructed": as_maps(layers[:, :n, n:], rolled_out[:n, n:], grid)}


def roll_out(blocks: list[Tensor], K: int) -> Tensor:
    """Attention rollout through blocks of self-attention, (1, K, K) each -> (K, K).

    Row i: how much of its output comes from each row of the first block's input.
    """
    rolled_out = torch.eye(K)
    for (attention,) in blocks:                                                 # (K, K)
        rolled_out = (rolled_out + attention @ rolled_out) / 2
    return rolled_out


def as_maps(layers: Tensor, rolled_out: Tensor, grid: tuple[int, int]) -> Maps:
    """Shares of the image tokens, (layers, n, P) and (n, P) -> Maps, without the class token."""
    count, n, _ = layers.shape
    return Maps(layers[:, :, 1:].reshape(count, n, *grid), rolled_out[:, 1:].reshape(n, *grid))
