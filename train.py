"""ONE training loop: pretraining and every fine-tuning task.

    python train.py --task pretrain --recipe toy --data data/toy --out runs/toy
    torchrun --nproc_per_node 8 train.py --task pretrain --recipe flm-b32 --data DIR \
        --tokenizer DIR --out runs/flm
    python train.py … --resume          # goes on where the run stopped
    python train.py … --resume --steps 20000    # goes on past its end
    python train.py … --dry-run         # prints what would run, its memory and time, and stops

The global batch is split over the processes and into micro-batches, which are accumulated. The
gradient is that of the mean over the global batch, however it was split. (The split only changes
which random numbers dropout draws, which images are the wrong ones of image-text matching, and with
--captions-per-image where a group of captions is cut in two, whose parts are augmented apart.)
A step is an optimizer step, everywhere.

SIGTERM, SIGUSR1 or Ctrl-C let the step end; then the state is saved, and --resume goes on from it.
"""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import weights
from batches import evaluation_batches
from data import token_lengths
from storage import disk
from tasks import to_device
from training import checkpoints, machine as machines, parallel, switches
from training.fitting import fit_micro_batch
from training.flops import work_of
from training.loading import batches_of, load, workers_needed
from training.machine import Machine, Signals, loader_workers
from training.optimizer import new_optimizer, rate_at
from training.plan import dry_run
from training.report import COUNTERS, Halt, Log, Sums, clock, describe, write_config
from training.runs import Run, open_run
from training.settings import AUTO, Settings, check, parse


# -------------------------------------------------------------------------------------------------
# What changes with every step, and how it begins.

@dataclass
class State:
    """What changes with every step; a checkpoint holds all of it but `skipped_in_a_row`."""
    model: torch.nn.Module          # as it is called: the bare model, or DDP around it
    bare: torch.nn.Module           # the model itself
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler    # does nothing but for fp16
    step: int
    saved_step: int | None          # that of OUT/last.pt
    counters: dict                  # of the whole run; each process counts its own share
    skipped: torch.Tensor           # non-finite gradients, counted on the device …
    skipped_in_a_row: torch.Tensor  # … since the loop never waits for it


def build_state(run: Run) -> State:
    """The model, the optimizer, and where the run stands: from scratch, or from its checkpoint."""
    s, machine, saved = run.settings, run.machine, run.saved
    torch.manual_seed(s.seed)               # every process draws the same weights
    bare = weights.model_of(run.config)
    if not saved:
        start_from_files(run, bare)
    if next(bare.parameters()).device != machine.device:    # a plan's fake tensors cannot move
        bare.to(machine.device)
    switches.lighten(bare, s)
    if machine.tensor > 1:
        parallel.divide(bare, machine)
    if s.shard:
        shard(bare, machine.precision, **parallel.shards(bare, machine))
    if s.compile:
        switches.compile_model(bare, s)
    optimizer = new_optimizer(bare, s)
    none = torch.tensor(0.0, device=machine.device)
    state = State(bare, bare, optimizer, checkpoints.new_scaler(machine), 0, None, dict(COUNTERS),
                  none, none)
    if saved:
        checkpoints.restore(run, state)
        state.skipped = none + state.counters["skipped"]
    if s.cuda_graphs:
        switches.hold_gradients(bare)       # last: `restore` takes a gradient for a begun step
    if machine.world > 1 and machine.tensor == 1 and not s.shard:
        state.model = data_parallel(bare, s, machine.device)
    return state


def data_parallel(model: nn.Module, s: Settings, device: torch.device) -> nn.Module:
    """The model with its gradients averaged over the processes, as they come (DDP)."""
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=s.bucket_views, static_graph=s.static_graph)


def start_from_files(run: Run, model: nn.Module) -> None:
    """Fills a new model with what --load, --vit and --text name."""
    s = run.settings
    if not (s.load or s.vit or s.text):
        return
    fresh_head = {name: tensor.clone() for name, tensor in model.state_dict().items()
                  if name.startswith("head.")}
    run.machine.say(weights.start(model, s.vit, s.text, s.load, trust=s.trust))
    loaded_answers = run.source.answer_list if run.source else None
    if run.answers and loaded_answers and loaded_answers != run.answers:
        model.load_state_dict(fresh_head, strict=False)
        run.machine.say(f"the head starts from random weights: {s.load} answers from another list "
                        f"than that of {s.data}")


def shard(model: nn.Module, precision: str, **how: object) -> None:
    """Shards the parameters of every layer over the processes (FSDP2).

    They are kept in float32 and gathered in the precision in which they are used.
    how: what fully_shard should know besides (parallel.shards).
    """
    policy = MixedPrecisionPolicy()
    if precision != "fp32":
        policy = MixedPrecisionPolicy(param_dtype=machines.DTYPES[precision],
                                      reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layers in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mp_policy=policy, **how)
    fully_shard(model, mp_policy=policy, **how)


# -------------------------------------------------------------------------------------------------
# The loop.

def main(argv: list[str] | None = None) -> None:
    with machines.running("train.py"):
        settings, config_flags = parse(argv)
        machine = machines.set_up(settings.device, settings.precision,
                                  settings.tensor_parallel)
        settings = replace(settings, precision=machine.precision)
        check(settings, machine)
        with the_only_writer(settings, machine), machines.Signals() as signals:
            run = open_run(settings, config_flags, machine)
            if run.saved:
                say_new_schedule(run)
            if settings.dry_run:
                dry_run(run, build_state, train_step)
            else:
                with parallel.divided_loss(machine):
                    train(run, signals)


@contextlib.contextmanager
def the_only_writer(settings: Settings, machine: Machine) -> Iterator[None]:
    """Holds OUT during the block, so that no other run writes there, and removes torn files."""
    if machine.rank > 0 or settings.dry_run:
        yield
        return
    out = Path(settings.out)
    with disk.one_writer(out / ".lock", settings.out):
        disk.remove_partials(out, "*.pt", "*.json", "*.jsonl", "*.npy")
        disk.remove_partials(out / "tokenizer", "*")
        (out / "next.pt").unlink(missing_ok=True)
        yield


def say_new_schedule(run: Run) -> None:
    """Says what becomes of the rate where a run resumes with more steps than it had."""
    s, step, steps = run.settings, run.saved["step"], run.saved["settings"].get("steps", 0)
    if s.steps > steps > 0:
        before, after = s.lr * rate_at(step, replace(s, steps=steps)), s.lr * rate_at(step, s)
        run.machine.say(f"{steps:,} steps become {s.steps:,}: the schedule stretches, and the rate "
                        f"at step {step:,} goes from {before:.1e} to {after:.1e}")


def train(run: Run, signals: Signals) -> None:
    """Trains until the last step is done, or until a signal asks to stop (then SystemExit)."""
    state = build_state(run)
    if run.settings.micro_batch == AUTO:
        fit_micro_batch(run, state)
    work = work_of(run, state.step) if run.machine.rank == 0 else None
    describe(run, state.bare, state.step, work)
    run.workers = workers_needed(run, work, state.step)
    write_config(run, state.bare)
    log = Log(run, state, work)
    signals.training = True
    try:
        stopped_by = loop(run, state, log, signals)
    except OSError as error:
        if error.errno and state.saved_step:
            error.strerror += f" ({run.checkpoint} of step {state.saved_step} is whole)"
        raise
    except torch.OutOfMemoryError:
        saved = f"; --resume goes on from step {state.saved_step}" if state.saved_step else ""
        raise Halt(f"the GPU's memory was full in step {state.step + 1}, with micro-batches of "
                   f"{run.micro_batch}: a smaller --micro-batch (auto: the largest that fits), "
                   f"--chunk-loss and --checkpoint-activations take less{saved}") from None
    finally:
        log.loggers.close()
    if stopped_by:
        saved = f": --resume goes on from {run.checkpoint}" if state.saved_step else ""
        run.machine.say(f"train.py: stopped by {stopped_by.name} after step {state.step}{saved}",
                        file=sys.stderr)
        sys.exit(128 + stopped_by)
    run.machine.say(f"done after {clock(state.counters['seconds'])} of training: {run.checkpoint} "
                    f"| {int(state.skipped)} steps skipped | {log.spikes} loss spikes")


def loop(run: Run, state: State, log: Log, signals: Signals) -> signal.Signals | None:
    """Saves, validates, steps and reports, each when it is due -> the signal that stopped it.

    A checkpoint is written before the validation of the same step: a crash there loses nothing.
    Halt from log.report: the last max_skipped gradients were not finite. Halt from log.micro_batch:
    more than 10 images, and more than max_unreadable of those seen, cannot be decoded.
    """
    s = run.settings
    best = checkpoints.Best(run)
    run.saved = run.source = None           # they would hold the weights a second time
    batches = batches_of(run, state.step)
    state.model.train()
    while True:
        finished, new = state.step == s.steps, state.step > (state.saved_step or 0)
        keep = run.due(s.keep, state.step)
        if new and (finished or keep or run.due(s.save_every, state.step)):
            checkpoints.save(run, state, log, keep)
        samples = run.validation_due(state.step)
        if samples and log.validated < state.step:
            with log.paused():
                metrics = evaluate(run, state, samples, signals)
            if metrics:
                whole = run.due(s.eval_every, state.step)
                is_best = whole and best.is_beaten_by(metrics)
                if is_best:             # before the line: what is written down is kept
                    best.save(run, state, log, metrics)
                log.validation(metrics, state.step, is_best)
        asked = run.machine.largest(signals.asked)      # all processes stop after the same step
        if asked:
            if state.step > (state.saved_step or 0):
                checkpoints.save(run, state, log)
            return signal.Signals(asked)
        if finished:
            return None
        with log.waiting_for_data():
            micro_batches = [next(batches) for _ in range(run.accumulation)]
        train_step(run, state, micro_batches, log)
        if run.report_due(state.step):
            log.report(state)


def train_step(run: Run, state: State, micro_batches: list, log: Log) -> None:
    """One optimizer step, on the mean losses of a global batch."""
    s = run.settings
    # Dropout's random numbers are a function of the step, as the data is: nothing has to be saved.
    # (Another number of processes, or another micro-batch, draws others.)
    seeds = np.random.SeedSequence([s.seed, state.step, run.machine.data_rank])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    share = rate_at(state.step, s)
    for group in state.optimizer.param_groups:
        group["lr"] = share * group["peak"]
    # Autocast forgets the weights that it has cast where the outermost of its contexts ends.
    with run.machine.autocast() if s.keep_casts else contextlib.nullcontext():
        backward(run, state, micro_batches, log)
    norm = update(run, state)
    log.step(share * s.lr, norm)
    state.step += 1


def backward(run: Run, state: State, micro_batches: list, log: Log) -> None:
    """Adds up the gradient of a global batch, which is the same however the batch was split.

    The loss is sum_o weight_o (sum over o's targets of the global batch) / (number of them), for
    each output o. So the targets of all micro-batches and processes are counted before the first
    backward pass, and each micro-batch's sum is divided by that count. DDP and FSDP average the
    gradients over the processes; the factor `world` undoes that. (With --tensor-parallel N, each
    target is counted N times, and the gradients are averaged over world / N groups: the factor is
    the same.)
    """
    s, machine, loss_weights = run.settings, run.machine, run.config.loss_weights
    count_hits = not s.chunk_loss or run.report_due(state.step + 1)
    counts = [[notes["counts"][name] for name in loss_weights] for _, notes in micro_batches]
    counts = torch.tensor(counts, dtype=torch.float32)                     # (accumulation, outputs)
    counts = counts.to(machine.device, non_blocking=True)
    totals = counts.sum(0)
    if machine.world > 1:
        dist.all_reduce(totals)
    factors = machine.world / totals.clamp(min=1)                           # (outputs,)
    for i, (batch, notes) in enumerate(micro_batches):
        last = i == run.accumulation - 1    # gradients travel between processes only once per step
        if s.shard:
            state.bare.set_requires_gradient_sync(last)
        quiet = isinstance(state.model, DistributedDataParallel) and not last
        with state.model.no_sync() if quiet else contextlib.nullcontext():
            with machine.autocast():
                results = state.model(to_device(batch, machine.device, run.config), count_hits)
            loss = 0.0
            for (name, weight), factor in zip(loss_weights.items(), factors, strict=True):
                loss = loss + weight * results[name][0] * factor
            with machine.no_autocast():
                state.scaler.scale(loss).backward()
        log.micro_batch(results, counts[i], notes)
    parallel.average_gradients(state.bare, machine)


def update(run: Run, state: State) -> torch.Tensor:
    """Clips the gradient and steps the optimizer -> the gradient's norm, on the device.

    A gradient that is not finite is skipped and counted on the device: the loop does not wait.
    Log.report stops the run after max_skipped of them in a row.
    """
    optimizer, scaler = state.optimizer, state.scaler
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in state.bare.parameters() if p.grad is not None]
    norm = parallel.total_norm(gradients)
    bad = (~torch.isfinite(norm)).float()
    state.skipped = state.skipped + bad
    state.skipped_in_a_row = (state.skipped_in_a_row + bad) * bad
    if run.settings.clip:
        parallel.clip(state.bare.parameters(), run.settings.clip, norm)
    if not scaler.is_enabled():
        optimizer.found_inf = bad           # the fused AdamW does nothing where this is 1
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not run.settings.cuda_graphs)       # switches.hold_gradients
    return norm


@torch.no_grad()
def evaluate(run: Run, state: State, samples: int, signals: Signals) -> dict | None:
    """Losses and accuracies on captions of the validation split, evenly spread.

    Each is counted once by all processes.
    None where a signal asks to stop: a resumed run validates again.
    """
    s, machine, table = run.settings, run.machine, run.tables["val"]
    count = len(table.row_of)
    chosen = [i * count // samples for i in range(samples)]
    lengths = token_lengths(table, run.task.tok, chosen)
    batches = evaluation_batches(lengths, chosen, run.micro_batch)
    # A process that has nothing left repeats the first batch, uncounted: shards run in step.
    rounds = math.ceil(len(batches) / machine.data_world)
    places = range(machine.data_rank, rounds * machine.data_world, machine.data_world)
    mine = [batches[k] if k < len(batches) else batches[0] for k in places]
    loader = load(run.task.dataset(table, train=False), mine, run.task.collate,
                  loader_workers(s.workers, machine.device), machine.device)
    model = state.model if s.shard else state.bare
    sums = Sums(run.config.loss_weights, machine.device)
    model.eval()
    bar = tqdm(loader, "validation", rounds, unit=" batches", leave=False, delay=5,
               disable=machine.rank > 0)
    for k, (batch, notes) in zip(places, bar, strict=True):
        if machine.largest(signals.asked):
            model.train()
            return None
        with machine.autocast():
            results = model(to_device(batch, machine.device, run.config))
        if k < len(batches):
            counts = [notes["counts"][name] for name in run.config.loss_weights]
            sums.add(results, torch.tensor(counts, device=machine.device))
    model.train()
    return sums.read("val_")


if __name__ == "__main__":
    main()
