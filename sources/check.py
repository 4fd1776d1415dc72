"""Reading finished Arrow files back, as training opens them: `prepare.py check`."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median_low

import pyarrow as pa

from data import Captions, Table
from sources.shards import KINDS, Kind, Skip, bar, decode, fail, in_order


def open_table(path: Path) -> tuple[Kind, Captions]:
    """The file as training opens it; OSError or ValueError if training cannot."""
    columns = Table([path], []).files[str(path)].schema.names
    kind = KINDS["captions"]
    if "image_0" in columns:
        kind = KINDS["NLVR2"]
    elif "questions" in columns:
        kind = KINDS["VQA"]
    return kind, kind.table([path])


def row_problems(row: dict, kind: Kind, seen: set) -> Iterator[str]:
    """What is wrong with a row besides its pictures and texts. seen: the ids of earlier rows."""
    count = len(row[kind.table.TEXT] or [])
    if kind is KINDS["VQA"]:
        ids = row["question_id"] or []
        if len(ids) != count:
            yield "rows with another number of question ids than of questions"
        for question_id in ids:
            if question_id in seen:
                yield "question ids that an earlier question has"
            seen.add(question_id)
        columns = [row.get(name) or [] for name in ("answers", "answer_labels", "answer_scores")]
        # ViLT's test files have one empty list in a row; ours have one for each question.
        lengths = [{len(one or []) for one in lists} for lists in zip(*columns, strict=False)]
        if (any(len(column) not in (0, count) for column in columns)
                or any(len(different) > 1 for different in lengths)):
            yield "rows whose answers, labels and scores do not belong together"
        for scores in columns[-1]:
            for score in scores or []:
                if not 0 < score <= 1:
                    yield "scores outside 0 to 1"
    if kind is KINDS["NLVR2"]:
        answers = row["answers"] or []
        if len(answers) != count or not set(answers) <= {"True", "False"}:
            yield 'rows without one answer, "True" or "False", for each statement'
        if row["identifier"] in seen:
            yield "identifiers that an earlier row has"
        seen.add(row["identifier"])


def check_texts(kind: Kind, table: Captions) -> list[str]:
    """Prints what a file holds besides its pictures. Returns what is wrong with it."""
    names = table.batch(0).schema.names
    columns = [name for name in kind.schema.names if name in names and name not in table.IMAGES]
    thing = kind.things[:-1]
    texts_per_row, words_per_text, splits, wrong = Counter(), Counter(), Counter(), Counter()
    seen = set()
    for number in range(len(table.batches)):
        batch = table.batch(number)
        batch.validate(full=True)
        rows = pa.Table.from_batches([batch.select(columns)])
        for part in rows.to_batches(max_chunksize=1000):    # ViLT's files have one batch each
            for row in part.to_pylist():
                texts = row[table.TEXT] or []
                texts_per_row[len(texts)] += 1
                words_per_text.update(len((text or "").split()) for text in texts)
                splits[row.get("split")] += 1
                wrong.update(row_problems(row, kind, seen))
    wrong[f"rows without a {thing}"] = texts_per_row.pop(0, 0)
    wrong[f"empty {kind.things}"] = words_per_text.pop(0, 0)
    print(f"    columns: {', '.join(names)}")
    if "split" in columns:
        print(f"    splits: {', '.join(f'{name} {count:,}' for name, count in splits.items())}")
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


def shorter_side(data: pa.Buffer | None, fast: bool) -> int | str:
    """The shorter side of a picture in pixels, or why it cannot be read."""
    if data is None:
        return "null instead of a picture"
    try:
        _, size = decode(data, header_only=fast)
    except Skip as reason:
        return str(reason)
    return min(size)


def check_pictures(table: Captions, name: str, fast: bool, workers: int) -> list[str]:
    """Prints the sizes of the pictures. Returns how many cannot be read, and names the first."""
    each = len(table.IMAGES)
    pictures = (table.image(row, which) for row in range(len(table)) for which in range(each))
    results = in_order(partial(shorter_side, fast=fast), pictures, workers)
    sides = Counter()
    bad = []
    progress = bar(iterable=results, total=len(table) * each, desc=name, leave=False,
                   unit=" pictures")
    for i, result in enumerate(progress):
        if isinstance(result, int):
            sides[result] += 1
        else:
            bad.append(f"row {i // each}: {result}")
    if sides:
        note = " (by the headers; nothing was decoded)" if fast else ""
        print(f"    pixels of the shorter side: {spread(sides)}{note}")
    return [f"{len(bad):,} pictures that cannot be read", *bad[:10]] if bad else []


def check_file(path: Path, fast: bool, workers: int) -> list[str]:
    """Prints what an Arrow file holds. Returns one sentence for each thing that is wrong."""
    try:
        kind, table = open_table(path)
        return check_texts(kind, table) + check_pictures(table, path.name, fast, workers)
    # A TypeError comes from a column of another type, such as numbers in place of lists.
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        first_line, *_ = str(error).split("\n")
        return [f"cannot be read: {first_line}"]


def check(args: Namespace) -> None:
    """Prints what each file holds and what is wrong with it."""
    faulty = 0
    for path in args.files:
        print(f"{path}:")
        problems = check_file(path, args.fast, args.workers)
        for problem in problems:
            print(f"    WRONG: {problem}")
        if problems:
            faulty += 1
        else:
            print("    good")
    if faulty:
        fail(f"{faulty} of {len(args.files)} files have something wrong")
