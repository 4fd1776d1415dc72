"""Tars in the layout of WebDataset, as img2dataset writes them: where they lie, what is in them.

    shards_at("shards/{00000..00331}.tar")      # {"shards": {"train": [the paths], "val": …}}
    tar = Tar("shards/00000.tar")
    for sample in tar.samples():                # read once, from front to back; nothing is unpacked
        sample.key, sample.picture, sample.captions
    tar.damage                                  # why not all of it could be read; "" if all was

The files of a sample stand side by side in the tar: KEY.jpg with KEY.txt or KEY.json.
sources/captions.py converts them, storage/tar_index.py reads them as they lie.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.disk import naming, shortened

PICTURES = ("jpg", "jpeg", "png", "webp")   # extensions, in order of preference
LARGEST = 256 << 20                         # bytes of a file; a larger one is left out
LARGEST_HEADER = 1 << 20                    # bytes of what describes a file
# Half a character: JSON can hold it, the UTF-8 of Arrow cannot.
SURROGATE = re.compile("[\ud800-\udfff]")


# -------------------------------------------------------------------------------------------------
# Where they lie.

SPLITS = ("train", "val", "test")
MOST_NAMES = 1_000_000                      # that a pattern may stand for


def shards_at(data: str | Path, kind: str = "caption") -> dict[str, dict[str, list[Path]]]:
    """{dataset: {split: its tars}} of a pattern or a folder; {} for a folder of something else.

    A pattern ends in .tar; {00000..00331}, {a,b}, * and ? stand for several names. It names the
    training data. A folder's own tars, and those in its `train`, are the training data too. Those
    of a split are in a folder `val` or `test` beside them. A folder of such folders holds a dataset
    in each. One that has Arrow files holds those only, as prepare.py may have written them there.
    ValueError if there are tars and another kind of data than captions is asked for.
    """
    folder, found = Path(data), {}
    if folder.is_dir():
        if not any(folder.glob("*.arrow")):
            found = datasets_in(folder)
    elif folder.suffix == ".tar":
        fixed = re.split(r"[{*?\[]", str(data))[0]
        folder = Path(os.path.dirname(fixed))
        if folder.name == "train":
            folder = folder.parent
        splits = splits_in(folder) | {"train": tars_of(str(data))}
        found = {folder.resolve().name: splits}
    if found and kind != "caption":
        raise ValueError(f"{data}: .tar files hold captions, for pretraining, captioning and "
                         f"retrieval; {kind} needs Arrow files, which prepare.py writes")
    return found


def datasets_in(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The datasets of a folder: itself, or if it has no tars its folders that have some."""
    splits = splits_in(folder)
    if splits:
        return {folder.resolve().name: splits}
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        splits = splits_in(path)
        if splits:
            found[path.name] = splits
    return found


def splits_in(folder: Path) -> dict[str, list[Path]]:
    """{split: its tars, sorted} of one dataset's folder."""
    found = {split: sorted((folder / split).glob("*.tar")) for split in SPLITS}
    found["train"] = sorted(folder.glob("*.tar")) + found["train"]
    return {split: paths for split, paths in found.items() if paths}


def chosen(shards: dict, datasets: Iterable[str], split: str, data: str | Path) -> list[Path]:
    """The tars of some datasets' split. FileNotFoundError for a dataset that is not there."""
    found = []
    for dataset in datasets or shards:
        if dataset not in shards:
            raise FileNotFoundError(f"{data}: no tars of dataset {dataset!r}; there are those of "
                                    f"{', '.join(shards)}")
        found += shards[dataset].get(split, [])
    if not found and split == "train":
        raise FileNotFoundError(f"{data}: no tars to train on, only those of other splits")
    return found


def tars_of(pattern: str) -> list[Path]:
    """The files that a pattern stands for, sorted. FileNotFoundError if one is not there."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    names = set()
    for name in expanded(pattern):
        found = glob.glob(name) if glob.has_magic(name) else [name]
        if not found:
            raise FileNotFoundError(f"{name}: there is no such file")
        names.update(found)
    missing = sorted(name for name in names if not os.path.isfile(name))
    if missing:
        of_all = f" ({len(missing):,} of {len(names):,} are missing)" if len(names) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}: there is no such file{of_all}")
    return [Path(name) for name in sorted(names)]


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for.

    >>> expanded("{cc,sbu}/{08..10}.tar")
    ['cc/08.tar', 'cc/09.tar', 'cc/10.tar', 'sbu/08.tar', 'sbu/09.tar', 'sbu/10.tar']
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)            # none inside of them
    if not braces:
        return [pattern]
    names = []
    for choice in choices(braces[1]):
        names += expanded(pattern[:braces.start()] + choice + pattern[braces.end():])
        if len(names) > MOST_NAMES:
            raise ValueError(f"{pattern}: stands for more than {MOST_NAMES:,} files")
    return names


def choices(inside: str) -> list[str]:
    """What stands in braces: numbers from first to last, or names with commas between them."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside, re.ASCII)
    if not numbers and "," not in inside:
        raise ValueError(f"{{{inside}}}: {{first..last}} or {{one,another}} is expected in a "
                         "pattern of files")
    if not numbers:
        return inside.split(",")
    if max(map(len, numbers.groups())) > 12 or int(numbers[2]) - int(numbers[1]) >= MOST_NAMES:
        raise ValueError(f"{{{inside}}}: stands for more than {MOST_NAMES:,} files")
    if int(numbers[2]) < int(numbers[1]):
        raise ValueError(f"{{{inside}}}: the first number is larger than the last")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    return [f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]


# -------------------------------------------------------------------------------------------------
# What is in them.

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


class Member(NamedTuple):
    """A file of a tar."""
    key: str
    extension: str
    data: bytes | None              # None if it is of no use
    offset: int                     # where the data begin in the tar


class Sample(NamedTuple):
    """The files of one key."""
    key: str
    picture: bytes | None
    offset: int                     # where the picture begins in the tar
    captions: list[str]             # as they are there; see usable_captions


class Tar:
    """The samples of a tar. What is cut off or damaged at its end is said in `damage`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.damage = ""            # known when all is read: a sentence without its full stop

    def samples(self) -> Iterator[Sample]:
        """Yields the samples in the order of the tar. ValueError for a name that leads out of it.

        They may lack a picture or captions.
        """
        for key, members in groupby(self.members(), key=itemgetter(0)):
            files = {member.extension: member for member in members if member.data is not None}
            pictures = [files[extension] for extension in PICTURES if extension in files]
            captions = captions_of({name: member.data for name, member in files.items()})
            if pictures:
                yield Sample(key, pictures[0].data, pictures[0].offset, captions)
            else:
                yield Sample(key, None, 0, captions)

    def members(self) -> Iterator[Member]:
        """Yields all files. Those of no use have no data.

        These are files of other extensions, links, devices, files with holes and too large ones.
        """
        wanted = {*PICTURES, "txt", "json"}
        with naming(self.path), open(self.path, "rb") as file:
            for member in self.headers(file):
                if member.isdir():
                    continue
                folder, base = os.path.split(relative(member.name, self.path))
                stem, _, extension = base.partition(".")    # WebDataset: keys end at the first dot
                extension = extension.lower()
                plain = member.isreg() and not member.issparse() and 0 <= member.size <= LARGEST
                data = None
                if plain and extension in wanted:
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                    if len(data) < member.size:
                        self.damage = f"{self.path} is cut off at byte {file.tell():,}"
                        return
                yield Member(os.path.join(folder, stem), extension, data, member.offset_data)

    def headers(self, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
        """Yields the header of each file, up to the end or the first that is damaged."""
        try:
            with tarfile.open(self.path, "r:", fileobj=Headers(file), encoding="utf-8") as tar:
                for member in iter(tar.next, None):
                    tar.members.clear()                     # else tarfile keeps every header
                    tar.pax_headers.clear()
                    yield member
                # tarfile takes a damaged header for the end; the true end is a block of zeros.
                file.seek(tar.offset)
                if file.read(512) != bytes(512):
                    self.damage = f"{self.path} is cut off or damaged at byte {tar.offset:,}"
        except Exception as error:      # tarfile raises whatever false headers lead to
            if isinstance(error, OSError) and error.errno:
                raise
            self.damage = f"{self.path} is not a complete .tar file ({shortened(error)})"


def relative(name: str, where: str | Path) -> str:
    """`name` as a plain relative path. ValueError for one that leaves the folder of the data set.

    >>> relative("./a//b.jpg", "x.json")
    'a/b.jpg'
    """
    parts = re.split(r"[/\\]", name)
    if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", name):
        raise ValueError(f"{where}: the path {shortened(repr(name))} leaves the folder of the data "
                         "set; expected a relative path without '..'")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def captions_of(files: dict[str, bytes]) -> list[str]:
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


def usable_captions(captions: Iterable[str]) -> tuple[list[str], list[str]]:
    """(Those captions of an image that can be used, stripped; why others or the image cannot).

    >>> usable_captions([" a dog\\n", ""])
    (['a dog'], ['empty caption (image kept)'])
    """
    kept, reasons = [], []
    for caption in captions:
        text = caption.strip()
        reason = unusable(text, "caption")
        if reason:
            reasons.append(reason)
        else:
            kept.append(text)
    if kept:
        return kept, [f"{reason} (image kept)" for reason in reasons]
    return [], reasons[:1] or ["no caption"]


def unusable(text: str, what: str) -> str:
    """Why a text is left out; "" if it is fine."""
    if not text:
        return f"empty {what}"
    return f"{what} is not Unicode" if SURROGATE.search(text) else ""
