"""Opens any checkpoint file without running code from it.

    contents = open_file("pytorch_model.bin")       # a .ckpt, .bin or .pt of torch, a .safetensors

A torch checkpoint is a pickle: a small program that can call any function of any module. Torch's
weights-only unpickler runs it with a short list of harmless names and refuses all others. Files
of training libraries also name classes of those libraries. Nothing here needs these objects, so
each class gets an inert stand-in: it can be called, filled and used as a key, and does nothing.

A TorchScript archive, the form of OpenAI's CLIP, is a program too. It is run only if its SHA-256
is one that OpenAI published, or if the caller says that it is to be trusted.
"""

import io
import json
import pickle
import pickletools
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import _weights_only_unpickler as unpickler

from released.download import PUBLISHED, sha256_of
from released.whole import CHECKSUM, Refused, verify
from storage.disk import read_json, shortened


def plain_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Whatever odd settings or tensors lead to becomes a ValueError that begins with its path."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {shortened(error, 1000)}") from None
    except Exception as error:
        raise ValueError(f"{path}: it describes no model ({in_a_line(error)})") from error


def in_a_line(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {shortened(first_line)}"


# -- what stands for the classes of other libraries ------------------------------------------------

class Inert:
    """A stand-in: takes any arguments and any state, keeps nothing, has no methods to call."""

    __slots__ = ()

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state):
        pass


def empty_dict(factory: object = None) -> dict:
    """collections.defaultdict as a plain dict; the pickle fills it."""
    return {}


# Containers of settings, as plain dicts and lists: by their whole names, or those of LIBRARIES by
# the names of their classes.
CONTAINERS = {
    "collections.defaultdict": empty_dict, "builtins.frozenset": frozenset,
    "ReadOnlyDict": dict, "ReadOnlyList": list, "AttributeDict": dict}
# Libraries whose classes stand in checkpoints without being needed.
LIBRARIES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities",
             "torchmetrics", "sacred", "omegaconf", "transformers", "timm", "deepspeed", "apex",
             "fairscale", "flm", "vilt", "meter", "clip", "pathlib", "typing"}
# Other names whose objects are not needed: numbers of NumPy, types named in settings.
UNUSED = {
    "argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
    "builtins.bool", "builtins.int", "builtins.float", "builtins.str", "builtins.bytes",
    "builtins.list", "builtins.tuple", "builtins.dict"}


def stand_in(name: str) -> Callable | None:
    """What a pickle gets for a name that torch does not know; None if it is to be refused.

    Of the libraries only classes are answered, which a capital letter tells from functions.
    """
    library, last = name.split(".")[0], name.split(".")[-1]
    of_library = library in LIBRARIES and last.lstrip("_")[:1].isupper()
    key = last if of_library else name
    if key in CONTAINERS:
        return CONTAINERS[key]
    if of_library or name in UNUSED:
        return type(last, (Inert,), {"__slots__": ()})
    return None


# -- the formats -----------------------------------------------------------------------------------

LEGACY_HEAD = pickle.dumps(0x1950a86a20f9469cfc6c, 2)       # how torch.save began before 1.6


LARGEST_PICKLE = 2 ** 24        # bytes; those of checkpoints have some hundred thousand
MOST_TUPLES = 50_000            # Python crashes on the hash of 150,000 tuples in one another


def names_in(pickles: BinaryIO) -> set[str]:
    """The classes and functions that the next pickle of a file names. It is scanned, not run."""
    begin, tuples = pickles.tell(), 0
    for operation, _, position in pickletools.genops(pickles):
        tuples += operation.name.startswith("TUPLE")
        if position - begin > LARGEST_PICKLE or tuples > MOST_TUPLES:
            raise pickle.UnpicklingError("it is larger than that of any checkpoint")
    pickles.seek(begin)
    return unpickler.get_globals_in_pkl(pickles)


def names_in_file(path: Path, is_zip: bool) -> set[str]:
    """The classes and functions that a torch file names."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return names_in(io.BytesIO(archive.read(name)))
    with open(path, "rb") as file:          # five pickles, then the numbers
        return set().union(*[names_in(file) for _ in range(5)])


def encode_bytes(text: str, codec: str) -> bytes:
    """How pickles of torch spell bytes. Other codecs could make gigabytes of a few letters."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {codec}")
    return text.encode("latin1")


@contextmanager
def narrower_names(known: list) -> Iterator[None]:
    """What a pickle may call: torch's own short list, two of them narrower, and `known`."""
    allowed = unpickler._get_allowed_globals()
    before = dict(allowed)
    allowed |= {"_codecs.encode": encode_bytes, "builtins.bytearray": Inert}
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        allowed |= before


def open_torch(path: Path, is_zip: bool) -> Any:
    """What torch.save wrote. The tensors of a zip are mapped; those of older files are read."""
    answers = [(stand_in(name), name) for name in names_in_file(path, is_zip)]
    known = [(answer, name) for answer, name in answers if answer is not None]
    with narrower_names(known):             # torch itself refuses all other names
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def open_torchscript(path: Path, trust: bool) -> dict[str, torch.Tensor]:
    """The state dict of a TorchScript archive."""
    if not trust and sha256_of(path) not in PUBLISHED:
        raise Refused("a TorchScript archive, which is a program, and none that OpenAI published; "
                      "--trust (in Python: trust=True) runs it all the same")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # torch.jit is deprecated
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def open_safetensors(path: Path) -> dict:
    """{"model": its tensors} and the file's metadata, of which values that are JSON are decoded."""
    contents = {}
    with safe_open(path, "pt") as file:
        for name, text in (file.metadata() or {}).items():
            try:
                contents[name] = json.loads(text)
            except (ValueError, RecursionError):
                contents[name] = text
        contents.pop(CHECKSUM, None)
        contents["model"] = {name: file.get_tensor(name) for name in file.keys()}
    return contents


def what_is_wrong(error: Exception) -> str:
    """An error of torch or safetensors in one line, without torch's advice to switch safety off."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"refused; its pickle wants to call {refused[1]}"
    if isinstance(error, pickle.UnpicklingError):
        detail = str(error).split("WeightsUnpickler error:")[-1].split("\n\nCheck the")[0]
        detail = " ".join(detail.split())[:200]
        return f"refused; its pickle is damaged, or does what no weights need: {detail}"
    return f"truncated or damaged ({in_a_line(error)})"


@contextmanager
def plain_name(path: Path) -> Iterator[Path]:
    """A name of a file that is Unicode, which torch and safetensors need.

    In a locale without Unicode, Python knows a name of other letters by its bytes alone.
    """
    try:
        str(path).encode()
        yield path
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / f"checkpoint{path.suffix}"
            link.symlink_to(path.absolute())
            yield link


def open_by_kind(path: Path, trust: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise Refused("an empty file")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("looks like a Git LFS pointer, not the file itself")
    # safetensors begins with the length of a JSON table, then the table
    table_fits = int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and table_fits):
        verify(path)
        return open_safetensors(path)
    is_zip = head.startswith(b"PK")
    if is_zip:
        verify(path)
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        if any(record.filename.endswith("/constants.pkl") for record in records):
            return open_torchscript(path, trust)
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("a compressed archive, which cannot be mapped and torch never writes")
    elif not head.startswith(LEGACY_HEAD):
        raise Refused("neither a torch nor a safetensors file, or damaged")
    return open_torch(path, is_zip)


def open_file(path: str | Path, trust: bool = False) -> Any:
    """What a checkpoint file holds: dicts, lists, plain values, tensors on the CPU, stand-ins.

    A TorchScript archive gives a dict of tensors; trust=True runs one of unknown origin.
    FileNotFoundError or ValueError, in one sentence that begins with the path, if the file is
    missing, damaged, of another kind, or wants something called.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        with plain_name(path) as plain:
            return open_by_kind(plain, trust)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:      # damaged bytes lead to errors of any type
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error


# -- what comes out --------------------------------------------------------------------------------

MOST_VALUES = 1_000_000         # of one checkpoint, beside its tensors; 64 letters count as one
DEEPEST = 50                    # lists and tables in one another
MOST_REPEATED = 8               # FLM's files name a tensor up to four times


def tensors_in(contents: dict) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name: under one of two keys, or at its top."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    return {name: tensor for name, tensor in contents.items()
            if isinstance(name, str) and isinstance(tensor, torch.Tensor)}


def check_tensors(tensors: Iterable[tuple[str, torch.Tensor]], file_size: int) -> None:
    """ValueError for a tensor that is no plain array of numbers, and for more than a file holds.

    A file of a few bytes can describe terabytes: one number, repeated by a stride of 0.
    """
    total = 0
    for name, tensor in tensors:
        kind = (tensor.layout, tensor.device.type, tensor.is_quantized, tensor.is_nested)
        if kind != (torch.strided, "cpu", False, False):
            raise ValueError(f"{name} is no plain array of numbers")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} repeats its numbers")
        total += tensor.nbytes
        if total > MOST_REPEATED * file_size:
            raise ValueError(f"its tensors are far larger than the file, which has "
                             f"{file_size:,} bytes ({name})")


def plain_tensors(contents: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors anywhere in a checkpoint. ValueError for what is no plain value.

    Plain are None, bool, int, float, str, tensors, and lists, tuples and tables of these. They are
    counted as they would be printed: a list that stands in two places counts twice, and one that
    contains itself has no end. So whoever prints, compares or copies them is done in a moment.
    """
    left = MOST_VALUES
    waiting = [(part, value, 0) for part, value in contents.items()]
    while waiting:
        part, value, depth = waiting.pop()
        left -= 1
        if isinstance(value, torch.Tensor):
            yield part, value
        elif type(value) is str:
            value.encode(errors="surrogateescape")     # ValueError for half a character
            left -= len(value) // 64
        elif isinstance(value, dict | list | tuple):
            left -= len(value)
            inner = value
            if isinstance(value, dict):
                if not all(type(key) in (str, int) for key in value):
                    raise ValueError(f"{part} has names of another kind than text and numbers")
                inner = [*value.values(), *value]
            if left > 0 and depth < DEEPEST:
                waiting += [(part, item, depth + 1) for item in inner]
        elif value is not None and type(value) not in (bool, float) and not is_number(value):
            raise ValueError(f"{part} holds a {type(value).__name__}, which is no plain value")
        if left < 0 or depth >= DEEPEST:
            raise ValueError(f"{part} holds too many values, too deep lists, or a list that "
                             f"contains itself")


def is_number(value: Any) -> bool:
    return type(value) is int and -2 ** 63 <= value < 2 ** 63


# -- a folder of the Hub ---------------------------------------------------------------------------

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def open_folder(folder: Path) -> tuple[dict, list[Path]]:
    """What the weights of a folder of the Hub hold, and their files: one, or several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return open_file(folder / name), [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return open_parts(folder / f"{name}.index.json")
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin "
                            f"is in this folder")


def open_parts(index: Path) -> tuple[dict, list[Path]]:
    """A model cut into several files: each of its tensors lies in the file that the index names."""
    file_of = plain_dict(read_config(index).get("weight_map"))
    parts = {}
    for name in file_of.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"{index}: a weight_map from tensors to files beside it is expected")
        if name not in parts:
            parts[name] = tensors_in(plain_dict(open_file(index.parent / name)))
    for name, file in file_of.items():
        if name not in parts[file]:
            raise ValueError(f"{index}: says that {name} is in {file}, where it is not")
    tensors = {name: parts[file][name] for name, file in file_of.items()}
    return tensors, [index.parent / name for name in parts]


def read_config(path: Path) -> dict:
    """A JSON table; an empty one if there is no such file."""
    return plain_dict(read_json(path)) if path.is_file() else {}
