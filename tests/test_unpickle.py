"""Other people's checkpoints: the same contents as torch.load gives, and nothing in them ever runs.

Every hostile file here is first refused by `open_file` and then opened by Python's own pickle, which does run what it
says (it creates a file in the test's directory): a file that could do no harm would prove nothing.
"""

import argparse
import copyreg
import importlib
import io
import os
import pathlib
import pickle
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from released import unpickle
from released.unpickle import Foreign, open_file

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

MAGIC, VERSION = 0x1950a86a20f9469cfc6c, 1001


# ---------------------------------------------------------------------------------------------------------------------
# Making files.

class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def write_zip(path, program, records=()):
    """What torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **dict(records)}.items():
            archive.writestr("archive/" + name, data)


def rewrite_zip(path, change, compress=()):
    """Rewrites a zip with `change(name, bytes) -> bytes`, None to leave the record out."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            if (data := change(name, data)) is not None:
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(compress) and compress else None)


def string(text):
    """The instruction that pushes a string."""
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def program(instructions):
    return b"\x80\x02" + instructions + b"."


def legacy(parts):
    return b"".join(part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files: each writes `path`, which creates `marker` when it is opened by Python's own pickle.

def by_call(function, arguments, old=False):
    def write(path, marker):
        torch.save({"x": [1, Call(function, *arguments(marker))]}, path, _use_new_zipfile_serialization=not old)
    return write


def by_program(instructions):
    def write(path, marker):
        write_zip(path, program(instructions(f"touch {marker}", marker)))
    return write


def in_legacy_pickle(position):
    def write(path, marker):
        parts = [MAGIC, VERSION, {"little_endian": True}, {"a": 1}, []]
        parts[position] = Call(os.system, f"touch {marker}")
        path.write_bytes(legacy(parts))
    return write


def in_nested_file(path, marker):
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    torch.save({"x": Call(torch.storage._load_from_bytes, inner.getvalue())}, path)


def in_persistent_id(path, marker):
    write_zip(path, program(b"(" + string("storage") + b"cposix\nsystem\n" + string(f"touch {marker}") + b"\x85R"
                            + string("0") + string("cpu") + b"K\x01tQ"))


def by_hub(path, marker):
    (path.parent / "hubconf.py").write_text(f"def model():\n    open({str(marker)!r}, 'w').close()\n")
    torch.save(Call(torch.hub._load_local, str(path.parent), "model"), path)


def by_import(path, marker):
    (path.parent / "imported_by_a_file.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    torch.save(Call(importlib.import_module, "imported_by_a_file"), path)


def by_runpy(path, marker):
    (path.parent / "script.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    torch.save(Call(runpy.run_path, str(path.parent / "script.py")), path)


def as_plain_pickle(protocol):
    def write(path, marker):
        path.write_bytes(pickle.dumps({"x": Call(os.system, f"touch {marker}")}, protocol))
    return write


def touch(marker):
    return (f"touch {marker}",)


def write_open(marker):
    return (f"open({str(marker)!r}, 'w').close()",)


HOSTILE = {         # how -> (writer, the name that the error must give)
    "os.system": (by_call(os.system, touch), "posix.system"),
    "os.system, old format": (by_call(os.system, touch, old=True), "posix.system"),
    "os by name": (by_program(lambda cmd, _: b"cos\nsystem\n" + string(cmd) + b"\x85R"), "os.system"),
    "popen": (by_call(os.popen, touch), "os.popen"),
    "eval": (by_call(eval, write_open), "eval"),
    "exec": (by_call(exec, write_open), "exec"),
    "exec, old format": (by_call(exec, write_open, old=True), "exec"),
    "open": (by_call(open, lambda marker: (str(marker), "w")), "open"),
    "getattr chain": (by_program(
        lambda cmd, _: b"c__builtin__\ngetattr\nc__builtin__\n__import__\n" + string("os") + b"\x85R" + string("system")
        + b"\x86R" + string(cmd) + b"\x85R"), "getattr"),
    "Popen": (by_call(subprocess.Popen, lambda marker: (["touch", str(marker)],)), "subprocess.Popen"),
    "nested file": (in_nested_file, "torch.storage._load_from_bytes"),
    "hub": (by_hub, "torch.hub._load_local"),
    "import": (by_import, "importlib.import_module"),
    "runpy": (by_runpy, "runpy.run_path"),
    "persistent id": (in_persistent_id, "posix.system"),
    "partial": (by_program(lambda cmd, _: b"cfunctools\npartial\ncposix\nsystem\n" + string(cmd) + b"\x86R)R"),
                "functools.partial"),
    "attrgetter": (by_program(
        lambda cmd, _: b"coperator\nattrgetter\n" + string("os.system") + b"\x85Rcimportlib\nimport_module\n"
        + string("shutil") + b"\x85R\x85R" + string(cmd) + b"\x85R"), "operator.attrgetter"),
    "reconstructor": (by_program(
        lambda _, marker: b"ccopy_reg\n_reconstructor\n(csubprocess\nPopen\ncsubprocess\nPopen\n](" + string("touch")
        + string(str(marker)) + b"etR"), "copyreg._reconstructor"),
    "INST": (by_program(lambda cmd, _: b"(" + string(cmd) + b"iposix\nsystem\n"), "posix.system"),
    "OBJ": (by_program(lambda _, marker: b"(csubprocess\nPopen\n](" + string("touch") + string(str(marker)) + b"eo"),
            "subprocess.Popen"),
    "EXT1": (by_program(lambda cmd, _: b"\x82\xf1" + string(cmd) + b"\x85R"), "EXT1"),
    "EXT1, cached": (by_program(lambda cmd, _: b"\x82\xf2" + string(cmd) + b"\x85R"), "EXT1"),
    "dotted name in torch": (by_program(
        lambda cmd, _: b"\x80\x04" + string("torch.serialization") + string("os.system") + b"\x93" + string(cmd)
        + b"\x85R"),
        "torch.serialization.os.system"),
    "function of an allowed library": (by_program(
        lambda cmd, _: b"ctransformers.utils.os\nsystem\n" + string(cmd) + b"\x85R"), "transformers.utils.os.system"),
    "dotted name in an allowed library": (by_program(
        lambda cmd, _: b"\x80\x04" + string("transformers.utils") + string("os.system") + b"\x93" + string(cmd)
        + b"\x85R"),
        "transformers.utils.os.system"),
    "renamed function of an allowed library": (by_program(
        lambda cmd, _: b"ctransformers.utils\nrun\n" + string(cmd) + b"\x85R"), "transformers.utils.run"),
    "as an argument of a stand-in": (by_program(
        lambda cmd, _: b"ctransformers.utils\nBox\ncposix\nsystem\n" + string(cmd) + b"\x85R\x85R"), "posix.system"),
    "as a key": (by_program(lambda cmd, _: b"}(cposix\nsystem\n" + string(cmd) + b"\x85RK\x01u"), "posix.system"),
    "as a state": (by_program(
        lambda cmd, _: b"ctransformers.utils\nBox\nN\x85R}" + string("a") + b"cposix\nsystem\n" + string(cmd)
        + b"\x85Rsb"),
        "posix.system"),
    "__setstate__ by BUILD": (by_program(
        lambda cmd, _: b"ctransformers.utils\nBox\nN\x85RN}" + string("__setstate__") + b"cposix\nsystem\ns\x86b"
        + string(cmd) + b"b"), "posix.system"),
    "plain pickle": (as_plain_pickle(4), "posix.system"),
    "plain pickle in text": (as_plain_pickle(0), "posix.system"),
    **{f"old format, pickle {n}": (in_legacy_pickle(n), "posix.system") for n in range(5)},
}


@pytest.fixture
def accomplices(monkeypatch, tmp_path):
    """What makes the files hostile for Python's own pickle: importable modules, registered extensions."""
    monkeypatch.syspath_prepend(tmp_path)
    utils = types.ModuleType("transformers.utils")
    utils.os, utils.run, utils.Box = os, os.system, type("Box", (), {"__init__": lambda self, content: None})
    utils.__path__ = []
    for name, module in {"transformers": types.ModuleType("transformers"), "transformers.utils": utils,
                         "transformers.utils.os": os}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(copyreg._inverted_registry, 0xF1, ("posix", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 0xF2, os.system)
    yield
    sys.modules.pop("imported_by_a_file", None)


def run_by_pickle(path):
    """Opens a file as it must never be opened; errors after the harm is done do not matter."""
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, identity):
            return identity

    def open_record():          # what torch.load does, which stops at some of these programs for other reasons
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return Unpickler(io.BytesIO(archive.read(name))).load()

    attempts = [open_record] if zipfile.is_zipfile(path) else [
        lambda: torch.load(path, weights_only=False), lambda: pickle.loads(path.read_bytes())]
    for attempt in attempts:
        try:
            attempt()
        except Exception:
            pass


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_file_runs_nothing_and_is_named(how, tmp_path, accomplices):
    write, name = HOSTILE[how]
    path, marker = tmp_path / "hostile.pt", tmp_path / "ran"
    write(path, marker)
    with pytest.raises(ValueError) as error:
        open_file(path)
    assert not marker.exists(), "open_file ran the file's code"
    message = str(error.value)
    assert message.startswith(f"{path}: refused; its pickle ") and name in message and "\n" not in message, message

    run_by_pickle(path)
    for _ in range(200):            # Popen does not wait
        if marker.exists():
            break
        time.sleep(0.01)
    assert marker.exists(), "the file is not hostile, so that refusing it proves nothing"


# Names that harm only in company, or that are merely not needed.
@pytest.mark.parametrize("name", [
    "torch.load", "torch.hub.load", "torch.serialization.load", "torch.jit.load", "torch.os.system",
    "torch._utils.os.system", "torch.nn.modules.linear.Linear", "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor", "collections.OrderedDict.__init__", "types.CodeType", "builtins.object",
    "builtins.type", "builtins.str.format",
    "unpickle.call", "unpickle.FUNCTIONS.update", "pytorch_lightning.os.system",
    "pytorch_lightning.Box.__init__.__globals__", "lightning_evil.Box"])
def test_every_other_name_is_refused(name, tmp_path):
    module, last = name.split(".", 1)
    write_zip(tmp_path / "x.pt", program(b"\x80\x04" + string(module) + string(last) + b"\x93"))
    with pytest.raises(ValueError, match=f"wants to call {name}$"):
        open_file(tmp_path / "x.pt")


@pytest.mark.parametrize("target", [
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nfloat16\n",
    b"cpytorch_lightning.callbacks\nModelCheckpoint\n", b"ctorch\nFloatStorage\n", b"]", b"N"])
@pytest.mark.parametrize("state", [{"__code__": None}, {"__defaults__": (1, 2)}, {"__class__": dict}, {"name": "x"}])
def test_build_cannot_poison_the_next_load(target, state, tmp_path):
    """BUILD with a pair sets attributes on whatever is on the stack, functions and classes included."""
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.arange(3.), "d": OrderedDict(a=1)}, good)
    pair = b"N}" + b"".join(string(key) + (b"(K\x01K\x02t" if isinstance(value, tuple) else b"N") + b"s"
                            for key, value in state.items()) + b"\x86"
    write_zip(bad, program(target + pair + b"b"))
    before = {name: (f, getattr(f, "__code__", None), getattr(f, "__defaults__", None))
              for name, f in unpickle.FUNCTIONS.items()}
    with pytest.raises(ValueError, match="wants to change"):
        open_file(bad)
    assert before == {name: (f, getattr(f, "__code__", None), getattr(f, "__defaults__", None))
                      for name, f in unpickle.FUNCTIONS.items()}
    contents = open_file(good)
    assert contents["w"].tolist() == [0, 1, 2] and contents["d"] == {"a": 1} and isinstance(contents["d"], OrderedDict)


def test_build_really_poisons_pythons_own_pickle():
    """The oracle of the test above."""
    def victim(a=0):
        return a
    module = types.ModuleType("victims")
    module.victim = victim
    sys.modules["victims"] = module
    try:
        pickle.loads(program(b"cvictims\nvictim\nN}" + string("__defaults__") + b"K\x05\x85s\x86b"))
    finally:
        del sys.modules["victims"]
    assert victim() == 5


def test_stand_ins_of_one_file_are_not_those_of_the_next(tmp_path):
    write_zip(tmp_path / "x.pt", program(b"clightning\nBox\n)\x81}" + string("a") + b"K\x01sb"))
    first, second = open_file(tmp_path / "x.pt"), open_file(tmp_path / "x.pt")
    first.state["a"] = 2
    assert second.state == {"a": 1} and first != second


@pytest.mark.parametrize("instructions, words", [
    (b"]K\x01K\x02s", "set items of"), (b"}K\x01a", "append to"), (b"](K\x01\x90", "add to"),
    (b"ctorch\nFloatStorage\n)R", "call torch.FloatStorage"), (b"K\x05)R", "call 5"),
    (b"clightning\nBox\n)\x81)R", "call <foreign object lightning.Box>"),
    (b"clightning\nBox\nK\x01R", "call"), (b"clightning\nbox\n)R", "call lightning.box"),
    (b"P7\n", "uses PERSID"), (b"\x97", "NEXT_BUFFER"),
    (string("module") + b"Q", "persistent id"), (b"(" + string("storage") + b"NNNNtQ", "persistent id"),
    (b"(" + string("storage") + b"ctorch\nFloatStorage\n" + string("0") + string("cpu") + b"J\xff\xff\xff\xfftQ",
     "persistent id"),
    (b"h\x07", "damaged"), (b"0", "damaged"), (b"t", "damaged"), (b"}]K\x01s", "damaged"), (b"", "damaged")])
def test_instructions_that_make_no_sense(instructions, words, tmp_path):
    write_zip(tmp_path / "x.pt", program(instructions))
    with pytest.raises(ValueError, match=words) as error:
        open_file(tmp_path / "x.pt")
    assert str(error.value).startswith(str(tmp_path))


def test_deep_tuples_as_keys_do_not_crash_python(tmp_path):
    """Hashing a tuple nested very deep ends the process, not in an exception."""
    write_zip(tmp_path / "x.pt", program(b"})" + b"\x85" * 200_000 + b"K\x01s"))
    with pytest.raises(ValueError, match="tuples within tuples"):
        open_file(tmp_path / "x.pt")
    write_zip(tmp_path / "x.pt", program(b"]" + b"\x85" * 100_000))        # as a value it is only odd
    assert isinstance(open_file(tmp_path / "x.pt"), tuple)


# ---------------------------------------------------------------------------------------------------------------------
# Contents: the same as torch.load's.

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool, torch.complex64]
NEW_KINDS = [torch.uint16, torch.float8_e4m3fn]         # torch cannot read these back from its old format


@st.composite
def tensor_families(draw, kinds):
    """A tensor and views of it: rows, columns, transposed, strided, expanded, empty, a scalar."""
    dtype, rows, columns = draw(st.sampled_from(kinds)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    base = torch.arange(rows * columns).remainder(2 if dtype == torch.bool else 100).to(dtype).reshape(rows, columns)
    views = [base, base.t(), base[-1], base[:, columns // 2], base[:, ::2], base[:0], base[0, 0],
             base[:1].expand(3, columns), torch.empty(0, 3, dtype=dtype)]
    return draw(st.lists(st.sampled_from(views), min_size=1, max_size=4))


plain = (st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
         | st.text() | st.binary(min_size=1, max_size=20)
         | st.sampled_from([torch.Size([2, 3]), torch.float16, torch.device("cpu"), set(), {1, "a"}, Counter("aab")]))
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())


def contents(kinds):
    def deeper(inner):
        return (st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4)
                | st.dictionaries(keys, inner, max_size=3).map(OrderedDict))
    return st.recursive(plain | tensor_families(kinds), deeper, max_leaves=12)


def raw_bytes(tensor):
    """Some of the dtypes cannot be compared."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).flatten().view(torch.uint8)


def assert_same(a, b, storages):
    """Equal in type, value, layout; and tensors that share memory in one share it in the other."""
    if isinstance(b, torch.Tensor):
        assert type(a) is type(b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        assert (a.shape, a.stride()) == (b.shape, b.stride())
        assert a.numel() == 0 or a.storage_offset() == b.storage_offset()
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()
        assert raw_bytes(a).equal(raw_bytes(b))
        if a.numel():
            assert storages.setdefault(b.untyped_storage().data_ptr(), a.untyped_storage().data_ptr()) == \
                a.untyped_storage().data_ptr()
    elif isinstance(b, Counter):
        assert a == b
    elif isinstance(b, dict):
        assert type(a) is type(b) and list(a) == list(b)
        for key in b:
            assert_same(a[key], b[key], storages)
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right, storages)
    else:
        assert type(a) is type(b) and a == b


def assert_as_torch_load(value, path, new):
    torch.save(value, path, _use_new_zipfile_serialization=new)
    assert_same(open_file(path), torch.load(path, weights_only=True), {})


many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(value=contents(KINDS + NEW_KINDS))
def test_same_contents_as_torch_load(value, tmp_path):
    assert_as_torch_load(value, tmp_path / "x.pt", new=True)


@many
@given(value=contents(KINDS))
def test_same_contents_as_torch_load_from_the_old_format(value, tmp_path):
    assert_as_torch_load(value, tmp_path / "x.pt", new=False)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_state_dicts_parameters_and_optimizers(new, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half()).requires_grad_(True)
    marked = nn.Parameter(torch.randn(2), requires_grad=False)
    marked.no_decay = True
    optimizer = torch.optim.AdamW(model.parameters())
    model[1](model[0](torch.randn(5, 3))).sum().backward()
    optimizer.step()
    path = tmp_path / "x.bin"
    torch.save({"model": model.state_dict(), "parameters": list(model.parameters()), "marked": marked,
                "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()},
               path, _use_new_zipfile_serialization=new)
    ours, theirs = open_file(path), torch.load(path, weights_only=True)
    assert_same(ours, theirs, {})
    assert ours["model"]._metadata == theirs["model"]._metadata
    model.load_state_dict(ours["model"])


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    before = path.read_bytes()
    open_file(path)["w"].fill_(1)
    assert path.read_bytes() == before and open_file(path)["w"].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.uint8])
def test_big_endian_file(dtype, tmp_path):
    path, tensor = tmp_path / "x.pt", torch.arange(6).to(dtype)
    torch.save({"w": tensor, "tail": tensor[3:]}, path)
    width = dtype.itemsize // (2 if dtype.is_complex else 1)

    def swap(name, data):
        if name.endswith("byteorder"):
            return b"big"
        return np.frombuffer(data, f"V{width}").copy().view("u1").reshape(-1, width)[:, ::-1].tobytes() \
            if "/data/" in name and name[-1].isdigit() else data
    rewrite_zip(path, swap)
    assert_same(open_file(path), torch.load(path, weights_only=True), {})
    assert open_file(path)["tail"].equal(tensor[3:])


def test_storage_views_of_very_old_files(tmp_path):
    """Torch once wrote views of storages with keys of their own; nothing writes them today."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.identity if isinstance(thing, Part) else None

    class Part:
        def __init__(self, *view):
            self.identity = ("storage", torch.FloatStorage, "7", "cpu", 6, view or None)

    body = io.BytesIO()
    Pickler(body, 2).dump([Call(torch._utils._rebuild_tensor, Part(), 0, (2, 3), (3, 1)),
                           Call(torch._utils._rebuild_tensor, Part("8", 4, 2), 0, (2,), (1,))])
    numbers = torch.arange(6.).numpy().tobytes()
    path = tmp_path / "x.bin"
    path.write_bytes(legacy([MAGIC, VERSION, {}, body.getvalue(), ["7"], (6).to_bytes(8, "little") + numbers]))
    ours, theirs = open_file(path), torch.load(path, weights_only=False)
    assert ours[1].tolist() == theirs[1].tolist() == [4, 5] and ours[0].equal(theirs[0])
    assert ours[0][1, 1:].data_ptr() == ours[1].data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# Files of training libraries that are not installed.

def fake_class(monkeypatch, name, *bases, **members):
    """A class in a module that exists only until the test removes it."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        dotted = ".".join(parts[:n])
        if not isinstance(sys.modules.get(dotted), Fake):
            monkeypatch.setitem(sys.modules, dotted, Fake(dotted))
    made = type(last, bases, {"__module__": module, **members})
    setattr(sys.modules[module], last, made)
    return made


class Fake(types.ModuleType):
    __path__ = []


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_lightning_checkpoint_without_lightning(new, tmp_path, monkeypatch):
    checkpoint = fake_class(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    attributes = fake_class(monkeypatch, "pytorch_lightning.utilities.parsing.AttributeDict", dict)
    stage = fake_class(monkeypatch, "pytorch_lightning.trainer.states.RunningStage", str)
    read_only = fake_class(monkeypatch, "sacred.config.custom_containers.ReadOnlyDict", dict,
                           __reduce__=lambda self: (type(self), (dict(self),)))
    read_only_list = fake_class(monkeypatch, "sacred.config.custom_containers.ReadOnlyList", list,
                                __reduce__=lambda self: (type(self), (list(self),)))
    metric = checkpoint()
    metric.best, metric.scores = np.float64(0.5), [1, 2]
    config = {"lr": np.float32(0.25), "steps": np.int64(30000), "on": np.bool_(True), "root": pathlib.Path("data/coco"),
              "losses": read_only_list(["mlm", "itm"]), "args": argparse.Namespace(seed=1, nested={"a": None}),
              "table": np.arange(6, dtype=np.int32).reshape(2, 3), "fortran": np.asfortranarray(np.eye(2, 3)),
              "backwards": np.arange(3, dtype=">f4"), "counts": defaultdict(int, a=1), "empty": b"",
              "some": frozenset([1])}
    path = tmp_path / "released.ckpt"
    torch.save({"epoch": 3, "state_dict": OrderedDict(w=torch.arange(4.)), "object": metric, "stage": stage("train"),
                "callbacks": {checkpoint: {"best": metric.best}},
                "hyper_parameters": attributes(config=read_only(config), hidden=768)},
               path, _use_new_zipfile_serialization=new)
    monkeypatch.undo()
    assert "sacred" not in sys.modules and "pytorch_lightning" not in sys.modules
    with pytest.raises(Exception):
        torch.load(path, weights_only=False)

    contents = open_file(path)
    assert "sacred" not in sys.modules and "pytorch_lightning" not in sys.modules
    assert contents["epoch"] == 3 and contents["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    read = contents["hyper_parameters"]["config"]
    assert contents["hyper_parameters"]["hidden"] == 768
    for name in ("table", "fortran", "backwards"):
        assert np.array_equal(read[name].numpy(), config[name]), name
    for name, value in {"lr": 0.25, "steps": 30000, "on": True, "root": "data/coco", "losses": ["mlm", "itm"],
                        "args": {"seed": 1, "nested": {"a": None}}, "counts": {"a": 1}, "empty": b"",
                        "some": frozenset([1])}.items():
        assert read[name] == value and type(read[name]) is type(value), name
    [(callback, state)] = contents["callbacks"].items()
    assert (callback.name, callback.arguments) == ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", None)
    assert state == {"best": 0.5}
    assert contents["object"].state == {"best": 0.5, "scores": [1, 2]} and contents["object"].name == callback.name
    assert isinstance(contents["stage"], Foreign) and contents["stage"].arguments == ("train",)
    assert not callable(callback) and "ModelCheckpoint" in repr(callback)


def test_dict_like_and_list_like_strangers_keep_what_they_hold(tmp_path, monkeypatch):
    mapping = fake_class(monkeypatch, "timm.Config", dict)
    sequence = fake_class(monkeypatch, "timm.Layers", list)
    torch.save([mapping(a=1), sequence([1, 2])], tmp_path / "x.pt")
    monkeypatch.undo()
    one, two = open_file(tmp_path / "x.pt")
    assert one.items == {"a": 1} and two.elements == [1, 2]


def test_object_arrays_are_refused(tmp_path):
    torch.save({"x": np.array([{}, None], dtype=object)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="NumPy array of type 'O8'"):
        open_file(tmp_path / "x.pt")


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript.

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("scale", torch.rand(2).half())
        self.plain = torch.arange(3.)           # a tensor that is neither parameter nor buffer

    def forward(self, x):
        return self.norm(self.conv1(x)) * self.scale.float().sum() + self.plain.sum()


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Inner()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)) for _ in range(2)])
        self.head = nn.Linear(3, 2).half()
        self.logit_scale = nn.Parameter(torch.tensor(1.).half())
        self.again = self.blocks[0][0]
        self.names, self.sizes, self.rates, self.table = ["a"], [1, 2], [0.5], {"a": torch.ones(2)}

    def forward(self, x):
        y = self.visual(x)
        for block in self.blocks:
            y = y + block(x.flatten(1)[:, :3]).sum()
        return y * self.logit_scale + self.sizes[0]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """The same module scripted and traced."""
    directory, module = tmp_path_factory.mktemp("jit"), Outer().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(directory / "script.pt")
        torch.jit.trace(module, torch.randn(1, 3, 5, 5)).save(directory / "trace.pt")
    return directory


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_its_state_dict(how, scripted):
    path = scripted / f"{how}.pt"
    ours = open_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.jit.load(path).state_dict()
    assert set(ours) == set(theirs) and "visual.conv1.weight" in ours and "visual.plain" not in ours
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].equal(theirs[key]), key


def test_torchscript_is_opened_without_torch_jit_or_its_constants(scripted, tmp_path, monkeypatch):
    path, marker = tmp_path / "x.pt", tmp_path / "ran"
    shutil.copy(scripted / "script.pt", path)
    harm = pickle.dumps(Call(os.system, f"touch {marker}"), 2)
    rewrite_zip(path, lambda name, data: harm if name.endswith((".debug_pkl", "constants.pkl")) else data)
    monkeypatch.setattr(torch.jit, "load", None)
    assert "logit_scale" in open_file(path) and not marker.exists()
    rewrite_zip(path, lambda name, data: harm if name.endswith("/data.pkl") else data)
    with pytest.raises(ValueError, match="posix.system"):
        open_file(path)
    assert not marker.exists()


# ---------------------------------------------------------------------------------------------------------------------
# safetensors.

def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {"w": torch.randn(3, 4), "b": torch.arange(3).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert_same(open_file(tmp_path / "x.safetensors"), tensors, {})
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match="x.safetensors: truncated or damaged"):
        open_file(tmp_path / "x.safetensors")


def test_safetensors_without_its_suffix(tmp_path):
    pytest.importorskip("safetensors.torch").save_file({"w": torch.arange(3.)}, tmp_path / "blob")
    assert open_file(tmp_path / "blob")["w"].tolist() == [0, 1, 2]


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"12345678{}")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="x.safetensors: .*pip install safetensors$"):
        open_file(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files, and files of another kind.

def tensor_program(offset, size, stride, numbers=4):
    """A pickle of one tensor of a float32 storage "0"."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", numbers) if thing is Call else None
    out = io.BytesIO()
    Pickler(out, 2).dump(Call(torch._utils._rebuild_tensor_v2, Call, offset, size, stride, False, OrderedDict()))
    return out.getvalue()


@pytest.mark.parametrize("layout", [
    (0, (5,), (1,)), (1, (4,), (1,)), (4, (1,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (2**63,)),        # past the end
    (0, (2,), (-1,)), (3, (2,), (-1,)), (-1, (1,), (1,)), (0, (-1,), (1,)),                             # backwards
    (0, (2,), ()), (0, (2**40,), (0, 0)), (0, (2**40, 2**40), (0, 0)), (0, ("a",), (1,)), (1.5, (1,), (1,))])
def test_no_tensor_leaves_its_storage(layout, tmp_path):
    path = tmp_path / "x.pt"
    write_zip(path, tensor_program(3, (1,), (1,)), {"data/0": torch.arange(4.).numpy().tobytes()})
    assert open_file(path).tolist() == [3]
    write_zip(path, tensor_program(*layout), {"data/0": torch.arange(4.).numpy().tobytes()})
    with pytest.raises(ValueError, match="leaves its storage|impossible layout"):
        open_file(path)
    body = tensor_program(*layout).replace(b"K\x04tQ", b"K\x04NtQ")
    path.write_bytes(legacy([MAGIC, VERSION, {}, body, ["0"], (4).to_bytes(8, "little") + bytes(16)]))
    with pytest.raises(ValueError, match="leaves its storage|impossible layout"):
        open_file(path)


def test_small_tensors_may_repeat_their_storage_and_large_ones_may_not(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.ones(1).expand(3, 1000), path)
    assert open_file(path).sum() == 3000
    torch.save(torch.ones(1).expand(2**22, 2**22), path)
    with pytest.raises(ValueError, match="x.pt: a tensor of size .* repeats the 1 numbers of its storage too often"):
        open_file(path)


def test_zip_whose_records_lie(tmp_path):
    path = tmp_path / "x.pt"
    write_zip(path, tensor_program(0, (1,), (1,), numbers=5), {"data/0": bytes(16)})
    with pytest.raises(ValueError, match="holds 16 bytes; its pickle says 20"):
        open_file(path)
    write_zip(path, tensor_program(0, (4,), (1,)), {"data/0": bytes(16)})
    rewrite_zip(path, lambda name, data: data, compress=("data/0",))
    with pytest.raises(ValueError, match="data/0 is compressed"):
        open_file(path)
    rewrite_zip(path, lambda name, data: data, compress=("data.pkl",))
    with pytest.raises(ValueError, match="data.pkl is compressed"):
        open_file(path)
    rewrite_zip(path, lambda name, data: b"middle" if name.endswith("byteorder") else data)
    with pytest.raises(ValueError, match="byte order is 'middle'"):
        open_file(path)
    rewrite_zip(path, lambda name, data: None if name.endswith("data/0") else b"little" if "order" in name else data)
    with pytest.raises(ValueError, match="damaged"):
        open_file(path)

    write_zip(path, tensor_program(0, (4,), (1,)), {"data/0": bytes(16)})
    assert open_file(path).shape == (4,)
    whole = path.read_bytes()
    entry = whole.rindex(b"archive/data/0") - 46
    sizes, beginning = (20, (1 << 20).to_bytes(4, "little") * 2), (42, (7).to_bytes(4, "little"))
    for at, field in (sizes, beginning):
        path.write_bytes(whole[:entry + at] + field + whole[entry + at + len(field):])
        with pytest.raises(ValueError, match="does not lie where the archive says|damaged"):
            open_file(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_a_sentence(new, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(20), "v": [1, "a"]}, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for length in [*range(1, min(len(whole), 700), 7), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated|damaged") as error:
            open_file(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_changed_bytes_never_give_another_error(new, tmp_path):
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    torch.save({"w": torch.randn(20), "v": [1, "a", (None, 2.5), {3}]}, path, _use_new_zipfile_serialization=new)
    whole = zipfile.ZipFile(path).read("x/data.pkl") if new else path.read_bytes()     # a record has a checksum
    opened = 0
    for _ in range(300):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        write_zip(path, changed.tobytes(), {"data/0": bytes(80)}) if new else path.write_bytes(changed.tobytes())
        try:
            open_file(path)
            opened += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert 0 < opened < 300


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "file.ckpt"
    with pytest.raises(FileNotFoundError, match="file.ckpt: there is no such checkpoint$"):
        open_file(path)
    with pytest.raises(ValueError, match="a directory, not a checkpoint file$"):
        open_file(tmp_path)

    def check(words, data=None):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            open_file(path)
        assert words in str(error.value) and str(error.value).startswith(f"{path}: ")

    check("an empty file", b"")
    check("looks like a Git LFS pointer, not the file itself",
          b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    for data in (b"<!DOCTYPE html><html>Not found</html>", b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500), 
                 b"hello, world\n", b"cat, dog\n1, 2\n", b"caption\tpicture no 1\n", b"\0" * 600):
        check("neither a torch nor a safetensors file", data)
    check("a pickle, but not one that torch.save wrote", pickle.dumps({"a": 1, "b": [2.5, None]}))
    check("a torch file of the unknown version 1002", legacy([MAGIC, 1002]))
    body = tensor_program(0, (4,), (1,)).replace(b"K\x04tQ", b"K\x04NtQ")
    check("storage 0 should hold 16 bytes",
          legacy([MAGIC, VERSION, {}, body, ["0"], (5).to_bytes(8, "little") + bytes(20)]))
    check("does not fit its contents", legacy([MAGIC, VERSION, {}, {"a": 1}, ["0"]]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photograph.jpg", b"x")
    check("a zip archive without data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    check("a zip archive of several checkpoints")
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages/x")
    check("a tar archive")


# ---------------------------------------------------------------------------------------------------------------------
# Memory.

@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_opening_takes_the_size_of_the_file(new, tmp_path):
    """A file of 200 MB, every tensor read once: its size plus 10 %, above what importing costs."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process's memory is read from /proc")
    path = tmp_path / "large.ckpt"
    one = torch.zeros(25_000_000)
    torch.save({f"w{i}": one[i * 5_000_000:(i + 1) * 5_000_000].clone() for i in range(5)} |
               {"all": one, "shared": one[:1000], "again": one.view(5, -1)}, path, _use_new_zipfile_serialization=new)
    size = path.stat().st_size
    assert size > 190_000_000
    # VmHWM, since ru_maxrss of a new process begins with its parent's.
    script = ("import re, sys, torch, unpickle\n"
              "torch.set_num_threads(1)\n"
              "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
              "torch.ones(1000).sum()\n"
              "before = peak(); contents = unpickle.open_file(sys.argv[1])\n"
              "print(sum(t.sum().item() for t in contents.values())); print(peak() - before)")
    out = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True,
                         cwd=os.path.dirname(unpickle.__file__)).stdout.split()
    assert float(out[0]) == 0 and size * 0.9 < int(out[1]) < size * 1.1
