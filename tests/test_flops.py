"""Utilization: what is counted, what it is divided by, and that training does not notice."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import (TRAIN as RUN, TRAIN_FLM, TRAIN_VILT, assert_same, train_command,
                      train_outcome, write_caption_world)

import train
import weights
from data import token_lengths
from training import flops, machine, settings as train_settings
from training.runs import open_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


def opened(arguments):
    settings, config_flags = train_settings.parse(arguments)
    return open_run(settings, config_flags, machine.set_up("cpu", "fp32"))


def test_utilization_is_the_work_over_what_the_device_could_have_done():
    work = flops.Work(per_pair=100.0, per_token=10.0, peak=1000.0, measured=False)
    assert work.utilization(pairs=2, tokens=30, seconds=5) == pytest.approx(0.1)
    assert str(replace(work, peak=2.5e12)) == "2.5 TFLOP/s (as --peak-tflops says)"


@pytest.mark.slow
@pytest.mark.parametrize("sizes, more",
                         [(TRAIN_FLM, ()), (TRAIN_FLM, ("--objective", "ar")),
                          (TRAIN_VILT, ("--no-itm", "--no-mpp"))],
                         ids=["flm", "ar", "vilt"])
def test_pairs_and_tokens_cost_what_their_captions_cost_one_by_one(world, tmp_path, sizes, more):
    """Alone in its batch, a caption has no padding: that is the work which reports count."""
    run = opened(train_command(world, tmp_path, *RUN, *more, sizes=sizes))
    per_pair, per_token = flops.flops_per_pair_and_token(run, step=0)
    model = weights.outline_of(run.config)
    dataset = run.task.dataset(run.tables["train"], train=True)
    exact, texts = 0, range(0, 120, 8)
    for text in texts:
        batch, _ = run.task.collate(dataset.samples([(0, text)]))
        exact += 3 * flops.count_flops(model,
                                       flops.to_device(batch, torch.device("cpu"), run.config))
    tokens = token_lengths(run.tables["train"], run.task.tok, list(texts)).sum()
    # masked words are drawn
    assert len(texts) * per_pair + tokens * per_token == pytest.approx(exact, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--itm",), ("--captions-per-image", 2)])
def test_samples_of_the_end_of_an_epoch_and_beyond_the_last_step_are_counted_too(
        world, tmp_path, more):
    run = opened(train_command(world, tmp_path, *RUN, *more))
    costs = [flops.flops_per_pair_and_token(run, step)
             for step in (0, run.sampler.steps_per_epoch - 1, run.settings.steps)]
    assert all(per_pair + 10 * per_token > 0 for per_pair, per_token in costs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_that_of_a_product_in_the_runs_precision(precision, monkeypatch):
    monkeypatch.setitem(flops.SIDES, "cpu", 64)
    asked, product, state = [], torch.nn.functional.linear, torch.get_rng_state()
    monkeypatch.setattr(torch.nn.functional, "linear",
                        lambda a, b: asked.append(a.dtype) or product(a, b))
    assert 0 < flops.measure_peak(machine.Machine(0, 1, torch.device("cpu"), precision)) < 1e15
    assert set(asked) == {machine.DTYPES[precision]} and torch.equal(torch.get_rng_state(), state)


def test_counting_and_measuring_change_no_number_of_training(world, tmp_path, monkeypatch, capsys):
    more = [*RUN, "--dropout", 0.1, "--steps", 4]
    train.main(train_command(world, tmp_path / "with", *more, "--peak-tflops", 0.5))
    printed = capsys.readouterr().out
    assert "0.5 TFLOP/s (as --peak-tflops says)" in printed.splitlines()[0]
    assert "samples/s | MFU " in printed
    lines = [json.loads(line)
             for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "lr" in line:
            assert 0 < line["mfu"] < 1
            assert line["pairs_per_second_per_device"] == line["samples_per_second"]
    monkeypatch.setattr(train, "work_of", lambda run, step: None)
    train.main(train_command(world, tmp_path / "without", *more))
    assert "MFU" not in capsys.readouterr().out
    assert_same(train_outcome(tmp_path / "with"), train_outcome(tmp_path / "without"), 0)


@pytest.mark.parametrize("told", ["-1", "nan", "inf"])
def test_a_peak_that_no_device_has_is_refused(world, tmp_path, told):
    with pytest.raises(SystemExit, match="--peak-tflops .*: TFLOP/s of one device are expected"):
        train.main(train_command(world, tmp_path, *RUN, "--peak-tflops", told))
