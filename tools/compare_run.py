r"""One run of a comparison: a trunk at a constant rate, and a branch down to rate 0 at each moment.

    rate
      |     _________________________________________    the trunk, which goes on from moment
      |    /          \          \          \            to moment: OUT/last.pt
      |   /            \          \          \
      |  /              \          \          \          its branches: OUT/moment_1.pt, …
      | /                \          \          \
      +-------------------1----------2----------3----->  steps

A model is at its best when its rate has fallen to 0, so a run has one length at which it may be
looked at. A comparison looks at eight. A run for each would cost four and a half times the longest
one. All of them begin alike, though, while their rate is constant: that part is trained once. The
branch of a moment with S steps ends with exactly the model of

    train.py --steps S --warmup W/S --decay D …         # W steps of warm-up, whatever the length

since the order of the data and all random numbers are functions of the step.

Training time is that of the steps alone: CPU seconds of the process, or on a GPU the seconds there.
Making the batches is not in it (a GPU does not wait for that); it is recorded beside it.
"""

import contextlib
import json
import math
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import train
import weights
from storage import disk
from tools.bench import original_pretraining
from tools.compare_quality import Quality, cloze
from training import checkpoints, machine as machines, settings as train_settings
from training.loading import batches_of
from training.optimizer import rate_at
from training.report import Halt, Log, write_config
from training.runs import Run, open_run

# The length of the trunk, as it is told to the schedule: longer than any branch, so that the rate
# never begins to fall.
ENDLESS = 10 ** 9


@dataclass(frozen=True)
class Track:
    """What a run is told: enough for another process to train it."""
    out: str                            # its directory
    flags: tuple[str, ...]              # of train.py: all but the directory and the schedule
    warmup: int                         # steps in which the rate rises from 0
    decay: float                        # share of a branch's steps after them in which it falls
    every_row: bool = False             # the vocabulary head reads every row, as in the originals

    def command(self, steps: int) -> list[str]:
        """The flags of train.py that train the same model without a trunk."""
        return [*self.flags, "--steps", str(steps), "--warmup", repr(self.warmup / steps),
                "--decay", repr(self.decay), "--eval-every", "0", "--out", self.out]


def open_trunk(track: Track) -> tuple[Run, train.State, Log]:
    """The trunk where it stands: at OUT/last.pt, or at the beginning."""
    endless = replace(track, decay=1 / ENDLESS)
    settings, config_flags = train_settings.parse([*endless.command(ENDLESS), "--resume"])
    machine = machines.set_up(settings.device, settings.precision)
    settings = replace(settings, precision=machine.precision)
    train_settings.check(settings, machine)
    run = open_run(settings, config_flags, machine)
    state = train.build_state(run)
    write_config(run, state.bare)
    log = Log(run, state)
    run.saved = run.source = None           # they would hold the weights a second time
    if track.every_row:
        state.model = partial(original_pretraining, state.bare)
    state.bare.train()
    return run, state, log


def branch_of(run: Run, track: Track, steps: int) -> tuple[Run, int]:
    """A trunk's run as a run of so many steps, and its last step at the peak rate."""
    settings = replace(run.settings, steps=steps, warmup=track.warmup / steps, decay=track.decay)
    at_peak = steps
    while rate_at(at_peak, settings) < 1:
        at_peak -= 1
    return replace(run, settings=settings), at_peak


@dataclass
class Spent:
    """Seconds of a stretch of training."""
    steps: float = 0.0                  # CPU seconds of the process, or seconds on the GPU
    batches: float = 0.0                # CPU seconds for making the batches in this process


def train_to(run: Run, state: train.State, log: Log, step: int) -> Spent:
    """Trains until a step is reached -> what it took."""
    spent, marks = Spent(), []
    on_gpu = run.machine.device.type == "cuda"
    batches = batches_of(run, state.step) if state.step < step else None
    while state.step < step:
        began = time.process_time()
        micro_batches = [next(batches) for _ in range(run.accumulation)]
        made = time.process_time()
        spent.batches += made - began
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        train.train_step(run, state, micro_batches, log)
        if on_gpu:
            end.record()
            marks.append((start, end))
        else:
            spent.steps += time.process_time() - made
    if marks:
        torch.cuda.synchronize(run.machine.device)
        spent.steps = sum(start.elapsed_time(end) for start, end in marks) / 1000
    return spent


@contextlib.contextmanager
def quietly(out: str):
    """What is printed during the block goes to OUT/log.txt."""
    path = Path(out) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield


# -------------------------------------------------------------------------------------------------
# What a process is asked for. All of it is given and returned as plain values.

def measure_speed(track: Track, steps: int = 12) -> float:
    """Seconds of a training step, by the first steps of a run, which is then thrown away."""
    with tempfile.TemporaryDirectory() as folder, quietly(folder):
        run, state, log = open_trunk(replace(track, out=folder))
        train_to(run, state, log, 2)                    # the first ones are slower
        return train_to(run, state, log, 2 + steps).steps / steps


def advance(track: Track, moment: int, steps: int, quality: Quality) -> dict:
    """Trains a run to a moment, of so many steps -> what it took, and what its model knows then.

    OUT/last.pt is then the trunk where this branch left it, OUT/moment_K.pt the branch's model. An
    interrupted call is made again: it finds the trunk as it was before, or already there.
    """
    with quietly(track.out):
        run, state, log = open_trunk(track)
        branch, at_peak = branch_of(run, track, steps)
        trunk = advance_trunk(run, state, log, at_peak)
        log.sums.read()                                 # the losses of the branch alone count
        spent = train_to(branch, state, log, steps)
        losses = log.sums.read()
        if not math.isfinite(losses["loss"]) or int(state.skipped_in_a_row):
            raise Halt(f"{track.out}: the loss at step {steps} is not finite; a lower rate helps")
        save_model(branch, state, log, run.out / f"moment_{moment}.pt")
        (run.out / "previous.pt").unlink(missing_ok=True)       # of the trunk, one is enough
        state.bare.eval()
        began = time.process_time()
        known = cloze(state.bare, run.task.tok, quality.table(run), quality)
        return {"moment": moment, "steps": steps, "device": run.machine.device.type,
                "seconds": trunk["seconds"] + spent.steps,
                "trunk_seconds": trunk["seconds"], "branch_seconds": spent.steps,
                "branched_at": at_peak,
                "batch_seconds": trunk["batch_seconds"] + spent.batches,
                "evaluation_seconds": time.process_time() - began, "losses": losses,
                "cloze": known, "tasks": {}}


def advance_trunk(run: Run, state: train.State, log: Log, step: int) -> dict:
    """Trains the trunk to a step and saves it -> what it took from its first step on.

    OUT/trunk.json tells that for each step at which the trunk was saved.
    """
    path = run.out / "trunk.json"
    times = disk.read_json(path) if state.step else {"0": {"seconds": 0.0, "batch_seconds": 0.0}}
    if state.step > step or str(state.step) not in times:
        raise ValueError(f"{run.out}: its trunk is at step {state.step}, and its next branch "
                         f"leaves it at step {step}: remove the folder to train it again")
    so_far = times[str(state.step)]
    if state.step == step:
        return so_far
    spent = train_to(run, state, log, step)
    log.report(state)
    so_far = {"seconds": so_far["seconds"] + spent.steps,
              "batch_seconds": so_far["batch_seconds"] + spent.batches}
    # Before the checkpoint: the time of every step at which there may be one is then known.
    disk.write_text(path, json.dumps(times | {str(step): so_far}) + "\n")
    checkpoints.save(run, state, log)
    return so_far


def save_model(run: Run, state: train.State, log: Log, path: Path):
    """Writes a checkpoint without what training needs to go on: train.py --load opens it."""
    contents = checkpoints.contents_of(run, state, log)
    for name in ("optimizer", "scaler", "sums"):
        del contents[name]
    weights.save(path, **contents)
