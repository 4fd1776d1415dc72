"""Reading finished Arrow files back, as training opens them: `prepare.py check`.

Opening a table is most of the check (storage/files.py): it refuses what training cannot use. What
is left is to look into the texts, to decode the pictures, and to say what there is.
"""

from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median_low

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data import Captions
from pictures import open_header, open_image
from sources.shards import KINDS, Kind, bar, fail, in_order
from storage.disk import read_json, sentence_of, shortened
from storage.files import arrow_files, nested, open_arrow
from storage.tar_index import is_tar, table_of
from storage.tars import shards_at

MISSING = "missing"
REPEATED = {"question_id": "question ids that an earlier question has",
            "identifier": "identifiers that an earlier row has"}


def open_table(path: Path) -> tuple[Kind, Captions]:
    """The file as training opens it; OSError or ValueError if training cannot."""
    if is_tar(path):
        return KINDS["captions"], table_of([path])
    columns = open_arrow(str(path))[0].schema.names
    kind = KINDS["captions"]
    if "image_0" in columns:
        kind = KINDS["NLVR2"]
    elif "questions" in columns:
        kind = KINDS["VQA"]
    return kind, kind.table([path])


def answer_lists(path: Path) -> list[Path]:
    """The answer list that stands beside a file of questions, if there is one."""
    return [other for other in sorted(path.parent.glob("*_answers.json"))
            if path.name.startswith(other.name.removesuffix("answers.json"))]


def all_values(table: Captions, column: str) -> pa.ChunkedArray:
    """The values of a column, out of their lists; ArrowInvalid if they are damaged."""
    parts = [table.batch(number).column(column) for number in range(len(table.batches))]
    for part in parts:
        part.validate(full=True)                        # `split` is none of the table's columns
    return pa.chunked_array([nested(part)[0] for part in parts])


def check_texts(kind: Kind, table: Captions) -> list[str]:
    """Prints what a file holds besides its pictures. Returns what is wrong with it."""
    names = table.batch(0).schema.names
    texts_per_row = Counter(np.bincount(table.row_of, minlength=len(table)).tolist())
    words_per_text = Counter(len(text.split()) for text in table.texts())
    wrong = Counter()
    for column in REPEATED.keys() & kind.table.MORE:
        values = all_values(table, column)
        wrong[REPEATED[column]] = len(values) - pc.count_distinct(values).as_py()
    thing = kind.things[:-1]
    wrong[f"rows without a {thing}"] = texts_per_row.pop(0, 0)
    wrong[f"empty {kind.things}"] = words_per_text.pop(0, 0)
    print(f"    columns: {shortened(', '.join(names))}")
    if "split" in names:
        splits = Counter(all_values(table, "split").to_pylist())
        counts = ", ".join(f"{name} {count:,}" for name, count in splits.items())
        print(f"    splits: {shortened(counts)}")
    print(f"    {len(table):,} {kind.rows}, {len(table.row_of):,} {kind.things}; "
          f"for each: {spread(texts_per_row)}")
    if words_per_text:
        print(f"    words in a {thing}: {spread(words_per_text)}")
    return [f"{count:,} {what}" for what, count in wrong.items() if count]


def spread(counts: Counter) -> str:
    """The range of some numbers; counts: {number: how often}.

    >>> spread(Counter([3, 5, 6, 6]))
    '3 to 6, median 5'
    """
    return f"{min(counts)} to {max(counts)}, median {median_low(counts.elements())}"


def shorter_side(encoded: pa.Buffer | None, fast: bool) -> int | str:
    """The shorter side of a picture in pixels, or why it cannot be read."""
    if encoded is None or len(encoded) == 0:
        return MISSING
    try:
        return min((open_header if fast else open_image)(encoded).size)
    except Exception as error:          # Pillow's readers raise whatever broken bytes lead to
        return f"undecodable: {shortened(error) or type(error).__name__}"


def is_training(kind: Kind, table: Captions, row: int) -> bool:
    """Whether a row is trained on. prepare.py keeps others without their pictures on purpose."""
    if kind is KINDS["captions"]:
        return True
    names = table.batch(0).schema.names
    column = "identifier" if kind is KINDS["NLVR2"] else "split"
    return column not in names or str(table.cell(column, row).as_py()).startswith("train")


def check_pictures(kind: Kind, table: Captions, name: str, fast: bool, workers: int) -> list[str]:
    """Prints the sizes of the pictures. Returns how many cannot be read, and names the first."""
    each = len(table.IMAGES)
    pictures = (table.image(row, which) for row in range(len(table)) for which in range(each))
    results = in_order(partial(shorter_side, fast=fast), pictures, workers)
    sides = Counter()
    undecodable, missing, kept = [], [], 0
    progress = bar(iterable=results, total=len(table) * each, desc=name, leave=False,
                   unit=" pictures")
    for i, result in enumerate(progress):
        row = i // each
        if isinstance(result, int):
            sides[result] += 1
        elif result != MISSING:
            undecodable.append(f"row {row}: {result}")
        elif is_training(kind, table, row):
            missing.append(f"row {row}: {result}")
        else:
            kept += 1
    if sides:
        note = " (by the headers; nothing was decoded)" if fast else ""
        print(f"    pixels of the shorter side: {spread(sides)}{note}")
    if kept:
        print(f"    {kept:,} missing pictures; their {kind.things} were kept for evaluation")
    problems = []
    for bad, what in ((undecodable, "cannot be read"), (missing, "are missing")):
        if bad:
            problems += [f"{len(bad):,} pictures that {what}", *bad[:10]]
    return problems


def check_file(path: Path, fast: bool, workers: int) -> list[str]:
    """Prints what an Arrow file holds. Returns one sentence for each thing that is wrong."""
    try:
        kind, table = open_table(path)
        if kind is KINDS["VQA"]:
            for answers in answer_lists(path):
                table.check_labels(len(read_json(answers, list)))
        problems = table.damage() if is_tar(path) else []
        problems += check_texts(kind, table)
        return problems + check_pictures(kind, table, path.name, fast, workers)
    except (OSError, ValueError, pa.ArrowException) as error:
        return [f"cannot be read: {sentence_of(error)}"]


def files_in(path: Path) -> list[Path]:
    """All Arrow files of a folder, or its tars; a file is itself. ValueError if there are none."""
    if not path.is_dir():
        return [path]
    files = [path / name for name in arrow_files(path)]
    for splits in shards_at(path).values():
        for tars in splits.values():
            files += tars
    if not files:
        raise ValueError(f"{path}: no .arrow or .tar files are in this folder")
    return files


def check(args: Namespace) -> None:
    """Prints what each file holds and what is wrong with it. Of a folder, each file is checked."""
    paths = [file for path in args.files for file in files_in(path)]
    faulty = 0
    for path in paths:
        print(f"{path}:")
        problems = check_file(path, args.fast, args.workers)
        for problem in problems:
            print(f"    WRONG: {problem}")
        if problems:
            faulty += 1
        else:
            print("    good")
    if faulty:
        fail(f"{faulty} of {len(paths)} files have something wrong")
