"""ViLT: one transformer over words and patches.

    model = ViLT(PRESETS["vilt"])
    visual = model.encode_image(images, sizes)      # once per image: its patches, projected
    text = model.encode_text(ids)                   # once per caption: its words, embedded
    fused = model.fuse(visual, text)                # once per pair: all blocks, over [text ; image]
    logits = model.vocab_logits(fused.reconstructed)

It is pretrained with masked words, image-text matching, and word-patch alignment by optimal
transport. "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", Kim et
al., ICML 2021, arXiv 2102.03334. Images keep their aspect ratio, so a batch holds grids of several
shapes. They are packed: each image is the list of its own patches. Only the difference to the
longest list of the batch is padding, and nothing looks at it.

Letters: B batch, L text length, K patches (of the longest list), P image tokens (1 + K), D width,
V vocabulary, M words and N patches of an alignment, h, w rows and columns of one image's patches.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import flm
from layers import (TASK_HEADS, Mask, TextEmbedding, ViTBlock, VocabHead, check_config,
                    check_divides, check_pairs, check_rates, loss_and_hits, task_head, task_loss)
from losses import targets_of

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)       # pixels arrive as (x - MEAN) / STD, from -1 to 1


@dataclass(frozen=True)
class Config:
    """Every size and choice that a checkpoint must know to be rebuilt.

    The defaults are the paper's ViLT-B/32. The comments are the help texts of train.py's flags.
    """
    # the images
    image_size: int = 384           # pixels of the shorter side; the longer: at most 1333/800 of it
    patch_size: int = 32                # pixels
    max_patches: int = 200              # patches seen of a training image, at random; 0: all
    # the text
    vocab_size: int = 30522             # tokens; in training, as many as the tokenizer has
    max_positions: int = 40             # tokens of the longest caption, [CLS] and [SEP] included
    cls_id: int = 101                   # id of [CLS]
    pad_id: int = 0                     # id of [PAD]
    sep_id: int = 102                   # id of [SEP]
    mask_id: int = 103                  # id of [MASK]
    # the transformer
    width: int = 768                    # width of the blocks
    layers: int = 12                    # blocks
    heads: int = 12                     # attention heads
    mlp_width: int = 3072               # hidden width of the feed-forward layers
    eps: float = 1e-6                   # epsilon of the blocks' LayerNorms; 1e-12 in transformers
    text_eps: float = 1e-12             # epsilon of the text embedding's and the heads' LayerNorms
    dropout: float = 0.1                # probability, in embeddings, after attention and in the MLP
    init_std: float = 0.02              # standard deviation of new weights
    # the losses
    mask_rate: float = 0.15             # share of masked words
    wpa_weight: float = 0.1             # weight of the word-patch alignment loss, with itm; 0: off
    mpp: bool = False                   # masked patch prediction, which the paper tries and drops
    patch_mask_rate: float = 0.15       # share of masked patches, with mpp
    # what reads the outputs; only parameters that are trained exist
    head: str = "vocab"                 # vocab: words; vqa, nlvr2, retrieval: a task's head; none
    answers: int = 0                    # vqa: number of answers to choose from
    pooler: bool = True                 # the class vector
    itm: bool = True                    # pretraining: image-text matching

    def __post_init__(self):
        check_config(self)
        check_divides(self, width="heads")
        check_rates(self, "mask_rate", "patch_mask_rate")
        if self.max_patches < 0:
            raise ValueError(f"max_patches {self.max_patches}: at least 0 is expected, meaning all")

    @property
    def objective(self) -> str:
        """mlm: every row sees everything, as in flm.Config's objective of this name."""
        return "mlm"

    @property
    def max_tokens(self) -> int:
        """The longest caption, `[CLS]` and `[SEP]` included."""
        return self.max_positions

    @property
    def loss_weights(self) -> dict[str, float]:
        """Output -> its weight in the total loss; a fine-tuned head has the only one."""
        if self.head in TASK_HEADS:
            return {self.head: 1.0}
        weights = {"mlm": 1.0}
        if self.itm:
            weights["itm"] = 1.0
            if self.wpa_weight:
                weights["wpa"] = self.wpa_weight
        if self.mpp:
            weights["mpp"] = 1.0
        return weights


PRESETS = {
    # For minutes on a laptop's CPU; the vocabulary is trained on the captions. Half of the words
    # are masked, so that few steps teach much.
    "vilt-toy": Config(image_size=64, patch_size=16, vocab_size=400, max_positions=64, cls_id=0,
                       pad_id=1, sep_id=2, mask_id=4, width=128, layers=4, heads=4, mlp_width=512,
                       dropout=0.0, init_std=0.04, mask_rate=0.5),
    # For a few thousand photographs: an hour on a CPU, minutes on a GPU.
    "vilt-small": Config(image_size=128, patch_size=16, max_patches=80, vocab_size=4096,
                         max_positions=64, cls_id=0, pad_id=1, sep_id=2, mask_id=4, width=256,
                         layers=8, heads=4, mlp_width=1024, init_std=0.06),
    "vilt": Config(),
}


# -------------------------------------------------------------------------------------------------
# Images of any shape. `patches` (B, K) int64 are places in the padded grid of the batch, row by
# row; -1 is padding.

def all_patches(sizes: Tensor, rows: int, columns: int) -> Tensor:
    """Every patch of every image, packed: sizes (B, 2) int64, rows and columns -> patches (B, K).

    >>> all_patches(torch.tensor([[1, 2], [2, 1]]), rows=2, columns=2)
    tensor([[0, 1],
            [0, 2]])
    """
    h, w = sizes[:, :1, None], sizes[:, 1:, None]                                        # (B, 1, 1)
    row = torch.arange(rows, device=sizes.device)[:, None]
    column = torch.arange(columns, device=sizes.device)
    outside = ~((row < h) & (column < w)).reshape(len(sizes), -1)                # (B, rows columns)
    longest = int(sizes.prod(1).max())
    inside_first = outside.byte().argsort(dim=1, stable=True)[:, :longest]                  # (B, K)
    return inside_first.masked_fill(outside.gather(1, inside_first), -1)


def some_patches(rows: int, columns: int, limit: int,
                 rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch of an image that is shown: all, or `limit` random ones."""
    count = rows * columns
    chosen = np.arange(count)
    if 0 < limit < count:
        chosen = np.sort(rng.choice(count, limit, replace=False))
    return chosen // columns, chosen % columns


# -------------------------------------------------------------------------------------------------
# Word-patch alignment: what does it cost to carry the words to the patches?

def cosine_cost(text: Tensor, image: Tensor) -> Tensor:
    """1 - cosine of every word and patch: text (B, M, D), image (B, N, D) -> (B, M, N)"""
    text, image = F.normalize(text, dim=-1, eps=1e-5), F.normalize(image, dim=-1, eps=1e-5)
    return 1 - text @ image.transpose(1, 2)


@torch.no_grad()
def transport_plan(cost: Tensor, text_real: Tensor, image_real: Tensor, beta: float = 0.5,
                   iterations: int = 50, inner: int = 1) -> Tensor:
    """The cheapest way to carry the words' mass to the patches: inexact proximal optimal transport.

    The m real words have mass 1/m each, the n real patches 1/n. With G = exp(-cost / beta), the
    plan T starts at 1 and sigma (of the words) at 1/m. Each iteration does

        Q     = G ∘ T
        delta = 1 / (n Q sigma),   sigma = 1 / (m Q^T delta)        `inner` times (Sinkhorn)
        T     = diag(delta) Q diag(sigma)

    (Xie et al., "A fast proximal point method for computing exact Wasserstein distance", 2018,
    algorithm 1: a penalty 1/beta on leaving the plan so far, which nears the exact optimum.)
    cost (B, M, N), text_real (B, M), image_real (B, N), True = takes part -> plan (B, N, M)
    """
    m = text_real.sum(1)[:, None, None].to(cost)                                         # (B, 1, 1)
    n = image_real.sum(1)[:, None, None].to(cost)
    both = image_real[:, :, None] & text_real[:, None, :]                                # (B, N, M)
    kernel = (-cost.transpose(1, 2) / beta).exp() * both                                 # G
    plan = both.to(cost)                                                                 # T
    sigma = text_real[:, :, None] / m.clamp(min=1)                                       # (B, M, 1)
    for _ in range(iterations):
        step = kernel * plan                                                             # Q
        for _ in range(inner):
            delta = image_real[:, :, None] / (n * step @ sigma).clamp(min=1e-30)         # (B, N, 1)
            sigma = text_real[:, :, None] / (m * step.transpose(1, 2) @ delta).clamp(min=1e-30)
        plan = delta * step * sigma.transpose(1, 2)
    return plan


def transport_distance(text: Tensor, image: Tensor, text_real: Tensor, image_real: Tensor,
                       beta: float = 0.5, iterations: int = 50,
                       inner: int = 1) -> tuple[Tensor, Tensor]:
    """The cost of that plan. Gradients move the words and patches, not the plan.

    text (B, M, D), image (B, N, D), float32 -> (distance (B,), plan (B, N, M))
    """
    both = text_real[:, :, None] & image_real[:, None, :]                                # (B, M, N)
    cost = cosine_cost(text, image).masked_fill(~both, 0)
    plan = transport_plan(cost, text_real, image_real, beta, iterations, inner)
    return (cost * plan.transpose(1, 2)).sum((1, 2)), plan


# -------------------------------------------------------------------------------------------------
# The model.

@dataclass
class Visual:
    """What `fuse` needs of images. `visual[index]` picks some of them."""
    tokens: Tensor                      # (B, P, D): the class token, then the patches
    mask: Tensor                        # (B, P) bool, True = real
    patches: Tensor                    # (B, K): where in the padded grid each patch is; -1: padding

    def __getitem__(self, index) -> "Visual":
        return Visual(self.tokens[index], self.mask[index], self.patches[index])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Text:
    """What `fuse` needs of captions. `text[index]` picks some of them."""
    tokens: Tensor                      # (B, L, D)
    mask: Tensor                        # (B, L) bool, True = real
    queries: int | None = None        # rows of the last block that are wanted, the first; None: all

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Text":
        return replace(self, tokens=self.tokens[index], mask=self.mask[index])


@dataclass
class Fused(flm.Fused):
    """What the model knows of pairs: `.pooled`, `.reconstructed` (B, L, D) of the words,
    `.image`."""
    image: Tensor | None = None         # (B, P, D); None where fewer rows were asked for


class ViLT(nn.Module):
    """BERT's text embedding, a linear projection of patches, and pre-norm blocks over both."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.embed = TextEmbedding(c.vocab_size, c.width, c.max_positions, c.dropout, c.text_eps)
        self.patch = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.grid = c.image_size // c.patch_size
        self.cls = nn.Parameter(torch.zeros(c.width))
        self.position = nn.Parameter(torch.zeros(1 + self.grid ** 2, c.width))
        # [0] text, [1] image, [2] nlvr2's second image
        self.token_type = nn.Parameter(torch.zeros(3 if c.head == "nlvr2" else 2, c.width))
        self.blocks = nn.ModuleList(
            ViTBlock(c.width, c.heads, nn.GELU, c.eps, c.mlp_width, c.dropout)
            for _ in range(c.layers))
        self.norm, self.dropout = nn.LayerNorm(c.width, c.eps), nn.Dropout(c.dropout)
        if c.pooler:
            self.pooler = nn.Linear(c.width, c.width)
        if c.head == "vocab":
            self.vocab_head = VocabHead(c.width, c.vocab_size, c.text_eps)
        elif c.head != "none":
            self.head = task_head(c)
        if c.itm:
            self.itm_head = nn.Linear(c.width, 2)       # class 1 = the image belongs to the caption
        if c.mpp:
            # red, green and blue of a masked patch, in 256 steps each
            self.patch_head = VocabHead(c.width, 3 * 256, c.text_eps)
            self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all weights from torch's global random state: normal, std init_std.

        LayerNorms start at 1 and 0, biases at 0.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.bias)
        vectors = [self.embed.token_type, self.cls, self.position, self.token_type]
        if self.config.mpp:
            vectors.append(self.mask_token)
        for parameter in vectors:
            nn.init.normal_(parameter, std=self.config.init_std)

    # -- encode once, fuse many ------------------------------------------------------------------

    def encode_image(self, images: Tensor, sizes: Tensor | None = None,
                     patches: Tensor | None = None, which: int = 0,
                     hidden: Tensor | None = None) -> Visual:
        """All that does not depend on the text: images (B, 3, H, W), normalised -> Visual.

        sizes (B, 2) int64: rows and columns of patches of each image, which stands at the top left
        of its padded place (default: no padding). patches (B, K): those shown (default: all).
        which: 1 for the second image of a pair (nlvr2). hidden (B, K) bool: patches whose content
        is replaced by the mask token (masked patch prediction).
        """
        size = self.config.patch_size
        if any(side % size for side in images.shape[2:]):
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: multiples "
                             f"of the patch size {size} are expected")
        x = self.patch(images)                                               # (B, D, rows, columns)
        B, D, rows, columns = x.shape
        if sizes is None:
            sizes = torch.tensor([[rows, columns]], device=x.device).expand(B, 2)
        if patches is None:
            patches = all_patches(sizes, rows, columns)                                     # (B, K)
        real, place = patches >= 0, patches.clamp(min=0)
        x = x.reshape(B, D, rows * columns).transpose(1, 2)                   # (B, rows columns, D)
        x = x.gather(1, place[:, :, None].expand(-1, -1, D))                             # (B, K, D)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.mask_token.to(x.dtype), x)
        x = x + self.positions_of(place // columns, place % columns, sizes)
        cls = (self.cls + self.position[0]).expand(B, 1, D)
        x = self.dropout(torch.cat([cls, x], dim=1)) + self.token_type[1 + which]        # (B, P, D)
        return Visual(x, F.pad(real, (1, 0), value=True), patches)

    def positions_of(self, row: Tensor, column: Tensor, sizes: Tensor) -> Tensor:
        """The learned position grid, stretched over an image of any shape, read at its patches.

        Bilinear; the grid's corners lie on the image's. row, column (B, K), sizes (B, 2) -> (B, K,
        D) """
        h, w = (sizes[:, :1] - 1).clamp(min=1), (sizes[:, 1:] - 1).clamp(min=1)             # (B, 1)
        at = torch.stack([column / w, row / h], dim=-1) * 2 - 1                   # (B, K, 2), -1..1
        grid = self.position[1:].T.reshape(1, -1, self.grid, self.grid)               # (1, D, g, g)
        x = F.grid_sample(grid.float(), at[None], padding_mode="border", align_corners=True)
        return x[0].permute(1, 2, 0)

    def encode_text(self, ids: Tensor, class_only: bool = False) -> Text:
        """All that does not depend on the image: ids (B, L) int64, `[CLS] … [SEP]`, padded -> Text.

        class_only: only the class vector will be read, so the last block computes its row alone.
        """
        if ids.shape[1] > self.config.max_tokens:
            raise ValueError(f"captions of {ids.shape[1]} tokens: this model has positions "
                             f"for {self.config.max_tokens}")
        position = torch.arange(ids.shape[1], device=ids.device)[None]                      # (1, L)
        tokens = self.embed(ids, position) + self.token_type[0]                          # (B, L, D)
        return Text(tokens, ids != self.config.pad_id, 1 if class_only else None)

    def fuse(self, visual: Visual, text: Text, image_of: Tensor | None = None) -> Fused:
        """Reads captions with their images: visual of M images, text of B captions -> Fused.

        image_of (B,): the image of each caption, 0..M-1; without it, B / M neighbours to an image.
        """
        check_pairs(len(visual), len(text), image_of)
        B, L = text.mask.shape
        if image_of is None:
            captions = B // len(visual)
            image = visual.tokens.repeat_interleave(captions, dim=0)                     # (B, P, D)
            image_real = visual.mask.repeat_interleave(captions, dim=0)                     # (B, P)
        else:
            image = visual.tokens.index_select(0, image_of)
            image_real = visual.mask.index_select(0, image_of)
        x = torch.cat([text.tokens, image], dim=1)                                   # (B, L + P, D)
        mask = Mask.of(torch.cat([text.mask, image_real], dim=1)[:, None])           # (B, 1, L + P)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        x = self.norm(self.blocks[-1](x, mask, text.queries))                      # (B, queries, D)
        pooled = torch.tanh(self.pooler(x[:, 0])) if self.config.pooler else None           # (B, D)
        return Fused(pooled=pooled, reconstructed=x[:, :L],
                     image=None if text.queries else x[:, L:])

    def vocab_logits(self, x: Tensor) -> Tensor:
        """Scores every token of the vocabulary: (…, D) -> (…, V)."""
        return self.vocab_head(x)

    def align(self, visual: Visual, text: Text, fused: Fused, sep: Tensor) -> tuple[Tensor, Tensor]:
        """How far each caption's words are from its image's patches, and which word goes where.

        [CLS], [SEP] (`sep` (B, L) is True there) and the image's class token take no part.
        -> (distance (B,), plan (B, K, L))
        """
        words, patches = text.mask & ~sep, visual.mask[:, 1:].expand(len(text), -1)
        words[:, 0] = False
        device = fused.image.device.type        # "meta", where FLOPs are counted, has no autocast
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return transport_distance(fused.reconstructed.float(), fused.image[:, 1:].float(),
                                      words, patches)

    # -- training --------------------------------------------------------------------------------

    def forward(self, batch: dict, count_hits: bool = True) -> dict:
        """The losses of a batch: output -> (sum of its targets' losses, number predicted right).

        Without count_hits, the number of right words may be NaN: not counted.
        `batch` holds `image` (M, 3, H, W) normalised, `sizes`, `patches`, `ids` (B, L), where M < B
        `image_of` (B,), the image of each caption, and what `tasks.PretrainViLT` drew:
        `masked_ids`; `mlm_rows`, the masked words as indices into B L (-1: none); for itm
        `shown_image` (B,), the image that each caption is shown, and `same_image` (B,), whether it
        is its own; for mpp `mpp_rows`, the masked patches as indices into B K, and `hidden_patches`
        (M, K), where their content is hidden.
        Alignment has no right or wrong: its second value is NaN. A task's head: `layers.task_loss`.
        """
        c, ids = self.config, batch["ids"]
        if c.head in TASK_HEADS:
            return task_loss(self, batch)
        B, L = ids.shape
        visual = self.encode_image(batch["image"], batch["sizes"], batch["patches"])
        words_alone = replace(self.encode_text(batch["masked_ids"]), queries=L)
        x = self.fuse(visual, words_alone, batch.get("image_of")).reconstructed          # (B, L, D)
        rows = batch["mlm_rows"]
        x = x.reshape(B * L, c.width).index_select(0, rows.clamp(min=0))              # (targets, D)
        targets = targets_of(ids, rows)
        results = {"mlm": self._mlm(x, targets, count_hits)}
        if c.itm:
            results |= self._itm(visual, batch)
        if c.mpp:
            results["mpp"] = self._mpp(batch)
        return results

    def _mlm(self, x: Tensor, targets: Tensor, count_hits: bool) -> tuple[Tensor, Tensor]:
        """Masked words: x (targets, D), targets (targets,)"""
        if not self.vocab_head.chunked:
            return loss_and_hits(self.vocab_logits(x), targets)
        losses, hits = self.vocab_head.losses(x, targets, count_hits=count_hits)
        return losses.sum(), hits.sum()

    def _itm(self, visual: Visual, batch: dict) -> dict:
        """Image-text matching and, with the features of the same pass, word-patch alignment."""
        c, ids, same = self.config, batch["ids"], batch["same_image"]
        shown = visual[batch["shown_image"]]
        text = self.encode_text(ids, class_only=not c.wpa_weight)
        fused = self.fuse(shown, text)
        results = {"itm": loss_and_hits(self.itm_head(fused.pooled), same.long())}
        if c.wpa_weight:
            distance, _ = self.align(shown, text, fused, ids == c.sep_id)
            # matched pairs are drawn together, mismatched ones pushed apart
            loss = torch.where(same, distance, -distance).sum()
            results["wpa"] = (loss, distance.new_full((), float("nan")))
        return results

    def _mpp(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Masked patch prediction: the mean colour of each masked patch, in 256 steps a channel."""
        visual = self.encode_image(batch["image"], batch["sizes"], batch["patches"],
                                   hidden=batch["hidden_patches"])
        text, image_of = self.encode_text(batch["ids"]), batch.get("image_of")
        patches = self.fuse(visual, text, image_of).image[:, 1:]                         # (B, K, D)
        rows = batch["mpp_rows"]
        x = patches.reshape(-1, self.config.width).index_select(0, rows)              # (targets, D)
        colours = self.patch_colours(batch["image"], batch["patches"])                   # (M, K, 3)
        if image_of is not None:
            colours = colours.index_select(0, image_of)                                  # (B, K, 3)
        colours = colours.reshape(-1, 3).index_select(0, rows)                        # (targets, 3)
        return loss_and_hits(self.patch_head(x).view(-1, 256), colours.reshape(-1))

    def patch_colours(self, images: Tensor, patches: Tensor) -> Tensor:
        """Mean red, green and blue of each patch, 0..255.

        images (B, 3, H, W) normalised, patches (B, K) -> (B, K, 3) int64
        """
        pixels = images * STD[0] + MEAN[0]
        mean = F.avg_pool2d(pixels, self.config.patch_size)                  # (B, 3, rows, columns)
        colours = (mean * 255).long().clamp(0, 255)
        colours = colours.flatten(2).transpose(1, 2)                          # (B, rows columns, 3)
        return colours.gather(1, patches.clamp(min=0)[:, :, None].expand(-1, -1, 3))
