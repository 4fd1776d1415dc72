"""The micro-batch that fits into memory: --micro-batch auto.

    fit_micro_batch(run, state)         # before the first step; says what it found

Micro-batches of the longest captions pass the model forwards and backwards, each about twice as
large as the one before, until memory or the share of the global batch ends it. The number found is
saved with the run's settings: a resumed run goes on with it.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tasks import to_device
from training import machine as machines
from training.optimizer import moments_of
from training.report import Halt
from training.runs import Run
from training.settings import LARGEST_ON_A_CPU

if TYPE_CHECKING:           # for the annotations alone: train comes later
    from train import State

MARGIN = 0.08           # share of the memory that is left free: fragments, other sizes of images
NO_MEMORY = 2 ** 62     # bytes: more than there are


def longest_batch(run: Run, size: int) -> dict:
    """A micro-batch of the longest captions of the training data."""
    longest = np.argsort(run.sampler.lengths, kind="stable")[-size:]
    dataset = run.task.dataset(run.tables["train"], train=True)
    batch, _ = run.task.collate(dataset.samples([(0, int(i)) for i in longest]))
    return batch


def fit_micro_batch(run: Run, state: "State",
                    batch_of: Callable[[Run, int], dict] = longest_batch) -> None:
    """Sets run.micro_batch to the largest that fits, and run.accumulation; every process must ask.

    batch_of: makes the micro-batch of a size that is tried. Halt where not even the smallest fits.
    """
    machine = run.machine
    limit = -machine.largest(-memory_limit(machine))        # the smallest of all processes
    sizes = sizes_of(run)
    peaks, too_large = {}, ""
    for size in sizes:
        peak = expected_peak(peaks, size)
        if peak <= limit:
            peak = machine.largest(peak_bytes(run, state, batch_of(run, size)))
        if peak > limit:
            too_large = f"; {size} do not fit"
            break
        peaks[size] = peak
    if not peaks:
        raise Halt(f"--micro-batch auto: not even {sizes[0]} pairs fit into "
                   f"{limit / 2 ** 30:.2f} GB")
    found = max(peaks)
    machine.say(f"--micro-batch auto: {found} pairs, {peaks[found] / 2 ** 30:.2f} GB of at most "
                f"{limit / 2 ** 30:.2f}{too_large}")
    run.micro_batch = found
    run.accumulation = run.settings.global_batch // (machine.data_world * found)
    run.settings = replace(run.settings, micro_batch=found)


def sizes_of(run: Run) -> list[int]:
    """The micro-batches that are tried: the divisors of a process's share of the global batch.

    On a CPU there are at most LARGEST_ON_A_CPU pairs. Matching takes wrong images from the
    micro-batch, so it has more pairs than can share an image (settings.check_task).
    """
    share = run.settings.global_batch // run.machine.data_world
    least = run.settings.captions_per_image + 1 if run.config.itm else 1
    most = min(share, LARGEST_ON_A_CPU) if run.machine.device.type == "cpu" else share
    return [size for size in range(least, most + 1) if share % size == 0]


def expected_peak(peaks: dict[int, int], size: int) -> float:
    """The bytes that a size is expected to need, on the line through the last two that were tried.

    A CPU that runs out of memory kills the process: such a size must not be tried.

    >>> expected_peak({2: 120, 4: 140}, 8)
    180.0
    """
    if len(peaks) < 2:
        return 0.0
    (before, less), (last, more) = list(peaks.items())[-2:]
    return more + (size - last) * (more - less) / (last - before)


def memory_limit(machine: machines.Machine) -> int:
    """Bytes that this process may hold, what it holds now included."""
    if machine.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(machine.device)
        return int((1 - MARGIN) * (free + torch.cuda.memory_reserved(machine.device)))
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = dict(line.split(":") for line in memory.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    held = 2 ** 30 * machines.memory_gb(machine.device)
    return int((1 - MARGIN) * (free / machine.world + held))


def peak_bytes(run: Run, state: "State", batch: dict) -> int:
    """The most bytes held while a micro-batch trains; NO_MEMORY if a GPU ran out.

    The optimizer's moments, which the first step will add, are counted with it.
    """
    device = run.machine.device
    machines.forget_peak(device)
    state.bare.train()
    try:
        with run.machine.autocast():        # the bare model: no process waits for another
            results = state.bare(to_device(batch, device, run.config))
        sum(results[name][0] for name in run.config.loss_weights).backward()
        peak = machines.peak_memory(device)
    except torch.OutOfMemoryError:
        peak = NO_MEMORY
    results = None
    state.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if peak == NO_MEMORY or state.optimizer.state:
        return peak
    moments = moments_of(state.bare, run.settings).values()
    return peak + sum(4 * tensor.numel() for kept in moments for tensor in kept.values())
