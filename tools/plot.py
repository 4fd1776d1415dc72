"""Pictures: what each objective hides and predicts, how runs learn, what models see and answer.

    python -m tools.plot masks --out docs/masks.png                    # the README's first picture
    python -m tools.plot curves runs/toy runs/mlm --x seconds --out docs/curves.png
    python -m tools.plot words runs/toy/words.json --out docs/words.png
    python -m tools.plot align runs/vilt/align.json --out docs/align.png
    python -m tools.plot sheet runs/toy-vqa/vqa/examples.json --out docs/toy_vqa.png

`words` and `align` show what `python -m tools.probe` found, `sheet` what eval.py's tasks answered.

Letters: n tokens of a caption, `<s>` and `</s>` included; h x w patches of a picture.
"""

import argparse
import io
import itertools
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import data
import disk
import files
import flm
import masks
from tar_index import TarCaptions, is_tar

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


# --------------------------------------------------------------------------------------------------
# masks: figure 1 of the paper, from the very functions that the model is trained with.

CLASS, HATCH = "#CFCFCF", "//////"                      # cells of the class row; masked words


class Panel(NamedTuple):
    """One objective on one caption."""
    title: str
    says: str
    left: np.ndarray                                    # (n, n) bool: what a row reads on its left
    right: np.ndarray                                   # and on its right
    targets: dict[int, int]                             # predicting row -> position it predicts
    masked: Sequence[int] = ()                          # positions replaced in the input


def rates(panel: Panel) -> tuple[float, float]:
    """(prediction rate, corruption rate), shares of the n - 1 tokens w1 … wk `</s>`: of those that
    some row predicts, and of those that a predicting row may not use, on average.
    """
    seen = (panel.left | panel.right)[:, 1:]                                    # (n, n - 1)
    return len(panel.targets) / seen.shape[1], float(1 - seen[list(panel.targets)].mean())


def draw_panels(words: Sequence[str], rate: float = 0.4, prefix: int = 3,
                seed: int = 7) -> list[Panel]:
    """The objectives' masks for a caption. rate: corruption of the last one, FLM with spans."""
    n = len(words) + 2
    rng = np.random.default_rng(seed)
    real = torch.ones(1, n, dtype=torch.bool)
    before = np.tril(np.ones((n, n), bool))             # row i's own column counts as its left
    ids = np.arange(n) + 10                             # any ids: only the positions matter
    _, masked = data.mask_words(ids, [True] * len(words), flm.Config.mask_rate, 4, ids, rng)
    masked = masked.tolist()
    spans = [torch.from_numpy(ends)[None] for ends in masks.draw_spans(n, n, rate, rng)]  # (1, n)

    def targets(objective, output, prefix=0):
        rows = masks.predicting_rows(objective, n, prefix)[output]
        return {row: row + masks.SHIFT[output] for row in rows}

    def stream(mask, hidden=()):
        seen = mask[0].numpy().copy()                                           # (n, n)
        seen[:, list(hidden)] = False                   # the column is read, but its word is gone
        return seen & before, seen & ~before

    def reconstructor(*span):
        mask = masks.reconstructor_mask(real, *span)[0].numpy()                   # (n, 2n)
        return mask[:, :n], mask[:, n:], targets("flm", "reconstructed")

    return [
        Panel("MLM", "masked words, from both sides",
              *stream(masks.bidirectional_mask(real), masked), {i: i for i in masked}, masked),
        Panel("AR", "every next word, from the left", *stream(masks.left_to_right_mask(real)),
              targets("ar", "left_to_right")),
        Panel("Prefix", "every next word after a prefix",
              *stream(masks.prefix_mask(real, torch.tensor([prefix]))),
              targets("prefix", "left_to_right", prefix)),
        Panel("FLM", "every word, from both sides", *reconstructor()),
        Panel("FLM, larger spans", "every word, with more hidden around it",
              *reconstructor(*spans))]


def plot_masks(args):
    words = args.caption.split()
    if not 3 <= len(words) <= 8:
        raise ValueError(f"--caption of {len(words)} words: 3 to 8 fit in the picture")
    if not 0 < args.rate <= 1:
        raise ValueError(f"--rate {args.rate}: a share above 0 and up to 1 is expected")
    if not 1 <= args.prefix < len(words):
        raise ValueError(f"--prefix {args.prefix}: 1 to {len(words) - 1} words are expected")
    n = len(words) + 2
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 7.6))
    figure.subplots_adjust(left=0.065, right=0.985, top=0.86, bottom=0.083, wspace=0.3, hspace=0.76)
    for axis in axes.flat:
        axis.set(xlim=(0, n), ylim=(n, 0))              # one unit is a cell, row 0 on top
        axis.axis("off")
    panels = draw_panels(words, args.rate, args.prefix, args.seed)
    for axis, panel in zip(axes.flat[:5], panels, strict=True):
        draw_panel(axis, panel, ["<s>", *words, "</s>"])
    draw_key(axes.flat[5], n)
    save(figure, args.out)


def draw_panel(axis, panel: Panel, tokens: list[str]):
    n = len(tokens)
    for i, j in itertools.product(range(n), range(n)):
        color = BLUE if panel.left[i, j] else ORANGE if panel.right[i, j] else "white"
        if i == 0 and color != "white":
            color = CLASS
        cell(axis, j, i, color, pale=i > 0 and i not in panel.targets,
             hatch=HATCH if j in panel.masked else None,
             mark="?" if j == panel.targets.get(i) else "")
    for i, token in enumerate(tokens):
        axis.text(-0.2, i + 0.5, token, ha="right", va="center", size=9.5,
                  color=INK if i in panel.targets else GREY)
        axis.text(i + 0.3, -0.18, "<mask>" if i in panel.masked else token, rotation=45,
                  rotation_mode="anchor", size=9)
    axis.text(0, -3.0, panel.title, size=13, weight="bold")
    axis.text(0, -2.25, panel.says, size=9.5, color="#555555")
    names = ("prediction rate", "corruption rate")
    for name, share, y in zip(names, rates(panel), (n + 0.75, n + 1.6), strict=True):
        axis.text(0, y, name, size=9.5, va="center")
        for length, color in ((1, PALE), (share, INK)):
            axis.add_patch(plt.Rectangle((0.5 * n, y - 0.19), 0.27 * n * length, 0.38, color=color,
                                         lw=0, clip_on=False))
        axis.text(n, y, f"{100 * share:.0f} %", size=10, weight="bold", va="center", ha="right")


def draw_key(axis, n: int):
    """What the cells mean, in the place of the sixth panel."""
    axis.text(0, -3.0, "How to read it", size=13, weight="bold")
    meanings = (("seen, in the left context", BLUE, {}),
                ("seen, in the right context", ORANGE, {}),
                ("hidden from this row", "white", {}),
                ("the word this row predicts", "white", {"mark": "?"}),
                ("replaced by <mask>", "white", {"hatch": HATCH}),
                ("pale: a row that predicts nothing", BLUE, {"pale": True}),
                ("<s> reads all, predicts nothing", CLASS, {}))
    for k, (meaning, color, look) in enumerate(meanings):
        cell(axis, 0, 1.2 * k - 1.5, color, **look)
        axis.text(1.35, 1.2 * k - 1, meaning, size=9.5, va="center")
    axis.text(0, n - 0.65, "Rows look, columns are looked at.\nEvery row also sees the image. "
              "No row\nof AR could predict the first word.", size=9.5, va="top", color="#555555",
              linespacing=1.35)


def cell(axis, x: float, y: float, color: str, pale: bool = False, hatch: str | None = None,
         mark: str = ""):
    hidden = color == "white"
    shade = 0.25 if pale and not hidden else 1
    axis.add_patch(plt.Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, hatch=hatch, clip_on=False,
                                 lw=0.7 if hidden else 0,
                                 facecolor=1 - shade * (1 - np.array(to_rgb(color))),
                                 edgecolor="#BBBBBB" if hatch else "#D8D8D8"))  # also the hatch's
    axis.text(x + 0.5, y + 0.53, mark, ha="center", va="center", weight="bold", size=11)


# --------------------------------------------------------------------------------------------------
# curves: metrics.jsonl of any runs, also of one that is running.

def run_directory(run: str) -> Path:
    """The directory of a run that is named by itself or by the metrics.jsonl in it."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def read_metrics(run: str) -> list[dict]:
    """The lines of a run's metrics.jsonl, without a last one that is only half written."""
    path = run_directory(run) / "metrics.jsonl"
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path} line {number}: not JSON") from None
    return rows


def horizontal(run: str, rows: list[dict], x: str) -> np.ndarray:
    """Where the rows stand on the x axis, (rows,) float: at steps, samples, or seconds."""
    steps = np.array([row["step"] for row in rows], float)
    if x == "step":
        return steps
    if x == "samples":
        config = disk.read_json(run_directory(run) / "config.json")
        return steps * config["settings"]["global_batch"]
    timed = [row for row in rows if "seconds" in row]   # lines of validation have no clock
    seconds = np.array([0.0] + [row["seconds"] for row in timed])
    passed = np.diff(seconds)
    passed = np.where(passed < 0, seconds[1:], passed)  # a resumed run's clock starts at 0 again
    return np.interp(steps, [0] + [row["step"] for row in timed], np.cumsum([0, *passed]))


def accuracy_key(key: str, names: set[str]) -> str | None:
    """The accuracy, of a run's names, that belongs to a loss; to the total loss, the main one."""
    outputs = ("reconstructed", "left_to_right", "mlm")
    if key.endswith("_loss"):
        outputs = (key.removesuffix("_loss"),)
    return next((f"{name}_accuracy" for name in outputs if f"{name}_accuracy" in names), None)


def plot_curves(args):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained")
    palette = itertools.cycle((BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, INK))
    measured, handles = set(), []
    for run, color in zip(args.runs, palette, strict=False):
        rows = read_metrics(run)
        x = horizontal(run, rows, args.x)
        names = {name.removeprefix("val_") for row in rows for name in row}
        if args.key not in names:
            print(f"{run}: no {args.key} in it; it has {', '.join(sorted(names))}")
        draw_curve(axes[0], x, rows, args.key, color)
        accuracy = accuracy_key(args.key, names)
        if accuracy:
            draw_curve(axes[1], x, rows, accuracy, color, 100)
            measured.add(accuracy.removesuffix("_accuracy").replace("_", " "))
        name = run_directory(run).resolve().name
        handles.append(plt.Line2D([], [], color=color, lw=2, label=name))
    if not axes[0].lines:
        raise ValueError(f"--key {args.key}: none of the runs has it")
    axes[0].set_ylabel(args.key.replace("_", " "))
    axes[1].set_ylabel(", ".join(sorted(measured)) + " accuracy, %")
    for axis in axes:
        axis.set_xlabel({"samples": "samples seen"}.get(args.x, args.x))
        axis.grid(color=PALE, lw=0.7)
        axis.margins(x=0.02)
        axis.locator_params(axis="x", nbins=6)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    handles += [plt.Line2D([], [], color=GREY, lw=1, label="training"),
                plt.Line2D([], [], color=GREY, lw=1.8, marker="o", ms=5, label="validation")]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)))
    save(figure, args.out)


def draw_curve(axis, x: np.ndarray, rows: list[dict], key: str, color: str, scale: float = 1):
    """Training as a thin line, validation with markers."""
    styles = {key: dict(lw=1, alpha=0.6), f"val_{key}": dict(lw=1.8, marker="o", ms=4.5)}
    for name, style in styles.items():
        here = [i for i, row in enumerate(rows) if name in row]
        if here:
            axis.plot(x[here], [scale * rows[i][name] for i in here], color=color, **style)


# --------------------------------------------------------------------------------------------------
# What the pictures of examples share: words, align and sheet.

def check(args, writer: str, rows, *names: str):
    """ValueError unless these contents of a file are dicts, at least one, which have the names."""
    whole = isinstance(rows, list) and len(rows) > 0
    if not whole or not all(isinstance(row, dict) and {*names} <= row.keys() for row in rows):
        raise ValueError(f"{args.results}: not what {writer} writes")


def spread(items: list, count: int) -> list:
    """At most `count` items of a list, evenly spread, the first and the last included."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def read_picture(file: str, row: int, column: str = "image") -> np.ndarray:
    """The picture in a row of an Arrow file or a tar, uint8 (H, W, 3), at most 400 pixels wide or
    high; black, as the model saw it, where it cannot be decoded."""
    def reduced(width, height):
        scale = min(1, 400 / max(width, height))
        size = math.ceil(scale * width), math.ceil(scale * height)
        return size, size

    table = TarCaptions([file]) if is_tar(file) else files.Table([file], {column: files.IMAGE})
    if not 0 <= row < len(table):
        raise ValueError(f"{file}: has {len(table)} rows, no row {row}")
    try:
        encoded = table.image(row) if is_tar(file) else table.cell(column, row).as_buffer()
        picture = data.decode(encoded, reduced)                                 # (3, H, W)
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
    results = disk.read_json(args.results)
    check(args, "`tools.probe words`", [results])
    check(args, "`tools.probe words`", [*results.values()], "accuracy", "words", "examples")
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
    figure.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=color, label=name)
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
    """A picture, and beside it what each token was taken for; wrong ones in colour."""
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
    alignments = disk.read_json(args.results)
    check(args, "`tools.probe align`", alignments, "file", "row", "tokens", "grid", "plan")
    lines = []                                          # (alignment, its words on a line)
    for found in spread(alignments, args.examples):
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

# right -> the mark before an answer, its colour, and what stands for an answer that is a picture
MARKS = {True: ("✓ ", GREEN, "right"), False: ("✗ ", VERMILLION, "wrong"), None: ("", INK, "")}


def plot_sheet(args):
    found = disk.read_json(args.results)
    check(args, "a task of eval.py", [found], "title", "examples")
    check(args, "a task of eval.py", found["examples"],
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
    """An answer with its mark, and the truth if it differs; and their colour."""
    mark, color, word = MARKS[example["right"]]
    answer = example["answer"] or word
    if example["right"] is False and example["truth"]:
        answer += f" (truth: {example['truth']})"
    return mark + answer, color


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, says):
        p = commands.add_parser(name, help=says, description=says,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--out", metavar="FILE", default=f"docs/{name}.png", help="PNG to write")
        p.set_defaults(run=run)
        return p.add_argument

    add = command("masks", plot_masks, "what each objective hides and predicts, for one caption")
    add("--caption", default="a girl in red plays chess", help="3 to 8 words")
    add("--rate", type=float, default=0.4, help="corruption rate of the last panel, up to 1")
    add("--prefix", type=int, default=3, help="number of words in the prefix")
    add("--seed", type=int, default=7, help="seed of the masked word and the spans")
    add = command("curves", plot_curves, "loss and accuracy of runs, in training and validation")
    add("runs", nargs="+", metavar="RUN", help="run directory, or its metrics.jsonl")
    add("--key", default="loss", help="key of metrics.jsonl for the left half, such as lr")
    add("--x", default="step", choices=("step", "seconds", "samples"), help="horizontal axis")
    add = command("words", plot_words, "accuracy of words with the right, another and no image")
    add("results", metavar="WORDS_JSON", help="what `python -m tools.probe words` wrote")
    add("--examples", type=int, default=3, help="number of captions of each split, evenly spread")
    add = command("align", plot_align, "the patches to which ViLT carries each word")
    add("results", metavar="ALIGN_JSON", help="what `python -m tools.probe align` wrote")
    add("--examples", type=int, default=5, help="number of captions, evenly spread")
    add("--words", type=int, default=2 * COLUMNS, help="largest number of words of each caption")
    add = command("sheet", plot_sheet, "what a fine-tuned model answered, right or wrong")
    add("results", metavar="EXAMPLES_JSON", help="what vqa, nlvr2, … of eval.py wrote")
    add("--examples", type=int, default=12, help="number of examples, evenly spread")
    args = parser.parse_args(argv)
    plt.switch_backend("Agg")                           # files only, so no display is needed
    with disk.command("plot.py"), plt.rc_context(STYLE):
        for flag in ("examples", "words"):
            if getattr(args, flag, 1) < 1:
                raise ValueError(f"--{flag} {getattr(args, flag)}: at least 1 is expected")
        args.run(args)


if __name__ == "__main__":
    main()
