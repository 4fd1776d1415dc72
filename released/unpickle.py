"""Opens other people's checkpoint files without running code from them.

    contents = open_file("pytorch_model.bin")     # a released .ckpt, a .bin, a TorchScript .pt, a .safetensors

A torch checkpoint is a *pickle*: a little program for a stack machine, in which GLOBAL names any function of any
module, REDUCE calls it and BUILD sets attributes. Python's own machine imports what is named, so that loading a file
may do anything at all. The machine below knows the same instructions but never imports: a name is looked up in a table
of what checkpoints are made of (tensors, ordered dicts, NumPy numbers, paths, …); a class of a known training library
becomes a `Foreign`, a record that does nothing; every other name is refused, and the error says which.

    file                                          layout
    torch.save since 1.6, TorchScript             zip: ROOT/data.pkl, ROOT/data/KEY (the bytes of one storage each), …
    torch.save before 1.6                         five pickles (magic, version, system, contents, keys), then storages

Storages of a zip are slices of one copy-on-write map of the file, as with `torch.load(mmap=True)`: nothing is copied.
"""

import _compat_pickle
import math
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch


class Refused(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


class Foreign:
    """What stands for a class, or an object of a class, that was in a file and is not ours: a record that does nothing.

    `name` "module.Class", `arguments` the tuple it was made with (None: the class itself, not an object), `state` what
    it was told to restore (most often a dict of attributes), `items` and `elements` what a dict-like or list-like one
    held. Each equals only itself, so that it can be a key: Lightning keys the state of callbacks by their class.
    """

    __slots__ = ("name", "arguments", "state", "items", "elements")

    def __init__(self, name, arguments=None):
        self.name, self.arguments, self.state, self.items, self.elements = name, arguments, None, {}, []

    def __repr__(self):
        return f"<foreign {'class' if self.arguments is None else 'object'} {self.name}>"


def shown(value):
    """A value for an error message: short and on one line, whatever it is."""
    return repr(value)[:80] if isinstance(value, (Foreign, str, bytes, int, float)) else f"a {type(value).__name__}"


class Storage(NamedTuple):
    """A run of numbers that tensors are views of."""
    data: torch.UntypedStorage
    dtype: torch.dtype


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint may call. All of these are ours or do nothing but hold their arguments.

def dict_of(items=()):
    """A plain dict of pairs, of another dict, or of nothing."""
    result = {}
    for key, value in items.items() if isinstance(items, dict) else items:
        result[checked_key(key)] = value
    return result


def checked_key(key, depth=0):
    """A key of a dict or an element of a set, unless hashing it would recurse so deep that Python itself crashes."""
    if depth > 3:
        raise Refused("its pickle has a key of tuples within tuples within tuples")
    if isinstance(key, (tuple, frozenset)):
        for part in key:
            checked_key(part, depth + 1)
    return key


def bytes_of(text=b"", encoding="latin1"):
    if encoding not in ("latin1", "latin-1") or not isinstance(text, (str, bytes)):
        raise Refused(f"its pickle encodes bytes in an unknown way ({shown(encoding)})")
    return text.encode("latin-1") if isinstance(text, str) else text


LARGEST_BROADCAST = 2**26       # numbers of a tensor that repeats its storage (stride 0)


def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None, dtype=None):
    """A view of a storage; offset and strides count elements. Refuses a view that leaves its storage."""
    if type(storage) is not Storage:
        raise Refused("a tensor of it has no storage")
    dtype = dtype or storage.dtype
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or metadata:
        raise Refused("a tensor of it has an impossible layout: size, strides and offset are no plain counts")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    held = storage.data.nbytes() // dtype.itemsize
    if math.prod(size) > max(held, LARGEST_BROADCAST):      # a few bytes that stand for terabytes
        raise Refused(f"a tensor of size {tuple(size)} has an impossible layout: it repeats the {held} numbers of its "
                      f"storage too often")
    if 0 not in size and last >= held:
        raise Refused(f"a tensor of size {tuple(size)}, strides {tuple(stride)}, offset {offset} "
                      f"leaves its storage of {held} numbers")
    tensor = torch.empty(0, dtype=dtype).set_(storage.data, offset if 0 not in size else 0, size, stride)
    return tensor.requires_grad_(bool(requires_grad))


def rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    return rebuild_tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def rebuild_parameter(data, requires_grad=True, hooks=None, state=None):
    return torch.nn.Parameter(data, bool(requires_grad))


def rebuild_subclass(function, kind, arguments, state):
    """A tensor that had attributes of its own, or was of a subclass: the tensor."""
    if type(function) is not Foreign or not function.name.startswith("torch._utils._rebuild_"):
        raise Refused(f"its pickle wants to rebuild a tensor by {shown(function)}")
    return call(function, arguments)


NUMPY = {"b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64,
         "u1": torch.uint8, "u2": torch.uint16, "u4": torch.uint32, "u8": torch.uint64,
         "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "c8": torch.complex64, "c16": torch.complex128}


def numpy_numbers(dtype, raw):
    """A NumPy dtype (a Foreign: code as its argument, byte order in its state) and bytes -> a flat tensor."""
    code = dtype.arguments[0]
    if code not in NUMPY:
        raise Refused(f"holds a NumPy array of type {shown(code)}, which is not read: plain numbers are")
    raw = bytearray(bytes_of(raw))
    tensor = torch.frombuffer(raw, dtype=NUMPY[code]) if raw else torch.empty(0, dtype=NUMPY[code])
    if dtype.state and dtype.state[1] == {"little": ">", "big": "<"}[sys.byteorder]:
        tensor.untyped_storage().byteswap(tensor.dtype)
    return tensor


def numpy_array(version, shape, dtype, fortran, raw):
    flat = numpy_numbers(dtype, raw)
    return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else flat.reshape(shape)


DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
    ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8), ("Byte", torch.uint8),
    ("Bool", torch.bool), ("ComplexFloat", torch.complex64), ("ComplexDouble", torch.complex128),
    ("Untyped", torch.uint8))}
STORAGES["torch.storage.UntypedStorage"] = torch.uint8

# Named as values, never called: kinds of storages and tensors, and the plain types.
NAMES = {*STORAGES, "torch.Tensor", "numpy.ndarray", "typing.Any",
         *(f"builtins.{name}" for name in ("bool", "int", "float", "str", "list", "tuple", "dict"))}

FUNCTIONS = {
    "torch._utils._rebuild_tensor": rebuild_tensor, "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter, "torch.nn.parameter.Parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
    "torch.Size": torch.Size, "torch.device": torch.device,
    **{f"torch.jit._pickle.build_{kind}list": lambda items: items for kind in ("int", "double", "bool", "tensor")},
    "torch.jit._pickle.restore_type_tag": lambda value, tag: value,
    "collections.OrderedDict": lambda items=(): OrderedDict(dict_of(items)),
    "collections.defaultdict": lambda factory=None, items=(): dict_of(items),
    "collections.Counter": dict_of,
    "_codecs.encode": bytes_of, "builtins.bytes": bytes_of,
    "builtins.bytearray": lambda *arguments: bytearray(bytes_of(*arguments)),
    "builtins.set": lambda items=(): set(map(checked_key, items)),
    "builtins.frozenset": lambda items=(): frozenset(map(checked_key, items)),
    "builtins.complex": complex,
    "numpy.dtype": lambda *arguments: Foreign("numpy.dtype", arguments),
    # Containers that configurations come in, as plain dicts and lists.
    "argparse.Namespace": dict_of, "types.SimpleNamespace": dict_of,
    "sacred.config.custom_containers.ReadOnlyDict": dict_of,
    "sacred.config.custom_containers.ReadOnlyList": lambda items=(): list(items),
    "pytorch_lightning.utilities.parsing.AttributeDict": dict_of,
    "lightning.pytorch.utilities.parsing.AttributeDict": dict_of,
    "lightning_fabric.utilities.data.AttributeDict": dict_of, "lightning.fabric.utilities.data.AttributeDict": dict_of,
}
for module in ("numpy.core.", "numpy._core."):
    FUNCTIONS |= {module + "multiarray.scalar": lambda dtype, raw: numpy_numbers(dtype, raw).item(),
                  module + "multiarray._reconstruct": lambda *_: torch.empty(0)}      # filled by BUILD
for module in ("pathlib.", "pathlib._local."):
    FUNCTIONS |= {module + kind: lambda *parts: str(PurePosixPath(*parts)) for kind in ("PosixPath", "PurePosixPath")}
    FUNCTIONS |= {module + kind: lambda *parts: str(PureWindowsPath(*parts))
                  for kind in ("WindowsPath", "PureWindowsPath")}

# Libraries whose classes stand in checkpoints without being needed. `__torch__` is where TorchScript keeps all of its.
LIBRARIES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "sacred",
             "omegaconf", "transformers", "timm", "deepspeed", "apex", "fairscale", "flm", "vilt", "meter", "clip",
             "__torch__"}
# No class of theirs has such a part in its name. A stand-in would do nothing, but whoever wrote the name meant no good.
SUSPECT = {"os", "posix", "nt", "sys", "subprocess", "builtins", "importlib", "runpy", "pty", "socket", "ctypes",
           "pickle", "marshal", "functools", "operator", "eval", "exec", "system", "popen", "Popen", "getattr"}


def look_up(module, name):
    """A name in a pickle -> a dtype, or a Foreign that only `call` can turn into something. Nothing is imported."""
    # Pickles of protocol 2, torch's own among them, use Python 2's names: commands.Popen for subprocess.Popen.
    old = (_compat_pickle.IMPORT_MAPPING.get(module, module), name)
    name = ".".join(_compat_pickle.NAME_MAPPING.get((module, name), old))
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{name!r:.80} is no name")
    suspect = SUSPECT.intersection(parts) or any(part[:2] == part[-2:] == "__" for part in parts[1:])
    if name in DTYPES:
        return DTYPES[name]
    if name in FUNCTIONS or name in NAMES or (parts[0] in LIBRARIES and not suspect):
        return Foreign(name)
    raise Refused(f"refused; its pickle wants to call {name}")


def call(target, arguments, new=False):
    """What a pickle's call gives: our function's result, or an object of a foreign class.

    `new`: by cls.__new__, which only classes have. Otherwise a capital letter tells them from functions.
    """
    if type(target) is not Foreign or target.arguments is not None or not isinstance(arguments, tuple):
        raise Refused(f"refused; its pickle wants to call {shown(target)}")
    if target.name in FUNCTIONS:
        return FUNCTIONS[target.name](*arguments)
    if target.name not in NAMES and (new or target.name.split(".")[-1].lstrip("_")[:1].isupper()):
        return Foreign(target.name, arguments)
    raise Refused(f"refused; its pickle wants to call {target.name}")


def build(target, state):
    """BUILD restores an object's attributes: here those of a stand-in, a namespace, a state dict or a NumPy array."""
    if type(target) is Foreign and target.arguments is not None:
        target.state = state
    elif type(target) is dict and isinstance(state, dict):      # a namespace: its attributes are the items
        target.update(state)
    elif type(target) is OrderedDict and isinstance(state, dict):
        if isinstance(state.get("_metadata"), dict):            # a state dict: the versions of its modules
            target._metadata = state["_metadata"]
    elif type(target) is torch.Tensor and isinstance(state, tuple):
        target.data = numpy_array(*state)
    else:
        raise Refused(f"refused; its pickle wants to change {shown(target)}")


# ---------------------------------------------------------------------------------------------------------------------
# The stack machine.

LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
            "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
            "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}


def read_pickle(file, storage_of=None):
    """Runs one pickle of an open file (or bytes) to its end -> its value. `storage_of`: persistent id -> Storage."""
    stack, marks, memo = [], [], {}
    push, pop = stack.append, stack.pop

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(flat):
        target = stack[-1].items if type(stack[-1]) is Foreign else stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise Refused(f"refused; its pickle wants to set items of {shown(target)}")
        target.update(dict_of(zip(flat[::2], flat[1::2], strict=True)))

    def append(items):
        target = stack[-1].elements if type(stack[-1]) is Foreign else stack[-1]
        if type(target) is not list:
            raise Refused(f"refused; its pickle wants to append to {shown(target)}")
        target.extend(items)

    for opcode, argument, _ in pickletools.genops(file):        # decodes the instructions and runs none
        match opcode.name:
            case literal if literal in LITERALS: push(argument)
            case "PROTO" | "FRAME": pass
            case "STOP": return pop()
            case "MARK": marks.append(len(stack))
            case "POP": marks.pop() if marks and marks[-1] == len(stack) else pop()
            case "POP_MARK": since_mark()
            case "DUP": push(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT": memo[argument] = stack[-1]
            case "MEMOIZE": memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET": push(memo[argument])
            case "NONE": push(None)
            case "NEWTRUE": push(True)
            case "NEWFALSE": push(False)
            case "EMPTY_TUPLE": push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE": push(tuple(since_mark()))
            case "EMPTY_LIST": push([])
            case "LIST": push(since_mark())
            case "APPEND": append([pop()])
            case "APPENDS": append(since_mark())
            case "EMPTY_DICT": push({})
            case "DICT":
                items = since_mark()
                push({})
                set_items(items)
            case "SETITEM":
                value, key = pop(), pop()
                set_items([key, value])
            case "SETITEMS": set_items(since_mark())
            case "EMPTY_SET": push(set())
            case "ADDITEMS":
                items = since_mark()
                if type(stack[-1]) is not set:
                    raise Refused(f"refused; its pickle wants to add to {shown(stack[-1])}")
                stack[-1].update(map(checked_key, items))
            case "FROZENSET": push(frozenset(map(checked_key, since_mark())))
            case "GLOBAL": push(look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                last, module = pop(), pop()
                push(look_up(module, last))
            case "REDUCE":
                arguments, target = pop(), pop()
                push(call(target, arguments))
            case "NEWOBJ":
                arguments, target = pop(), pop()
                push(call(target, arguments, new=True))
            case "NEWOBJ_EX":
                keywords, arguments, target = pop(), pop(), pop()
                push(call(target, (*arguments, keywords), new=True))
            case "INST": push(call(look_up(*argument.split(" ", 1)), tuple(since_mark())))
            case "OBJ":
                target, *arguments = since_mark()
                push(call(target, tuple(arguments)))
            case "BUILD":
                state = pop()
                build(stack[-1], state)
            case "BINPERSID" if storage_of: push(storage_of(pop()))
            case other:         # extensions registered by number (EXT1, …), out-of-band buffers, ids where none belong
                raise Refused(f"refused; its pickle uses {other} {argument if argument is not None else ''}".rstrip())


def parse_identity(identity):
    """A storage's persistent id ("storage", type, key, device, numbers, …) -> key, dtype, bytes, the rest."""
    match identity:
        case ("storage", Foreign(), str() as key, _, int() as numbers, *rest) \
                if identity[1].name in STORAGES and numbers >= 0:
            dtype = STORAGES[identity[1].name]
            return key, dtype, numbers * dtype.itemsize, rest
    raise Refused(f"refused; its pickle has a persistent id that is no storage: {shown(identity)}")


# ---------------------------------------------------------------------------------------------------------------------
# The containers.

def open_zip(path):
    """A zip written by torch.save or torch.jit.save -> its contents; of a scripted or traced module, the state dict."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        roots = [name[:-8] for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise Refused("a zip archive without data.pkl, so nothing that torch.save wrote" if not roots else
                          "a zip archive of several checkpoints")
        root, size = roots[0], path.stat().st_size
        mapped = torch.UntypedStorage.from_file(str(path), False, size)     # not shared: writes stay in memory
        loaded = {}

        def span(name):
            """Where the bytes of a record stand in the file -> (start, length)."""
            info = archive.getinfo(root + name)
            file.seek(info.header_offset)
            header = file.read(30)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))    # the name and padding follow
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Refused(f"its record {root + name} is compressed or encrypted, which torch never does")
            if header[:4] != b"PK\3\4" or info.file_size != info.compress_size or start + info.file_size > size:
                raise Refused(f"its record {root + name} does not lie where the archive says; the file is damaged")
            return start, info.file_size

        def small(name):
            span(name)
            return archive.read(root + name)        # checks the sum too

        order = small("byteorder").decode() if root + "byteorder" in archive.namelist() else "little"
        if order not in ("little", "big"):
            raise Refused(f"its byte order is {order!r}")

        def storage_of(identity):
            key, dtype, length, _ = parse_identity(identity)
            start, held = span("data/" + key)
            if length > held:
                raise Refused(f"its record {root}data/{key} holds {held} bytes; its pickle says {length}")
            if key not in loaded:
                data = mapped[start:start + held]
                if order != sys.byteorder:
                    data = data.clone()
                    data.byteswap(dtype)
                elif start % dtype.itemsize:        # not written by torch, which aligns
                    data = data.clone()
                loaded[key] = data
            return Storage(loaded[key], dtype)

        contents = read_pickle(small("data.pkl"), storage_of)
        if type(contents) is Foreign and contents.name.startswith("__torch__."):
            return scripted_state(contents, archive, root)
        return contents


def scripted_state(module, archive, root):
    """The parameters and buffers of a TorchScript module -> {"visual.conv1.weight": tensor, …}, as its state_dict().

    A module's attributes may be tensors without being either; which are, is said in the text of its class.
    """
    tensors = {}            # class -> names of its parameters and buffers
    for info in archive.infolist():
        if info.filename.startswith(root + "code/") and info.filename.endswith(".py"):
            if info.file_size > 1 << 24:
                raise Refused(f"its record {info.filename} is too long")
            where = info.filename[len(root + "code/"):-3].replace("/", ".")
            for name, parameters, buffers in re.findall(
                    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\](?:\n  __buffers__ = \[(.*)\])?",
                    archive.read(info).decode(), re.MULTILINE):
                tensors[f"{where}.{name}"] = re.findall(r'"([^"]+)"', parameters + buffers)

    def collect(module, prefix):
        found = {prefix + name: module.state[name] for name in tensors[module.name]
                 if isinstance(module.state.get(name), torch.Tensor)}
        for name, value in module.state.items():
            if type(value) is Foreign and value.name in tensors:
                found |= collect(value, f"{prefix}{name}.")
        return found

    return collect(module, "")


def open_legacy(path):
    """A file of torch.save before 1.6 -> its contents. Its storages are not aligned, so they are read, not mapped."""
    with open(path, "rb") as file:
        head, size = file.read(8), path.stat().st_size
        file.seek(0)
        try:
            magic = read_pickle(file)
        except Refused:
            raise
        except Exception:
            raise Refused(f"neither a torch nor a safetensors file, or damaged: it begins with {head!r}") from None
        if magic != 0x1950a86a20f9469cfc6c:
            raise Refused("a pickle, but not one that torch.save wrote")
        if (version := read_pickle(file)) != 1001:
            raise Refused(f"a torch file of the unknown version {shown(version)}")
        read_pickle(file)           # the writer's byte order and integer sizes; storages are little-endian in any case
        loaded = {}                 # key -> Storage, of bytes that come only after the contents

        def storage_of(identity):
            key, dtype, length, view = parse_identity(identity)
            if key not in loaded:
                if sum(storage.data.nbytes() for storage in loaded.values()) + length > size:
                    raise Refused("truncated: its pickle names more numbers than the file has bytes")
                loaded[key] = Storage(torch.UntypedStorage(length), dtype)
            data = loaded[key].data
            if view and view[0]:
                _, start, length = view[0]
                start, length = start * dtype.itemsize, length * dtype.itemsize
                if not 0 <= start <= start + length <= data.nbytes():
                    raise Refused("a view of a storage leaves it")
                data = data[start:start + length]
            return Storage(data, dtype)

        contents = read_pickle(file, storage_of)
        keys = read_pickle(file)
        if not isinstance(keys, list) or set(keys) != set(loaded):
            raise Refused("its list of storages does not fit its contents")
        for key in keys:
            data, dtype = loaded[key]
            count = int.from_bytes(file.read(8), "little")
            buffer = torch.empty(0, dtype=torch.uint8).set_(data).numpy()
            if count * dtype.itemsize != data.nbytes() or file.readinto(buffer) != data.nbytes():
                raise Refused(f"truncated or damaged: storage {key} should hold {data.nbytes()} bytes")
            if sys.byteorder == "big":
                data.byteswap(dtype)
        return contents


def open_safetensors(path):
    """A .safetensors file -> {name: tensor}."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise Refused("reading .safetensors needs a package: pip install safetensors") from None
    return load_file(path)


def open_file(path):
    """Whatever a checkpoint file holds: dicts, lists, tuples, plain values, tensors on the CPU, `Foreign` stand-ins.

    A TorchScript archive and a safetensors file give a dict of tensors. FileNotFoundError or ValueError, in one
    sentence that begins with the path, if the file is missing, damaged, of another kind, or wants something called.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a directory, not a checkpoint file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    with open(path, "rb") as file:
        head = file.read(512)
    try:
        if not head:
            raise Refused("an empty file")
        if head.startswith(b"version https://git-lfs"):
            raise Refused("looks like a Git LFS pointer, not the file itself")
        if head[257:262] == b"ustar":
            raise Refused("a tar archive; only zip and pickle files of torch.save are read")
        if head.startswith(b"PK"):
            return open_zip(path)
        # safetensors: the length of a JSON table, then the table
        if path.suffix == ".safetensors" or (head[8:9] == b"{" and
                                             int.from_bytes(head[:8], "little") <= path.stat().st_size - 8):
            return open_safetensors(path)
        return open_legacy(path)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:      # damaged bytes lead to errors of any type
        first_line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path}: truncated or damaged ({type(error).__name__}: {first_line})") from error
