"""Opens any checkpoint file without running code from it.

    contents = open_file("pytorch_model.bin")       # a .ckpt, .bin or .pt of torch, a .safetensors

A torch checkpoint is a pickle: a small program that can call any function of any module. Torch's
weights-only unpickler runs it with a short list of harmless names and refuses all others. Files
of training libraries also name classes of those libraries. Nothing here needs these objects, so
each class gets an inert stand-in: it can be called, filled and used as a key, and does nothing.

A TorchScript archive, the form of OpenAI's CLIP, is a program too. It is run only if its SHA-256
is one that OpenAI published, or if the caller says that it is to be trusted.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch._weights_only_unpickler import get_globals_in_pkl

from released.download import PUBLISHED, sha256_of


class Refused(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


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
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        raise ValueError(f"{path}: it describes no model ({in_a_line(error)})") from error


def in_a_line(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:200]}"


# -- what stands for the classes of other libraries ------------------------------------------------

class Inert:
    """A stand-in: takes any arguments and any state, keeps nothing, has no methods to call."""

    __slots__ = ()

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def empty_dict(factory=None):
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


def names_in(path: Path, is_zip: bool) -> Iterable[str]:
    """The classes and functions that a torch file names and torch does not answer by itself."""
    if is_zip:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    names = set()
    with open(path, "rb") as file:
        for _ in range(5):          # five pickles, then the numbers; they are scanned, not run
            names |= get_globals_in_pkl(file)
    return names


def open_torch(path: Path, is_zip: bool) -> Any:
    """What torch.save wrote. The tensors of a zip are mapped; those of older files are read."""
    answers = [(stand_in(name), name) for name in names_in(path, is_zip)]
    known = [(answer, name) for answer, name in answers if answer is not None]
    with torch.serialization.safe_globals(known):       # torch itself refuses all other names
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
            except ValueError:
                contents[name] = text
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
        return open_safetensors(path)
    is_zip = head.startswith(b"PK")
    if is_zip:
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
        return open_by_kind(path, trust)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:      # damaged bytes lead to errors of any type
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error


# -- what comes out --------------------------------------------------------------------------------

LARGEST_REPEATED = 2 ** 26      # numbers of a tensor that repeats its storage

def tensors_in(contents: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name: under one of two keys, or at its top.

    ValueError for one that is no plain array of numbers.
    """
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    tensors = {}
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            continue
        kind = (tensor.layout, tensor.device.type, tensor.is_quantized, tensor.is_nested)
        if kind != (torch.strided, "cpu", False, False):
            raise ValueError(f"{path}: {name} is no plain array of numbers")
        # A file of a few bytes can describe terabytes: one number, repeated by a stride of 0.
        repeated = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
        if repeated and tensor.numel() > LARGEST_REPEATED:
            raise ValueError(f"{path}: {name} repeats its numbers {tensor.numel():,} times")
        tensors[name] = tensor
    return tensors


def open_folder(folder: Path) -> dict:
    """What the weights' file of a folder of the Hub holds."""
    for name in ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"):
        if (folder / name).is_file():
            return open_file(folder / name)
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin "
                            f"is in this folder")


def read_config(path: Path) -> dict:
    """A JSON table; an empty one if there is no such file."""
    try:
        return plain_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
