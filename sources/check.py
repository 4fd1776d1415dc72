"""Reading finished Arrow files back: `prepare.py check`."""

import mmap
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median_low

import pyarrow as pa
import pyarrow.compute as pc

from sources.shards import KINDS, Kind, Skip, bar, decode, fail, in_order


@dataclass
class Findings:
    """What is counted while a file is read."""
    pictures: int = 0
    texts_per_row: Counter = field(default_factory=Counter)
    words_per_text: Counter = field(default_factory=Counter)
    shorter_sides: Counter = field(default_factory=Counter)     # pixels
    splits: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)             # what is wrong: how often
    bad: list = field(default_factory=list)                     # "row n: reason" of the first 10
    seen: set = field(default_factory=set)                      # question ids or identifiers


# --------------------------------------------------------------------------------------------------
# What can be wrong with questions and statements. `rows`: dicts without pictures.

def count_vqa_problems(rows: list[dict], found: Findings) -> None:
    for row in rows:
        count = len(row["questions"] or [])
        if len(row["question_id"] or []) != count:
            found.wrong["rows with another number of question ids than of questions"] += 1
        for question_id in row["question_id"] or []:
            found.wrong["question ids that an earlier question has"] += question_id in found.seen
            found.seen.add(question_id)
        columns = [row[name] or [] for name in ("answers", "answer_labels", "answer_scores")]
        # ViLT's test files have one empty list in a row; ours have one for each question.
        wrong = any(len(column) not in (0, count) for column in columns)
        for lists in zip(*columns, strict=False):
            if len({len(one or []) for one in lists}) > 1:
                wrong = True
        if wrong:
            found.wrong["rows whose answers, labels and scores do not belong together"] += 1
        for scores in columns[2]:
            outside = [score for score in scores or [] if not 0 < score <= 1]
            found.wrong["scores outside 0 to 1"] += len(outside)


def count_nlvr2_problems(rows: list[dict], found: Findings) -> None:
    for row in rows:
        answers = row["answers"] or []
        if len(answers) != len(row["questions"] or []) or not set(answers) <= {"True", "False"}:
            found.wrong['rows without one answer, "True" or "False", for each statement'] += 1
        found.wrong["identifiers that an earlier row has"] += row["identifier"] in found.seen
        found.seen.add(row["identifier"])


# What a file of each kind needs besides pictures and texts, and the function that looks at it.
EXTRA = {
    "captions": ((), None),
    "VQA": (("question_id", "answers", "answer_labels", "answer_scores"), count_vqa_problems),
    "NLVR2": (("answers", "identifier"), count_nlvr2_problems),
}


# --------------------------------------------------------------------------------------------------
# One file.

def base(kind: pa.DataType) -> str:
    """"list", "string", "binary" and so on, whether large_ or not."""
    return str(kind).split("<")[0].removeprefix("large_")


def kind_of(types: dict[str, pa.DataType]) -> str | None:
    """The name of a file's kind, by the types of its columns; None if it is none of them."""
    for name, kind in KINDS.items():
        extra, _ = EXTRA[name]
        if not {*kind.images, kind.texts, *extra} <= types.keys():
            continue
        texts = types[kind.texts]
        lists = [column for column in extra if base(types[column]) == "list"]
        if (all(base(types[column]) == "binary" for column in kind.images)
                and base(texts) == "list" and base(texts.value_type) == "string"
                and lists == [column for column in extra if column != kind.key]):
            return name
    return None


def shorter_side(data: pa.Buffer | None, fast: bool) -> tuple[int | None, str | None]:
    """(The shorter side of a picture in pixels, None), or (None, why it cannot be read)."""
    if data is None:
        return None, "null instead of a picture"
    try:
        _, size = decode(data, header_only=fast)
    except Skip as reason:
        return None, str(reason)
    return min(size), None


def count_texts(part: pa.RecordBatch, name: str, found: Findings) -> None:
    """Takes count of everything but the pictures in some rows."""
    kind = KINDS[name]
    extra, count_problems = EXTRA[name]
    lists = part[kind.texts]
    found.texts_per_row.update(pc.fill_null(pc.list_value_length(lists), 0).to_pylist())
    texts = pc.utf8_trim_whitespace(pc.fill_null(pc.list_flatten(lists), ""))
    empty = pc.equal(texts, "")
    found.wrong[f"empty {kind.things}"] += pc.sum(empty).as_py() or 0
    words = pc.utf8_split_whitespace(texts.filter(pc.invert(empty)))
    found.words_per_text.update(pc.list_value_length(words).to_pylist())
    if "split" in part.schema.names:
        found.splits.update(part["split"].to_pylist())
    if count_problems:
        count_problems(part.select([kind.texts, *extra]).to_pylist(), found)


def check_file(path: Path, fast: bool, workers: int) -> list[str]:
    """Prints what an Arrow file holds. Returns one sentence for each thing that is wrong."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
    except (OSError, ValueError) as error:
        return [f"cannot be opened ({str(error).splitlines()[0]}); "
                "expected a complete Arrow file, was it cut off?"]
    types = {column.name: column.type for column in reader.schema}
    name = kind_of(types)
    if name is None:
        columns = ", ".join(f"{column}: {kind}" for column, kind in types.items())
        return [f"has the columns {columns}; a caption file needs image: binary and caption: "
                f"list<string>, a VQA file {', '.join(KINDS['VQA'].schema.names)}, "
                f"an NLVR2 file {', '.join(KINDS['NLVR2'].schema.names)}"]
    kind = KINDS[name]
    found = Findings()

    def pictures() -> Iterator[pa.Buffer | None]:
        """Counts all but the pictures, and hands those on without a copy, one by one."""
        for b in range(reader.num_record_batches):
            batch = reader.get_batch(b)
            batch.validate(full=True)
            for start in range(0, batch.num_rows, 1000):    # ViLT's files have one batch each
                part = batch.slice(start, 1000)
                count_texts(part, name, found)
                for row in range(part.num_rows):
                    for column in kind.images:
                        yield part[column][row].as_buffer()
                if hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED)      # what was read leaves memory

    look = partial(shorter_side, fast=fast)
    try:
        rows = sum(reader.get_batch(b).num_rows for b in range(reader.num_record_batches))
        with bar(total=rows * len(kind.images), desc=Path(path).name, leave=False,
                 unit=" pictures") as progress:
            for side, reason in in_order(look, pictures(), workers):
                row = found.pictures // len(kind.images)
                found.pictures += 1
                progress.update()
                if reason is None:
                    found.shorter_sides[side] += 1
                    continue
                found.wrong["pictures that cannot be read"] += 1
                if len(found.bad) < 10:
                    found.bad.append(f"row {row}: {reason}")
    except (OSError, pa.ArrowException, IndexError) as error:
        return [f"is damaged after row {found.pictures // len(kind.images)} "
                f"({str(error).splitlines()[0]})"]

    found.wrong[f"rows without a {kind.things[:-1]}"] = found.texts_per_row.pop(0, 0)
    print_findings(found, kind, types, fast)
    problems = [f"{count:,} {what}" for what, count in found.wrong.items() if count]
    if not found.pictures:
        problems.append("no rows")
    return problems + found.bad


# --------------------------------------------------------------------------------------------------
# What is printed.

def histogram(counts: dict[int, int], step: int = 4, width: int = 40) -> list[str]:
    """Lines of a bar chart of counts[length].

    >>> print(*histogram({3: 1, 5: 2, 6: 2}, width=8), sep=chr(10))
         0-3           1 ##
         4-7           4 ########
    """
    bins = Counter()
    for length, count in counts.items():
        bins[length // step] += count
    lines = []
    for n in range(min(bins, default=0), max(bins, default=-1) + 1):
        stars = "#" * round(width * bins[n] / max(bins.values()))
        lines.append(f"{n * step:>6}-{n * step + step - 1:<5}{bins[n]:>8,} {stars}".rstrip())
    return lines


def print_findings(found: Findings, kind: Kind, types: dict[str, pa.DataType], fast: bool) -> None:
    missing = [name for name in kind.schema.names if name not in types]
    if missing:
        print(f"    without {', '.join(missing)}, which is fine")
    besides = [name for name in types if name not in kind.schema.names]
    if besides:
        print(f"    and besides {', '.join(besides)}, which is fine")
    if found.texts_per_row:
        texts = sum(count * rows for count, rows in found.texts_per_row.items())
        print(f"    {found.pictures // len(kind.images):,} {kind.rows}, {texts:,} {kind.things}, "
              f"{min(found.texts_per_row)} to {max(found.texts_per_row)} for each")
    if found.splits:
        splits = [f"{name} {count:,}" for name, count in found.splits.most_common()]
        print(f"    splits: {', '.join(splits)}")
    if found.shorter_sides:
        sides = found.shorter_sides
        middle = median_low(sides.elements())
        note = "" if found.bad else ", all decoded"
        if fast:
            note = " (by the headers; nothing was decoded)"
        print(f"    shorter side: {min(sides)} to {max(sides)} pixels, median {middle}{note}")
    if found.words_per_text:
        print(f"    words in a {kind.things[:-1]}:", *histogram(found.words_per_text), sep="\n")


def check(args: Namespace) -> None:
    """Prints what each file holds and what is wrong with it."""
    faulty = 0
    for path in args.files:
        print(f"{path}:")
        problems = check_file(path, args.fast, args.workers)
        for problem in problems:
            print(f"    WRONG: {path} {problem}")
        if problems:
            faulty += 1
        else:
            print("    good")
    if faulty:
        fail(f"{faulty} of {len(args.files)} files have something wrong")
