"""A run's checkpoints: what they hold, when they appear, and the door through which a run returns.

    OUT/last.pt      the newest, each --save-every steps, at the end, and when the run is stopped
    OUT/previous.pt  the one before it
    OUT/step_N.pt    kept for good, each --keep steps
    OUT/best.pt      the best by a number of the validation, with --keep-best; best.json has it

A checkpoint has its name only when all of it is on the disk. What comes back is compared with what
the run would make itself: every key, type, shape and number (check_saved). So nothing is trained on
from half of a state.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import weights
from released.names import is_finite
from storage import disk
from training import parallel
from training.machine import Machine
from training.optimizer import moments_of
from training.report import COUNTERS, Halt, Log

if TYPE_CHECKING:           # for the annotations alone: both files come later
    from training.runs import Run
    from train import State


def open_saved(out: Path) -> tuple[Path, dict] | tuple[None, None]:
    """OUT/last.pt (if there is none, previous.pt) and what it holds; (None, None) if a run is new.

    ValueError for a damaged one says which checkpoint beside it is whole.
    """
    path = out / "last.pt"
    if not path.exists() and (out / "previous.pt").exists():
        path = out / "previous.pt"
    if not path.exists():
        return None, None
    try:
        saved = weights.read(path)
        if not saved["tokenizer"]:
            raise ValueError(f"{path}: its tokenizer is missing")
        return path, saved
    except ValueError as error:
        raise ValueError(f"{error}; {whole_beside(path)}") from None


def whole_beside(path: Path) -> str:
    """Which other checkpoint of a run can take the place of a damaged one, in words."""
    steps = sorted(path.parent.glob("step_*.pt"), key=lambda file: file.stat().st_mtime)
    names = [path.with_name("previous.pt"), *reversed(steps), path.with_name("best.pt")]
    for other in names:
        if other == path or not other.exists():
            continue
        try:
            step = weights.read(other).get("step")
        except ValueError:
            continue
        return f"{other} of step {step} is whole: rename it to {path.name} to go on from it"
    return "no whole checkpoint stands beside it"


# -------------------------------------------------------------------------------------------------
# Saving.

def contents_of(run: "Run", state: "State", log: Log) -> dict:
    """What weights.save takes. Every process must ask: shards and sums are gathered."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(state.bare, state.optimizer, options=options)
    if run.machine.tensor > 1:
        model, optimizer = parallel.whole_names(model), parallel.whole_optimizer(optimizer)
    return dict(
        model=model, config=run.config, task=run.settings.task, answers=run.answers,
        tokenizer_files=weights.pack_tokenizer(run.task.tok), optimizer=optimizer,
        scaler=state.scaler.state_dict(), step=state.step, settings=asdict(run.settings),
        counters=state.counters | {"skipped": int(state.skipped)}, files=run.files,
        sums=log.sums_of_all())


def save(run: "Run", state: "State", log: Log, keep: bool = False) -> None:
    """Writes OUT/last.pt; the one before becomes OUT/previous.pt. keep: OUT/step_N.pt too."""
    contents = contents_of(run, state, log)
    if run.machine.rank == 0:
        fresh = run.out / "next.pt"         # complete before the others change their names
        weights.save(fresh, **contents)
        if run.checkpoint.exists():
            disk.also_as(run.checkpoint, run.out / "previous.pt")
        fresh.replace(run.checkpoint)
        disk.sync_folder(run.out)
        if keep:
            disk.also_as(run.checkpoint, run.out / f"step_{state.step}.pt")
    state.saved_step = state.step


class Best:
    """The best value of --keep-best so far. OUT/best.json keeps it beside OUT/best.pt."""

    def __init__(self, run: "Run"):
        self.name, self.value = run.settings.keep_best, None
        self.path = run.out / "best.json"
        if not self.name:
            return
        known = {}
        if run.machine.rank == 0 and run.saved and self.path.exists():
            known = disk.read_json(self.path)
        known = run.machine.union(known if isinstance(known, dict) else {})
        if known.get("name") == self.name and isinstance(known.get("value"), float):
            self.value = known["value"]

    def is_beaten_by(self, metrics: dict) -> bool:
        """Whether a validation is better. Losses are better when lower, all else when higher."""
        if not self.name:
            return False
        if self.name not in metrics:
            raise Halt(f"--keep-best {self.name}: a validation of this run has "
                       f"{', '.join(metrics)}")
        value = metrics[self.name]
        if self.value is None or math.isnan(value):
            return not math.isnan(value)
        return value < self.value if self.name.endswith("loss") else value > self.value

    def save(self, run: "Run", state: "State", log: Log, metrics: dict) -> None:
        """Writes OUT/best.pt, the state of this step, and then its value."""
        self.value = metrics[self.name]
        path = run.out / "best.pt"
        if state.saved_step != state.step:
            contents = contents_of(run, state, log)
            if run.machine.rank == 0:
                weights.save(path, **contents)
        elif run.machine.rank == 0:
            disk.also_as(run.checkpoint, path)
        if run.machine.rank == 0:
            known = {"name": self.name, "value": self.value, "step": state.step}
            disk.write_text(self.path, json.dumps(known) + "\n")


# -------------------------------------------------------------------------------------------------
# Coming back.

def new_scaler(machine: Machine) -> torch.amp.GradScaler:
    """Scales losses so that float16 gradients do not vanish; does nothing in other precisions."""
    return torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")


def restore(run: "Run", state: "State") -> None:
    """Fills a state that was made for this run with what its checkpoint holds."""
    saved = run.saved
    # The rates, decays and groups are this run's own: its settings are known to be the same.
    moments = parallel.own_names(saved["optimizer"]["state"], state.bare)
    optimizer = {"state": moments, "param_groups": named_groups(state)}
    model = parallel.own_names(saved["model"], state.bare)
    set_state_dict(state.bare, state.optimizer, model_state_dict=model,
                   optim_state_dict=optimizer, options=StateDictOptions(full_state_dict=True))
    state.scaler.load_state_dict(saved["scaler"])
    state.step = state.saved_step = saved["step"]
    if run.machine.rank > 0:
        return                          # the file has the first process's counts
    state.counters |= saved["counters"]
    if not run.checkpoint.exists():     # the run was killed between two names: open_saved
        disk.also_as(run.out / "previous.pt", run.checkpoint)


def named_groups(state: "State") -> list[dict]:
    """The optimizer's groups with names in the place of parameters, as checkpoints hold them."""
    name_of = {id(parameter): name for name, parameter in state.bare.named_parameters()}
    return [group | {"params": [name_of[id(parameter)] for parameter in group["params"]]}
            for group in state.optimizer.param_groups]


def check_saved(path: Path, saved: dict, run: "Run") -> None:
    """ValueError, in one sentence, for whatever in a checkpoint is not as this run would save it.

    The optimizer's groups and rates are not compared: they are not taken from the file.
    """
    model = weights.outline_of(run.config)          # names, shapes and types, without memory
    moments = moments_of(model, run.settings)
    expected = {"model": model.state_dict(), "optimizer": {"state": moments}, "step": 0,
                "scaler": new_scaler(run.machine).state_dict(), "counters": COUNTERS,
                "task": run.settings.task}
    found = {name: saved[name] for name in expected if name in saved}
    if isinstance(found.get("optimizer"), dict):
        found["optimizer"] = {"state": found["optimizer"].get("state")}
    problems = list(differences(found, expected))
    if not problems and saved["step"] > run.settings.steps:
        problems = [f"step is {saved['step']:,}, but the run has {run.settings.steps:,} steps"]
    if not problems and not good_sums(saved.get("sums", []), len(run.config.loss_weights)):
        problems = ["sums are not the sums of losses of each process"]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: --resume cannot go on from it: {', '.join(problems[:3])}{more}; "
                         f"{whole_beside(path)}")


def differences(found: object, expected: object, name: str = "") -> Iterator[str]:
    """Where two nests of dicts differ in keys, types, shapes or kinds of numbers, in words.

    Numbers are counts: they must be finite and not negative. Tensors must be finite.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            yield f"{name} is {kind_of(found)}, a table is expected"
            return
        prefix = f"{name}." if name else ""
        for key, value in expected.items():
            if key in found:
                yield from differences(found[key], value, f"{prefix}{key}")
            else:
                yield f"{prefix}{key} is missing"
        for key in found.keys() - expected.keys():
            yield f"{prefix}{disk.shortened(key)} has no place in this run"
    elif isinstance(expected, torch.Tensor):
        if kind_of(found) != kind_of(expected):
            yield f"{name} is {kind_of(found)}, {kind_of(expected)} is expected"
        elif not is_finite(found):
            yield f"{name} holds numbers that are not finite"
    elif type(found) is not type(expected):
        yield f"{name} is {kind_of(found)}, {kind_of(expected)} is expected"
    elif isinstance(expected, str):
        if found != expected:
            yield f"{name} is {disk.shortened(found)!r}, {expected!r} is expected"
    elif not 0 <= found < math.inf:
        yield f"{name} is {found}"


def kind_of(value: object) -> str:
    """A value's type in words; of tensors their numbers' type and their shape."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def good_sums(sums: object, outputs: int) -> bool:
    """Whether these are a list of report.Sums.values, one for each process (or none).

    Older checkpoints have three rows (report.with_counted).
    """
    kinds = [kind_of(torch.zeros(rows, outputs, dtype=torch.float64)) for rows in (3, 4)]
    return isinstance(sums, list) and all(kind_of(one) in kinds for one in sums)
