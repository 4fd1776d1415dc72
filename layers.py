"""The layers that FLM and ViLT are made of."""

import torch
import torch.nn as nn
import torch.nn.functional as F

TASK_HEADS = ("vqa", "nlvr2", "retrieval")
HEADS = ("vocab", *TASK_HEADS, "none")


def check_head(config):
    """ValueError where a Config asks for a head, or a size, that cannot be."""
    for name in ("image_size", "patch_size", "vocab_size", "max_positions", "width", "heads", "vit_heads", "text_heads", "layers"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{name} {getattr(config, name)}: at least 1 is expected")
    if config.head not in HEADS:
        raise ValueError(f"head {config.head!r}: one of {', '.join(HEADS)} is expected")
    if (config.itm or config.head in TASK_HEADS) and not config.pooler:
        raise ValueError(f"{'itm' if config.itm else 'head ' + config.head} needs the pooler")
    if (config.head == "vqa") != (config.answers > 0):
        raise ValueError(f"head {config.head!r} with {config.answers} answers: head vqa, and no other, chooses from answers")


def check_pairs(visual, captions):
    if len(captions) % len(visual):
        raise ValueError(f"{len(captions)} captions for {len(visual)} images: each image has the same number of them")




# ---------------------------------------------------------------------------------------------------------------------
# The layers.

def attend(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(d)) v, where the mask is True."""
    if q.device.type == "cpu" and v.dtype == torch.bfloat16:    # torch's kernel for it has a slow backward (docs/LOG.md)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head attention of x to a memory (to itself, if the memory is x): softmax(q k^T / sqrt(d)) v.

    x (B, Q, D), memory (M, K, D), mask (B, Q, K) bool or None -> (B, Q, D). Where M is smaller than B, each memory is that
    of B / M neighbours: one image, many captions, no copies. In place of the memory, what `keys_and_values` made of it.
    """

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)       # what of the memory can be computed once and kept
        self.out = nn.Linear(width, width)

    def keys_and_values(self, memory):
        """All of the attention that does not depend on x: (M, K, D) -> two of (M, heads, K, d)."""
        M, K, D = memory.shape
        return self.kv(memory).view(M, K, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x, memory, mask=None):
        B, Q, D = x.shape
        k, v = memory if isinstance(memory, tuple) else self.keys_and_values(memory)
        if mask is not None and len(k) != B:
            k, v = (kv.repeat_interleave(B // len(k), dim=0) for kv in (k, v))
        q = self.q(x).view(len(k), -1, self.heads, D // self.heads).transpose(1, 2)                 # (M, heads, B/M Q, d)
        dropout = self.dropout if self.training else 0.0
        if mask is None:
            y = attend(q, k, v, None, dropout)
        else:
            # A row that may look nowhere gets nothing. Softmax over no column would be NaN in some kernels, so such a
            # row looks everywhere first and what it saw is then taken away.
            mask = mask[:, None]                                                                    # (B, 1, Q, K)
            sighted = mask.any(-1, keepdim=True)                                                    # (B, 1, Q, 1)
            y = attend(q, k, v, mask | ~sighted, dropout) * sighted
        return self.out(y.transpose(1, 2).reshape(B, Q, D))


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x · sigmoid(1.702 x)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def feed_forward(width, activation, hidden=0):
    hidden = hidden or 4 * width
    return nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))


class ViTBlock(nn.Module):
    """Pre-norm: x + attention(norm x), then x + feed-forward(norm x).   (B, P, D) -> (B, P, D)

    CLIP's by default; ViLT's has GELU, an eps of 1e-6, and dropout wherever a linear layer ends, but not in the attention.
    """

    def __init__(self, width, heads, activation=QuickGELU, eps=1e-5, hidden=0, dropout=0.0):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, eps), Attention(width, heads)
        activation = nn.Sequential(activation(), nn.Dropout(dropout)) if dropout else activation()
        self.norm2, self.mlp = nn.LayerNorm(width, eps), feed_forward(width, activation, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, rows=None):
        """rows: only the first so many are wanted, as of the last block where nobody reads the others."""
        y = self.norm1(x)
        x = x[:, :rows] + self.dropout(self.attention(y[:, :rows], y, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """CLIP's image encoder without its last block and projection: images (B, 3, H, W), normalised -> (B, P, D).

    Token 0 is the class token, the rest are patches in rows from the top left.
    """

    def __init__(self, image_size, patch_size, width, layers, heads):
        super().__init__()
        self.grid = image_size // patch_size
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(1 + self.grid ** 2, width))
        self.norm_pre, self.norm_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(layers))

    def forward(self, images):
        x = self.patch(images)                                                                      # (B, D, h, w)
        position = resize_positions(self.position, x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                                            # (B, h w, D)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + position                        # (B, P, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)


def sine_waves(side, width):
    """Positions to start from: sines and cosines of a patch's row (first half) and column -> (side², width).

    The longest wave is four grids long, all but a straight line from edge to edge; the shortest is two patches. So "left
    of" is a direction in them from the first step on, where random positions would have to be told pair by pair.
    """
    waves = width // 4
    frequency = torch.pi / (2 * side) * (2 * side) ** torch.linspace(0, 1, waves, device="cpu")     # radians per patch
    angle = (torch.arange(side, device="cpu")[:, None] - (side - 1) / 2) * frequency                # (side, waves)
    place = torch.cat([angle.sin(), angle.cos()], dim=1)                                            # (side, W/2)
    rows, columns = place[:, None].expand(-1, side, -1), place.expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)                                          # (side², W)


def resize_positions(position, size, mode="bicubic"):
    """Interpolates a learned position grid to another resolution; the class row is kept.

    position (1 + g², D), size (h, w) -> (1 + h w, D); align_corners false, no antialiasing, as the original.
    """
    cls, grid = position[:1], position[1:]
    side = int(len(grid) ** 0.5)
    if tuple(size) == (side, side):
        return position
    grid = grid.T.reshape(1, -1, side, side).float()                                                # (1, D, g, g)
    grid = F.interpolate(grid, size=tuple(size), mode=mode, align_corners=False)                    # (1, D, h, w)
    return torch.cat([cls, grid.flatten(2)[0].T.to(cls.dtype)])


class TextEmbedding(nn.Module):
    """LayerNorm(word + type + position), as BERT and RoBERTa have it.   ids, position (B or 1, L) -> (B, L, D)"""

    def __init__(self, vocab_size, width, max_positions, dropout, eps=1e-5):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_positions, width)
        self.token_type = nn.Parameter(torch.zeros(1, width))
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)

    def forward(self, ids, position):
        return self.dropout(self.norm(self.word(ids) + self.token_type + self.position(position)))


def roberta_positions(real):
    """RoBERTa counts the real tokens from 2; padding has position 1.   real (B, L) bool -> (B, L)"""
    return 1 + real.cumsum(1) * real


class Layer(nn.Module):
    """A post-norm transformer layer: any of self-attention, cross-attention, feed-forward; after each, add and norm.

    Text layers have the first and the last, fusion layers all three, reconstructor layers the last two: a query that has
    no self-attention cannot learn another query's answer.
    x (B, L, D) or (B, S, L, D), mask (B S, L, L), memory (M, K, D), memory_mask (B, S L, K) -> like x
    past: an object whose `extend` adds the keys and values of x to those of what was said before (generate.py).
    """

    def __init__(self, width, heads, dropout, eps, self_attention=False, cross_attention=False):
        super().__init__()
        self.self_attention = Attention(width, heads, dropout) if self_attention else None
        self.self_norm = nn.LayerNorm(width, eps) if self_attention else None
        self.cross_attention = Attention(width, heads, dropout) if cross_attention else None
        self.cross_norm = nn.LayerNorm(width, eps) if cross_attention else None
        self.mlp, self.mlp_norm = feed_forward(width, nn.GELU()), nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, memory=None, memory_mask=None, past=None):
        if self.self_attention is not None:
            y = x.flatten(0, -3)                                    # each stream for itself: (B S, L, D)
            words = y if past is None else past.extend(*self.self_attention.keys_and_values(y))
            x = self.self_norm(x + self.dropout(self.self_attention(y, words, mask)).view_as(x))
        if self.cross_attention is not None:
            y = x.flatten(1, -2)                                    # all streams side by side: (B, S L, D)
            x = self.cross_norm(x + self.dropout(self.cross_attention(y, memory, memory_mask)).view_as(x))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class VocabHead(nn.Module):
    """decoder(LayerNorm(gelu(dense x))) + bias, not tied to the embeddings.   (…, D) -> (…, V)"""

    def __init__(self, width, vocab_size, eps=1e-12):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, x):
        return self.decoder(self.norm(F.gelu(self.dense(x))))


def task_head(config):
    """The head of a fine-tuned model, on the class vectors (B, D): ViLT's, which METER and FLM kept.

    vqa: (B, D) -> (B, answers); nlvr2: the vectors of two images, (B, 2D) -> (B, 2), class 1 = True;
    retrieval: (B, D) -> (B, 1), how well image and caption go together.
    """
    D = config.width
    if config.head == "retrieval":
        return nn.Linear(D, 1)
    inputs, outputs = (D, config.answers) if config.head == "vqa" else (2 * D, 2)
    return nn.Sequential(nn.Linear(inputs, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, outputs))


def encode_batch_images(model, batch, which=0):
    """encode_image of a batch's pictures (of the second ones of nlvr2's pairs), with all that its collate says of them."""
    suffix = "_1" if which else ""
    more = {name: batch[name + suffix] for name in ("sizes", "patches") if name + suffix in batch}
    return model.encode_image(batch["image" + suffix], which=which, **more)


def task_logits(model, batch):
    """What a fine-tuned head says of a batch: (B, answers) for vqa, (B, 2) for nlvr2, (captions, 1) for retrieval.

    `batch` holds `image` (B, 3, H, W), for nlvr2 `image_1` too, and `ids` (B, L), for retrieval (B · captions, L): some
    captions of each image, which is encoded once.
    """
    text = model.encode_text(batch["ids"], class_only=True)
    pooled = [model.fuse(encode_batch_images(model, batch, which), text).pooled for which in range(2 if model.config.head == "nlvr2" else 1)]
    return model.head(torch.cat(pooled, dim=-1))


def task_loss(model, batch):
    """The loss of a fine-tuned head: {head: (sum over the batch, hits)}, both scalars.

    vqa: binary cross-entropy against soft targets (B, answers), summed over the answers; a hit counts as much as the
    answer's score. nlvr2: cross-entropy against `label` (B,). retrieval: cross-entropy of each image's captions, of which
    the first is the true one.
    """
    head, logits = model.config.head, task_logits(model, batch).float()
    if head == "vqa":
        loss = F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")
        return {head: (loss, batch["targets"].gather(1, logits.argmax(1, keepdim=True)).sum())}
    if head == "nlvr2":
        return {head: loss_and_hits(logits, batch["label"])}
    logits = logits.view(len(batch["image"]), -1)                                                   # (B, captions)
    return {head: loss_and_hits(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))}


def loss_and_hits(logits, targets):
    """Sum of the cross-entropies and number of hits: logits (N, C), targets (N,) -> two scalars."""
    return (F.cross_entropy(logits.float(), targets, reduction="sum"),
            (logits.argmax(-1) == targets).float().sum())
