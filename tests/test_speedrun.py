"""The time to quality: when the clock runs, and when it stops."""

import json

import pytest
from conftest import TRAIN_FLM

from tools import speedrun, toy

TINY = " ".join([*TRAIN_FLM, "--global-batch 8 --steps 6 --bucket 1 --vocab-size 300"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    toy.make(out, images=20, eval_images=4, size=32, workers=1)
    return out


def run(world, tmp_path, *more):
    speedrun.main(["--data", str(world), "--out", str(tmp_path), "--flags", TINY, "--captions", "8",
                   "--first", "2", "--every", "2",
                   *map(str, more)])
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("seed_*.json"))]


def test_a_quality_that_is_never_reached_has_no_time_and_the_median_says_so(
        world, tmp_path, capsys):
    one, two = run(world, tmp_path, "--seeds", 2, "--quality", 1.01)
    assert one["seconds"] is None and [asked["step"] for asked in one["asked"]] == [2, 4, 6]
    seconds = [asked["seconds"] for asked in one["asked"]]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert "--seed 0" in one["command"] and "--seed 1" in two["command"]
    assert "not reached (median of 2 seeds)" in capsys.readouterr().out


def test_the_clock_stops_where_the_quality_is_reached_and_a_seed_is_not_run_twice(
        world, tmp_path, capsys):
    [found] = run(world, tmp_path, "--seeds", 1, "--quality", 0.0)
    assert (found["step"], found["seconds"]) == (2, found["asked"][0]["seconds"])
    path = tmp_path / "seed_0.json"
    path.write_text(json.dumps(found | {"seconds": 77.0}))
    run(world, tmp_path, "--seeds", 1, "--quality", 0.0)
    assert "seed 0: 77 s" in capsys.readouterr().out


def test_evaluation_is_not_on_the_clock(world, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speedrun, "clock", lambda device: now[0])
    step, ask = speedrun.train.train_step, speedrun.word_table

    def slow(seconds, function):
        def called(*args):
            now[0] += seconds
            return function(*args)
        return called

    monkeypatch.setattr(speedrun.train, "train_step", slow(1.0, step))
    monkeypatch.setattr(speedrun, "word_table", slow(100.0, ask))
    [found] = run(world, tmp_path, "--seeds", 1, "--quality", 1.01)
    assert [asked["seconds"] for asked in found["asked"]] == [2.0, 4.0, 6.0]
