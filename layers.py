"""What FLM and ViLT are built from: attention, the ViT, text embeddings, transformer layers, heads.

Letters: B batch, L text length, S streams, Q queries, K keys, P image tokens, D width, d = D/heads,
M images (B, or fewer: each image then belongs to B / M neighbouring captions), V vocabulary.
In every mask, True = the row may look at the column.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from losses import losses_in_chunks, row_losses, whole

if TYPE_CHECKING:           # for the annotations alone: these files come later
    import flm
    import generate
    import vilt

TASK_HEADS = ("vqa", "nlvr2", "retrieval")
HEADS = ("vocab", *TASK_HEADS, "none")
Index = int | slice | Tensor | tuple        # what picks some elements of a batch


# -------------------------------------------------------------------------------------------------
# Attention.

class Mask(NamedTuple):
    """Where the rows of an attention may look, prepared once for all layers that share it.

    A softmax over no column at all is NaN in some kernels and uniform in others. So a fully masked
    row is allowed every column, and its output is set to zero afterwards. Such rows are padding,
    and a query from which all words of its caption are hidden.
    """
    allowed: Tensor     # (…, Q, K) bool: the row may look at the column, or is fully masked
    sighted: Tensor     # (…, Q, 1) bool: False = fully masked, zeroed before the output projection

    @classmethod
    def of(cls, may_look: Tensor) -> "Mask":
        """may_look (…, Q, K) bool -> Mask"""
        sighted = may_look.any(-1, keepdim=True)
        return cls(may_look | ~sighted, sighted)

    def pick(self, index: Index) -> "Mask":
        """The masks of some elements of the batch."""
        return Mask(self.allowed[index], self.sighted[index])

    def reshape(self, *shape: int) -> "Mask":
        """Other leading dimensions in front of (Q, K)."""
        Q, K = self.allowed.shape[-2:]
        return Mask(self.allowed.reshape(*shape, Q, K), self.sighted.reshape(*shape, Q, 1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where the mask is True."""
    if q.device.type == "cpu" and v.dtype == torch.bfloat16:
        # torch's fused kernel for this case has a slow backward (docs/LOG.md)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head attention of x to a memory: to the image, to the streams, or to x itself.

    x (B, Q, D), memory (M, K, D) or what `keys_and_values` made of it -> (B, Q, D).
    With a mask, (B, Q, K), there is a memory for every row of the batch: M = B. Without one, M may
    divide B: one image and several captions, and no copy of the image. Where images have different
    numbers of captions, memory_of (B,) says which memory belongs to each row.
    A fully masked row outputs zeros before the output projection: Attention returns `out.bias`.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)       # apart from q: it can be computed once and kept
        self.out = nn.Linear(width, width)

    def keys_and_values(self, memory: Tensor,
                        memory_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All of the attention that does not depend on x: (M, K, D) -> two of (M, heads, K, d).

        With memory_of (B,), those of each of B rows: two of (B, heads, K, d).
        """
        kv = self.kv(memory)                                                # (M, K, 2D)
        if memory_of is not None:
            kv = kv.index_select(0, memory_of)                              # (B, K, 2D)
        M, K = len(kv), memory.shape[1]
        k, v = kv.view(M, K, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, memory: Tensor | tuple[Tensor, Tensor], mask: Mask | None = None,
                memory_of: Tensor | None = None) -> Tensor:
        B, Q, _ = x.shape
        k, v = memory if isinstance(memory, tuple) else self.keys_and_values(memory, memory_of)
        M = len(k)
        dropout = self.dropout if self.training else 0.0
        # Captions of one image stand side by side, as one caption of B / M Q rows.
        q = self.q(x).view(M, B // M * Q, self.heads, -1)
        q = q.transpose(1, 2)                                               # (M, heads, B/M Q, d)
        if mask is None:
            y = attend(q, k, v, None, dropout)
        else:
            allowed, sighted = mask.allowed[:, None], mask.sighted[:, None]     # (B, 1, Q, K or 1)
            y = attend(q, k, v, allowed, dropout) * sighted
        return self.out(y.transpose(1, 2).reshape(B, Q, -1))


@torch.no_grad()
def silence_attention(model: nn.Module) -> None:
    """Sets the output matrices of all attention to 0: at first no row hears of another.

    What untrained attention adds, the mean of all rows, is noise. The toy model learns sooner
    without it (docs/RECORDS.md).
    """
    for module in model.modules():
        if isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)


# -------------------------------------------------------------------------------------------------
# The image side.

class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x · sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def feed_forward(width: int, activation: nn.Module, hidden: int = 0) -> nn.Sequential:
    """Linear, activation, Linear; the hidden layer is four times as wide unless told otherwise."""
    hidden = hidden or 4 * width
    return nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, width))


class ViTBlock(nn.Module):
    """Pre-norm: x + attention(norm x), then x + feed-forward(norm x).   (B, P, D) -> (B, P, D)

    The defaults are CLIP's. ViLT's has GELU, eps 1e-6, and dropout after the attention, after the
    activation and after the feed-forward, but none on the attention weights.
    """

    def __init__(self, width: int, heads: int, activation: type[nn.Module] = QuickGELU,
                 eps: float = 1e-5, hidden: int = 0, dropout: float = 0.0):
        super().__init__()
        activation = activation()
        if dropout:
            activation = nn.Sequential(activation, nn.Dropout(dropout))
        self.norm1, self.attention = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), feed_forward(width, activation, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Mask | None = None, queries: int | None = None) -> Tensor:
        """The block's output (B, P, D). queries: compute only so many rows, the first ones."""
        y = self.norm1(x)
        x = x[:, :queries] + self.dropout(self.attention(y[:, :queries], y, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """CLIP's image encoder without its last block and its projection.

    images (B, 3, H, W), normalised -> (B, P, D): the class token, then the patches row by row from
    the top left. `norm_post` runs over all tokens; in CLIP it runs over the class token alone.
    Another resolution than image_size is accepted: see `resize_positions`.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int):
        super().__init__()
        self.grid = image_size // patch_size
        self.patch = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.cls = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(1 + self.grid ** 2, width))
        self.norm_pre, self.norm_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(layers))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)                                                  # (B, D, h, w)
        B, D, h, w = x.shape
        x = x.reshape(B, D, h * w).transpose(1, 2)                              # (B, h w, D)
        x = torch.cat([self.cls.expand(B, 1, D), x], dim=1)                     # (B, P, D)
        x = self.norm_pre(x + resize_positions(self.position, (h, w)))
        for block in self.blocks:
            x = block(x)
        return self.norm_post(x)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the weights by CLIP's rule. Their standard deviations (D width, N blocks):

        attention in D^-1/2, out D^-1/2 (2N)^-1/2; MLP in (2D)^-1/2, out D^-1/2 (2N)^-1/2;
        patches 0.02; class token and positions D^-1/2.
        """
        width = len(self.cls)
        width_std = width ** -0.5
        depth_std = (2 * max(1, len(self.blocks))) ** -0.5
        nn.init.normal_(self.patch.weight, std=0.02)
        nn.init.normal_(self.cls, std=width_std)
        nn.init.normal_(self.position, std=width_std)
        for block in self.blocks:
            nn.init.normal_(block.attention.q.weight, std=width_std)
            nn.init.normal_(block.attention.kv.weight, std=width_std)
            nn.init.normal_(block.attention.out.weight, std=width_std * depth_std)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=width_std * depth_std)


def resize_positions(position: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolates a learned position grid to another resolution; the class row is kept.

    For images of another size, and for released weights: CLIP's 7 x 7 grid becomes 9 x 9 at 288.
    Bicubic, align_corners false, no antialiasing.
    position (1 + g², D), size (h, w) -> (1 + h w, D)
    """
    cls, grid = position[:1], position[1:]
    side = int(len(grid) ** 0.5)
    if tuple(size) == (side, side):
        return position
    grid = grid.T.reshape(1, -1, side, side).float()                            # (1, D, g, g)
    grid = F.interpolate(grid, size=tuple(size), mode="bicubic", align_corners=False)
    grid = grid[0].flatten(1).T                                                 # (h w, D)
    return torch.cat([cls, grid.to(cls.dtype)])


def sine_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of a patch's row (first half) and column (second half) -> (side², width).

    A start for learned positions. The longest wave is four grids long, nearly a straight line from
    edge to edge; the shortest is two patches. So "left of" is a direction from the first step on.
    """
    waves = width // 4
    exponent = torch.linspace(0, 1, waves, device="cpu")
    frequency = torch.pi / (2 * side) * (2 * side) ** exponent                  # radians per patch
    place = torch.arange(side, device="cpu") - (side - 1) / 2                   # 0 in the middle
    angle = place[:, None] * frequency                                          # (side, waves)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                         # (side, width / 2)
    rows, columns = wave[:, None].expand(-1, side, -1), wave.expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side ** 2, -1)             # (side², width)


# -------------------------------------------------------------------------------------------------
# The text side.

class TextEmbedding(nn.Module):
    """LayerNorm(word + type + position), as in BERT.   ids (B, L), position (B or 1, L) -> (B, L,
    D)"""

    def __init__(self, vocab_size: int, width: int, max_positions: int, dropout: float,
                 eps: float = 1e-5):
        super().__init__()
        self.word = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_positions, width)
        self.token_type = nn.Parameter(torch.zeros(1, width))
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.word(ids) + self.token_type + self.position(position)
        return self.dropout(self.norm(x))


def roberta_positions(real: Tensor) -> Tensor:
    """RoBERTa counts real tokens from 2; padding has position 1.   real (B, L) -> (B, L) int64"""
    return 1 + real.cumsum(1) * real


class StreamLayer(nn.Module):
    """A post-norm transformer layer over the streams of a caption; after each part, add and norm.

    Text layers (eps 1e-5) have self-attention and a feed-forward. Fusion layers (eps 1e-12) have
    cross-attention to the image between the two.
    x (B, S, L, D) -> (B, S, L, D); mask for B S streams of L rows; image (M, P, D).
    """

    def __init__(self, width: int, heads: int, dropout: float, eps: float,
                 cross_attention: bool = False):
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width, eps)
        if cross_attention:
            self.cross_attention = Attention(width, heads, dropout)
            self.cross_norm = nn.LayerNorm(width, eps)
        self.mlp, self.mlp_norm = feed_forward(width, nn.GELU()), nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Mask | None, image: Tensor | None = None,
                cache: "generate.KVCache | None" = None, image_of: Tensor | None = None) -> Tensor:
        """The layer's output (B, S, L, D). cache: a generate.KVCache of the words before these.

        image_of (B,): the image of each caption; None: B / M neighbours to an image.
        """
        B, S, L, D = x.shape
        y = x.reshape(B * S, L, D)                          # each stream looks at itself
        words = y
        if cache is not None:
            words = cache.extend(*self.self_attention.keys_and_values(y))
        y = self.self_attention(y, words, mask).view(B, S, L, D)
        x = self.self_norm(x + self.dropout(y))
        if image is not None:
            y = x.reshape(B, S * L, D)                  # the streams side by side look at the image
            y = self.cross_attention(y, image, memory_of=image_of).view(B, S, L, D)
            x = self.cross_norm(x + self.dropout(y))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class ReconstructorLayer(nn.Module):
    """A post-norm layer of queries (eps 1e-12): cross-attention to the streams, feed-forward.

    It has no self-attention, so a query cannot learn another query's answer.
    q (B, Q, D), streams (B, S, L, D), mask for Q rows and S L columns -> (B, Q, D)
    """

    def __init__(self, width: int, heads: int, dropout: float, eps: float):
        super().__init__()
        self.cross_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width, eps)
        self.mlp, self.mlp_norm = feed_forward(width, nn.GELU()), nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, streams: Tensor, mask: Mask) -> Tensor:
        B, S, L, D = streams.shape
        memory = streams.reshape(B, S * L, D)               # [left to right ; right to left]
        q = self.cross_norm(q + self.dropout(self.cross_attention(q, memory, mask)))
        return self.mlp_norm(q + self.dropout(self.mlp(q)))


# -------------------------------------------------------------------------------------------------
# Heads: what reads a model's outputs.

class VocabHead(nn.Module):
    """decoder(LayerNorm(gelu(dense(x)))), not tied to the embeddings.   (…, D) -> (…, V)"""

    def __init__(self, width: int, vocab_size: int, eps: float = 1e-12):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.decoder = nn.Linear(width, vocab_size)

    chunked = False             # losses without the memory of all logits (train.py --chunk-loss)

    def transform(self, x: Tensor) -> Tensor:
        """What the decoder reads.   (…, D) -> (…, D)"""
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0,
               count_hits: bool = True) -> tuple[Tensor, Tensor]:
        """losses.row_losses of the logits of x (N, D): two of (N,)"""
        if not self.chunked:
            return row_losses(self(x), targets, smoothing, count_hits)
        return losses_in_chunks(self.transform(x), self.decoder.weight, self.decoder.bias, targets,
                                smoothing, count_hits)


def task_head(config: "flm.Config | vilt.Config") -> nn.Module:
    """The head of a fine-tuned model, on class vectors: ViLT's, which METER and FLM kept.

    vqa          (B, D) -> (B, answers)
    nlvr2        the vectors of both images, (B, 2D) -> (B, 2), class 1 = the statement is true
    retrieval    (B, D) -> (B, 1), how well image and caption go together
    """
    D = config.width
    if config.head == "retrieval":
        return nn.Linear(D, 1)
    inputs, outputs = (D, config.answers) if config.head == "vqa" else (2 * D, 2)
    return nn.Sequential(nn.Linear(inputs, 2 * D), nn.LayerNorm(2 * D), nn.GELU(),
                         nn.Linear(2 * D, outputs))


def loss_and_hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies and number of hits: logits (N, C), targets (N,) -> 2 scalars."""
    loss = whole(F.cross_entropy(logits.float(), targets, reduction="sum"))
    hits = (whole(logits.argmax(-1)) == targets).float().sum()
    return loss, hits


def encode_batch_images(model: nn.Module, batch: dict, which: int = 0) -> "Tensor | vilt.Visual":
    """model.encode_image of a batch's images, with all that its collate function says of them.

    which: 1 for the second images of nlvr2's pairs.
    """
    suffix = "_1" if which else ""
    layout = {}
    for name in ("sizes", "patches"):           # ViLT's; FLM has none
        if name + suffix in batch:
            layout[name] = batch[name + suffix]
    return model.encode_image(batch["image" + suffix], which=which, **layout)


def task_logits(model: nn.Module, batch: dict) -> Tensor:
    """A fine-tuned head's scores: vqa (B, answers), nlvr2 (B, 2), retrieval (captions, 1).

    nlvr2 reads the text with each image alone, joins both class vectors, and tells the second image
    by its type vector, token_type[2].
    `batch` holds `image` (B, 3, H, W), for nlvr2 `image_1` too, and `ids` (B, L), for retrieval
    (B · captions, L): several captions of each image, which is encoded once. With `image_of` (B,),
    the image of each text, there may be fewer images.
    """
    text = model.encode_text(batch["ids"], class_only=True)
    pooled = []
    for which in range(2 if model.config.head == "nlvr2" else 1):
        visual = encode_batch_images(model, batch, which)
        pooled.append(model.fuse(visual, text, batch.get("image_of")).pooled)
    return model.head(torch.cat(pooled, dim=-1))


def task_loss(model: nn.Module, batch: dict) -> dict:
    """The loss of a fine-tuned head: {head: (sum over the batch, hits)}, both scalars.

    vqa: binary cross-entropy against soft targets (B, answers), summed over the answers. A hit
    counts as much as the answer's score. nlvr2: cross-entropy against `label` (B,). retrieval:
    cross-entropy over each image's captions, of which the first is the true one.
    """
    head, logits = model.config.head, task_logits(model, batch).float()
    if head == "vqa":
        targets = batch["targets"]
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        best = logits.argmax(1, keepdim=True)
        return {head: (loss, targets.gather(1, best).sum())}
    if head == "nlvr2":
        return {head: loss_and_hits(logits, batch["label"])}
    B = len(batch["image"])
    first = torch.zeros(B, dtype=torch.int64, device=logits.device)
    return {head: loss_and_hits(logits.view(B, -1), first)}


# -------------------------------------------------------------------------------------------------
# Checks that both models share.

def check_config(config: "flm.Config | vilt.Config") -> None:
    """ValueError for values of another type, and for sizes or a head that a Config cannot have."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) not in ((int, float) if field.type is float else (field.type,)):
            raise ValueError(f"{field.name}: a value of type {field.type.__name__} is expected, "
                             f"not {type(value).__name__}")
        if not isinstance(value, str) and not 0 <= value < 2 ** 31:
            raise ValueError(f"{field.name} {value}: a number from 0 to 2^31 is expected")
    for name in ("image_size", "patch_size", "vocab_size", "max_positions", "width", "heads",
                 "vit_heads", "text_heads", "layers"):
        value = getattr(config, name, 1)
        if value < 1:
            raise ValueError(f"{name} {value}: at least 1 is expected")
    if config.image_size % config.patch_size:
        raise ValueError(f"image_size {config.image_size} does not divide by "
                         f"patch_size {config.patch_size}")
    if config.head not in HEADS:
        raise ValueError(f"head {config.head!r}: one of {', '.join(HEADS)} is expected")
    if config.itm and not config.pooler:
        raise ValueError("itm needs the pooler")
    if config.head in TASK_HEADS and not config.pooler:
        raise ValueError(f"head {config.head} needs the pooler")
    if (config.head == "vqa") != (config.answers > 0):
        raise ValueError(f"head {config.head!r} with {config.answers} answers: head vqa, and no "
                         "other, chooses from answers")


def check_divides(config: "flm.Config | vilt.Config", **heads_of: str) -> None:
    """ValueError unless each width divides by its heads: check_divides(config, width="heads")."""
    for width, heads in heads_of.items():
        if getattr(config, width) % getattr(config, heads):
            raise ValueError(f"{width} {getattr(config, width)} does not divide by "
                             f"{heads} {getattr(config, heads)}")


def check_rates(config: "flm.Config | vilt.Config", *names: str) -> None:
    """ValueError unless each rate is within 0..1."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} {getattr(config, name)} is outside 0..1")


def check_pairs(images: int, captions: int, image_of: Tensor | None = None) -> None:
    """ValueError unless every image has the same number of captions, or image_of tells them."""
    if image_of is None and captions % images:
        raise ValueError(f"{captions} captions for {images} images: each image has the same number "
                         "of them")
