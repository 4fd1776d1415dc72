"""Pictures of single examples: what a model sees in a picture, and what it answers.

The commands `words`, `align`, `look` and `sheet` of `python -m tools.plot`.

Letters: n tokens of a text, `<s>` and `</s>` included; h x w patches of a picture.
"""

import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

import predict
from pictures import decode
from storage import disk, files
from storage.tar_index import TarCaptions, is_tar
from tools.figures import (BLUE, GREEN, GREY, INK, ORANGE, VERMILLION, open_grid, save, show)
from tools.look import look

# --------------------------------------------------------------------------------------------------
# What they share.

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
        picture = decode(encoded, reduced)                                      # (3, H, W)
    except Exception as error:                          # Pillow raises what broken bytes lead to
        print(f"{file} row {row}: {error or type(error).__name__}; shown as black")
        return np.zeros((64, 64, 3), np.uint8)
    return picture.permute(1, 2, 0).numpy()                                     # (H, W, 3)


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
        draw_in_fog(axis, picture, shares, found["tokens"][k].strip())


def draw_in_fog(axis, picture: np.ndarray, shares: np.ndarray, above: str = ""):
    """A picture, the clearer the larger a patch's share (h, w); below, the largest share."""
    h, w = shares.shape
    extent = (0, w, h, 0)
    clear = shares / max(shares.max(), 1e-9)
    show(axis, picture, above, f"{100 * shares.max():.0f} %", GREY, extent=extent)
    axis.imshow(np.full((h, w, 3), FOG, np.uint8), alpha=0.85 * (1 - clear), extent=extent,
                interpolation="nearest")


# --------------------------------------------------------------------------------------------------
# look: what a model attends to, for a picture and a text of your own.

def plot_look(args):
    model = predict.open_model(args.checkpoint, tokenizer_folder=args.tokenizer)
    found = look(model, args.image, args.text)
    output = args.of or next(iter(found.maps))
    if output not in found.maps:
        raise ValueError(f"--of {args.of}: this model has {', '.join(found.maps)}")
    maps = found.maps[output]
    rows = {f"layer {i}": layer for i, layer in enumerate(maps.layers, 1)}      # name -> (n, h, w)
    rows["rolled out"] = maps.rolled_out
    if found.transport is not None:
        rows["transport"] = found.transport
    may_read = found.may_read if output == "reconstructed" else None
    words = range(1, len(found.tokens) - 1)             # neither <s> nor </s>
    if not words:
        raise ValueError("TEXT: at least one word is expected")
    lines = [words[start:start + COLUMNS] for start in range(0, len(words), COLUMNS)]
    height = len(rows) + (may_read is not None)         # of a line, in rows of pictures
    figure, axes = open_grid(len(lines) * height, 1 + COLUMNS, 1.3)
    title = [f"{output.replace('_', ' ')}: each word's picture is clear where its row looks, else "
             "in fog.", "Below: the share of the clearest patch."]
    if may_read is not None:
        title.append("Above: the words that its query may read, in the left-to-right stream (blue) "
                     "and in the right-to-left one (orange).")
    figure.suptitle("\n".join(title), size=10, color=GREY)
    for line, some in zip(lines, np.split(axes, len(lines)), strict=True):
        if may_read is not None:
            for axis, i in zip(some[0, 1:], line, strict=False):
                draw_readable(axis, may_read[i].numpy(), found.tokens[i].strip())
            some = some[1:]
        for (name, shares), row in zip(rows.items(), some, strict=True):
            row[0].text(1, 0.5, name, ha="right", va="center", transform=row[0].transAxes)
            for axis, i in zip(row[1:], line, strict=False):
                named = may_read is None and row is some[0]
                draw_in_fog(axis, found.picture.permute(1, 2, 0).numpy(), shares[i].numpy(),
                            found.tokens[i].strip() if named else "")
    save(figure, args.out)


def draw_readable(axis, may_read: np.ndarray, above: str):
    """What a query may read of both streams, (2n,) bool, as two rows of cells without `<s>`."""
    cells = np.ones((2, len(may_read) // 2, 3))                                 # white
    for stream, color in enumerate((BLUE, ORANGE)):
        cells[stream, np.split(may_read, 2)[stream]] = to_rgb(color)
    show(axis, cells[:, 1:], above)
    axis.images[0].set(interpolation="nearest")
    axis.spines[:].set(visible=True, color=GREY)
    axis.set(aspect="auto", box_aspect=0.25, anchor="SW")


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
