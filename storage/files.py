"""The Arrow files: what is in them, what they are called, and the one door that opens them.

    find_files("data/4m", ["coco", "vg"], "train")      # the files of two datasets' training split
    known_datasets("data/4m")                           # what there is in a directory
    table = Table(paths, {"image": IMAGE})              # their rows as one sequence, all checked

Schemas and names are ViLT's, so that files made for ViLT, METER or FLM open as they are. One row
per image. data.py reads them, sources/shards.py writes them.

Training, evaluation and `prepare.py check` open files through Table. It checks all that they will
read but the pictures, so nothing behind it checks again: a damaged file would otherwise be read out
of bounds, which ends the interpreter or shows other memory as a caption.
"""

import fnmatch
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from storage.disk import naming, shortened
from storage.tars import chosen, shards_at

try:
    import resource
except ImportError:             # Windows: no limit to ask for
    resource = None

IMAGE = pa.binary()             # the type of a column of encoded pictures
CAPTIONS = pa.schema([("image", IMAGE), ("caption", pa.list_(pa.string())),
                      ("image_id", pa.string()), ("split", pa.string())])
# Visual Genome's captions are phrases of regions: the box of each, in pixels.
REGIONS = pa.schema([("image", IMAGE), ("caption", pa.list_(pa.string())),
                     ("width", pa.list_(pa.int64())), ("height", pa.list_(pa.int64())),
                     ("x", pa.list_(pa.int64())), ("y", pa.list_(pa.int64())),
                     ("image_id", pa.string())])
VQA = pa.schema([("image", IMAGE), ("questions", pa.list_(pa.string())),
                 ("answers", pa.list_(pa.list_(pa.string()))),
                 ("answer_labels", pa.list_(pa.list_(pa.int64()))),
                 ("answer_scores", pa.list_(pa.list_(pa.float64()))), ("image_id", pa.int64()),
                 ("question_id", pa.list_(pa.int64())), ("split", pa.string())])
# `identifier` is the pair's, as in ViLT's files. Each statement's own is in `identifiers`, a column
# that ViLT's files do not have and its loaders do not read.
NLVR2 = pa.schema([("image_0", IMAGE), ("image_1", IMAGE),
                   ("questions", pa.list_(pa.string())), ("answers", pa.list_(pa.string())),
                   ("identifier", pa.string()), ("identifiers", pa.list_(pa.string()))])

# Kind of data -> dataset -> split -> file names, all ViLT's. Any other dataset NAME is what
# prepare.py writes: NAME_KIND_SPLIT.arrow, or NAME_00000.arrow, … of img2dataset (train).
FILES = {
    "caption": {
        "coco": {"train": ["coco_caption_karpathy_train.arrow",
                           "coco_caption_karpathy_restval.arrow"],
                 "val": ["coco_caption_karpathy_val.arrow"],
                 "test": ["coco_caption_karpathy_test.arrow"]},
        "f30k": {"train": ["f30k_caption_karpathy_train.arrow"],
                 "val": ["f30k_caption_karpathy_val.arrow"],
                 "test": ["f30k_caption_karpathy_test.arrow"]},
        "vg": {"train": ["vg.arrow"]},
        "sbu": {"train": ["sbu_*.arrow"]},
        "gcc": {"train": ["conceptual_caption_train_*.arrow"],
                "val": ["conceptual_caption_val_*.arrow"]},
        "cc12m": {"train": ["conceptual_caption12M_train_*.arrow"],
                  "val": ["conceptual_caption12M_val_*.arrow"]},
    },
    # Training takes train and most of val; the last images of val ("val") choose the checkpoint.
    "vqa": {
        "vqav2": {"train": ["vqav2_train.arrow", "vqav2_trainable_val.arrow"],
                  "val": ["vqav2_rest_val.arrow"], "all-val": ["vqav2_val.arrow"],
                  "test": ["vqav2_test.arrow"], "test-dev": ["vqav2_test-dev.arrow"]},
    },
    "nlvr2": {
        "nlvr2": {"train": ["nlvr2_train.arrow"], "val": ["nlvr2_dev.arrow"],
                  "test": ["nlvr2_test1.arrow"]},
    },
}


def find_files(directory: str | Path, datasets: Iterable[str], split: str,
               kind: str = "caption") -> list[Path]:
    """The Arrow files of some datasets' split, in a fixed order; or its tars (tars.shards_at).

    kind: caption, vqa or nlvr2. No `datasets` means known_datasets. FileNotFoundError if a dataset
    has no training files; any other split may be missing.
    """
    shards = shards_at(directory, kind)
    if shards:
        return chosen(shards, datasets, split, directory)
    directory, found = Path(directory), []
    names = arrow_files(directory)
    for dataset in datasets or known_datasets(directory, kind):
        files = files_of(names, dataset, split, kind)
        if not files and split == "train":
            raise FileNotFoundError(f"{directory}: no {kind} files of dataset {dataset!r}; "
                                    f"{' or '.join(patterns_of(dataset, split, kind))} expected")
        found += [directory / name for name in files]
    return found


def arrow_files(directory: str | Path) -> list[str]:
    """The names of all Arrow files in a directory, sorted."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory of Arrow files or tars")
    return sorted(path.name for path in Path(directory).glob("*.arrow"))


def patterns_of(dataset: str, split: str, kind: str) -> list[str]:
    """What the files of a dataset's split are called."""
    if dataset in FILES[kind]:
        return FILES[kind][dataset].get(split, [])
    patterns = [f"{dataset}_{kind}_{split}.arrow"]
    if (kind, split) == ("caption", "train"):
        patterns.append(f"{dataset}_[0-9]*.arrow")
    if (kind, split) == ("nlvr2", "val"):
        patterns.append(f"{dataset}_nlvr2_dev.arrow")
    return patterns


def files_of(names: list[str], dataset: str, split: str, kind: str) -> list[str]:
    """Those of some file names that belong to a dataset's split."""
    found = []
    for pattern in patterns_of(dataset, split, kind):
        found += fnmatch.filter(names, pattern)
    return found


def splits_of(directory: str | Path, kind: str = "caption") -> dict[str, list[str]]:
    """Dataset -> its splits, of all datasets of a kind that have a file in a directory."""
    shards = shards_at(directory, kind)
    if shards:
        return {dataset: list(splits) for dataset, splits in shards.items()}
    names, found, published = arrow_files(directory), {}, set()
    for dataset, splits in FILES[kind].items():
        for split in splits:
            files = files_of(names, dataset, split, kind)
            if files:
                found.setdefault(dataset, []).append(split)
                published.update(files)
    for name in names:
        stem = name.removesuffix(".arrow")
        dataset, marker, split = stem.rpartition(f"_{kind}_")
        if kind == "caption" and not marker:        # perhaps a shard of img2dataset: NAME_00000
            dataset, _, number = stem.rpartition("_")
            split = "train" if number.isdecimal() else ""
        if name in published or not dataset or not split:
            continue
        if (kind, split) == ("nlvr2", "dev"):
            split = "val"
        if split not in found.setdefault(dataset, []):
            found[dataset].append(split)
    return found


def known_datasets(directory: str | Path, kind: str = "caption") -> list[str]:
    """The datasets of a kind with training files in a directory; where there are none, all.

    FileNotFoundError if there is not one file of the kind.
    """
    splits = splits_of(directory, kind)
    if not splits:
        raise FileNotFoundError(f"{directory}: no {kind} files here (such as "
                                f"NAME_{kind}_train.arrow); prepare.py and tools/toy.py write them")
    return [name for name in splits if "train" in splits[name]] or list(splits)


# -------------------------------------------------------------------------------------------------
# The door, 1: the file. It is complete, and its record batches can be read in place.

MOST_OPEN = 256         # of one table; a reader takes about 100 kB, opening one a tenth of a ms


def most_open_files() -> int:
    """How many files a table keeps open: at most a quarter of what the process may."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else -1
    return MOST_OPEN if limit < 0 else max(1, min(MOST_OPEN, limit // 4))


def open_arrow(path: str, known: tuple | None = None) -> tuple[pa.RecordBatchFileReader, tuple]:
    """(An Arrow file, memory-mapped; its size and time of change).

    known: that size and time, when the file has been checked before. ValueError if it is not a
    whole Arrow file, or has changed. The system's errors (too many open files, …) come out as such.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")
        # Arrow's own memory_map would ask the system to read a whole record batch ahead for each
        # row: 150 microseconds for a batch of 40 MB in memory, against 9.
        with open(path, "rb") as file, naming(Path(path)):
            found = os.fstat(file.fileno())
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        if known is None:
            check_layout(mapped)
            str([reader.schema.names, reader.schema.types])     # an error if one is not UTF-8
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (OSError, ValueError, struct.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path}: not a complete, uncompressed Arrow IPC file "
                         f"({reason(error)})") from None
    identity = (found.st_size, found.st_mtime_ns)
    if known not in (None, identity):
        raise ValueError(f"{path}: has changed since it was opened first; start again")
    return reader, identity


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return shortened(str(error).partition("\n")[0] or type(error).__name__)


def check_layout(file: mmap.mmap) -> None:
    """ValueError for record batches that are compressed, or that lie on top of each other.

    Either way a small file could ask for any amount of memory or time. And of a compressed batch,
    the whole batch would be unpacked for each picture. Arrow has no function that tells, so this
    reads the flatbuffers: `Footer`, `Message` and `RecordBatch` of Arrow's File.fbs, Message.fbs.
    """
    length = int_at(file, "<i", len(file) - 10)         # then comes ARROW1, the end
    start = len(file) - 10 - length
    footer = pointed_at(file, start)
    total = 0
    for field, header_type in ((2, "dictionary"), (3, "batch")):
        vector = field_of(file, footer, field)
        if not vector:
            continue
        vector = pointed_at(file, vector)
        for i in range(int_at(file, "<I", vector)):
            offset, metadata, body = struct.unpack_from("<qi4xq", file, vector + 4 + 24 * i)
            total += metadata + body
            if min(offset, metadata, body) < 0 or total > len(file):
                raise ValueError("its record batches overlap, or lie outside of it")
            if metadata and is_compressed(file, offset, header_type):
                raise ValueError("its record batches are compressed; write it without compression")


def is_compressed(file: mmap.mmap, offset: int, header_type: str) -> bool:
    """Whether the message at an offset, a record batch or a dictionary, is compressed."""
    is_new = int_at(file, "<i", offset) == -1           # since Arrow 0.15; before, no such mark
    message = pointed_at(file, offset + (8 if is_new else 4))
    header = field_of(file, message, 2)
    batch = pointed_at(file, header) if header else 0
    if batch and header_type == "dictionary":
        data = field_of(file, batch, 1)
        batch = pointed_at(file, data) if data else 0
    return bool(batch and field_of(file, batch, 3))


def int_at(file: mmap.mmap, kind: str, place: int) -> int:
    return struct.unpack_from(kind, file, place)[0]


def pointed_at(file: mmap.mmap, place: int) -> int:
    """Where a flatbuffer's pointer leads to."""
    return place + int_at(file, "<I", place)


def field_of(file: mmap.mmap, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies; 0 if the table does not have it."""
    vtable = table - int_at(file, "<i", table)
    entry = 4 + 2 * number
    if entry >= int_at(file, "<H", vtable):
        return 0
    offset = int_at(file, "<H", vtable + entry)
    return table + offset if offset else 0


# -------------------------------------------------------------------------------------------------
# The door, 2: the columns. They have the schema's types, are intact, and hold no nulls.

# What may stand where the schema has a type.
SAME = {IMAGE: (pa.types.is_binary, pa.types.is_large_binary),
        pa.string(): (pa.types.is_string, pa.types.is_large_string),
        pa.int64(): (pa.types.is_integer,), pa.float64(): (pa.types.is_floating,),
        pa.bool_(): (pa.types.is_boolean,)}
# What a column may also be: ids of images as numbers or strings, NLVR2's answers as booleans.
ALSO = {"image_id": (pa.string(), pa.int64()), "answers": (pa.list_(pa.bool_()),)}


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of one type can be read as another. Lists that are all empty have none."""
    if is_list(wanted):
        return is_list(found) and (pa.types.is_null(found.value_type)
                                   or fits(found.value_type, wanted.value_type))
    return any(is_same(found) for is_same in SAME[wanted])


def check_columns(path: str, schema: pa.Schema, columns: Mapping[str, pa.DataType]) -> None:
    """ValueError if a file lacks one of the columns, or has it twice or with another type."""
    for name, wanted in columns.items():
        count = schema.names.count(name)
        if count != 1:
            has = "has no" if count == 0 else "has more than one"
            raise ValueError(f"{path}: {has} column {name}; its columns are "
                             f"{shortened(', '.join(schema.names))}")
        found = schema.field(name).type
        if not any(fits(found, kind) for kind in (wanted, *ALSO.get(name, ()))):
            raise ValueError(f"{path}: column {name} is {simple_name(found)}, "
                             f"{simple_name(wanted)} expected")


def simple_name(kind: pa.DataType) -> str:
    """A type's name, such as list<string>."""
    return shortened(str(kind).replace("item: ", ""))


def nested(column: pa.Array) -> tuple[pa.Array, list[np.ndarray]]:
    """The innermost values of a column of lists, and the lengths of the lists at each level.

    >>> values, lengths = nested(pa.array([[[3], []], [[4, 5]]]))
    >>> values.to_pylist(), [some.tolist() for some in lengths]
    ([3, 4, 5], [[2, 1], [1, 0, 2]])
    """
    lengths = []
    while is_list(column.type):
        lengths.append(np.diff(column.offsets.to_numpy()))
        column = column.flatten()
    return column, lengths


def outermost(place: int, lengths: Sequence[np.ndarray]) -> int:
    """The row that a value stands in. place: its place among all values; lengths: see nested.

    >>> outermost(2, [np.array([2, 1]), np.array([1, 0, 2])])
    1
    """
    for some in reversed(lengths):
        place = int(np.searchsorted(np.cumsum(some), place, side="right"))
    return place


def refuse(path: str, first_row: int, bad: np.ndarray, what: str,
           lengths: Sequence[np.ndarray] = ()) -> None:
    """ValueError names the file's first row that `bad` marks, if it marks one.

    first_row: of the record batch. bad: a bool for each row; or, with the lengths of the lists
    around them (see nested), for each list or value in the rows.
    """
    if not bad.any():
        return
    row = first_row + outermost(int(bad.argmax()), lengths)
    raise ValueError(f"{path} row {row}: {what}")


def valid_batch(path: str, reader: pa.RecordBatchFileReader, number: int, first_row: int,
                columns: Iterable[str]) -> pa.RecordBatch:
    """These columns of a record batch, read from end to end, but for the pictures' bytes."""
    try:
        batch = reader.get_batch(number).select(list(columns))
        batch.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path}: record batch {number} is damaged ({reason(error)})") from None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if any(is_same(column.type) for is_same in SAME[IMAGE]):
            continue                            # no picture: as one that cannot be decoded
        lengths = []
        while True:
            if column.null_count:
                refuse(path, first_row, column.is_null().to_numpy(False), f"null in {name}",
                       lengths)
            if not is_list(column.type):
                break
            lengths.append(np.diff(column.offsets.to_numpy()))
            column = column.flatten()
    return batch


# -------------------------------------------------------------------------------------------------
# The rows.

class Table:
    """Rows of any number of Arrow files as one sequence, memory-mapped; all are checked at once.

    columns: {name: type} of what is read. optional: of what is read where a file has it. Few files
    are open at a time, and a data worker opens them again when it needs them. Only row numbers are
    kept in memory: no image is read before it is needed.
    """

    def __init__(self, paths: Iterable[str | Path], columns: Mapping[str, pa.DataType],
                 optional: Mapping[str, pa.DataType] | None = None):
        self.paths = [str(path) for path in paths]
        self.files = {}             # path -> open reader, of this process; the last used is last
        self.known = {}             # path -> size and time of the file that was checked
        self.batches = []           # (path, number of the record batch in it)
        batch_rows, file_rows = [], []
        for path in self.paths:
            reader, file = self._open(path), self.file_of(path)
            there = {name: kind for name, kind in (optional or {}).items()
                     if name in reader.schema.names}
            check_columns(file, reader.schema, columns | there)
            rows = 0
            for i in range(reader.num_record_batches):
                batch = valid_batch(file, reader, i, rows, columns | there)
                self.take(path, rows, batch)
                self.batches.append((path, i))
                batch_rows.append(batch.num_rows)
                rows += batch.num_rows
            file_rows.append(rows)
        self.starts = running_sum(batch_rows)           # first row of each batch
        self.file_starts = running_sum(file_rows)       # first row of each file

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        """Called for each record batch in turn, to check and remember more.

        first_row: the batch's first row in its file.
        """

    def file_of(self, path: str) -> str:
        """The Arrow file that is opened for a path: itself."""
        return path

    def most_open(self) -> int:
        return most_open_files()

    def _open(self, path: str) -> pa.RecordBatchFileReader:
        return recently_used(self.files, path, self._map, self.most_open())

    def _map(self, path: str) -> pa.RecordBatchFileReader:
        reader, self.known[path] = open_arrow(self.file_of(path), self.known.get(path))
        return reader

    def __getstate__(self):                             # a worker maps the files itself
        return self.__dict__ | {"files": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, number: int) -> pa.RecordBatch:
        path, i = self.batches[number]
        return self._open(path).get_batch(i)

    def batch_of(self, row: int) -> int:
        """The number of the record batch that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def cell(self, column: str, row: int) -> pa.Scalar:
        """One value, as an Arrow scalar; nothing else of the row is read."""
        number = self.batch_of(row)
        batch = self.batch(number)
        if column not in batch.schema.names:
            raise ValueError(f"{self.batches[number][0]}: has no column {column}")
        return batch.column(column)[int(row - self.starts[number])]

    def place(self, row: int) -> tuple[str, int]:
        """Where a row stands: (path, row in that file)."""
        file = int(np.searchsorted(self.file_starts, row, side="right")) - 1
        return self.paths[file], int(row - self.file_starts[file])

    def where(self, row: int) -> str:
        """A row's place in words, as messages about it name it."""
        path, place = self.place(row)
        return f"{path} row {place}"

    def rows_of_files(self) -> list[list]:
        """[[file name, number of rows]]: what a run must find again when it resumes."""
        counts = np.diff(self.file_starts).tolist()
        return [[Path(path).name, count] for path, count in zip(self.paths, counts, strict=True)]

    def named(self) -> str:
        """The files, as errors name them."""
        first = self.paths[0] if self.paths else "no file"
        more = len(self.paths) - 1
        return f"{first} and {more:,} more files" if more > 0 else first


def recently_used(opened: dict, path: str, opener: Callable, most: int) -> Any:
    """What opener(path) returned. `opened` keeps it for those `most` paths that were used last."""
    found = opened.pop(path, None)
    if found is None:
        while len(opened) >= most:
            del opened[next(iter(opened))]              # that was used longest ago
        found = opener(path)
    opened[path] = found
    return found


def running_sum(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """0, c0, c0 + c1, …: where each of some runs starts, and where the last one ends, int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
