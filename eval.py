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
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import predict
from evaluation import Evaluation, at_least, black
from layers import encode_batch_images, task_logits
from metrics import caption_scores, check_official_tools, nlvr2_scores, recall_at_k, vqa_accuracy
from predict import finite, open_model
from retrieval import Gallery, fill_scores, scores_file, texts_that_fit
from storage import disk, files
from storage.rebuilt import official_identifiers
from training import machine

# -------------------------------------------------------------------------------------------------
# VQA and NLVR2: one answer of a list for each text.

def choose(run: Evaluation, answers: list[str], ids: list) -> dict[str, dict]:
    """Of each text the answer with the highest logit -> {column heading: {id: answer}}."""
    def function(batch, numbers):
        best = finite(task_logits(run.model, batch)).argmax(-1)             # (B,)
        return [answers[k] for k in best.tolist()]
    return run.answers(function, dict(enumerate(ids)))


def vqa(args: argparse.Namespace) -> None:
    run = Evaluation(args, "vqa")
    details = run.details()
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
    run.write(f"vqa_{run.about}_results.json", results["right image"])
    if columns:
        labels = "mean soft score of the Arrow file's labels"
        truth = labels if annotations is None else f"official accuracy by {path}"
        run.report("vqa", columns, f"{run.count:,} questions; {truth}")

    def example(number):
        answer, true = chosen[ids[number]], list(truths[number])
        right = answer in true if columns else None
        return {"answer": answer, "truth": " / ".join(true[:3]), "right": right}
    run.sheet("VQA", range(run.count), example)


def soft_truth(run: Evaluation, details: dict, listed: list[str]) -> dict[str, float]:
    """{answer: soft score} of a question, from its labels in the Arrow file."""
    labels = details["labels"]
    if labels and max(labels) >= len(listed):
        raise ValueError(f"{run.files}: question {details['question_id']}: label {max(labels)} is "
                         f"past the end of the answer list, which has {len(listed)} answers")
    return {listed[label]: score for label, score in zip(labels, details["scores"], strict=True)}


def official_annotations(run: Evaluation, ids: list) -> tuple[Path, dict | None]:
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


def nlvr2(args: argparse.Namespace) -> None:
    run = Evaluation(args, "nlvr2")
    details = run.details()
    truths = [str(bool(d["label"])) for d in details]
    names = identifiers_of(run, details)
    ids = names or list(range(run.count))
    official = [{"identifier": i, "label": truth} for i, truth in zip(ids, truths, strict=True)]
    if names:
        subsets = official_subsets(run, set(names))
        nlvr2_scores([f"{i},True" for i in names], official, subsets)   # before the model is asked
    else:
        run.say(f"{run.files}: identifiers of pairs, not of statements, as in ViLT's own files. So "
                "there is accuracy alone: no consistency, and no prediction file. --statements "
                "FILE, NLVR2's official JSON lines, names the statements")

    said, columns = choose(run, ["False", "True"], ids), {}
    for heading, answer_of in said.items():
        if names:
            lines = [f"{i},{answer}" for i, answer in answer_of.items()]
            columns[heading] = nlvr2_scores(lines, official, subsets)
            if not black(heading):
                run.write(f"nlvr2_{run.about}_predictions.csv", "\n".join(lines) + "\n")
        else:
            right = [answer_of[i] == truth for i, truth in zip(ids, truths, strict=True)]
            columns[heading] = {"accuracy": sum(right) / len(right)}
    run.report("nlvr2", columns, f"{run.count:,} statements")
    chosen = said["right images"]

    def example(number):
        answer, truth = chosen[ids[number]], truths[number]
        return {"answer": answer, "truth": truth, "right": answer == truth}
    run.sheet("NLVR2", range(run.count), example)


def identifiers_of(run: Evaluation, details: list[dict]) -> list[str]:
    """The statements' official identifiers: by --statements, else the files' own; [] if unknown."""
    if run.args.statements:
        texts = list(run.table.texts())
        pairs = [d["pair"] for d in details]
        names = official_identifiers(run.args.statements, zip(pairs, texts, strict=True))
    else:
        names = [d["identifier"] for d in details]
    return [] if None in names else run.unique(names, "identifiers")


def official_subsets(run: Evaluation, known: set[str]) -> dict[str, set[str]]:
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

def official_id(name: str | int) -> int | str:
    """An image's id as COCO's tools and server want it: of a name of COCO's, the integer.

    >>> [official_id(name) for name in ("COCO_val2014_000000391895.jpg", "391895", "dog_7.jpg")]
    [391895, 391895, 'dog_7.jpg']
    """
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{12})\.jpg|(\d+)", str(name))
    return int(number[1] or number[2]) if number else name


def caption(args: argparse.Namespace) -> None:
    at_least(0, "--images", args.images)
    settings = decoding_of(args)            # before anything is read
    if args.official:
        check_official_tools()
    run = Evaluation(args, "caption")
    row_of = run.table.row_of
    firsts = np.flatnonzero(np.diff(row_of, prepend=-1)).tolist()       # of each image one caption
    firsts = firsts[:args.images or None]
    names = [official_id(run.table.cell("image_id", int(row_of[i])).as_py()) for i in firsts]
    ids = dict(zip(firsts, run.unique(names, "image ids"), strict=True))
    last = row_of[firsts[-1]]
    references = [{"image_id": ids[run.table.first_of(row)], "caption": run.table.text(number)}
                  for number, row in enumerate(row_of.tolist()) if row <= last]

    def write(batch, numbers):
        visual = encode_batch_images(run.model, batch)
        seeds = [[args.seed or 0, number] for number in numbers]
        return predict.write_captions(run.model, visual, seeds=seeds, **settings)

    said, columns = run.answers(write, ids), {}
    if run.machine.rank > 0:
        return
    for heading, caption_of in said.items():
        results = [{"image_id": name, "caption": text} for name, text in caption_of.items()]
        run.write(f"captions_{run.about}{black(heading)}_results.json", results)
        columns[heading] = caption_scores(results, {"annotations": references},
                                          official=args.official)
        del columns[heading]["per_image"]
    run.report("captions", columns, f"{len(firsts):,} images, {len(references):,} references")

    def example(number):
        return {"text": "", "answer": said["right image"][ids[number]], "truth": "", "right": None}
    run.sheet("Captions", firsts, example)


def decoding_of(args: argparse.Namespace) -> dict:
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

def retrieval(args: argparse.Namespace) -> None:
    at_least(0, "--images", args.images)
    at_least(0, "--captions", args.captions)
    run = Evaluation(args, "retrieval")
    place, dataset = run.machine, run.task.dataset(run.table, train=False)
    gallery = Gallery(run.model, dataset, args.images, args.captions)
    path = scores_file(gallery, run.out, f"scores_{run.about}", place, args.resume)
    scores = np.lib.format.open_memmap(path, "r+")                          # (N, M)
    N, M = scores.shape
    mine = range(place.rank, N, place.world)
    with place.autocast():
        at_once = args.batch_size
        if args.fill_memory:
            at_once = texts_that_fit(gallery, at_once)
            run.say(f"{at_once:,} captions at a time")
        fill_scores(gallery, scores, mine, at_once, quiet=place.rank > 0)
    scores.flush()
    # Every process has read all captions, so only the first one counts those that were cut.
    run.warn(gallery.unreadable, gallery.cut if place.rank == 0 else 0)
    if place.rank > 0:
        return
    recall = recall_at_k(scores, gallery.image_of)
    run.report("retrieval", {"recall": recall}, f"{N:,} images x {M:,} captions, "
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
def one_model(args: argparse.Namespace, task: str | None = None) -> Iterator[predict.Model]:
    """The model of a command about single pictures, on its device and in its precision."""
    place = machine.set_up(args.device, args.precision)
    model = open_model(args.checkpoint, task, args.tokenizer).to(place.device)
    with place.autocast():
        yield model


def ask(args: argparse.Namespace) -> None:
    with one_model(args, "vqa") as model:
        for answer, share in predict.ask(model, args.image, args.question, args.k):
            print(f"{100 * share:5.1f} %  {answer}")


def describe(args: argparse.Namespace) -> None:
    settings = decoding_of(args)
    with one_model(args, "caption") as model:
        print(predict.describe(model, args.image, seed=args.seed or 0, **settings))


def compare(args: argparse.Namespace) -> None:
    with one_model(args, "nlvr2") as model:
        share = predict.compare(model, args.left, args.right, args.sentence)
        print(f"{share > 0.5} ({100 * max(share, 1 - share):.1f} %)")


def search(args: argparse.Namespace) -> None:
    at_least(0, "-k", args.k)
    paths, unreadable = predict.picture_files(args.images), []
    with one_model(args, "retrieval") as model:
        found = predict.search(model, args.text, paths, unreadable)
    for line in unreadable:
        print(f"left out: {line}", file=sys.stderr)
    for path, score in found[:args.k or None]:
        print(f"{score:8.3f}  {path}")


def rank(args: argparse.Namespace) -> None:
    with one_model(args, "retrieval") as model:
        for text, score in predict.rank(model, args.image, args.texts):
            print(f"{score:8.3f}  {text}")


def fill(args: argparse.Namespace) -> None:
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
MODEL_FLAGS = [
    ("--tokenizer DIR", None, "folder of a tokenizer's files; default: the checkpoint's own"),
    ("--device NAME", None, "cpu, cuda or cuda:1; default: cuda where there is a GPU"),
    ("--precision NAME", "fp32", "of matrix products: fp32, bf16 or fp16"),
]
DATA_FLAGS = [
    ("--data DIR", REQUIRED, "folder of Arrow files; of captions also of img2dataset's .tar "
                             "files, or a quoted pattern of them; those in a folder val or test "
                             "beside them are that split"),
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
    nlvr2: ("NLVR2's accuracy and consistency, and a prediction file", [
        *DATA_FLAGS, BLANK_FLAG,
        ("--statements FILE", None, "NLVR2's official JSON lines, for identifiers that ViLT's own "
                                    "files lack; default: those of the Arrow files")]),
    caption: ("BLEU, ROUGE-L and CIDEr of written captions, and a results file", [
        *DATA_FLAGS, BLANK_FLAG,
        ("--images N", 0, "number of images, the first ones; 0: all"), *DECODING_FLAGS,
        ("--official", False, "METEOR and SPICE too, by pycocoevalcap, which needs Java")]),
    retrieval: ("recall at 1, 5 and 10, of images and of texts", [
        *DATA_FLAGS,
        ("--images N", 0, "number of images, the first ones; 0: all"),
        ("--captions N", 0, "number of captions of each image, the first ones; 0: all"),
        ("--fill-memory", False, "on a GPU, double --batch-size until its memory is used"),
        ("--resume", False, "go on where a run of the same model, data and code was interrupted")]),
    ask: ("answers a question about a picture", [
        PICTURE, ("question", None, 'such as "what is on the table?"'),
        ("-k N", 5, "number of answers")]),
    describe: ("writes a caption for a picture", [PICTURE, *DECODING_FLAGS]),
    compare: ("says whether a sentence is true of two pictures", [
        ("left", None, "a picture file"), ("right", None, "a picture file"),
        ("sentence", None, 'such as "both pictures show a dog"')]),
    search: ("puts pictures in the order in which they fit a text", [
        ("text", None, 'such as "a dog on a sofa"'),
        ("images…", None, "picture files, folders, or quoted patterns such as 'a/**/*.jpg'"),
        ("-k N", 20, "number of pictures that are shown, the best; 0: all")]),
    rank: ("puts texts in the order in which they fit a picture", [
        PICTURE, ("texts…", None, 'such as "a dog on a sofa" "a cat on a chair"')]),
    fill: ("fills the blanks of a text about a picture", [
        PICTURE, ("text", None, 'such as "a <mask> dog"')]),
}


def add_commands(parser: argparse.ArgumentParser, commands: dict) -> None:
    """Gives a parser a table of commands, all of them with a checkpoint and MODEL_FLAGS."""
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, (says, rows) in commands.items():
        p = subparsers.add_parser(function.__name__, help=says, description=says)
        p.set_defaults(run=function, flags=[*rows, *MODEL_FLAGS])
        p.add_argument("checkpoint", help=(
            "a file or folder that weights.py opens, or a name: toy (of models/), hf:OWNER/NAME"))
        for flag, default, about in [*rows, *MODEL_FLAGS]:
            add_flag(p, flag, default, about)


def add_flag(parser: argparse.ArgumentParser, flag: str, default: object, about: str) -> None:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_commands(parser, COMMANDS)
    with machine.running("eval.py"):
        args = parser.parse_args(argv)
        for name in {"text", "question", "sentence"} & vars(args).keys():
            setattr(args, name, disk.typed(getattr(args, name)))
        if "texts" in args:
            args.texts = [disk.typed(text) for text in args.texts]
        args.run(args)


if __name__ == "__main__":
    main()
