"""Pictures: what each objective hides and predicts, how runs learn, what a model reads from images and answers.

    python plot.py masks --out docs/masks.png                                      # the README's first picture
    python plot.py curves runs/toy runs/mlm --x seconds --out docs/curves.png      # from each run's metrics.jsonl
    python plot.py words runs/toy/words.json --out docs/words.png                  # the table of `eval.py words`
    python plot.py align runs/vilt/align.json --out docs/align.png                 # that of `eval.py align`
    python plot.py sheet runs/toy-vqa/vqa/examples.json --out docs/toy_vqa.png     # the examples of eval.py's tasks

Letters: n tokens of a caption (`<s>` and `</s>` included).
"""

import argparse
import functools
import io
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

import data
import flm

matplotlib.use("Agg")                                       # files only, so no display is needed
import matplotlib.pyplot as plt                             # noqa: E402
from matplotlib.backends.backend_agg import RendererAgg     # noqa: E402
from matplotlib.font_manager import FontProperties          # noqa: E402
from matplotlib.lines import Line2D                         # noqa: E402
from matplotlib.patches import Rectangle                    # noqa: E402

# Okabe and Ito's colours: told apart by colour-blind readers, and by their lightness when printed grey.
BLUE, ORANGE, VERMILLION, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8A8A8A", "#E4E4E4"
CLASS, HATCH = "#CFCFCF", "//////"                          # the class row reads both sides; masked words
STYLE = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK,
         "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "text.parse_math": False}                          # a caption may hold dollar signs
WIDTH, DPI = 10, 150                                        # inches of every picture, and dots of each


# ---------------------------------------------------------------------------------------------------------------------
# masks: figure 1 of the paper, from the very functions that the model is trained with.

@dataclass
class Panel:
    """One objective on one caption. left and right (n, n) bool: what row i may read, and from which side of itself."""
    title: str
    says: str
    left: np.ndarray
    right: np.ndarray
    targets: dict                                           # predicting row -> the position of the token it predicts
    masked: list = field(default_factory=list)              # positions whose token was replaced in the input


def rates(panel):
    """(prediction rate, corruption rate) of a panel: shares of the m = n - 1 tokens w1 … wk `</s>`.

    Prediction: the tokens that some row predicts. Corruption: the tokens that a predicting row may not use, on average
    over those rows.
    """
    seen = (panel.left | panel.right)[:, 1:]                                                        # (n, n - 1)
    return len(panel.targets) / seen.shape[1], float(1 - seen[list(panel.targets)].mean())


def draw_panels(words, rate=0.4, prefix=3, seed=7):
    """The objectives' masks for a caption -> list of Panel. rate: of the last one, FLM with larger hidden spans."""
    n = len(words) + 2
    rng = np.random.default_rng(seed)
    real = torch.ones(1, n, dtype=torch.bool)
    before = np.tril(np.ones((n, n), bool))                 # of a single stream, what stands up to i is on its left

    def stream(title, says, mask, targets, masked=()):
        seen = mask[0].numpy().copy()
        seen[:, list(masked)] = False                       # the column may be looked at, but the word is not there
        return Panel(title, says, seen & before, seen & ~before, targets, list(masked))

    def reconstructor(title, says, *span):
        mask = flm.reconstructor_mask(real, *span)[0].numpy()                                       # (n, 2n)
        return Panel(title, says, mask[:, :n], mask[:, n:], targets("flm", "reconstructed"))

    def targets(objective, output, prefix=0):
        return {row: row + flm.SHIFT[output] for row in flm.predicting_rows(objective, n, prefix)[output]}

    ids = np.arange(n) + 10                                 # any ids: only which of them are picked matters
    picked = data.mask_words(ids, [True] * len(words), flm.Config.mask_rate, 4, ids, rng)[1].tolist()
    spans = [torch.from_numpy(ends)[None] for ends in flm.draw_spans(n, n, rate, rng)]              # (1, n) each
    return [
        stream("MLM", "masked words, from both sides", flm.bidirectional_mask(real),
               {i: i + flm.SHIFT["reconstructed"] for i in picked}, picked),
        stream("AR", "every next word, from the left", flm.left_to_right_mask(real), targets("ar", "left_to_right")),
        stream("Prefix", "every next word after a prefix", flm.prefix_mask(real, torch.tensor([prefix])),
               targets("prefix", "left_to_right", prefix)),
        reconstructor("FLM", "every word, from both sides"),
        reconstructor("FLM, larger spans", "every word, with more hidden around it", *spans)]


def plot_masks(args):
    words = args.caption.split()
    if not 3 <= len(words) <= 8:
        raise ValueError(f"--caption of {len(words)} words: 3 to 8 fit in the picture")
    if not (0 < args.rate <= 1 and 1 <= args.prefix < len(words)):
        raise ValueError(f"--rate is a share in 0..1, --prefix a number of words in 1..{len(words) - 1}")
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 7.6))
    figure.subplots_adjust(left=0.065, right=0.985, top=0.86, bottom=0.083, wspace=0.3, hspace=0.76)
    for axis in axes.flat:
        axis.set(xlim=(0, len(words) + 2), ylim=(len(words) + 2, 0))    # one unit is a cell, row 0 on top
        axis.axis("off")
    for axis, panel in zip(axes.flat, draw_panels(words, args.rate, args.prefix, args.seed)):
        draw_panel(axis, panel, ["<s>", *words, "</s>"])
    draw_key(axes.flat[-1], len(words) + 2)
    save(figure, args.out)


def draw_panel(axis, panel, tokens):
    n = len(tokens)
    for i in range(n):
        predicts = i in panel.targets
        for j in range(n):
            side = BLUE if panel.left[i, j] else ORANGE if panel.right[i, j] else "white"
            cell(axis, j, i, CLASS if i == 0 and side != "white" else side, pale=i > 0 and not predicts,
                 hatch=HATCH if j in panel.masked else None, mark="?" if j == panel.targets.get(i) else "")
        axis.text(-0.2, i + 0.5, tokens[i], ha="right", va="center", size=9.5, color=INK if predicts else GREY)
        shown = "<mask>" if i in panel.masked else tokens[i]
        axis.text(i + 0.3, -0.18, shown, rotation=45, rotation_mode="anchor", size=9)
    axis.text(0, -3.0, panel.title, size=13, weight="bold")
    axis.text(0, -2.25, panel.says, size=9.5, color="#555555")
    for k, (name, share) in enumerate(zip(("prediction rate", "corruption rate"), rates(panel))):
        y = n + 0.75 + 0.85 * k
        axis.text(0, y, name, size=9.5, va="center")
        bar = 0.5 * n, 0.27 * n                            # where the bar starts, its length at 100 %
        for length, color in ((1, PALE), (share, INK)):
            axis.add_patch(Rectangle((bar[0], y - 0.19), bar[1] * length, 0.38, color=color, lw=0, clip_on=False))
        axis.text(n, y, f"{100 * share:.0f} %", size=10, weight="bold", va="center", ha="right")


def draw_key(axis, n):
    """The legend: the cells' meaning, in the place of the sixth panel."""
    axis.text(0, -3.0, "How to read it", size=13, weight="bold")
    for k, (meaning, color, how) in enumerate((
            ("seen, in the left context", BLUE, {}), ("seen, in the right context", ORANGE, {}),
            ("hidden from this row", "white", {}), ("the word this row predicts", "white", {"mark": "?"}),
            ("replaced by <mask>", "white", {"hatch": HATCH}),
            ("pale: a row that predicts nothing", BLUE, {"pale": True}),
            ("<s> reads all, predicts nothing", CLASS, {}))):
        cell(axis, 0, 1.2 * k - 1.5, color, **how)
        axis.text(1.35, 1.2 * k - 1, meaning, size=9.5, va="center")
    axis.text(0, n - 0.65, "Rows look, columns are looked at.\nEvery row also sees the image. No row\n"
              "of AR could predict the first word.", size=9.5, va="top", color="#555555", linespacing=1.35)


def cell(axis, x, y, color, pale=False, hatch=None, mark=""):
    hidden = color == "white"
    shade = 0.25 if pale and not hidden else 1
    axis.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, hatch=hatch, clip_on=False, lw=0.7 if hidden else 0,
                             facecolor=1 - shade * (1 - np.array(matplotlib.colors.to_rgb(color))),
                             edgecolor="#BBBBBB" if hatch else "#D8D8D8"))      # a hatch takes the colour of the rim
    axis.text(x + 0.5, y + 0.53, mark, ha="center", va="center", weight="bold", size=11)


# ---------------------------------------------------------------------------------------------------------------------
# curves: metrics.jsonl of any runs, also of one that is running.

def read_metrics(run):
    """A run directory, or its metrics.jsonl -> its lines, a list of dicts, less a last one that is half written."""
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a run directory of train.py holds one")
    rows, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path} line {number}: a JSON object with a \"step\" is expected") from None
    if not rows:
        raise ValueError(f"{path}: no complete line in it yet")
    return rows


def horizontal(run, rows, x):
    """Where the rows stand on the x axis: step, samples seen, or seconds of the run -> (rows,) float."""
    steps = np.array([row["step"] for row in rows], float)
    if x == "step":
        return steps
    if x == "samples":
        config = (Path(run) if Path(run).is_dir() else Path(run).parent) / "config.json"
        try:
            return steps * json.loads(config.read_text())["settings"]["global_batch"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{config}: --x samples needs the global_batch that train.py writes there") from None
    known, clock, lost, last = [0.0], [0.0], 0.0, 0.0
    for row in rows:
        if "seconds" in row:                                # validation lines have no clock: they are put in between
            lost += last if row["seconds"] < last else 0.0  # a resumed run counts its seconds from 0 again
            last = row["seconds"]
            known.append(row["step"])
            clock.append(lost + last)
    if len(known) == 1:
        raise ValueError(f"{run}: no line with seconds in it yet; --x step needs none")
    return np.interp(steps, known, clock)


def accuracy_key(key, rows):
    """The accuracy that belongs to a loss; to the total loss, that of the objective's main output. Or None."""
    names = {name.removeprefix("val_") for row in rows for name in row}
    wanted = [key.removesuffix("_loss")] if "_loss" in key else ["reconstructed", "left_to_right", "mlm"]
    return next((f"{name}_accuracy" for name in wanted if f"{name}_accuracy" in names), None)


def plot_curves(args):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2))
    measured, handles = [], []
    for run, color in zip(args.runs, itertools.cycle((BLUE, VERMILLION, GREEN, PINK, ORANGE, SKY, "black"))):
        rows = read_metrics(run)
        x, accuracy = horizontal(run, rows, args.x), accuracy_key(args.key, rows)
        if not draw_curve(axes[0], x, rows, args.key, color):
            print(f"{run}: no {args.key} in it; it has {', '.join(sorted({name for row in rows for name in row}))}")
        if draw_curve(axes[1], x, rows, accuracy, color, 100):
            measured.append(accuracy.removesuffix("_accuracy"))
        directory = Path(run) if Path(run).is_dir() else Path(run).parent
        handles.append(Line2D([], [], color=color, lw=2, label=directory.resolve().name))
    if not axes[0].lines:
        raise ValueError(f"--key {args.key}: none of the runs has it")
    axes[0].set(ylabel=args.key.replace("_", " "))
    axes[1].set(ylabel=f"accuracy of {', '.join(sorted(set(measured)))}, %" if measured else "accuracy, %")
    for axis in axes:
        axis.set_xlabel({"samples": "samples seen"}.get(args.x, args.x))
        axis.grid(color=PALE, lw=0.7)
        axis.margins(x=0.02)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        axis.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    handles += [Line2D([], [], color=GREY, lw=1, label="training"),
                Line2D([], [], color=GREY, lw=1.8, marker="o", ms=5, label="validation")]
    figure.legend(handles=handles, loc="upper center", ncols=min(6, len(handles)))
    figure.tight_layout(rect=(0, 0, 1, 0.93 - 0.06 * ((len(handles) - 1) // 6)))
    save(figure, args.out)


def draw_curve(axis, x, rows, key, color, scale=1):
    """Training thin, validation with markers -> the number of points; a line without the key is passed over."""
    points = 0
    for name, style in ((key, dict(lw=1, alpha=0.6)), (f"val_{key}", dict(lw=1.8, marker="o", ms=4.5))):
        here = [i for i, row in enumerate(rows) if isinstance(row.get(name), (int, float))]
        if here:
            axis.plot(x[here], [scale * rows[i][name] for i in here], color=color, **style)
        points += len(here)
    return points


# ---------------------------------------------------------------------------------------------------------------------
# What the pictures of examples share: a page in inches from the top left, where text and pictures are stacked.

def read_results(path, command, complete):
    """The JSON that an eval.py command wrote. complete: what stands in it -> whether that is all of it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {command} writes it")
    try:
        found = json.loads(Path(path).read_text())
        if complete(found):
            return found
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        pass
    raise ValueError(f"{path}: not what {command} writes")


def spread(items, count):
    """At most so many of a list, evenly spread, the first and the last included."""
    if not items:
        return []
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def open_page(height):
    """-> (figure, axes whose units are inches, (0, 0) at the top left)"""
    figure = plt.figure(figsize=(WIDTH, height))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")
    return figure, page


def inside(width, height):
    """A shape for data.decode: the whole picture, as large as it fits in so many inches."""
    def shape(w, h):
        scale = DPI * min(width / w, height / h)
        size = max(1, round(scale * w)), max(1, round(scale * h))
        return size, size
    return shape


def read_picture(file, row, shape, column="image"):
    """One row's picture in a shape, uint8 (H, W, 3). One that cannot be decoded is black, as eval.py shows it too."""
    table = data.Table([file], [column])
    if not (isinstance(row, int) and 0 <= row < len(table)):
        raise ValueError(f"{file}: has {len(table)} rows, no row {row}")
    try:
        return data.decode(table.cell(column, row).as_buffer(), shape).permute(1, 2, 0).numpy()
    except Exception as error:                              # Pillow's readers raise what the broken bytes lead to
        print(f"{file} row {row}: {error or type(error).__name__}; shown as black")
        width, height = shape(4, 3)[1]
        return np.zeros((height, width, 3), np.uint8)


def show(page, picture, x, y):
    """Puts uint8 (H, W, 3) on a page, a dot a pixel, its top left corner at (x, y)."""
    h, w = picture.shape[:2]
    x, y = round(x * DPI) / DPI, round(y * DPI) / DPI
    page.imshow(picture, extent=(x, x + w / DPI, y + h / DPI, y), aspect="auto")


@functools.cache
def text_width(text, size, weight="normal"):
    """Inches of a line of text."""
    font = FontProperties(size=size, weight=weight)
    return RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, ismath=False)[0] / DPI


def wrap(text, width, size, weight="normal"):
    """Text -> lines of at most `width` inches, broken between words; a word that is too long, anywhere."""
    lines = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size, weight) > width:
                lines.append("")
            lines[-1] += letter
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# words: what `eval.py words` found, with some of its captions.

IMAGE_COLORS = {"right image": BLUE, "another image": ORANGE, "no image": "#A0A0A0"}
LETTER, LINE = 0.602 * 8.5 / 72, 0.19                       # inches: DejaVu Sans Mono at 8.5 points


def plot_words(args):
    def complete(results):
        return results and all(
            all(set(IMAGE_COLORS) <= set(row) for row in result["accuracy"].values())
            and set(result["accuracy"]) <= set(result["words"])
            and all({"file", "row", "other_file", "other_row", "tokens", "guesses"} <= set(e)
                    for e in result["examples"])
            for result in results.values())

    results = read_results(args.words, "`eval.py words`", complete)
    column = WIDTH / len(results)
    shown = [spread(result["examples"], args.examples) for result in results.values()]
    blocks = [[draw_example(None, e, 0, 0, column - 0.4) for e in some] for some in shown]          # their heights
    top = 3.7
    height = top + max(sum(heights) for heights in blocks)
    figure, page = open_page(height)
    page.text(0.2, top - 0.3, "What the model took each word for.", color=GREY, va="center")
    page.text(2.75, top - 0.3, "Wrong guesses look like this.", color=VERMILLION, weight="bold", va="center")
    for k, (split, result) in enumerate(results.items()):
        axis = figure.add_axes(((k * column + 0.6) / WIDTH, 1 - 2.75 / height, (column - 0.9) / WIDTH, 1.95 / height))
        draw_bars(axis, split, result["accuracy"], result["words"])
        y = top
        for example, block in zip(shown[k], blocks[k]):
            draw_example(page, example, k * column + 0.2, y, column - 0.4)
            y += block
    figure.legend(handles=[Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in IMAGE_COLORS.items()],
                  loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1 - 0.02 / height))
    save(figure, args.out)


def draw_bars(axis, split, accuracy, asked):
    for k, (name, color) in enumerate(IMAGE_COLORS.items()):
        shares = [100 * row[name] for row in accuracy.values()]
        bars = axis.bar(np.arange(len(shares)) + 0.27 * (k - 1), shares, 0.25, color=color)
        axis.bar_label(bars, fmt="%.0f", padding=1, size=8.5)
    axis.set(ylim=(0, 108), yticks=(0, 50, 100), ylabel="words guessed right, %")
    axis.set_xticks(range(len(accuracy)), [f"{group}\n({asked[group]:,} words)" for group in accuracy])
    axis.tick_params(length=0)
    axis.set_title(split, weight="bold", size=12, loc="left")


def draw_example(page, example, x, y, width):
    """The caption, then for the right and for another image: the picture and the word that each token was taken for.

    Returns its height in inches; without a page (None) it only measures.
    """
    side = 0.72
    tokens, top = example["tokens"], y
    y += LINE * write(page, tokens, [False] * len(tokens), x, y, width) + 0.09
    for name, which in (("right image", ""), ("another image", "other_")):
        guesses = example["guesses"][name]
        wrong = [guess != token for guess, token in zip(guesses, tokens)]
        if page is not None:
            shape = data.Square(round(side * DPI))
            show(page, read_picture(example[f"{which}file"], example[f"{which}row"], shape), x, y)
            page.text(x + side + 0.15, y + 0.01, name, size=8.5, color=GREY, va="top")
        lines = write(page, guesses, wrong, x + side + 0.15, y + 0.2, width - side - 0.15)
        y += max(side, 0.2 + LINE * lines) + 0.1
    return y - top + 0.25


def write(page, tokens, wrong, x, y, width):
    """Tokens one after the other, the wrong ones marked, wrapped where a word begins -> the number of lines."""
    at, line = 0, 0
    for token, marked in zip(tokens, wrong):
        text = token.lstrip() if at == 0 else token
        if at and token.startswith(" ") and (at + len(text)) * LETTER > width:
            at, line, text = 0, line + 1, token.lstrip()
        if page is not None:
            page.text(x + at * LETTER, y + LINE * (line + 0.7), text, size=8.5, family="DejaVu Sans Mono",
                      **(dict(color=VERMILLION, weight="bold") if marked else {}))
        at += len(text)
    return line + 1


# ---------------------------------------------------------------------------------------------------------------------
# align: where ViLT's optimal transport carries the words, as `eval.py align` found it (figure 4 of the ViLT paper).

CELL, MAIN, WORDS_A_LINE = 0.9, 1.55, 8                     # inches of a word's picture and of the caption's
FOG = (92, 96, 108)                                         # a grey that differs from bright and from dark pictures


def plot_align(args):
    def complete(found):
        return found and all(np.array(a["plan"], float).shape == (len(a["tokens"]), a["grid"][0] * a["grid"][1])
                             and {"file", "row"} <= set(a) for a in found)

    shown = spread(read_results(args.align, "`eval.py align`", complete), args.examples)
    blocks = [draw_alignment(None, a, 0, args.words) for a in shown]                                # their heights
    figure, page = open_page(0.75 + sum(blocks))
    page.text(0.2, 0.3, "Where each word is carried", size=13, weight="bold", va="center")
    page.text(0.2, 0.55, "A picture for each word: clear where optimal transport carries much of it, else in fog. "
              "Below: the share of the clearest patch.", size=9.5, color=GREY, va="center")
    y = 0.75
    for a, height in zip(shown, blocks):
        draw_alignment(page, a, y, args.words)
        y += height
    save(figure, args.out, colors=None)


def draw_alignment(page, alignment, y, words):
    """The picture, and beside it once for each word: the larger a patch's share of the word, the clearer.

    Returns its height in inches; without a page (None) it only measures.
    """
    h, w = alignment["grid"]
    main, patch = (max(1, int(DPI * side / max(h, w))) for side in (MAIN, CELL))                    # pixels of a patch
    left, pitch, line = 0.2 + MAIN + 0.25, CELL + 0.08, h * patch / DPI + 0.5
    tokens = alignment["tokens"][:words]
    height = max(0.2 + h * main / DPI, line * -(-len(tokens) // WORDS_A_LINE)) + 0.15
    if page is None:
        return height

    def picture(pixels):                                    # whole patches, as the model saw them
        return read_picture(alignment["file"], alignment["row"], lambda *_: ((w * pixels, h * pixels),) * 2)

    show(page, picture(main), 0.2, y + 0.25)
    small = picture(patch)
    for k, (token, shares) in enumerate(zip(tokens, alignment["plan"])):
        x, top = left + pitch * (k % WORDS_A_LINE), y + 0.25 + line * (k // WORDS_A_LINE)
        shares = np.array(shares).reshape(h, w)
        light = np.kron(0.15 + 0.85 * shares / max(shares.max(), 1e-9), np.ones((patch, patch)))[:, :, None]
        show(page, (light * small + (1 - light) * FOG).astype(np.uint8), x, top)
        middle, text = x + w * patch / DPI / 2, token.strip() or " "
        size = min(10, 10 * CELL / text_width(text, 10))
        page.text(middle, top - 0.06, text, size=size, ha="center", va="baseline")
        page.text(middle, top + h * patch / DPI + 0.14, f"{100 * shares.max():.0f} %", size=8, color=GREY, ha="center",
                  va="baseline")
    return height


# ---------------------------------------------------------------------------------------------------------------------
# sheet: what a fine-tuned model answered, from the examples.json of eval.py's tasks.

MARGIN, GAP, TALLEST = 0.25, 0.28, 2.17                     # inches: the page's rim, between columns, tallest picture


def plot_sheet(args):
    def complete(found):
        return isinstance(found["title"], str) and found["examples"] and all(
            {"file", "row"} <= set(e) and 1 <= len(e["images"]) <= 2 and e["right"] in (True, False, None)
            and all(isinstance(text, str) for text in (e["text"], e["answer"], e["truth"])) for e in found["examples"])

    found = read_results(args.results, "eval.py into a task's examples.json", complete)
    shown = spread(found["examples"], args.examples)
    columns = 3 if any(len(e["images"]) > 1 for e in shown) else 4
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    cards = [(e, [read_picture(e["file"], e["row"], inside(picture_width(e, width), TALLEST), column)
                  for column in e["images"]]) for e in shown]
    rows = [cards[i:i + columns] for i in range(0, len(cards), columns)]
    tops = [max(len(picture) / DPI for _, pictures in row for picture in pictures) for row in rows]
    heights = [top + max(draw_answer(None, e, 0, 0, width) for e, _ in row) for row, top in zip(rows, tops)]
    figure, page = open_page(0.65 + sum(heights))
    page.text(MARGIN, 0.34, found["title"], size=14, weight="bold", va="center")
    page.text(WIDTH - MARGIN, 0.34, score_line(shown), size=11, va="center", ha="right")
    for row, top, y in zip(rows, tops, 0.65 + np.cumsum([0, *heights])):
        for k, (example, pictures) in enumerate(row):
            x, box = MARGIN + k * (width + GAP), picture_width(example, width)
            for n, picture in enumerate(pictures):
                left, (h, w) = x + n * (width - box), picture.shape[:2]
                page.add_patch(Rectangle((left, y), box, top, color="#F1F1F1", lw=0, zorder=-1))
                show(page, picture, left + (box - w / DPI) / 2, y + (top - h / DPI) / 2)
            draw_answer(page, example, x, y + top, width)
    save(figure, args.out, colors=None)


def picture_width(example, width):
    """Inches of each of an example's pictures, side by side."""
    return (width - 0.06 * (len(example["images"]) - 1)) / len(example["images"])


def score_line(examples):
    """Of examples whose answer is known to be right or wrong, how many are right."""
    known = [e["right"] for e in examples if e["right"] is not None]
    return f"{sum(known)} of these {len(known)} right ({100 * sum(known) / len(known):.0f} %)" if known else ""


def draw_answer(page, example, x, y, width):
    """The question; below it a mark, the answer, and where that is wrong the truth.

    Returns its height in inches; without a page (None) it only measures.
    """
    right, top = example["right"], y
    color, said = {True: (GREEN, "right"), False: (VERMILLION, "wrong"), None: (INK, "")}[right]
    indent = 0 if right is None else 0.27

    def put(text, indent, size, weight="normal", color=INK):
        nonlocal y
        for line in wrap(text, width - indent, size, weight):
            y += LINE
            if page is not None:
                page.text(x + indent, y, line, size=size, weight=weight, color=color)

    y += 0.05
    put(example["text"], 0, 10)
    y += 0.06
    if page is not None and right is not None:
        draw_mark(page, right, x + 0.1, y + 0.135, color)
    put(example["answer"] or said, indent, 10.5, "bold", color)     # a picture can be the answer
    if right is False and example["truth"]:
        put(f"truth: {example['truth']}", indent, 9.5)
    return y - top + 0.35


def draw_mark(page, right, x, y, color):
    """A tick in a disc or a cross in a square, 0.2 inches wide: forms that differ, so that it reads without colours."""
    page.plot(x, y, "o" if right else "s", ms=13.5 if right else 12, color=color, mew=0)
    tick, cross = [[(-0.045, 0.004), (-0.012, 0.037), (0.048, -0.035)]], [[(-0.04, -0.04), (0.04, 0.04)],
                                                                         [(-0.04, 0.04), (0.04, -0.04)]]
    for stroke in tick if right else cross:
        page.plot(*np.add((x, y), stroke).T, color="white", lw=1.8, solid_capstyle="round", solid_joinstyle="round")


# ---------------------------------------------------------------------------------------------------------------------

def save(figure, path, colors=256):
    """Writes a PNG of 1500 dots' width. 256 colours make it half as large and look the same, but not in photographs."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI)
    plt.close(figure)
    # Without k-means colours are shared out by area: a small yellow circle came out in the orange of the bars.
    picture = Image.open(buffer).convert("RGB")
    if colors:
        picture = picture.quantize(colors, kmeans=2, dither=Image.Dither.NONE)
    picture.save(path, "PNG", optimize=True)
    print(f"wrote {path}")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, out, says):
        p = commands.add_parser(name, help=says, description=says,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("--out", default=out, help="the PNG file")
        p.set_defaults(run=run)
        return p

    p = command("masks", plot_masks, "docs/masks.png", "what each objective hides and predicts, for one caption")
    p.add_argument("--caption", default="a girl in red plays chess", help="3 to 8 words")
    p.add_argument("--rate", type=float, default=0.4, help="corruption rate of the last panel")
    p.add_argument("--prefix", type=int, default=3, help="words in the prefix")
    p.add_argument("--seed", type=int, default=7, help="of the masked word and the hidden spans")
    p = command("curves", plot_curves, "docs/curves.png", "loss and accuracy of runs, training and validation")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run directory or its metrics.jsonl")
    p.add_argument("--key", default="loss", help="what the left picture shows, such as forward_loss or lr")
    p.add_argument("--x", default="step", choices=("step", "seconds", "samples"), help="the horizontal axis")
    p = command("words", plot_words, "docs/words.png", "the table of `eval.py words` and some of its captions")
    p.add_argument("words", metavar="WORDS_JSON", help="the words.json of a run")
    p.add_argument("--examples", type=positive, default=3, help="captions of each split")
    p = command("align", plot_align, "docs/align.png", "the patches that ViLT carries each word to")
    p.add_argument("align", metavar="ALIGN_JSON", help="what `eval.py align` wrote")
    p.add_argument("--examples", type=positive, default=5, help="captions")
    p.add_argument("--words", type=positive, default=2 * WORDS_A_LINE, help="at most so many words of each caption")
    p = command("sheet", plot_sheet, "docs/sheet.png", "what a fine-tuned model answered, right or wrong")
    p.add_argument("results", metavar="EXAMPLES_JSON", help="what `eval.py vqa`, nlvr2, caption or retrieval wrote")
    p.add_argument("--examples", type=positive, default=12, help="at most so many, evenly spread")
    args = parser.parse_args(argv)
    try:
        with plt.rc_context(STYLE):
            args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    main()
