"""Opening files of unknown origin: nothing in them ever runs, and each refusal is a sentence.

A hostile file here would create a file, `marker`, if its pickle were run by Python's own unpickler.
"""

import argparse
import importlib
import io
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weights
from released import files
from released.download import sha256_of
from released.files import Inert, check_tensors, open_file, tensors_in

MAGIC, VERSION = 0x1950a86a20f9469cfc6c, 1001


# -- making files ----------------------------------------------------------------------------------

class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def write_zip(path, program, records=(), compression=zipfile.ZIP_STORED):
    """What torch.save writes, around any pickle."""
    records = {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **dict(records)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr("archive/" + name, data)


def string(text):
    """The instruction that pushes a string."""
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def program(instructions):
    return b"\x80\x02" + instructions + b"."


def legacy(parts):
    return b"".join(part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts)


def refusal(path, **options):
    """The sentence in which a file is refused."""
    with pytest.raises(ValueError) as error:
        open_file(path, **options)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence, sentence
    assert "weights_only" not in sentence, "torch's advice to switch safety off"
    return sentence


# -- hostile files: each writer writes `path` ------------------------------------------------------

def by_call(function, arguments, old=False):
    def write(path, marker):
        value = {"x": [1, Call(function, *arguments(marker))]}
        torch.save(value, path, _use_new_zipfile_serialization=not old)
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


def as_plain_pickle(protocol):
    def write(path, marker):
        path.write_bytes(pickle.dumps({"x": Call(os.system, f"touch {marker}")}, protocol))
    return write


def touch(marker):
    return (f"touch {marker}",)


def write_open(marker):
    return (f"open({str(marker)!r}, 'w').close()",)


NO_WEIGHTS_NEED, NOT_TORCH = "does what no weights need", "neither a torch nor a safetensors file"
BOX = b"ctransformers.utils\nBox\n"
HOSTILE = {         # how -> (writer, what the refusal must say)
    "os.system": (by_call(os.system, touch), "posix.system"),
    "os.system, old format": (by_call(os.system, touch, old=True), "posix.system"),
    "os by name": (by_program(lambda cmd, _: b"cos\nsystem\n" + string(cmd) + b"\x85R"),
                   "os.system"),
    "popen": (by_call(os.popen, touch), "os.popen"),
    "eval": (by_call(eval, write_open), "eval"),
    "exec": (by_call(exec, write_open), "exec"),
    "exec, old format": (by_call(exec, write_open, old=True), "exec"),
    "open": (by_call(open, lambda marker: (str(marker), "w")), "open"),
    "getattr chain": (by_program(
        lambda cmd, _: b"c__builtin__\ngetattr\nc__builtin__\n__import__\n" + string("os")
        + b"\x85R" + string("system") + b"\x86R" + string(cmd) + b"\x85R"), "getattr"),
    "Popen": (by_call(subprocess.Popen, lambda marker: (["touch", str(marker)],)), "Popen"),
    "nested file": (in_nested_file, "torch.storage._load_from_bytes"),
    "hub": (by_call(torch.hub._load_local, touch), "torch.hub._load_local"),
    "import": (by_call(importlib.import_module, touch), "importlib.import_module"),
    "runpy": (by_call(runpy.run_path, touch), "runpy.run_path"),
    "persistent id": (by_program(
        lambda cmd, _: b"(" + string("storage") + b"cposix\nsystem\n" + string(cmd) + b"\x85R"
        + string("0") + string("cpu") + b"K\x01tQ"), "posix.system"),
    "partial": (by_program(
        lambda cmd, _: b"cfunctools\npartial\ncposix\nsystem\n" + string(cmd) + b"\x86R)R"),
        "functools.partial"),
    "attrgetter": (by_program(
        lambda cmd, _: b"coperator\nattrgetter\n" + string("os.system")
        + b"\x85Rcimportlib\nimport_module\n" + string("shutil") + b"\x85R\x85R" + string(cmd)
        + b"\x85R"), "operator.attrgetter"),
    "reconstructor": (by_program(
        lambda _, marker: b"ccopy_reg\n_reconstructor\n(csubprocess\nPopen\ncsubprocess\nPopen\n]("
        + string("touch") + string(str(marker)) + b"etR"), "copyreg._reconstructor"),
    "INST": (by_program(lambda cmd, _: b"(" + string(cmd) + b"iposix\nsystem\n"), NO_WEIGHTS_NEED),
    "OBJ": (by_program(
        lambda _, marker: b"(csubprocess\nPopen\n](" + string("touch") + string(str(marker))
        + b"eo"), NO_WEIGHTS_NEED),
    "EXT1": (by_program(lambda cmd, _: b"\x82\xf1" + string(cmd) + b"\x85R"), NO_WEIGHTS_NEED),
    "dotted name in torch": (by_program(
        lambda cmd, _: b"\x80\x04" + string("torch.serialization") + string("os.system") + b"\x93"
        + string(cmd) + b"\x85R"), NO_WEIGHTS_NEED),
    "function of a known library": (by_program(
        lambda cmd, _: b"ctransformers.utils.os\nsystem\n" + string(cmd) + b"\x85R"),
        "transformers.utils.os.system"),
    "renamed function of a known library": (by_program(
        lambda cmd, _: b"ctransformers.utils\nrun\n" + string(cmd) + b"\x85R"),
        "transformers.utils.run"),
    "as an argument of a stand-in": (by_program(
        lambda cmd, _: BOX + b"cposix\nsystem\n" + string(cmd) + b"\x85R\x85R"), "posix.system"),
    "as a key": (by_program(
        lambda cmd, _: b"}(cposix\nsystem\n" + string(cmd) + b"\x85RK\x01u"), "posix.system"),
    "as a state": (by_program(
        lambda cmd, _: BOX + b"N\x85R}" + string("a") + b"cposix\nsystem\n" + string(cmd)
        + b"\x85Rsb"), "posix.system"),
    "__setstate__ by BUILD": (by_program(
        lambda cmd, _: BOX + b"N\x85RN}" + string("__setstate__") + b"cposix\nsystem\ns\x86b"
        + string(cmd) + b"b"), "posix.system"),
    "plain pickle": (as_plain_pickle(4), NOT_TORCH),
    "plain pickle in text": (as_plain_pickle(0), NOT_TORCH),
    "old format, pickle 0": (in_legacy_pickle(0), NOT_TORCH),
    **{f"old format, pickle {n}": (in_legacy_pickle(n), "posix.system") for n in range(1, 5)},
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("trust", [False, True])
def test_hostile_file_runs_nothing_and_is_refused_by_name(how, trust, tmp_path):
    write, name = HOSTILE[how]
    path, marker = tmp_path / "hostile.pt", tmp_path / "ran"
    write(path, marker)
    sentence = refusal(path, trust=trust)
    assert not marker.exists(), "the file's code ran"
    assert name in sentence and ("refused; its pickle" in sentence or NOT_TORCH in sentence)


# Names that harm only in company, or that are merely not needed.
@pytest.mark.parametrize("name", [
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.os.system",
    "torch.nn.modules.linear.Linear", "collections.OrderedDict.__init__", "types.CodeType",
    "builtins.object", "builtins.type", "builtins.str.format", "released.files.stand_in",
    "pytorch_lightning.os.system", "pytorch_lightning.Box.__init__.__globals__",
    "lightning_evil.Box"])
def test_every_other_name_is_refused(name, tmp_path):
    module, last = name.split(".", 1)
    write_zip(tmp_path / "x.pt", program(f"c{module}\n{last}\n".encode()))
    assert f"wants to call {name.removeprefix('builtins.')}" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("target", [
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nfloat16\n",
    b"cpytorch_lightning.callbacks\nModelCheckpoint\n", b"cargparse\nNamespace\n",
    b"cbuiltins\nfrozenset\n", b"csacred.config.custom_containers\nReadOnlyDict\n", b"]"])
@pytest.mark.parametrize("key", ["__code__", "__defaults__", "__class__", "__setstate__", "name"])
def test_no_file_can_change_functions_or_classes(target, key, tmp_path):
    """BUILD with a pair sets attributes on whatever is on the stack."""
    write_zip(tmp_path / "x.pt", program(target + b"N}" + string(key) + b"Ns\x86b"))
    refusal(tmp_path / "x.pt")


def test_stand_ins_take_everything_and_keep_nothing(tmp_path):
    """Made by REDUCE and by NEWOBJ, given a state, given attributes, used as keys."""
    made = BOX + b"K\x01\x85R" + b"N}" + string("__class__") + b"Ns\x86b"
    write_zip(tmp_path / "x.pt", program(
        b"(" + made + BOX + b")\x81}" + string("a") + b"K\x01sb" + b"}" + BOX + b"K\x05s" + b"t"))
    one, two, table = open_file(tmp_path / "x.pt")
    for thing in (one, two):
        assert isinstance(thing, Inert) and not hasattr(thing, "__dict__") and not callable(thing)
    assert list(table.values()) == [5] and issubclass(*table, Inert)
    assert not any(isinstance(value, tuple) for value in torch.serialization.get_safe_globals())


# -- files of training libraries that are not installed --------------------------------------------

def fake_class(monkeypatch, name, *bases, **members):
    """A class in a module that exists only until the test removes it."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        dotted = ".".join(parts[:n])
        if dotted not in sys.modules:
            monkeypatch.setitem(sys.modules, dotted, types.ModuleType(dotted))
    made = type(last, bases, {"__module__": module, **members})
    setattr(sys.modules[module], last, made)
    return made


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_lightning_checkpoint_opens_without_lightning(new, tmp_path, monkeypatch):
    lightning = "pytorch_lightning."
    checkpoint = fake_class(monkeypatch, lightning + "callbacks.model_checkpoint.ModelCheckpoint")
    attributes = fake_class(monkeypatch, lightning + "utilities.parsing.AttributeDict", dict)
    stage = fake_class(monkeypatch, lightning + "trainer.states.RunningStage", str)
    read_only = fake_class(monkeypatch, "sacred.config.custom_containers.ReadOnlyDict", dict,
                           __reduce__=lambda self: (type(self), (dict(self),)))
    read_only_list = fake_class(monkeypatch, "sacred.config.custom_containers.ReadOnlyList", list,
                                __reduce__=lambda self: (type(self), (list(self),)))
    metric = checkpoint()
    metric.best, metric.scores = np.float64(0.5), [1, 2]
    config = {"lr": np.float32(0.25), "on": np.bool_(True), "root": pathlib.Path("data/coco"),
              "table": np.arange(6).reshape(2, 3), "losses": read_only_list(["mlm", "itm"]),
              "args": argparse.Namespace(seed=1, nested={"a": None}),
              "counts": defaultdict(int, a=1), "some": frozenset([1]), "empty": b""}
    path = tmp_path / "released.ckpt"
    torch.save({"epoch": 3, "state_dict": OrderedDict(w=torch.arange(4.)), "object": metric,
                "stage": stage("train"), "callbacks": {checkpoint: {"best": metric.best}},
                "hyper_parameters": attributes(config=read_only(config), hidden=768)},
               path, _use_new_zipfile_serialization=new)
    monkeypatch.undo()
    contents = open_file(path)
    assert "sacred" not in sys.modules and "pytorch_lightning" not in sys.modules
    assert contents["epoch"] == 3 and contents["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    assert type(contents["hyper_parameters"]) is dict
    assert contents["hyper_parameters"]["hidden"] == 768
    read = contents["hyper_parameters"]["config"]
    for name, value in {"losses": ["mlm", "itm"], "counts": {"a": 1},
                        "some": frozenset([1])}.items():
        assert read[name] == value, name
    [(callback, state)] = contents["callbacks"].items()
    assert callback.__name__ == "ModelCheckpoint" and list(state) == ["best"]
    for thing in (contents["object"], contents["stage"], read["lr"], read["root"], read["table"],
                  read["args"]):
        assert isinstance(thing, Inert)


# -- contents --------------------------------------------------------------------------------------

def test_only_plain_arrays_of_numbers_are_taken():
    assert tensors_in({"w": torch.ones(3), "lr": 1.0, 5: torch.ones(1)}).keys() == {"w"}
    for odd in (torch.ones(2, 2).to_sparse(), torch.empty(2**40, device="meta"),
                torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)):
        with pytest.raises(ValueError, match="^w is no plain array of numbers$"):
            check_tensors(tensors_in({"state_dict": {"w": odd}}).items(), 10 ** 12)


def test_safetensors_with_metadata_and_without_its_suffix(tmp_path):
    tensors = {"w": torch.randn(3, 4), "b": torch.arange(3).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "step": "5"})
    (tmp_path / "blob").write_bytes((tmp_path / "x.safetensors").read_bytes())
    for name in ("x.safetensors", "blob"):
        contents = open_file(tmp_path / name)
        assert (contents["format"], contents["step"]) == ("pt", 5)
        for key, tensor in tensors.items():
            read = contents["model"][key]
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "blob").read_bytes()[:-5])
    assert "truncated or damaged" in refusal(cut)


# -- TorchScript -----------------------------------------------------------------------------------

@pytest.fixture
def archive(tmp_path):
    module, path = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(path)
    return module, path


def test_a_torchscript_archive_runs_only_if_published_or_trusted(archive, monkeypatch):
    module, path = archive

    def is_opened(**options):
        opened, expected = open_file(path, **options), module.state_dict()
        return opened.keys() == expected.keys() and all(
            torch.equal(opened[name], tensor) for name, tensor in expected.items())

    assert is_opened(trust=True)
    with monkeypatch.context() as patch:
        patch.setattr(files, "PUBLISHED", {sha256_of(path)})
        assert is_opened()
    monkeypatch.setattr(torch.jit, "load", None)
    assert "none that OpenAI published; --trust" in refusal(path)


# -- damaged files, and files of another kind ------------------------------------------------------

@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_a_sentence(new, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.randn(20), "v": [1, "a"]}, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    for length in [*range(1, 700, 7), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:min(length, len(whole) - 1)])
        assert "damaged" in refusal(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_changed_bytes_never_give_another_error(new, tmp_path):
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    value = {"w": torch.randn(20), "v": [1, "a", (None, 2.5), {3}]}
    torch.save(value, path, _use_new_zipfile_serialization=new)
    # A record of a zip has a checksum, so its pickle is changed before it is packed.
    whole = zipfile.ZipFile(path).read("x/data.pkl") if new else path.read_bytes()
    opened = 0
    for _ in range(200):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        if new:
            write_zip(path, changed.tobytes(), {"data/0": bytes(80)})
        else:
            path.write_bytes(changed.tobytes())
        try:
            open_file(path)
            opened += 1
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert 0 < opened < 200


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "file.ckpt"
    with pytest.raises(FileNotFoundError, match="file.ckpt: there is no such checkpoint$"):
        open_file(path)
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    for data, words in ((b"", "an empty file"), (lfs, "looks like a Git LFS pointer"),
                        (b"<!DOCTYPE html><html>Not found</html>", NOT_TORCH),
                        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500), NOT_TORCH),
                        (b"caption\tpicture no 1\n", NOT_TORCH), (b"\0" * 600, NOT_TORCH),
                        (pickle.dumps({"a": 1, "b": [2.5, None]}), NOT_TORCH),
                        (legacy([MAGIC, 1002, {}, {}, []]), "Invalid protocol version: 1002")):
        path.write_bytes(data)
        assert words in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photograph.jpg", b"x")
    assert "truncated or damaged" in refusal(path)
    write_zip(path, program(b"N"), compression=zipfile.ZIP_DEFLATED)
    assert "a compressed archive" in refusal(path)


def test_a_tiny_file_cannot_describe_terabytes(tmp_path):
    torch.save({"model": {"x": torch.ones(1).expand(2 ** 40)}}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match="x.pt: x repeats its numbers"):
        weights.open_source(tmp_path / "x.pt")
