"""Pictures of the demo page that are drawn for it: one objective's masks, heat maps.

    picture, says = masks("a girl in red plays chess", "FLM", rate=0.4, prefix=2, seed=0)
"""

import io

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tools.figures import DPI, STYLE
from tools.plot import draw_key, draw_objective, draw_panel, rates

OBJECTIVES = {"FLM": "flm", "MLM": "mlm", "AR": "ar", "Prefix": "prefix"}
MOST_WORDS, LONGEST_WORD = 12, 14           # words of a sentence, letters of a word
CELL = 0.36                                 # inches of a cell of a mask


def rendered(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    return Image.open(buffer).convert("RGB")


def open_cells(rows: float, columns: float, n: int, left: float, top: float):
    """A figure of rows x columns cells, and an axis of n x n cells in it, its corner at left, top.

    It is not one of pyplot's, which keeps its figures for all threads together.
    """
    figure = Figure(figsize=(columns * CELL, rows * CELL))
    axis = figure.add_axes((left / columns, 1 - (top + n) / rows, n / columns, n / rows))
    axis.set(xlim=(0, n), ylim=(n, 0))      # one unit is a cell, row 0 on top
    axis.axis("off")
    return figure, axis


def masks(text: str, objective: str, rate: float, prefix: int,
          seed: int) -> tuple[Image.Image, str]:
    """What an objective hides and predicts of a sentence -> (a picture, a line about it).

    objective: one of OBJECTIVES. rate, prefix: those of plot.draw_objective.
    """
    words = (text or "").split()
    if not 2 <= len(words) <= MOST_WORDS:
        raise ValueError(f"A sentence of {len(words)} words; 2 to {MOST_WORDS} fit in the picture.")
    if objective == "Prefix" and prefix >= len(words):
        raise ValueError(f"A prefix of {prefix} words leaves none of {len(words)} to predict.")
    words = [word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD - 1]}…" for word in words]
    panel = draw_objective(OBJECTIVES[objective], words, np.random.default_rng(seed), rate, prefix)
    tokens = ["<s>", *words, "</s>"]
    n = len(tokens)
    with plt.rc_context(STYLE):
        figure, axis = open_cells(n + 5.8, n + 6.2, n, left=4.0, top=3.6)
        draw_panel(axis, panel, tokens)
        picture = rendered(figure)
    predicted, corrupted = rates(panel)
    says = (f"{len(panel.targets)} of {n - 1} tokens are predicted (prediction rate "
            f"{100 * predicted:.0f} %). A row that predicts does without {100 * corrupted:.0f} % of "
            "the tokens on average (corruption rate).")
    return picture, says


def key() -> Image.Image:
    """What the colours and marks of the masks mean."""
    with plt.rc_context(STYLE):
        figure, axis = open_cells(12.6, 9.5, 8, left=0.3, top=3.4)
        draw_key(axis, 8)
        return rendered(figure)
