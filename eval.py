"""Scores of a trained model, submission files, and answers about single pictures.

    python eval.py vqa runs/toy-vqa/last.pt --data data/toy                # the official accuracy, a results file
    python eval.py nlvr2 runs/toy-nlvr2/last.pt --data data/toy            # accuracy, consistency
    python eval.py caption runs/toy-caption/last.pt --data data/toy        # BLEU, ROUGE-L, CIDEr
    torchrun --nproc_per_node 8 eval.py retrieval runs/retrieval/last.pt --data data/f30k     # recall at 1, 5, 10
    python eval.py words runs/toy/last.pt --data data/toy                  # what does it read from the picture?
    python eval.py align runs/vilt/last.pt --data data/toy                 # ViLT: which patches does each word go to?
    python eval.py ask runs/toy-vqa/last.pt photo.jpg "what is on the table?"  # also describe, compare, search, fill

Any number of processes and any batch size give the same scores: each text is asked exactly once.
"""

import argparse
import json
import math
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import predict
import tokenizer
import weights
from data import evaluation_batches, token_lengths
from layers import encode_batch_images, task_logits
from machine import loader_workers, set_up
from metrics import caption_scores, check_official_tools, nlvr2_scores, recall_at_k, vqa_accuracy
from predict import Gallery, fill_scores
from tasks import task_of
from settings import Settings
from tasks import to_device

# ---------------------------------------------------------------------------------------------------------------------
# What the commands share: a model, a split, a function of a batch; each text exactly once, on any number of processes.

class Evaluation:
    """A checkpoint and the split of the data that it is asked about; results go to a folder beside the checkpoint."""

    def __init__(self, args, task):
        settings = Settings(task=task, data=args.data, micro_batch=args.batch_size, device=args.device, pad_to=1,
                            false_captions=0)
        for flag, least in (("batch_size", 1), ("examples", 0)):
            if getattr(args, flag) < least:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least {least} is expected")
        self.rank, self.world, self.device = set_up(settings)
        self.say = print if self.rank == 0 else lambda *a, **k: None
        self.model, self.split = open_model(args, task).to(self.device), args.split
        self.config, self.tok = self.model.config, self.model.tokenizer
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        self.task_class = task_of(task, self.config)
        self.settings = replace(settings, max_tokens=self.config.max_tokens,
                                datasets=choose_datasets(args, self.model, self.task_class.KIND))
        self.out = Path(args.out or Path(args.checkpoint).with_name(task))
        self.task = self.task_class(self.settings, self.config, self.tok)
        self.task.targets = False           # other data may have other answers than the model
        self.table = self.table_of(self.split)

    def table_of(self, split):
        table = self.task_class.table(self.settings, split)
        if table is None:
            raise no_split(self.settings.data, self.settings.datasets, split, self.task_class.KIND)
        return table

    @torch.no_grad()
    def each(self, function, what, numbers=None, blank=False):
        """function(batch, numbers) -> a value for each of the batch -> {number: value} of all texts, on every process.

        numbers: those of the texts that are asked about, by default all. blank: the pictures are black: what the model
        then knows, it knows from the text.
        """
        numbers = range(len(self.table.row_of)) if numbers is None else numbers
        batches = evaluation_batches(token_lengths(self.table, self.tok, numbers), numbers, self.settings.micro_batch)
        batches = batches[self.rank::self.world]
        loader = DataLoader(self.task.dataset(self.table, train=False), batch_sampler=batches, collate_fn=self.task.collate,
                            num_workers=loader_workers(self.settings, self.device))
        found, unreadable, cut = {}, [], 0
        for keys, (batch, notes) in zip(batches, tqdm(loader, what, unit="batch", leave=False, disable=self.rank > 0)):
            if blank:
                batch |= {name: torch.zeros_like(batch[name]) for name in ("image", "image_1") if name in batch}
            here = [i for _, i in keys]
            with self.autocast:
                found |= zip(here, function(to_device(batch, self.device, self.config), here), strict=True)
            unreadable, cut = unreadable + notes["unreadable"], cut + notes["cut"]
        if not blank:
            self.warn(unreadable, cut)
        found = self.together(found)
        return {i: found[i] for i in sorted(found)}

    def warn(self, unreadable, cut):
        """Says what the model did not see as it is: pictures that cannot be decoded (a line each), texts that were cut."""
        rows = self.together({line.partition(": ")[0]: line for line in unreadable})    # a picture with many texts once
        cut = sum(self.together({self.rank: cut}).values())
        if rows:
            self.say(f"{len(rows)} rows have pictures that cannot be decoded and were shown as black, the first: "
                     f"{min(rows.values())}")
        if cut:
            self.say(f"{cut} texts were cut to the {self.config.max_tokens} tokens that the model reads")

    def together(self, found):
        """The union of all processes' dicts, on each of them."""
        if self.world == 1:
            return found
        parts = [None] * self.world
        dist.all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    def write(self, name, contents):
        """Writes a file of results, whole or not at all."""
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            path, partial_path = self.out / name, self.out / (name + ".partial")
            partial_path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
            partial_path.replace(path)
            print(f"wrote {path}")

    def report(self, title, columns, note):
        """columns: {heading: {name: share}}, printed as a table in percent, and written."""
        self.say(f"\n{title:<22}" + "".join(f"{name:>15}" for name in columns))
        for row in next(iter(columns.values())):
            self.say(f"{row:<22}" + "".join(f"{100 * scores[row]:>13.2f} %" for scores in columns.values()))
        self.say(note)
        self.write(f"{title.replace(' ', '_')}_scores.json", columns)

    def sheet(self, title, examples):
        """Writes examples for `plot.py sheet`: (text number, answer, truth, right, and what else differs)."""
        rows = []
        for i, answer, truth, right, more in examples:
            path, row = self.table.place(int(self.table.row_of[i]))
            rows.append({"file": path, "row": row, "images": list(self.table.IMAGES), "text": self.table.text(i),
                         "answer": answer, "truth": truth, "right": None if right is None else bool(right)} | more)
        self.write("examples.json", {"title": title, "examples": rows})


def open_model(args, task=None):
    """The checkpoint's model with its tokenizer; ValueError for one that cannot do the task."""
    model = weights.load(args.checkpoint)
    c, tok = model.config, model.tokenizer
    able = {None: True, "pretrain": c.head == "vocab", "caption": model.task == "caption",
            "retrieval": c.head == "retrieval" or c.itm}
    if not able.get(task, c.head == task):
        others = " (or one pretrained with image-text matching, --itm)" if task == "retrieval" else ""
        raise ValueError(f"{args.checkpoint}: a model of task {model.task} with head {c.head}; needed is what train.py "
                         f"--task {task} --load {args.checkpoint} makes{others}")
    if tok is None:
        if not args.tokenizer:
            raise ValueError(f"{args.checkpoint} carries no tokenizer: --tokenizer DIR must name the directory of its files")
        tok = model.tokenizer = tokenizer.load(args.tokenizer)
    if model.task == "caption":             # <bos> and <eos> come last, and in a released file's tokenizer not at all
        task_of("caption", c).add_special_tokens(tok)
    if len(tok) > c.vocab_size or model.task == "caption" and len(tok) < c.vocab_size:
        raise ValueError(f"{args.tokenizer or args.checkpoint}: a tokenizer of {len(tok)} tokens; the model knows "
                         f"{c.vocab_size}")
    return model


def choose_datasets(args, model, kind):
    """The datasets that are meant: those of --datasets, else those that the model was trained on, else the only one."""
    if args.datasets:
        return tuple(args.datasets)
    known = list(data.splits_of(args.data, kind)) or data.known_datasets(args.data, kind)       # (says that there are none)
    trained = tuple(name for name in model.about["datasets"] or () if name in known)
    if not trained and len(known) > 1:
        raise ValueError(f"{args.data}: --datasets must name one of {', '.join(known)}")
    return trained or tuple(known)


def no_split(directory, datasets, split, kind="caption"):
    splits = data.splits_of(directory, kind)
    there = "; ".join(f"{name} has {', '.join(splits.get(name, ())) or 'none'}" for name in datasets)
    return FileNotFoundError(f"{directory}: no {kind} files of split {split!r}: {there}")


def spread(count, some):
    """At most `some` of range(count), evenly spread."""
    return [k * count // min(some, count) for k in range(min(some, count))]


def headings(args, singular="right image"):
    """What is shown: the pictures, and on request black ones instead -> [(heading, whether black)]"""
    return [(singular, False)] + ([(singular.replace("right", "no"), True)] if args.blank else [])


# ---------------------------------------------------------------------------------------------------------------------
# VQA and NLVR2.

def vqa(args):
    run = Evaluation(args, "vqa")
    details = [run.table.details(i) for i in range(len(run.table.row_of))]
    if len({d["question_id"] for d in details}) != len(details):
        raise ValueError(f"{', '.join(run.table.paths)}: some question ids come more than once, so no results file is valid")
    try:
        listed = run.task_class.answers(run.settings)       # what the data's labels mean; the model may have other answers
    except FileNotFoundError:
        if not run.model.answer_list:
            raise
        listed = run.model.answer_list
    answers = run.model.answer_list or listed
    if len(answers) != run.config.answers:
        raise ValueError(f"{args.checkpoint}: chooses from {run.config.answers} answers, the answer list has {len(answers)}")
    path = Path(args.annotations or annotations_path(run))
    if args.annotations and not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of annotations")
    annotations = data.read_json(path) if path.is_file() else None
    if annotations is not None:
        try:
            vqa_accuracy({d["question_id"]: "" for d in details}, annotations)      # a question too many: found out now
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for d in details:
        if d["labels"] and max(d["labels"]) >= len(listed):
            raise ValueError(f"{', '.join(run.table.paths)}: question {d['question_id']}: label {max(d['labels'])} is past "
                             f"the end of the answer list, which has {len(listed)} answers")
    truths = [{listed[label]: score for label, score in zip(d["labels"], d["scores"])} for d in details]
    columns, chosen = {}, None
    for name, blank in headings(args):
        labels = run.each(lambda batch, _: task_logits(run.model, batch).argmax(-1).tolist(), f"vqa, {name}", blank=blank)
        said = {details[i]["question_id"]: answers[label] for i, label in labels.items()}       # each question once
        chosen = said if chosen is None else chosen
        if annotations:
            scores = vqa_accuracy(said, annotations)
            columns[name] = {kind: scores[kind] / 100 for kind in ("overall", "yes/no", "number", "other")
                             if not math.isnan(scores[kind])}               # a type of which no question is asked
        elif any(truths):
            scores = [truth.get(answers[labels[i]], 0.0) for i, truth in enumerate(truths)]
            columns[name] = {"overall": sum(scores) / len(scores)}
    run.write(f"vqa_{args.split}_results.json", [{"question_id": q, "answer": a} for q, a in chosen.items()])
    if columns:
        run.report(f"vqa {args.split}", columns, f"{len(details):,} questions; " + (
            f"official accuracy by {path}" if annotations else "mean soft score of the Arrow file's labels"))
    shown = [(i, chosen[details[i]["question_id"]], list(truths[i]))
             for i in spread(len(details), args.examples)]
    run.sheet(f"VQA, {args.split}", [(i, answer, " / ".join(true[:3]), answer in true if columns else None, {})
                                     for i, answer, true in shown])


def annotations_path(run):
    """Where prepare.py puts the annotations of a split, in the official layout."""
    name = (run.settings.datasets or data.known_datasets(run.settings.data, "vqa"))[0]
    if name in data.FILES["vqa"]:
        return Path(run.settings.data) / f"{name}_annotations_{ {'val': 'rest_val', 'all-val': 'val'}.get(run.split, run.split)}.json"
    return Path(run.settings.data) / f"{name}_vqa_annotations_{run.split}.json"


def nlvr2(args):
    run = Evaluation(args, "nlvr2")
    details = [run.table.details(i) for i in range(len(run.table.row_of))]
    examples = [{"identifier": d["identifier"], "label": str(bool(d["label"]))} for d in details]
    known, subsets, official = {e["identifier"] for e in examples}, {}, {"val": "dev", "test": "test1"}.get(args.split)
    if len(known) != len(examples):
        raise ValueError(f"{', '.join(run.table.paths)}: some identifiers come more than once, so no prediction file is valid")
    for part in ("balanced", "unbalanced"):
        path = Path(args.data) / f"nlvr2_{part}_{official}.json"
        names = set(data.read_json(path, list)) if path.is_file() else set()
        if names & known or "nlvr2" in run.settings.datasets:               # else they are not these data's
            if missing := names - known:
                raise ValueError(f"{path}: names {len(missing)} statements that are not in {', '.join(run.table.paths)}, "
                                 f"such as {min(missing)}; prepare.py --force writes both anew")
            subsets |= {part: names} if names else {}
    nlvr2_scores({name: True for name in known}, examples, subsets)         # what cannot be scored is found out now
    columns, chosen = {}, None
    for name, blank in headings(args, "right images"):
        labels = run.each(lambda batch, _: task_logits(run.model, batch).argmax(-1).tolist(), f"nlvr2, {name}", blank=blank)
        said = {examples[i]["identifier"]: str(bool(label)) for i, label in labels.items()}
        columns[name] = nlvr2_scores(said, examples, subsets)
        if chosen is None:
            chosen = said
            run.write(f"nlvr2_{args.split}_predictions.csv", "".join(f"{key},{value}\n" for key, value in said.items()))
    run.report(f"nlvr2 {args.split}", columns, f"{len(details):,} statements")
    shown = [(i, chosen[examples[i]["identifier"]], examples[i]["label"]) for i in spread(len(details), args.examples)]
    run.sheet(f"NLVR2, {args.split}", [(i, answer, true, answer == true, {}) for i, answer, true in shown])


# ---------------------------------------------------------------------------------------------------------------------
# Captioning.

def caption(args):
    decoding_of(args, [])           # what makes no sense is said before anything is read
    if args.official:
        check_official_tools()
    run = Evaluation(args, "caption")
    firsts = np.flatnonzero(np.diff(run.table.row_of, prepend=-1)).tolist()         # the first caption of every image
    names = [run.table.cell("image_id", int(run.table.row_of[i])).as_py() for i in firsts]
    ids = dict(zip(firsts, (int(name) if name.isdecimal() else name for name in names)))
    if len(set(ids.values())) != len(firsts):
        raise ValueError(f"{', '.join(run.table.paths)}: some image ids come more than once, so no results file is valid")
    references, of_row = {}, {int(run.table.row_of[i]): name for i, name in ids.items()}
    for i, row in enumerate(run.table.row_of.tolist()):
        references.setdefault(of_row[row], []).append(run.table.text(i))

    def describe(batch, numbers):
        how = decoding_of(args, [[args.seed or 0, i] for i in numbers])
        return predict.write_captions(run.model, encode_batch_images(run.model, batch), **how)

    said_of = {name: {ids[i]: text for i, text in run.each(describe, f"captions, {name}", firsts, blank).items()}
               for name, blank in headings(args)}
    if run.rank > 0:
        return
    chosen, columns = next(iter(said_of.values())), {}
    run.write(f"captions_{args.split}_results.json", [{"image_id": i, "caption": text} for i, text in chosen.items()])
    for name, said in said_of.items():
        columns[name] = caption_scores(said, references, official=args.official)
        del columns[name]["per_image"]
    run.report(f"captions {args.split}", columns, f"{len(firsts):,} images, {len(run.table.row_of):,} references")
    shown = [firsts[k] for k in spread(len(firsts), args.examples)]
    run.sheet(f"Captions, {args.split}", [(i, chosen[ids[i]], "", None,
                                           {"text": ""}) for i in shown])


def decoding_of(args, seeds):
    """The arguments of predict.write_captions; ValueError for a flag that would change nothing."""
    sampled = args.top_p is not None
    for flag, needs, used in (("temperature", "--top-p", sampled), ("seed", "--top-p", sampled),
                              ("length_penalty", "--beams of more than 1", args.beams > 1)):
        if getattr(args, flag) is not None and not used:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: changes nothing without {needs}")
    how = dict(max_tokens=args.max_tokens, beams=args.beams, no_repeat=args.no_repeat)
    if args.beams > 1:
        how["length_penalty"] = 1.0 if args.length_penalty is None else args.length_penalty
    if sampled:
        how |= dict(top_p=args.top_p, temperature=1.0 if args.temperature is None else args.temperature, seeds=seeds)
    return how


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval.

def retrieval(args):
    for flag in ("images", "captions"):
        if getattr(args, flag) < 0:
            raise ValueError(f"--{flag} {getattr(args, flag)}: 0 or more is expected")
    run = Evaluation(args, "retrieval")

    def gallery(table, images, captions):
        """-> the Gallery of a table's first images with so many captions each (0: all), and the image of each caption."""
        rows = np.unique(table.row_of)[:images or None]
        place = np.arange(len(table.row_of)) - np.searchsorted(table.row_of, table.row_of)      # in its image's list
        numbers = np.flatnonzero((table.row_of <= rows[-1]) & (place < (captions or 10 ** 9)))
        dataset = run.task.dataset(table, train=False)
        return Gallery(run.model, dataset, rows, numbers.tolist(), run.device), np.searchsorted(rows, table.row_of[numbers])

    shown, image_of = gallery(run.table, args.images, args.captions)
    # The scores are a file, so that an interrupted run goes on; its name says of what they are: other weights or other
    # data, other name.
    size = len(shown.rows), len(shown.numbers)
    sources = [(Path(p).name, Path(p).stat().st_mtime_ns) for p in (args.checkpoint, *run.table.paths)]
    stamp = zlib.crc32(repr((sources, args.precision)).encode())
    path = run.out / f"scores_{args.split}_{size[0]}x{size[1]}_{stamp:08x}.npy"
    if run.rank == 0 and not path.is_file():
        run.out.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        np.lib.format.open_memmap(fresh, "w+", np.float32, size)[:] = np.nan
        fresh.replace(path)
    if run.world > 1:
        dist.barrier()
    scores = np.lib.format.open_memmap(path, "r+")
    with run.autocast:
        fill_scores(shown, scores, range(run.rank, size[0], run.world), args.batch_size, run.rank > 0)
    scores.flush()
    run.warn(shown.unreadable, shown.cut if run.rank == 0 else 0)       # (all read all captions); all wait for all here
    if run.rank == 0:
        for old in run.out.glob("scores_*.npy"):        # of other weights or data
            if re.fullmatch(rf"scores_{re.escape(args.split)}_\d+x\d+_(?!{stamp:08x})\w+\.npy", old.name):
                old.unlink()
        run.report(f"retrieval {args.split}", {"recall": recall_at_k(scores, image_of)},
                   f"{size[0]:,} images x {size[1]:,} captions, every pair scored. ir: the image of a text, tr: a text of an image")
        found = [(k, int(scores[:, k].argmax())) for k in spread(size[1], args.examples)]
        run.sheet(f"Retrieval, {args.split}: the image found for a text", [
            (shown.numbers[k], "", "", best == image_of[k], dict(zip(("file", "row"), run.table.place(int(shown.rows[best])))))
            for k, best in found])


# ---------------------------------------------------------------------------------------------------------------------
# Single pictures.

def ask(args):
    model = open_model(args, "vqa")
    if not model.answer_list:
        raise ValueError(f"{args.checkpoint} carries no answer list: weights.py convert --answers FILE puts one in")
    for answer, share in predict.ask(model, args.image, args.question, args.k):
        print(f"{100 * share:5.1f} %  {answer}")


def describe(args):
    model = open_model(args, "caption")
    how = decoding_of(args, [args.seed or 0])
    with torch.no_grad():
        print(predict.write_captions(model, predict.look_at(model, [args.image]), **how)[0])


def compare(args):
    model = open_model(args, "nlvr2")
    share = predict.compare(model, args.left, args.right, args.sentence)
    print(f"{share > 0.5} ({100 * max(share, 1 - share):.1f} %)")


def search(args):
    model = open_model(args, "retrieval")
    for path, score in predict.search(model, args.text, args.images):
        print(f"{score:8.3f}  {path}")


def fill(args):
    text, words = predict.fill(open_model(args), args.image, args.text)
    print(text)
    for word, share in words:
        print(f"{100 * share:5.1f} %  {word}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, says, split=None):
        p = commands.add_parser(function.__name__, help=says, description=says,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        p.add_argument("checkpoint")
        p.add_argument("--tokenizer", help="directory of vocab.json and merges.txt, or vocab.txt; for files that carry none")
        p.set_defaults(run=function)
        if split:
            p.add_argument("--data", required=True, help="directory of Arrow files")
            p.add_argument("--datasets", nargs="*", default=(), help="names of datasets in it; default: what was trained on")
            p.add_argument("--split", default=split)
            p.add_argument("--out", help="folder of the results; default: one beside the checkpoint")
            p.add_argument("--batch-size", type=int, default=64, help="of one process")
            p.add_argument("--device", default="", help="cpu, cuda; default: cuda where there is one")
            p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products")
            p.add_argument("--examples", type=int, default=24, help="texts that are kept for plot.py sheet")
            if function is not retrieval:
                p.add_argument("--blank", action="store_true", help="ask once more with black pictures")
        return p

    def decoding(p):
        p.add_argument("--max-tokens", type=int, help="default: 30, or as many as the model has positions for")
        p.add_argument("--beams", type=int, default=1, help="1: greedy")
        p.add_argument("--length-penalty", type=float, help="of beam search; default: 1")
        p.add_argument("--no-repeat", type=int, default=0, help="n-grams of this size come once at most; 0: no such rule")
        p.add_argument("--top-p", type=float, help="sample from the likeliest words of this probability together")
        p.add_argument("--temperature", type=float, help="of sampling; default: 1")
        p.add_argument("--seed", type=int, help="of sampling; default: 0")

    p = command(vqa, "the official VQA accuracy, and a results file", "val")
    p.add_argument("--annotations", help="official annotations; default: those that prepare.py wrote beside the questions")
    command(nlvr2, "NLVR2's accuracy and consistency, and a prediction file", "val")
    p = command(caption, "BLEU, ROUGE-L and CIDEr of written captions, and a results file", "test")
    p.add_argument("--official", action="store_true", help="METEOR and SPICE too, by pycocoevalcap, which needs Java")
    decoding(p)
    p = command(retrieval, "recall at 1, 5 and 10, of images and of texts", "test")
    p.add_argument("--images", type=int, default=0, help="the first so many; 0: all")
    p.add_argument("--captions", type=int, default=0, help="at most so many of each image; 0: all")
    p = command(ask, "answers a question about a picture")
    p.add_argument("image")
    p.add_argument("question")
    p.add_argument("-k", type=int, default=5, help="so many answers")
    p = command(describe, "writes a caption for a picture")
    p.add_argument("image")
    decoding(p)
    p = command(compare, "is a sentence true of two pictures?")
    p.add_argument("left")
    p.add_argument("right")
    p.add_argument("sentence")
    p = command(search, "puts pictures in the order in which they fit a text")
    p.add_argument("text")
    p.add_argument("images", nargs="+")
    p = command(fill, "fills the blanks of a text about a picture")
    p.add_argument("image")
    p.add_argument("text", help='such as "a <mask> dog"')
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
