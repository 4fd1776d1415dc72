"""What every source of prepare.py shares: Shards of Records -> Arrow files whose pictures are known to decode.

A source lists its Shards, one Arrow file each; `convert` writes those that are not finished. Pictures are read and
decoded by threads, the order of the rows stays that of the source, and what is left out is counted, and named in
NAME.skipped.jsonl. (So are the pictures that do not decode and are kept all the same: Record.keep.)
"""

import glob
import io
import json
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from typing import Callable, NamedTuple

import pyarrow as pa
from PIL import Image, ImageOps
from tqdm import tqdm

from data import CAPTIONS, FORMATS, NLVR2, VQA, Writer, to_rgb

SURROGATE = re.compile("[\ud800-\udfff]")                 # half a character: JSON can hold it, Arrow's UTF-8 cannot


def fail(sentence):
    raise SystemExit(f"prepare.py: {sentence}")


class Kind(NamedTuple):
    """A schema, and what check and the messages have to know of it."""
    schema: pa.Schema
    images: tuple                   # the columns of pictures
    texts: str                      # the column of texts: a row has at least one
    key: str                        # the column that names a row, once in a file
    rows: str                       # what messages call a row, and its texts
    things: str


KINDS = {"captions": Kind(CAPTIONS, ("image",), "caption", "image_id", "images", "captions"),
         "VQA": Kind(VQA, ("image",), "questions", "image_id", "images", "questions"),
         "NLVR2": Kind(NLVR2, ("image_0", "image_1"), "questions", "identifier", "pairs of images", "statements")}


class Record(NamedTuple):
    """One row on its way from a source to an Arrow file."""
    key: str                        # the picture's path below the root: what logs and messages call the row
    images: dict                    # column: the file, or bytes that came out of a tar, or None: there is no picture
    row: dict                       # the other columns, ready to be written; without a text the row is left out
    left: list | tuple = ()         # why it, or something of it, is left out: a short reason, details after a colon
    keep: bool = False              # also without its pictures: what bytes there are of them, or none, are then written


class Shard(NamedTuple):
    """One Arrow file to be. Nothing is read for one that is finished."""
    name: str
    size: int                       # how many Records, or, where that is not known, bytes
    records: Callable               # () -> iterator of Records
    count: Callable | None = None   # () -> how many Records, where `size` is bytes
    kind: str = "captions"          # of KINDS
    beside: Callable | None = None  # (is_written: row -> bool) writes what belongs beside the Arrow file, before it


# ---------------------------------------------------------------------------------------------------------------------
# Reading what others wrote: every complaint is one sentence with the file's name.

def inside(name, where):
    """`name` as a plain relative path; a path that would leave the folder it belongs to ends the run.

    >>> inside("./a//b.jpg", "x.json")
    'a/b.jpg'
    """
    parts = re.split(r"[/\\]", name)
    if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", name):
        fail(f"{where}: the path {name!r} leaves the folder of the data set; expected a relative path without '..'")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def simple(name, where):
    """`name`, if it can be a part of a file's name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        fail(f"{where}: {name!r} becomes part of a file name; expected letters, digits, '_', '-' and '.'")
    return name


def first_existing(*paths):
    return next((path for path in paths if path.exists()), None) or fail(
        f"{' or '.join(map(str, paths))} is missing; `prepare.py --help` shows the expected layout")


def read_json(path, hook=None):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_hook=hook)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read as JSON ({error})")


def json_items(path, hook=None, chunk=1 << 20, limit=64 << 20):
    """Yields the elements of a JSON list one after another: 5 million regions never stand in memory together."""
    decode = json.JSONDecoder(object_hook=hook).raw_decode
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(chunk).lstrip()
            if not text.startswith("["):
                fail(f"{path} does not hold a JSON list; expected it to start with '['")
            at = 1
            while True:
                at = re.compile(r"[\s,]*").match(text, at).end()
                if text[at:at + 1] == "]":
                    return
                try:
                    item, at = decode(text, at)
                except json.JSONDecodeError as error:     # cut by the end of the chunk, or wrong
                    more = file.read(chunk)
                    if not more or len(text) - at > limit:
                        fail(f"{path} is cut off or is not JSON ({error.msg} near {text[at:at + 40]!r})")
                    text, at = text[at:] + more, 0
                else:
                    yield item
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        fail(f"{path} cannot be read as JSON ({error})")


def json_lines(path):
    """Yields ("path, line n", value) for each line of a file of JSON lines; blank lines are none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        fail(f"{where} is not JSON ({error})")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as lines of UTF-8 ({error})")


def write_json(path, pieces):
    """Writes strings into a file that appears under its name only when it is complete."""
    part = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(pieces)
        os.replace(part, path)
    except OSError as error:
        fail(f"{path} could not be made ({error})")
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# One picture, one row.

class Skip(Exception):
    """Why something is left out: a short reason, and details after a colon."""


def decode(data, shorter=None, header_only=False):
    """Bytes -> (the picture, fully decoded; its size as stored). Raises Skip. Only the first frame of several is read.

    With `shorter` a JPEG may come out reduced by 2, 4 or 8, but never to less than twice that length.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        size = image.size
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise Skip(f"undecodable: {size[0]} x {size[1]} pixels, taken for a decompression bomb")
        if shorter:
            image.draft(None, (2 * shorter, 2 * shorter))
        if not header_only:
            image.load()
        return image, size
    except Skip:
        raise
    except Exception as error:   # Pillow's readers raise whatever the broken bytes lead to, not only OSError
        message = str(error).replace("\n", " ")[:120] or type(error).__name__
        raise Skip("truncated" if "truncated" in message.lower() else
                   "undecodable: not a picture we can read" if "cannot identify" in message else
                   f"undecodable: {message}") from None


def encoded(data, shorter=None, quality=90):
    """The bytes to store. Without `shorter`: `data`, once it is known to decode.

    With it: an upright RGB JPEG whose shorter side is at most that long; a picture is never enlarged, and an upright
    RGB JPEG that is small enough keeps its bytes, since another round of compression would only cost quality.
    """
    image, size = decode(data, shorter)
    if not shorter:
        return data
    if image.format == "JPEG" and image.mode == "RGB" and min(size) <= shorter and image.getexif().get(0x112, 1) == 1:
        return data
    image = to_rgb(ImageOps.exif_transpose(image))          # upright, since the new file will not say how to turn it
    if min(size) > shorter:
        long = round(shorter * max(size) / min(size))
        upright = image.width < image.height
        # Pillow's bicubic is antialiased when it makes smaller.
        image = image.resize((shorter, long) if upright else (long, shorter), Image.Resampling.BICUBIC)
    image.info.clear()                                      # no comment, profile or EXIF of the original slips through
    image.save(out := io.BytesIO(), "JPEG", quality=quality)
    return out.getvalue()


def stored(image, shorter=None, quality=90):
    """What `encoded` gives for the picture of a Record: a file, or its bytes, or None. Raises Skip."""
    if image is None:
        raise Skip("missing file: no picture of this key")
    try:
        data = image if isinstance(image, bytes) else image.read_bytes()
    except FileNotFoundError:
        raise Skip("missing file") from None
    except (OSError, ValueError) as error:
        raise Skip(f"unreadable file: {error}") from None
    try:
        return encoded(data, shorter, quality)
    except Skip:
        raise
    except Exception as error:                              # after decoding: broken EXIF, longer than JPEG allows
        raise Skip(f"cannot be re-encoded: {error}") from None


def raw(image):
    """The bytes of a picture that cannot be read, as far as there are any."""
    try:
        return image if isinstance(image, bytes) else image.read_bytes() if image else b""
    except (OSError, ValueError):
        return b""


def make_row(record, kind, shorter=None, quality=90):
    """Record -> (record, row or None, [reason of each thing left out])."""
    if not record.row[kind.texts]:
        return record, None, record.left
    if SURROGATE.search(str(record.row[kind.key])):
        return record, None, [f"{kind.key} is not Unicode"]
    images, left = {}, list(record.left)
    for column, image in record.images.items():
        try:
            images[column] = stored(image, shorter, quality)
        except Skip as error:
            reason, colon, details = str(error).partition(":")
            where = f": {column}" if len(record.images) > 1 else ""
            if not record.keep:
                return record, None, [reason + colon + details + where]
            images[column] = raw(image)
            left.append(f"{reason} ({kind.things} kept){colon}{details}{where}")
    return record, images | record.row, left


# ---------------------------------------------------------------------------------------------------------------------
# The one loop.

def in_order(function, items, workers):
    """map(function, items) by threads, results in the order of the items, at most 4 * workers of them in flight.

    Threads will do: Pillow lets go of the interpreter lock while it decodes, resizes and encodes.
    """
    pool, window = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) >= 4 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def bar(**options):
    """A progress bar on the terminal; in a log file, one line every half minute."""
    every = 0.2 if sys.stderr.isatty() else 30
    return tqdm(unit=" images", dynamic_ncols=True, mininterval=every, maxinterval=max(every, 10), **options)


def fingerprint(key):
    """8 bytes of a hash, as a number: a million of them in a set take 70 MB, where paths would take twice that."""
    return int.from_bytes(blake2b(str(key).encode(), digest_size=8).digest(), "big")


def count_reasons(reasons):
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def write_shard(shard, args, overall):
    """Reads, verifies and writes one Shard. Returns (rows, texts, Counter of reasons); no file without a picture."""
    kind = KINDS[shard.kind]
    path, log = args.out / f"{shard.name}.arrow", args.out / f"{shard.name}.skipped.jsonl"
    log_partial = log.with_name(log.name + ".partial")
    total = shard.count() if shard.count else shard.size
    seen, texts, reasons, readable = set(), 0, Counter(), 0
    try:
        with Writer(path, kind.schema) as out:
            with (open(log_partial, "w", encoding="utf-8") as names,
                  bar(total=total, desc=shard.name, position=0 if overall.disable else 1, leave=False) as progress):
                make = partial(make_row, kind=kind, shorter=args.shorter, quality=args.quality)
                for record, row, left in in_order(make, shard.records(), args.workers):
                    if row and fingerprint(row[kind.key]) in seen:
                        row, left = None, [f"duplicate: an earlier row has this {kind.key}"]
                    if row:
                        seen.add(fingerprint(row[kind.key]))
                        out.write(row)
                        texts += len(row[kind.texts])
                        readable += len(left) == len(record.left)       # no picture was added to what is left out
                    for reason in left:
                        names.write(json.dumps({"key": record.key, "reason": reason}) + "\n")
                        reasons[reason.split(":")[0]] += 1
                    progress.update()
                    overall.update(min(shard.size / max(total, 1), overall.total - overall.n))
            # First the rest, then (as the block ends) the file itself: a finished file always has what belongs to it.
            rows = out.written if readable else 0                       # all rows without a picture: a wrong folder
            if shard.beside and rows:
                shard.beside(lambda row: fingerprint(row[kind.key]) in seen)
            if reasons:
                os.replace(log_partial, log)
            else:
                log.unlink(missing_ok=True)
            if not rows:
                raise Skip                                   # makes the Writer take back its empty file
    except Skip:
        pass                                                 # and an older file of that name stays as it is
    except OSError as error:
        fail(f"{path} could not be made ({error})")
    finally:
        log_partial.unlink(missing_ok=True)
    return rows, texts, reasons


def convert(args):
    """Writes every Shard of the chosen source that is not finished."""
    for root in args.root if isinstance(args.root, list) else [args.root]:
        if not (root.exists() or glob.has_magic(str(root))):
            fail(f"{root} does not exist; expected the {args.command} download there")
    if getattr(args, "name", None):
        simple(args.name, "--name")
    shards = list(args.source(args))
    kind = KINDS[shards[0].kind if shards else "captions"]
    written, finished, everything = Counter(), 0, Counter()
    with bar(total=max(sum(shard.size for shard in shards), 1), desc="all files", position=0, disable=len(shards) < 2,
             bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}") as overall:
        for shard in shards:
            path = args.out / f"{shard.name}.arrow"
            if path.exists() and not args.force:
                finished += 1
                overall.total -= shard.size                # what was done before must not flatter the ETA
                tqdm.write(f"{path}: already finished, left as it is (--force writes it again)")
                continue
            rows, texts, reasons = write_shard(shard, args, overall)
            written.update(files=int(rows > 0), rows=rows, texts=texts)
            everything.update(reasons)
            size = f" ({path.stat().st_size / 1e6:,.1f} MB)" if rows else ": no file written"
            tqdm.write(f"{path}: {rows:,} {kind.rows}, {texts:,} {kind.things}{size}")
            if reasons:
                tqdm.write(f"    left out: {count_reasons(reasons)} (each is named in {shard.name}.skipped.jsonl)")
    print(f"{written['files']} files, {written['rows']:,} {kind.rows}, {written['texts']:,} {kind.things} written to "
          f"{args.out}; {finished} files were there; left out: {count_reasons(everything) or 'nothing'}")
    if not written["rows"] and not finished:
        fail(f"{args.root}: no image could be used; left out: {count_reasons(everything) or 'nothing was listed'}")
