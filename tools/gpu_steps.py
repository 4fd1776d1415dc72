"""Rows of `python -m tools.bench gpu` that measure the model: products, steps, scores, captions."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile

import train
from generate import generate
from predict import match_score
from tasks import BOS, to_device
from tools.drawn import drawn_batch, drawn_run
from training.fitting import fit_micro_batch
from training.flops import PASSES, count_flops
from training.machine import DTYPES, Machine, choose_kernels, memory_gb
from training.memory import step_memory
from training.settings import AUTO
from weights import model_of, outline_of

# In the small setting, which tries out every row without a GPU.
SMALL = {"base-b32": "toy", "base-b16": "toy", "large-l14-336": "toy", "vilt": "vilt-toy"}
CPU = torch.device("cpu")
# Shapes few enough to be compiled, and launched, as whole graphs.
STATIC = ("--compile", "--pad-to", "16", "24", "56")
GRAPHS = (*STATIC, "--cuda-graphs")


@dataclass(frozen=True)
class Place:
    """Where a row is measured."""
    device: torch.device
    small: bool             # tiny sizes and few rounds
    scratch: Path           # folder for data and runs

    def scaled(self, number: int, least: int = 2) -> int:
        """A size, in the small setting a 64th of it."""
        return max(least, number // 64) if self.small else number

    def machine(self, precision: str = "") -> Machine:
        """precision: bf16 unless told; in the small setting float32, as many CPUs lack bf16."""
        precision = precision or ("fp32" if self.small else "bf16")
        choose_kernels(precision)
        return Machine(0, 1, self.device, precision)

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self):
        """Gives back what the last row left, and starts the count of the peak anew."""
        torch.compiler.reset()
        gc.collect()                        # compiled and sharded models are in cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, function: Callable, warm_up: int = 3, at_least: float = 1.5) -> float:
        """Seconds of a call: the mean of as many as fill some time, after some that do not count.

        The device is waited for after a third of that time, so that calls follow each other.
        """
        if self.small:
            function()
            began = time.perf_counter()
            function()
            return time.perf_counter() - began
        for _ in range(warm_up):
            function()
        self.wait()
        began = time.perf_counter()
        function()
        self.wait()
        together = max(1, min(100, int(at_least / 3 / (time.perf_counter() - began))))
        began, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - began < at_least:
            for _ in range(together):
                function()
            self.wait()
            calls += together
        return (time.perf_counter() - began) / calls


class Unlogged:
    """Stands for the loop's log."""

    def micro_batch(self, *_):
        pass

    step = micro_batch


# -- What the card can do --------------------------------------------------------------------------

def peak(place: Place, precision: str) -> dict:
    """The rate of a large matrix product: random numbers, as zeros run faster."""
    place.machine(precision)
    side = 128 if place.small else 8192
    a, b = (torch.randn(side, side, device=place.device, dtype=DTYPES[precision])
            for _ in range(2))
    return {"peak_tflops": 2 * side ** 3 / place.seconds(lambda: a @ b) / 1e12}


def copy(place: Place) -> dict:
    """The rate of a copy within the memory, bytes read plus bytes written."""
    source = torch.ones(2 ** (16 if place.small else 31), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return {"gb_per_second": 2 * source.nbytes / place.seconds(lambda: target.copy_(source)) / 1e9}


# -- Training steps --------------------------------------------------------------------------------

def drawn_step(place: Place, model: str, micro_batch: int, lengths: tuple[int, ...],
               precision: str, task: str, more: tuple[str, ...], same_weights: bool = False):
    """(run, state, the function that takes a step, its micro-batches, in pinned memory)

    same_weights: as on the CPU. Drawing them there takes most of a row's time.
    """
    name = SMALL[model] if place.small else model
    size = place.scaled(micro_batch)
    flags = ["--task", task, "--model", name, "--micro-batch", str(size), "--steps", "1000",
             "--global-batch", str(size * len(lengths)), *more]
    if place.small and task == "pretrain":
        flags += ["--vocab-size", "400"]
    run = drawn_run(flags, place.machine(precision))
    batches = [drawn_batch(run.task, size, length) for length in lengths]
    if place.device.type == "cuda":             # as the loader gives them
        batches = [({name: tensor.pin_memory() for name, tensor in batch.items()}, notes)
                   for batch, notes in batches]
    with CPU if same_weights else place.device:
        state = train.build_state(run)
    state.model.train()
    log = Unlogged()
    return run, state, lambda: train.train_step(run, state, batches, log), batches


def step(place: Place, model: str = "base-b32", micro_batch: int = 256,
         lengths: tuple[int, ...] = (13,), precision: str = "", task: str = "pretrain",
         more: tuple[str, ...] = (), plan: bool = False, ddp: bool = False,
         cudnn: bool = False) -> dict:
    """A training step of train.py, optimizer included, on drawn pairs that lie on the CPU.

    lengths: tokens of the texts of each micro-batch. more: flags of train.py. ddp: within DDP,
    which a run of one process leaves out. cudnn: with cuDNN's attention, which is left out as well
    (machine.choose_kernels).
    -> pairs_per_second; tflops, of the matrix products on real tokens alone; gigabytes at the peak;
    with `plan`, what training/memory.py says of it, which takes some seconds.
    """
    place.free()
    run, state, one, batches = drawn_step(place, model, micro_batch, lengths, precision, task, more)
    if ddp:
        state.model = train.data_parallel(state.bare, run.settings, place.device)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    pairs = run.micro_batch * len(lengths)
    seconds = place.seconds(one, warm_up=8 if run.settings.compile else 3)
    held = memory_gb(place.device)
    exact = type(run.task)(replace(run.task.settings, pad_to=1), run.config, run.task.tok)
    work = 0.0
    for length in lengths:
        sample, _ = drawn_batch(exact, 2, length)
        sample = to_device(sample, CPU, run.config)
        work += PASSES * count_flops(outline_of(run.config).eval(), sample) / 2
    speed = pairs / seconds
    found = {"pairs_per_second": speed, "tflops": speed * work / len(lengths) / 1e12,
             "gigabytes": held}
    if plan:
        longest = max(batches, key=lambda batch: batch[0]["ids"].numel())
        planned = step_memory(run, train.build_state, train.train_step, longest,
                              place.device.type == "cuda")
        found["planned_gigabytes"] = sum(planned.values()) / 2 ** 30
    return found


def grouped(place: Place, **how) -> dict:
    """A step in a group of one process, through NCCL.

    What DDP (ddp=True) or FSDP2 (--shard) cost by themselves, before anything travels.
    """
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return step(place, **how)
    finally:
        dist.destroy_process_group()


def fits(place: Place) -> dict:
    """The micro-batch that --micro-batch auto finds, for pairs of 13 tokens; and a step of it."""
    place.free()
    run, state, _, _ = drawn_step(place, "base-b32", 64, (13,) * 64, "", "pretrain", ())
    run.settings = replace(run.settings, micro_batch=AUTO)
    fit_micro_batch(run, state, lambda run, size: drawn_batch(run.task, size, 13)[0])
    found = run.micro_batch
    del run, state
    return {"micro_batch": found,
            **step(place, micro_batch=found * 64 if place.small else found)}


def launches(place: Place, micro_batch: int, more: tuple[str, ...] = ()) -> dict:
    """Kernels of a step, and the share of its time in which none runs.

    The profiler says which kernels run and for how long. How long a step takes is measured without
    it, as it slows what launches them. Copies are no kernels.
    """
    place.free()
    _, _, one, _ = drawn_step(place, "base-b32", micro_batch, (13,), "", "pretrain", more)
    seconds = place.seconds(one)
    with profile() as profiler:
        one()
        place.wait()
    on_gpu = place.device.type == "cuda"
    spans = sorted((event.time_range.start, event.time_range.end) for event in profiler.events()
                   if (event.device_type.name == "CUDA") == on_gpu
                   and not getattr(event, "is_user_annotation", False)
                   and not event.name.startswith(("Memcpy", "Memset")))
    busy, end = 0.0, -math.inf
    for start, stop in spans:                               # microseconds; they may overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"kernels": len(spans), "gaps": 1 - busy / 1e6 / seconds}


def losses_and_gradient(place: Place, precision: str) -> tuple[Tensor, Tensor]:
    """Of eight pairs, dropout off, from the same weights wherever it is computed."""
    run, state, _, batches = drawn_step(place, "base-b32", 256 if place.small else 8, (13,),
                                        precision, "pretrain", ("--dropout", "0"), True)
    with run.machine.autocast():
        results = state.bare(to_device(batches[0][0], place.device, run.config))
    losses = torch.stack([loss.float() for loss, _ in results.values()])
    losses.sum().backward()
    return losses.detach().cpu(), gradient_of(state.bare)


def gradient_of(model: nn.Module) -> Tensor:
    """The whole gradient, one long vector on the CPU."""
    return torch.cat([p.grad.float().flatten().cpu() for p in model.parameters()
                      if p.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|"""
    return ((one - other).norm() / other.norm()).item()


def parity(place: Place) -> dict:
    """Losses and gradients on the device beside those of the CPU in float32, dropout off.

    (Those of the CPU equal the originals' recordings to 1e-5: tests/.) -> for each precision the
    largest relative difference of a loss, and that of the gradient, |g - g'| / |g'|.
    """
    losses, gradient = losses_and_gradient(Place(CPU, place.small, place.scratch), "fp32")
    found = {}
    for precision in ("fp32", "bf16"):
        ours, our_gradient = losses_and_gradient(place, precision)
        found[f"loss_difference_{precision}"] = ((ours - losses) / losses).abs().max().item()
        found[f"gradient_difference_{precision}"] = apart(our_gradient, gradient)
    return found


def graphs(place: Place) -> dict:
    """The gradient of two micro-batches with CUDA graphs beside that of --compile, dropout off.

    It is taken of the third step: the first two run as ever, and record. -> |g - g'| / |g'|
    """
    found = []
    for more in (STATIC, GRAPHS):
        place.free()
        run, state, _, batches = drawn_step(place, "base-b32", 64, (13, 13), "", "pretrain",
                                            ("--dropout", "0", *more))
        for _ in range(3):
            state.optimizer.zero_grad(set_to_none=not run.settings.cuda_graphs)
            train.backward(run, state, batches, Unlogged())
        found.append(gradient_of(state.bare))
    compiled, launched = found
    return {"gradient_difference": apart(launched, compiled)}


# -- Answers ---------------------------------------------------------------------------------------

def answering(place: Place, task: str, count: int):
    """A model in eval mode, and a batch of so many pictures on the device."""
    name = "toy" if place.small else "base-b32"
    run = drawn_run(["--task", task, "--model", name, "--steps", "1", "--global-batch", "1"],
                    place.machine())
    torch.manual_seed(0)
    with torch.device(place.device):
        model = model_of(run.config).eval()
    batch, _ = drawn_batch(run.task, count, 13)
    return run, model, to_device(batch, place.device, run.config)


@torch.no_grad()
def scoring(place: Place) -> dict:
    """One picture against 4,096 captions; pictures and captions encoded alone.

    hours: COCO's 5,000 x 25,010 pairs at that rate.
    """
    place.free()
    run, model, batch = answering(place, "retrieval", place.scaled(256))
    with run.machine.autocast():
        ids = batch["ids"][:1].repeat(place.scaled(4096), 1)
        text = model.encode_text(ids, class_only=True)
        visual = model.encode_image(batch["image"][:1])
        seconds = place.seconds(lambda: match_score(model, visual, text))
        images = place.seconds(lambda: model.encode_image(batch["image"]))
        texts = place.seconds(lambda: model.encode_text(ids, class_only=True))
    speed = len(ids) / seconds
    return {"pairs_per_second": speed, "coco_minutes": 5000 * 25010 / speed / 60,
            "images_per_second": len(batch["image"]) / images,
            "captions_per_second": len(ids) / texts, "gigabytes": memory_gb(place.device)}


@torch.no_grad()
def captions(place: Place, beams: int) -> dict:
    """Captions of 20 words for 64 pictures at a time."""
    place.free()
    run, model, batch = answering(place, "caption", place.scaled(64 if beams > 1 else 256))
    prompt, words = [run.task.tok.ids[BOS]], 3 if place.small else 20

    def write():
        generate(model, model.encode_image(batch["image"]), prompt, [], words, beams)

    with run.machine.autocast():
        seconds = place.seconds(write)
    return {"captions_per_second": len(batch["image"]) / seconds}
