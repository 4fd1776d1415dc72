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


def shown(value: Any) -> str:
    """A value for an error message: short and on one line, whatever it is."""
    plain = isinstance(value, str | bytes | int | float)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def plain_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: no folder can be made here ({error.strerror})") from None


@contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """Whatever a file's odd settings lead to becomes a ValueError that begins with its path."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path}: its settings describe no model "
                         f"({type(error).__name__}: {first_line})") from error


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


class Namespace(dict):
    """argparse.Namespace as a dict: its attributes are the items."""

    def __setstate__(self, state):
        self.update(state)


def empty_dict(factory=None):
    """collections.defaultdict as a plain dict; the pickle fills it."""
    return {}


# Containers of settings, as plain dicts and lists.
CONTAINERS = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
    "collections.defaultdict": empty_dict,
    "builtins.frozenset": frozenset,
    "sacred.config.custom_containers.ReadOnlyDict": dict,
    "sacred.config.custom_containers.ReadOnlyList": list,
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning.pytorch.utilities.parsing.AttributeDict": dict,
    "lightning_fabric.utilities.data.AttributeDict": dict,
    "lightning.fabric.utilities.data.AttributeDict": dict,
}
# Libraries whose classes stand in checkpoints without being needed.
LIBRARIES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities",
             "torchmetrics", "sacred", "omegaconf", "transformers", "timm", "deepspeed", "apex",
             "fairscale", "flm", "vilt", "meter", "clip"}
# Other names whose objects are not needed: numbers of NumPy, paths, types named in settings.
UNUSED = {
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    *(f"{module}.{pure}{system}Path" for module in ("pathlib", "pathlib._local")
      for pure in ("", "Pure") for system in ("Posix", "Windows")),
    *(f"builtins.{name}" for name in ("bool", "int", "float", "str", "bytes", "list", "tuple",
                                      "dict")),
    "typing.Any",
}


def stand_in(name: str) -> Callable | None:
    """What a pickle gets for a name that torch does not know; None if it is to be refused.

    Of the libraries only classes are answered, which a capital letter tells from functions.
    """
    if name in CONTAINERS:
        return CONTAINERS[name]
    library, last = name.split(".")[0], name.split(".")[-1].lstrip("_")
    if name in UNUSED or (library in LIBRARIES and last[:1].isupper()):
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
    stand_ins = []
    for name in names_in(path, is_zip):
        answer = stand_in(name)
        if answer is not None:
            stand_ins.append((answer, name))
    # All that is still unknown is refused, by torch itself.
    with torch.serialization.safe_globals(stand_ins):
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
    with safe_open(path, "pt") as file:
        contents = {name: from_json(text) for name, text in (file.metadata() or {}).items()}
        contents["model"] = {name: file.get_tensor(name) for name in file.keys()}
    return contents


def from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def what_is_wrong(error: Exception) -> str:
    """An error of torch or safetensors in one line, without torch's advice to switch safety off."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"refused; its pickle wants to call {refused[1]}"
    if isinstance(error, pickle.UnpicklingError):
        detail = text.split("WeightsUnpickler error:")[-1].split("\n\nCheck the documentation")[0]
        detail = " ".join(detail.split())[:200]
        return f"refused; its pickle is damaged, or does what no weights need: {detail}"
    first_line = (text.splitlines() or [""])[0][:200]
    return f"truncated or damaged ({type(error).__name__}: {first_line})"


def open_by_kind(path: Path, trust: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise Refused("an empty file")
    if head.startswith(b"version https://git-lfs"):
        raise Refused("looks like a Git LFS pointer, not the file itself")
    if head[257:262] == b"ustar":
        raise Refused("a tar archive; only zip and pickle files of torch.save are read")
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
        if not any(record.filename.endswith("/data.pkl") for record in records):
            raise Refused("a zip archive without data.pkl, so nothing that torch.save wrote")
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
    if path.is_dir():
        raise ValueError(f"{path}: a directory, not a checkpoint file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        return open_by_kind(path, trust)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:      # damaged bytes lead to errors of any type
        raise ValueError(f"{path}: {what_is_wrong(error)}") from error


# -- what comes out --------------------------------------------------------------------------------

LARGEST_BROADCAST = 2**26       # numbers of a tensor that repeats its storage (stride 0)


def tensors_in(table: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a table, by name. ValueError for one that is no plain array of numbers."""
    tensors = {}
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            continue
        kind = (tensor.layout, tensor.device.type, tensor.is_quantized)
        if kind != (torch.strided, "cpu", False) or tensor.is_nested:
            raise ValueError(f"{path}: {name} is no plain array of numbers")
        held = tensor.untyped_storage().nbytes() // tensor.itemsize
        if tensor.numel() > max(held, LARGEST_BROADCAST):   # a few bytes that stand for terabytes
            raise ValueError(f"{path}: {name} of shape {tuple(tensor.shape)} repeats the {held} "
                             f"numbers of its storage too often")
        tensors[name] = tensor
    return tensors


# -- folders, and models in several files ----------------------------------------------------------

FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_model.safetensors")


def state_in(contents: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file: under one of two keys, or at its top."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            return tensors_in(contents[key], path)
    return tensors_in(contents, path)


def open_parts(index: Path) -> dict:
    """The tensors of a model in several files. `index` is the table of each tensor's file."""
    table = plain_dict(read_config(index).get("weight_map"))
    if not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index}: has no weight_map, the table of its tensors' files")
    tensors = {}
    for name in sorted(set(table.values())):
        file = index.parent / Path(name).name
        tensors |= state_in(plain_dict(open_file(file)), file)
    missing = sorted(table.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{index}: names {missing[0]}, which none of its files has")
    return tensors


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_config(path: Path) -> dict:
    return plain_dict(read_json(path)) if path.is_file() else {}


def open_folder(folder: Path) -> dict:
    """What the weights' file of a folder holds; of a model in several files, its tensors."""
    for name in FOLDER_FILES:
        file = folder / name
        if file.is_file():
            return open_parts(file) if name.endswith(".index.json") else open_file(file)
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin "
                            f"is in this folder")
