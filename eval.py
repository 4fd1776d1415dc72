"""Predictions of a dataset, their scores and submission files; and answers about single images.

    python eval.py vqa runs/toy-vqa/last.pt --data data/toy            # the official accuracy
    python eval.py nlvr2 runs/toy-nlvr2/last.pt --data data/toy        # accuracy, consistency
    python eval.py caption runs/toy-caption/last.pt --data data/toy    # BLEU, ROUGE-L, CIDEr
    torchrun --nproc_per_node 8 eval.py retrieval runs/f30k/last.pt --data data/f30k    # recall
    python eval.py ask runs/toy-vqa/last.pt photo.jpg "is it red?"     # also describe, compare, …

Results go to a folder beside the checkpoint. Any number of processes and any batch size give the
same scores, because each text is asked exactly once. What a model is asked stands in predict.py,
what the scores mean in metrics.py.
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import disk
import files
import machine
import predict
import tasks
from layers import encode_batch_images, task_logits
from metrics import caption_scores, check_official_tools, nlvr2_scores, recall_at_k, vqa_accuracy
from predict import choose_datasets, finite, no_split, open_model
from settings import Settings
from tasks import to_device

# -------------------------------------------------------------------------------------------------
# What the commands share: a model, a split of the data, and its texts dealt to the processes.

class Evaluation:
    """A checkpoint, the split of the data that it is asked about, and the folder of the results."""

    def __init__(self, args, task: str):
        at_least(1, "--batch-size", args.batch_size)
        at_least(0, "--examples", args.examples)
        self.machine = machine.set_up(args.device, args.precision)
        self.say = self.machine.say
        model = open_model(args.checkpoint, task, args.tokenizer)
        self.model, self.config = model.to(self.machine.device), model.config
        self.args = args
        self.split = args.split or DEFAULT_SPLIT[task]
        self.out = Path(args.out or Path(args.checkpoint).with_name(task))
        task_class = tasks.task_of(task, self.config)
        self.datasets = choose_datasets(model, args.data, args.datasets, task_class.KIND)
        self.settings = Settings(task=task, data=args.data, datasets=self.datasets, pad_to=1,
                                 max_tokens=self.config.max_tokens)
        self.task = task_class(self.settings, self.config, model.tokenizer)
        self.task.targets = False           # other data may have other answers than the model
        self.table = self.task.table(self.settings, self.split)
        if self.table is None:
            raise no_split(args.data, self.datasets, self.split, task_class.KIND)
        self.count = len(self.table.row_of)                     # number of texts
        self.files = ", ".join(self.table.paths)

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
        batches = data.evaluation_batches(lengths, numbers, self.args.batch_size)
        batches = batches[place.rank::place.world]
        loader = DataLoader(self.task.dataset(self.table, train=False), batch_sampler=batches,
                            collate_fn=self.task.collate,
                            num_workers=machine.loader_workers(-1, place.device),
                            worker_init_fn=machine.ignore_signals)
        bar = tqdm(loader, title, unit="batch", leave=False, disable=place.rank > 0)
        found, unreadable, cut = {}, [], 0
        for keys, (batch, notes) in zip(batches, bar, strict=True):
            if blank:
                for name in {"image", "image_1"} & batch.keys():
                    batch[name] = torch.zeros_like(batch[name])
            here = [number for _, number in keys]
            with place.autocast():
                answers = function(to_device(batch, place.device, self.config), here)
            found.update(zip(here, answers, strict=True))
            unreadable += notes["unreadable"]
            cut += notes["cut"]
        if not blank:
            self.warn(unreadable, cut)
        return place.union(found)

    def warn(self, unreadable: list[str], cut: int):
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

    def write(self, name: str, contents):
        """Writes a file of results, text or JSON; it has its name only when it is complete."""
        if self.machine.rank > 0:
            return
        path = self.out / name
        disk.write_text(path, contents if isinstance(contents, str) else json.dumps(contents))
        self.say(f"wrote {path}")

    def report(self, title: str, columns: dict[str, dict[str, float]], note: str):
        """Prints {heading: {name: share of 1}} as a table in percent, and writes it."""
        self.say(f"\n{title:<22}" + "".join(f"{heading:>15}" for heading in columns))
        for name in next(iter(columns.values())):
            shares = "".join(f"{100 * scores[name]:>13.2f} %" for scores in columns.values())
            self.say(f"{name:<22}{shares}")
        self.say(note)
        self.write(f"{title.replace(' ', '_')}_scores.json", columns)

    def sheet(self, title: str, numbers: list[int], example: Callable[[int], dict]):
        """Writes --examples of these texts, evenly spread, for `tools.plot sheet`.

        example(number) -> {"answer", "truth", "right": True, False or None}, and what else differs
        """
        rows, count = [], min(self.args.examples, len(numbers))
        for number in [numbers[k * len(numbers) // count] for k in range(count)]:
            path, row = self.table.place(int(self.table.row_of[number]))
            rows.append({"file": path, "row": row, "images": list(self.table.IMAGES),
                         "text": self.table.text(number)} | example(number))
        self.write("examples.json", {"title": f"{title}, {self.split}", "examples": rows})


def at_least(least: int, flag: str, value: int):
    """ValueError if a flag's number is smaller."""
    if value < least:
        raise ValueError(f"{flag} {value}: at least {least} is expected")


# -------------------------------------------------------------------------------------------------
# VQA and NLVR2: one answer of a list for each text.

def choose(run, answers: list[str], ids: list) -> dict[str, dict]:
    """Of each text the answer with the highest logit -> {column heading: {id: answer}}."""
    def function(batch, numbers):
        best = finite(task_logits(run.model, batch)).argmax(-1)             # (B,)
        return [answers[k] for k in best.tolist()]
    return run.answers(function, dict(enumerate(ids)))


def vqa(args):
    run = Evaluation(args, "vqa")
    details = [run.table.details(number) for number in range(run.count)]
    ids = run.unique([d["question_id"] for d in details], "question ids")
    try:
        listed = run.task.answers(run.settings)             # what the labels of the data mean
    except FileNotFoundError:
        if not run.model.answer_list:
            raise
        listed = run.model.answer_list
    answers = run.model.answer_list or listed
    if len(answers) != run.config.answers:
        raise ValueError(f"{args.checkpoint}: chooses from {run.config.answers} answers, the "
                         f"answer list has {len(answers)}")
    truths = [soft_truth(run, d, listed) for d in details]
    path, annotations = official_annotations(run, ids)

    said, columns = choose(run, answers, ids), {}
    results = {heading: [{"question_id": i, "answer": answer} for i, answer in answer_of.items()]
               for heading, answer_of in said.items()}
    for heading, answer_of in said.items():
        if annotations is not None:
            scores = vqa_accuracy(results[heading], annotations)
            shares = {name: scores[name] / 100 for name in ("overall", "yes/no", "number", "other")}
            # NaN is a type of which no question is asked.
            columns[heading] = {name: x for name, x in shares.items() if not math.isnan(x)}
        elif any(truths):
            scores = [truth.get(answer_of[i], 0.0) for i, truth in zip(ids, truths, strict=True)]
            columns[heading] = {"overall": sum(scores) / len(scores)}

    chosen = said["right image"]
    run.write(f"vqa_{run.split}_results.json", results["right image"])
    if columns:
        labels = "mean soft score of the Arrow file's labels"
        truth = labels if annotations is None else f"official accuracy by {path}"
        run.report(f"vqa {run.split}", columns, f"{run.count:,} questions; {truth}")

    def example(number):
        answer, true = chosen[ids[number]], list(truths[number])
        right = answer in true if columns else None
        return {"answer": answer, "truth": " / ".join(true[:3]), "right": right}
    run.sheet("VQA", range(run.count), example)


def soft_truth(run, details: dict, listed: list[str]) -> dict[str, float]:
    """{answer: soft score} of a question, from its labels in the Arrow file."""
    labels = details["labels"]
    if labels and max(labels) >= len(listed):
        raise ValueError(f"{run.files}: question {details['question_id']}: label {max(labels)} is "
                         f"past the end of the answer list, which has {len(listed)} answers")
    return {listed[label]: score for label, score in zip(labels, details["scores"], strict=True)}


def official_annotations(run, ids: list) -> tuple[Path, dict | None]:
    """The path and contents of --annotations, or of what prepare.py wrote beside the questions.

    The contents are None where there is no such file. ValueError if they are of other questions.
    """
    dataset, split = run.datasets[0], run.split
    name = f"{dataset}_vqa_annotations_{split}.json"
    if dataset in files.FILES["vqa"]:
        split = {"val": "rest_val", "all-val": "val"}.get(split, split)
        name = f"{dataset}_annotations_{split}.json"
    path = Path(run.args.annotations or Path(run.args.data) / name)
    if not path.is_file():
        if run.args.annotations:
            raise FileNotFoundError(f"{path}: there is no such file of annotations")
        return path, None
    annotations = disk.read_json(path)
    try:
        questions = [{"question_id": i, "answer": ""} for i in ids]
        vqa_accuracy(questions, annotations)                    # before the model is asked
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return path, annotations


def nlvr2(args):
    run = Evaluation(args, "nlvr2")
    details = [run.table.details(number) for number in range(run.count)]
    ids = run.unique([d["identifier"] for d in details], "identifiers")
    truths = [str(bool(d["label"])) for d in details]
    official = [{"identifier": i, "label": truth} for i, truth in zip(ids, truths, strict=True)]
    subsets = official_subsets(run, set(ids))
    nlvr2_scores([f"{i},True" for i in ids], official, subsets)     # before the model is asked

    said = choose(run, ["False", "True"], ids)
    lines = {heading: [f"{i},{answer}" for i, answer in answer_of.items()]
             for heading, answer_of in said.items()}
    columns = {heading: nlvr2_scores(some, official, subsets) for heading, some in lines.items()}
    chosen = said["right images"]
    run.write(f"nlvr2_{run.split}_predictions.csv", "\n".join(lines["right images"]) + "\n")
    run.report(f"nlvr2 {run.split}", columns, f"{run.count:,} statements")

    def example(number):
        answer, truth = chosen[ids[number]], truths[number]
        return {"answer": answer, "truth": truth, "right": answer == truth}
    run.sheet("NLVR2", range(run.count), example)


def official_subsets(run, known: set[str]) -> dict[str, set[str]]:
    """The identifiers of the balanced and unbalanced parts, where prepare.py wrote them."""
    subsets, split = {}, {"val": "dev", "test": "test1"}.get(run.split, run.split)
    for part in ("balanced", "unbalanced"):
        path = Path(run.args.data) / f"nlvr2_{part}_{split}.json"
        names = set(disk.read_json(path, list)) if path.is_file() else set()
        of_these_data = "nlvr2" in run.datasets or not names.isdisjoint(known)
        if not names or not of_these_data:
            continue
        missing = names - known
        if missing:
            raise ValueError(f"{path}: names {len(missing)} statements that are not in "
                             f"{run.files}, such as {min(missing)}; prepare.py --force writes both "
                             "again")
        subsets[part] = names
    return subsets


# -------------------------------------------------------------------------------------------------
# Captioning.

def caption(args):
    settings = decoding_of(args)            # before anything is read
    if args.official:
        check_official_tools()
    run = Evaluation(args, "caption")
    row_of = run.table.row_of
    firsts = np.flatnonzero(np.diff(row_of, prepend=-1)).tolist()       # of each image one caption
    names = [str(run.table.cell("image_id", int(row_of[number])).as_py()) for number in firsts]
    names = run.unique([int(name) if name.isdecimal() else name for name in names], "image ids")
    ids = dict(zip(firsts, names, strict=True))
    references = [{"image_id": ids[run.table.first_of(row)], "caption": run.table.text(number)}
                  for number, row in enumerate(row_of.tolist())]

    def write(batch, numbers):
        visual = encode_batch_images(run.model, batch)
        seeds = [[args.seed or 0, number] for number in numbers]
        return predict.write_captions(run.model, visual, seeds=seeds, **settings)

    said, columns = run.answers(write, ids), {}
    if run.machine.rank > 0:
        return
    for heading, caption_of in said.items():
        results = [{"image_id": name, "caption": text} for name, text in caption_of.items()]
        black = "" if heading == "right image" else "_black"
        run.write(f"captions_{run.split}{black}_results.json", results)
        columns[heading] = caption_scores(results, {"annotations": references},
                                          official=args.official)
        del columns[heading]["per_image"]
    sizes = f"{len(firsts):,} images, {run.count:,} references"
    run.report(f"captions {run.split}", columns, sizes)

    def example(number):
        return {"text": "", "answer": said["right image"][ids[number]], "truth": "", "right": None}
    run.sheet("Captions", firsts, example)


def decoding_of(args) -> dict:
    """The settings of predict.describe, without the seed. ValueError for a flag without effect."""
    sampled = args.top_p is not None
    for flag, value, needs, used in (
            ("--temperature", args.temperature, "--top-p", sampled),
            ("--seed", args.seed, "--top-p", sampled),
            ("--length-penalty", args.length_penalty, "--beams of more than 1", args.beams > 1)):
        if value is not None and not used:
            raise ValueError(f"{flag} {value}: changes nothing without {needs}")
    names = "max_tokens", "beams", "length_penalty", "no_repeat", "top_p", "temperature"
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


# -------------------------------------------------------------------------------------------------
# Retrieval. The head of predict.py says what is computed for each image, caption and pair.

def retrieval(args):
    at_least(0, "--images", args.images)
    at_least(0, "--captions", args.captions)
    run = Evaluation(args, "retrieval")
    place, dataset = run.machine, run.task.dataset(run.table, train=False)
    gallery = predict.Gallery(run.model, dataset, args.images, args.captions)
    path = predict.scores_file(gallery, run.out, f"scores_{run.split}", place, args.resume)
    scores = np.lib.format.open_memmap(path, "r+")                          # (N, M)
    N, M = scores.shape
    mine = range(place.rank, N, place.world)
    with place.autocast():
        predict.fill_scores(gallery, scores, mine, args.batch_size, quiet=place.rank > 0)
    scores.flush()
    # Every process has read all captions, so only the first one counts those that were cut.
    run.warn(gallery.unreadable, gallery.cut if place.rank == 0 else 0)
    if place.rank > 0:
        return
    recall = recall_at_k(scores, gallery.image_of)
    run.report(f"retrieval {run.split}", {"recall": recall}, f"{N:,} images x {M:,} captions, "
               "every pair scored. ir: the image of a text, tr: a text of an image")

    def example(number):                    # the image found for a text
        k = int(np.searchsorted(gallery.numbers, number))
        best = int(scores[:, k].argmax())
        file, row = run.table.place(int(gallery.rows[best]))
        right = bool(best == gallery.image_of[k])
        return {"file": file, "row": row, "answer": "", "truth": "", "right": right}
    run.sheet("Retrieval", gallery.numbers.tolist(), example)


# -------------------------------------------------------------------------------------------------
# Single pictures.

@contextmanager
def one_model(args, task: str | None = None):
    """The model of a command about single pictures, on its device and in its precision."""
    place = machine.set_up(args.device, args.precision)
    model = open_model(args.checkpoint, task, args.tokenizer).to(place.device)
    with place.autocast():
        yield model


def ask(args):
    with one_model(args, "vqa") as model:
        for answer, share in predict.ask(model, args.image, args.question, args.k):
            print(f"{100 * share:5.1f} %  {answer}")


def describe(args):
    settings = decoding_of(args)
    with one_model(args, "caption") as model:
        print(predict.describe(model, args.image, seed=args.seed or 0, **settings))


def compare(args):
    with one_model(args, "nlvr2") as model:
        share = predict.compare(model, args.left, args.right, args.sentence)
        print(f"{share > 0.5} ({100 * max(share, 1 - share):.1f} %)")


def search(args):
    with one_model(args, "retrieval") as model:
        for path, score in predict.search(model, args.text, args.images):
            print(f"{score:8.3f}  {path}")


def fill(args):
    with one_model(args) as model:
        text, words = predict.fill(model, args.image, args.text)
        print(text)
        for word, share in words:
            print(f"{100 * share:5.1f} %  {word}")


# -------------------------------------------------------------------------------------------------
# The command line, as tables of (flag and unit, default, what it does). Where the default is None,
# the text says what happens then.

REQUIRED = object()
UNITS = {"N": int, "X": float}              # all other units are text
DEFAULT_SPLIT = {"vqa": "val", "nlvr2": "val", "caption": "test", "retrieval": "test"}
MODEL_FLAGS = [
    ("--tokenizer DIR", None, "folder of a tokenizer's files; default: the checkpoint's own"),
    ("--device NAME", None, "cpu, cuda or cuda:1; default: cuda where there is a GPU"),
    ("--precision NAME", "fp32", "of matrix products: fp32, bf16 or fp16"),
]
DATA_FLAGS = [
    ("--data DIR", REQUIRED, "folder of Arrow files"),
    ("--datasets NAME…", None, "datasets in it; default: those that the model was trained on"),
    ("--split NAME", None, "train, val, test, …; default: val of vqa and nlvr2, test of others"),
    ("--out DIR", None, "folder of the results; default: one beside the checkpoint"),
    ("--batch-size N", 64, "texts at once in each process; changes speed and memory only"),
    ("--examples N", 24, "number of texts in examples.json, which `tools.plot sheet` shows"),
]
BLANK_FLAG = ("--blank", False, "ask everything once more with black pictures")
DECODING_FLAGS = [
    ("--max-tokens N", None, "longest caption; default: 30, or what the model has positions for"),
    ("--beams N", 1, "number of running captions of beam search; 1 is greedy decoding"),
    ("--length-penalty X", None, "beams compete by log-probability / tokens^X; default: 1"),
    ("--no-repeat N", 0, "n-grams of N tokens come at most once; 0: no such rule"),
    ("--top-p X", None, "sample from the likeliest words of total probability X; default: no"),
    ("--temperature X", None, "of sampling: logits are divided by it; default: 1"),
    ("--seed N", None, "of sampling; default: 0"),
]
PICTURE = ("image", None, "a picture file")
COMMANDS = {
    vqa: ("the official VQA accuracy, and a results file", [
        *DATA_FLAGS, BLANK_FLAG,
        ("--annotations FILE", None, "official annotations; default: those that prepare.py wrote "
                                     "beside the questions, else the labels of the Arrow files")]),
    nlvr2: ("NLVR2's accuracy and consistency, and a prediction file", [*DATA_FLAGS, BLANK_FLAG]),
    caption: ("BLEU, ROUGE-L and CIDEr of written captions, and a results file", [
        *DATA_FLAGS, BLANK_FLAG, *DECODING_FLAGS,
        ("--official", False, "METEOR and SPICE too, by pycocoevalcap, which needs Java")]),
    retrieval: ("recall at 1, 5 and 10, of images and of texts", [
        *DATA_FLAGS,
        ("--images N", 0, "number of images, the first ones; 0: all"),
        ("--captions N", 0, "number of captions of each image, the first ones; 0: all"),
        ("--resume", False, "go on where a run of the same model, data and code was interrupted")]),
    ask: ("answers a question about a picture", [
        PICTURE, ("question", None, 'such as "what is on the table?"'),
        ("-k N", 5, "number of answers")]),
    describe: ("writes a caption for a picture", [PICTURE, *DECODING_FLAGS]),
    compare: ("says whether a sentence is true of two pictures", [
        ("left", None, "a picture file"), ("right", None, "a picture file"),
        ("sentence", None, 'such as "both pictures show a dog"')]),
    search: ("puts pictures in the order in which they fit a text", [
        ("text", None, 'such as "a dog on a sofa"'), ("images…", None, "picture files")]),
    fill: ("fills the blanks of a text about a picture", [
        PICTURE, ("text", None, 'such as "a <mask> dog"')]),
}


def add_commands(parser: argparse.ArgumentParser, commands: dict):
    """Gives a parser a table of commands, all of them with a checkpoint and MODEL_FLAGS."""
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, (says, rows) in commands.items():
        p = subparsers.add_parser(function.__name__, help=says, description=says)
        p.set_defaults(run=function)
        p.add_argument("checkpoint", help="a file or folder that weights.py opens")
        for flag, default, about in [*rows, *MODEL_FLAGS]:
            add_flag(p, flag, default, about)


def add_flag(parser: argparse.ArgumentParser, flag: str, default, about: str):
    name, _, unit = flag.rstrip("…").partition(" ")
    how = {"nargs": "+"} if flag.endswith("…") else {}
    if default is False:
        how["action"], default = "store_true", "no"
    elif unit:
        how |= {"metavar": unit, "type": UNITS.get(unit, str), "required": default is REQUIRED}
        how["default"] = None if default is REQUIRED else default
    if default not in (None, REQUIRED):
        about += f"; default: {default}"
    parser.add_argument(name, help=about, **how)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser, COMMANDS)
    with machine.running("eval.py"):
        args = parser.parse_args(argv)
        args.run(args)


if __name__ == "__main__":
    main()
