"""The sources of captions. Each lists its Shards, and knows where a data set keeps its files.

`prepare.SOURCES` has a sentence on each layout. Captions are stripped and otherwise untouched.
"""

import csv
import glob
import os
import zipfile
from argparse import Namespace
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

from sources.shards import (Record, Shard, expecting, fail, first_existing, inside, json_lines,
                            on_disk, open_text, read_entries, simple, split_shards, strings)
from storage.disk import shortened
from storage.tars import PICTURES, Tar, unusable, usable_captions

SHARD_ROWS = 100_000                                # ViLT cuts SBU and Conceptual Captions so
LARGEST_LIST = 1 << 30                              # bytes of a list of captions in a zip


def captioned(key: str, image: Path | bytes | None, captions: Iterable[str], split: str,
              image_id: str) -> Record:
    """The Record of an image and its captions."""
    kept, reasons = usable_captions(captions)
    return Record(key, {"image": image}, {"caption": kept, "image_id": image_id, "split": split},
                  reasons)


# --------------------------------------------------------------------------------------------------
# Karpathy's splits: COCO, Flickr30k, Flickr8k, and any folder with a dataset.json.

FOLDERS = ("images", "Images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", ".")
KARPATHY = ("dataset.json", "dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
KARPATHY_ZIP = "caption_datasets.zip"               # his three files


def find_picture(root: Path, folders: Iterable[str], key: str) -> Path:
    """The path of a picture that may be in any of some folders below the root."""
    paths = [on_disk(root / folder / key) for folder in folders]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def say_unnamed(root: Path, folders: Iterable[str], keys: Iterable[str], where: str | Path) -> None:
    """Prints how many pictures lie beside those of the keys that no key names."""
    named = defaultdict(set)                        # folder below one of `folders`: file names
    for key in keys:
        parent, _, file = key.rpartition("/")
        named[parent].add(file)
    unnamed = set()
    for folder in folders:
        for parent, files in named.items():
            try:
                found = os.listdir(on_disk(root / folder / parent))
            except (OSError, ValueError):           # no folder, or no name of one
                continue
            if files.isdisjoint(found):             # perhaps a folder of something else
                continue
            unnamed |= {os.path.join(parent, file) for file in found if file not in files
                        and file.rpartition(".")[2].lower() in PICTURES}
    if unnamed:
        print(f"{where}: has no captions of {len(unnamed):,} pictures in the folder, such as "
              f"{shortened(min(unnamed))}")


def unzipped(path: Path, name: str) -> bytes | None:
    """The contents of a file in a zip, at any depth; None if it is not in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if os.path.basename(member.filename) == name and member.file_size <= LARGEST_LIST:
                    return archive.read(member)
    except Exception as error:      # zipfile raises whatever false headers lead to
        fail(f"{path} is not a complete .zip file ({shortened(error)}); download it again")
    return None


def karpathy_lists(root: Path, names: Iterable[str]) -> Iterator[tuple[Path, bytes | None]]:
    """(Path, contents if it is in Karpathy's zip) of each of some files of his that is there."""
    folders = (root / "karpathy", root)
    archives = [folder / KARPATHY_ZIP for folder in folders if (folder / KARPATHY_ZIP).is_file()]
    for name in names:
        paths = [folder / name for folder in folders if (folder / name).exists()]
        if paths:
            yield paths[0], None
            continue
        for archive in archives:
            data = unzipped(archive, name)
            if data is not None:
                yield archive / name, data
                break


def read_karpathy(path: Path, data: bytes | None) -> list[tuple[str, str, str, list[str]]]:
    """[(split, path of the picture, its file name, captions)] of a file in Karpathy's layout."""
    # A sentence becomes its text at once: the tokens of COCO's 600,000 would take a gigabyte.
    images = read_entries(path, "images", data=data,
                          hook=lambda entry: entry["raw"] if "raw" in entry else entry)
    entries = []
    for i, image in enumerate(images):
        with expecting(f"{path}: images[{i}]",
                       '"filename", "split" and "sentences", each sentence with "raw"'):
            file = image["filename"]
            key = inside(os.path.join(image.get("filepath") or "", file), path)
            entries.append((simple(image["split"], path), key, file, strings(image["sentences"])))
    return entries


def karpathy(args: Namespace, names: tuple[str, ...] = KARPATHY,
             folders: tuple[str, ...] = FOLDERS, name: str = "") -> Iterator[Shard]:
    """One Shard for each split of a JSON file in Karpathy's layout.

    names: of the file; of several that are there, the first that names a picture in the folder.
    folders: where the pictures may be. name: what the files are called.
    """
    first_existing(*(args.root / folder for folder in folders))
    annotation = None
    for path, data in karpathy_lists(args.root, names):
        listed = read_karpathy(path, data)
        known = any(os.path.exists(find_picture(args.root, folders, key))
                    for _, key, _, _ in listed)
        if annotation is None or known:
            annotation, entries = path, listed
        if known:
            break
    if annotation is None:
        first_existing(*(args.root / file for file in (*names, KARPATHY_ZIP)))
    print(f"{annotation}: {len(entries):,} pictures")
    # ViLT's image_id is the file name. If two folders hold files of one name, the path is used.
    keys = {key for _, key, _, _ in entries}
    ambiguous = len({file for _, _, file, _ in entries}) < len(keys)
    say_unnamed(args.root, folders, keys, annotation)
    splits = defaultdict(list)
    for split, *entry in entries:
        splits[split].append(entry)

    def records(split):
        for key, file, captions in splits[split]:
            path = find_picture(args.root, folders, key)
            yield captioned(key, path, captions, split, key if ambiguous else file)

    name = name or f"{args.name or args.root.resolve().name}_caption"
    for split, listed in splits.items():
        yield Shard(f"{name}_{split}", len(listed), partial(records, split))


coco = partial(karpathy, names=("dataset_coco.json",), folders=(".",),
               name="coco_caption_karpathy")
f30k = partial(karpathy, names=("dataset_flickr30k.json",), folders=("flickr30k-images",),
               name="f30k_caption_karpathy")


# --------------------------------------------------------------------------------------------------
# A folder of pictures with a table of captions, as Kaggle has Flickr8k.

CAPTION_FILES = ("captions.csv", "captions.tsv", "captions.txt")


def split_of(name: str) -> str:
    """The split of a picture by a hash of its name: 90 % train, 5 % val, 5 % test.

    It is the same on every machine, and whatever other pictures there are.

    >>> [split_of(name) for name in ("0.jpg", "9.jpg", "14.jpg")]
    ['train', 'val', 'test']
    """
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    place = int(digest, 16) % 100
    if place < 90:
        return "train"
    return "val" if place < 95 else "test"


def table_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ("path, line n", {column: text}) for each row of a table with a header.

    What separates the columns is a tab, a semicolon or a comma: whatever splits the header into
    `image` and `caption`, each once.
    """
    with open_text(path, newline="") as file:
        header = file.readline(10_000)
        for delimiter in "\t;,":
            columns = [name.strip(' "\r\n').lower() for name in header.split(delimiter)]
            if columns.count("image") == columns.count("caption") == 1:
                break
        else:
            fail(f"{path}: its first line must name the columns image and caption, and may name "
                 f"split; it is {shortened(repr(header))}")
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            where = f"{path}, line {reader.line_num + 2}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                fail(f"{where}: not a row of a table ({error}); a text that holds quotation marks "
                     'is put into quotation marks, and its own are doubled: "a ""red"" car"')
            if row is None:
                return
            if row and len(row) != len(columns):
                fail(f"{where}: {len(row)} columns, the first line has {len(columns)}; a text that "
                     f"holds {delimiter!r} is put into quotation marks")
            if row:
                yield where, dict(zip(columns, row, strict=True))


def folder(args: Namespace) -> Iterator[Shard]:
    """One Shard for each split. The lines of one picture become one row."""
    annotation = first_existing(*(args.root / name for name in CAPTION_FILES))
    captions, split_by_name = defaultdict(list), {}
    given = False
    for where, row in table_rows(annotation):
        key = inside(row["image"].strip(), where)
        given = "split" in row
        split = simple(row["split"].strip() or "train", where) if given else split_of(key)
        if split_by_name.setdefault(key, split) != split:
            fail(f"{where}: the picture {shortened(key)} is of split {split} here, and of "
                 f"{split_by_name[key]} in an earlier line")
        captions[key].append(row["caption"])
    counts = ", ".join(f"{count:,} {split}" for split, count in
                       Counter(split_by_name.values()).items())
    how = "as its column split says" if given else "split by a hash of their names"
    print(f"{annotation}: {len(captions):,} pictures, {how}: {counts or 'none'}")
    say_unnamed(args.root, FOLDERS, captions, annotation)

    def records():
        for key, texts in captions.items():
            split = split_by_name[key]
            path = find_picture(args.root, FOLDERS, key)
            yield split, captioned(key, path, texts, split, key)

    return split_shards(f"{args.name or args.root.resolve().name}_caption", records)


# --------------------------------------------------------------------------------------------------
# Visual Genome.

def vg(args: Namespace) -> Iterator[Shard]:
    """The captions of an image are the phrases of its regions; their boxes are kept too."""
    annotation = first_existing(args.root / "annotations/region_descriptions.json")
    images = read_entries(annotation, hook=partial(compact_regions, where=annotation))
    captions, boxes = {}, {}
    for i, image in enumerate(images):
        with expecting(f"{annotation}: entry {i}", '"id" and "regions"'):
            image_id = int(image["id"])
            captions[image_id], boxes[image_id] = image["regions"]

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
            phrases = captions.get(image_id, [])
            record = captioned(key, args.root / key, phrases, "train", str(image_id))
            row = {name: record.row[name] for name in ("caption", "image_id")}
            kept = [i for i, phrase in enumerate(phrases) if not unusable(phrase.strip(), "")]
            for place, name in enumerate(BOX):
                row[name] = [boxes[image_id][4 * i + place] for i in kept]
            yield record._replace(row=row)

    yield Shard("vg", len(image_ids), records, "regions")


BOX = ("width", "height", "x", "y")


def compact_regions(entry: dict, where: Path) -> dict | tuple:
    """A JSON object of Visual Genome; "regions" becomes (phrases, four numbers for each).

    It is applied to an image's regions, then to the image: as Python objects, five million regions
    would take gigabytes.
    """
    if "phrase" in entry:
        return tuple(entry.get(name) for name in ("phrase", *BOX))
    if "regions" not in entry:
        return entry
    with expecting(f"{where}: image {shortened(entry.get('id'))}",
                   '"regions", each with "phrase", "width", "height", "x" and "y"'):
        phrases, boxes = [], array("q")
        for phrase, width, height, x, y in entry["regions"]:
            phrases.append(phrase)
            boxes.extend((width, height, x, y))
        entry["regions"] = strings(phrases), boxes
    return entry


# --------------------------------------------------------------------------------------------------
# SBU and Conceptual Captions: a list of [path, caption], as ViLT asks for them.

def path_below(folder: str, name: str, annotation: Path) -> str:
    """One spelling of a picture's path. A number's first four digits name its folder.

    `images_train/0000/0000123` (behind any prefix), `0000/0000123` and `0000123` are one file.
    """
    path = inside(name.rpartition(f"{folder}/")[2], annotation)
    return f"{folder}/{path}" if "/" in path else f"{folder}/{path[:4]}/{path}"


def annotated_shards(root: Path, annotation: Path, split: str, name: str, asked: int | None,
                     most: int | None) -> Iterator[Shard]:
    """Shards of as many rows of the list each, whether or not their pictures are there (yet).

    asked: their number. Without it they have SHARD_ROWS rows, or more where they would be more
    than `most`, the number that the loaders of ViLT, METER and FLM read.
    """
    folder = f"images_{split}"
    first_existing(root / folder)
    captions = defaultdict(list)                    # by path: two folders may hold equal names
    for i, entry in enumerate(read_entries(annotation)):
        with expecting(f"{annotation}: entry {i}", "[path of the image, caption]"):
            path, caption = strings(entry)
            captions[path_below(folder, path, annotation)].append(caption)
    keys = list(captions)
    # ViLT's image_id is the file name. If two folders hold files of one name, the path is used.
    ambiguous = len({key.rpartition("/")[2] for key in keys}) < len(keys)
    count = asked or -(-len(keys) // SHARD_ROWS)
    if most and not asked:
        count = min(count, most)
    size = -(-len(keys) // count) if keys else 1

    def records(start):
        listed = keys[start:start + size]
        if start + size >= len(keys):               # the last log names pictures without a caption
            found = sorted(str(path.relative_to(root)) for path in (root / folder).glob("*/*"))
            listed = chain(listed, (key for key in found if key not in captions))
        for key in listed:
            image_id = key if ambiguous else key.rpartition("/")[2]
            yield captioned(key, root / key, captions.get(key, []), split, image_id)

    for n, start in enumerate(range(0, len(keys), size)):
        yield Shard(f"{name}_{n}", min(size, len(keys) - start), partial(records, start))


def annotated(args: Namespace, files: dict[str, tuple[str, str]],
              most: int | None = None) -> Iterator[Shard]:
    """The lists that are there. files: {name of the list: (split, name of the Arrow files)}.

    most: see annotated_shards.
    """
    first_existing(*(args.root / file for file in files))
    for file, (split, name) in files.items():
        if (args.root / file).exists():
            asked = args.shards if split == "train" else None
            yield from annotated_shards(args.root, args.root / file, split, name, asked, most)


sbu = partial(annotated, files={"annot.json": ("train", "sbu")}, most=9)
cc3m = partial(annotated, most=30,
               files={"val_annot.json": ("val", "conceptual_caption_val"),
                      "train_annot.json": ("train", "conceptual_caption_train")})
cc12m = partial(annotated, files={"val_annot.json": ("val", "conceptual_caption12M_val"),
                                  "train_annot.json": ("train", "conceptual_caption12M_train")})


# --------------------------------------------------------------------------------------------------
# Tars in the layout of WebDataset, as img2dataset writes them.

def tar_records(path: Path, split: str) -> Iterator[Record]:
    """Yields the Record of each key of a tar; ends the run if the tar is not whole."""
    tar = Tar(path)
    for sample in tar.samples():
        yield captioned(sample.key, sample.picture, sample.captions, split, sample.key)
    if tar.damage:
        fail(f"{tar.damage}; expected a complete .tar, download it again")


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

    for path, name in zip(paths, names, strict=True):
        yield Shard(name, None, partial(tar_records, path, args.split))


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
