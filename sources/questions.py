"""The sources of prepare.py whose rows hold questions or statements: VQAv2, NLVR2, and one's own data in the same form.

    vqav2_{train,val,trainable_val,rest_val,test,test-dev}.arrow     ViLT's names; of one's own: NAME_vqa_{split}.arrow
    vqav2_answers.json                     the answer list: a JSON list of strings, the position is the label
    vqav2_annotations_{split}.json         the answers of all annotators, in the official layout, for the official score
    nlvr2_{train,dev,test1}.arrow                                    of one's own: NAME_nlvr2_{split}.arrow
    nlvr2_{balanced,unbalanced}_{dev,test1}.json                     the identifiers of these subsets

**Answer list** (ViLT's): the majority answers of train and val, normalised as the official evaluation does, that are
seen at least 9 times, in order of appearance; 3,129 of VQAv2, one of which is the empty string ("the" and "a" normalise
to it). ViLT's own normalisation differs in one thing, it does not strip blanks first; they agree on 12,000 real ones.
**Soft scores**: an answer of the list that n of ten annotators gave scores 0, 0.3, 0.6, 0.9, 1 for n = 0, 1, 2, 3, 4 or
more. Fewer than ten annotators (one's own data) are repeated in turn until they are ten, so a single answer scores 1.
A question of which no answer is in the list teaches nothing and is left out of the training files (train,
trainable_val). The other files keep it, with empty lists, since the official accuracy counts it. (ViLT drops it there.)
A picture that is missing or cannot be read takes its questions or statements out of the training files only. The other
files keep them, with whatever bytes there are in the picture's place, since a results file needs an answer to each.
"""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

from metrics import normalize_answer, soft_score
from sources.shards import SURROGATE, Record, Shard, fail, first_existing, inside, json_lines, read_json, simple, write_json

# rest_val: the last images of val, by their ids, at most half of them, to choose a checkpoint by; trainable_val are the
# others. (ViLT takes the last 1,000 after shuffling, so no two of its users have the same.)
REST = 1000
normalized = cache(normalize_answer)     # most of the 6.6 million answers of VQAv2 have been given before


class Annotation(NamedTuple):
    """What people answered to one question."""
    majority: str                        # the official multiple_choice_answer
    answers: tuple                       # of each annotator, as they typed it
    answer_type: str                     # "yes/no", "number", "other"
    question_type: str


class Question(NamedTuple):
    question_id: int
    text: str
    annotation: Annotation | None
    wrong: str                           # why the question is left out, or ""
    note: str = ""                       # why something of it is left out, or ""


class Split(NamedTuple):
    images: dict                         # image_id: [Question], image ids ascending
    annotations: list                    # every Annotation, in the order of their file; none where nobody was asked
    picture: Callable                    # image_id -> (its path as messages call it, Path)


def is_training(split):
    return split.startswith("train")     # train, trainable_val


def whole(value):
    """An id: a whole number that fits an Arrow column, or its digits. ValueError, TypeError for anything else."""
    if isinstance(value, (bool, float)) or not 0 <= int(value) < 2 ** 63:
        raise ValueError
    return int(value)


# ---------------------------------------------------------------------------------------------------------------------
# VQA: answers -> labels and soft scores; questions -> one row per image.

def ten(answers):
    """The answers of at least ten annotators; fewer are repeated in turn.

    >>> Counter(ten(["red", "pink", "red"]))
    Counter({'red': 7, 'pink': 3})
    """
    return [answers[i % len(answers)] for i in range(max(10, len(answers)))]


def answer_list(annotations, at_least):
    """The normalised majority answers that are seen so often, in order of appearance."""
    counts = Counter(normalized(annotation.majority) for annotation in annotations)
    return [answer for answer, count in counts.items() if count >= at_least and not SURROGATE.search(answer)]


def soft_labels(answers, label_of):
    """Annotators' answers -> (labels of those in the list, in order of appearance; their scores)

    >>> soft_labels(["blue"] * 7 + ["Navy", "the sky", "navy."], {"navy": 0, "blue": 1})
    ([1, 0], [1.0, 0.6])
    """
    counts = Counter(map(normalized, ten(answers)))
    counts = {label_of[answer]: count for answer, count in counts.items() if answer in label_of}
    return list(counts), [soft_score(count) for count in counts.values()]


def make_split(name, entries, answered, annotations, picture):
    """Entries (image_id, question_id, text, annotation or None, note) -> Split. `answered`: all should have answers."""
    images, seen = defaultdict(list), set()
    for image_id, question_id, text, annotation, note in entries:
        wrong = ("duplicate question id" if question_id in seen else
                 "empty question" if not text else
                 "question is not Unicode" if SURROGATE.search(text) else
                 "question without an annotation" if annotation is None and (answered or is_training(name)) else
                 "question with empty answers" if annotation and not any(map(str.strip, annotation.answers)) else "")
        seen.add(question_id)
        images[image_id].append(Question(question_id, text, annotation, wrong, note))
    return Split(dict(sorted(images.items())), annotations, picture)


def vqa_records(split, images, name, answers, label_of, training):
    """The rows of some images of a split."""
    for image_id in images:
        key, path = split.picture(image_id)
        columns = ("questions", "answers", "answer_labels", "answer_scores", "question_id")
        row, left = {column: [] for column in columns} | {"image_id": image_id, "split": name}, []
        for question in split.images[image_id]:
            wrong, labels, scores = question.wrong, [], []
            if question.annotation and not wrong:
                labels, scores = soft_labels(question.annotation.answers, label_of)
                wrong = "question without an answer of the list" if training and not labels else ""
            for reason in filter(None, (wrong, not wrong and question.note)):
                left.append(f"{reason}: question {question.question_id}")
            if not wrong:
                values = (question.text, [answers[label] for label in labels], labels, scores, question.question_id)
                for column, value in zip(columns, values):
                    row[column].append(value)
        yield Record(key, {"image": path}, row, left, keep=not training)


def write_annotations(path, split, records, is_written):
    """The official layout, of exactly the questions that are written: what the official score is computed from."""
    def pieces():
        yield json.dumps({"info": {"description": path.stem}, "license": {}, "data_type": "", "data_subtype": ""})[:-1]
        separator = ', "annotations": [\n'
        for record in filter(lambda record: record.row["questions"] and is_written(record.row), records()):
            kept = set(record.row["question_id"])
            for question_id, _, annotation, wrong, _ in split.images[record.row["image_id"]]:
                if question_id in kept and not wrong:
                    typed = enumerate(ten(annotation.answers), 1)
                    answers = [{"answer_id": i, "answer": answer} for i, answer in typed]
                    yield separator + json.dumps({
                        "question_id": question_id, "image_id": record.row["image_id"],
                        "question_type": annotation.question_type, "answer_type": annotation.answer_type,
                        "multiple_choice_answer": annotation.majority, "answers": answers})
                    separator = ",\n"
        yield "\n]}\n"

    write_json(path, pieces())


def vqa_shards(prefix, splits, args, divide_val=False):
    """{name: Split} -> Shards; writes the answer list, which must be the one that finished files were made with.

    divide_val: val stands in two more files, trainable_val and rest_val.
    """
    asked = [name for name, split in splits.items() if split.annotations]
    listed = [name for name in asked if not name.startswith("test")] or asked      # the tests' answers stay unseen
    if args.answers:
        answers = read_json(args.answers)
        if not (isinstance(answers, list) and all(isinstance(a, str) for a in answers)
                and 0 < len(set(answers)) == len(answers)):
            fail(f"{args.answers} is not an answer list; expected a JSON list of different strings")
    else:
        answers = answer_list((a for name in listed for a in splits[name].annotations), args.at_least)
        if asked and not answers:
            fail(f"{args.root}: no answer is the majority's at least {args.at_least} times; --at-least lowers that")
    path = args.out / f"{prefix}_answers.json"
    if answers:
        finished = sorted(args.out.glob(f"{prefix}_*.arrow"))
        if finished and not args.force and not (path.exists() and read_json(path) == answers):
            fail(f"{path} is not the answer list of this run, and {finished[0].name} was made with it; use another "
                 "--out, or --force to write all files again")
        write_json(path, [json.dumps(answers, indent=0), "\n"])
        print(f"{path}: {len(answers):,} answers, " + (f"those of {args.answers}" if args.answers else
              f"of {' and '.join(listed)}, each the majority's at least {args.at_least} times"))
    label_of = {answer: label for label, answer in enumerate(answers)}

    parts = [(name, name, list(split.images)) for name, split in splits.items()]
    if divide_val and "val" in asked and len(splits["val"].images) > 1:
        images = list(splits["val"].images)
        rest = min(REST, len(images) // 2)
        parts += [("trainable_val", "val", images[:-rest]), ("rest_val", "val", images[-rest:])]
    for part, name, images in parts:
        split = splits[name]
        records = partial(vqa_records, split, images, name, answers, label_of, is_training(part))
        beside = partial(write_annotations, args.out / f"{prefix}_annotations_{part}.json", split, records)
        yield Shard(f"{prefix}_{part}", len(images), records, kind="VQA", beside=beside if name in asked else None)


def official_annotations(path):
    """The official file -> {question_id: Annotation}, in its order."""
    # An annotator's entry is reduced to the answer at once, equal ones to one string: 6.6 million dicts take gigabytes.
    content = read_json(path, hook=lambda d: sys.intern(d["answer"]) if isinstance(d.get("answer"), str) else d)
    entries, found = content.get("annotations") if isinstance(content, dict) else None, {}
    if not isinstance(entries, list):
        fail(f'{path} is not in the official layout; expected {{"annotations": [...]}}')
    for i, entry in enumerate(entries):
        try:
            answers, majority = tuple(entry["answers"]), entry["multiple_choice_answer"]
            if not answers or not all(isinstance(text, str) for text in (*answers, majority)):
                raise TypeError
            found.setdefault(whole(entry["question_id"]), Annotation(
                majority, answers, entry.get("answer_type", "other"), entry.get("question_type", "")))
        except (KeyError, TypeError, ValueError, AttributeError):
            fail(f'{path}: annotations[{i}] needs "question_id", "multiple_choice_answer" and "answers", each with '
                 '"answer"')
    if len(found) < len(entries):
        print(f"{path}: {len(entries) - len(found):,} annotations left out, their questions have an earlier one")
    return found


def official_split(name, questions, annotations, folder):
    """Questions and annotations (or None) in the official layout, and the folder of the pictures -> Split."""
    found = official_annotations(annotations) if annotations else {}
    content = read_json(questions)
    listed = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        fail(f'{questions} is not in the official layout; expected {{"questions": [...]}}')

    def entries():
        for i, entry in enumerate(listed):
            try:
                question_id = whole(entry["question_id"])
                yield whole(entry["image_id"]), question_id, entry["question"].strip(), found.get(question_id), ""
            except (KeyError, TypeError, ValueError, AttributeError):
                fail(f'{questions}: questions[{i}] needs "question", and "image_id" and "question_id", whole numbers')

    split = make_split(name, entries(), bool(annotations), list(found.values()), numbered_pictures(folder))
    unasked = len(found.keys() - {question.question_id for image in split.images.values() for question in image})
    if unasked:
        print(f"{annotations}: {unasked:,} annotations have no question in {questions}; they count for the list only")
    return split


def numbered_pictures(folder):
    """A folder of pictures, at any depth, whose names end with their image_id -> Split.picture."""
    paths = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if found := re.search(r"(\d+)\.(jpe?g|png|webp)$", name, re.IGNORECASE):
                other = paths.setdefault(int(found[1]), path := f"{place}/{name}")
                if other != path:
                    fail(f"{path} and {other} have the same number; expected one picture of each image_id")

    def picture(image_id):
        path = Path(paths.get(image_id, folder / f"{image_id:012}.jpg"))
        return str(path.relative_to(folder.parent)), path
    return picture


def vqav2(args):
    """The official download as ViLT lays it out; or a folder with questions_{split}.json and, where people were asked,
    annotations_{split}.json in the same formats, and the pictures below images/."""
    root, files = args.root, {}
    if any(root.glob("v2_OpenEnded_mscoco_*_questions.json")):
        for name, year, folder in (("train", "train2014", "train2014"), ("val", "val2014", "val2014"),
                                   ("test", "test2015", "test2015"), ("test-dev", "test-dev2015", "test2015")):
            questions, annotations = (root / f"v2_OpenEnded_mscoco_{year}_questions.json",
                                      root / f"v2_mscoco_{year}_annotations.json")
            missing = next((path for path in (questions, root / folder) if not path.exists()), None)
            if missing is None:
                files[name] = questions, None if "test" in name else first_existing(annotations), root / folder
            elif "test" in name or args.answers:
                print(f"{missing} is missing: no file of {name} is written")
            else:
                fail(f"{missing} is missing; the answer list is made of train and val (or --answers names a file)")
    else:
        found = {path.stem.removeprefix("questions_"): path for path in sorted(root.glob("questions_*.json"))}
        if not found:
            fail(f"{root} holds no v2_OpenEnded_mscoco_*_questions.json and no questions_*.json; `prepare.py --help` "
                 "shows the expected layout")
        for name in sorted(found, key=lambda name: (name != "train", name != "val", name)):
            annotations = root / f"annotations_{simple(name, root)}.json"
            files[name] = found[name], annotations if annotations.exists() else None, first_existing(root / "images")
    splits = {name: official_split(name, *paths) for name, paths in files.items()}
    return vqa_shards(f"{args.name}_vqa" if args.name else "vqav2", splits, args, divide_val=True)


def answer_kind(answer):
    """The official answer_type, for data that does not say."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"


def vqa_jsonl(args):
    """Lines of {"image", "question", "answers": one or several}, and optionally "split", "image_id", "question_id",
    "answer_type", "question_type". The questions of an image become one row, wherever they stand in the file."""
    entries, paths, numbers, given = defaultdict(list), {}, {}, None
    for line, (where, entry) in enumerate(json_lines(args.root), 1):
        answers = entry.get("answers") if isinstance(entry, dict) else None
        answers = [answers] if isinstance(answers, str) else answers or []
        if not (isinstance(entry, dict) and isinstance(answers, list)
                and all(isinstance(text, str) for text in (entry.get("image"), entry.get("question"), *answers))):
            fail(f'{where}: expected {{"image": path, "question": text, "answers": [text, …]}}')
        present = [name for name in ("image_id", "question_id") if entry.get(name) is not None]
        given = present if given is None else given
        if given != present:
            fail(f"{where}: has {' and '.join(present) or 'no ids'}, the first line {' and '.join(given) or 'none'}; "
                 "expected the same in every line")
        image = inside(entry["image"], where)
        try:
            image_id = whole(entry["image_id"]) if "image_id" in given else numbers.setdefault(image, len(numbers))
            question_id = whole(entry["question_id"]) if "question_id" in given else line
        except (TypeError, ValueError):
            fail(f'{where}: "image_id" and "question_id" have to be whole numbers')
        if paths.setdefault(image_id, image) != image:
            fail(f"{where}: image_id {image_id} is {image} here, and {paths[image_id]} in an earlier line")
        kept = tuple(answer for answer in answers if answer.strip())
        annotation, note = None, "empty answer (question kept)" if len(kept) < len(answers) else ""
        if answers:
            # Whom most agree with is asked of normalised answers: "Red." and "red" are one.
            majority = Counter(map(normalized, kept)).most_common(1)[0][0] if kept else ""
            annotation = Annotation(majority, kept, entry.get("answer_type") or answer_kind(majority),
                                    entry.get("question_type") or "")
        entries[simple(entry.get("split") or "train", where)].append(
            (image_id, question_id, entry["question"].strip(), annotation, note))

    splits = {}
    for name, found in entries.items():
        annotations = [annotation for *_, annotation, _ in found if annotation and annotation.answers]
        splits[name] = make_split(name, found, bool(annotations), annotations,
                                  lambda image_id: (paths[image_id], args.root.parent / paths[image_id]))
    return vqa_shards(f"{args.name or args.root.stem}_vqa", splits, args)


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2: a row is a statement about two pictures. ViLT's rows are pairs with all their statements, and keep of their
# identifiers what these have in common. But the last part of an identifier belongs into the prediction file, and
# consistency is counted by it. So here a row has one statement, and a pair that has two stands in the file twice.

def statement(where, entry, split, identifier, first, second):
    """A Record of a line that has been read; `first`, `second`: (key, path) of the pictures."""
    label = str(entry.get("label")).capitalize()
    if not (isinstance(entry.get("sentence"), str) and label in ("True", "False")):
        fail(f'{where}: expected a "sentence", and as "label" true or false')
    if not isinstance(identifier, str) or identifier.count("-") != 3:
        fail(f"{where}: the identifier {identifier!r} is not of the form split-set-pair-sentence, such as dev-850-0-1")
    text = entry["sentence"].strip()
    left = ["empty statement"] if not text else ["statement is not Unicode"] if SURROGATE.search(text) else []
    row = {"questions": [] if left else [text], "answers": [label], "identifier": identifier}
    return Record(f"{identifier}: {first[0]}, {second[0]}", {"image_0": first[1], "image_1": second[1]}, row, left,
                  keep=not is_training(split))


def nlvr2_records(path, split, folder):
    """The official lines: the identifier split-set-pair-sentence names the pictures split-set-pair-img{0,1}.png."""
    for where, entry in json_lines(path):
        identifier = entry.get("identifier") if isinstance(entry, dict) else None
        if not isinstance(identifier, str):
            fail(f'{where}: expected {{"identifier": text, "sentence": text, "label": "True" or "False"}}')
        names = [inside(f"{identifier.rpartition('-')[0]}-img{i}.png", where) for i in (0, 1)]
        # The pictures of train lie in numbered folders; the official download script puts all into one.
        nested = "" if entry.get("directory") in (None, "") else inside(str(entry["directory"]), where)
        paths = [path if (path := folder / nested / name).exists() else folder / name for name in names]
        yield statement(where, entry, split, identifier, *zip(names, paths))


def nlvr2_subsets(out, data, name, is_written):
    """The identifiers of dev's or test1's balanced and unbalanced subset, of the statements that are written."""
    for subset in ("balanced", "unbalanced"):
        lines = data / subset / f"{subset}_{name}.json"
        if not lines.exists():
            print(f"{lines} is missing: this subset cannot be scored apart")
            continue
        try:
            identifiers = [entry["identifier"] for _, entry in json_lines(lines) if is_written(entry)]
        except (KeyError, TypeError):
            fail(f'{lines} has a line without "identifier"; expected the official subset')
        write_json(out / f"nlvr2_{subset}_{name}.json", [json.dumps(identifiers, indent=0), "\n"])


def nlvr2(args):
    root = args.root
    data = first_existing(root / "nlvr2/data", root / "nlvr/nlvr2/data")
    first_existing(data / "train.json", data / "dev.json", data / "test1.json")
    for name in ("train", "dev", "test1"):
        folder = next((f for f in (root / "images" / name, root / f"images_{name}", root / name) if f.is_dir()), None)
        if folder is None or not (data / f"{name}.json").exists():
            print(f"{data / f'{name}.json'} or the folder of its pictures is missing: no file of {name} is written")
            continue
        lines = data / f"{name}.json"
        yield Shard(f"nlvr2_{name}", sum(1 for _ in json_lines(lines)), partial(nlvr2_records, lines, name, folder),
                    kind="NLVR2", beside=partial(nlvr2_subsets, args.out, data, name) if name != "train" else None)


def nlvr2_jsonl(args):
    """Lines of {"images": [left, right], "sentence", "label"}, and optionally "split" and "identifier"."""
    def records(wanted=None):
        for number, (where, entry) in enumerate(json_lines(args.root), 1):
            images = entry.get("images") if isinstance(entry, dict) else None
            if not (isinstance(images, list) and len(images) == 2 and all(isinstance(image, str) for image in images)):
                fail(f'{where}: expected {{"images": [left, right], "sentence": text, "label": true or false}}')
            split = simple(entry.get("split") or "train", where)
            if wanted in (None, split):
                # Each line is a set of its own where nothing else is said: set, pair, sentence.
                identifier = entry.get("identifier", f"{split.replace('-', '_')}-{number}-0-0")
                pictures = [(image, args.root.parent / image) for image in (inside(image, where) for image in images)]
                yield split, statement(where, entry, split, identifier, *pictures)

    for split, count in Counter(split for split, _ in records()).items():
        yield Shard(f"{args.name or args.root.stem}_nlvr2_{split}", count,
                    lambda split=split: (record for _, record in records(split)), kind="NLVR2")


# ---------------------------------------------------------------------------------------------------------------------
# What `prepare.py check` asks of finished files besides texts and pictures.

def vqa_problems(rows, seen, wrong):
    """Counts in `wrong` what is wrong in some rows, dicts without pictures; `seen`: all question ids so far."""
    for row in rows:
        count = len(row["questions"] or [])
        if len(row["question_id"] or []) != count:
            wrong["rows with another number of question ids than of questions"] += 1
        for question_id in row["question_id"] or []:
            wrong["question ids that an earlier question has"] += question_id in seen
            seen.add(question_id)
        answers, labels, scores = (row[name] or [] for name in ("answers", "answer_labels", "answer_scores"))
        # ViLT's test files have one empty list a row; ours one for each question.
        if any(len(column) not in (0, count) for column in (answers, labels, scores)) or any(
                not len(a or []) == len(b or []) == len(c or []) for a, b, c in zip(answers, labels, scores)):
            wrong["rows whose answers, labels and scores do not belong together"] += 1
        wrong["scores outside 0 to 1"] += sum(not 0 < score <= 1 for scored in scores for score in scored or [])


def nlvr2_problems(rows, seen, wrong):
    for row in rows:
        answers = row["answers"] or []
        if len(answers) != len(row["questions"] or []) or not set(answers) <= {"True", "False"}:
            wrong['rows without one answer, "True" or "False", for each statement'] += 1
        wrong["identifiers that an earlier row has"] += row["identifier"] in seen
        seen.add(row["identifier"])
