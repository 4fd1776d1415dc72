"""A model, a split of a dataset, and what the model answers to every text of it.

    run = Evaluation(args, "vqa")           # opens the checkpoint args.checkpoint and the split
    said = run.answers(function, ids)       # {"right image": {id: answer}}, by all processes
    run.write("results.json", said)         # into the folder of the results, whole or not at all
    run.report("vqa", columns, note)        # the scores, printed and written

What the commands of eval.py about datasets share. Any number of processes and any batch size give
the same answers, because each text is asked exactly once.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import data
import predict
import tasks
from batches import evaluation_batches
from released.named import beside
from storage import disk
from tasks import to_device
from training import machine
from training.loading import load
from training.settings import Settings

DEFAULT_SPLIT = {"vqa": "val", "nlvr2": "val", "caption": "test", "retrieval": "test"}
# Flags that are in the names of the files of results already, or change no result.
UNNAMED = ("data", "split", "out", "batch-size", "examples", "blank", "annotations", "statements",
           "resume", "tokenizer", "device", "fill-memory")


class Evaluation:
    """A checkpoint, the split of the data that it is asked about, and the folder of the results."""

    def __init__(self, args: argparse.Namespace, task: str):
        at_least(1, "--batch-size", args.batch_size)
        at_least(0, "--examples", args.examples)
        self.machine = machine.set_up(args.device, args.precision)
        self.say = self.machine.say
        model = predict.open_model(args.checkpoint, task, args.tokenizer)
        self.model, self.config = model.to(self.machine.device), model.config
        self.args = args
        self.split = args.split or DEFAULT_SPLIT[task]
        self.about = self.split + options_of(args)      # in the names of the files of results
        self.out = Path(args.out or beside(args.checkpoint, task))
        task_class = tasks.task_of(task, self.config)
        self.datasets = predict.choose_datasets(model, args.data, args.datasets, task_class.KIND)
        self.settings = Settings(task=task, data=args.data, datasets=self.datasets, pad_to=1,
                                 max_tokens=self.config.max_tokens)
        self.task = task_class(self.settings, self.config, model.tokenizer)
        self.task.targets = False           # other data may have other answers than the model
        self.table = self.task.table(self.settings, self.split)
        if self.table is None:
            raise predict.no_split(args.data, self.datasets, self.split, task_class.KIND)
        self.count = len(self.table.row_of)                     # number of texts
        self.files = self.table.named()

    def details(self) -> list[dict]:
        """What the table says of each text."""
        numbers = tqdm(range(self.count), "reading", unit=" texts", leave=False, delay=2,
                       disable=self.machine.rank > 0)
        return [self.table.details(number) for number in numbers]

    def unique(self, ids: list, what: str) -> list:
        """The ids themselves; ValueError if one comes twice."""
        if len(set(ids)) < len(ids):
            raise ValueError(f"{self.files}: some {what} come more than once, so no results file "
                             "is valid")
        return ids

    def answers(self, function: Callable, ids: dict) -> dict[str, dict]:
        """What the model answers -> {column heading: {id: answer}}, the same on every process.

        ids: {number of a text: its official id}, of the texts that are asked.
        function(batch, numbers) gives an answer for each text of a batch.
        With --blank there is a second column: all texts again, with black pictures. What the model
        then knows, it knows from the text alone.
        """
        images = "images" if len(self.table.IMAGES) == 2 else "image"
        blank_of = {f"right {images}": False}
        if self.args.blank:
            blank_of[f"no {images}"] = True
        columns = {}
        for heading, blank in blank_of.items():
            found = self.each(function, f"{self.settings.task}, {heading}", list(ids), blank)
            columns[heading] = {ids[number]: found[number] for number in ids}
        return columns

    @torch.no_grad()
    def each(self, function: Callable, title: str, numbers: list[int], blank: bool) -> dict:
        """{number: answer} of these texts, computed by all processes together."""
        place, tok = self.machine, self.model.tokenizer
        lengths = data.token_lengths(self.table, tok, numbers)
        batches = evaluation_batches(lengths, numbers, self.args.batch_size)
        batches = first_small(batches[place.rank::place.world])
        loader = load(self.task.dataset(self.table, train=False), batches, self.task.collate,
                      machine.loader_workers(-1, place.device), place.device)
        bar = tqdm(None, title, sum(map(len, batches)), unit=" texts", leave=False,
                   disable=place.rank > 0)
        found, unreadable, cut = {}, [], 0
        for keys, (batch, notes) in zip(batches, loader, strict=True):
            if blank:
                for name in {"image", "image_1"} & batch.keys():
                    batch[name] = torch.zeros_like(batch[name])
            here = [number for _, number in keys]
            with place.autocast():
                answers = function(to_device(batch, place.device, self.config), here)
            found.update(zip(here, answers, strict=True))
            bar.update(len(here))
            unreadable += notes["unreadable"]
            cut += notes["cut"]
        bar.close()
        if not blank:
            self.warn(unreadable, cut)
        return place.union(found)

    def warn(self, unreadable: list[str], cut: int) -> None:
        """Says how many pictures cannot be decoded (a line each) and how many texts were cut."""
        place = self.machine
        # A picture with several texts counts once.
        lines = place.union({line.partition(": ")[0]: line for line in unreadable})
        cut = sum(place.union({place.rank: cut}).values())
        if lines:
            self.say(f"{len(lines)} rows have pictures that cannot be decoded and were shown as "
                     f"black, the first: {min(lines.values())}")
        if cut:
            self.say(f"{cut} texts were cut to the {self.config.max_tokens} tokens that the model "
                     "reads")

    def write(self, name: str, contents: object) -> None:
        """Writes a file of results, text or JSON; it has its name only when it is complete."""
        if self.machine.rank > 0:
            return
        path = self.out / name
        disk.write_text(path, contents if isinstance(contents, str) else json.dumps(contents))
        self.say(f"wrote {path}")

    def report(self, title: str, columns: dict[str, dict[str, float]], note: str) -> None:
        """Prints {heading: {name: share of 1}} as a table in percent, and writes it.

        The scores of black pictures have a file of their own, so a run with --blank and one without
        leave the same scores of the right ones.
        """
        headings = "".join(f"{heading:>15}" for heading in columns)
        self.say(f"\n{f'{title} {self.split}':<22}{headings}")
        for name in next(iter(columns.values())):
            shares = "".join(f"{100 * scores[name]:>13.2f} %" for scores in columns.values())
            self.say(f"{name:<22}{shares}")
        self.say(note)
        for heading, scores in columns.items():
            name = f"{title}_{self.about}{black(heading)}_scores.json"
            self.write(name, {heading: scores})

    def sheet(self, title: str, numbers: Sequence[int], example: Callable[[int], dict]) -> None:
        """Writes --examples of these texts, evenly spread, for `tools.plot sheet`.

        Those of the last run are also called examples.json.
        example(number) -> {"answer", "truth", "right": True, False or None}, and what else differs
        """
        rows, count = [], min(self.args.examples, len(numbers))
        for number in [numbers[k * len(numbers) // count] for k in range(count)]:
            path, row = self.table.place(int(self.table.row_of[number]))
            rows.append({"file": path, "row": row, "images": list(self.table.IMAGES),
                         "text": self.table.text(number)} | example(number))
        name = f"examples_{self.about}.json"
        self.write(name, {"title": f"{title}, {self.split}", "examples": rows})
        if self.machine.rank == 0:
            disk.also_as(self.out / name, self.out / "examples.json")


def options_of(args: argparse.Namespace) -> str:
    """The flags that a run's results depend on, where they are not at their defaults.

    Such as "_beams5_precision-bf16": runs with other options write other files.
    """
    found = ""
    for flag, default, _ in args.flags:
        name = flag.rstrip("…").split()[0].strip("-")
        value = getattr(args, name.replace("-", "_"))
        if name in UNNAMED or value in (None, default):
            continue
        if isinstance(value, bool):
            value = ""
        elif not isinstance(value, int | float):
            value = "-" + (value if isinstance(value, str) else "-".join(value))
        found += f"_{name}{value}"
    return found


def black(heading: str) -> str:
    """What the files of a column about black pictures have in their names."""
    return "_black" if heading.startswith("no ") else ""


def first_small(batches: list[list]) -> list[list]:
    """Batches, the first one cut in two after two texts: so the first numbers come soon."""
    parts = [part for part in (batches[0][:2], batches[0][2:]) if part] if batches else []
    return parts + batches[1:]


def at_least(least: int, flag: str, value: int) -> None:
    """ValueError if a flag's number is smaller."""
    if value < least:
        raise ValueError(f"{flag} {value}: at least {least} is expected")
