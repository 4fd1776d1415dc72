"""--micro-batch auto: the largest micro-batch that fits is found.

It is said, saved, and resumed as it was.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import train
import weights
from training import fitting, machine
from conftest import TRAIN, assert_same, train_command, train_outcome, write_caption_world
from training.runs import open_run

AUTO = ("--micro-batch", "auto")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def memory(monkeypatch):
    """A device of 900 bytes on which n pairs take 50 + 100 n -> the sizes that were tried."""
    tried = []
    monkeypatch.setattr(fitting, "memory_limit", lambda machine: 900)
    monkeypatch.setattr(fitting, "peak_bytes",
                        lambda run, state, batch: (tried.append(len(batch["ids"]))
                                                   or 50 + 100 * len(batch["ids"])))
    return tried


def opened(world, out, *flags):
    """(run, state) before the first step."""
    settings, config_flags = train.parse(train_command(world, out, *TRAIN, *AUTO, *flags))
    run = open_run(settings, config_flags, machine.set_up("cpu"))
    return run, train.build_state(run)


def test_the_micro_batch_is_the_largest_that_fits_and_no_larger_one_is_tried(
        world, tmp_path, memory, capsys):
    run, state = opened(world, tmp_path)
    fitting.fit_micro_batch(run, state)
    # 16 would take 1,650
    assert memory == [1, 2, 4, 8] and (run.micro_batch, run.accumulation) == (8, 2)
    printed = capsys.readouterr().out
    assert "--micro-batch auto: 8 pairs, 0.00 GB of at most 0.00; 16 do not fit" in printed
    assert run.settings.micro_batch == 8


def test_the_global_batch_ends_the_search_too(world, tmp_path, memory):
    run, state = opened(world, tmp_path, "--global-batch", 6)
    fitting.fit_micro_batch(run, state)
    assert memory == [1, 2, 3, 6] and (run.micro_batch, run.accumulation) == (6, 1)


def test_matching_gets_the_pairs_that_it_needs(world, tmp_path, memory):
    run, _ = opened(world, tmp_path, "--itm", "--captions-per-image", 2)
    assert fitting.sizes_of(run) == [4, 8, 16]


def test_memory_for_nothing_is_said(world, tmp_path, monkeypatch):
    run, state = opened(world, tmp_path)
    monkeypatch.setattr(fitting, "memory_limit", lambda machine: 10)
    with pytest.raises(fitting.Halt, match="not even 1 pairs fit into"):
        fitting.fit_micro_batch(run, state)


def test_all_processes_take_what_fits_the_fullest_of_them(world, tmp_path, memory):
    run, state = opened(world, tmp_path)
    # The other process needs 150 bytes more, and has 700.
    run.machine = SimpleNamespace(world=1, data_world=1, device=run.machine.device,
                                  say=run.machine.say,
                                  largest=lambda number: -700 if number < 0 else number + 150)
    fitting.fit_micro_batch(run, state)
    assert run.micro_batch == 4         # 8 would take 1,000


def test_a_gpu_that_runs_out_of_memory_ends_the_search(world, tmp_path):
    run, state = opened(world, tmp_path)
    forward = state.bare.forward

    def limited(batch):
        if len(batch["ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)

    state.bare.forward = limited
    fitting.fit_micro_batch(run, state)
    assert run.micro_batch == 4


def test_what_is_tried_is_the_longest_texts_of_the_training_data(world, tmp_path):
    run, _ = opened(world, tmp_path)
    lengths = (fitting.longest_batch(run, 4)["ids"] != run.config.pad_id).sum(1)
    assert sorted(lengths.tolist()) == sorted(run.sampler.lengths)[-4:]
    assert min(lengths) > min(run.sampler.lengths)


def test_trying_leaves_weights_and_gradients_as_they_were_and_measures(world, tmp_path):
    run, state = opened(world, tmp_path)
    before = {name: tensor.clone() for name, tensor in state.bare.state_dict().items()}
    peak = fitting.peak_bytes(run, state, fitting.longest_batch(run, 4))
    moments = 8 * sum(parameter.numel() for parameter in state.bare.parameters())
    assert peak > moments + 50 * 2 ** 20            # Python and torch alone are larger than that
    assert all(torch.equal(tensor, before[name])
               for name, tensor in state.bare.state_dict().items())
    assert all(parameter.grad is None for parameter in state.bare.parameters())
    assert not state.optimizer.state


def test_the_memory_that_is_there_is_a_number_of_bytes():
    limit = fitting.memory_limit(machine.set_up("cpu"))
    assert 2 ** 26 < limit < 2 ** 46


@pytest.mark.skipif(not machine.Path("/proc/self/clear_refs").exists(),
                    reason="only Linux forgets a peak")
def test_a_peak_is_that_since_the_last_one_was_forgotten():
    device, size = torch.device("cpu"), 2 ** 26
    machine.forget_peak(device)
    start = machine.peak_memory(device)
    torch.ones(size, dtype=torch.uint8)
    above = machine.peak_memory(device) - start
    machine.forget_peak(device)
    assert above > 0.9 * size and machine.peak_memory(device) < start + 0.5 * size


@pytest.mark.slow
def test_what_was_found_is_saved_and_a_resumed_run_goes_on_with_it(world, tmp_path, memory, capsys):
    train.main(train_command(world, tmp_path, *TRAIN, *AUTO, "--steps", 2))
    assert weights.read(tmp_path / "last.pt")["settings"]["micro_batch"] == 8
    assert json.loads((tmp_path / "config.json").read_text())["micro_batch"] == 8
    memory.clear()
    capsys.readouterr()
    train.main(train_command(world, tmp_path, *TRAIN, *AUTO, "--resume"))
    assert not memory and re.search(r"= 1 processes x 2 x 8 \|", capsys.readouterr().out)


@pytest.mark.slow
def test_what_was_found_makes_the_run_that_naming_it_makes(world, tmp_path, memory):
    for out, micro_batch in (("named", "8"), ("auto", "auto")):
        train.main(train_command(world, tmp_path / out, *TRAIN, "--dropout", 0.1, "--micro-batch",
                                 micro_batch))
    assert_same(train_outcome(tmp_path / "named"), train_outcome(tmp_path / "auto"), 0)


@pytest.mark.parametrize("text", ["-1", "some"])
def test_other_words_for_a_micro_batch_are_refused(world, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        train.parse(train_command(world, tmp_path, f"--micro-batch={text}"))
    assert f"{text}: a number of pairs, or auto, is expected" in capsys.readouterr().err


def test_shards_refuse_to_search(world, tmp_path):
    settings, _ = train.parse(train_command(world, tmp_path, *AUTO, "--shard"))
    with pytest.raises(ValueError,
                       match="--micro-batch auto needs whole models, which --shard cuts"):
        train.check(settings, machine.set_up("cpu"))
