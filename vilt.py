"""ViLT: one transformer over words and patches, pretrained with masked words, image-text matching and optimal transport.

    model = ViLT(PRESETS["vilt"])
    visual = model.encode_image(images, sizes)   # once per image: patches, projected, with their places
    text = model.encode_text(ids)                # once per caption: words, with their places
    fused = model.fuse(visual, text)             # once per pair: all twelve blocks, over [text ; image]
    logits = model.vocab_logits(fused.reconstructed)

"ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", Kim et al., ICML 2021, arXiv 2102.03334.
Pictures keep their aspect ratio, so a batch holds grids of different shapes. They are packed: each picture is the list of
its own patches, and only the difference to the longest list of the batch is padding, which nobody sees.

Letters: B batch, L text length, K patches (of the longest list), P image tokens (1 + K), D width, V vocabulary,
h, w rows and columns of one picture's patches.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import flm
from layers import (TASK_HEADS, TextEmbedding, ViTBlock, VocabHead, check_head, check_pairs, loss_and_hits, task_head,
                    task_loss)

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)        # pixels arrive as (x - MEAN) / STD, from -1 to 1


@dataclass(frozen=True)
class Config:
    """Every size and choice that a checkpoint must know to be rebuilt. The defaults are the paper's ViLT-B/32."""
    image_size: int = 384               # shorter side, pixels; the longer one has at most 1333/800 times as many
    patch_size: int = 32
    max_patches: int = 200              # in training, a larger picture shows a random choice of so many; 0: all
    vocab_size: int = 30522
    max_positions: int = 40             # the longest caption, [CLS] and [SEP] included
    cls_id: int = 101                   # [CLS]
    pad_id: int = 0                     # [PAD]
    sep_id: int = 102                   # [SEP]
    mask_id: int = 103                  # [MASK]
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    eps: float = 1e-6                   # of the LayerNorms of the blocks; transformers' copies of the model have 1e-12
    text_eps: float = 1e-12             # of those of the text embedding and the vocabulary head
    dropout: float = 0.1
    init_std: float = 0.02
    # the losses
    mask_rate: float = 0.15             # share of masked words
    wpa_weight: float = 0.1             # of the word-patch alignment, beside itm; 0: none
    mpp: bool = False                   # masked patch prediction, which the paper tries and drops
    patch_mask_rate: float = 0.15       # share of masked patches
    # what reads the outputs; only parameters that are trained exist
    head: str = "vocab"                 # vocab: words; vqa, nlvr2, retrieval: a task on the class vector; none
    answers: int = 0                    # vqa: how many answers there are to choose from
    pooler: bool = True                 # the class vector
    itm: bool = True                    # image-text matching

    def __post_init__(self):
        check_head(self)
        if self.max_patches < 0:
            raise ValueError(f"max_patches {self.max_patches}: at least 0 is expected, which means all")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        for rate in ("mask_rate", "patch_mask_rate"):
            if not 0 <= getattr(self, rate) <= 1:
                raise ValueError(f"{rate} {getattr(self, rate)} is outside 0..1")

    @property
    def objective(self):
        return "mlm"                    # every row sees everything, as in flm.Config's objective of this name

    @property
    def max_tokens(self):
        return self.max_positions

    @property
    def loss_weights(self):
        """Output -> its weight in the total loss; a fine-tuned head has the only one."""
        if self.head in TASK_HEADS:
            return {self.head: 1.0}
        weights = {"mlm": 1.0}
        if self.itm:
            weights |= {"itm": 1.0} | ({"wpa": self.wpa_weight} if self.wpa_weight else {})
        return weights | ({"mpp": 1.0} if self.mpp else {})


PRESETS = {
    # minutes on a laptop's CPU; the vocabulary is trained on the captions, of which half the words are masked: so few steps
    # must teach much
    "vilt-toy": Config(image_size=64, patch_size=16, vocab_size=400, max_positions=64, cls_id=0, pad_id=1, sep_id=2,
                       mask_id=4, width=128, layers=4, heads=4, mlp_width=512, dropout=0.0, init_std=0.04, mask_rate=0.5),
    # an hour on a CPU, minutes on a GPU: for a few thousand real photographs
    "vilt-small": Config(image_size=128, patch_size=16, max_patches=80, vocab_size=4096, max_positions=64, cls_id=0,
                         pad_id=1, sep_id=2, mask_id=4, width=256, layers=8, heads=4, mlp_width=1024, init_std=0.06),
    "vilt": Config(),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of any shape. `patches` (B, K) int64 are places in the padded grid of the batch, row by row; -1 is padding.

def all_patches(sizes, rows, columns):
    """Every patch of every picture, packed: sizes (B, 2) int64, the rows and columns of its patches -> patches (B, K).

    >>> all_patches(torch.tensor([[1, 2], [2, 1]]), rows=2, columns=2)
    tensor([[0, 1],
            [0, 2]])
    """
    h, w = sizes[:, :1, None], sizes[:, 1:, None]                                                   # (B, 1, 1)
    row = torch.arange(rows, device=sizes.device)[:, None]
    column = torch.arange(columns, device=sizes.device)
    outside = ~((row < h) & (column < w)).flatten(1)                                                # (B, rows columns)
    order = outside.byte().argsort(dim=1, stable=True)[:, :int(sizes.prod(1).max())]                # the inside first
    return order.masked_fill(outside.gather(1, order), -1)


def some_patches(rows, columns, limit, rng):
    """Row and column of each patch of one picture that is shown: all, or a random choice of `limit`.   -> two arrays"""
    count = rows * columns
    chosen = np.sort(rng.choice(count, limit, replace=False)) if 0 < limit < count else np.arange(count)
    return chosen // columns, chosen % columns


# ---------------------------------------------------------------------------------------------------------------------
# Word-patch alignment: how far are the words from the patches, if each word's share of attention may move as it likes?

def cosine_cost(text, image):
    """1 - cosine of every word and patch: text (B, M, D), image (B, N, D) -> (B, M, N)"""
    return 1 - F.normalize(text, dim=-1, eps=1e-5) @ F.normalize(image, dim=-1, eps=1e-5).transpose(1, 2)


@torch.no_grad()
def transport_plan(cost, text_real, image_real, beta=0.5, iterations=50, inner=1):
    """The cheapest way to carry every word's mass to the patches: inexact proximal optimal transport (IPOT).

    Words have 1/m each and patches 1/n each, m and n being how many are real. Each iteration solves, by `inner` steps of
    Sinkhorn, the problem with a penalty 1/beta on leaving the plan so far, and thereby nears the exact optimum.
    (Xie et al., "A fast proximal point method for computing exact Wasserstein distance", 2018, algorithm 1.)
    cost (B, M, N), text_real (B, M), image_real (B, N), True = takes part -> plan (B, N, M)
    """
    m, n = (real.sum(1)[:, None, None].to(cost) for real in (text_real, image_real))                # (B, 1, 1)
    both = image_real[:, :, None] & text_real[:, None, :]                                           # (B, N, M)
    kernel = (-cost.transpose(1, 2) / beta).exp() * both
    plan = both.to(cost)
    word = text_real[:, :, None] / m.clamp(min=1)                                                   # (B, M, 1)
    for _ in range(iterations):
        step = kernel * plan
        for _ in range(inner):
            patch = image_real[:, :, None] / (n * step @ word).clamp(min=1e-30)                     # (B, N, 1)
            word = text_real[:, :, None] / (m * step.transpose(1, 2) @ patch).clamp(min=1e-30)      # (B, M, 1)
        plan = patch * step * word.transpose(1, 2)
    return plan


def transport_distance(text, image, text_real, image_real, beta=0.5, iterations=50, inner=1):
    """The cost of that plan, the plan taken as given: gradients move the words and patches, not the plan.

    text (B, M, D), image (B, N, D), float32 -> (distance (B,), plan (B, N, M))
    """
    cost = cosine_cost(text, image).masked_fill(~(text_real[:, :, None] & image_real[:, None, :]), 0)
    plan = transport_plan(cost, text_real, image_real, beta, iterations, inner)
    return (cost * plan.transpose(1, 2)).sum((1, 2)), plan


# ---------------------------------------------------------------------------------------------------------------------
# The model.

@dataclass
class Visual:
    """What `fuse` needs of pictures. `visual[index]` picks some of them."""
    tokens: torch.Tensor                # (B, P, D): the class token, then the patches
    mask: torch.Tensor                  # (B, P) bool, True = real
    patches: torch.Tensor               # (B, K): where in the padded grid each patch is; -1: padding

    def __getitem__(self, index):
        return Visual(self.tokens[index], self.mask[index], self.patches[index])

    def __len__(self):
        return len(self.tokens)


@dataclass
class Text:
    """What `fuse` needs of captions. `text[index]` picks some of them."""
    tokens: torch.Tensor                # (B, L, D)
    mask: torch.Tensor                  # (B, L) bool, True = real
    rows: int | None = None             # of the last block's output, only the first so many are wanted; None: all

    def __getitem__(self, index):
        return replace(self, tokens=self.tokens[index], mask=self.mask[index])


@dataclass
class Fused(flm.Fused):
    """What the model knows of pairs: `.pooled`, `.reconstructed` (B, L, D) of the words, and of the image tokens: """
    image: torch.Tensor | None = None   # (B, P, D); None where fewer rows were asked for


class ViLT(nn.Module):
    """BERT's text embedding, a linear projection of patches, and pre-norm blocks over both. See `Config` for sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = TextEmbedding(c.vocab_size, c.width, c.max_positions, c.dropout, c.text_eps)
        self.patch = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.grid = c.image_size // c.patch_size
        self.cls = nn.Parameter(torch.zeros(c.width))
        self.position = nn.Parameter(torch.zeros(1 + self.grid ** 2, c.width))
        # [0] text, [1] image, [2] nlvr2's second image
        self.token_type = nn.Parameter(torch.zeros(3 if c.head == "nlvr2" else 2, c.width))
        self.blocks = nn.ModuleList(ViTBlock(c.width, c.heads, nn.GELU, c.eps, c.mlp_width, c.dropout)
                                    for _ in range(c.layers))
        self.norm, self.dropout = nn.LayerNorm(c.width, c.eps), nn.Dropout(c.dropout)
        if c.pooler:
            self.pooler = nn.Linear(c.width, c.width)
        if c.head == "vocab":
            self.vocab_head = VocabHead(c.width, c.vocab_size, c.text_eps)
        elif c.head != "none":
            self.head = task_head(c)
        if c.itm:
            self.itm_head = nn.Linear(c.width, 2)                       # class 1 = the image belongs to the caption
        if c.mpp:
            self.patch_head = VocabHead(c.width, 3 * 256, c.text_eps)   # red, green and blue of a masked patch, in 256 steps
            self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws all weights afresh, from torch's global random state: std init_std; LayerNorms 1 and 0, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.bias)
        vectors = [self.embed.token_type, self.cls, self.position, self.token_type]
        for parameter in vectors + ([self.mask_token] if self.config.mpp else []):
            nn.init.normal_(parameter, std=self.config.init_std)

    # -- encode once, fuse many ---------------------------------------------------------------------------------------

    def encode_image(self, images, sizes=None, patches=None, which=0, hidden=None):
        """All that does not depend on the text: images (B, 3, H, W) float, normalised -> Visual.

        sizes (B, 2) int64: rows and columns of patches of each picture, which stands at the top left of its padded place
        (default: no padding). patches (B, K): those that are shown (default: all). which: 1 for the second image of a
        pair (nlvr2). hidden (B, K) bool: patches whose content is replaced by the mask token (masked patch prediction).
        """
        if any(side % self.config.patch_size for side in images.shape[2:]):
            raise ValueError(f"pictures of {images.shape[2]} x {images.shape[3]} pixels: multiples of the patch size "
                             f"{self.config.patch_size} are expected")
        x = self.patch(images)                                                                      # (B, D, rows, columns)
        B, D, rows, columns = x.shape
        if sizes is None:
            sizes = torch.tensor([[rows, columns]], device=x.device).expand(B, 2)
        if patches is None:
            patches = all_patches(sizes, rows, columns)                                             # (B, K)
        real, place = patches >= 0, patches.clamp(min=0)
        x = x.flatten(2).transpose(1, 2).gather(1, place[:, :, None].expand(-1, -1, D))             # (B, K, D)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + self.positions_of(place // columns, place % columns, sizes)
        cls = (self.cls + self.position[0]).expand(B, 1, D)
        x = self.dropout(torch.cat([cls, x], dim=1)) + self.token_type[1 + which]                   # (B, P, D)
        return Visual(x, F.pad(real, (1, 0), value=True), patches)

    def positions_of(self, row, column, sizes):
        """The learned grid, stretched over a picture of any shape, where the patches are.

        Bilinear, its corners on the picture's corners. row, column (B, K), sizes (B, 2) -> (B, K, D)
        """
        h, w = (sizes[:, :1] - 1).clamp(min=1), (sizes[:, 1:] - 1).clamp(min=1)                     # (B, 1)
        at = torch.stack([column / w, row / h], dim=-1) * 2 - 1                                     # (B, K, 2), -1..1
        grid = self.position[1:].T.reshape(1, -1, self.grid, self.grid)                             # (1, D, g, g)
        return F.grid_sample(grid.float(), at[None], padding_mode="border", align_corners=True)[0].permute(1, 2, 0)

    def encode_text(self, ids, class_only=False):
        """All that does not depend on the image: ids (B, L) int64, `[CLS] … [SEP]` and padding -> Text.

        class_only: only the class vector will be read, so the last block need not compute the other rows.
        """
        if ids.shape[1] > self.config.max_tokens:
            raise ValueError(f"captions of {ids.shape[1]} tokens: this model has positions for {self.config.max_tokens}")
        position = torch.arange(ids.shape[1], device=ids.device)[None]
        return Text(self.embed(ids, position) + self.token_type[0], ids != self.config.pad_id, 1 if class_only else None)

    def fuse(self, visual, text):
        """Reads captions with their images: visual of M pictures, text of B captions, B / M neighbours each -> Fused."""
        check_pairs(visual, text.mask)
        B, L = text.mask.shape
        image, mask = (part.repeat_interleave(B // len(part), dim=0) for part in (visual.tokens, visual.mask))
        x = torch.cat([text.tokens, image], dim=1)                                                  # (B, L + P, D)
        mask = torch.cat([text.mask, mask], dim=1)[:, None]                                         # (B, 1, L + P)
        for block in self.blocks:
            x = block(x, mask, text.rows if block is self.blocks[-1] else None)
        x = self.norm(x)                                                                            # (B, rows, D)
        pooled = torch.tanh(self.pooler(x[:, 0])) if self.config.pooler else None                   # (B, D)
        return Fused(pooled=pooled, reconstructed=x[:, :L], image=None if text.rows else x[:, L:])

    def vocab_logits(self, x):
        """Scores every token of the vocabulary: (…, D) -> (…, V)."""
        return self.vocab_head(x)

    def align(self, visual, text, fused, sep):
        """How far each caption's words are from its picture's patches, and which word goes to which patch.

        [CLS], [SEP] (`sep` (B, L) is True there) and the image's class token take no part.
        -> (distance (B,), plan (B, K, L))
        """
        words, patches = text.mask & ~sep, visual.mask[:, 1:].expand(len(text.mask), -1)
        words[:, 0] = False
        with torch.autocast(fused.image.device.type, enabled=False):
            return transport_distance(fused.reconstructed.float(), fused.image[:, 1:].float(), words, patches)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch):
        """The losses of a batch: output -> (sum of the losses of its targets, number predicted right), both scalars.

        Of a fine-tuned head: see `layers.task_loss`. Of pretraining:

        `batch` holds `image` (B, 3, H, W) normalised, `sizes`, `patches`, `ids` (B, L), and what `tasks.py` drew:
        `masked_ids` and `mlm_rows`, the masked words as indices into (B L); for itm `image_of` (B,), the picture that each
        caption is shown, and `same_image` (B,), whether it is its own; for mpp `mpp_rows`, the masked patches as indices into (B K), and
        `hidden_patches` (B, K), where their content is hidden.
        Word-patch alignment has no right and wrong: its second value is NaN.
        """
        c, ids = self.config, batch["ids"]
        if c.head in TASK_HEADS:
            return task_loss(self, batch)
        visual = self.encode_image(batch["image"], batch["sizes"], batch["patches"])
        text = self.encode_text(batch["masked_ids"])
        fused = self.fuse(visual, replace(text, rows=ids.shape[1]))                                 # the words alone are read
        x = fused.reconstructed.flatten(0, 1).index_select(0, batch["mlm_rows"])                    # (targets, D)
        result = {"mlm": loss_and_hits(self.vocab_logits(x), ids.flatten().index_select(0, batch["mlm_rows"]))}
        if c.itm:
            same = batch["same_image"]
            shown, text = visual[batch["image_of"]], self.encode_text(ids, class_only=not c.wpa_weight)
            fused = self.fuse(shown, text)
            result["itm"] = loss_and_hits(self.itm_head(fused.pooled), same.long())
            if c.wpa_weight:
                distance, _ = self.align(shown, text, fused, ids == c.sep_id)
                result["wpa"] = torch.where(same, distance, -distance).sum(), distance.new_tensor(float("nan"))
        if c.mpp:
            visual = self.encode_image(batch["image"], batch["sizes"], batch["patches"], hidden=batch["hidden_patches"])
            patches = self.fuse(visual, self.encode_text(ids)).image[:, 1:].flatten(0, 1)           # (B K, D)
            x = patches.index_select(0, batch["mpp_rows"])                                          # (targets, D)
            colours = self.patch_colours(batch["image"], batch["patches"]).flatten(0, 1)            # (B K, 3)
            colours = colours.index_select(0, batch["mpp_rows"])                                    # (targets, 3)
            result["mpp"] = loss_and_hits(self.patch_head(x).view(-1, 256), colours.flatten())
        return result

    def patch_colours(self, images, patches):
        """The mean red, green and blue of each patch, 0..255: what masked patch prediction asks for.   -> (B, K, 3)"""
        mean = F.avg_pool2d(images * STD[0] + MEAN[0], self.config.patch_size)                      # (B, 3, rows, columns)
        colours = (mean * 255).long().clamp(0, 255).flatten(2).transpose(1, 2)                      # (B, rows columns, 3)
        return colours.gather(1, patches.clamp(min=0)[:, :, None].expand(-1, -1, 3))
