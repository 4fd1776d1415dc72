"""What a data set is like, before days are spent on it: `prepare.py stats`.

    python prepare.py stats data/mine --out mine.png --json mine.json

Numbers of texts, words and pictures, their sizes, the commonest words and answers, and what comes
more than once, within a file and across files: a picture of the validation split that is in the
training split too makes every score too high. --out draws a contact sheet.

All is linear in the number of texts and pictures, and keeps about 300 bytes for each in memory.
"""

import hashlib
import json
import re
import textwrap
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from data import Captions
from pictures import open_header, open_image
from sources.check import all_values, files_in, open_table
from sources.shards import KINDS, Kind, bar, in_order
from storage import disk

SAMPLE = 1000           # pictures of each file that --fast looks at
SHOWN = 40              # pictures of a contact sheet
LISTED = 15             # words, answers, and pairs of files that are printed
# Words that say little about what is to be seen.
STOP_WORDS = set("""a about an and are as at be being by do does for from has have he her his how in
    is it its of off on one or out over she some that the their them there these they this to two up
    was what where which while who with""".split())
# Two pictures look alike if their hashes differ in at most NEAR bits. By chance no two of 7,000
# photographs do. Of copies of three quarters of the size, 79 % do; of copies of quality 50, 93 %.
NEAR = 3
NEIGHBOURS = 16         # of each hash in a sorted list, those that it is compared with


# -- texts -----------------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def text_stats(table: Captions, name: str) -> tuple[dict, np.ndarray]:
    """(What is known about a file's texts, a hash of the words of each)."""
    count = len(table.row_of)
    hashes = np.empty(count, np.int64)
    lengths = np.empty(count, np.int32)
    words = Counter()
    texts = bar(iterable=table.texts(), total=count, desc=f"{name}, texts", unit=" texts",
                leave=False, delay=1)
    for i, text in enumerate(texts):
        found = words_of(text)
        words.update(found)
        lengths[i] = len(found)
        hashes[i] = hash(" ".join(found))
    common = [(word, n) for word, n in words.most_common(LISTED + len(STOP_WORDS))
              if word not in STOP_WORDS]
    about = {"texts": count, "words": int(lengths.sum()), "different words": len(words),
             "words in a text": spread(lengths), "commonest words": dict(common[:LISTED])}
    return about, hashes


def spread(numbers: np.ndarray) -> dict[str, int]:
    """Percentiles of some numbers; of none, nothing."""
    if not len(numbers):
        return {}
    percents = {"least": 0, "5 % at most": 5, "median": 50, "95 % at most": 95, "most": 100}
    values = np.percentile(numbers, list(percents.values()), method="nearest").tolist()
    return dict(zip(percents, values, strict=True))


def answer_stats(kind: Kind, table: Captions) -> dict:
    """How often each answer is the right one: of questions, shares of the sum of their scores."""
    if kind is KINDS["captions"] or "answers" not in table.batch(0).schema.names:
        return {}
    answers = all_values(table, "answers").cast(pa.string()).combine_chunks()
    scores = np.ones(len(answers))
    if kind is KINDS["VQA"]:
        scores = all_values(table, "answer_scores").to_numpy()
    if not len(answers) or len(answers) != len(scores):         # the files of tests have none
        return {}
    coded = answers.dictionary_encode()
    sums = np.bincount(coded.indices.to_numpy(), scores)
    best = np.argsort(-sums, kind="stable")[:LISTED]
    listed = coded.dictionary.take(pa.array(best)).to_pylist()
    shares = (sums[best] / sums.sum()).round(4).tolist()
    return {"different answers": len(sums),
            "commonest answers": dict(zip(listed, shares, strict=True))}


# -- pictures --------------------------------------------------------------------------------------

class Look(NamedTuple):
    """What is kept of a picture."""
    shorter: int                # pixels
    longer: int
    grey: bool                  # without colour
    format: str
    contents: int               # a hash of its bytes
    picture: int                # a hash of what it shows


def look_at(encoded: pa.Buffer) -> Look | None:
    """None for what is no picture. A JPEG is decoded at an eighth of its size where that does."""
    try:
        header = open_header(encoded)
        image = open_image(encoded, draft=enough)
    except Exception:                   # Pillow's readers raise whatever broken bytes lead to
        return None
    small = np.asarray(image.resize((36, 32), Image.Resampling.BOX), np.float32)    # (32, 36, 3)
    grey = np.percentile(np.ptp(small, axis=-1), 95) < 12                   # JPEG is not exact
    contents = hashlib.blake2b(encoded, digest_size=8).digest()
    return Look(min(header.size), max(header.size), bool(grey), header.format,
                int.from_bytes(contents, "little"), difference_hash(small))


def enough(width: int, height: int) -> tuple[int, int]:
    """The size at which libjpeg decodes: large enough for every hash."""
    return min(width, 72), min(height, 64)


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than the one to its right.

    Another size, quality or brightness changes few of them.   pixels: (32, 36, 3)
    """
    places = pixels.reshape(8, 4, 9, 4, 3).mean((1, 3, 4))                  # (8, 9)
    bits = places[:, 1:] < places[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "little")


def picture_stats(table: Captions, name: str, fast: bool, workers: int) -> tuple[dict, dict]:
    """(What is known about a file's pictures, {"row", "contents", "picture": arrays of them})."""
    each = len(table.IMAGES)
    rows = np.arange(len(table))
    if fast and len(rows) > SAMPLE:
        rows = np.linspace(0, len(rows) - 1, SAMPLE).astype(int)
    encoded = (table.image(int(row), which) or b"" for row in rows for which in range(each))
    looks = bar(iterable=in_order(look_at, encoded, workers), total=len(rows) * each,
                desc=f"{name}, pictures", unit=" pictures", leave=False)
    kept, places, unreadable, formats = [], [], 0, Counter()
    for i, look in enumerate(looks):
        if look is None:
            unreadable += 1
        else:
            kept.append((look.contents, look.picture, look.shorter, look.longer, look.grey))
            places.append(int(rows[i // each]))
            formats[look.format] += 1
    columns = np.array(kept, np.uint64).reshape(-1, 5).T
    about = {"looked at": len(rows) * each, "unreadable": unreadable,
             "shorter side": spread(columns[2].astype(np.int64)),
             "longer side": spread(columns[3].astype(np.int64)),
             "grey": int(columns[4].sum()), "formats": dict(formats.most_common())}
    return about, {"row": np.array(places, np.int64), "contents": columns[0],
                   "picture": columns[1]}


# -- what comes more than once ---------------------------------------------------------------------

def alike(hashes: np.ndarray) -> np.ndarray:
    """For each 64-bit hash the number of its group: those that differ in few bits.

    Hashes that differ in at most 3 bits are equal in one of their 4 quarters. So they are sorted
    four times, by another quarter first, and compared with their neighbours. That is linear, and
    misses a pair only where many hashes have a quarter in common.
    """
    values, group_of = np.unique(hashes, return_inverse=True)
    left, right = [], []
    for quarter in range(4):
        bits = np.uint64(16 * quarter)
        turned = (values << bits) | (values >> np.uint64((64 - 16 * quarter) % 64))
        order = np.argsort(turned, kind="stable")
        for step in range(1, NEIGHBOURS + 1):
            pairs = order[:-step], order[step:]
            near = bits_set(values[pairs[0]] ^ values[pairs[1]]) <= NEAR
            left.append(pairs[0][near])
            right.append(pairs[1][near])
    left, right = np.concatenate(left), np.concatenate(right)
    group = np.arange(len(values))
    while True:                         # every group takes the lowest number in it
        lowest = np.minimum(group[left], group[right])
        lower = group.copy()
        np.minimum.at(lower, left, lowest)
        np.minimum.at(lower, right, lowest)
        lower = lower[lower]
        if np.array_equal(lower, group):
            return group[group_of]
        group = lower


def bits_set(values: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are 1."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1).sum(1, dtype=np.int64)


def shared(parts: list[np.ndarray]) -> np.ndarray:
    """How many different keys two files have in common, int64 (files, files).

    parts: the keys of each file. On the diagonal is the number of a file's own different keys.
    """
    files = len(parts)
    file_of = np.repeat(np.arange(files), [len(part) for part in parts])
    _, number = np.unique(np.concatenate(parts), return_inverse=True)
    pairs = np.unique(number * files + file_of)                 # of a key and a file
    counts = np.zeros((files, files))
    chunk = 1 << 16
    for first in range(0, int(number.max(initial=-1)) + 1, chunk):
        start, stop = np.searchsorted(pairs, [first * files, (first + chunk) * files])
        has = np.zeros((chunk, files), np.float32)
        has.reshape(-1)[pairs[start:stop] - first * files] = 1
        counts += has.T @ has
    return counts.astype(np.int64)


def repeated(names: list[str], parts: list[np.ndarray]) -> dict:
    """What comes more than once: {"within": {file: number}, "across": {"A and B": number}}."""
    counts = shared(parts)
    within = {name: len(part) - int(counts[i, i])
              for i, (name, part) in enumerate(zip(names, parts, strict=True))}
    across = {f"{names[i]} and {names[k]}": int(counts[i, k])
              for i in range(len(names)) for k in range(i + 1, len(names)) if counts[i, k]}
    return {"within": within, "across": across}


def examples_alike(names: list[str], pictures: list[dict], groups: list[np.ndarray]) -> list[str]:
    """Where two pictures look alike: one example for every two files, and for each alone."""
    first_of, found = {}, {}
    for name, part, numbers in zip(names, pictures, groups, strict=True):
        for row, number in zip(part["row"].tolist(), numbers.tolist(), strict=True):
            other, other_row = first_of.setdefault(number, (name, row))
            if (other, other_row) != (name, row):
                found.setdefault((other, name), f"{other} row {other_row}, {name} row {row}")
    return list(found.values())


# -- the command -----------------------------------------------------------------------------------

def stats(args: Namespace) -> None:
    """Prints what files hold, and what they have in common; writes --json and draws --out."""
    paths = list(dict.fromkeys(file for path in args.files for file in files_in(path)))
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    tables, found, texts, pictures = [], {}, [], []
    for path, name in zip(paths, names, strict=True):
        kind, table = open_table(path)
        about, hashes = text_stats(table, name)
        looks, kept = picture_stats(table, name, args.fast, args.workers)
        found[name] = {"file": str(path), "kind": kind.table.__name__.lower(), "rows": len(table),
                       **about, **answer_stats(kind, table), "pictures": looks}
        print_file(kind, found[name])
        tables.append(table)
        texts.append(hashes)
        pictures.append(kept)
    groups = alike(np.concatenate([part["picture"] for part in pictures]))
    groups = np.split(groups, np.cumsum([len(part["picture"]) for part in pictures])[:-1])
    twice = {"texts": repeated(names, texts),
             "copies of pictures": repeated(names, [part["contents"] for part in pictures]),
             "pictures that look alike": repeated(names, groups)}
    examples = examples_alike(names, pictures, groups)
    print_repeated(twice, examples)
    if args.json:
        report = {"files": found, "more than once": twice, "examples that look alike": examples}
        disk.write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False))
        print(f"wrote {args.json}")
    if args.out:
        draw(tables, args.out)
        print(f"wrote {args.out}")


def print_file(kind: Kind, about: dict) -> None:
    looks = about["pictures"]
    print(f"{about['file']}: {about['rows']:,} {kind.rows}, {about['texts']:,} {kind.things}")
    print(f"    words: {about['words']:,}, {about['different words']:,} different; in a "
          f"{kind.things[:-1]}: {listed(about['words in a text'])}")
    print(f"    commonest: {listed(about['commonest words'])}")
    if "commonest answers" in about:
        shares = {answer: f"{100 * share:.1f} %"
                  for answer, share in about["commonest answers"].items()}
        print(f"    answers: {about['different answers']:,} different; {listed(shares)}")
    readable = looks["looked at"] - looks["unreadable"]
    print(f"    pictures: {looks['looked at']:,} looked at, {looks['unreadable']:,} missing or "
          f"unreadable, {100 * looks['grey'] / max(1, readable):.1f} % grey; "
          f"{listed(looks['formats'])}")
    for side in ("shorter side", "longer side"):
        print(f"    {side} in pixels: {listed(looks[side])}")


def listed(counts: dict) -> str:
    numbers = [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
               for name, value in counts.items()]
    return disk.shortened(", ".join(numbers) or "none", 1000)


def print_repeated(twice: dict, examples: list[str]) -> None:
    print("more than once:")
    for what, counts in twice.items():
        within = {name: count for name, count in counts["within"].items() if count}
        print(f"    {what}, again in the same file: {listed(within)}")
        most = dict(Counter(counts["across"]).most_common(LISTED))
        print(f"    {what}, in two files: {listed(most)}")
    for places in examples[:LISTED]:
        print(f"    look alike: {places}")


# -- the contact sheet -----------------------------------------------------------------------------

def draw(tables: list[Captions], path: Path) -> None:
    """Draws pictures from all files, evenly spread, each above its first text."""
    import matplotlib                                               # slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    places = [(table, row) for table in tables
              for row in spread_rows(len(table), max(1, SHOWN // len(tables)))][:SHOWN]
    columns = 8
    figure, axes = plt.subplots(-(-len(places) // columns), columns, squeeze=False,
                                figsize=(16, 2.9 * -(-len(places) // columns)))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (table, row) in zip(axes.flat, places, strict=False):
        axis.imshow(shown(table, row))
        text = table.text(table.first_of(row)) if row in table.row_of else "(no text)"
        lines = textwrap.wrap(text.replace("$", r"\$"), 30)[:4]
        axis.set_title("\n".join(lines), y=-0.05, va="top", fontsize=8)
    figure.tight_layout()
    with disk.complete_file(path) as partial_path:
        figure.savefig(partial_path, format="png", dpi=80)
    plt.close(figure)


def spread_rows(count: int, wanted: int) -> list[int]:
    """Rows of a file, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist()))


def shown(table: Captions, row: int) -> np.ndarray:
    """The pictures of a row beside each other, small; one that cannot be read is grey."""
    parts = []
    for which in range(len(table.IMAGES)):
        try:
            image = open_image(table.image(row, which) or b"")
        except Exception:               # Pillow's readers raise whatever broken bytes lead to
            image = Image.new("RGB", (200, 150), "grey")
        height = 150
        width = max(1, min(600, round(height * image.width / image.height)))
        parts.append(np.asarray(image.resize((width, height))))
    return np.concatenate(parts, 1)
