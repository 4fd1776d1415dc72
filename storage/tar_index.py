"""Training from tars as they lie: an index of each makes it a table of captions like any other.

    table = table_of(tars_of("shards/{00000..00331}.tar"))      # a TarCaptions, for paths of tars
    table = table_of(["mine_caption_train.arrow"])              # Captions, for Arrow files

An index, `00000.tar.index`, is an Arrow file that has the captions, and for each picture where its
bytes lie in the tar. It is written once, beside the tar, and again when the tar has changed. The
pictures are read from the tar itself, memory-mapped. So order, resuming and all checks are those of
Arrow files: `prepare.py img2dataset` makes the same rows of the same tar.

An index leaves out what prepare.py leaves out, except that it reads only the headers of pictures: a
picture that breaks off inside is named when it is decoded, as one of an Arrow file is.
"""

import errno
import json
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import torch.distributed as dist
from tqdm import tqdm

from data import Captions
from pictures import open_header
from storage.disk import complete_file, naming, shortened
from storage.files import most_open_files, nested, open_arrow, recently_used, refuse
from storage.tars import SURROGATE, Sample, Tar, usable_captions

# `image` is [offset, size]: where the picture's bytes begin in the tar, and how many they are.
SCHEMA = pa.schema([("image", pa.list_(pa.int64())), ("caption", pa.list_(pa.string())),
                    ("image_id", pa.string())])
FORMAT = 1                      # of what an index says about itself; another one is written again
BATCH_ROWS = 10_000
BATCH_LETTERS = 32 << 20        # of captions in a record batch, about


def table_of(paths: Sequence[str | Path], table: type[Captions] = Captions) -> Captions:
    """The table of some files: TarCaptions if they are tars, otherwise `table`.

    What the indexes of tars leave out is printed.
    """
    if not is_tar(paths[0]):
        return table(paths)
    tars = TarCaptions(paths)
    if not dist.is_initialized() or dist.get_rank() == 0:
        say_left_out(list(tars.indexes.values()))
    return tars


def is_tar(path: str | Path) -> bool:
    return Path(path).suffix == ".tar"


# -------------------------------------------------------------------------------------------------
# The table.

class TarCaptions(Captions):
    """Captions of tars. Indexes that are missing are written. Few tars are open at a time."""
    SCHEMA = SCHEMA

    def __init__(self, paths: Iterable[str | Path]):
        paths = [Path(path) for path in paths]
        self.tars = {}                                          # path -> its bytes, memory-mapped
        self.indexes = open_indexes(paths)
        super().__init__(paths)

    def file_of(self, path: str) -> str:
        return str(self.indexes[path].path)

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        super().take(path, first_row, batch)
        index = self.file_of(path)
        places, [lengths] = nested(batch.column("image"))
        refuse(index, first_row, lengths != 2, "image is not [offset, size]")
        offset, size = places.to_numpy().astype(np.int64).reshape(-1, 2).T      # (rows,)
        end = self.indexes[path].size
        bad = (offset < 0) | (size < 0) | (size > end) | (offset > end - size)
        refuse(index, first_row, bad, "a picture outside of the tar")

    def image(self, row: int, which: int = 0) -> pa.Buffer:
        offset, size = self.cell("image", row).as_py()
        path, _ = self.place(row)
        return recently_used(self.tars, path, self._map_tar, self.most_open()).slice(offset, size)

    def _map_tar(self, path: str) -> pa.Buffer:
        """The bytes of a tar. ValueError if it is not as it was when it was indexed."""
        known = self.indexes[path]
        with naming(Path(path)), open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if (found.st_size, found.st_mtime_ns) != (known.size, known.mtime_ns):
                raise ValueError(f"{path}: has changed since it was indexed; start again")
            return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def damage(self) -> list[str]:
        """A sentence for each tar that could not be read to its end."""
        return [index.damage for index in self.indexes.values() if index.damage]

    def most_open(self) -> int:
        return max(1, most_open_files() // 2)                   # indexes, and as many tars

    def where(self, row: int) -> str:
        return f"{self.place(row)[0]} {shortened(self.cell('image_id', row).as_py())}"

    def __getstate__(self):
        return super().__getstate__() | {"tars": {}}


# -------------------------------------------------------------------------------------------------
# The indexes.

class Index(NamedTuple):
    """An index, and what it says of its tar."""
    path: Path
    size: int                       # of the tar, in bytes
    mtime_ns: int                   # when the tar was changed
    left_out: dict[str, int]        # reason -> number of samples
    damage: str                     # why the tar could not be read to its end; ""


def open_indexes(paths: list[Path]) -> dict[str, Index]:
    """{path: index} of some tars. Those that are missing are written, by all processes together."""
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    write_missing(paths[rank::world], quiet=rank > 0)
    if world > 1:
        dist.barrier()
        write_missing(paths, quiet=rank > 0)        # where the processes do not share a disk
    found = {str(path): read_index(path) for path in paths}
    for path, index in found.items():
        if index is None:
            raise ValueError(f"{path}: changes while it is read; start again when it is complete")
    return found


def say_left_out(indexes: list[Index]) -> None:
    """Prints how many samples some indexes leave out, and which tars break off."""
    left_out, logs = Counter(), []
    for index in indexes:
        left_out.update(index.left_out)
        if index.left_out:
            logs.append(log_of(index.path))
    if logs:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        more = f" and {len(logs) - 1:,} more files" if len(logs) > 1 else ""
        print(f"left out of {len(indexes):,} tars: {counts} (each is named in {logs[0]}{more})")
    damaged = [index.damage for index in indexes if index.damage]
    if damaged:
        more = f", and so are {len(damaged) - 1:,} more tars" if len(damaged) > 1 else ""
        print(f"{damaged[0]}{more}; what comes before is used")


def read_index(tar: Path) -> Index | None:
    """The index of a tar as it is now; None if there is none."""
    now = state_of(tar)
    for path in (beside(tar), in_cache(tar)):
        try:
            about = said_by(path)
            left_out = {shortened(why): int(count) for why, count in about["left_out"].items()}
            if (about["format"], about["size"], about["mtime_ns"]) == (FORMAT, *now):
                return Index(path, *now, left_out, shortened(about["damage"], 1000))
        except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError,
                AttributeError, RecursionError):
            continue                                            # there is none, or no whole one
    return None


def said_by(index: Path) -> dict:
    """What an index says about its tar. ValueError, LookupError or TypeError if it is damaged."""
    reader, _ = open_arrow(str(index))
    try:
        last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    except (OSError, pa.ArrowException) as error:               # Arrow's own has no errno
        raise ValueError(f"{index}: {error}") from None
    return json.loads(last.custom_metadata[b"about"])


def state_of(tar: Path) -> tuple[int, int]:
    """Size and time of change of a tar. An index that knows others is that of another tar."""
    try:
        found = os.stat(tar)
    except FileNotFoundError:
        raise FileNotFoundError(f"{tar}: there is no such file") from None
    return found.st_size, found.st_mtime_ns


def beside(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index")


def in_cache(tar: Path) -> Path:
    """Where the index of a tar lies whose folder cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flm"
    folder = blake2b(os.fsencode(tar.resolve().parent), digest_size=8).hexdigest()
    return cache / folder / beside(tar).name


def log_of(index: Path) -> Path:
    """What an index leaves out, as JSON lines: 00000.tar.skipped.jsonl."""
    return index.with_suffix(".skipped.jsonl")


def write_missing(tars: list[Path], quiet: bool) -> None:
    """Writes the indexes that are missing, each whole or not at all."""
    missing = [tar for tar in tars if read_index(tar) is None]
    elsewhere = {}                              # folder that cannot be written to: another one
    with tqdm(None, "indexing tars", sum(state_of(tar)[0] for tar in missing), unit="B",
              unit_scale=True, delay=2, mininterval=1, disable=quiet) as bar:
        for tar in missing:
            try:
                write_index(tar, beside(tar), bar)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                write_index(tar, in_cache(tar), bar)
                elsewhere[tar.parent] = in_cache(tar).parent
    for folder, other in elsewhere.items():
        print(f"{folder}: cannot be written to, so the indexes of its tars are in {other}")


def write_index(tar: Path, path: Path, bar: tqdm) -> None:
    """Writes the index of a tar, and a log of what it leaves out if that is anything."""
    size, mtime_ns = state_of(tar)
    source, left_out, log = Tar(tar), Counter(), log_of(path)
    with complete_file(path) as partial:
        # The log is finished first: an index always has its log.
        with (open(partial, "wb") as file, pa.ipc.new_file(file, SCHEMA) as out,
              complete_file(log) as partial_log,
              open(partial_log, "w", encoding="utf-8") as names):
            rows, letters = [], 0
            for row in index_rows(source, names, left_out, bar):
                rows.append(row)
                letters += sum(map(len, row["caption"]))
                if len(rows) >= BATCH_ROWS or letters >= BATCH_LETTERS:
                    out.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                    rows, letters = [], 0
            about = {"format": FORMAT, "size": size, "mtime_ns": mtime_ns, "left_out": left_out,
                     "damage": source.damage}
            out.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA), {"about": json.dumps(about)})
        # Two runs that begin together write the same index. With the same time, too, neither
        # takes the other's for a changed one.
        os.utime(partial, ns=(mtime_ns, mtime_ns))
    if not left_out:
        log.unlink(missing_ok=True)


def index_rows(tar: Tar, names: TextIO, left_out: Counter, bar: tqdm) -> Iterator[dict]:
    """Yields the rows of a tar's index. What is left out is counted, and named in a log.

    The rules are those of `prepare.py img2dataset`, and come in the same order.
    """
    start, keys = bar.n, set()      # hashes of the rows' keys: half the memory of the keys
    for sample in tar.samples():
        bar.update(max(0, start + sample.offset - bar.n))
        captions, reasons = usable_captions(sample.captions)
        why = why_unusable(sample) if captions else ""
        if captions and not why and hash(sample.key) in keys:
            why = "duplicate: an earlier row has this image_id"
        for reason in [why] if why else reasons:
            names.write(json.dumps({"key": sample.key, "reason": reason}) + "\n")
            left_out[reason.split(":")[0]] += 1
        if captions and not why:
            keys.add(hash(sample.key))
            yield {"image": [sample.offset, len(sample.picture)], "caption": captions,
                   "image_id": sample.key}
    bar.update(start + state_of(tar.path)[0] - bar.n)


def why_unusable(sample: Sample) -> str:
    """Why a sample with captions cannot be used; "" if it can, as far as its picture's header."""
    if SURROGATE.search(sample.key):
        return "image_id is not Unicode"
    if sample.picture is None:
        return "missing file: no picture of this key"
    try:
        open_header(sample.picture)
    except Exception as error:      # Pillow's readers raise whatever broken bytes lead to
        return f"undecodable: {shortened(error, 120) or type(error).__name__}"
    return ""
