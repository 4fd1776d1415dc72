"""Grids of pictures with captions: the commands words, align and sheet of plot.py.

Also the look of all its pictures, and the function that saves them.
Letters: h, w patches of a picture, along its height and width.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

import data
import files

# Okabe and Ito's colours: colour-blind readers can tell them apart, and so can a grey print.
BLUE, ORANGE, VERMILLION = "#0072B2", "#E69F00", "#D55E00"
GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"
INK, GREY = "#222222", "#8A8A8A"
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


# --------------------------------------------------------------------------------------------------
# What the grids share.

def read_results(path: str, command: str) -> dict | list:
    """The contents of the JSON file that a command wrote."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {command} writes it")
    return files.read_json(path)


def check(path: str, command: str, rows, *names: str):
    """ValueError unless these contents of a file are dicts, at least one, which have the names."""
    whole = isinstance(rows, list) and len(rows) > 0
    if not whole or not all(isinstance(row, dict) and {*names} <= row.keys() for row in rows):
        raise ValueError(f"{path}: not what {command} writes")


def spread(items: list, count: int) -> list:
    """At most `count` items of a list, evenly spread, the first and the last included."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def read_picture(file: str, row: int, column: str = "image") -> np.ndarray:
    """The picture in a row of an Arrow file, uint8 (H, W, 3), at most 400 pixels wide or high.

    One that cannot be decoded is black, as eval.py shows it to the model.
    """
    def reduced(width, height):
        scale = min(1, 400 / max(width, height))
        size = max(1, round(scale * width)), max(1, round(scale * height))
        return size, size

    table = data.Table([file], [column])
    if not 0 <= row < len(table):
        raise ValueError(f"{file}: has {len(table)} rows, no row {row}")
    try:
        picture = data.decode(table.cell(column, row).as_buffer(), reduced)     # (3, H, W)
    except Exception as error:                          # Pillow raises what broken bytes lead to
        print(f"{file} row {row}: {error or type(error).__name__}; shown as black")
        return np.zeros((64, 64, 3), np.uint8)
    return picture.permute(1, 2, 0).numpy()                                     # (H, W, 3)


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


# --------------------------------------------------------------------------------------------------
# words: what `tools.probe words` found, with some of its captions.

BARS = {"right image": BLUE, "another image": ORANGE, "no image": "#A0A0A0"}


def plot_words(args):
    command = "`python -m tools.probe words`"
    results = read_results(args.words, command)
    check(args.words, command, [results])
    check(args.words, command, [*results.values()], "accuracy", "words", "examples")
    count = min(args.examples, max(len(result["examples"]) for result in results.values()))
    # A column for each split: bars, then two rows for each caption.
    figure, axes = open_grid(1 + 2 * count, len(results), 1.15,
                             height_ratios=[2.5] + [0.8] * 2 * count)
    for column, (split, result) in zip(axes.T, results.items(), strict=True):
        draw_bars(column[0], split, result["accuracy"], result["words"])
        for k, example in enumerate(spread(result["examples"], count)):
            draw_guesses(column[1 + 2 * k], example, "right image", "")
            draw_guesses(column[2 + 2 * k], example, "another image", "other_")
    colors = BARS | {"a word guessed wrong": VERMILLION}
    figure.legend(handles=[Rectangle((0, 0), 1, 1, color=color, label=name)
                           for name, color in colors.items()], loc="outside upper center", ncols=4)
    save(figure, args.out)


def draw_bars(axis, split: str, accuracy: dict, asked: dict):
    axis.axis("on")
    for k, (name, color) in enumerate(BARS.items()):
        shares = [100 * row[name] for row in accuracy.values()]
        bars = axis.bar(np.arange(len(shares)) + 0.27 * (k - 1), shares, 0.25, color=color)
        axis.bar_label(bars, fmt="%.0f", padding=1, size=8.5)
    axis.set(ylim=(0, 108), yticks=(0, 50, 100), ylabel="words guessed right, %")
    labels = [f"{name}\n({asked[name]:,} words)" for name in accuracy]
    axis.set_xticks(range(len(labels)), labels)
    axis.tick_params(length=0)
    axis.set_title(split, weight="bold", size=12, loc="left")


def draw_guesses(axis, example: dict, image: str, prefix: str):
    """A picture, and beside it what each token of the caption was taken for; wrong ones in colour.

    The caption stands above the right image.
    """
    tokens, guesses = example["tokens"], example["guesses"][image]
    caption = textwrap.fill("".join(tokens), 60) if image == "right image" else ""
    show(axis, read_picture(example[f"{prefix}file"], example[f"{prefix}row"]), caption)
    # The text is written twice: with blanks for the wrong guesses, and with those alone.
    text, right, wrong = "".join(guesses), "", ""
    for token, guess in zip(tokens, guesses, strict=False):
        blank = " " * len(guess)
        right += guess if guess == token else blank
        wrong += blank if guess == token else guess
    beside = dict(transform=axis.transAxes, size=8.5, in_layout=False)
    axis.text(1.15, 0.85, image, color=GREY, **beside)
    beside |= dict(family="DejaVu Sans Mono")
    start = 0
    lines = textwrap.wrap(text.lstrip(), 46, expand_tabs=False, replace_whitespace=False)
    for k, line in enumerate(lines):
        start = text.index(line, start)
        here = slice(start, start + len(line))
        axis.text(1.15, 0.58 - 0.23 * k, right[here], **beside)
        axis.text(1.15, 0.58 - 0.23 * k, wrong[here], color=VERMILLION, weight="bold", **beside)


# --------------------------------------------------------------------------------------------------
# align: where ViLT's optimal transport carries the words (figure 4 of the ViLT paper).

COLUMNS = 8                                             # words on a line
FOG = (92, 96, 108)                                     # unlike bright and unlike dark pictures


def plot_align(args):
    command = "`python -m tools.probe align`"
    alignments = read_results(args.align, command)
    check(args.align, command, alignments, "file", "row", "tokens", "grid", "plan")
    shown = spread(alignments, args.examples)
    lines = []                                          # (alignment, its words on a line)
    for found in shown:
        if any(len(shares) != math.prod(found["grid"]) for shares in found["plan"]):
            raise ValueError(f"{args.align}: not what {command} writes: a share is expected "
                             "for each word and patch")
        words = range(min(len(found["plan"]), args.words))
        lines += [(found, words[start:start + COLUMNS]) for start in words[::COLUMNS]]
    figure, axes = open_grid(len(lines), 1 + COLUMNS, 1.5)
    figure.suptitle("Each word's picture is clear where optimal transport carries the word, "
                    "else in fog.\nBelow: the share of the clearest patch.", size=10, color=GREY)
    for row, (found, words) in zip(axes, lines, strict=True):
        draw_alignment(row, found, words)
    save(figure, args.out)


def draw_alignment(axes, found: dict, words: range):
    """A line of words, each with its picture; at the beginning of a caption, the plain picture."""
    h, w = found["grid"]
    picture = read_picture(found["file"], found["row"])
    extent = (0, w, h, 0)                               # in patches: the model saw whole ones
    if words[0] == 0:
        show(axes[0], picture, extent=extent)
    for axis, k in zip(axes[1:], words, strict=False):
        shares = np.array(found["plan"][k]).reshape(h, w)
        clear = shares / max(shares.max(), 1e-9)
        show(axis, picture, found["tokens"][k].strip(), f"{100 * shares.max():.0f} %", GREY,
             extent=extent)
        axis.imshow(np.full((h, w, 3), FOG, np.uint8), alpha=0.85 * (1 - clear), extent=extent,
                    interpolation="nearest")


# --------------------------------------------------------------------------------------------------
# sheet: what a fine-tuned model answered, from the examples.json of eval.py's tasks.

MARKS = {True: ("✓ ", GREEN), False: ("✗ ", VERMILLION), None: ("", INK)}


def plot_sheet(args):
    command = "a task of eval.py"
    found = read_results(args.results, command)
    check(args.results, command, [found], "title", "examples")
    check(args.results, command, found["examples"],
          "file", "row", "images", "text", "answer", "truth", "right")
    shown = spread(found["examples"], args.examples)
    pairs = any(len(example["images"]) > 1 for example in shown)
    columns, row_height, letters = (3, 2.4, 42) if pairs else (4, 3.2, 26)      # letters of a line
    figure, axes = open_grid(math.ceil(len(shown) / columns), columns, row_height)
    for axis, example in zip(axes.flat, shown, strict=False):
        pictures = [read_picture(example["file"], example["row"], column)
                    for column in example["images"]]
        answer, color = verdict(example)
        show(axis, side_by_side(pictures), textwrap.fill(example["text"], letters),
             textwrap.fill(answer, letters), color, "bold")
    known = [example["right"] for example in shown if example["right"] is not None]
    score = f": {sum(known)} of these {len(known)} right" if known else ""
    figure.suptitle(found["title"] + score, size=14, weight="bold")
    save(figure, args.out)


def side_by_side(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) in a row, with white between them."""
    tallest = max(len(picture) for picture in pictures)
    padded = [np.pad(picture, ((0, tallest - len(picture)), (4, 0), (0, 0)), constant_values=255)
              for picture in pictures]
    return np.concatenate(padded, axis=1)[:, 4:]


def verdict(example: dict) -> tuple[str, str]:
    """What stands below a picture, and in which colour: the answer, and the truth if it differs."""
    mark, color = MARKS[example["right"]]
    answer = example["answer"]
    if not answer:                                      # the picture itself is the answer
        answer = {True: "right", False: "wrong", None: ""}[example["right"]]
    if example["right"] is False and example["truth"]:
        answer += f" (truth: {example['truth']})"
    return mark + answer, color
