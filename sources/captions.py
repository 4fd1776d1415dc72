"""The sources of captions. Each lists its Shards, and knows where a data set keeps its files.

`prepare.SOURCES` has a sentence on each layout. Captions are stripped and otherwise untouched.
"""

import glob
import json
import os
import tarfile
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from disk import shortened
from sources.shards import (LARGEST, Record, Shard, expecting, fail, first_existing, inside,
                            json_lines, on_disk, read_entries, simple, split_shards, strings,
                            unusable)

SHARD_ROWS = 100_000                                # ViLT cuts SBU and Conceptual Captions so
PICTURES = ("jpg", "jpeg", "png", "webp")           # members of a tar, in order of preference
LARGEST_HEADER = 1 << 20                            # bytes of what describes a member of a tar


def captioned(key: str, image: Path | bytes | None, captions: Iterable[str], split: str,
              image_id: str) -> Record:
    """The Record of an image and its captions."""
    texts = [text.strip() for text in captions]
    kept = [text for text in texts if not unusable(text, "caption")]
    reasons = [unusable(text, "caption") for text in texts if text not in kept]
    if kept:
        reasons = [f"{reason} (image kept)" for reason in reasons]
    else:
        reasons = reasons[:1] or ["no caption"]
    return Record(key, {"image": image}, {"caption": kept, "image_id": image_id, "split": split},
                  reasons)


# --------------------------------------------------------------------------------------------------
# Karpathy's splits: COCO, Flickr30k, and any folder with a dataset.json.

def karpathy(args: Namespace, json_name: str = "dataset.json",
             folders: tuple[str, ...] = ("images", "."), name: str = "") -> Iterator[Shard]:
    """One Shard for each split of a JSON file in Karpathy's layout.

    folders: where the pictures may be, below ROOT. name: what the files are called.
    """
    annotation = first_existing(args.root / "karpathy" / json_name, args.root / json_name)
    first_existing(*(args.root / folder for folder in folders))
    name = name or f"{args.name or args.root.resolve().name}_caption"
    # A sentence becomes its text at once: the tokens of COCO's 600,000 would take a gigabyte.
    images = read_entries(annotation, "images",
                          hook=lambda entry: entry["raw"] if "raw" in entry else entry)
    splits = defaultdict(list)                      # split: [(path, file name, captions)]
    for i, image in enumerate(images):
        with expecting(f"{annotation}: images[{i}]",
                       '"filename", "split" and "sentences", each sentence with "raw"'):
            path = os.path.join(image.get("filepath") or "", image["filename"])
            entry = inside(path, annotation), image["filename"], strings(image["sentences"])
            splits[simple(image["split"], annotation)].append(entry)

    # ViLT's image_id is the file name. If two folders hold files of one name, the path is used.
    entries = list(chain.from_iterable(splits.values()))
    ambiguous = len({file for _, file, _ in entries}) < len({key for key, _, _ in entries})

    def records(split):
        for key, file, captions in splits[split]:
            paths = [on_disk(args.root / folder / key) for folder in folders]
            path = next((path for path in paths if os.path.exists(path)), paths[0])
            yield captioned(key, path, captions, split, key if ambiguous else file)

    for split, listed in splits.items():
        yield Shard(f"{name}_{split}", len(listed), partial(records, split))


coco = partial(karpathy, json_name="dataset_coco.json", folders=(".",),
               name="coco_caption_karpathy")
f30k = partial(karpathy, json_name="dataset_flickr30k.json", folders=("flickr30k-images",),
               name="f30k_caption_karpathy")


# --------------------------------------------------------------------------------------------------
# Visual Genome.

def vg(args: Namespace) -> Iterator[Shard]:
    """The captions of an image are the phrases of its regions."""
    annotation = first_existing(args.root / "annotations/region_descriptions.json")
    # A region becomes its phrase at once: five million boxes would not fit into memory.
    images = read_entries(annotation, hook=lambda entry: entry.get("phrase", entry))
    captions = {}
    for i, image in enumerate(images):
        with expecting(f"{annotation}: entry {i}", '"id" and "regions", each with "phrase"'):
            captions[int(image["id"])] = strings(image["regions"])

    files = {}
    for folder in ("VG_100K_2", "VG_100K"):
        for path in (args.root / "images" / folder).glob("*.jpg"):
            if path.stem.isdecimal():
                files[int(path.stem)] = f"images/{folder}/{path.name}"
    # Pictures without a region are listed too, so that the log names them.
    image_ids = sorted(captions.keys() | files.keys())

    def records():
        for image_id in image_ids:
            key = files.get(image_id, f"images/VG_100K/{image_id}.jpg")
            yield captioned(key, args.root / key, captions.get(image_id, []), "train",
                            str(image_id))

    yield Shard("vg", len(image_ids), records)


# --------------------------------------------------------------------------------------------------
# SBU and Conceptual Captions: a list of [path, caption], as ViLT asks for them.

def path_below(folder: str, name: str, annotation: Path) -> str:
    """One spelling of a picture's path. A number's first four digits name its folder.

    `images_train/0000/0000123` (behind any prefix), `0000/0000123` and `0000123` are one file.
    """
    path = inside(name.rpartition(f"{folder}/")[2], annotation)
    return f"{folder}/{path}" if "/" in path else f"{folder}/{path[:4]}/{path}"


def annotated_shards(root: Path, annotation: Path, split: str, name: str) -> Iterator[Shard]:
    """Shards of SHARD_ROWS rows of the list, whether or not their pictures are there (yet)."""
    folder = f"images_{split}"
    first_existing(root / folder)
    captions = defaultdict(list)                    # by path: two folders may hold equal names
    for i, entry in enumerate(read_entries(annotation)):
        with expecting(f"{annotation}: entry {i}", "[path of the image, caption]"):
            path, caption = strings(entry)
            captions[path_below(folder, path, annotation)].append(caption)
    keys = list(captions)

    def records(start):
        listed = keys[start:start + SHARD_ROWS]
        if start + SHARD_ROWS >= len(keys):         # the last log names pictures without a caption
            found = sorted(str(path.relative_to(root)) for path in (root / folder).glob("*/*"))
            listed = chain(listed, (key for key in found if key not in captions))
        for key in listed:
            yield captioned(key, root / key, captions.get(key, []), split, key)

    for n, start in enumerate(range(0, len(keys), SHARD_ROWS)):
        count = min(SHARD_ROWS, len(keys) - start)
        yield Shard(f"{name}_{n}", count, partial(records, start))


def annotated(args: Namespace, files: dict[str, tuple[str, str]]) -> Iterator[Shard]:
    """The lists that are there. files: {name of the list: (split, name of the Arrow files)}."""
    first_existing(*(args.root / file for file in files))
    for file, (split, name) in files.items():
        if (args.root / file).exists():
            yield from annotated_shards(args.root, args.root / file, split, name)


sbu = partial(annotated, files={"annot.json": ("train", "sbu")})
cc3m = partial(annotated, files={"val_annot.json": ("val", "conceptual_caption_val"),
                                 "train_annot.json": ("train", "conceptual_caption_train")})
cc12m = partial(annotated, files={"val_annot.json": ("val", "conceptual_caption12M_val"),
                                  "train_annot.json": ("train", "conceptual_caption12M_train")})


# --------------------------------------------------------------------------------------------------
# Tars in the layout of WebDataset, as img2dataset writes them.

class Headers:
    """What tarfile reads of a tar: the headers, one after the other.

    ReadError for a header that leads back (it would be read for ever), or past the end.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.tell = file.tell
        self.size = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes at byte {self.tell():,}")
        return self.file.read(count)

    def seek(self, place: int) -> None:
        if not self.tell() <= place <= self.size:
            raise tarfile.ReadError(f"byte {self.tell():,} of {self.size:,} leads to {place:,}")
        self.file.seek(place)


def tar_members(path: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """Yields (key, extension, bytes) of each file of a tar; None for files of no use.

    Those are files of other extensions, links, devices, files with holes and too large ones. The
    tar is read once, from front to back, and not unpacked.
    """
    wanted = {*PICTURES, "txt", "json"}
    try:
        with (open(path, "rb") as file,
              tarfile.open(path, "r:", fileobj=Headers(file), encoding="utf-8") as tar):
            for member in iter(tar.next, None):
                tar.members.clear()                         # else tarfile keeps every header
                tar.pax_headers.clear()
                if member.isdir():
                    continue
                folder, base = os.path.split(inside(member.name, path))
                stem, _, extension = base.partition(".")    # WebDataset: keys end at the first dot
                extension = extension.lower()
                plain = member.isreg() and not member.issparse() and 0 <= member.size <= LARGEST
                data = None
                if plain and extension in wanted:
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                yield os.path.join(folder, stem), extension, data
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                fail(f"{path} is cut off or damaged at byte {tar.offset}; "
                     "expected a complete .tar, download it again")
    except Exception as error:      # tarfile raises whatever false headers lead to
        fail(f"{path} is not a complete .tar file ({shortened(error)}); download it again")


def tar_captions(files: dict[str, bytes]) -> list[str]:
    """The captions of one key: its txt, or a field of its json that img2dataset or LAION fills."""
    try:
        text = files.get("txt", b"").decode("utf-8-sig")
        if text.strip() or "json" not in files:
            return [text]
        fields = json.loads(files["json"])
        for name in ("caption", "captions", "top_caption"):
            if fields.get(name):
                found = fields[name] if isinstance(fields[name], list) else [fields[name]]
                return [caption for caption in found if isinstance(caption, str)]
    except (ValueError, AttributeError, RecursionError):
        pass
    return [""]


def img2dataset(args: Namespace) -> Iterator[Shard]:
    """One Shard for each tar."""
    paths = []
    for root in args.root:
        found = root.iterdir() if root.is_dir() else map(Path, glob.glob(str(root)))
        paths += [path for path in found if path.suffix == ".tar" and path.is_file()]
    paths.sort()
    if not paths:
        fail(f"{' '.join(map(str, args.root))} names no .tar file; "
             "expected a folder or a pattern of WebDataset shards")
    names = [f"{args.name or path.resolve().parent.name}_{path.stem}" for path in paths]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        fail(f"{count} of the .tar files would become {name}.arrow; "
             "convert their folders one by one, with --name")

    def records(path):
        for key, members in groupby(tar_members(path), key=lambda member: member[0]):
            files = {extension: data for _, extension, data in members if data is not None}
            pictures = [files[extension] for extension in PICTURES if extension in files]
            image = pictures[0] if pictures else None
            yield captioned(key, image, tar_captions(files), args.split, key)

    for path, name in zip(paths, names, strict=True):
        yield Shard(name, None, partial(records, path))


# --------------------------------------------------------------------------------------------------
# Lines of JSON.

def jsonl(args: Namespace) -> Iterator[Shard]:
    """One Shard for each split. Adjacent lines of one image become one row."""
    def lines():
        for where, entry in json_lines(args.root):
            with expecting(where, '{"image": path, "caption": text}, '
                                  'or "captions": [text, …] instead; '
                                  '"image_id" is text or a whole number'):
                image = inside(entry["image"], where)
                captions = strings(entry.get("captions") or [entry.get("caption")])
                image_id = entry.get("image_id")
                if not isinstance(image_id, str | int | None):
                    raise TypeError
            image_id = image if image_id is None else str(image_id)
            split = simple(entry.get("split") or "train", where)
            yield (split, image, image_id), captions

    def records():
        for (split, image, image_id), same in groupby(lines(), key=itemgetter(0)):
            captions = chain.from_iterable(captions for _, captions in same)
            yield split, captioned(image, args.root.parent / image, captions, split, image_id)

    return split_shards(f"{args.name or args.root.stem}_caption", records)
