"""FLM: free language modeling, and the objectives that it is compared with.

    model = FLM(PRESETS["base-b32"])
    visual = model.encode_image(images)                 # once per image
    text = model.encode_text(ids)                       # once per caption
    fused = model.fuse(visual, text)                    # once per pair
    logits = model.vocab_logits(fused.reconstructed)    # "which word stood here?", for every word

"Accelerating Vision-Language Pretraining with Free Language Modeling", Wang et al., CVPR 2023,
arXiv 2303.14038. A caption is `<s> w1 … wk </s>`, n tokens, padded. The text transformer reads it
twice, from left to right and from right to left: two *streams*, one set of weights. The
*reconstructor* predicts word i from what the first stream knows left of i and the second knows
right of it. So all words are predicted at once, though none was masked in the input. In one line,
for the tokens i = 1 .. n-1:

    L_rec = -sum_i log p(w_i | left_to_right(1..first_i - 1), right_to_left(last_i + 1..n-1), image)

where first_i .. last_i is the span hidden from query i: the word itself, or more (`draw_spans`).

Where to find what
    which rows may look at which columns    masks.left_to_right_mask … masks.reconstructor_mask
    which output predicts which token       masks.SHIFT, masks.predicting_rows
    what is hidden and asked in training    tasks.PretrainFLM.draw, masks.draw_spans
    the wrong pairs of matching             tasks.Pretrain.other_pictures, exchange.Exchange
    the total loss over a global batch      flm.Config.loss_weights, train.backward
    the ViT, attention, the layers          layers.ViT, layers.Attention, layers.StreamLayer
    captions; scoring N images x M texts    generate.generate, retrieval.fill_scores

Letters: B batch, L text length, n real tokens of a caption, S streams (2 for FLM, else 1),
Q queries (L, or 1), P image tokens (1 + patches), D width, V vocabulary, M images.
In every mask, True = the row may look at the column.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from layers import (TASK_HEADS, Mask, ReconstructorLayer, StreamLayer, TextEmbedding, ViT,
                    VocabHead, check_config, check_divides, check_pairs, check_rates, loss_and_hits,
                    resize_positions, roberta_positions, silence_attention, sine_waves, task_head,
                    task_loss)
from losses import targets_of
from masks import (OBJECTIVES, SHIFT, left_to_right_mask, prefix_mask, reconstructor_mask,
                   right_to_left_mask)


@dataclass(frozen=True)
class Config:
    """Every size and choice that a checkpoint must know to be rebuilt.

    The defaults are the paper's base model. The comments are the help texts of train.py's flags.
    """
    objective: str = "flm"              # flm, mlm, ar or prefix: which streams, which masks
    # the ViT (CLIP's, without its last block)
    image_size: int = 288               # pixels; for other sizes the position grid is interpolated
    patch_size: int = 32                # pixels
    vit_width: int = 768                # width of the ViT
    vit_layers: int = 11                # blocks of the ViT
    vit_heads: int = 12                 # attention heads of the ViT
    # the text transformer (RoBERTa's first layers)
    vocab_size: int = 50265             # tokens; in training, as many as the tokenizer has
    text_width: int = 768               # width of the text layers
    text_layers: int = 6                # text layers, which do not see the image
    text_heads: int = 12                # attention heads of the text layers
    max_positions: int = 514            # rows of the position table: the longest caption + 2
    cls_id: int = 0                     # id of <s>
    pad_id: int = 1                     # id of <pad>
    sep_id: int = 2                     # id of </s>
    mask_id: int = 50264                # id of <mask>
    # the fusion layers and the reconstructor
    width: int = 768                    # width of the fusion layers
    heads: int = 12                     # attention heads of the fusion layers
    fusion_layers: int = 6              # fusion layers, which see the image
    reconstructor_text_layers: int = 6      # reconstructor layers, one per last text layer
    reconstructor_fusion_layers: int = 6    # reconstructor layers, one per last fusion layer
    image_positions: float = 0.0        # amplitude of the sine waves that a second position
                                        # embedding of the image tokens starts as; 0: no such one
    dropout: float = 0.1                # probability, in all layers but the ViT's
    init_std: float = 0.02              # standard deviation of new weights outside the ViT
    silent_attention: bool = False      # attention's output matrices start at 0
    # the losses
    left_to_right_weight: float = 1.0   # w_f, weight of the left-to-right loss: the next word
    right_to_left_weight: float = 1.0   # w_r, weight of the right-to-left loss: the previous word
    corruption_rate: float = 0.0        # share of a caption hidden from each query; 0: one word
    prediction_rate: float = 1.0        # share of the words that are predicted in training
    mask_rate: float = 0.15             # objective mlm: share of masked words
    label_smoothing: float = 0.0        # share of the target spread over all words, in training
    # what reads the outputs; only parameters that are trained exist
    head: str = "vocab"                 # vocab: words; vqa, nlvr2, retrieval: a task's head; none
    answers: int = 0                    # vqa: number of answers to choose from
    pooler: bool = True                 # the class vector
    itm: bool = False                   # pretraining: image-text matching too

    def __post_init__(self):
        check_config(self)
        check_divides(self, vit_width="vit_heads", text_width="text_heads", width="heads")
        check_rates(self, "corruption_rate", "prediction_rate", "mask_rate", "label_smoothing")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r}: one of {', '.join(OBJECTIVES)} "
                             "is expected")
        if self.image_positions and self.width % 4:     # sine and cosine of row and column
            raise ValueError(f"image_positions needs a width that divides by 4, not {self.width}")
        if self.objective != "flm":
            return
        if (self.reconstructor_text_layers > self.text_layers
                or self.reconstructor_fusion_layers > self.fusion_layers):
            raise ValueError("the reconstructor has at most as many layers as the transformer "
                             "that it stands beside")
        if self.reconstructor_fusion_layers == 0:
            raise ValueError("objective flm needs at least 1 of reconstructor_fusion_layers")

    @property
    def max_tokens(self) -> int:
        """The longest caption, `<s>` and `</s>` included: RoBERTa's positions start at 2."""
        return self.max_positions - 2

    @property
    def loss_weights(self) -> dict[str, float]:
        """Output -> its weight in the total loss.

        FLM: (L_rec + w_f L_left_to_right + w_r L_right_to_left) / (1 + w_f + w_r); ITM is added to
        it with weight 1. A fine-tuned head has the only loss. A loss of weight 0 is not computed.
        """
        if self.head in TASK_HEADS:
            return {self.head: 1.0}
        if self.objective == "flm":
            total = 1 + self.left_to_right_weight + self.right_to_left_weight
            weights = {"reconstructed": 1 / total,
                       "left_to_right": self.left_to_right_weight / total,
                       "right_to_left": self.right_to_left_weight / total}
        else:
            output, _ = OBJECTIVES[self.objective]
            weights = {output: 1.0}
        if self.itm:
            weights["itm"] = 1.0
        return {name: weight for name, weight in weights.items() if weight}


# The ViTs of base-* and large-* are OpenAI's CLIP models without their last block. Their text
# transformers are RoBERTa's first six layers.
L14 = dict(patch_size=14, vit_width=1024, vit_layers=23, vit_heads=16)
ROBERTA_LARGE = dict(text_width=1024, text_heads=16)
# For minutes on a laptop's CPU; the vocabulary is trained on the captions. So narrow a model learns
# faster from weights of std 0.08, near 128^-1/2, than from BERT's 0.02 (docs/LOG.md).
NARROW = dict(patch_size=16, vit_width=128, vit_heads=4, text_width=128, text_layers=1,
              text_heads=4, max_positions=66, mask_id=4, width=128, heads=4,
              reconstructor_text_layers=1, init_std=0.08)
PRESETS = {
    "toy": Config(image_size=64, vit_layers=2, vocab_size=400, fusion_layers=2,
                  reconstructor_fusion_layers=2, image_positions=1.0, dropout=0.0,
                  silent_attention=True, **NARROW),
    "small": Config(image_size=112, vit_layers=4, vocab_size=4096, fusion_layers=3,  # photographs
                    reconstructor_fusion_layers=3, **NARROW),
    # For a GPU of 8 GB: CLIP's ViT-B/32 and RoBERTa's first layers fit in, few layers are new.
    "medium": Config(image_size=224, vocab_size=16384, mask_id=4, text_layers=4, width=512, heads=8,
                     fusion_layers=3, reconstructor_text_layers=3, reconstructor_fusion_layers=3),
    "base-b32": Config(),
    "base-b16": Config(patch_size=16),
    "base-l14": Config(image_size=224, **L14),
    "base-l14-336": Config(image_size=336, **L14),
    "large-b32": Config(**ROBERTA_LARGE),
    "large-b16": Config(patch_size=16, **ROBERTA_LARGE),
    "large-l14": Config(image_size=224, **L14, **ROBERTA_LARGE),
    "large-l14-336": Config(image_size=336, **L14, **ROBERTA_LARGE),
}


# -------------------------------------------------------------------------------------------------
# The model.

@dataclass
class Text:
    """What `fuse` needs of captions. `text[index]` picks some of them."""
    streams: Tensor                     # (B, S, L, D): both streams, or a baseline's single one
    mask: Mask                          # (B, S, L, L)
    queries: Tensor | None = None       # (B, Q, D): the reconstructor's; None for the baselines
    query_mask: Mask | None = None      # (B, Q, S L)

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index) -> "Text":
        picked = Text(self.streams[index], self.mask.pick(index))
        if self.queries is not None:
            picked.queries = self.queries[index]
            picked.query_mask = self.query_mask.pick(index)
        return picked

    def to(self, dtype: torch.dtype) -> "Text":
        """The same captions in halves. Under autocast of this type `fuse` casts them anyway."""
        queries = None if self.queries is None else self.queries.to(dtype)
        return replace(self, streams=self.streams.to(dtype), queries=queries)

    def class_query(self) -> "Text":
        """The same captions with the class query alone. Exact: queries never see each other."""
        if self.queries is None:
            return self
        class_row = (slice(None), slice(0, 1))
        return replace(self, queries=self.queries[class_row],
                       query_mask=self.query_mask.pick(class_row))


@dataclass
class Fused:
    """What the model knows of image-caption pairs. The table at SHIFT says what row i predicts."""
    pooled: Tensor | None = None            # (B, D) the class vector; None without a pooler
    left_to_right: Tensor | None = None     # (B, L, D) flm, ar, prefix: row i has read words 1..i
    right_to_left: Tensor | None = None     # (B, L, D) flm: row i has read words i..n-1
    reconstructed: Tensor | None = None     # (B, Q, D) flm: row i has read all but its hidden span;
                                            # (B, L, D) mlm: row i has read the masked caption


class FLM(nn.Module):
    """The ViT, the text layers, the fusion layers and, for objective flm, the reconstructor."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.vit = ViT(c.image_size, c.patch_size, c.vit_width, c.vit_layers, c.vit_heads)
        self.embed = TextEmbedding(c.vocab_size, c.text_width, c.max_positions, c.dropout)
        text, fusion = (c.text_width, c.text_heads, c.dropout), (c.width, c.heads, c.dropout)
        self.text_layers = nn.ModuleList(StreamLayer(*text, eps=1e-5) for _ in range(c.text_layers))
        self.text_to_fusion = nn.Linear(c.text_width, c.width)
        self.image_to_fusion = nn.Linear(c.vit_width, c.width)
        if c.image_positions:
            self.image_position = nn.Parameter(torch.zeros(1 + self.vit.grid ** 2, c.width))
        # [0] text (left-to-right stream), [1] image, [2] nlvr2's second image (when a pretrained
        # model is loaded, released/begin.py starts it as a copy of [1])
        self.token_type = nn.Parameter(torch.zeros(3 if c.head == "nlvr2" else 2, c.width))
        self.fusion_layers = nn.ModuleList(
            StreamLayer(*fusion, eps=1e-12, cross_attention=True) for _ in range(c.fusion_layers))
        if c.objective == "flm":
            # [0] right-to-left stream, [1] queries
            self.stream_type = nn.Parameter(torch.zeros(2, c.width))
            self.text_reconstructor = nn.ModuleList(
                ReconstructorLayer(*text, eps=1e-12) for _ in range(c.reconstructor_text_layers))
            self.fusion_reconstructor = nn.ModuleList(
                ReconstructorLayer(*fusion, eps=1e-12)
                for _ in range(c.reconstructor_fusion_layers))
        if c.head == "vocab":
            self.vocab_head = VocabHead(c.width, c.vocab_size)
        elif c.head != "none":
            self.head = task_head(c)
        if c.pooler:
            self.pooler = nn.Linear(c.width, c.width)
        if c.itm:
            self.itm_head = nn.Linear(c.width, 2)       # class 1 = the image belongs to the caption
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all weights, from torch's global random state.

        The ViT by CLIP's rule (`ViT.init_weights`), image_position as `sine_waves`. The rest by
        BERT's: matrices, embeddings and types of std init_std; LayerNorms 1 and 0, biases 0.
        With silent_attention, see `silence_attention`.
        """
        c = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                nn.init.normal_(module.weight, std=c.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.token_type, std=c.init_std)
        nn.init.normal_(self.token_type, std=c.init_std)
        if c.objective == "flm":
            nn.init.normal_(self.stream_type, std=c.init_std)
        if c.image_positions:
            self.image_position[1:].copy_(c.image_positions * sine_waves(self.vit.grid, c.width))
        self.vit.init_weights()
        if c.silent_attention:
            silence_attention(self)

    # -- encode once, fuse many ------------------------------------------------------------------

    def encode_image(self, images: Tensor, which: int = 0) -> Tensor:
        """All that does not depend on the text: images (B, 3, H, W), normalised -> (B, P, D).

        which: 1 for the second image of a pair (nlvr2).
        """
        visual = self.image_to_fusion(self.vit(images)) + self.token_type[1 + which]     # (B, P, D)
        if self.config.image_positions:
            size = tuple(side // self.config.patch_size for side in images.shape[2:])
            visual = visual + resize_positions(self.image_position, size)
        return visual

    def encode_text(self, ids: Tensor, first: Tensor | None = None, last: Tensor | None = None,
                    prefix: Tensor | None = None, queries: Tensor | None = None,
                    class_only: bool = False) -> Text:
        """All that does not depend on the image: ids (B, L) int64, `<s> … </s>`, padded -> Text.

        first, last (B, L): FLM's hidden spans (default: each word alone). prefix (B,): PrefixLM's
        prefix lengths (default 0: causal). queries (B, L): the reconstructor's input ids, in place
        of `<s> <mask> <mask> …`. class_only: query 0 alone, all that the class vector needs.
        """
        c = self.config
        if ids.shape[1] > c.max_tokens:
            raise ValueError(f"captions of {ids.shape[1]} tokens: this model has positions "
                             f"for {c.max_tokens}")
        real = ids != c.pad_id                                                              # (B, L)
        position = roberta_positions(real)
        x = self.embed(ids, position)                                                    # (B, L, D)
        if c.objective != "flm":
            _, mask_of = OBJECTIVES[c.objective]
            mask = mask_of(real) if prefix is None else prefix_mask(real, prefix)
            text = Text(x[:, None], Mask.of(mask[:, None]))                                 # S = 1
            return self._run(self.text_layers, [], text)
        if queries is None:
            queries = torch.where(real, c.mask_id, c.pad_id)
            queries[:, 0] = c.cls_id
        q = self.embed(queries, position)                                                # (B, Q, D)
        streams = torch.stack([x, x], dim=1)                                          # (B, 2, L, D)
        sides = [left_to_right_mask(real), right_to_left_mask(real)]
        mask = torch.stack(sides, dim=1)                                              # (B, 2, L, L)
        query_mask = reconstructor_mask(real, first, last)                              # (B, Q, 2L)
        text = Text(streams, Mask.of(mask), q, Mask.of(query_mask))
        if class_only:
            text = text.class_query()
        return self._run(self.text_layers, self.text_reconstructor, text)

    def fuse(self, visual: Tensor, text: Text, image_of: Tensor | None = None) -> Fused:
        """Reads captions with their images: visual (M, P, D), text of B captions -> Fused.

        image_of (B,): the image of each caption, 0..M-1; without it, B / M neighbours to an image.
        """
        c = self.config
        check_pairs(len(visual), len(text), image_of)
        streams = self.text_to_fusion(text.streams)                                   # (B, S, L, D)
        if c.objective != "flm":
            text = replace(text, streams=streams + self.token_type[0])
            x = self._run(self.fusion_layers, [], text, visual, image_of).streams[:, 0]  # (B, L, D)
            name, _ = OBJECTIVES[c.objective]
            return Fused(pooled=self._pool(x), **{name: x})
        types = torch.stack([self.token_type[0], self.stream_type[0]])                      # (2, D)
        q = self.text_to_fusion(text.queries) + self.stream_type[1]                      # (B, Q, D)
        text = replace(text, streams=streams + types[:, None], queries=q)
        text = self._run(self.fusion_layers, self.fusion_reconstructor, text, visual, image_of)
        return Fused(self._pool(text.queries), text.streams[:, 0], text.streams[:, 1], text.queries)

    def vocab_logits(self, x: Tensor) -> Tensor:
        """Scores every token of the vocabulary: (…, D) -> (…, V)."""
        return self.vocab_head(x)

    def _run(self, layers, reconstructors, text: Text, visual=None, image_of=None) -> Text:
        """Runs the streams through `layers` and the queries through `reconstructors`.

        The reconstructors stand beside the last layers. Each reads the streams after its layer.
        """
        B, S, L, _ = text.streams.shape
        streams, q = text.streams, text.queries
        mask = text.mask.reshape(B * S)
        without = len(layers) - len(reconstructors)
        for i, layer in enumerate(layers):
            streams = layer(streams, mask, visual, image_of=image_of)
            if i >= without:
                q = reconstructors[i - without](q, streams, text.query_mask)
        return replace(text, streams=streams, queries=q)

    def _pool(self, x: Tensor) -> Tensor | None:
        """The class vector: row 0.   (B, L or Q, D) -> (B, D)"""
        return torch.tanh(self.pooler(x[:, 0])) if self.config.pooler else None

    # -- training --------------------------------------------------------------------------------

    def forward(self, batch: dict, count_hits: bool = True) -> dict:
        """The losses of a batch: output -> (sum of its targets' losses, number predicted right).

        Without count_hits, the number of right words is NaN: not counted.
        `batch` holds `image` (M, 3, H, W) normalised, `ids` (B, L), where M < B `image_of` (B,),
        and what `tasks.PretrainFLM` drew: for every output `<output>_rows`, the rows that predict,
        as indices into B L (-1: none); `masked_ids` (mlm); `prefix` (prefix); `first`, `last` (flm
        with spans); for itm `other_image`, `same_image`. The losses are sums: the mean is over the
        targets of the *global* batch, which only the loop knows (train.backward). A task's head:
        see `layers.task_loss`.
        """
        c, ids = self.config, batch["ids"]
        if c.head in TASK_HEADS:
            return task_loss(self, batch)
        visual = self.encode_image(batch["image"])
        text = self.encode_text(batch.get("masked_ids", ids), batch.get("first"), batch.get("last"),
                                batch.get("prefix"))
        fused = self.fuse(visual, text, batch.get("image_of"))

        # Only rows that predict go through the head, those of all outputs in one matrix product.
        outputs = [name for name in c.loss_weights if name != "itm"]
        rows = [batch[f"{name}_rows"] for name in outputs]
        predicting, targets = [], []
        for name, row in zip(outputs, rows, strict=True):
            output = getattr(fused, name)                                                # (B, L, D)
            predicting.append(output.reshape(-1, c.width).index_select(0, row.clamp(min=0)))
            targets.append(targets_of(ids, row, SHIFT[name]))
        targets = torch.cat(targets)                                                    # (targets,)
        smoothing = c.label_smoothing if self.training else 0.0
        losses, hits = self.vocab_head.losses(torch.cat(predicting), targets, smoothing, count_hits)
        counts = [len(row) for row in rows]
        results = {}
        for name, loss, hit in zip(outputs, losses.split(counts), hits.split(counts), strict=True):
            results[name] = (loss.sum(), hit.sum())
        if c.itm:
            results["itm"] = self._itm(visual, text, fused, batch)
        return results

    def _itm(self, visual: Tensor, text: Text, fused: Fused, batch: dict) -> tuple[Tensor, Tensor]:
        """Image-text matching: each caption once with its own image, once with a wrong one.

        The wrong image, batch["other_image"] (B,), is another one of the micro-batch, so only the
        fusion layers run again, and of the reconstructor the class query. batch["same_image"] (B,):
        whether it is right after all. With batch["wrong_ids"] (B, L), some captions are wrong.
        """
        if self.config.objective == "mlm":          # it read masked words: now it reads the caption
            text = self.encode_text(batch["ids"])
            own = self.fuse(visual, text, batch.get("image_of")).pooled                     # (B, D)
        else:
            text = text.class_query()
            own = fused.pooled
        if "wrong_ids" in batch:                    # half of the captions have a word exchanged
            text = self.encode_text(batch["wrong_ids"], class_only=True)
        other = self.fuse(visual.index_select(0, batch["other_image"]), text).pooled        # (B, D)
        logits = self.itm_head(torch.cat([own, other]))                                    # (2B, 2)
        same = batch["same_image"]
        return loss_and_hits(logits, torch.cat([torch.ones_like(same), same]).long())
