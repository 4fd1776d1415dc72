"""What a run will take before it runs: its memory by part, and its hours on known cards.

    python train.py … --dry-run                                     # of a run whose data is here
    python -m tools.plan --processes 8 --task pretrain --recipe flm-b32     # of one whose is not

Memory is counted on the loop's own code (training/memory.py). Time is arithmetic: the FLOPs of the
recipe (training/flops.py) over the peak of the cards' data sheets times a utilization. That one is
an assumption, until docs/gpu.json holds a measured one.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.flops import flops_per_pair_and_token
from training.memory import step_memory
from training.report import count_parameters, describe
from weights import outline_of

if TYPE_CHECKING:           # for the annotations alone: the file comes later
    from training.runs import Run

GIB = 2 ** 30
MEASURED = Path(__file__).parents[1] / "docs/gpu.json"      # by `python -m tools.bench gpu`
ASSUMED = 0.3       # of the data sheet's peak; well-kept training codes reach 0.33 to 0.46 on H100s
ROOM = 0.9          # share of a card's memory that a plan may fill: the head of training/memory.py


class Card(NamedTuple):
    """A GPU, by its maker's data sheet."""
    name: str
    tflops: float       # dense bf16 matrix products with float32 sums (fp16 where there is no bf16)
    gigabytes: float    # memory


CARDS = (
    Card("H200", 989, 141), Card("H100 SXM", 989, 80), Card("H100 PCIe", 756, 80),
    Card("A100 80GB", 312, 80), Card("A100 40GB", 312, 40), Card("L40S", 362, 48),
    Card("A10", 125, 24), Card("V100 32GB", 125, 32), Card("RTX 4090", 165, 24),
    Card("RTX 3090", 71, 24))


@dataclass(frozen=True)
class Cost:
    """What a run computes."""
    flops_per_pair: float       # in training: three forward passes
    tokens: float               # of a text, on average
    pairs: int                  # of the whole run
    processes: int


def measured_utilization(path: Path = MEASURED) -> tuple[float, str] | None:
    """(share of the data sheet's peak, card) of a step of base-b32 in a file of measurements.

    That of 256 pairs, with no switch on. None where there is no such file, or no known card in it.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    tflops = found["rows"].get("step 256", {}).get("tflops")
    cards = [card for card in CARDS if card.name.split()[0] in found["card"]]
    if not tflops or not cards:
        return None
    return tflops / cards[0].tflops, found["card"]


def memory_line(parts: dict[str, int]) -> str:
    """12.3 GB: weights 1.3, gradients 1.3, …"""
    described = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:.3g} GB: {described}"


def card_lines(cost: Cost, memory: int | None = None) -> list[str]:
    """A table of cards: whether so many bytes fit, pairs a second, hours and days of the run."""
    measured = measured_utilization()
    share, source = measured or (ASSUMED, "")
    how = f"as measured on {source} (docs/GPU.md)" if source else "an assumption: none was measured"
    several = f"{cost.processes} cards" if cost.processes > 1 else "one card"
    lines = [f"a pair costs {cost.flops_per_pair / 1e9:.1f} GFLOP in training, with texts of "
             f"{cost.tokens:.1f} tokens; the run has {cost.pairs / 1e6:.1f} M pairs",
             f"at {100 * share:.0f} % of the data sheets' peak ({how}), nothing lost between "
             f"cards or to the loader, on {several}:",
             f"{'card':<12}{'TFLOP/s':>8}{'memory':>8}{'fits':>6}{'pairs/s':>12}{'hours':>9}"
             f"{'days':>8}"]
    for card in CARDS:
        speed = cost.processes * card.tflops * 1e12 * share / cost.flops_per_pair
        hours = cost.pairs / speed / 3600
        fits = "" if memory is None else "yes" if memory < ROOM * card.gigabytes * GIB else "no"
        lines.append(f"{card.name:<12}{card.tflops:>8.0f}{card.gigabytes:>5.0f} GB{fits:>6}"
                     f"{speed:>12,.0f}{hours:>9,.1f}{hours / 24:>8,.1f}")
    return lines


def dry_run(run: "Run", new_state: Callable, step: Callable) -> None:
    """Prints what would run, its settings, its memory and its time.

    Memory is that of the first step's longest micro-batch. new_state, step: train.build_state and
    train.train_step.
    """
    s, machine = run.settings, run.machine
    describe(run, outline_of(run.config), run.saved["step"] if run.saved else 0)
    for title, values in (("settings", asdict(s)), ("model", asdict(run.config))):
        machine.say(f"{title}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    for split, table in run.tables.items():
        machine.say(f"{split}: {table.named() if table else 'none'}")
    if machine.rank > 0:
        return
    dataset = run.task.dataset(run.tables["train"], train=True)
    longest = list(run.sampler.micro_batches(0, 1, run.micro_batch))[-1]
    on_gpu = machine.device.type == "cuda"
    batch = run.task.collate(dataset.samples(longest))
    memory = step_memory(run, new_state, step, batch, on_gpu)
    per_pair, per_token = flops_per_pair_and_token(run, 0)
    tokens = float(run.sampler.lengths.mean())
    cost = Cost(per_pair + tokens * per_token, tokens, s.steps * s.global_batch, machine.world)
    say_plan(run, memory, cost, tuple(batch[0]["ids"].shape), on_gpu)


def say_plan(run: "Run", memory: dict[str, int], cost: Cost, ids: tuple[int, int],
             on_gpu: bool) -> None:
    """Prints memory and time. ids: texts and tokens of the micro-batch that was counted."""
    say = run.machine.say
    where = f"{run.machine.precision} on a {'GPU' if on_gpu else 'CPU'}"
    say(f"memory of a process at the peak of a step, {where}, micro-batch of {run.micro_batch}, "
        f"{ids[0]} texts of {ids[1]} tokens: about {memory_line(memory)}")
    if run.machine.tensor > 1:
        say("--tensor-parallel: the activations are those of an undivided model, an upper bound")
    elif run.machine.world > 1 and not run.settings.shard:
        say("DDP holds the gradients a second time while it sends them: "
            f"{4 * count_parameters(outline_of(run.config)) / GIB:.2f} GB more")
    if run.settings.shard:
        say("(with --shard, activations also hold gathered layers, and gradients not yet sharded)")
    if not on_gpu:
        say("python -m tools.plan counts the memory that a GPU takes")
    for line in card_lines(cost, sum(memory.values()) if on_gpu else None):
        say(line)
