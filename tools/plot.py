"""Pictures: what each objective hides and predicts, how runs learn, what models see and answer.

    python -m tools.plot masks --out docs/masks.png                    # the README's first picture
    python -m tools.plot curves runs/toy runs/mlm --x seconds --out docs/curves.png
    python -m tools.plot words runs/toy/words.json --out docs/words.png
    python -m tools.plot align runs/vilt/align.json --out docs/align.png
    python -m tools.plot look runs/toy/last.pt photo.jpg "a red star above a ring" --out look.png
    python -m tools.plot sheet runs/toy-vqa/vqa/examples.json --out docs/toy_vqa.png

`words` and `align` show what `python -m tools.probe` found, `sheet` what eval.py's tasks answered,
`look` where a model looks when it reads a text with a picture (look.py).
They are drawn in plot_examples.py, the others here.

Letters: n tokens of a caption, `<s>` and `</s>` included.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb

import data
import flm
import masks
from storage import disk
from tools.figures import (BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, STYLE, VERMILLION,
                           WIDTH, save)
from tools.plot_examples import COLUMNS, plot_align, plot_look, plot_sheet, plot_words

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
    rng = np.random.default_rng(seed)
    return [draw_objective("mlm", words, rng, flm.Config.mask_rate),
            draw_objective("ar", words, rng),
            draw_objective("prefix", words, rng, prefix=prefix),
            draw_objective("flm", words, rng),
            draw_objective("flm", words, rng, rate)]


def draw_objective(objective: str, words: Sequence[str], rng: np.random.Generator,
                   rate: float = 0.0, prefix: int = 0) -> Panel:
    """One objective's masks for a caption.

    rate: the share of the words that mlm masks, or that flm hides from each query; with 0, that is
    the query's own word alone. prefix: the number of words in prefix's prefix.
    """
    n = len(words) + 2
    real = torch.ones(1, n, dtype=torch.bool)
    if objective == "flm":
        title, says, spans = "FLM", "every word, from both sides", ()
        if rate:
            title, says = "FLM, larger spans", "every word, with more hidden around it"
            ends = masks.draw_spans(n, n, rate, rng)
            spans = [torch.from_numpy(end)[None] for end in ends]                   # (1, n) each
        seen = masks.reconstructor_mask(real, *spans)[0].numpy()                    # (n, 2n)
        return Panel(title, says, seen[:, :n], seen[:, n:], targets(objective, n))

    masked = []
    if objective == "mlm":
        ids = np.arange(n) + 10                         # any ids: only the positions matter
        _, picked = data.mask_words(ids, [True] * len(words), rate, 4, ids, rng)
        masked = picked.tolist()
        title, says, mask = "MLM", "masked words, from both sides", masks.bidirectional_mask(real)
    elif objective == "ar":
        title, says, mask = "AR", "every next word, from the left", masks.left_to_right_mask(real)
    else:
        title, says = "Prefix", "every next word after a prefix"
        mask = masks.prefix_mask(real, torch.tensor([prefix]))
    seen = mask[0].numpy().copy()                                                   # (n, n)
    seen[:, masked] = False                             # the column is read, but its word is gone
    before = np.tril(np.ones((n, n), bool))             # row i's own column counts as its left
    if objective == "mlm":
        asked = {i: i for i in masked}
    else:
        asked = targets(objective, n, prefix if objective == "prefix" else 0)
    return Panel(title, says, seen & before, seen & ~before, asked, masked)


def targets(objective: str, n: int, prefix: int = 0) -> dict[int, int]:
    """Row -> the position that it predicts, of FLM's queries or of the only stream of others."""
    output = "reconstructed" if objective == "flm" else "left_to_right"
    rows = masks.predicting_rows(objective, n, prefix)[output]
    return {row: row + masks.SHIFT[output] for row in rows}


def plot_masks(args):
    words = args.caption.split()
    if not 3 <= len(words) <= 8:
        raise ValueError(f"--caption of {len(words)} words: 3 to 8 fit in the picture")
    if not 0 < args.rate <= 1:
        raise ValueError(f"--rate {args.rate}: a share above 0 and up to 1 is expected")
    if not 1 <= args.prefix < len(words):
        raise ValueError(f"--prefix {args.prefix}: 1 to {len(words) - 1} words are expected")
    save(masks_figure(words, args.rate, args.prefix, args.seed), args.out)


def masks_figure(words: Sequence[str], rate: float = 0.4, prefix: int = 3, seed: int = 7):
    """The figure of `draw_panels`, with a key."""
    n = len(words) + 2
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 7.6))
    figure.subplots_adjust(left=0.065, right=0.985, top=0.86, bottom=0.083, wspace=0.3, hspace=0.76)
    for axis in axes.flat:
        axis.set(xlim=(0, n), ylim=(n, 0))              # one unit is a cell, row 0 on top
        axis.axis("off")
    panels = draw_panels(words, rate, prefix, seed)
    for axis, panel in zip(axes.flat[:5], panels, strict=True):
        draw_panel(axis, panel, ["<s>", *words, "</s>"])
    draw_key(axes.flat[5], n)
    return figure


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
    if mark:
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
    add = command("look", plot_look, "where each word of a text looks in a picture")
    add("checkpoint", metavar="CHECKPOINT", help="any model of FLM or ViLT")
    add("image", metavar="IMAGE", help="picture file")
    add("text", metavar="TEXT", help="text about it, which may hold <mask>")
    add("--of", metavar="OUTPUT", help="reconstructed (FLM's queries; the words of MLM and ViLT), "
        "left_to_right or right_to_left (the streams); default: the first that there is")
    add("--tokenizer", metavar="DIR", default="", help="tokenizer, for files that carry none")
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
