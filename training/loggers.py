"""Other places where a run's numbers go: TensorBoard, Weights & Biases, Trackio (`--log`).

    python train.py … --log tensorboard wandb
    tensorboard --logdir runs;   wandb sync runs/x/wandb/offline-run-*;   trackio show

OUT/metrics.jsonl has every number anyway, and each line of it goes to the loggers when it is
written, under the same names. A logger is a package of its own, imported only when it is asked for:
`pip install '.[tensorboard]'`, `'.[wandb]'`, `'.[trackio]'`.

A resumed run goes on in the same run of each logger (OUT/loggers.json keeps its name), and no line
comes twice. The run first drops the lines of metrics.jsonl after its last checkpoint, and computes
the same numbers again. TensorBoard drops them too. The others cannot, so they keep the lines that
they have and are not sent them again. (They write with a delay of about a second, so a killed run
can miss its last line there.) A logger that is new to a resumed run gets all lines so far.

Nothing leaves the machine unless it is told to: wandb writes files, and sends them with
WANDB_MODE=online; trackio writes its own database, and sends with TRACKIO_SPACE_ID.
"""

import contextlib
import importlib.util
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from storage import disk

PROJECT = "flm-vilt"            # WANDB_PROJECT and TRACKIO_PROJECT beat it


def check(names: tuple[str, ...]) -> None:
    """ValueError for a logger that does not exist, or whose package is not installed."""
    for name in names:
        if name not in WRITERS:
            raise ValueError(f"--log {disk.shortened(name)}: one of {', '.join(WRITERS)} is "
                             "expected")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:         # a folder of that name is no package
            raise ValueError(f"--log {name} needs a package: pip install '.[{name}]'")


class Loggers:
    """The loggers of a run. Only the first process has any.

    One that fails at the start stops the run, with a sentence (ValueError). One that fails later is
    left out from there on, with a sentence: training does not depend on it.
    """

    def __init__(self, names: tuple[str, ...], out: Path, step: int = 0, kept: Sequence[dict] = (),
                 dropped: Sequence[dict] = ()):
        """out: the run's directory. step: where it goes on; 0: a new run.

        kept, dropped: the lines of metrics.jsonl up to that step, and those after it.
        """
        self.writers = {}
        if not names:
            return
        path = out / "loggers.json"
        known = known_runs(path) if step else {}
        for name in dict.fromkeys(names):
            is_new = name not in known
            run = known.setdefault(name, {"run": secrets.token_hex(4), "sent": []})
            if not is_new and not WRITERS[name].PURGES:
                run["sent"] += [key_of(line) for line in dropped if key_of(line) not in run["sent"]]
            try:
                writer = WRITERS[name](out, run["run"], step, is_new)
                for line in kept if is_new else ():
                    writer.write(line)
            except Exception as error:      # each package has its own kinds
                raise ValueError(f"--log {name}: {disk.shortened(error)}") from error
            writer.sent = run["sent"]
            self.writers[name] = writer
            print(f"{name}: {writer.where}", flush=True)
        disk.write_text(path, json.dumps(known) + "\n")

    def write(self, metrics: dict) -> None:
        """Gives a line of metrics.jsonl to all loggers."""
        for name, writer in list(self.writers.items()):
            if key_of(metrics) not in writer.sent:
                self.tried(name, writer.write, metrics)

    def close(self) -> None:
        """Ends all loggers; what they still hold is written."""
        for name, writer in list(self.writers.items()):
            self.tried(name, writer.close)
        self.writers = {}

    def tried(self, name: str, function: Callable, *arguments: object) -> None:
        """Calls a function of a logger. If it fails, the logger is left out from there on."""
        try:
            function(*arguments)
        except Exception as error:
            del self.writers[name]
            print(f"--log {name} failed and is left out from here on: {disk.shortened(error)}",
                  file=sys.stderr, flush=True)


def known_runs(path: Path) -> dict[str, dict]:
    """What OUT/loggers.json says of each logger that an interrupted run had.

    -> {logger: {"run": what its run is called, "sent": [[step, validation]] of lines that the run
    computes once more}}
    """
    known = disk.read_json(path) if path.exists() else {}
    if not isinstance(known, dict):
        return {}
    return {name: run for name, run in known.items()
            if isinstance(run, dict) and isinstance(run.get("run"), str)
            and isinstance(run.get("sent"), list)}


def key_of(line: dict) -> list:
    """What tells a line of metrics.jsonl from the others: its step, and whether it validates."""
    return [line["step"], "val_loss" in line]


def numbers_of(line: dict) -> dict[str, float]:
    """What a line says, without its step."""
    return {name: value for name, value in line.items() if name != "step"}


def config_of(out: Path) -> dict:
    """What the logger shows as the run's configuration: settings, model, versions."""
    return disk.read_json(out / "config.json")


# -- One class each: made with (directory, what its run is called, step, whether it is new) --------

class TensorBoard:
    """Event files in OUT/tensorboard."""
    PURGES = True               # its reader drops the lines after the step where a run goes on

    def __init__(self, out: Path, run: str, step: int, is_new: bool):
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {out / 'tensorboard'}"
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=1 if is_new else step + 1)
        if is_new:
            self.writer.add_text("config", f"```\n{json.dumps(config_of(out), indent=2)}\n```")

    def write(self, line: dict) -> None:
        for name, value in numbers_of(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()                 # or a kill would lose the last two minutes

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases: files in OUT/wandb, or its server with WANDB_MODE=online."""
    PURGES = False

    def __init__(self, out: Path, run: str, step: int, is_new: bool):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")     # of its own errors
        import wandb

        self.where = f"run {run}, {mode}, {out / 'wandb'}"
        # Its own copy of what the terminal says would be a second writer there.
        how = {"console": "off", "silent": True}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            how["x_transaction_log_flush_interval"] = 1.0       # seconds that a kill can lose
        self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=out.name,
                              dir=str(out), config=config_of(out), id=run, mode=mode,
                              resume="allow", settings=wandb.Settings(**how))
        self.run.define_metric("*", step_metric="step")         # the x axis

    def write(self, line: dict) -> None:
        # Its own count must rise with every line, also over a resume. A step has two lines at most.
        step, is_validation = key_of(line)
        self.run.log(line, step=2 * step + is_validation)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio's database on this machine (TRACKIO_DIR), or a Space with TRACKIO_SPACE_ID."""
    PURGES = False

    def __init__(self, out: Path, run: str, step: int, is_new: bool):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.where = f"trackio show --project {project}"
        with contextlib.redirect_stdout(io.StringIO()):         # five lines of advice
            self.run = trackio.init(project=project, name=f"{out.name}-{run}",
                                    config=config_of(out), resume="allow", embed=False,
                                    auto_log_gpu=False, auto_log_cpu=False)
        self.finish = trackio.finish        # of the package: the run's own is called at exit again

    def write(self, line: dict) -> None:
        self.run.log(numbers_of(line), step=line["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
