"""What each row of FLM may look at, what is hidden from it, and which word it predicts.

    mask = left_to_right_mask(real)                     # (B, L, L): True = the row may look there
    first, last = draw_spans(n, L, rate=0.3, rng=rng)   # the words that each query does without
    rows = predicting_rows("flm", n)                    # output -> the rows that predict a word

FLM is a paper about masks: the whole method is in these functions. Figures 1 to 3 and section 3 of
"Accelerating Vision-Language Pretraining with Free Language Modeling", arXiv 2303.14038.

Letters: B batch, L text length, n real tokens of a caption: w_0 = `<s>`, w_1, …, w_n-1 = `</s>`.
"""

import numpy as np
import torch
from torch import Tensor

# -------------------------------------------------------------------------------------------------
# Masks. `real` (B, L) is True at real tokens, which come first. Row 0, the class position, reads
# the whole caption. In all masks but mlm's no other row sees column 0, so it cannot leak.

def bidirectional_mask(real: Tensor) -> Tensor:
    """mlm: every row sees every real token.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        x   x   x     x     x
        girl     x   x   x     x     x
        plays    x   x   x     x     x
        </s>     x   x   x     x     x
    """
    return real[:, None, :].expand(-1, real.shape[1], -1)


def left_to_right_mask(real: Tensor) -> Tensor:
    """ar, and FLM's left-to-right stream: word i sees the words 1..i.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        .   x   .     .     .
        girl     .   x   x     .     .
        plays    .   x   x     x     .
        </s>     .   x   x     x     x
    """
    row, column = _rows_and_columns(real)
    return real[:, None, :] & ((row == 0) | ((column >= 1) & (column <= row)))


def right_to_left_mask(real: Tensor) -> Tensor:
    """FLM's right-to-left stream: word i sees the words i..n-1.   real (B, L) -> (B, L, L)

                <s>  a  girl  plays </s>
        <s>      x   x   x     x     x
        a        .   x   x     x     x
        girl     .   .   x     x     x
        plays    .   .   .     x     x
        </s>     .   .   .     .     x
    """
    row, column = _rows_and_columns(real)
    return real[:, None, :] & ((row == 0) | ((column >= 1) & (column >= row)))


def prefix_mask(real: Tensor, prefix: Tensor) -> Tensor:
    """PrefixLM: the first `prefix` words see each other, the rest is causal.

    real (B, L), prefix (B,) -> (B, L, L). With prefix = 2:

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


def reconstructor_mask(real: Tensor, first: Tensor | None = None,
                       last: Tensor | None = None) -> Tensor:
    """What each query sees of [left-to-right stream ; right-to-left stream]: figure 3 of the paper.

    Query i sees the left-to-right stream left of its hidden span first[i]..last[i], and the
    right-to-left stream right of it: everything but the rows that know its word. The span holds i;
    without `first` and `last` it is i alone.
    real (B, L), first and last (B, L), inclusive -> (B, L, 2L)

                left-to-right stream        | right-to-left stream
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
    left = (column >= 1) & (column < first)
    right = (column >= 1) & (column > last)
    sides = [real[:, None, :] & ((row == 0) | side) for side in (left, right)]
    return torch.cat(sides, dim=-1)


def _rows_and_columns(real: Tensor) -> tuple[Tensor, Tensor]:
    position = torch.arange(real.shape[1], device=real.device)
    return position[None, :, None], position[None, None, :]     # (1, L, 1), (1, 1, L)


def draw_spans(n: int, length: int, rate: float,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a caption's span corruption (section 3): the words that each query must do without.

    With each of the m = n - 1 predicted tokens, K ~ Binomial(m - 1, (m·rate - 1) / (m - 1))
    neighbours are hidden, in one span. The token is in its middle (with an odd K, left or right of
    it at random), but a span that would leave the caption is shifted back into it, not cut. So the
    mean share of hidden tokens is `rate`, for any 1/m <= rate <= 1.
    Returns first, last: int64 (length,), inclusive. Other rows hide themselves alone.
    """
    first = np.arange(length)
    last = first.copy()
    m = n - 1
    if m > 1:
        share = max(0.0, (m * rate - 1) / (m - 1))
        extra = rng.binomial(m - 1, share, size=m)
        left = (extra + rng.integers(0, 2, size=m)) // 2
        first[1:n] = np.clip(first[1:n] - left, 1, m - extra)
        last[1:n] = first[1:n] + extra
    return first, last


# Objective -> (its output, the mask of its text). flm also has two streams, and their outputs;
# prefix has prefix_mask where a prefix was drawn. CONTRIBUTING.md adds a row.
OBJECTIVES = {
    "flm": ("reconstructed", reconstructor_mask),
    "mlm": ("reconstructed", bidirectional_mask),
    "ar": ("left_to_right", left_to_right_mask),
    "prefix": ("left_to_right", left_to_right_mask),
}

# Row i of an output predicts token i + SHIFT[output]. All outputs also know the image.
#
# output         row i has read             predicts  rows    never a target besides <s>      weight
# reconstructed  all but its hidden span    w_i       1..n-1  none                            1
# left_to_right  w_1 .. w_i                 w_i+1     1..n-2  w_1: row 0 has read it          w_f
# right_to_left  w_i .. w_n-1               w_i-1     2..n-1  </s>: no real row follows it    w_r
#
# The weights are divided by 1 + w_f + w_r. `<s>` is always the same, so it is never predicted.
# Objective mlm has `reconstructed` alone, and its rows are the masked words. ar and prefix have
# `left_to_right` alone; prefix predicts no word of the prefix.
SHIFT = {"reconstructed": 0, "left_to_right": 1, "right_to_left": -1}


def predicting_rows(objective: str, n: int, prefix: int = 0) -> dict[str, range]:
    """Output -> the rows that predict a token, in a caption of n real tokens: the table above.

    n counts `<s>` and `</s>`. Padding predicts nothing. Objective mlm draws its rows at random.

    >>> predicting_rows("flm", 5)
    {'reconstructed': range(1, 5), 'left_to_right': range(1, 4), 'right_to_left': range(2, 5)}
    >>> predicting_rows("prefix", 5, prefix=2)
    {'left_to_right': range(2, 4)}
    """
    rows = {"reconstructed": range(1, n), "left_to_right": range(max(1, prefix), n - 1),
            "right_to_left": range(2, n)}
    if objective == "flm":
        return rows
    output, _ = OBJECTIVES[objective]
    return {output: rows[output]}
