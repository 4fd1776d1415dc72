"""Pictures of the demo page that are drawn for it: one objective's masks, heat maps.

    picture, says = masks("a girl in red plays chess", "FLM", rate=0.4, prefix=2, seed=0)
    found = look_for(model, reading, 2)                 # of word 2 of a demo_answers.Reading
    picture, row = maps(found, 2), mask_row(found, 2)
"""

import html
import io
import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from predict import Model, open_picture
from tools.demo_answers import Reading
from tools.figures import DPI, STYLE
from tools.look import Look, look_at
from tools.plot import draw_key, draw_objective, draw_panel, rates
from tools.plot_examples import draw_in_fog

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
            f"{100 * predicted:.0f} %). On average, a row that predicts does without "
            f"{100 * corrupted:.0f} % of the tokens (corruption rate).")
    return picture, says


def key() -> Image.Image:
    """What the colours and marks of the masks mean."""
    with plt.rc_context(STYLE):
        figure, axis = open_cells(12.6, 9.5, 8, left=0.3, top=3.4)
        draw_key(axis, 8)
        return rendered(figure)


# -------------------------------------------------------------------------------------------------
# Where a model looked for a word, and what it was allowed to read.

def look_for(model: Model, reading: Reading, word: int) -> Look:
    """What a model looked at when it said one word of a reading."""
    ids = reading.ids
    if model.config.objective == "mlm":         # it was asked with this word masked
        ids = ids.clone()
        ids[0, 1 + word] = model.config.mask_id
    return look_at(model, open_picture(reading.picture, model.config), ids)


def maps(found: Look, word: int) -> Image.Image:
    """A word's map of each layer, rolled out over the layers, and of ViLT's transport."""
    names = {name.removeprefix("reconstructed, "): shares[1 + word].numpy()
             for name, shares in found.named_maps().items()
             if name.startswith("reconstructed") or name == "transport"}
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    picture = found.picture.permute(1, 2, 0).numpy()                                # (H, W, 3)
    with plt.rc_context(STYLE):
        figure = Figure(figsize=(1.9 * columns, 2.4 * rows), layout="constrained")
        for axis in figure.subplots(rows, columns, squeeze=False).flat:
            axis.axis("off")
        for axis, (name, shares) in zip(figure.axes, names.items(), strict=False):
            draw_in_fog(axis, picture, shares, name)
        return rendered(figure)


def mask_row(found: Look, word: int) -> str:
    """HTML: the text, coloured as the masks are: what the row of a word may read."""
    own, cells = 1 + word, []
    for position, token in enumerate(found.tokens[1:-1], 1):
        if found.may_read is None:
            kind = "own" if position == own else "left"
        else:
            left, right = found.may_read[own].view(2, -1)[:, position].tolist()
            kind = "left" if left else "right" if right else "hidden"
        kind += " own" if position == own else ""
        cells.append(f'<span class="{kind}">{html.escape(token.strip())}</span>')
    says = "Above: clear where the model looked for the outlined word, else in fog. "
    if found.may_read is None:
        says += "It read all other words; this one was masked."
    else:
        says += ("Its query may read the blue words in the left-to-right stream, the orange ones "
                 "in the right-to-left stream.")
    return f'<div class="reads"><div>{"".join(cells)}</div><small>{says}</small></div>'
