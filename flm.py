"""FLM: free language modeling for vision-language pretraining, and the objectives it is compared with.

    model = FLM(PRESETS["base-b32"])
    visual = model.encode_image(images)          # once per image
    text = model.encode_text(ids)                # once per caption
    fused = model.fuse(visual, text)             # once per pair
    logits = model.vocab_logits(fused.reconstructed)    # "which word stood here?", for every word at once

"Accelerating Vision-Language Pretraining with Free Language Modeling", Wang et al., CVPR 2023, arXiv 2303.14038. A caption
is `<s> w1 … wk </s>`, padded. The text transformer reads it twice, forwards and backwards (two *streams*, one set of
weights), and the *reconstructor* predicts word i from what the forward stream knows left of i and the reverse stream knows
right of it: all words are predicted at once though none was masked in the input.

Letters: B batch, L text length, n real tokens of a caption, S streams (2 for FLM, else 1), Q queries (L, or 1),
P image tokens (1 + patches), D width, V vocabulary.   In every mask, True = the row may look at the column.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from layers import (TASK_HEADS, Layer, TextEmbedding, ViT, VocabHead, check_head, check_pairs, resize_positions,
                    roberta_positions, sine_waves, task_head, task_loss)

OBJECTIVES = ("flm", "mlm", "ar", "prefix")


@dataclass(frozen=True)
class Config:
    """Every size and choice that a checkpoint must know to be rebuilt. The defaults are the paper's base model."""
    objective: str = "flm"              # flm | mlm | ar | prefix: which streams exist, under which masks
    # the ViT (CLIP's, without its last block)
    image_size: int = 288               # pixels; other sizes are accepted, the position grid is interpolated to them
    patch_size: int = 32
    vit_width: int = 768
    vit_layers: int = 11
    vit_heads: int = 12
    # the text transformer (RoBERTa's first layers)
    vocab_size: int = 50265
    text_width: int = 768
    text_layers: int = 6
    text_heads: int = 12
    max_positions: int = 514            # rows of the position table: captions of at most max_positions - 2 tokens
    cls_id: int = 0                     # <s>
    pad_id: int = 1                     # <pad>
    sep_id: int = 2                     # </s>
    mask_id: int = 50264                # <mask>
    # the fusion layers and the reconstructor
    image_positions: float = 0.0        # the image tokens are told their places once more where they enter the fusion
                                        # layers, by a table that starts as sine waves of this height; 0: as published, not
    width: int = 768
    heads: int = 12
    fusion_layers: int = 6
    reconstructor_text_layers: int = 6      # beside the last text layers; 0: the queries start at the fusion layers
    reconstructor_fusion_layers: int = 6    # beside the last fusion layers
    dropout: float = 0.1                # of the text transformer, fusion layers and reconstructor; the ViT has none
    init_std: float = 0.02              # of the text and fusion matrices (the ViT has CLIP's own rule)
    # the losses
    left_to_right_weight: float = 1.0         # w_f, w_r: weights of the streams' own losses, the next and the previous word
    right_to_left_weight: float = 1.0
    corruption_rate: float = 0.0        # share of a caption hidden from each query in training; 0: the word itself only
    prediction_rate: float = 1.0        # share of the words that are predicted in training
    mask_rate: float = 0.15             # objective mlm: share of masked words
    label_smoothing: float = 0.0        # of the words' targets (captioning)
    # what reads the outputs; only parameters that are trained exist
    head: str = "vocab"                 # vocab: words; vqa, nlvr2, retrieval: a task on the class vector; none
    answers: int = 0                    # vqa: how many answers there are to choose from
    pooler: bool = True                 # the class vector
    itm: bool = False                   # image-text matching beside the objective

    def __post_init__(self):
        check_head(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r}: one of {', '.join(OBJECTIVES)} is expected")
        for width, heads in (("vit_width", "vit_heads"), ("text_width", "text_heads"), ("width", "heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} does not divide by {heads} {getattr(self, heads)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} does not divide by patch_size {self.patch_size}")
        if self.image_positions and self.width % 4:
            raise ValueError(f"image_positions needs a width that divides by 4 (sine and cosine of row and column), not {self.width}")
        if self.objective == "flm" and (self.reconstructor_text_layers > self.text_layers
                                        or self.reconstructor_fusion_layers > self.fusion_layers):
            raise ValueError("the reconstructor has at most as many layers as the transformer that it stands beside")
        if self.objective == "flm" and self.reconstructor_fusion_layers == 0:
            raise ValueError("objective flm needs reconstructor_fusion_layers of at least 1: they see the image")
        for rate in ("corruption_rate", "prediction_rate", "mask_rate", "label_smoothing"):
            if not 0 <= getattr(self, rate) <= 1:
                raise ValueError(f"{rate} {getattr(self, rate)} is outside 0..1")

    @property
    def max_tokens(self):
        """The longest caption, `<s>` and `</s>` included: RoBERTa's positions start at 2."""
        return self.max_positions - 2

    @property
    def loss_weights(self):
        """Output -> its weight in the total loss: (L_rec + w_f L_fwd + w_r L_rev) / (1 + w_f + w_r), ITM beside it at 1.

        A fine-tuned head has the only loss.
        """
        if self.head in TASK_HEADS:
            return {self.head: 1.0}
        if self.objective == "flm":
            total = 1 + self.left_to_right_weight + self.right_to_left_weight
            weights = {"reconstructed": 1 / total, "left_to_right": self.left_to_right_weight / total,
                       "right_to_left": self.right_to_left_weight / total}
        else:
            weights = {"reconstructed" if self.objective == "mlm" else "left_to_right": 1.0}
        return weights | ({"itm": 1.0} if self.itm else {})


# The ViTs are OpenAI's CLIP models less their last block, the text transformers are RoBERTa's first six layers.
_BASE, _B16 = Config(), dict(patch_size=16)
_L14 = dict(patch_size=14, vit_width=1024, vit_layers=23, vit_heads=16, image_size=224)
_ROBERTA_LARGE = dict(text_width=1024, text_heads=16)
PRESETS = {
    # minutes on a laptop's CPU; the vocabulary is trained on the captions. So narrow a model starts faster from weights
    # of 128^-1/2, about 0.08, than from BERT's 0.02 (docs/LOG.md).
    "toy": Config(image_size=64, patch_size=16, vit_width=128, vit_layers=2, vit_heads=4, vocab_size=400, text_width=128,
                  text_layers=1, text_heads=4, max_positions=66, mask_id=4, width=128, heads=4, fusion_layers=3,
                  reconstructor_text_layers=1, reconstructor_fusion_layers=3, dropout=0.0, init_std=0.08,
                  image_positions=1.0),
    # an hour on a CPU, minutes on a GPU: for a few thousand real photographs
    "small": Config(image_size=128, patch_size=16, vit_width=256, vit_layers=6, vit_heads=4, vocab_size=4096,
                    text_width=256, text_layers=3, text_heads=4, max_positions=66, mask_id=4, width=256, heads=4,
                    fusion_layers=3, reconstructor_text_layers=3, reconstructor_fusion_layers=3, dropout=0.1,
                    init_std=0.06),
    "base-b32": _BASE,
    "base-b16": replace(_BASE, **_B16),
    "base-l14": replace(_BASE, **_L14),
    "base-l14-336": replace(_BASE, **_L14 | dict(image_size=336)),
    "large-b32": replace(_BASE, **_ROBERTA_LARGE),
    "large-b16": replace(_BASE, **_ROBERTA_LARGE, **_B16),
    "large-l14": replace(_BASE, **_ROBERTA_LARGE, **_L14),
    "large-l14-336": replace(_BASE, **_ROBERTA_LARGE, **_L14 | dict(image_size=336)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Masks. FLM is a paper about masks: the whole method is in these functions. `real` (B, L) is True at real tokens, which
# come first. Row 0, the class position, reads the whole caption; no other row sees column 0, so it cannot leak.

def bidirectional_mask(real):
    """mlm: every row sees every real token.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        x   x   x     x     x
        girl     x   x   x     x     x
        plays    x   x   x     x     x
        </s>     x   x   x     x     x
    """
    return real[:, None, :].expand(-1, real.shape[1], -1)


def left_to_right_mask(real):
    """ar, and FLM's forward stream: word i sees the words 1..i.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        .   x   .     .     .
        girl     .   x   x     .     .
        plays    .   x   x     x     .
        </s>     .   x   x     x     x
    """
    row, column = _rows_and_columns(real)
    return real[:, None, :] & ((row == 0) | ((column >= 1) & (column <= row)))


def right_to_left_mask(real):
    """FLM's reverse stream: word i sees the words i..n-1.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        .   x   x     x     x
        girl     .   .   x     x     x
        plays    .   .   .     x     x
        </s>     .   .   .     .     x
    """
    row, column = _rows_and_columns(real)
    return real[:, None, :] & ((row == 0) | ((column >= 1) & (column >= row)))


def prefix_mask(real, prefix):
    """PrefixLM: the first `prefix` words see each other, the rest is causal.   real (B, L), prefix (B,) -> (B, L, L)

    With prefix = 2:

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        .   x   x     .     .
        girl     .   x   x     .     .
        plays    .   x   x     x     .
        </s>     .   x   x     x     x
    """
    row, column = _rows_and_columns(real)
    inside = (column >= 1) & (column <= prefix[:, None, None]) & (row >= 1)
    return left_to_right_mask(real) | (real[:, None, :] & inside)


def reconstructor_mask(real, first=None, last=None):
    """What each query sees of [forward stream ; reverse stream]: everything but the words that know its own.

    Query i sees the forward stream left of its hidden span first[i]..last[i] and the reverse stream right of it. The
    span holds i; without `first` and `last` it is i alone (figure 3 of the paper).
    real (B, L), first and last (B, L) -> (B, L, 2L)

                forward stream              | reverse stream
                <s>  a  girl  plays </s>    | <s>  a  girl  plays </s>
        <s>      x   x   x     x     x      |  x   x   x     x     x
        a        .   .   .     .     .      |  .   .   x     x     x
        girl     .   x   .     .     .      |  .   .   .     x     x
        plays    .   x   x     .     .      |  .   .   .     .     x
        </s>     .   x   x     x     .      |  .   .   .     .     .
    """
    row, column = _rows_and_columns(real)
    first = row if first is None else first[:, :, None]
    last = row if last is None else last[:, :, None]
    left, right = (column >= 1) & (column < first), (column >= 1) & (column > last)
    return torch.cat([real[:, None, :] & ((row == 0) | side) for side in (left, right)], dim=-1)


def _rows_and_columns(real):
    position = torch.arange(real.shape[1], device=real.device)
    return position[None, :, None], position[None, None, :]     # (1, L, 1), (1, 1, L)


def draw_spans(n, length, rate, rng):
    """Draws FLM's span corruption for one caption: which words each query must do without (the paper, section 3).

    For each of the m = n - 1 predicted tokens, K ~ Binomial(m - 1, (m·rate - 1) / (m - 1)) neighbours are hidden with it,
    in one span centred on it (an odd one falls left or right at random) that is shifted, not cut, at the ends of the
    caption. So the mean share of hidden tokens is `rate` itself, wherever 1/m <= rate <= 1.
    Returns first, last: int64 arrays (length,), inclusive; rows that predict nothing hide themselves only.
    """
    first = np.arange(length)
    last = first.copy()
    m = n - 1
    if m > 1:
        extra = rng.binomial(m - 1, max(0.0, (m * rate - 1) / (m - 1)), size=m)
        left = (extra + rng.integers(0, 2, size=m)) // 2
        first[1:n] = np.clip(first[1:n] - left, 1, m - extra)
        last[1:n] = first[1:n] + extra
    return first, last


# What row i of each output predicts: token i + SHIFT.
SHIFT = {"reconstructed": 0, "left_to_right": 1, "right_to_left": -1}


def predicting_rows(objective, n, prefix=0):
    """Output -> the range of rows that predict a token, in a caption of n real tokens (`<s>` and `</s>` included).

    The first word is no target of the forward stream and the last position none of the reverse stream: row 0 reads the
    whole caption and must not predict. Padding predicts nothing. (The rows of `mlm` are those that were masked.)

    >>> predicting_rows("flm", 5)
    {'reconstructed': range(1, 5), 'left_to_right': range(1, 4), 'right_to_left': range(2, 5)}
    >>> predicting_rows("prefix", 5, prefix=2)
    {'left_to_right': range(2, 4)}
    """
    if objective == "flm":
        return {"reconstructed": range(1, n), "left_to_right": range(1, n - 1), "right_to_left": range(2, n)}
    return {"left_to_right": range(max(1, prefix), n - 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The model.

@dataclass
class Text:
    """What `fuse` needs of captions: all that does not depend on the image. `text[index]` picks some of them."""
    streams: torch.Tensor               # (B, S, L, D): forward and reverse, or the single stream of a baseline
    mask: torch.Tensor                  # (B, S, L, L)
    queries: torch.Tensor | None        # (B, Q, D): the reconstructor's; None for the baselines
    query_mask: torch.Tensor | None     # (B, Q, S L)

    def __getitem__(self, index):
        return Text(*(part if part is None else part[index] for part in
                      (self.streams, self.mask, self.queries, self.query_mask)))

    def class_only(self):
        """The same captions with the class query alone: exact, because queries never see each other."""
        if self.queries is None:
            return self
        return replace(self, queries=self.queries[:, :1], query_mask=self.query_mask[:, :1])


@dataclass
class Fused:
    """What the model knows of image-caption pairs. Row i of an output speaks of token i + SHIFT[output]."""
    pooled: torch.Tensor | None = None          # (B, D) the class vector; None without a pooler
    left_to_right: torch.Tensor | None = None         # (B, L, D) flm, ar, prefix: row i knows the image and the words up to i
    right_to_left: torch.Tensor | None = None         # (B, L, D) flm: row i knows the image and the words from i on
    reconstructed: torch.Tensor | None = None   # (B, Q, D) flm: row i knows all but word i; mlm: row i knows all


class FLM(nn.Module):
    """The ViT, the text transformer, the fusion layers and (objective flm) the reconstructor. See `Config` for sizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vit = ViT(c.image_size, c.patch_size, c.vit_width, c.vit_layers, c.vit_heads)
        self.embed = TextEmbedding(c.vocab_size, c.text_width, c.max_positions, c.dropout)
        text, fusion = (c.text_width, c.text_heads, c.dropout), (c.width, c.heads, c.dropout)
        self.text_layers = nn.ModuleList(Layer(*text, 1e-5, self_attention=True) for _ in range(c.text_layers))
        self.text_to_fusion = nn.Linear(c.text_width, c.width)
        self.image_to_fusion = nn.Linear(c.vit_width, c.width)
        if c.image_positions:
            self.image_position = nn.Parameter(torch.zeros(1 + self.vit.grid ** 2, c.width))
        # [0] text (forward stream), [1] image, [2] nlvr2's second image
        self.token_type = nn.Parameter(torch.zeros(3 if c.head == "nlvr2" else 2, c.width))
        self.fusion_layers = nn.ModuleList(
            Layer(*fusion, 1e-12, self_attention=True, cross_attention=True) for _ in range(c.fusion_layers))
        if c.objective == "flm":
            self.stream_type = nn.Parameter(torch.zeros(2, c.width))    # [0] reverse stream, [1] queries
            self.text_reconstructor = nn.ModuleList(
                Layer(*text, 1e-12, cross_attention=True) for _ in range(c.reconstructor_text_layers))
            self.fusion_reconstructor = nn.ModuleList(
                Layer(*fusion, 1e-12, cross_attention=True) for _ in range(c.reconstructor_fusion_layers))
        if c.head == "vocab":
            self.vocab_head = VocabHead(c.width, c.vocab_size)
        elif c.head != "none":
            self.head = task_head(c)
        if c.pooler:
            self.pooler = nn.Linear(c.width, c.width)
        if c.itm:
            self.itm_head = nn.Linear(c.width, 2)                       # class 1 = the image belongs to the caption
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws all weights afresh, from torch's global random state.

        ViT (CLIP's rule; W its width)   attention in: normal, std W^-½; attention and MLP out: W^-½ (2 layers)^-½;
                                         MLP in: (2W)^-½; patches: 0.02; class token and positions: W^-½
        everything else (BERT's rule)    matrices, embeddings and types: init_std; image_position: `sine_waves`
        everywhere                       LayerNorms 1 and 0, biases 0
        """
        c = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=c.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        types = [self.embed.token_type, self.token_type] + ([self.stream_type] if c.objective == "flm" else [])
        for parameter in types:
            nn.init.normal_(parameter, std=c.init_std)
        width_std, depth_std = c.vit_width ** -0.5, (2 * max(1, c.vit_layers)) ** -0.5
        nn.init.normal_(self.vit.patch.weight, std=0.02)
        nn.init.normal_(self.vit.cls, std=width_std)
        nn.init.normal_(self.vit.position, std=width_std)
        if c.image_positions:
            self.image_position[1:].copy_(c.image_positions * sine_waves(self.vit.grid, c.width))   # (also onto "meta")
        for block in self.vit.blocks:
            nn.init.normal_(block.attention.q.weight, std=width_std)
            nn.init.normal_(block.attention.kv.weight, std=width_std)
            nn.init.normal_(block.attention.out.weight, std=width_std * depth_std)
            nn.init.normal_(block.mlp[0].weight, std=(2 * c.vit_width) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=width_std * depth_std)

    # -- encode once, fuse many ---------------------------------------------------------------------------------------

    def encode_image(self, images, which=0):
        """All that does not depend on the text: images (B, 3, H, W) float, normalised -> image tokens (B, P, D).

        which: 1 for the second image of a pair (nlvr2).
        """
        visual = self.image_to_fusion(self.vit(images)) + self.token_type[1 + which]                # (B, P, D)
        if self.config.image_positions:
            visual = visual + resize_positions(self.image_position, [s // self.config.patch_size for s in images.shape[2:]])
        return visual

    def encode_text(self, ids, first=None, last=None, prefix=None, queries=None, class_only=False):
        """All that does not depend on the image: ids (B, L) int64, `<s> … </s>` and padding -> Text.

        first, last (B, L): FLM's hidden spans (default: each word alone). prefix (B,): PrefixLM's prefix lengths
        (default 0: causal). queries (B, L): the reconstructor's input ids, in place of `<s> <mask> <mask> …`.
        class_only: query 0 alone is asked, which is all that the class vector needs.
        """
        c = self.config
        if ids.shape[1] > c.max_tokens:
            raise ValueError(f"captions of {ids.shape[1]} tokens: this model has positions for {c.max_tokens}")
        real = ids != c.pad_id                                                                      # (B, L)
        position = roberta_positions(real)
        x = self.embed(ids, position)                                                               # (B, L, D)
        if c.objective != "flm":
            mask = (bidirectional_mask(real) if c.objective == "mlm" else
                    left_to_right_mask(real) if prefix is None else prefix_mask(real, prefix))[:, None]   # (B, 1, L, L)
            streams, _ = self._run(self.text_layers, (), x[:, None], mask)                          # (B, 1, L, D)
            return Text(streams, mask, None, None)
        if queries is None:
            queries = torch.where(real, c.mask_id, c.pad_id)
            queries[:, 0] = c.cls_id
        q = self.embed(queries, position)                                                             # (B, Q, D)
        streams = torch.stack([x, x], dim=1)                                                        # (B, 2, L, D)
        mask = torch.stack([left_to_right_mask(real), right_to_left_mask(real)], dim=1)                         # (B, 2, L, L)
        query_mask = reconstructor_mask(real, first, last)                                          # (B, Q, 2L)
        if class_only:
            q, query_mask = q[:, :1], query_mask[:, :1]
        streams, q = self._run(self.text_layers, self.text_reconstructor, streams, mask, q, query_mask)
        return Text(streams, mask, q, query_mask)

    def fuse(self, visual, text):
        """Reads captions with their images: visual (M, P, D), text of B captions, B / M neighbours to an image -> Fused."""
        c = self.config
        check_pairs(visual, text.mask)
        streams, q = self.text_to_fusion(text.streams), text.queries
        if c.objective != "flm":
            streams, _ = self._run(self.fusion_layers, (), streams + self.token_type[0], text.mask, visual=visual)
            x = streams[:, 0]                                                                       # (B, L, D)
            name = "reconstructed" if c.objective == "mlm" else "left_to_right"
            return Fused(pooled=self._pool(x), **{name: x})
        streams = streams + torch.stack([self.token_type[0], self.stream_type[0]])[:, None]         # (B, 2, L, D)
        q = self.text_to_fusion(q) + self.stream_type[1]                                            # (B, Q, D)
        streams, q = self._run(self.fusion_layers, self.fusion_reconstructor, streams, text.mask, q, text.query_mask, visual)
        return Fused(self._pool(q), streams[:, 0], streams[:, 1], q)

    def vocab_logits(self, x):
        """Scores every token of the vocabulary: (…, D) -> (…, V)."""
        return self.vocab_head(x)

    def _run(self, layers, reconstructors, streams, mask, q=None, query_mask=None, visual=None):
        """The streams through `layers`; after each of the last ones, the queries through the reconstructor beside it."""
        mask = mask.flatten(0, 1)                                                                   # (B S, L, L)
        without = len(layers) - len(reconstructors)
        for i, layer in enumerate(layers):
            streams = layer(streams, mask, visual)
            if i >= without:
                q = reconstructors[i - without](q, memory=streams.flatten(1, 2), memory_mask=query_mask)
        return streams, q

    def _pool(self, x):
        return torch.tanh(self.pooler(x[:, 0])) if self.config.pooler else None                     # (B, D)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(self, batch):
        """The losses of a batch: output -> (sum of the losses of its targets, number predicted right), both scalars.

        Of a fine-tuned head: see `task_loss`. Of pretraining and captioning:

        `batch` holds `image` (B, 3, H, W) normalised, `ids` (B, L), and what `tasks.PretrainFLM` drew: for every output
        `<output>_rows`, the predicting rows as indices into (B L); `masked_ids` (mlm), `prefix` (prefix), `first` and
        `last` (flm with spans); for itm `other_image` (B,), the batch index of another caption's image, and
        `same_image` (B,), where that image happens to be the right one all the same.
        Sums, not means: the mean is over the targets of the *global* batch, which only the training loop knows.
        """
        c, ids = self.config, batch["ids"]
        if c.head in TASK_HEADS:
            return task_loss(self, batch)
        visual = self.encode_image(batch["image"])
        text = self.encode_text(batch.get("masked_ids", ids), batch.get("first"), batch.get("last"), batch.get("prefix"))
        fused = self.fuse(visual, text)
        outputs = [name for name in c.loss_weights if name != "itm"]
        rows = [batch[f"{name}_rows"] for name in outputs]
        # The head sees only rows that have something to predict, all outputs in one matrix product.
        x = torch.cat([getattr(fused, name).flatten(0, 1).index_select(0, r) for name, r in zip(outputs, rows)])
        targets = torch.cat([ids.flatten().index_select(0, r + SHIFT[name]) for name, r in zip(outputs, rows)])
        logits = self.vocab_logits(x)                                                               # (targets, V)
        losses = F.cross_entropy(logits.float(), targets, reduction="none",
                                 label_smoothing=c.label_smoothing if self.training else 0.0)
        right = (logits.argmax(-1) == targets).float()
        sizes = [len(r) for r in rows]
        result = {name: (loss.sum(), hits.sum())
                  for name, loss, hits in zip(outputs, losses.split(sizes), right.split(sizes))}
        if c.itm:
            result["itm"] = self._itm(visual, text, fused, batch)
        return result

    def _itm(self, visual, text, fused, batch):
        """Image-text matching: does the image belong to the caption? Each caption once with its image, once with another.

        The other image is one of the batch, already encoded; only the fusion layers run again, and of the reconstructor
        the class query alone. (Objective mlm masked its input: it reads the caption again as it stands.)
        """
        text = self.encode_text(batch["ids"]) if self.config.objective == "mlm" else text.class_only()
        pooled = [self.fuse(visual, text).pooled if self.config.objective == "mlm" else fused.pooled,
                  self.fuse(visual.index_select(0, batch["other_image"]), text).pooled]
        logits = self.itm_head(torch.cat(pooled))                                                   # (2B, 2)
        target = torch.cat([torch.ones_like(batch["same_image"]), batch["same_image"]]).long()
        return F.cross_entropy(logits.float(), target, reduction="sum"), (logits.argmax(-1) == target).float().sum()
