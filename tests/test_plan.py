"""A plan's memory is that of the run, its time the arithmetic that it names."""

import json

import pytest
from conftest import ROOT, TRAIN_FLM, TRAIN_VILT, train_command, write_caption_world
from torch.profiler import ProfilerActivity, profile

import train
from tools import plan as plan_tool
from training import machine, memory, plan, settings as train_settings
from training.runs import open_run

pytestmark = pytest.mark.slow       # every plan takes seconds

STEP = "--global-batch 16 --micro-batch 8 --steps 6 --lr 1e-2 --clip 1.0 --dropout 0.1".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


class NoLog:
    def micro_batch(self, *_):
        pass

    step = micro_batch


def allocated(run, batch):
    """Bytes that torch's allocator has handed out at the peak of a run's second step."""
    state = train.build_state(run)
    state.model.train()
    train.train_step(run, state, [batch] * run.accumulation, NoLog())
    before = sum(tensor.nbytes for tensor in [*state.bare.parameters(), *batch[0].values()])
    before += sum(tensor.nbytes for kept in state.optimizer.state.values()
                  for tensor in kept.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train.train_step(run, state, [batch] * run.accumulation, NoLog())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak


@pytest.mark.parametrize("sizes, precision, more", [
    (TRAIN_FLM, "fp32", ()), (TRAIN_FLM, "bf16", ("--itm",)),
                                                    (TRAIN_FLM, "fp32", ("--muon-lr", 0.01)),
    (TRAIN_VILT, "fp32", ("--no-mpp",)), (TRAIN_FLM, "fp32",
                                          ("--objective", "mlm", "--micro-batch", 16))],
    ids=["flm", "bf16 itm", "muon", "vilt", "mlm, no accumulation"])
def test_the_memory_of_a_plan_is_what_torch_allocates_in_a_real_step(
        world, tmp_path, sizes, precision, more):
    """Larger than the tests' models, so that a kilobyte more or less is no percent."""
    more_width = ["--text-width", 64, "--vit-width", 64] if sizes is TRAIN_FLM else []
    wide = ["--width", 64, "--precision", precision] + more_width
    given, flags = train_settings.parse(train_command(world, tmp_path, *STEP, *wide, *more,
                                                      sizes=sizes))
    run = open_run(given, flags, machine.set_up("cpu", precision))
    dataset = run.task.dataset(run.tables["train"], train=True)
    longest = list(run.sampler.micro_batches(0, 1, run.micro_batch))[-1]
    batch = run.task.collate(dataset.samples(longest))
    planned = memory.step_memory(run, train.build_state, train.train_step, batch, on_gpu=False)
    assert sum(planned.values()) == pytest.approx(allocated(run, batch), rel=0.03)
    parameters = sum(p.numel() for p in train.build_state(run).bare.parameters())
    assert planned["weights"] == 4 * parameters
    assert planned["moments"] >= 4 * parameters and planned["activations"] > 0


@pytest.fixture
def planned(capsys):
    def planned(*flags):
        plan_tool.main([*map(str, flags)])
        return capsys.readouterr().out
    return planned


TOY = "--task pretrain --recipe toy --vocab-size 400 --micro-batch 4".split()


def part(printed, name):
    return float(printed.split(f"{name} ")[1].split(",")[0].split()[0])


def test_a_plan_needs_no_data_and_says_memory_time_and_what_is_assumed(planned):
    printed = planned(*TOY, "--processes", 2, "--tokens", 9)
    assert "global batch 32 = 2 processes x 4 x 4" in printed and "2,000 steps" in printed
    assert "bf16 on a GPU, micro-batch of 4, 4 texts of 56 tokens" in printed
    assert "texts of 9.0 tokens; the run has 0.1 M pairs" in printed
    assert "an assumption: none was measured" in printed
    assert "on 2 cards" in printed and "DDP holds" in printed
    assert all(card.name in printed for card in plan.CARDS)


def test_speed_and_hours_are_the_peak_times_the_share_over_the_cost():
    cost = plan.Cost(flops_per_pair=1e11, tokens=13, pairs=3_600_000, processes=2)
    [line] = [line for line in plan.card_lines(cost, 90 * 2 ** 30) if line.startswith("H200")]
    speed = 2 * 989e12 * plan.ASSUMED / 1e11
    assert line.split() == ["H200", "989", "141", "GB", "yes", f"{speed:,.0f}",
                            f"{3.6e6 / speed / 3600:,.1f}", "0.0"]
    assert "no" in [line for line in plan.card_lines(cost, 90 * 2 ** 30)
                    if line.startswith("A100 80GB")][0].split()


def test_a_measured_utilization_takes_the_place_of_the_assumed_one(tmp_path):
    path = tmp_path / "gpu.json"
    assert plan.measured_utilization(path) is None
    path.write_text(json.dumps({"card": "NVIDIA H100 80GB HBM3",
                                "rows": {"step 64": {"tflops": 700.0}, "step 256": {}}}))
    assert plan.measured_utilization(path) is None      # another step's says nothing of this one
    path.write_text(path.read_text().replace("{}", '{"tflops": 494.5}'))
    share, card = plan.measured_utilization(path)
    assert share == pytest.approx(0.5) and card == "NVIDIA H100 80GB HBM3"


def test_larger_micro_batches_take_more_activations_and_no_more_weights(planned):
    small, large = planned(*TOY), planned(*TOY, "--micro-batch", 16)
    assert part(large, "activations") > 2 * part(small, "activations")
    assert part(large, "weights") == part(small, "weights")


@pytest.mark.parametrize("flags, sentence", [
    (("--task", "vqa", "--recipe", "toy", "--epochs", "2"), "--texts says of how many"),
    ((*TOY, "--tokens", "1"), "--tokens: at least 3"),
                                             ((*TOY, "--load", "x.pt"),
                                              "no weights are needed here")])
def test_a_plan_that_lacks_something_is_refused_in_a_sentence(flags, sentence):
    with pytest.raises(SystemExit, match="^plan.py: .*" + sentence):
        plan_tool.main(list(flags))


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "caption", "retrieval"])
def test_every_task_can_be_planned(planned, task):
    printed = planned("--task", task, "--recipe", "toy", "--vocab-size", 400, "--global-batch", 8,
                      "--micro-batch", 4, "--steps", 10)
    assert "about" in printed and part(printed, "activations") >= 0


def test_shards_hold_their_part_of_weights_gradients_and_moments(planned):
    alone, shared = planned(*TOY, "--muon-lr", 0), planned(*TOY, "--muon-lr", 0, "--shard",
                                                           "--processes", 4)
    for name in ("weights", "moments"):
        assert part(shared, name) == pytest.approx(part(alone, name) / 4, rel=0.03)
    assert "DDP holds" not in shared


def test_plans_read_what_the_page_of_a_gpu_writes():
    """`python -m tools.gpu_page … --out docs` writes docs/gpu.json beside the README."""
    assert plan.MEASURED == ROOT / "docs/gpu.json"
