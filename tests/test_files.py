"""Opening files of unknown origin: nothing in them ever runs, and each refusal is a sentence.

A hostile file here would create a file, `marker`, if its pickle were run by Python's own unpickler.
"""

import argparse
import errno
import importlib
import io
import json
import os
import pathlib
import pickle
import resource
import runpy
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import flm
import tokenizer
import weights
from conftest import tiny
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


# -- checksums -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint of ours in both kinds of files, and a folder to work in."""
    folder = tmp_path_factory.mktemp("ours")
    model = tiny(vit_layers=1, fusion_layers=1, text_layers=1, reconstructor_text_layers=0,
                 reconstructor_fusion_layers=1, vit_width=8, text_width=8, width=8)
    tok = tokenizer.BPE.train(["a red dog"], 261)
    for kind in ("pt", "safetensors"):
        weights.save(folder / f"ours.{kind}", model.state_dict(), model.config, "pretrain",
                     weights.pack_tokenizer(tok), step=9, settings={"recipe": "x", "lr": 1e-3})
    return folder


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255),
       where=st.sampled_from(["anywhere", "first kilobytes", "last kilobytes"]))
def test_a_flipped_byte_is_noticed_or_changes_nothing(ours, kind, place, bits, where):
    whole = bytearray((ours / f"ours.{kind}").read_bytes())
    size = len(whole) if where == "anywhere" else 6000
    spot = int(place * size) + (len(whole) - size if where == "last kilobytes" else 0)
    whole[spot] ^= bits
    path = ours / f"flipped.{kind}"
    path.write_bytes(whole)
    try:
        contents = weights.read(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert same(contents, weights.read(ours / f"ours.{kind}"))


def test_weights_that_changed_on_the_disk_are_refused_by_every_command(ours):
    for kind in ("pt", "safetensors"):
        whole = bytearray((ours / f"ours.{kind}").read_bytes())
        token = weights.read(ours / f"ours.{kind}")["model"]["vit.cls"]
        place = whole.index(token.numpy().tobytes())
        whole[place + 5] ^= 4
        path = ours / f"changed.{kind}"
        path.write_bytes(whole)
        model = tiny()
        for open_it in (weights.read, weights.load, weights.summary,
                        lambda path: weights.start(model, checkpoint=path),
                        lambda path: weights.main(["convert", str(path), str(ours / "x.pt")])):
            with pytest.raises((ValueError, SystemExit), match="(Bad CRC|match its checksum)"):
                open_it(path)


def test_info_says_which_checksums_were_compared(ours, tmp_path, capsys):
    for kind, words in (("pt", "entries verified"), ("safetensors", "the whole file verified")):
        weights.main(["info", str(ours / f"ours.{kind}"), "--verify"])
        assert words in capsys.readouterr().out
    contents = torch.load(ours / "ours.pt")
    torch.save(contents, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "none in this kind of file" in weights.summary(tmp_path / "old.pt")
    with pytest.raises(SystemExit, match="old.pt: this kind of file carries no checksums"):
        weights.main(["info", str(tmp_path / "old.pt"), "--verify"])


def test_entries_of_a_zip_that_overlap_or_hide_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(400), "v": torch.ones(400)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        one, two = [e for e in archive.infolist() if "/data/" in e.filename]
    at = whole.rindex(two.filename.encode()) - 46 + 42        # its offset, in the directory
    twice = whole[:at] + one.header_offset.to_bytes(4, "little") + whole[at + 4:]
    for bad in (twice, b"PK" + bytes(30) + whole, whole[:-2] + b"\x03\0abc"):
        path.write_bytes(bad)
        assert "damaged" in refusal(path)


# -- a writer's errors -----------------------------------------------------------------------------

def in_a_child(action, **limits):
    """What action() returns or raises, as text, in a process with other limits.

    The process must not crash.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            for name, limit in limits.items():
                resource.setrlimit(getattr(resource, name), (limit, limit))
            out = action()
        except BaseException as error:
            out = f"{type(error).__name__}: {error} [{getattr(error, 'errno', '')}]"
        os.write(writing, str(out).encode()[:10_000])
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        out = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child crashed"
    return out


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_file_that_cannot_grow_names_its_path_and_leaves_the_old_one(kind, tmp_path):
    model, path = tiny(), tmp_path / f"x.{kind}"
    path.write_bytes(b"the old one")
    said = in_a_child(lambda: weights.save(path, model.state_dict(), model.config, "pretrain",
                                           None),
                      RLIMIT_FSIZE=100_000)
    assert said == f"OSError: [Errno {errno.EFBIG}] File too large: '{path}' [{errno.EFBIG}]"
    assert path.read_bytes() == b"the old one" and os.listdir(tmp_path) == [path.name]


# -- ours, against itself --------------------------------------------------------------------------

def refused(path, contents):
    torch.save(contents, path)
    with pytest.raises(ValueError) as error:
        weights.read(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence and len(sentence) < 1500
    return sentence


ODD = st.sampled_from([None, True, -1, 0, 2 ** 31 - 1, 2 ** 31, 10 ** 9, 2 ** 70, 1.5, float("nan"),
                       float("inf"), -0.5, "", "three", "x" * 5000, [], {}, (1,)])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(field=st.sampled_from([field.name for field in fields(flm.Config)]), value=ODD)
def test_a_config_with_any_odd_value_is_refused_at_once_or_fits_the_weights(ours, field, value):
    contents = torch.load(ours / "ours.pt")
    contents["config"][field] = value
    path = ours / "odd.pt"
    torch.save(contents, path)
    begun = time.monotonic()
    try:
        config = weights.config_of(weights.read(path))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert len(str(error)) < 1500
    else:
        assert getattr(config, field) == value and type(value) in (int, float, bool, str)
        model = weights.model_of(config)
        weights.load_exactly(model, contents["model"], path)
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_values_that_are_not_plain_are_refused_before_anybody_prints_them(ours, tmp_path):
    contents = torch.load(ours / "ours.pt")
    loop, laughs, deep = {}, ["ha"], []
    loop["self"] = loop
    for _ in range(60):
        laughs = [laughs, laughs]
    for _ in range(200):
        deep = [deep]
    for odd in (loop, [loop], deep, {"a": [laughs]}, {"a": ["x" * 10 ** 6] * 10 ** 3}, {(1, 2): 3},
                {"a": {1, 2}}, {"a": b"x"}, {"a": 2 ** 64}, {"a": "\ud800"},
                {"a": torch.zeros(2).to_sparse()}, {"a": torch.zeros(1).expand(10 ** 9)},
                {"a": torch.zeros(2, device="meta")}):
        for part in ("settings", "counters", "more"):
            refused(tmp_path / "x.pt", contents | {part: odd})


@pytest.mark.parametrize("part, value, message", [
    ("step", -1, "its step is -1"), ("step", True, "its step is a bool, a int is expected"),
    ("step", "5", "its step is a str, a int is expected"),
                                                  ("task", "fly", "its task 'fly': one of"),
    ("task", None, "task"), ("answers", ["yes"], "lists 1 answers as text, its head has 0"),
    ("answers", [5], "answers as text"), ("model", {}, "the config has 4, but there are 0 tensors"),
                                                  ("model", None, "model"),
    ("tokenizer", {"vocab.json": 5}, "its tokenizer"),
    ("tokenizer", {"vocab.json": "[" * 10 ** 5, "merges.txt": ""}, "its tokenizer"),
    ("tokenizer", {"vocab.json": "{}", "merges.txt": "x"}, "its tokenizer: merges.txt: line 1"),
    ("tokenizer", {"../../x": "y"}, "its tokenizer"), ("tokenizer", {"": "y"}, "its tokenizer"),
    ("settings", [1], "its settings is a list, a dict is expected")])
def test_parts_of_the_wrong_kind_are_named(ours, tmp_path, part, value, message):
    sentence = refused(tmp_path / "x.pt", torch.load(ours / "ours.pt") | {part: value})
    assert message in sentence


def test_two_names_for_one_tensor_and_weights_that_are_no_numbers_are_refused(ours, tmp_path):
    contents = torch.load(ours / "ours.pt")
    state, path = contents["model"], tmp_path / "x.pt"
    twice = state | {"module.vit.cls": state["vit.cls"] + 1}
    assert "have one name" in refused(path, contents | {"model": twice})
    for number in (float("nan"), float("inf"), -float("inf")):
        cls = state["vit.cls"].clone()
        cls[3] = number
        torch.save(contents | {"model": state | {"vit.cls": cls}}, path)
        model = weights.model_of(weights.config_of(contents))
        for open_it in (weights.load, lambda path: weights.start(model, checkpoint=path)):
            with pytest.raises(ValueError, match="x.pt: vit.cls holds NaN or infinite numbers"):
                open_it(path)
    for dtype in (torch.complex64, torch.int32, torch.bool):
        torch.save(contents | {"model": {k: v.to(dtype) for k, v in state.items()}}, path)
        with pytest.raises(ValueError, match="expected floating-point"):
            weights.load(path)


# -- a model in several files ----------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_model_in_several_files_opens_and_each_tensor_is_where_the_index_says(tmp_path, suffix):
    parts = [{"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4.0)}]
    table = {}
    for number, part in enumerate(parts):
        name = f"part-{number}.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / name)
        table |= dict.fromkeys(part, name)
    base = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index = tmp_path / f"{base}.index.json"

    def opened(table):
        index.write_text(json.dumps({"weight_map": table}))
        return files.open_folder(tmp_path)

    contents, paths = opened(table)
    assert same(contents, parts[0] | parts[1]) and len(paths) == 2
    for wrong, message in (({"c": table["a"]}, "says that c is in part-0"),
                           ({"a": f"../{table['a']}"}, "files beside it"), ({"a": 5}, "beside it"),
                           ({"a": "nowhere.bin"}, "nowhere.bin: there is no such checkpoint")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            opened(table | wrong)


# -- pickles that blow up --------------------------------------------------------------------------

def test_pickles_that_crash_python_or_fill_memory_are_refused(tmp_path):
    nested = b"}" + b")" + b"\x85" * 300_000 + b"K\x01s"
    doubling = b"c_codecs\nencode\n" + string("x" * 10 ** 6) + string("latin1") + b"\x86R"
    doubling += b"q\x010" + b"c_codecs\nencode\nh\x01" + string("hex") + b"\x86R"
    for name, made in (("nested", nested), ("doubling", doubling),
                       ("bytes", b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R")):
        path = tmp_path / f"{name}.pt"
        write_zip(path, program(made))
        said = in_a_child(lambda: weights.load(path), RLIMIT_DATA=30 * 10 ** 8)
        assert said.startswith(f"ValueError: {path}: ") and "MemoryError" not in said
    write_zip(path := tmp_path / "tensor.pt", program(
        b"}" + string("w") + b"ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x01\x85Rs"))
    said = in_a_child(lambda: weights.load(path))           # 2^32 numbers, of which none is there
    assert said.startswith(f"ValueError: {path}: ")
