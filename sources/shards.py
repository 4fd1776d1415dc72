"""Shards of Records -> Arrow files: what all sources of prepare.py share.

A source lists its Shards, one for each Arrow file, and `convert` writes those that are missing.
Threads read and decode the pictures; the rows keep the order of the source. What is left out is
counted, and named in NAME.skipped.jsonl.
"""

import glob
import io
import json
import os
import re
import stat
import sys
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from data import Captions, Questions, Statements
from pictures import open_header, open_image, turn_of
from storage.disk import complete_file, one_writer, remove_partials, shortened
from storage.files import CAPTIONS, NLVR2, REGIONS, VQA
from storage.tars import LARGEST, SURROGATE, relative


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"prepare.py: {shortened(sentence, 2000)}")


class Kind(NamedTuple):
    """A schema, how training reads it, and what messages call things."""
    schema: pa.Schema
    table: type[Captions]           # names the columns of pictures and of texts
    key: str                        # the column that names a row, unique in a file
    rows: str                       # what messages call the rows
    things: str                     # what messages call the texts


KINDS = {
    "captions": Kind(CAPTIONS, Captions, "image_id", "images", "captions"),
    "regions": Kind(REGIONS, Captions, "image_id", "images", "captions"),
    "VQA": Kind(VQA, Questions, "image_id", "images", "questions"),
    "NLVR2": Kind(NLVR2, Statements, "identifier", "pairs of images", "statements"),
}


class Record(NamedTuple):
    """One row on its way from a source to an Arrow file."""
    key: str                        # what logs call the row: the path of its picture below the root
    images: dict                    # column: a path, the bytes, or None if there is no picture
    row: dict | None                # the other columns; None, or no text in it: it is left out
    left_out: Sequence[str] = ()    # why it, or a part of it, is left out: "reason: details"
    keep: bool = False              # write it even if its pictures are missing or broken
    beside: dict = {}               # what it adds to the lists of Shard.beside: {path: values}
    readable: bool = False          # set when its pictures have been read


class Shard(NamedTuple):
    """An Arrow file to write. Nothing is read for one that is already finished."""
    name: str
    count: int | None               # number of Records; None if only reading them would tell
    records: Callable[[], Iterator[Record]]
    kind: str = "captions"          # a key of KINDS
    beside: dict = {}               # JSON files that belong to it: {path: see json_list}


# --------------------------------------------------------------------------------------------------
# Writing: a file appears under its name only when it is complete.

class Writer:
    """Streams rows into an Arrow IPC file, which appears under its name only when it is complete.

        with Writer("toy_caption_train.arrow", CAPTIONS) as out:
            out.write({"image": jpeg, "caption": ["a dog"], "image_id": "0", "split": "train"})

    Memory stays flat: a record batch is written after `batch_rows` rows, `batch_bytes` bytes of
    pictures or as many letters of texts. After an error nothing has changed on the disk.
    """

    def __init__(self, path: Path | str, schema: pa.Schema, batch_rows: int = 1000,
                 batch_bytes: int = 32 << 20):
        self.path, self.schema = Path(path), schema
        self.batch_rows, self.batch_bytes = batch_rows, batch_bytes
        self.images = [field.name for field in schema if field.type == pa.binary()]
        self.texts = [field.name for field in schema if field.type == pa.list_(pa.string())]
        self.rows = []                                      # not written yet
        self.bytes = 0                                      # of their pictures
        self.letters = 0                                    # of their texts
        self.written = 0                                    # all rows so far
        self.stack = ExitStack()

    def __enter__(self) -> "Writer":
        partial_path = self.stack.enter_context(complete_file(self.path))
        file = self.stack.enter_context(open(partial_path, "wb"))
        self.stream = self.stack.enter_context(pa.ipc.new_file(file, self.schema))
        return self

    def write(self, row: dict) -> None:
        """Appends one row, a dict with exactly the columns of the schema."""
        if set(row) != set(self.schema.names):
            raise ValueError(f"{self.path}: a row has the columns {sorted(row)}, "
                             f"the schema wants {self.schema.names}")
        self.rows.append(row)
        self.written += 1
        self.bytes += sum(len(row[name]) for name in self.images)
        self.letters += sum(len(text) for name in self.texts for text in row[name])
        if len(self.rows) >= self.batch_rows or max(self.bytes, self.letters) >= self.batch_bytes:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows = []
        self.bytes = self.letters = 0

    def __exit__(self, error, *details):
        if error:
            return self.stack.__exit__(error, *details)
        with self.stack:                                    # a full disk is an error here too
            self.flush()


@contextmanager
def json_list(path: Path, name: str | None = None) -> Iterator[Callable]:
    """Yields a function that appends values to the JSON file [values], or {name: [values]}."""
    with complete_file(path) as partial_path, open(partial_path, "w", encoding="utf-8") as file:
        file.write(f'{{"{name}": [' if name else "[")
        separator = "\n"

        def append(*values):
            nonlocal separator
            for value in values:
                file.write(separator + json.dumps(value))
                separator = ",\n"

        yield append
        file.write("\n]}\n" if name else "\n]\n")


# --------------------------------------------------------------------------------------------------
# Reading what others wrote: a complaint is one sentence that names the file, and ends the run.

def inside(name: str, where: str | Path) -> str:
    """`name` as a plain relative path. A path that leaves the folder of the data set is refused."""
    try:
        return relative(name, where)
    except ValueError as error:
        fail(str(error))


def simple(name: object, where: str | Path) -> str:
    """`name`, if it can be a part of a file name; otherwise it is refused."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,99}", name):
        fail(f"{where}: {shortened(repr(name))} becomes part of a file name; "
             "expected at most 100 letters, digits, '_', '-' and '.'")
    return name


def on_disk(path: Path) -> Path:
    """A path that a file of the data set names, in Python's spelling of the names on the disk.

    The two differ where the system's encoding is not UTF-8, as in the locale C.
    """
    try:
        return Path(os.fsdecode(str(path).encode("utf-8", errors="surrogateescape")))
    except UnicodeEncodeError:              # half a character: there is no such file
        return path


def first_existing(*paths: Path) -> Path:
    for path in paths:
        if path.exists():
            return path
    fail(f"{' or '.join(map(str, paths))} is missing; "
         "`prepare.py COMMAND --help` shows the expected layout")


@contextmanager
def expecting(where: str | Path, what: str) -> Iterator[None]:
    """Ends the run with one sentence if the block does not find what it looks for."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError,
            ArithmeticError) as error:
        details = f" ({shortened(error)})" if str(error) else ""
        fail(f"{where}: expected {what}{details}")


def strings(values: object) -> list[str]:
    """A list of strings, with "" for null; TypeError for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str | None) for value in values):
        raise TypeError
    return [value or "" for value in values]


# Bytes that are not UTF-8 become surrogates, so that the log names the texts that hold them.
open_text = partial(open, encoding="utf-8-sig", errors="surrogateescape")


def read_entries(path: Path, name: str = "", hook: Callable | None = None,
                 data: bytes | None = None) -> list:
    """The list that a JSON file holds, or with a name that of {name: [...]}.

    hook: dict -> what stands in its place, applied to every object as soon as it is read.
    Files of millions of objects fit into memory only with it.
    data: the contents of a file that is inside another, which `path` then only names.
    """
    layout = f'{{"{name}": [...]}}' if name else "[...]"
    with expecting(path, f"JSON in the official layout, {layout}"):
        if data is None:
            with open_text(path) as file:
                content = json.load(file, object_hook=hook)
        else:
            content = json.loads(data.decode("utf-8-sig", "surrogateescape"), object_hook=hook)
        entries = content[name] if name else content
        if not isinstance(entries, list):
            raise TypeError
    return entries


def json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("path, line n", object) for each line of a file of JSON lines that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            with expecting(where, "a JSON object"):
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise TypeError
            yield where, entry


def split_shards(name: str, records: Callable[[], Iterator[tuple[str, Record]]],
                 kind: str = "captions") -> Iterator[Shard]:
    """One Shard for each split of the (split, Record) pairs that records() yields.

    It is called once to count, and once for each split.
    """
    def of_split(wanted):
        for split, record in records():
            if split == wanted:
                yield record

    for split, count in Counter(split for split, _ in records()).items():
        yield Shard(f"{name}_{split}", count, partial(of_split, split), kind)


# --------------------------------------------------------------------------------------------------
# One picture, one row.

class Skip(Exception):
    """A picture cannot be used: "reason", or "reason: details"."""


def encoded(data: bytes, shorter: int | None = None, quality: int = 90) -> bytes:
    """The bytes to store for a picture: `data` without `shorter`, otherwise a JPEG. Raises Skip.

    The JPEG is RGB and upright, its shorter side at most `shorter` pixels. A picture is never
    enlarged. One that already is such a JPEG keeps its bytes, to lose no quality.
    """
    try:
        header = open_header(data)
        as_it_is = turn_of(header) is None and (header.format, header.mode) == ("JPEG", "RGB")
        # libjpeg decodes at 1/2, 1/4 or 1/8 where the shorter side stays twice as long as needed.
        least = (2 * shorter, 2 * shorter) if shorter else None
        image = open_image(data, (lambda width, height: least) if shorter else None)
    except Exception as error:      # Pillow's readers raise whatever broken bytes lead to
        message = shortened(error, 120) or type(error).__name__
        kind = "truncated" if "truncated" in message.lower() else f"undecodable: {message}"
        raise Skip(kind) from None
    if not shorter or (as_it_is and min(header.size) <= shorter):
        return data
    if min(header.size) > shorter:
        longer = round(shorter * max(header.size) / min(header.size))
        portrait = image.width < image.height
        small = (shorter, longer) if portrait else (longer, shorter)
        image = image.resize(small, Image.Resampling.BICUBIC)           # Pillow's is antialiased
    image.info.clear()                                      # no comment or profile of the original
    out = io.BytesIO()
    try:
        image.save(out, "JPEG", quality=quality)
    except (OSError, ValueError) as error:                  # longer than JPEG allows
        raise Skip(f"cannot be re-encoded: {error}") from None
    return out.getvalue()


def read_picture(image: Path | bytes | None) -> bytes:
    """The bytes of a Record's picture. Raises Skip."""
    if image is None:
        raise Skip("missing file: no picture of this key")
    if isinstance(image, bytes):
        return image
    path = on_disk(image)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:      # a device never ends
            raise ValueError(f"not a file of at most {LARGEST >> 20} MB")
        return path.read_bytes()
    except FileNotFoundError:
        raise Skip("missing file") from None
    except (OSError, ValueError) as error:
        raise Skip(f"unreadable file: {shortened(error)}") from None


def with_pictures(record: Record, kind: Kind, shorter: int | None, quality: int) -> Record:
    """The Record with a row that has its pictures, or with no row if it is left out."""
    if not record.row[kind.table.TEXT]:
        return record._replace(row=None)
    if SURROGATE.search(str(record.row[kind.key])):
        return record._replace(row=None, left_out=[f"{kind.key} is not Unicode"])
    row = dict(record.row)
    left_out = list(record.left_out)
    readable = True
    for column, image in record.images.items():
        row[column] = b""               # what stands for a picture that cannot be used
        try:
            row[column] = encoded(read_picture(image), shorter, quality)
        except Skip as error:
            readable = False
            which = f": {column}" if len(record.images) > 1 else ""
            if not record.keep:
                return record._replace(row=None, left_out=[f"{error}{which}"])
            reason, colon, details = str(error).partition(":")
            left_out.append(f"{reason} ({kind.things} kept){colon}{details}{which}")
    return record._replace(row=row, left_out=left_out, readable=readable)


# --------------------------------------------------------------------------------------------------
# The one loop.

def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) by threads; results in the order of the items.

    At most 4 * workers items are in flight. Threads are enough: Pillow releases the interpreter
    lock while it decodes, resizes and encodes.
    """
    window = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) >= 4 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def bar(**options: object) -> tqdm:
    """A progress bar on the terminal; in a log file, one line every half minute."""
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(dynamic_ncols=True, mininterval=every, maxinterval=max(every, 10), **options)


def describe(reasons: Counter) -> str:
    counts = [f"{count:,} {reason}" for reason, count in reasons.most_common()]
    return f"left out: {', '.join(counts) or 'nothing'}"


def finished_records(shard: Shard, kind: Kind, args: Namespace) -> Iterator[Record]:
    """Yields the Records of a Shard with their pictures. The second row of a key is left out."""
    read = partial(with_pictures, kind=kind, shorter=args.shorter, quality=args.quality)
    hashes = set()              # of the keys of the rows: half the memory of the keys
    for record in in_order(read, shard.records(), args.workers):
        if record.row:
            key = hash(record.row[kind.key])
            if key in hashes:
                duplicate = f"duplicate: an earlier row has this {kind.key}"
                record = record._replace(row=None, left_out=[duplicate])
            hashes.add(key)
        yield record


def write_shard(shard: Shard, args: Namespace) -> tuple[int, int, Counter]:
    """Writes one Shard and its log -> (rows, texts, reasons why something was left out).

    If not one row has its pictures, no file is written: the folder must be a wrong one.
    """
    kind = KINDS[shard.kind]
    path = args.out / f"{shard.name}.arrow"
    log = args.out / f"{shard.name}.skipped.jsonl"
    texts = 0
    reasons = Counter()
    any_readable = False
    try:
        # The last that is entered is finished first: an Arrow file always has its log and lists.
        with ExitStack() as stack:
            out = stack.enter_context(Writer(path, kind.schema))
            append = {file: stack.enter_context(json_list(file, name))
                      for file, name in shard.beside.items()}
            with (complete_file(log) as partial_log,
                  open(partial_log, "w", encoding="utf-8") as names,
                  bar(total=shard.count, desc=shard.name, leave=False, unit=" rows") as progress):
                for record in finished_records(shard, kind, args):
                    progress.update()
                    for reason in record.left_out:
                        names.write(json.dumps({"key": record.key, "reason": reason}) + "\n")
                        reasons[reason.split(":")[0]] += 1
                    if record.row is None:
                        continue
                    out.write(record.row)
                    texts += len(record.row[kind.table.TEXT])
                    any_readable |= record.readable
                    for file, values in record.beside.items():
                        append[file](*values)
            if not reasons:
                log.unlink()
            if not any_readable:
                raise Skip                                  # and all but the log is taken back
    except Skip:
        return 0, 0, reasons
    return out.written, texts, reasons


def convert(args: Namespace) -> None:
    """Writes every Shard of the chosen source that is not finished."""
    if getattr(args, "name", None):
        simple(args.name, "--name")
    with ExitStack() as args.locks:             # those that a source holds until the end of the run
        convert_shards(args)


def convert_shards(args: Namespace) -> None:
    total = Counter()
    left_out = Counter()
    for shard in list(args.source(args)):       # all, so that a wrong layout ends the run at once
        kind = KINDS[shard.kind]
        path = args.out / f"{shard.name}.arrow"
        if path.exists() and not args.force:
            print(f"{path}: already finished, left as it is (--force writes it again)")
            total["finished"] += 1
            continue
        with one_writer(args.out / f".{path.name}.lock", str(path)):
            files = (path, args.out / f"{shard.name}.skipped.jsonl", *shard.beside)
            remove_partials(args.out, *(glob.escape(file.name) for file in files))
            rows, texts, reasons = write_shard(shard, args)
        total.update(files=int(rows > 0), rows=rows, texts=texts)
        left_out.update(reasons)
        print(f"{path}: {rows:,} {kind.rows}, {texts:,} {kind.things}{'' if rows else ', no file'}")
        if reasons:
            print(f"    {describe(reasons)} (each is named in {shard.name}.skipped.jsonl)")
    if not total["rows"] and not total["finished"]:
        roots = args.root if isinstance(args.root, list) else [args.root]
        fail(f"{' '.join(map(str, roots))}: no image could be used; {describe(left_out)}")
    print(f"{total['files']} files, {total['rows']:,} {kind.rows}, {total['texts']:,} "
          f"{kind.things} written to {args.out}; {total['finished']} files were there; "
          f"{describe(left_out)}")
