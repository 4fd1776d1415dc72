"""The loss of every word's row, with the logits of all rows in memory, or of a few at a time.

    losses, hits = row_losses(logits, targets)                      # (N,), (N,)
    losses, hits = losses_in_chunks(x, weight, bias, targets)       # of logits x weight^T + bias

17,000 rows and 50,265 words (512 captions of 13 tokens) are 1.7 GB of logits in bfloat16, as much
for their gradient, and twice as much for the float32 copy that the softmax needs. Nobody needs them
after the loss. In chunks, the rows' logits are computed, reduced to their losses and forgotten, and
computed again when the gradient is asked for: a third more work in the head.

Letters: N rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Rows whose logits are in memory at a time: 0.2 GB in float32, with RoBERTa's vocabulary.
ROWS = 1024

# Newer versions than torch 2.11 have this loss. On a CPU it takes 20 % less time than the loop
# below, and a third of its memory. It knows no smoothing, and nobody sees its logits.
LinearCrossEntropyOptions = getattr(torch.nn, "LinearCrossEntropyOptions", None)


# The target of a row that only fills up a shape: no loss, and no hit. It is F.cross_entropy's own.
IGNORED = -100


def targets_of(ids: Tensor, rows: Tensor, shift: int = 0) -> Tensor:
    """The words that rows predict: ids (B, L), rows (N,), indices into B L -> (N,)

    Row i predicts token i + shift; rows of -1 have the target IGNORED.
    """
    words = ids.reshape(-1).index_select(0, (rows + shift).clamp(min=0))
    return words.masked_fill(rows < 0, IGNORED)


def row_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0,
               count_hits: bool = True) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and whether its largest logit is the target's (1 or 0).

    Without count_hits the second is NaN. logits (N, V), targets (N,) -> two of (N,), float32
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
    losses = whole(losses)
    if not count_hits:
        return losses, torch.full_like(losses, torch.nan)
    return losses, (whole(logits.argmax(-1)) == targets).float()


def whole(tensor: Tensor) -> Tensor:
    """The whole of what a divided vocabulary head computed (a DTensor: training/parallel.py)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def losses_in_chunks(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor,
                     smoothing: float = 0.0, count_hits: bool = True) -> tuple[Tensor, Tensor]:
    """row_losses of the logits x weight^T + bias, without the memory of all of them.

    x (N, D), weight (V, D), bias (V,), targets (N,) -> two of (N,), float32
    """
    if torch.is_autocast_enabled(x.device.type):        # once, not for each chunk
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if LinearCrossEntropyOptions and not smoothing and not count_hits:
        in_rows = LinearCrossEntropyOptions(batch_chunk_size=ROWS, chunking_method=None)
        losses = F.linear_cross_entropy(x, weight, targets, linear_bias=bias, reduction="none",
                                        options=in_rows)
        losses = losses.float()
        return losses, torch.full_like(losses, torch.nan)

    def losses_of(x, targets):
        return row_losses(F.linear(x, weight, bias), targets, smoothing, count_hits)

    parts = []
    for some, theirs in zip(x.split(ROWS), targets.split(ROWS), strict=True):
        parts.append(checkpoint(losses_of, some, theirs, use_reentrant=False))
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)
