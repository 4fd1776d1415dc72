"""Model FLOP utilization (MFU): the share of the device's arithmetic that training uses.

    work = work_of(run, step)           # counts two small batches, and measures the device once
    work.utilization(pairs=64, tokens=800, seconds=0.5)         # 0.41

Only what the model needs is counted: the matrix products on real tokens, three times those of a
forward pass for a training step. Padding, the optimizer and what is computed twice to save memory
are not useful work, so they lower the share.

Nothing here draws from the random numbers of training, and no weights are made.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import weights
from tasks import to_device
from training.machine import DTYPES, Machine

if TYPE_CHECKING:           # for the annotations alone: that file comes later
    from training.runs import Run

# A training step's matrix products, in forward passes: the backward pass has two for each one.
PASSES = 3
# Steps whose samples are looked at, and how many of them are counted as a batch.
STEPS, SAMPLES = 8, 16
# Side of the square matrices whose product is timed, and for how long it is repeated.
SIDES = {"cuda": 8192, "cpu": 512}
SECONDS = 0.1


@dataclass(frozen=True)
class Work:
    """What training costs, and what the device can do."""
    per_pair: float         # FLOPs of a pair in training, without its tokens: mostly the image …
    per_token: float        # … and of each token of its texts
    peak: float             # FLOPs a second of one device
    measured: bool          # whether the peak was measured here; False: --peak-tflops told it

    def utilization(self, pairs: float, tokens: float, seconds: float) -> float:
        """The share of the peak at which one device trained so much in so many seconds."""
        return (pairs * self.per_pair + tokens * self.per_token) / seconds / self.peak

    def __str__(self) -> str:
        how = "measured by a matrix product" if self.measured else "as --peak-tflops says"
        return f"{self.peak / 1e12:.3g} TFLOP/s ({how})"


def work_of(run: "Run", step: int) -> Work:
    """The Work of a run, from the samples that it trains on next."""
    told = run.settings.peak_tflops
    peak = 1e12 * told if told else measure_peak(run.machine)
    return Work(*flops_per_pair_and_token(run, step), peak, not told)


# -- What training costs ---------------------------------------------------------------------------

def count_flops(model: torch.nn.Module, batch: dict, forward: Callable | None = None) -> int:
    """FLOPs of a forward pass, 2 per multiply-add of the matrix products.

    model: one without weights (weights.outline_of). Attention counts its whole square, whatever the
    mask. Nothing is computed: torch's device "meta" knows shapes only.
    forward: what is counted instead of the model's own, called with model and batch.
    """
    forward = forward or type(model).forward
    batch = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    # Fused attention kernels are not counted everywhere; the plain one is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, batch)
    return counter.get_total_flops()


def flops_per_pair_and_token(run: "Run", step: int) -> tuple[float, float]:
    """What a pair costs in training: FLOPs of itself, and of each token of its texts.

    A line through two small batches, of shorter and of longer texts. (Attention grows with the
    square of the length; on the toy captions the line is within 0.4 % of captions counted alone.)
    """
    model = weights.outline_of(run.config).eval()       # dropout is no matrix product
    costs, lengths = [], []                             # of a pair, of each batch
    for batch, pairs in small_batches(run, step):
        costs.append(PASSES * count_flops(model, batch) / pairs)
        lengths.append(batch["ids"].numel() / pairs)
    (short, long), (low, high) = lengths, costs
    per_token = max(0.0, (high - low) / (long - short)) if long > short else 0.0
    return (low + high) / 2 - per_token * (short + long) / 2, per_token


def small_batches(run: "Run", step: int) -> Iterator[tuple[dict, int]]:
    """Two batches of the next steps' samples, of shorter texts and of longer ones.

    -> (batch, number of pairs), each. Lengths are those at a quarter and at three quarters.
    """
    sampler, m = run.sampler, run.machine
    left = sampler.steps_per_epoch - step % sampler.steps_per_epoch     # of the epoch
    groups = []                                         # (epoch, text) or (epoch, text, text, …)
    for some in sampler.micro_batches(step, step + min(STEPS, left), run.micro_batch,
                                      m.data_rank, m.data_world):
        groups += some
    groups.sort(key=lambda group: sampler.lengths[list(group[1:])].max())
    task = type(run.task)(replace(run.task.settings, pad_to=1), run.config, run.task.tok)
    dataset = task.dataset(run.tables["train"], train=True)
    for middle in (len(groups) // 4, 3 * len(groups) // 4):
        first = max(0, min(middle - SAMPLES // 2, len(groups) - SAMPLES))
        samples = dataset.samples(groups[first:first + SAMPLES])
        batch, _ = task.collate(samples)
        yield to_device(batch, torch.device("cpu"), run.config), len(samples)


# -- What the device can do ------------------------------------------------------------------------

def measure_peak(machine: Machine) -> float:
    """FLOPs a second of a matrix product in the run's precision, the fastest of some.

    It is computed as layers do it: there are CPUs whose other products in bfloat16 are 7 x slower.
    """
    device, side = machine.device, SIDES[machine.device.type]
    source = torch.Generator(device).manual_seed(0)     # training's own is left alone
    square = torch.randn(side, side, device=device, generator=source)
    square = square.to(DTYPES[machine.precision])
    fastest, end = math.inf, None
    while end is None or time.perf_counter() < end:
        began = time.perf_counter()
        F.linear(square, square)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = time.perf_counter() - began
        if end is None:                                 # the first one also loads the library
            end = time.perf_counter() + SECONDS
        else:
            fastest = min(fastest, spent)
    if device.type == "cuda":                           # the run's memory is counted without it
        del square
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side ** 3 / fastest
