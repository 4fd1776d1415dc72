"""How batches come to the loop: by how many processes, and decoded where.

    run.workers = workers_needed(run, work, step)
    for batch, notes in batches_of(run, step): ...

Loading processes read, decode and collate. With `--decode-on-device` they leave the JPEGs as they
are, and a thread of the training process has the device decode them, ahead of the steps.
"""

import atexit
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from data import CaptionDataset
from pictures import Undecoded, check_decoder
from training.flops import Work
from training.machine import core_share, ignore_signals, loader_workers

if TYPE_CHECKING:           # for the annotations alone: the file comes later
    from training.runs import Run

# Loaders are to keep up with a device that reaches this share of its peak. Well-kept training codes
# reach 0.33 to 0.46 on H100s; loading processes too many cost nothing but their memory.
REACHED = 0.6
SECONDS = 0.3               # for which samples are made, to see how long one takes
alive = weakref.WeakSet()               # torch's iterators that have loading processes


def batches_of(run: "Run", step: int) -> Iterator[tuple[dict, dict]]:
    """This process's micro-batches from a step on: (batch, notes), see Task.collate."""
    s, m = run.settings, run.machine
    numbers = run.sampler.micro_batches(step, s.steps, run.micro_batch, m.data_rank, m.data_world)
    dataset = run.task.dataset(run.tables["train"], train=True)
    dataset.keeps_jpegs = s.decode_on_device
    if s.decode_on_device:
        check_decoder(m.device)
    batches = load(dataset, numbers, run.task.collate, loader_workers(run.workers, m.device),
                   m.device)
    if s.decode_on_device:              # those of a step, which the loop takes together
        return decoded_ahead(batches, m.device, run.accumulation)
    return batches


def load(dataset: CaptionDataset, numbers: Iterable[list], collate: Callable, workers: int,
         device: torch.device) -> Iterator[tuple[dict, dict]]:
    """The batches of a dataset, made by so many processes; 0: by this one.

    numbers: of each batch, the keys of its samples.
    """
    batches = iter(DataLoader(dataset, batch_sampler=numbers, collate_fn=collate,
                              num_workers=workers, worker_init_fn=ignore_signals,
                              pin_memory=device.type == "cuda"))
    if workers:
        alive.add(batches)
        atexit.unregister(end_workers)
        atexit.register(end_workers)    # what was registered last is called first: before torch's
    return batches


def end_workers() -> None:
    """Ends the loading processes that are still there when Python ends.

    An error that nobody expected holds them by its traceback. They ignore the signal by which
    Python ends them, and it would wait for them for ever.
    """
    for batches in list(alive):
        batches._shutdown_workers()     # torch has no public name for it


def decoded_ahead(batches: Iterator[tuple[dict, dict]], device: torch.device,
                  ahead: int) -> Iterator[tuple[dict, dict]]:
    """The same batches with their pictures decoded on the device, `ahead` of them in advance.

    A thread does it, on a GPU in a stream of its own, while the step before is computed. Pictures
    that could not be decoded after all are added to the notes.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare():
        found = next(batches, None)
        if found is None:
            return None, None
        batch, notes = found
        with torch.cuda.stream(stream):                                 # of None: does nothing
            for name in ("image", "image_1"):
                if isinstance(batch.get(name), Undecoded):
                    batch[name], unreadable = batch[name].decoded(device)
                    notes["unreadable"] = notes["unreadable"] + unreadable
        return found, stream and stream.record_event()

    pool = ThreadPoolExecutor(1, "decoding")
    try:
        waiting = deque(pool.submit(prepare) for _ in range(ahead))
        while True:
            found, ready = waiting.popleft().result()
            if found is None:
                return
            waiting.append(pool.submit(prepare))
            if ready:
                use_after(ready, found[0], device)
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def use_after(ready: torch.cuda.Event, batch: dict, device: torch.device) -> None:
    """Lets the device's current stream wait for pictures that another one made.

    Their memory is not used anew before this stream is done with them.
    """
    here = torch.cuda.current_stream(device)
    here.wait_event(ready)
    for tensor in batch.values():
        if tensor.is_cuda:
            tensor.record_stream(here)


def workers_needed(run: "Run", work: Work | None, step: int) -> int:
    """The number of loading processes: as many as keep up with the device, if there are the cores.

    That is --workers, where it was given; on a CPU none. work: what the device can do, None in all
    processes but the first; they take its number. It is said, since it depends on this machine.
    """
    s, m = run.settings, run.machine
    if s.workers >= 0 or m.device.type == "cpu":
        return loader_workers(s.workers, m.device)
    needed = 0
    if work:
        cost = work.per_pair + work.per_token * float(run.sampler.lengths.mean())
        speed = REACHED * work.peak / cost                                  # pairs a second
        seconds = seconds_per_sample(run, step)
        needed = min(core_share(), max(1, math.ceil(speed * seconds)))
        m.say(f"{needed} loading processes: a sample takes {1000 * seconds:.1f} ms here, and the "
              f"device may ask for {speed:,.0f} a second")
    return m.largest(needed)


def seconds_per_sample(run: "Run", step: int) -> float:
    """How long this process takes to read, decode and collate a training sample."""
    dataset = run.task.dataset(run.tables["train"], train=True)
    dataset.keeps_jpegs = run.settings.decode_on_device
    m = run.machine
    [keys] = islice(run.sampler.micro_batches(step, step + 1, run.micro_batch, m.data_rank,
                                              m.data_world), 1)
    run.task.collate(dataset.samples(keys[:2]))             # the first ones load the libraries
    made, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        some = keys[made % len(keys):][:8]
        run.task.collate(dataset.samples(some))
        made += len(some)
    return (time.perf_counter() - began) / made
