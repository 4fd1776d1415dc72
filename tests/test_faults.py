"""The campaign of `make faults` recognises what goes wrong, and reports it.

How much does, it tells when it is run.
"""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch

from tools import faults, faults_downloads, faults_runs
from tools.faults_tries import OUTCOMES, differing_tensors, start, wait

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out


def refuse(words):
    return lambda: sys.exit(words)


def fill_memory():
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20) * 20))


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("outcome, function", [
    ("ok", lambda: None), ("ok", lambda: sys.exit(0)),
                                               ("sentence", refuse("x.pt: not a checkpoint")),
    ("unclear", refuse("something is wrong")), ("unclear", refuse("x.pt: " + "long " * 1000)),
    ("traceback", lambda: {}["key"]), ("signal", crash), ("timeout", lambda: time.sleep(60)),
                                               ("memory", fill_memory)])
def test_each_outcome_is_recognised(outcome, function):
    result = wait(start(function), timeout=1.5 if outcome == "timeout" else 30, memory=1500,
                  names=["x.pt"])
    assert result.outcome == outcome, result


def test_a_child_s_words_and_exit_code_arrive():
    def speak():
        print("a" * 200_000)
        print("b", file=sys.stderr)
        sys.exit(143)

    result = wait(start(speak))
    assert (result.code, result.killed, len(result.out), result.err) == (143, False, 200_001, "b\n")
    assert result.last_line == "b"
    result = wait(start(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert (result.code, result.killed) == (143, True)


def test_children_that_a_try_killed_are_gone():
    child = start(lambda: time.sleep(60))
    child.kill()
    assert not child.running() and wait(child).outcome == "signal"


def part_that(break_it):
    def run(t):
        t.write("input", bytes([t.rng.randrange(256)]))
        t.call(crash if break_it(t) else (lambda: None), "trying")
    return faults.Part(run, 1, 0)


def test_what_breaks_is_counted_kept_and_made_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(faults.PARTS, "tar", part_that(lambda t: t.number == 2))
    flags = ["--only", "tar", "--seed", "5", "--keep", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        faults.main([*flags, "--tries", "4"])
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert "seed 5" in printed and "signal x 1: tar, trying (try 2)" in printed
    assert printed.split("\ntar ")[1].split()[:3] == ["4", "3", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["tar_2"]
    kept = (tmp_path / "tar_2" / "input").read_bytes()
    assert json.loads((tmp_path / "tar_2" / "records.json").read_text())[0]["outcome"] == "signal"
    with pytest.raises(SystemExit):
        faults.main([*flags, "--first", "2", "--tries", "1", "--keep", str(tmp_path / "again")])
    assert (tmp_path / "again" / "tar_2" / "input").read_bytes() == kept


def test_a_try_that_fails_itself_does_not_pass_for_a_success(monkeypatch, tmp_path, capsys):
    def run(t):
        raise RuntimeError("the try is wrong")

    monkeypatch.setitem(faults.PARTS, "tar", faults.Part(run, 1, 0))
    with pytest.raises(SystemExit):
        faults.main(["--only", "tar", "--tries", "1", "--keep", str(tmp_path)])
    assert "wrong x 1: tar, the try itself" in capsys.readouterr().out


def test_a_part_runs(tmp_path, capsys):
    try:
        faults.main(["--only", "json", "--tries", "3", "--seed", "0", "--keep", str(tmp_path)])
    except SystemExit:                  # a fault was found: that is not the question here
        pass
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("json ")]
    assert int(row.split()[1]) >= 3


def test_minutes_end_a_campaign(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(faults.PARTS, "tar", part_that(lambda t: False))
    began = time.monotonic()
    faults.main(["--only", "tar", "--minutes", "0.02", "--seed", "1", "--keep", str(tmp_path)])
    assert time.monotonic() - began < 20 and "tar" in capsys.readouterr().out


def test_damage_changes_something_and_is_a_function_of_its_random_numbers():
    contents = bytes(range(256)) * 4
    results = [faults_downloads.damage(contents, random.Random(seed)) for seed in range(200)]
    assert results == [faults_downloads.damage(contents, random.Random(seed))
                       for seed in range(200)]
    assert sum(result != contents for result in results) > 190


def test_nonsense_is_one_change_of_a_checkpoint():
    for seed in range(200):
        whole = {"model": {"a": torch.ones(2, 3), "b": torch.ones(3)}, "step": 3,
                 "task": "pretrain", "scaler": {},
                 "optimizer": {"state": {"a": {"exp_avg": torch.ones(2, 3)}},
                               "param_groups": [{"lr": 0.1}]},
                 **dict.fromkeys(("counters", "settings", "config"), {"n": 7}), "files": [["x", 1]],
                 "answers": None,
                 "tokenizer": {"vocab.json": "{}"}, "format": "f", "backbone": "flm"}
        before = repr(whole)
        contents, what = faults_runs.nonsense(dict(whole), random.Random(seed))
        assert repr(whole) == before and ":" in what
        assert repr(contents) != before or "answers: None" in what or "scaler: {}" in what, what


def test_other_weights_are_seen(tmp_path):
    one = {"model": {"a": torch.ones(2), "b": torch.ones(2)}, "step": 3}
    torch.save(one, tmp_path / "a.pt")
    torch.save({"model": {"a": torch.ones(2), "b": torch.tensor([1.0, 1.0000001])}, "step": 4},
               tmp_path / "b.pt")
    assert differing_tensors(tmp_path / "a.pt", tmp_path / "a.pt", ["model", "step"]) == []
    assert differing_tensors(tmp_path / "a.pt", tmp_path / "b.pt", ["model"]) == [".model.b"]
    assert differing_tensors(tmp_path / "a.pt", tmp_path / "b.pt", ["step"]) == [".step"]


def test_every_part_of_the_table_is_documented():
    for part in faults.PARTS.values():
        assert part.run.__doc__
    assert set(OUTCOMES.values()) == {True, False}
