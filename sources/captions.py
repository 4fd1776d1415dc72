"""The sources of captions. Each lists its Shards, and knows where a data set keeps its files.

`prepare.SOURCES` has a sentence on each layout. Captions are stripped and otherwise untouched.
"""

import glob
import json
import os
import tarfile
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from sources.shards import (Record, Shard, fail, first_existing, inside, json_items, json_lines,
                            read_entries, simple, unusable)

SHARD_ROWS = 100_000                                # ViLT cuts SBU and Conceptual Captions so
PICTURES = ("jpg", "jpeg", "png", "webp")           # members of a tar, in order of preference


def captioned(key: str, image: Path | bytes | None, captions: Iterable[str | None], split: str,
              image_id: str) -> Record:
    """The Record of an image and its captions. None stands for an empty caption."""
    kept = []
    reasons = []
    for text in captions:
        text = (text or "").strip()
        reason = unusable(text, "caption")
        if reason:
            reasons.append(reason)
        else:
            kept.append(text)
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
    images = read_entries(annotation, "images", "Karpathy's",
                          hook=lambda entry: entry["raw"] if "raw" in entry else entry)
    splits = defaultdict(list)
    for i, image in enumerate(images):
        try:
            texts = [image["filename"], image.get("filepath") or "", *image["sentences"]]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
            splits[simple(image["split"], annotation)].append(image)
        except (KeyError, TypeError, AttributeError):
            fail(f'{annotation}: images[{i}] needs "filename", "split" and "sentences", '
                 'each sentence with "raw"')

    def key_of(image):
        parts = [image.get("filepath"), image["filename"]]
        return inside("/".join(filter(None, parts)), annotation)

    # ViLT's image_id is the file name. If two folders hold files of one name, the path is used.
    file_names = {image["filename"] for image in images}
    ambiguous = len(file_names) < len({key_of(image) for image in images})

    def records(split):
        for image in splits[split]:
            key = key_of(image)
            paths = [args.root / folder / key for folder in folders]
            path = next((path for path in paths if path.exists()), paths[0])
            image_id = key if ambiguous else image["filename"]
            yield captioned(key, path, image["sentences"], split, image_id)

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
    captions = defaultdict(list)

    def reduced(entry):     # at once: five million dicts of boxes would not fit into memory
        return (entry.get("image_id"), entry["phrase"]) if "phrase" in entry else entry

    for i, image in enumerate(json_items(annotation, hook=reduced)):
        try:
            for image_id, phrase in image["regions"]:
                image_id = image["id"] if image_id is None else image_id
                captions[int(image_id)].append(str.strip(phrase))
        except (KeyError, TypeError, ValueError):
            fail(f'{annotation}: entry {i} needs "id" and "regions", '
                 'each region with "image_id" and "phrase"')

    files = {}
    for folder in ("VG_100K_2", "VG_100K"):
        for path in (args.root / "images" / folder).glob("*.jpg"):
            if path.stem.isdecimal():
                files[int(path.stem)] = f"images/{folder}/{path.name}"
    if not files:
        fail(f"{args.root}/images/VG_100K and VG_100K_2 hold no NUMBER.jpg; "
             "expected Visual Genome's pictures there")
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
    parts = name.split("/")
    if folder in parts and ".." not in parts:
        while folder in parts:
            parts = parts[parts.index(folder) + 1:]
    path = inside("/".join(parts), annotation)
    return f"{folder}/{path}" if "/" in path else f"{folder}/{path[:4]}/{path}"


def annotated_shards(root: Path, annotation: Path, split: str, name: str) -> Iterator[Shard]:
    """Shards of at most SHARD_ROWS rows.

    They are cut by the list, not by the pictures found: a finished shard stays right if more
    pictures arrive. Only the list is in memory, 330 MB for a million captions.
    """
    folder = f"images_{split}"
    first_existing(root / folder)
    captions = defaultdict(list)                    # by path: two folders may hold equal names
    for i, entry in enumerate(json_items(annotation)):
        match entry:
            case [str(path), str() | None as caption]:
                captions[path_below(folder, path, annotation)].append(caption)
            case _:
                fail(f"{annotation}: entry {i} is {str(entry)[:60]!r}; "
                     "expected [path of the image, caption]")
    keys = list(captions)

    def unlisted():
        """The pictures that the list does not have: the log of the last shard names them."""
        for place in sorted(entry.path for entry in os.scandir(root / folder) if entry.is_dir()):
            for file in sorted(os.listdir(place)):
                key = f"{folder}/{os.path.basename(place)}/{file}"
                if key not in captions:
                    yield key

    def records(start):
        stop = start + SHARD_ROWS
        for key in chain(keys[start:stop], unlisted() if stop >= len(keys) else []):
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


def conceptual(name: str) -> Callable:
    """CC3M, and CC12M under the name that METER's descendants read."""
    return partial(annotated, files={"val_annot.json": ("val", f"{name}_val"),
                                     "train_annot.json": ("train", f"{name}_train")})


sbu = partial(annotated, files={"annot.json": ("train", "sbu")})
cc3m = conceptual("conceptual_caption")
cc12m = conceptual("conceptual_caption12M")


# --------------------------------------------------------------------------------------------------
# Tars in the layout of WebDataset, as img2dataset writes them.

def tar_members(path: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """Yields (key, extension, bytes) of each file of a tar; None for files of no use.

    The tar is read once, from front to back, and not unpacked.
    """
    wanted = {*PICTURES, "txt", "json"}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                         # else tarfile keeps every header
                if not member.isreg():
                    continue
                folder, base = os.path.split(inside(member.name, path))
                stem, _, extension = base.partition(".")    # WebDataset: keys end at the first dot
                extension = extension.lower()
                data = tar.extractfile(member).read() if extension in wanted else None
                yield os.path.join(folder, stem), extension, data
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                fail(f"{path} is cut off or damaged at byte {tar.offset}; "
                     "expected a complete .tar, download it again")
    except (tarfile.TarError, OSError, EOFError) as error:
        fail(f"{path} is not a complete .tar file ({error}); download it again")


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
        paths += [path for path in found if path.suffix == ".tar"]
    paths.sort()
    if not paths:
        fail(f"{' '.join(map(str, args.root))} names no .tar file; "
             "expected a folder or a pattern of WebDataset shards")
    names = [f"{args.name or path.resolve().parent.name}_{path.stem}" for path in paths]
    for name, count in Counter(names).items():
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

def jsonl_entries(path: Path) -> Iterator[tuple[str, str, str, list[str | None]]]:
    """Yields (image, image_id, split, captions) of each line."""
    for where, entry in json_lines(path):
        captions = None
        if isinstance(entry, dict) and isinstance(entry.get("image"), str):
            captions = entry.get("captions") or [entry.get("caption")]
        if not (isinstance(captions, list)
                and all(isinstance(caption, str | None) for caption in captions)):
            fail(f'{where}: expected {{"image": path, "caption": text}}, '
                 'or "captions": [text, …] instead')
        image = inside(entry["image"], where)
        image_id = entry.get("image_id")
        image_id = image if image_id is None else str(image_id)
        yield image, image_id, simple(entry.get("split") or "train", where), captions


def jsonl_images(path: Path) -> Iterator[tuple[str, str, str, list[str | None]]]:
    """The same, with adjacent lines of one image as one entry."""
    for names, lines in groupby(jsonl_entries(path), key=lambda entry: entry[:3]):
        captions = []
        for *_, more in lines:
            captions += more
        yield *names, captions


def jsonl(args: Namespace) -> Iterator[Shard]:
    """One Shard for each split. The file is read once to count, and once for each split."""
    def records(wanted):
        for image, image_id, split, captions in jsonl_images(args.root):
            if split == wanted:
                yield captioned(image, args.root.parent / image, captions, split, image_id)

    counts = Counter(split for _, _, split, _ in jsonl_images(args.root))
    for split, count in counts.items():
        name = f"{args.name or args.root.stem}_caption_{split}"
        yield Shard(name, count, partial(records, split))
