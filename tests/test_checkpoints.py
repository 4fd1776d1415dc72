"""Nothing is lost and nothing silently wrong: killed, stopped, damaged, extended, two at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (ROOT, TRAIN as RUN, TRAIN_FLM as SIZES, TRAIN_VILT as VILT, assert_same,
                      free_port, together, torchrun, write_captions,
                      train_command as command, train_outcome as outcome, write_caption_world)

import flm
import train
import weights
from storage import disk
from training import checkpoints, machine
from training.settings import Settings, check_same_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run of six steps, its last.pt, previous.pt and step_2.pt."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train.main(command(world, out, *RUN, "--keep", 2))
    return out


def copy_of(run, out, **changes):
    """A copy of a run's folder, its last.pt changed; a value that is KeyError is removed."""
    out.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    saved = torch.load(out / "last.pt", weights_only=False) | changes
    torch.save({name: value for name, value in saved.items() if value is not KeyError},
               out / "last.pt")
    return out


def refused(world, out, *more):
    """The sentence with which a resume is refused."""
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, out, *RUN, "--resume", *more))
    assert str(out) in str(stop.value.code) and "\n" not in str(stop.value.code)
    return str(stop.value.code)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, more", [(SIZES, ("--corruption-rate", 0.3)), (VILT, ())],
                         ids=["flm", "vilt"])
def test_a_killed_and_resumed_run_equals_one_that_never_stopped(world, tmp_path, sizes, more):
    long = [*RUN, "--steps", 30, "--dropout", 0.1, "--save-every", 3, *more]
    train.main(command(world, tmp_path / "whole", *long, sizes=sizes))
    arguments = command(world, tmp_path / "killed", *long, sizes=sizes)
    run = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments],
                           stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
    for line in run.stdout:
        if line.startswith(f"step {11:>6}/"):           # between two checkpoints
            run.send_signal(signal.SIGKILL)
            break
    run.wait()
    with open(tmp_path / "killed/metrics.jsonl", "a") as file:
        file.write('{"step": 12, "lo')                  # torn by the kill
    step = weights.read(tmp_path / "killed/last.pt")["step"]
    assert 0 < step < 30
    train.main([*arguments, "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"), 0)
    lines = [json.loads(line)
             for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "lr" in line]
    assert steps == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.parametrize("start, more", [(torchrun, ()),
                                         (together, ("--shard", "--precision", "bf16"))],
                         ids=["ddp", "fsdp in bfloat16"])
def test_a_run_of_two_processes_resumes_as_if_it_had_never_stopped(world, tmp_path, start, more):
    arguments = [*RUN, "--steps", 4, "--dropout", 0.1, "--micro-batch", 4, "--eval-every", 0,
                 "--keep", 2, *more]
    start(2, command(world, tmp_path / "whole", *arguments))
    (tmp_path / "again").mkdir()
    (tmp_path / "again/last.pt").write_bytes((tmp_path / "whole/step_2.pt").read_bytes())
    start(2, command(world, tmp_path / "again", *arguments, "--resume"))
    models = [weights.read(tmp_path / name / "last.pt")["model"] for name in ("whole", "again")]
    for name, tensor in models[0].items():
        assert tensor.dtype == torch.float32 and torch.equal(models[1][name], tensor), name


@pytest.mark.slow
def test_a_run_does_not_resume_in_another_precision(world, tmp_path):
    train.main(command(world, tmp_path / "run", *RUN))
    for precision in ("bf16", "fp16"):
        sentence = f"other settings than the run's: precision 'fp32' -> '{precision}'"
        with pytest.raises(SystemExit, match=sentence):
            train.main(command(world, tmp_path / "run", *RUN, "--precision", precision, "--resume"))


@pytest.mark.slow
def test_a_run_does_not_resume_on_other_data(world, tmp_path):
    for path in world.glob("*.arrow"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    arguments = [*RUN, "--data", tmp_path, "--steps", 2]
    train.main(command(world, tmp_path / "run", *arguments))
    write_captions(tmp_path / "more_caption_train.arrow", 9)
    sentence = r"other data than the run's, .*mine_caption_train.arrow', 60.* -> .*more_caption"
    with pytest.raises(SystemExit, match=sentence):
        train.main(command(world, tmp_path / "run", *arguments, "--resume"))


@pytest.mark.slow
def test_a_finished_run_is_neither_overwritten_nor_resumed_under_other_settings(
        world, tmp_path, capsys):
    train.main(command(world, tmp_path / "run", *RUN))
    with pytest.raises(SystemExit, match="last.pt exists: --resume goes on"):
        train.main(command(world, tmp_path / "run", *RUN))
    with pytest.raises(SystemExit, match="other settings than the run's: lr 0.01 -> 0.5"):
        train.main(command(world, tmp_path / "run", *RUN, "--resume", "--lr", 0.5))
    before = (tmp_path / "run/metrics.jsonl").read_text()
    train.main(command(world, tmp_path / "run", *RUN, "--resume"))          # nothing is left to do
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_crash_while_saving_leaves_the_old_checkpoint(world, tmp_path, monkeypatch):
    train.main(command(world, tmp_path / "run", *RUN))
    path = tmp_path / "run/last.pt"
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save",
                        lambda contents, file: (file.write(b"half"),
                                                (_ for _ in ()).throw(OSError("disk full"))))
    with pytest.raises(OSError):
        weights.save(path, {}, flm.PRESETS["toy"], "pretrain", {}, step=7)
    assert path.read_bytes() == before


def test_a_run_of_a_version_that_had_fewer_settings_resumes():
    settings, config = Settings(), flm.PRESETS["base-b32"]
    saved = {"settings": asdict(settings), "config": asdict(config)}
    del saved["settings"]["bucket"], saved["config"]["image_positions"]
    check_same_run("last.pt", saved, settings, config, [["a.arrow", 9]])
    with pytest.raises(ValueError, match="bucket 1 -> 8"):
        check_same_run("last.pt", saved, replace(settings, bucket=8), config, [["a.arrow", 9]])


# -- stopping --------------------------------------------------------------------------------------

def started(arguments, environment=None, group=False):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments],
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            start_new_session=group,
                            env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
                            | (environment or {}))


def signal_at(step, number):
    """A stand-in for train.train_step that sends this process a signal within a step."""
    original = train.train_step

    def train_step(run, state, *rest):
        original(run, state, *rest)
        if state.step == step:
            os.kill(os.getpid(), number)
    return train_step


@pytest.mark.parametrize("number, code", [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_nothing_had_been(
        world, tmp_path, trained, monkeypatch, number, code, capsys):
    arguments = command(world, tmp_path / "run", *RUN, "--keep", 2)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signal_at(5, number))
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
    assert stop.value.code == code and signal.getsignal(number) is before
    assert f"stopped by {number.name} after step 5: --resume goes on" in capsys.readouterr().err
    assert weights.read(tmp_path / "run/last.pt")["step"] == 5
    train.main([*arguments, "--resume"])
    assert_same(outcome(tmp_path / "run"), outcome(trained), 0)


def test_a_second_signal_stops_at_once_but_not_the_repetition_of_the_first(monkeypatch):
    ended, now = [], [100.0]
    monkeypatch.setattr(machine.os, "_exit", ended.append)
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    with machine.Signals() as signals:
        signals.training = True
        signals.note(signal.SIGINT, None)
        now[0] += 0.5                           # torchrun repeats Ctrl-C
        signals.note(signal.SIGINT, None)
        assert signals.asked == signal.SIGINT and not ended
        now[0] += 1.0
        signals.note(signal.SIGTERM, None)
    assert ended == [143]


@pytest.mark.slow
def test_a_signal_to_the_data_loading_processes_too_loses_nothing(world, tmp_path):
    """A scheduler signals all processes of a job, and Ctrl-C those of the terminal."""
    arguments = command(world, tmp_path / "run", *RUN, "--steps", 5000, "--eval-every", 0,
                        "--save-every", 5000,
                        "--workers", 1)
    run = started(arguments, group=True)
    for line in run.stdout:
        if line.startswith(f"step {5:>6}/"):
            break
    os.killpg(run.pid, signal.SIGINT)
    _, words = run.communicate(timeout=120)
    assert run.returncode == 130 and "stopped by SIGINT" in words and "Traceback" not in words
    assert weights.read(tmp_path / "run/last.pt")["step"] >= 5


def test_a_run_that_is_stopped_before_training_has_begun_ends_at_once(
        world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_run",
                        lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, tmp_path / "run", *RUN))
    assert stop.value.code == 143
    assert "stopped by SIGTERM before training began" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_stopped_in_a_validation_validates_again(
        world, tmp_path, trained, monkeypatch):
    arguments = command(world, tmp_path / "run", *RUN, "--keep", 2)
    original, calls = train.evaluate, []

    def evaluate(run, state, samples, signals):
        calls.append(state.step)
        if state.step == 3 and calls.count(3) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, state, samples, signals)

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        train.main(arguments)
    train.main([*arguments, "--resume"])
    assert calls == [3, 3, 6]
    assert_same(outcome(tmp_path / "run"), outcome(trained), 0)


def two_in_their_fifth_step(world, out):
    """A long run of two processes that has taken some steps."""
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = command(world, out, *RUN, "--steps", 5000, "--eval-every", 0, "--save-every", 5000)
    runs = [started(arguments, places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)]
    for line in runs[0].stdout:
        if line.startswith(f"step {5:>6}/"):
            break
    return runs


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step_when_one_is_asked(world, tmp_path):
    runs = two_in_their_fifth_step(world, tmp_path / "run")
    runs[1].send_signal(signal.SIGTERM)         # only the second one, whose words nobody prints
    ends = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [143, 143], ends
    assert "stopped by SIGTERM" in ends[0][1] and "Traceback" not in ends[0][1] + ends[1][1]
    assert weights.read(tmp_path / "run/last.pt")["step"] >= 5


@pytest.mark.slow
def test_a_process_that_dies_is_named_by_the_others(world, tmp_path):
    runs = two_in_their_fifth_step(world, tmp_path / "run")
    runs[1].kill()
    _, words = runs[0].communicate(timeout=120)
    runs[1].communicate()
    assert runs[0].returncode == 1 and "Traceback" not in words
    assert "train.py: process 1 of 0 … 1 ended, so this one cannot go on" in words


# -- what comes back -------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_sums_of_losses_go_on_after_a_resume(world, tmp_path):
    """Reports are means since the last one: a resume between two must not forget the first half."""
    often = [*RUN, "--log-every", 4, "--steps", 8, "--save-every", 3, "--keep", 3]
    train.main(command(world, tmp_path / "whole", *often))
    (tmp_path / "again").mkdir()
    for name, source in (("last.pt", "step_3.pt"), ("metrics.jsonl", "metrics.jsonl")):
        (tmp_path / "again" / name).write_bytes((tmp_path / "whole" / source).read_bytes())
    train.main(command(world, tmp_path / "again", *often, "--resume"))
    assert_same(outcome(tmp_path / "again"), outcome(tmp_path / "whole"), 0)


NAME = "vit.position"
BROKEN = {
    "no weights": (dict(model=KeyError), "without model"),
    "empty weights": (dict(model={}), "is missing"),
    "no optimizer": (dict(optimizer=KeyError), "optimizer is missing"),
    "empty optimizer": (dict(optimizer={}), "optimizer.state is a NoneType"),
    "no tokenizer": (dict(tokenizer=None), "its tokenizer is missing"),
    "no step": (dict(step=KeyError), "step is missing"),
    "step before the first": (dict(step=-5), "step is -5"),
    "step past the last": (dict(step=10 ** 9), "but the run has 6 steps"),
    "step of another type": (dict(step="6"), "step is a str, a int is expected"),
    "step that is true": (dict(step=True), "step is a bool"),
    "no counters": (dict(counters={}), "counters.samples is missing"),
    "counters of text": (dict(counters="x"), "counters is a str, a table is expected"),
    "another task": (dict(task="caption"), ""),
    "sums of another model": (dict(sums=[torch.zeros(2, 2)]), "sums are not"),
}


@pytest.mark.slow
@pytest.mark.parametrize("changes, words", BROKEN.values(), ids=BROKEN.keys())
def test_a_checkpoint_that_lacks_something_is_refused_and_the_good_one_is_named(
        world, tmp_path, trained, changes, words):
    out = copy_of(trained, tmp_path / "run", **changes)
    told = refused(world, out)
    assert words in told and f"{out / 'previous.pt'} of step 4 is whole" in told
    (out / "previous.pt").replace(out / "last.pt")
    train.main(command(world, out, *RUN, "--resume"))
    assert_same(outcome(out), outcome(trained), 0)


def test_files_of_another_kind_are_other_data(world, tmp_path, trained):
    other = copy_of(trained, tmp_path / "run", files=7)
    assert "other data than the run's, [file, rows]: 7 -> " in refused(world, other)


def moments(saved, **changes):
    name = next(iter(saved["optimizer"]["state"]))
    state = saved["optimizer"]["state"]
    return {"optimizer": saved["optimizer"] | {"state": state | {name: state[name] | changes}}}


def weight(saved, change):
    name = next(iter(saved["model"]))
    return {"model": saved["model"] | {name: change(saved["model"][name])}}


WRONG_TENSORS = {
    # The fused AdamW would read and write past the end of these.
    "moments of one number": lambda saved: moments(saved, exp_avg=torch.zeros(1)),
    "moments of integers": lambda saved: moments(saved, exp_avg=torch.zeros(3, dtype=torch.long)),
    "moments not finite": lambda saved: moments(saved, step=torch.tensor(float("nan"))),
    "a weight of another shape": lambda saved: weight(saved, lambda w: w[None]),
    "a weight of integers": lambda saved: weight(saved, lambda w: w.long()),
    "a weight in half precision": lambda saved: weight(saved, lambda w: w.half()),
    "a complex weight": lambda saved: weight(saved, lambda w: w.to(torch.complex64)),
    "a weight that is infinite": lambda saved: weight(saved, lambda w: w / 0),
    "a weight more": lambda saved: {"model": saved["model"] | {"zzz": torch.zeros(3)}},
    "a weight less": lambda saved: {"model": dict(list(saved["model"].items())[1:])},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_before_anything_is_computed(world, tmp_path, trained, change):
    changes = change(torch.load(trained / "last.pt", weights_only=False))
    refused(world, copy_of(trained, tmp_path / "run", **changes))


@pytest.mark.slow
def test_groups_and_rates_in_a_file_are_not_believed(world, tmp_path, trained):
    """The run knows its own: a weight decay of 1e9 in a file changes nothing."""
    saved = torch.load(trained / "step_4.pt", weights_only=False)
    for group in saved["optimizer"]["param_groups"]:
        group |= {"weight_decay": 1e9, "betas": (0.1, 0.1), "lr": "x"}
    out = copy_of(trained, tmp_path / "run", **saved)
    train.main(command(world, out, *RUN, "--resume"))
    assert_same(outcome(out), outcome(trained), 0)


@pytest.mark.slow
def test_damaged_lines_of_metrics_are_dropped(world, tmp_path, trained):
    out = copy_of(trained, tmp_path / "run")
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b'\xff\xfe\n{"step": 1}\n[]\n{"step": "x", "loss": 1.0}\n'
                                        + whole + b'{"step": 6, "lo')
    train.main(command(world, out, *RUN, "--resume"))
    assert (out / "metrics.jsonl").read_bytes() == whole


def test_a_kill_between_two_names_loses_nothing(world, tmp_path, trained):
    out = copy_of(trained, tmp_path / "run")
    (out / "last.pt").unlink()
    with pytest.raises(SystemExit, match="previous.pt exists: --resume"):
        train.main(command(world, out, *RUN))
    train.main(command(world, out, *RUN, "--resume"))
    assert_same(outcome(out), outcome(trained), 0)


# -- more than one run -----------------------------------------------------------------------------

@pytest.mark.slow
def test_two_runs_do_not_write_into_one_folder(world, tmp_path):
    slow = started(command(world, tmp_path / "run", *RUN, "--steps", 5000, "--eval-every", 0))
    try:
        for line in slow.stdout:
            if line.startswith("step"):
                break
        told = refused(world, tmp_path / "run")
        assert f"process {slow.pid} on " in told and "is writing there" in told
    finally:
        slow.kill()
        slow.communicate()
    (tmp_path / "run/last.pt.01234567.partial").write_bytes(b"torn by the kill")
    assert (tmp_path / "run/.lock").exists()                # a dead process locks nothing
    train.main(command(world, tmp_path / "other", *RUN))
    with disk.one_writer(tmp_path / "run/.lock", "run"):
        disk.remove_partials(tmp_path / "run", "*.pt")
    assert not list((tmp_path / "run").glob("*.partial")) and not (tmp_path / "run/.lock").exists()


@pytest.mark.slow
def test_a_finished_run_is_extended_and_says_what_becomes_of_the_rate(
        world, tmp_path, trained, capsys):
    out = copy_of(trained, tmp_path / "run")
    train.main(command(world, out, *RUN, "--resume", "--steps", 9))
    told = capsys.readouterr().out
    assert ("6 steps become 9: the schedule stretches, "
            "and the rate at step 6 goes from 0.0e+00 to 4.3e-03") in told
    assert "| 0 steps skipped | 0 loss spikes" in told.splitlines()[-1]
    assert weights.read(out / "last.pt")["step"] == 9
    assert "steps 9 -> 6" in refused(world, out)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_also_over_a_resume_that_extends_the_run(
        world, tmp_path, capsys):
    """Step 5 is validated only because it is the last of the first run.

    The second one knows its value all the same.
    """
    best = [*RUN, "--eval-every", 2, "--save-every", 100, "--keep-best", "val_loss"]

    def losses():
        lines = [json.loads(line)
                 for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}

    train.main(command(world, tmp_path / "run", *best, "--steps", 5))
    before = losses()
    step = weights.read(tmp_path / "run/best.pt")["step"]
    assert sorted(before) == [2, 4, 5] and before[step] == min(before.values())
    assert json.loads((tmp_path / "run/best.json").read_text()) == {
        "name": "val_loss", "value": before[step], "step": step}
    train.main(command(world, tmp_path / "run", *best, "--steps", 9, "--resume"))
    after = losses()
    assert weights.read(tmp_path / "run/best.pt")["step"] == min(after, key=after.get)
    assert capsys.readouterr().out.count("| the best") >= 1
    # A value that nothing beats: a resumed run must know it, and leave its checkpoint as it is.
    disk.write_text(tmp_path / "run/best.json",
                    json.dumps({"name": "val_loss", "value": 0.001, "step": step}))
    kept = (tmp_path / "run/best.pt").read_bytes()
    train.main(command(world, tmp_path / "run", *best, "--steps", 12, "--resume"))
    assert sorted(losses())[-1] == 12 and (tmp_path / "run/best.pt").read_bytes() == kept
    with pytest.raises(SystemExit, match="--keep-best acc: a validation of this run has val_loss"):
        train.main(command(world, tmp_path / "wrong", *RUN, "--keep-best", "acc"))


@pytest.mark.slow
def test_the_short_validation_of_step_10_is_never_the_best(world, tmp_path, capsys):
    """It has fewer captions, so its number cannot be compared with the others."""
    train.main(command(world, tmp_path / "run", *RUN, "--steps", 12, "--eval-every", 100,
                       "--keep-best", "val_loss"))
    told = [line for line in capsys.readouterr().out.splitlines() if "| validation" in line]
    assert [("the best" in line) for line in told] == [False, True]
    assert weights.read(tmp_path / "run/best.pt")["step"] == 12


def test_a_disk_without_hard_links_gets_copies(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("weights")
    (tmp_path / "b").write_text("older")
    monkeypatch.setattr(disk.os, "link",
                        lambda *_: (_ for _ in ()).throw(OSError(1, "no links here")))
    disk.also_as(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_validation_that_is_not_a_number_is_never_the_best(tmp_path):
    run = SimpleNamespace(settings=Settings(keep_best="val_loss"), out=tmp_path)
    run.machine, run.saved = SimpleNamespace(rank=0, union=dict), None
    best = checkpoints.Best(run)
    assert not best.is_beaten_by({"val_loss": float("nan")})
    assert best.is_beaten_by({"val_loss": 5.0})
    best.value = 5.0
    assert best.is_beaten_by({"val_loss": 4.0})
    assert not best.is_beaten_by({"val_loss": float("nan")})
    best.name = "val_accuracy"
    assert best.is_beaten_by({"val_accuracy": 6.0}) and not best.is_beaten_by({"val_accuracy": 4.0})


@pytest.mark.slow
def test_an_error_that_nobody_expected_ends_a_run_that_has_loading_processes(world, tmp_path):
    """They ignore SIGTERM, so Python would wait for them for ever, and torchrun for Python."""
    arguments = command(world, tmp_path / "run", *RUN, "--steps", 200, "--workers", 2)
    script = ("import sys, train\n"
              "step = train.train_step\n"
              "def broken(run, state, *more):\n"
              "    step(run, state, *more)\n"
              "    assert state.step < 3, 'pretended'\n"
              "train.train_step = broken\n"
              "train.main(sys.argv[1:])\n")
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, timeout=100,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "AssertionError: pretended"


def test_a_full_gpu_says_what_takes_less_and_from_where_the_run_goes_on(world, tmp_path,
                                                                        monkeypatch):
    step = train.train_step

    def full(run, state, *more):
        if state.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        step(run, state, *more)

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, tmp_path / "run", *RUN, "--micro-batch", 4))
    assert re.fullmatch(r"train.py: the GPU's memory was full in step 4, with micro-batches of 4: "
                        r"a smaller --micro-batch .*; --resume goes on from step 2",
                        stop.value.code)


def test_a_full_gpu_in_an_evaluation_is_a_sentence_too():
    with pytest.raises(SystemExit, match="eval.py: the GPU's memory was full: .* --batch-size"):
        with machine.running("eval.py"):
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_what_goes_wrong_in_a_data_loading_process_is_a_sentence_too(tmp_path):
    class Broken(torch.utils.data.Dataset):
        def __getitem__(self, i):
            raise ValueError("data/x.arrow row 3: 100 images in a row cannot be decoded")

        def __len__(self):
            return 1

    with pytest.raises(SystemExit) as stop, disk.command("train.py"):
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert stop.value.code == "train.py: data/x.arrow row 3: 100 images in a row cannot be decoded"


@pytest.mark.slow
def test_processes_that_cannot_meet_say_where(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(taken.getsockname()[1]), "RANK": "0",
                  "LOCAL_RANK": "0"}
        run = started(command(world, tmp_path / "run", *RUN), places)
        _, words = run.communicate(timeout=120)
    assert run.returncode == 1 and f"could not meet at 127.0.0.1:{places['MASTER_PORT']}" in words
    assert "Traceback" not in words


@pytest.mark.slow
def test_a_full_disk_names_the_file_and_the_checkpoint_that_stands(world, tmp_path, monkeypatch):
    original = weights.save

    def save(path, *rest, **more):
        if more["step"] > 4:
            raise OSError(28, "No space left on device", str(path))
        original(path, *rest, **more)

    monkeypatch.setattr(weights, "save", save)
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, tmp_path / "run", *RUN))
    told = stop.value.code
    whole = tmp_path / "run/last.pt"
    assert f"No space left on device ({whole} of step 4 is whole); free some space" in told
    assert weights.read(whole)["step"] == 4


@pytest.mark.slow
def test_a_run_whose_folder_has_a_name_without_unicode_resumes(world, tmp_path, trained):
    """In a locale without Unicode, Python knows é as two bytes that are no characters.

    The settings hold them.
    """
    saved = torch.load(trained / "step_4.pt", weights_only=False)
    out = copy_of(trained, tmp_path / "run",
                  **saved | {"settings": saved["settings"] | {"out": "runs/\udcc3\udca9"}})
    train.main(command(world, out, *RUN, "--resume"))
    assert_same(outcome(out), outcome(trained), 0)
