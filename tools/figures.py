"""What all figures share: colours, letters, the grid of pictures, the PNG file."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

# Okabe and Ito's colours: colour-blind readers can tell them apart, and so can a grey print.
BLUE, ORANGE, VERMILLION = "#0072B2", "#E69F00", "#D55E00"
GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8A8A8A", "#E4E4E4"
STYLE = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
         "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False,
         "text.parse_math": False,                      # a caption may hold dollar signs
         "image.interpolation": "bicubic", "figure.constrained_layout.h_pad": 0.08}
WIDTH, DPI = 10, 150                                    # inches of every picture, dots of an inch


def save(figure, path: str):
    """Writes a PNG file; one of at most 256 colours gets a palette, which halves its size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    if picture.getcolors(256):
        picture = picture.quantize(256, kmeans=2, dither=Image.Dither.NONE)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", optimize=True)
    print(f"wrote {path}")


def open_grid(rows: int, columns: int, row_height: float, **more):
    """A figure and its empty axes, (rows, columns). row_height: in inches, on average."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * row_height), squeeze=False,
                                layout="constrained", **more)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def show(axis, picture: np.ndarray, above: str = "", below: str = "", color: str = INK,
         weight: str = "normal", extent: Sequence[float] | None = None):
    """A picture with text above it and coloured text below. extent: as imshow takes it."""
    axis.axis("on")
    axis.imshow(picture, extent=extent)
    axis.set(anchor="NW", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(above, loc="left", size=10)
    axis.set_xlabel(below, loc="left", size=10, color=color, weight=weight)
