"""--log: every line of metrics.jsonl arrives, once, also over a resume.

Training does not depend on it.
"""

import importlib.util
import json
import re
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN as RUN, assert_same, train_command, train_outcome, write_caption_world

import train
from training import loggers, report


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """What packages write beside the run lands in the test's folder, and nothing is sent."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID",
                 "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def back_to_step_4(out):
    """The run as a kill after step 6 would leave it, whose last checkpoint is that of step 4."""
    (out / "previous.pt").unlink()
    (out / "step_4.pt").replace(out / "last.pt")


def interrupted(world, out, *names):
    """A run of 6 steps that was killed after its last lines, and goes on from step 4."""
    flags = [*RUN, "--log", *names]
    train.main(train_command(world, out, *flags, "--keep", 4))
    back_to_step_4(out)
    train.main(train_command(world, out, *flags, "--resume"))
    return lines_of(out)


# -- with a stand-in -------------------------------------------------------------------------------

class StandIn:
    PURGES = False
    made, where = [], "nowhere"

    def __init__(self, out, run, step, is_new):
        self.run, self.step, self.is_new, self.lines, self.closed = run, step, is_new, [], False
        self.made.append(self)

    def write(self, line):
        self.lines.append(line)

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """The stand-ins that a test makes. They have the names of modules that are always there."""
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(loggers, "WRITERS",
                        {"json": StandIn, "csv": type("Purging", (StandIn,), {"PURGES": True})})
    return StandIn.made


@pytest.mark.slow
def test_a_logger_gets_every_line_and_changes_no_number(world, tmp_path, made):
    train.main(train_command(world, tmp_path / "plain", *RUN))
    assert not made and not (tmp_path / "plain/loggers.json").exists()
    train.main(train_command(world, tmp_path / "logged", *RUN, "--log", "json", "json"))
    assert len(made) == 1 and made[0].closed and made[0].lines == lines_of(tmp_path / "logged")
    assert_same(train_outcome(tmp_path / "plain"), train_outcome(tmp_path / "logged"), 0)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run_and_repeats_no_line(world, tmp_path, made):
    lines = interrupted(world, tmp_path / "run", "json", "csv")
    keeping, purging, again, purging_again = made
    assert (again.run, again.step, again.is_new) == (keeping.run, 4, False) and keeping.is_new
    assert again.lines == []                                    # it has those of steps 5 and 6
    assert purging_again.lines == [line for line in lines if line["step"] > 4] != []


def test_lines_are_not_repeated_either_where_a_resumed_run_is_killed_before_it_wrote_them(
        tmp_path, made):
    line = {"step": 5, "loss": 1.0}
    (tmp_path / "loggers.json").write_text(json.dumps({"json": {"run": "a", "sent": []}}))
    loggers.Loggers(("json",), tmp_path, 4, [], [line, {"step": 5, "val_loss": 1.0}])
    third = loggers.Loggers(("json",), tmp_path, 4, [], [])
    for one in (line, {"step": 5, "val_loss": 2.0}, {"step": 6, "loss": 1.0},
                {"step": 6, "val_loss": 1.0}):
        third.write(one)
    assert [(one["step"], "val_loss" in one) for one in made[1].lines] == [(6, False), (6, True)]


@pytest.mark.slow
def test_a_logger_that_is_new_to_a_resumed_run_gets_the_lines_so_far(world, tmp_path, made):
    train.main(train_command(world, tmp_path / "run", *RUN, "--keep", 4))
    back_to_step_4(tmp_path / "run")
    train.main(train_command(world, tmp_path / "run", *RUN, "--resume", "--log", "json"))
    assert made[0].is_new and made[0].lines == lines_of(tmp_path / "run")
    assert made[0].lines[0]["step"] == 1


@pytest.mark.parametrize("damaged",
                         ["[]", '{"json": {"run": 3}}', '{"json": []}',
                          '{"json": {"run": "a", "sent": 3}}'])
def test_a_damaged_list_of_runs_begins_a_new_one(tmp_path, made, damaged):
    (tmp_path / "loggers.json").write_text(damaged)
    loggers.Loggers(("json",), tmp_path, 4)
    assert made[0].is_new


def test_a_logger_that_fails_is_left_out_and_training_goes_on(
        world, tmp_path, made, monkeypatch, capsys):
    def fail(self, line):
        raise RuntimeError("the server is gone")

    monkeypatch.setattr(loggers.WRITERS["csv"], "write", fail)
    train.main(train_command(world, tmp_path / "run", *RUN, "--log", "csv", "json"))
    errors = capsys.readouterr().err
    assert errors.count("--log csv failed and is left out from here on: the server is gone") == 1
    assert made[1].lines == lines_of(tmp_path / "run") and not made[0].closed


def test_a_logger_that_cannot_start_stops_the_run_in_a_sentence(world, tmp_path, made, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("no key")

    monkeypatch.setattr(loggers.WRITERS["csv"], "__init__", fail)
    with pytest.raises(SystemExit, match="^train.py: --log csv: no key$"):
        train.main(train_command(world, tmp_path / "run", *RUN, "--log", "json", "csv"))


@pytest.mark.parametrize("rank, expected", [(0, 1), (1, 0)])
def test_only_the_first_process_has_loggers(tmp_path, made, rank, expected):
    place = SimpleNamespace(rank=rank, device=torch.device("cpu"), union=lambda part: {"lines": []})
    run = SimpleNamespace(machine=place, out=tmp_path, saved=None,
                          config=SimpleNamespace(loss_weights={"mlm": 1.0}),
                          settings=SimpleNamespace(log=("json",)))
    report.Log(run, SimpleNamespace(step=0, counters=dict(report.COUNTERS)))
    assert len(made) == expected


@pytest.mark.parametrize("device, waits, expected", [
    ("cuda", [.2, .2, .2, .2], 1), ("cuda", [.2, .2, .01, .2, .2], 0), ("cpu", [.2] * 9, 0)])
def test_a_gpu_that_waits_for_pictures_is_told_once_what_helps(device, waits, expected):
    said = []
    log = SimpleNamespace(late=0, run=SimpleNamespace(
        machine=SimpleNamespace(device=torch.device(device), say=said.append),
        workers=3))
    for waiting in waits:
        report.Log.watch_loader(log, waiting)
    assert len(said) == expected
    if expected:
        assert re.search("waits for pictures 20 % of the time: more than 3 of --workers.*--shorter",
                         said[0])


def test_every_report_looks_how_long_the_device_waited(world, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(report.Log, "watch_loader", lambda log, waiting: waits.append(waiting))
    train.main(train_command(world, tmp_path / "run", *RUN))
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert waits and waits == [line["data_wait"] for line in lines if "data_wait" in line]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_sentence_that_names_the_extra(world, tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train.main(train_command(world, tmp_path / "run", *RUN, "--log", name))
    assert stop.value.code == f"train.py: --log {name} needs a package: pip install '.[{name}]'"
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loggers, "WRITERS", {"surely_no_package": StandIn})
    with pytest.raises(ValueError, match="needs a package"):
        loggers.check(("surely_no_package",))


def test_an_unknown_logger_is_refused(world, tmp_path):
    with pytest.raises(SystemExit,
                       match="--log tensorbord: one of tensorboard, wandb, trackio is expected"):
        train.main(train_command(world, tmp_path / "run", *RUN, "--log", "tensorbord"))


# -- with the packages themselves ------------------------------------------------------------------

@pytest.mark.slow
def test_tensorboards_reader_reads_each_number_once(world, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed: "
                                        "pip install '.[tensorboard]'")
    lines = interrupted(world, tmp_path / "run", "tensorboard")
    found = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    names = {name for line in lines for name in line} - {"step"}
    assert set(found.Tags()["scalars"]) == names
    for name in names:
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert [(event.step, event.value) for event in found.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "global_batch" in str(found.Tensors("config/text_summary"))


def wandb_records(path):
    """The records of a .wandb file.

    It has LevelDB's log format, in blocks of 32 KB, behind a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place:place + 7])
        record += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                              # a whole one, or its last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_writes_files_of_one_run_and_each_line_once(world, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install '.[wandb]'")
    lines = interrupted(world, tmp_path / "run", "wandb")
    runs, found = set(), []
    for path in sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.display_name, record.run.project))
            if record.WhichOneof("record_type") == "history":
                items = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                         for item in record.history.item}
                found.append(items)
    known = json.loads((tmp_path / "run/loggers.json").read_text())["wandb"]["run"]
    assert runs == {(known, "run", "flm-vilt")}
    assert [(one["step"], one.get("loss"), one.get("val_loss")) for one in found] == [
        (line["step"], line.get("loss"), line.get("val_loss")) for line in lines]
    counts = [one["_step"] for one in found]
    assert counts == sorted(set(counts))


@pytest.mark.slow
def test_trackio_has_one_run_and_each_line_once(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))        # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed: pip install '.[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage
    lines = interrupted(world, tmp_path / "run", "trackio")
    [name] = SQLiteStorage.get_runs("flm-vilt")
    found = SQLiteStorage.get_logs("flm-vilt", name)
    assert [(one["step"], one.get("loss"), one.get("val_loss")) for one in found] == [
        (line["step"], line.get("loss"), line.get("val_loss")) for line in lines]
