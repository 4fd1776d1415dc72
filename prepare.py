"""Raw downloads -> Arrow files with ViLT's names and columns.

    python prepare.py coco  ROOT --out DIR     {train2014,val2014}/*.jpg  karpathy/dataset_coco.json
    python prepare.py f30k  ROOT --out DIR     flickr30k-images/*.jpg  karpathy/dataset_flickr30k.json
    python prepare.py vg    ROOT --out DIR     images/{VG_100K,VG_100K_2}/*.jpg  annotations/region_descriptions.json
    python prepare.py sbu   ROOT --out DIR     images_train/*/*  annot.json
    python prepare.py cc3m  ROOT --out DIR     images_{train,val}/*/*  {train,val}_annot.json    (cc12m: the same)
    python prepare.py img2dataset FOLDER --out DIR     *.tar of KEY.jpg + KEY.txt or KEY.json (WebDataset)
    python prepare.py jsonl FILE --out DIR             lines of {"image": path, "captions": ["…"], "split": "train"}
    python prepare.py karpathy FOLDER --out DIR        dataset.json in Karpathy's layout, images/

    python prepare.py vqav2 ROOT --out DIR     {train2014,val2014,test2015}/*.jpg  v2_OpenEnded_mscoco_*_questions.json
                                               v2_mscoco_*_annotations.json
    python prepare.py nlvr2 ROOT --out DIR     images/train/*/*.png  dev/*.png  test1/*.png  nlvr2/data/*.json
    python prepare.py vqa-jsonl FILE --out DIR         lines of {"image": path, "question": "…", "answers": ["…"]}
    python prepare.py nlvr2-jsonl FILE --out DIR       lines of {"images": [a, b], "sentence": "…", "label": true}

    python prepare.py check FILE.arrow …               reads files back: schema, texts, every picture

With `--shorter 384` pictures are made smaller and stored as JPEG; without it the original bytes are stored.
A file appears under its name only when it is complete, so a run that was stopped is continued by starting it again.
What was left out, and why, stands beside each file in NAME.skipped.jsonl. The sources of captions are in this file,
those of questions and statements in prepare_tasks.py, and what all share in shards.py.
"""

import argparse
import glob
import json
import mmap
import os
import sys
import tarfile
import warnings
from collections import Counter, defaultdict
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from sources.questions import nlvr2, nlvr2_jsonl, nlvr2_problems, vqa_jsonl, vqa_problems, vqav2
from sources.shards import (KINDS, SURROGATE, Record, Shard, Skip, bar, convert, decode, fail, first_existing, in_order, inside,
                    json_items, json_lines, read_json, simple)

SHARD_ROWS = 100_000   # ViLT cuts SBU and Conceptual Captions into files of this many rows
PICTURES = ("jpg", "jpeg", "png", "webp")                 # members of a tar, in order of preference


def captioned(key, image, captions, split, image_id):
    """A Record of an image and its captions, which are stripped, otherwise untouched. None stands for an empty one."""
    kept, left = [], []
    for text in captions:
        text = (text or "").strip()
        if text and not SURROGATE.search(text):
            kept.append(text)
        else:
            left.append("caption is not Unicode" if text else "empty caption")
    left = [f"{reason} (image kept)" for reason in left] if kept else left[:1] or ["no caption"]
    return Record(key, {"image": image}, {"caption": kept, "image_id": image_id, "split": split}, left)


# ---------------------------------------------------------------------------------------------------------------------
# The sources: each is a generator of Shards, and knows where its data set keeps pictures and captions.

def karpathy_shards(annotation, folders, name):
    """Karpathy's JSON, one Shard per split. A picture is looked for in each of `folders`."""
    # A sentence is kept as its text at once: the tokens of COCO's 600,000 sentences would take a gigabyte.
    content = read_json(annotation, hook=lambda d: d["raw"] if "raw" in d else d)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        fail(f'{annotation} is not in Karpathy\'s layout; expected {{"images": [...]}}')
    splits = defaultdict(list)
    for i, image in enumerate(images):
        try:
            texts = [image["filename"], image.get("filepath") or "", *image["sentences"]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            splits[simple(image["split"], annotation)].append(image)
        except (KeyError, TypeError, AttributeError):
            fail(f'{annotation}: images[{i}] needs "filename", "split" and "sentences", each sentence with "raw"')
    # ViLT's image_id is the file name. It has to name one image only, so with twins in two folders the path is used.
    paths = {(image.get("filepath"), image["filename"]) for image in images}
    twins = len({name for _, name in paths}) < len(paths)

    def records(split):
        for image in splits[split]:
            key = inside("/".join(filter(None, (image.get("filepath"), image["filename"]))), annotation)
            path = next((path for folder in folders if (path := folder / key).exists()), folders[0] / key)
            yield captioned(key, path, image["sentences"], split, key if twins else image["filename"])

    for split, found in splits.items():
        yield Shard(f"{name}_{split}", len(found), partial(records, split))


def coco(args):
    annotation = first_existing(args.root / "karpathy/dataset_coco.json", args.root / "dataset_coco.json")
    first_existing(args.root / "train2014", args.root / "val2014")
    return karpathy_shards(annotation, [args.root], "coco_caption_karpathy")


def f30k(args):
    annotation = first_existing(args.root / "karpathy/dataset_flickr30k.json", args.root / "dataset_flickr30k.json")
    return karpathy_shards(annotation, [first_existing(args.root / "flickr30k-images")], "f30k_caption_karpathy")


def karpathy(args):
    annotation = first_existing(args.root / "dataset.json")
    name = args.name or args.root.resolve().name
    return karpathy_shards(annotation, [args.root / "images", args.root], f"{name}_caption")


def vg(args):
    """Visual Genome: the captions of an image are the phrases of its regions."""
    annotation, captions = first_existing(args.root / "annotations/region_descriptions.json"), defaultdict(list)
    # A region is reduced to two values as soon as it is read: five million dicts of boxes would not fit.
    regions = json_items(annotation, hook=lambda d: (d.get("image_id"), d["phrase"]) if "phrase" in d else d)
    for i, image in enumerate(regions):
        try:
            for image_id, phrase in image["regions"]:
                captions[int(image["id"] if image_id is None else image_id)].append(str.strip(phrase))
        except (KeyError, TypeError, ValueError):
            fail(f'{annotation}: entry {i} needs "id" and "regions", each region with "image_id" and "phrase"')
    # The pictures lie in two folders; one without any region is listed too, so that the log names it.
    files = {int(path.stem): f"images/{folder}/{path.name}" for folder in ("VG_100K_2", "VG_100K")
             for path in (args.root / "images" / folder).glob("*.jpg") if path.stem.isdecimal()}
    if not files:
        fail(f"{args.root}/images/VG_100K and VG_100K_2 hold no NUMBER.jpg; expected Visual Genome's pictures there")
    ids = sorted(captions.keys() | files.keys())

    def records():
        for i in ids:
            key = files.get(i, f"images/VG_100K/{i}.jpg")
            yield captioned(key, args.root / key, captions.get(i, []), "train", str(i))

    yield Shard("vg", len(ids), records)


def annotated_shards(root, annotation, split, name):
    """A list of [path, caption], as ViLT asks for SBU and Conceptual Captions, in shards of at most SHARD_ROWS rows.

    Cut by the list, not by the pictures that are there: shards that are finished stay right if more pictures arrive.
    `images_train/0000/0000123`, the same behind any prefix, `0000/0000123` and `0000123` all name one file.
    The list is the one thing that stands in memory: 330 MB for a million captions.
    """
    folder, captions = f"images_{split}", {}
    first_existing(root / folder)
    for i, entry in enumerate(json_items(annotation)):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
                and isinstance(entry[1], str | None)):
            fail(f"{annotation}: entry {i} is {str(entry)[:60]!r}; expected [path of the image, caption]")
        parts = entry[0].split("/")
        if folder in parts and ".." not in parts:
            parts = parts[len(parts) - parts[::-1].index(folder):]
        key = inside("/".join(parts), annotation)
        key = f"{folder}/{key}" if "/" in key else f"{folder}/{key[:4]}/{key}"
        captions.setdefault(key, []).append(entry[1])       # by path: two folders may hold files of one name
    keys = list(captions)

    def unlisted():
        for place in sorted(entry.path for entry in os.scandir(root / folder) if entry.is_dir()):
            for file in sorted(os.listdir(place)):
                key = f"{folder}/{os.path.basename(place)}/{file}"
                if key not in captions:
                    yield key

    def records(start):
        last = start + SHARD_ROWS >= len(keys)
        for key in chain(keys[start:start + SHARD_ROWS], unlisted() if last else []):
            yield captioned(key, root / key, captions.get(key, []), split, key)

    for n, start in enumerate(range(0, len(keys), SHARD_ROWS)):
        yield Shard(f"{name}_{n}", min(SHARD_ROWS, len(keys) - start), partial(records, start))


def sbu(args):
    return annotated_shards(args.root, first_existing(args.root / "annot.json"), "train", "sbu")


def conceptual(args, name="conceptual_caption"):
    """CC3M, and CC12M under the name that descendants of METER read: conceptual_caption12M_train_0.arrow."""
    annotations = {split: args.root / f"{split}_annot.json" for split in ("val", "train")}
    first_existing(*annotations.values())
    for split, annotation in annotations.items():
        if annotation.exists():
            yield from annotated_shards(args.root, annotation, split, f"{name}_{split}")


def tar_members(path, read=True):
    """Yields (key, extension, bytes) of a tar's files, in one pass and without unpacking; no bytes unless `read`."""
    wanted = {*PICTURES, "txt", "json"}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                         # tarfile would keep every header it has seen
                if not member.isreg():
                    continue
                folder, base = os.path.split(inside(member.name, path))
                stem, _, extension = base.partition(".")    # WebDataset's rule: the key ends at the first full stop
                extension = extension.lower()
                yield (os.path.join(folder, stem), extension,
                       tar.extractfile(member).read() if read and extension in wanted else None)
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                fail(f"{path} is cut off or damaged at byte {tar.offset}; expected a complete .tar, download it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        fail(f"{path} is not a complete .tar file ({error}); download it again")


def tar_count(path):
    """How many pictures: a pass over the headers alone, which also finds a broken tar before the work is done."""
    return sum(extension in PICTURES for _, extension, _ in tar_members(path, read=False))


def tar_captions(files):
    """The captions among the members of one key: KEY.txt, or the field of KEY.json that img2dataset or LAION filled."""
    try:
        found = files.get("txt", b"").decode("utf-8-sig")
        if not found.strip() and "json" in files:
            fields = json.loads(files["json"])
            found = next((fields[name] for name in ("caption", "captions", "top_caption") if fields.get(name)), "")
    except (ValueError, AttributeError, RecursionError):
        found = ""
    found = found if isinstance(found, list) else [found]
    return [caption for caption in found if isinstance(caption, str)]


def img2dataset(args):
    paths = chain.from_iterable(
        root.glob("*.tar") if root.is_dir() else map(Path, glob.glob(str(root))) for root in args.root)
    paths = sorted(path for path in paths if path.suffix == ".tar")
    if not paths:
        fail(f"{' '.join(map(str, args.root))} names no .tar file; expected a folder or a pattern of WebDataset shards")
    names = [f"{args.name or path.resolve().parent.name}_{path.stem}" for path in paths]
    for name, count in Counter(names).items():
        if count > 1:
            fail(f"{count} of the .tar files would become {name}.arrow; convert their folders one by one, with --name")

    def records(path):
        for key, members in groupby(tar_members(path), key=lambda member: member[0]):
            files = {extension: data for _, extension, data in members if data is not None}
            image = next((files[extension] for extension in PICTURES if extension in files), None)
            yield captioned(key, image, tar_captions(files), args.split, key)

    for path, name in zip(paths, names):
        yield Shard(name, path.stat().st_size, partial(records, path), partial(tar_count, path))


def jsonl_entries(path):
    """Yields (image, image_id, split, captions) of each line."""
    for where, entry in json_lines(path):
        captions = (entry.get("captions") or [entry.get("caption")]) if isinstance(entry, dict) else None
        if not (isinstance(captions, list) and all(isinstance(c, str | None) for c in captions)
                and isinstance(entry.get("image"), str)):
            fail(f'{where}: expected {{"image": path, "caption": text}}, or "captions": [text, …] instead')
        image, image_id = inside(entry["image"], where), entry.get("image_id")
        yield (image, image if image_id is None else str(image_id),
               simple(entry.get("split") or "train", where), captions)


def jsonl(args):
    """Adjacent lines of one image become one row. The file is read once per split, and once before to count."""
    def records(split=None):
        for (image, image_id, name), lines in groupby(jsonl_entries(args.root), key=lambda entry: entry[:3]):
            if split in (None, name):
                yield captioned(image, args.root.parent / image, [c for line in lines for c in line[3]], name, image_id)

    for split, count in Counter(record.row["split"] for record in records()).items():
        yield Shard(f"{args.name or args.root.stem}_caption_{split}", count, partial(records, split))


# ---------------------------------------------------------------------------------------------------------------------
# Reading finished files back.

def look(data, fast):
    """Bytes of a picture -> (its shorter side, None) or (None, the reason why it cannot be read)."""
    try:
        if data is None:
            raise Skip("null instead of a picture")
        return min(decode(data, header_only=fast)[1]), None
    except Skip as reason:
        return None, str(reason)


def histogram(counts, step=4, width=40):
    """Lines of a bar chart of counts[length].

    >>> print(*histogram({3: 1, 5: 2, 6: 2}, width=8), sep=chr(10))
         0-3           1 ##
         4-7           4 ########
    """
    bins = Counter()
    for length, count in counts.items():
        bins[length // step] += count
    top = max(bins.values(), default=1)
    return [f"{n * step:>6}-{n * step + step - 1:<5}{bins[n]:>8,} {'#' * round(width * bins[n] / top)}".rstrip()
            for n in range(min(bins, default=0), max(bins, default=-1) + 1)]


# What a file of each kind needs besides pictures and texts, and the function that looks at it.
COLUMNS = {"captions": ((), None),
           "VQA": (("question_id", "answers", "answer_labels", "answer_scores"), vqa_problems),
           "NLVR2": (("answers", "identifier"), nlvr2_problems)}


def kind_of(types):
    """The name of a file's kind, by its columns {name: type}; None where it is none of them, or some are missing."""
    is_list = lambda t: pa.types.is_list(t) or pa.types.is_large_list(t)               # noqa: E731
    is_text = lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)           # noqa: E731
    is_image = lambda t: pa.types.is_binary(t) or pa.types.is_large_binary(t)          # noqa: E731
    for name, kind in KINDS.items():
        texts = types.get(kind.texts, pa.null())
        if (all(is_image(types.get(image, pa.null())) for image in kind.images) and is_list(texts)
                and is_text(texts.value_type)
                and all(column in types and is_list(types[column]) != (column == kind.key)
                        for column in COLUMNS[name][0])):
            return name


def check_file(path, fast, workers):
    """Prints what an Arrow file holds; returns the sentences of what is wrong with it."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
    except (OSError, ValueError) as error:
        return [f"cannot be opened ({str(error).splitlines()[0]}); expected a complete Arrow file, was it cut off?"]
    types = {field.name: field.type for field in reader.schema}
    name = kind_of(types)
    if name is None:
        found = ", ".join(f"{column}: {type_}" for column, type_ in types.items())
        return [f"has the columns {found}; a caption file needs image: binary and caption: list<string>, a VQA file "
                f"{', '.join(KINDS['VQA'].schema.names)}, an NLVR2 file {', '.join(KINDS['NLVR2'].schema.names)}"]
    kind, (extra, problems_of) = KINDS[name], COLUMNS[name]
    for note, columns in (("without", [n for n in kind.schema.names if n not in types]),
                          ("and besides", [n for n in types if n not in kind.schema.names])):
        if columns:
            print(f"    {note} {', '.join(columns)}, which is fine")

    looked, words, sides, splits, per_row = 0, Counter(), Counter(), Counter(), Counter()
    wrong, bad, seen = Counter(), [], set()                  # bad: (row, reason) of the first few pictures

    def slices():
        """At most 1,000 rows at a time: the files of ViLT hold all rows in one batch."""
        for b in range(reader.num_record_batches):
            batch = reader.get_batch(b)
            batch.validate(full=True)
            for start in range(0, batch.num_rows, 1000):
                yield batch.slice(start, 1000)
                if hasattr(mmap, "MADV_DONTNEED"):
                    mapped.madvise(mmap.MADV_DONTNEED)       # what was read leaves memory; a 100 GB file stays flat

    def pictures():
        """Takes count of all but the pictures, and hands those on, without a copy, one by one."""
        for part in slices():
            lists = part[kind.texts]
            lengths = pc.fill_null(pc.list_value_length(lists), 0)
            per_row.update(lengths.to_pylist())
            texts = pc.utf8_trim_whitespace(pc.fill_null(pc.list_flatten(lists), ""))
            empty = pc.equal(texts, "")
            wrong[f"empty {kind.things}"] += pc.sum(empty).as_py() or 0
            words.update(pc.list_value_length(pc.utf8_split_whitespace(texts.filter(pc.invert(empty)))).to_pylist())
            if "split" in types:
                splits.update(part["split"].to_pylist())
            if extra:
                problems_of(part.select([kind.texts, *extra]).to_pylist(), seen, wrong)
            for values in zip(*(part[column] for column in kind.images)):
                yield from (value.as_buffer() for value in values)

    try:
        total = sum(reader.get_batch(b).num_rows for b in range(reader.num_record_batches)) * len(kind.images)
        with bar(total=total, desc=Path(path).name, leave=False) as progress:
            for side, reason in in_order(partial(look, fast=fast), pictures(), workers):
                if reason:
                    wrong["pictures that cannot be read"] += 1
                    bad += [(looked // len(kind.images), reason)] if len(bad) < 10 else []
                else:
                    sides[side] += 1
                looked += 1
                progress.update()
    except (OSError, pa.ArrowException, IndexError) as error:
        return [f"is damaged after row {looked // len(kind.images)} ({str(error).splitlines()[0]})"]

    wrong[f"rows without a {kind.things[:-1]}"] = per_row.pop(0, 0)
    if per_row:
        texts = sum(n * count for n, count in per_row.items())
        print(f"    {looked // len(kind.images):,} {kind.rows}, {texts:,} {kind.things}, "
              f"{min(per_row)} to {max(per_row)} for each")
    if splits:
        print(f"    splits: {', '.join(f'{name} {count:,}' for name, count in splits.most_common())}")
    if sides:
        ordered, middle = sorted(sides), (sum(sides.values()) + 1) // 2
        median = ordered[np.searchsorted(np.cumsum([sides[side] for side in ordered]), middle)]
        print(f"    shorter side: {ordered[0]} to {ordered[-1]} pixels, median {median}"
              f"{' (by the headers; nothing was decoded)' if fast else ', all decoded' if not bad else ''}")
    if words:
        print(f"    words in a {kind.things[:-1]}:", *histogram(words), sep="\n")
    problems = [f"{count:,} {what}" for what, count in wrong.items() if count] + ([] if looked else ["no rows"])
    return problems + [f"row {row}: {reason}" for row, reason in bad]


def check(args):
    faulty = 0
    for path in args.files:
        print(f"{path}:")
        problems = check_file(path, args.fast, args.workers)
        faulty += bool(problems)
        print(*(f"    WRONG: {path} {problem}" for problem in problems) if problems else ["    good"], sep="\n")
    if faulty:
        fail(f"{faulty} of {len(args.files)} files have something wrong")


# ---------------------------------------------------------------------------------------------------------------------

SOURCES = {   # command: (source, what ROOT is, what it writes)
    "coco": (coco, "folder with train2014/, val2014/, karpathy/dataset_coco.json",
             "coco_caption_karpathy_{train,restval,val,test}.arrow"),
    "f30k": (f30k, "folder with flickr30k-images/, karpathy/dataset_flickr30k.json",
             "f30k_caption_karpathy_{train,val,test}.arrow"),
    "vg": (vg, "folder with images/VG_100K/, images/VG_100K_2/, annotations/region_descriptions.json", "vg.arrow"),
    "sbu": (sbu, "folder with images_train/*/*, annot.json = [[path, caption], …]", "sbu_{0..}.arrow"),
    "cc3m": (conceptual, "folder with images_{train,val}/*/*, {train,val}_annot.json = [[path, caption], …]",
             "conceptual_caption_{train,val}_{0..}.arrow"),
    "cc12m": (partial(conceptual, name="conceptual_caption12M"), "as cc3m",
              "conceptual_caption12M_{train,val}_{0..}.arrow"),
    "img2dataset": (img2dataset, "folder, or quoted pattern, of .tar files with KEY.jpg and KEY.txt or KEY.json",
                    "NAME_{shard}.arrow, one per tar"),
    "jsonl": (jsonl, 'file of {"image": path beside the file, "caption" or "captions", "image_id", "split"} lines',
              "NAME_caption_{split}.arrow"),
    "karpathy": (karpathy, "folder with dataset.json in Karpathy's layout and images/", "NAME_caption_{split}.arrow"),
    "vqav2": (vqav2, "folder with {train2014,val2014,test2015}/, v2_OpenEnded_mscoco_*_questions.json and "
              "v2_mscoco_*_annotations.json; or with questions_{split}.json, annotations_{split}.json and images/",
              "vqav2_{train,val,trainable_val,rest_val,test,test-dev}.arrow, vqav2_answers.json"),
    "nlvr2": (nlvr2, "folder with images/train/*/, dev/, test1/ and nlvr2/data/ (or nlvr/nlvr2/data/)",
              "nlvr2_{train,dev,test1}.arrow, nlvr2_{balanced,unbalanced}_{dev,test1}.json"),
    "vqa-jsonl": (vqa_jsonl, 'file of {"image": path beside the file, "question", "answers", "split", "image_id", '
                  '"question_id"} lines', "NAME_vqa_{split}.arrow, NAME_vqa_answers.json"),
    "nlvr2-jsonl": (nlvr2_jsonl, 'file of {"images": [left, right], "sentence", "label", "split", "identifier"} lines',
                    "NAME_nlvr2_{split}.arrow"),
}


def number(low, high):
    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return parse


def parser():
    top = argparse.ArgumentParser(prog="prepare.py", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = dict(type=number(1, 256), default=min(cores, 32), help="threads that decode pictures (%(default)s)")
    for name, (source, root, writes) in SOURCES.items():
        sub = commands.add_parser(name, help=f"-> {writes}", description=f"Writes {writes}.",
                                  aliases=["gcc"] if name == "cc3m" else [])
        sub.add_argument("root", type=Path, nargs="+" if name == "img2dataset" else None, help=root)
        sub.add_argument("--out", type=Path, required=True, help="folder for the Arrow files")
        sub.add_argument("--shorter", type=number(1, 16384), metavar="PIXELS",
                         help="store JPEGs whose shorter side is at most this (default: the original bytes)")
        sub.add_argument("--quality", type=number(1, 100), default=90, help="of those JPEGs (%(default)s)")
        sub.add_argument("--workers", **workers)
        sub.add_argument("--force", action="store_true", help="write finished files again")
        if name in ("img2dataset", "jsonl", "karpathy", "vqav2", "vqa-jsonl", "nlvr2-jsonl"):
            sub.add_argument("--name", help="NAME in the files' names (default: " + (
                "files are called vqav2_*, with it NAME_vqa_*)" if name == "vqav2" else "that of the folder or file)"))
        if name in ("vqav2", "vqa-jsonl"):
            sub.add_argument("--answers", type=Path, metavar="FILE", help="answer list to use (default: made of the "
                             "annotations, but those of test)")
            sub.add_argument("--at-least", type=number(1, 10 ** 9), default=9 if name == "vqav2" else 1, metavar="N",
                             help="how often an answer of the list is the majority's (%(default)s)")
        if name == "img2dataset":
            sub.add_argument("--split", default="train", help="what the column `split` says (%(default)s)")
        sub.set_defaults(run=convert, source=source)
    sub = commands.add_parser("check", help="reads finished files back",
                              description="Reads finished files back. The exit status is 1 if something is wrong.")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE.arrow")
    sub.add_argument("--fast", action="store_true", help="look at the headers of the pictures only")
    sub.add_argument("--workers", **workers)
    sub.set_defaults(run=check)
    return top


def main(arguments=None):
    args = parser().parse_args(arguments)
    Image.init()                                             # once, before the threads
    warnings.filterwarnings("ignore", module="PIL")          # bombs and broken EXIF: what matters of it becomes a Skip
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("prepare.py: stopped; finished files stay, the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
