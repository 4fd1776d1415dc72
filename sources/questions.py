"""The sources of questions and statements: VQAv2, NLVR2, and your own data in the same form.

Answer list: the majority answers of train and val that occur at least 9 times, in order of
appearance, normalised as the official evaluation does. The position of an answer is its label.
VQAv2 has 3,129; one is the empty string, since "the" and "a" normalise to it. (ViLT's normalisation
does not strip blanks first; the two agree on 12,000 real answers.)

Soft scores: an answer of the list that n of ten annotators gave scores 0, 0.3, 0.6, 0.9, 1 for
n = 0, 1, 2, 3, 4 or more. Fewer than ten annotators are repeated in turn until they are ten.

--labels normalized (default) counts answers as the official accuracy compares them, so a score is
what the official evaluation gives. It normalises them, except where all ten wrote the same: if that
is "one way", then "1 way" is wrong. --labels raw counts them as typed, as ViLT, METER and FLM do:
"Yes" or "2 " then has no label. On 57,038 questions of VQAv2, 602 (1.06 %) differ.

The training files (train, trainable_val) leave out questions without an answer of the list, and
questions and statements without their pictures, since they teach nothing. The other files keep
both, since the official score counts every question. (ViLT drops the first there too.) In place of
a picture that cannot be read, they hold what bytes there are.
"""

import os
import re
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from metrics import normalize_answer, one_line, soft_score
from sources.shards import (Record, Shard, expecting, fail, first_existing, inside, json_lines,
                            json_list, read_entries, simple, strings)
from storage.disk import one_writer, read_json, remove_partials, shortened
from storage.tars import SURROGATE, unusable

# rest_val is the last images of val by their ids, at most half of them; the checkpoint is chosen by
# it. trainable_val is the others. (ViLT takes the last 1,000 after shuffling, so that no two of its
# users have the same.)
REST = 1000
normalized = cache(normalize_answer)        # most of VQAv2's 6.6 million answers repeat others


class Annotation(NamedTuple):
    """What people answered to one question."""
    majority: str                           # the official multiple_choice_answer
    answers: list[str]                      # of each annotator, as typed
    answer_type: str                        # "yes/no", "number", "other"
    question_type: str


class Question(NamedTuple):
    question_id: int
    text: str
    annotation: Annotation | None           # None if nobody was asked
    note: str = ""                          # why a part of it is left out


class Split(NamedTuple):
    images: dict[int, list[Question]]       # by image_id
    annotations: list[Annotation]           # all, in the order of their file
    pictures: dict[int, Path]               # by image_id
    folder: Path                            # the paths of the logs begin here


def is_training(split: str) -> bool:
    return split.startswith("train")        # train, trainable_val


def whole(value: object) -> int:
    """An id: a number or its digits. ValueError or TypeError if no Arrow column can hold it."""
    if isinstance(value, (bool, float)) or not 0 <= int(value) < 2 ** 63:
        raise ValueError
    return int(value)


# --------------------------------------------------------------------------------------------------
# VQA: answers -> labels and soft scores.

def ten(answers: list) -> list:
    """The answers of at least ten annotators; fewer are repeated in turn.

    >>> Counter(ten(["red", "pink", "red"]))
    Counter({'red': 7, 'pink': 3})
    """
    return [answers[i % len(answers)] for i in range(max(10, len(answers)))]


def answer_list(annotations: Iterable[Annotation], at_least: int) -> list[str]:
    """The normalised majority answers that occur at_least times, in order of appearance."""
    counts = Counter(normalized(annotation.majority) for annotation in annotations)
    return [answer for answer, count in counts.items()
            if count >= at_least and not SURROGATE.search(answer)]


def soft_labels(answers: list, label_of: dict, raw: bool = False) -> tuple[list[int], list[float]]:
    """Annotators' answers -> (labels of those in the list, in order of appearance; their scores)

    raw: answers are counted as typed.

    >>> soft_labels(["blue"] * 7 + ["Navy", "the sky", "navy."], {"navy": 0, "blue": 1})
    ([1, 0], [1.0, 0.6])
    """
    counted = ten(answers)
    if not raw:
        counted = list(map(one_line, counted))
        if len(set(counted)) > 1:       # the official accuracy leaves a unanimous answer as it is
            counted = list(map(normalized, counted))
    counts = Counter(counted)
    known = [answer for answer in counts if answer in label_of]
    return [label_of[answer] for answer in known], [soft_score(counts[answer]) for answer in known]


def read_answers(path: Path) -> list[str]:
    """An answer list: a JSON list of different strings."""
    with expecting(path, "a JSON list of different strings"):
        answers = read_json(path, list)
        if not answers or len(set(answers)) < len(answers):
            raise ValueError
    return answers


def choose_answers(prefix: str, splits: dict[str, Split], args: Namespace) -> list[str]:
    """The answer list of this run, which is also written beside the Arrow files.

    Finished files must have been made with the same list.
    """
    if args.answers:
        answers = read_answers(args.answers)
    else:
        asked = [name for name, split in splits.items() if split.annotations]
        # The answers of test stay unseen, unless there are no others.
        names = [name for name in asked if not name.startswith("test")] or asked
        annotations = (one for name in names for one in splits[name].annotations)
        answers = answer_list(annotations, args.at_least)
        if not asked:
            return []
        if not answers:
            fail(f"{args.root}: no answer is the majority's at least {args.at_least} times; "
                 "--at-least lowers that")
    path = args.out / f"{prefix}_answers.json"
    args.locks.enter_context(one_writer(args.out / f".{path.name}.lock", str(path)))
    remove_partials(args.out, path.name)
    finished = sorted(args.out.glob(f"{prefix}_*.arrow"))
    if finished and not args.force and not (path.exists() and read_answers(path) == answers):
        fail(f"{path} is not the answer list of this run, and {finished[0].name} was made with it; "
             "use another --out, or --force to write all files again")
    with json_list(path) as append:
        append(*answers)
    print(f"{path}: {len(answers):,} answers")
    return answers


# --------------------------------------------------------------------------------------------------
# VQA: questions -> one row per image.

def problem(question: Question, needs_annotation: bool) -> str:
    """Why a question is left out of its split; "" if it is not."""
    if unusable(question.text, "question"):
        return unusable(question.text, "question")
    if question.annotation is None:
        return "question without an annotation" if needs_annotation else ""
    if not any(map(str.strip, question.annotation.answers)):
        return "question with empty answers"
    return ""


def official_entry(image_id: int, question: Question) -> dict:
    """The answers to a question as the official score wants them."""
    annotation = question.annotation
    return {"question_id": question.question_id,
            "image_id": image_id,
            "question_type": annotation.question_type,
            "answer_type": annotation.answer_type,
            "multiple_choice_answer": annotation.majority,
            "answers": [{"answer_id": i, "answer": answer}
                        for i, answer in enumerate(ten(annotation.answers), 1)]}


def vqa_records(split: Split, images: list[int], name: str, answers: list[str], training: bool,
                beside: Path, raw: bool) -> Iterator[Record]:
    """One Record for each of some images of a split. beside: the file of their annotations."""
    label_of = {answer: label for label, answer in enumerate(answers)}
    needs_annotation = bool(split.annotations) or training
    seen = set()
    for image_id in images:
        row = {"image_id": image_id, "split": name, "questions": [], "answers": [],
               "answer_labels": [], "answer_scores": [], "question_id": []}
        left_out = []
        entries = []
        for question in split.images[image_id]:
            labels, scores = [], []
            reason = problem(question, needs_annotation)
            if question.question_id in seen:
                reason = "duplicate question id"
            seen.add(question.question_id)
            if question.annotation and not reason:
                labels, scores = soft_labels(question.annotation.answers, label_of, raw)
                if training and not labels:
                    reason = "question without an answer of the list"
            if reason or question.note:
                left_out.append(f"{reason or question.note}: question {question.question_id}")
            if reason:
                continue
            row["questions"].append(question.text)
            row["answers"].append([answers[label] for label in labels])
            row["answer_labels"].append(labels)
            row["answer_scores"].append(scores)
            row["question_id"].append(question.question_id)
            if question.annotation:
                entries.append(official_entry(image_id, question))
        path = split.pictures[image_id]
        yield Record(str(path.relative_to(split.folder)), {"image": path}, row, left_out,
                     keep=not training, beside={beside: entries} if entries else {})


def vqa_shards(prefix: str, splits: dict[str, Split], args: Namespace,
               divide_val: bool = False) -> Iterator[Shard]:
    """One Shard for each split. divide_val: val also becomes trainable_val and rest_val."""
    answers = choose_answers(prefix, splits, args)
    raw = getattr(args, "labels", None) == "raw"
    parts = [(name, name, sorted(split.images)) for name, split in splits.items()]
    if divide_val and "val" in splits and splits["val"].annotations:
        images = sorted(splits["val"].images)
        rest = min(REST, len(images) // 2)
        if rest:
            parts.append(("trainable_val", "val", images[:-rest]))
            parts.append(("rest_val", "val", images[-rest:]))
    for part, name, images in parts:
        path = args.out / f"{prefix}_annotations_{part}.json"
        records = partial(vqa_records, splits[name], images, name, answers, is_training(part), path,
                          raw)
        beside = {path: "annotations"} if splits[name].annotations else {}
        yield Shard(f"{prefix}_{part}", len(images), records, "VQA", beside)


# --------------------------------------------------------------------------------------------------
# VQAv2: the official layout.

def official_annotations(path: Path) -> dict[int, Annotation]:
    """{question_id: Annotation}, in the order of the file."""
    def reduced(entry):     # equal answers to one string: 6.6 million dicts would take gigabytes
        answer = entry.get("answer")
        return sys.intern(answer) if isinstance(answer, str) else entry

    found = {}
    for i, entry in enumerate(read_entries(path, "annotations", reduced)):
        with expecting(f"{path}: annotations[{i}]", '"question_id", "multiple_choice_answer" and '
                                                    '"answers", each with "answer"'):
            majority, *answers = strings([entry["multiple_choice_answer"], *entry["answers"]])
            if not answers:
                raise ValueError
            types = strings([entry.get("answer_type", "other"), entry.get("question_type")])
            annotation = Annotation(majority, answers, *types)
            found.setdefault(whole(entry["question_id"]), annotation)
    return found


def official_split(path: Path, annotations: Path, folder: Path) -> Split:
    """The Split of a file of questions, their annotations if any, and a folder of pictures."""
    found = official_annotations(annotations) if annotations.exists() else {}
    pictures = numbered_pictures(folder)
    images = defaultdict(list)
    for i, entry in enumerate(read_entries(path, "questions")):
        with expecting(f"{path}: questions[{i}]",
                       '"question", and "image_id" and "question_id", whole numbers'):
            image_id, question_id = whole(entry["image_id"]), whole(entry["question_id"])
            question = Question(question_id, entry["question"].strip(), found.get(question_id))
        images[image_id].append(question)
        pictures.setdefault(image_id, folder / f"{image_id:012}.jpg")       # which is missing
    return Split(images, list(found.values()), pictures, folder.parent)


def numbered_pictures(folder: Path) -> dict[int, Path]:
    """The pictures in a folder, at any depth, by the number at the end of the name: image_id."""
    found = {}
    for path in folder.rglob("*"):
        number = re.search(r"(\d+)\.(jpe?g|png|webp)$", path.name, re.IGNORECASE)
        if number and found.setdefault(int(number[1]), path) != path:
            fail(f"{path} and {found[int(number[1])]} have the same number; "
                 "expected one picture of each image_id")
    return found


def official_files(root: Path) -> Iterator[tuple[str, Path, Path, Path]]:
    """Yields (split, questions, annotations, pictures) of VQAv2 as ViLT lays it out."""
    for name, year, pictures in (("train", "train2014", "train2014"), ("val", "val2014", "val2014"),
                                 ("test", "test2015", "test2015"),
                                 ("test-dev", "test-dev2015", "test2015")):
        yield (name, root / f"v2_OpenEnded_mscoco_{year}_questions.json",
               root / f"v2_mscoco_{year}_annotations.json", root / pictures)


def plain_files(root: Path) -> Iterator[tuple[str, Path, Path, Path]]:
    """The same for questions_{split}.json and annotations_{split}.json, with images/ beside."""
    names = [path.stem.removeprefix("questions_") for path in root.glob("questions_*.json")]
    first = [name for name in ("train", "val") if name in names]
    for name in first + sorted(set(names) - set(first)):
        yield (simple(name, root), root / f"questions_{name}.json",
               root / f"annotations_{name}.json", root / "images")


def vqav2(args: Namespace) -> Iterator[Shard]:
    official = any(args.root.glob("v2_OpenEnded_mscoco_*_questions.json"))
    splits = {}
    for name, *files in official_files(args.root) if official else plain_files(args.root):
        needed = files if name in ("train", "val") else [files[0], files[2]]
        missing = [path for path in needed if not path.exists()]
        if not missing:
            splits[name] = official_split(*files)
        elif name in ("train", "val") and not args.answers:
            fail(f"{missing[0]} is missing; the answer list is made of train and val "
                 "(or --answers names a file)")
        else:
            print(f"{missing[0]} is missing: no file of {name} is written")
    if not splits:
        fail(f"{args.root} holds no v2_OpenEnded_mscoco_*_questions.json and no questions_*.json "
             "with pictures; `prepare.py vqav2 --help` shows the expected layout")
    return vqa_shards(f"{args.name}_vqa" if args.name else "vqav2", splits, args, divide_val=True)


# --------------------------------------------------------------------------------------------------
# Your own questions.

def own_annotation(entry: dict, answers: list[str]) -> Annotation:
    """What a line says of its question."""
    kept = [one_line(answer) for answer in answers if answer.strip()]
    if len(set(kept)) == 1:     # the official accuracy would want a unanimous "Red." to the letter
        kept = [normalized(answer) or answer for answer in kept]
    # The majority is that of the normalised answers: "Red." and "red" are one.
    counts = Counter(map(normalized, kept)).most_common(1)
    majority = counts[0][0] if counts else ""
    answer_type = "number" if majority.isdecimal() else "other"
    if majority in ("yes", "no"):
        answer_type = "yes/no"
    given, question_type = strings([entry.get("answer_type"), entry.get("question_type")])
    return Annotation(majority, kept, given or answer_type, question_type)


def vqa_jsonl(args: Namespace) -> Iterator[Shard]:
    """One row for each image, however its lines are spread over the file."""
    paths = {}                              # image_id: path of the picture
    numbers = {}                            # path: image_id, for lines that do not give it
    splits = defaultdict(lambda: Split(defaultdict(list), [], paths, args.root.parent))
    for line, (where, entry) in enumerate(json_lines(args.root), 1):
        with expecting(where, '{"image": path, "question": text, "answers": [text, …]}; '
                              '"image_id" and "question_id" are whole numbers'):
            image = args.root.parent / inside(entry["image"], where)
            text = entry["question"].strip()
            answers = entry.get("answers") or []
            answers = strings([answers] if isinstance(answers, str) else answers)
            image_id = entry.get("image_id")
            if image_id is None:
                image_id = numbers.setdefault(image, len(numbers))
            image_id = whole(image_id)
            question_id = entry.get("question_id")
            question_id = line if question_id is None else whole(question_id)
            annotation = own_annotation(entry, answers) if answers else None
        if paths.setdefault(image_id, image) != image:
            fail(f"{where}: image_id {image_id} is {image} here, "
                 f"and {paths[image_id]} in an earlier line")
        empty = any(not answer.strip() for answer in answers)
        note = "empty answer (question kept)" if empty else ""
        split = splits[simple(entry.get("split") or "train", where)]
        split.images[image_id].append(Question(question_id, text, annotation, note))
        if annotation and annotation.answers:
            split.annotations.append(annotation)
    return vqa_shards(f"{args.name or args.root.stem}_vqa", splits, args)


# --------------------------------------------------------------------------------------------------
# NLVR2. A row is a pair of pictures with all its statements, as in ViLT's files. A prediction file
# needs each statement's own identifier too, and consistency is counted by it: ours have a column of
# them.

class Statement(NamedTuple):
    """What a line says of two pictures."""
    identifier: str                         # split-set-pair-sentence
    text: str
    answer: str                             # "True" or "False"


class Pair(NamedTuple):
    """Two pictures, and all statements about them."""
    names: list[str]                        # of the pictures, as logs call them
    pictures: list[Path]
    statements: list[Statement]


def read_statement(where: str, entry: dict, identifier: str) -> Statement:
    """The Statement of a line."""
    with expecting(where, '"sentence", and as "label" true or false'):
        text = entry["sentence"].strip()
        answer = {"true": "True", "false": "False"}[str(entry["label"]).lower()]
    if identifier.count("-") != 3:
        fail(f"{where}: the identifier {shortened(repr(identifier))} is not of the form "
             "split-set-pair-sentence, such as dev-850-0-1")
    return Statement(identifier, text, answer)


def pair_record(pair: Pair, training: bool, subsets: dict[Path, set[str]]) -> Record:
    """The Record of a pair. subsets: {file to write: identifiers}."""
    name = pair.statements[0].identifier.rpartition("-")[0]
    row = {"questions": [], "answers": [], "identifier": name, "identifiers": []}
    left_out = []
    for identifier, text, answer in pair.statements:
        reason = unusable(text, "statement")
        if identifier in row["identifiers"]:
            reason = "duplicate identifier"
        if reason:
            left_out.append(f"{reason}: {identifier}")
            continue
        row["questions"].append(text)
        row["answers"].append(answer)
        row["identifiers"].append(identifier)
    beside = {}
    for file, identifiers in subsets.items():
        beside[file] = [name for name in row["identifiers"] if name in identifiers]
    return Record(f"{name}: {', '.join(pair.names)}",
                  {"image_0": pair.pictures[0], "image_1": pair.pictures[1]}, row, left_out,
                  keep=not training, beside=beside)


def nlvr2_pairs(path: Path, folder: Path) -> list[Pair]:
    """The pairs of the official lines, in the order of their first statement.

    split-set-pair-img{0,1}.png are the pictures of split-set-pair-sentence. Those of train lie in
    numbered folders, but the official download script puts all into one.
    """
    pairs = {}
    for where, entry in json_lines(path):
        statement = read_statement(where, entry, str(entry.get("identifier")))
        pair = inside(statement.identifier, where).rpartition("-")[0]
        if pair not in pairs:
            names = [f"{pair}-img0.png", f"{pair}-img1.png"]
            nested = folder / inside(str(entry.get("directory") or "."), where)
            paths = [nested / name if os.path.exists(nested / name) else folder / name
                     for name in names]
            pairs[pair] = Pair(names, paths, [])
        pairs[pair].statements.append(statement)
    return list(pairs.values())


def read_subsets(data: Path, split: str, out: Path) -> dict[Path, set[str]]:
    """{file to write: identifiers} of the balanced and the unbalanced subset of dev or test1."""
    subsets = {}
    for subset in ("balanced", "unbalanced"):
        path = data / subset / f"{subset}_{split}.json"
        if not path.exists():
            print(f"{path} is missing: this subset cannot be scored apart")
            continue
        with expecting(path, 'the official subset, each line with "identifier"'):
            identifiers = {entry["identifier"] for _, entry in json_lines(path)}
        subsets[out / f"nlvr2_{subset}_{split}.json"] = identifiers
    return subsets


def nlvr2(args: Namespace) -> Iterator[Shard]:
    root = args.root
    data = first_existing(root / "nlvr2/data", root / "nlvr/nlvr2/data")
    for name in ("train", "dev", "test1"):
        path = data / f"{name}.json"
        folders = [root / "images" / name, root / f"images_{name}", root / name]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders or not path.exists():
            print(f"{path} or the folder of its pictures is missing: no file of {name} is written")
            continue
        subsets = {} if name == "train" else read_subsets(data, name, args.out)
        yield pair_shard(f"nlvr2_{name}", nlvr2_pairs(path, folders[0]), name, subsets)


def pair_shard(name: str, pairs: list[Pair], split: str, subsets: dict[Path, set[str]]) -> Shard:
    def records():
        for pair in pairs:
            yield pair_record(pair, is_training(split), subsets)

    return Shard(name, len(pairs), records, "NLVR2", dict.fromkeys(subsets))


def nlvr2_jsonl(args: Namespace) -> Iterator[Shard]:
    """One Shard for each split. Lines about the same two pictures become one row."""
    splits = defaultdict(dict)              # split: {(pair or "", left, right): Pair}
    for number, (where, entry) in enumerate(json_lines(args.root), 1):
        with expecting(where, '{"images": [left, right], "sentence": …, "label": …}'):
            left, right = strings(entry["images"])
        split = simple(entry.get("split") or "train", where)
        images = [inside(left, where), inside(right, where)]
        # A line that does not say otherwise is a set of its own.
        given = str(entry.get("identifier", ""))
        identifier = given or f"{split.replace('-', '_')}-{number}-0-0"
        key = (given.rpartition("-")[0], *images)
        if key not in splits[split]:
            splits[split][key] = Pair(images, [args.root.parent / image for image in images], [])
        splits[split][key].statements.append(read_statement(where, entry, identifier))
    for split, pairs in splits.items():
        name = f"{args.name or args.root.stem}_nlvr2_{split}"
        yield pair_shard(name, list(pairs.values()), split, {})
