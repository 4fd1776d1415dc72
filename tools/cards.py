"""Models to try: a run's weights in half precision, and a card whose scores are measured here.

    python -m tools.cards make runs/toy toy --data data/toy     # writes models/toy.safetensors, .md
    python -m tools.cards check toy --data data/toy     # do its scores hold? asks again
    python -m tools.cards show toy                      # the card of a file, as Markdown

Nobody types a score. `make` asks the very weights that it writes, by the commands that everybody
runs (tools.probe, eval.py), and keeps the answers in the file's metadata. The card is made of what
the file holds. The scores are those of the toy world, whose truth is known.
"""

import argparse
import io
import math
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import eval
import weights
from released import named
from released.card import BACKBONES, DOES, read_run, table
from released.named import locate
from storage import disk
from tools import probe
from tools.toy import judge

LARGEST = 6_000_000                 # bytes of a file
SPLITS = ("test", "holdout")
GALLERY = 100                       # pictures, and as many texts, that retrieval searches


# --------------------------------------------------------------------------------------------------
# Scores: shares of what was asked that is right, with the right picture and with others.

def measure(checkpoint: str | Path, data: str | Path, splits: tuple[str, ...] = SPLITS,
            captions: int = 2000) -> list[dict]:
    """What a model of the toy world scores on some splits of it.

    captions: at most this many are asked for their words, evenly spread over a split.
    -> [{"split", "score": its name, "asked": count, "shares": {"right image": 0.97, …}}]
    """
    task, rows = weights.read(checkpoint)["task"], []
    for split in splits:
        # The commands' own tables are not shown: the card has the numbers.
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            if task == "pretrain":
                found = words(checkpoint, data, split, captions, Path(folder))
            else:
                found = TASK_SCORES[task](checkpoint, data, split, Path(folder))
        for score, (asked, shares) in found.items():
            rows.append({"split": split, "score": score, "asked": asked, "shares": shares})
    return rows


def words(checkpoint, data, split: str, captions: int, folder: Path) -> dict:
    """Groups of words, each word hidden from the model -> {group: (count, {picture: share})}"""
    out = folder / "words.json"
    probe.main(["words", str(checkpoint), "--data", str(data), "--splits", split,
                "--captions", str(captions), "--out", str(out)])
    found = disk.read_json(out)[split]
    return {group: (found["words"][group], shares) for group, shares in found["accuracy"].items()}


def evaluate(task: str, checkpoint, data, split: str, folder: Path, *flags: str) -> dict:
    """Runs eval.py into a folder -> its scores, {column: {score: share}}"""
    eval.main([task, str(checkpoint), "--data", str(data), "--split", split, "--out", str(folder),
               *flags])
    scores = {}
    for path in sorted(folder.glob("*_scores.json"), reverse=True):     # black pictures come last
        scores |= disk.read_json(path)
    return scores


def answers(checkpoint, data, split: str, folder: Path) -> dict:
    columns = evaluate("vqa", checkpoint, data, split, folder, "--blank")
    asked = len(disk.read_json(folder / f"vqa_{split}_results.json"))
    return {"answers": (asked, {name: column["overall"] for name, column in columns.items()})}


def statements(checkpoint, data, split: str, folder: Path) -> dict:
    columns = evaluate("nlvr2", checkpoint, data, split, folder, "--blank")
    lines = (folder / f"nlvr2_{split}_predictions.csv").read_text(encoding="utf-8").splitlines()
    return {"statements": (len(lines),
                           {name: column["accuracy"] for name, column in columns.items()})}


def true_captions(checkpoint, data, split: str, folder: Path) -> dict:
    evaluate("caption", checkpoint, data, split, folder, "--blank")
    shares = {}
    for name, black in (("right image", ""), ("no image", "_black")):
        found = judge(folder / f"captions_{split}{black}_results.json", data)
        shares[name] = found["share"]
    return {"captions that are true": (found["captions"], shares)}


def found_first(checkpoint, data, split: str, folder: Path) -> dict:
    """Recall at 1 among GALLERY pictures. With black pictures it would be chance, 1 / GALLERY."""
    columns = evaluate("retrieval", checkpoint, data, split, folder, "--images", str(GALLERY),
                       "--captions", "1")
    return {f"{what} of {GALLERY}": (GALLERY, {"right image": columns["recall"][recall]})
            for what, recall in (("the picture of a text", "ir_r1"),
                                 ("the text of a picture", "tr_r1"))}


TASK_SCORES = {"vqa": answers, "nlvr2": statements, "caption": true_captions,
               "retrieval": found_first}


def differences(card: dict, found: list[dict]) -> list[str]:
    """Where a card's shares differ from newly measured ones by more than chance, in words.

    Allowed are 2.5 standard errors of what was asked now, and half a point, because processors
    round differently: 2 points at 96 % of 900 words. ValueError if the card lacks a score.
    """
    rows, lines = {(row["split"], row["score"]): row for row in card["scores"]}, []
    for row in found:
        where = row["split"], row["score"]
        if where not in rows:
            raise ValueError(f"the card has no score {where[1]!r} of split {where[0]}")
        for picture, share in row["shares"].items():
            said = rows[where]["shares"][picture]
            allowed = 2.5 * math.sqrt(said * (1 - said) / row["asked"]) + 0.005
            if abs(share - said) > allowed:
                lines.append(f"{where[0]}, {where[1]}, {picture}: {percent(said)} on the card, "
                             f"{percent(share)} of {row['asked']:,} now")
    return lines


# --------------------------------------------------------------------------------------------------
# Where a model comes from.

def history(run: Path) -> list[dict]:
    """What `read_run` says of a run and of those that it started from, the first one first."""
    described = read_run(run)
    parent, before = Path(described["settings"].get("load", "")), []
    if parent.is_file() and (parent.parent / "config.json").is_file():
        before = history(parent.parent)
    return [*before, described]


def describe(run: Path) -> dict:
    """What a card says of the training of a run, but for its scores."""
    runs = history(run)
    settings = runs[-1]["settings"]
    return {"commands": [f"python {one['command']}" for one in runs],
            "steps": [one["training"].get("step", 0) for one in runs],
            "cpu_seconds": [round(one["training"].get("cpu_seconds", 0)) for one in runs],
            "files": [Path(path).name for path in runs[-1]["files"]["train"]],
            "torch": runs[-1]["versions"]["torch"], "precision": runs[-1]["precision"],
            "seed": settings["seed"], "data": settings["data"]}


# --------------------------------------------------------------------------------------------------
# The card.

EXAMPLES = {
    "pretrain": 'fill {} picture.png "a <mask> circle above a <mask>"',
    "vqa": 'ask {} picture.png "what colour is the circle?"',
    "nlvr2": 'compare {} left.png right.png "both pictures show a star"',
    "caption": "describe {} picture.png",
    "retrieval": 'search {} "a red star" pictures/',
}
CARD = """\
# {name}

{backbone} with {parameters:,} parameters, {task}.
Its world is drawn: one to five coloured shapes on 64 x 64 pixels, and sentences about them. The
weights are stored in half precision and opened as float32.

    python eval.py {use}

## Scores

Measured with these very weights by `python -m tools.cards make`. Split test has new scenes; in
those of holdout, colours and shapes meet that never met in training.

{scores}

What a model knows without the right picture, it guesses from the text or from habit.

## Training

On {files} of {data}, seed {seed}, {precision}, torch {torch}:

{commands}

## Limits

It has seen nothing but these drawings and knows {words:,} tokens. What it says of a photograph
means nothing. It is small, to try things with in seconds. It is no measure of the method.

## How to make it again

    make models

or the commands above, then `python -m tools.cards make RUN {name} --data {data}`.

## Licence

MIT, like the code. Pictures and sentences are drawn by `tools.toy`; nothing is anybody else's.
"""


def card_of(path: Path) -> dict:
    """What a file says of its training and its scores. ValueError if it has no card."""
    card = weights.read(path).get("card")
    if not isinstance(card, dict):
        raise ValueError(f"{path}: it carries no card; python -m tools.cards make writes one")
    return card


def card_text(path: Path) -> str:
    """The card of a file, as Markdown, made of what the file holds."""
    contents, card, name = weights.read(path), card_of(path), path.stem
    task = contents["task"]
    commands = [f"    {command}    # {steps:,} steps, {seconds:,} CPU seconds"
                for command, steps, seconds in zip(card["commands"], card["steps"],
                                                   card["cpu_seconds"], strict=True)]
    return CARD.format(
        name=name, task=DOES[task][0], use=EXAMPLES[task].format(name),
        backbone=BACKBONES[contents["backbone"]],
        parameters=sum(tensor.numel() for tensor in contents["model"].values()),
        words=contents["config"]["vocab_size"], files=", ".join(card["files"]),
        scores=score_table(card["scores"]), commands="\n".join(commands),
        **{key: card[key] for key in ("data", "seed", "precision", "torch")})


def score_table(rows: list[dict]) -> str:
    """The scores as a Markdown table."""
    pictures, lines = list(rows[0]["shares"]), []
    for row in rows:
        shares = [percent(row["shares"][picture]) for picture in pictures]
        lines.append([row["split"], row["score"], *shares, f"{row['asked']:,}"])
    return table(["split", "score", *pictures, "asked"], lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --------------------------------------------------------------------------------------------------
# Commands.

def make(run: str, name: str, data: str):
    """Writes models/NAME.safetensors and models/NAME.md from a run. ValueError in a sentence."""
    if not named.NAME.fullmatch(name):
        raise ValueError(f"{name}: a name of letters, digits, - and _ is expected")
    model, card = weights.load(Path(run) / "last.pt"), describe(Path(run))
    size = 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"{run}: {size:,} bytes in half precision; a model to try has at most "
                         f"{LARGEST:,}")
    with tempfile.TemporaryDirectory() as folder:       # what is asked are the rounded weights
        halves = Path(folder) / "halves.safetensors"
        weights.save_model(halves, model, half=True)
        card["scores"] = measure(halves, data)
    path = named.MODELS / f"{name}.safetensors"
    weights.save_model(path, model, half=True, card=card)
    disk.write_text(path.with_suffix(".md"), card_text(path))
    print(score_table(card["scores"]))
    print(f"wrote {path} and {path.with_suffix('.md').name}")


def show(name: str):
    print(card_text(locate(name)), end="")


def check(name: str, data: str, captions: int, splits: tuple[str, ...] = SPLITS):
    """Measures a model's scores again. ValueError if one differs by more than chance allows."""
    path = locate(name)
    lines = differences(card_of(path), measure(path, data, splits, captions))
    if lines:
        raise ValueError(f"{name}: its card does not hold: {'; '.join(lines)}")
    print(f"{name}: what its card says holds")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.cards", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("make", help="write a run's model and its card into models/")
    p.set_defaults(command=make)
    p.add_argument("run", help="the folder of a run on the toy world, with its last.pt")
    p.add_argument("name", help="how the model is called from then on")
    p.add_argument("--data", required=True, metavar="DIR", help="folder of the toy world")
    p = commands.add_parser("check", help="measure the scores of a card again")
    p.set_defaults(command=check)
    p.add_argument("name", help="a model of models/")
    p.add_argument("--data", required=True, metavar="DIR", help="folder of the toy world")
    p.add_argument("--captions", type=int, default=2000, metavar="N", help=(
        "at most this many captions of a split are asked for their words (default 2000)"))
    p = commands.add_parser("show", help="print the card that belongs to a file")
    p.set_defaults(command=show)
    p.add_argument("name", help="a model of models/")
    args = vars(parser.parse_args(argv))
    with disk.command("cards.py"):
        args.pop("command")(**args)


if __name__ == "__main__":
    main()
