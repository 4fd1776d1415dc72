"""What a run says of itself: its first lines, its reports, and metrics.jsonl.

    step    200/300 | loss 4.9376 | reconstructed 4.666 (26 %) … | lr 1.8e-04 | 12 samples/s | …

A report gives the mean losses and accuracies since the last one, over the targets of all processes.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from storage import disk
from training.flops import Work
from training.loggers import Loggers
from training.machine import loader_workers, memory_gb

if TYPE_CHECKING:           # for the annotations alone: both files come later
    from training.runs import Run
    from train import State


# What a run counts from its first step to its last; checkpoints keep it.
COUNTERS = {"samples": 0, "unreadable": 0, "cut": 0, "tokens": 0, "padded_tokens": 0, "skipped": 0,
            "seconds": 0.0, "cpu_seconds": 0.0}
WAIT = 0.05             # share of its time that a GPU may wait for its batches


class Halt(ValueError):
    """The run stops itself; the message says why."""


class Sums:
    """Losses, hits, numbers of targets, and of those whose hits were counted: (4, outputs).

    They are summed on the device, without waiting for it.
    """

    def __init__(self, loss_weights: dict[str, float], device: torch.device):
        self.weights = loss_weights
        self.values = torch.zeros(4, len(loss_weights), dtype=torch.float64, device=device)

    def add(self, results: dict, counts: torch.Tensor) -> None:
        """results: output -> (loss, hits or NaN), sums over its targets; counts (outputs,)."""
        losses = torch.stack([results[name][0].detach() for name in self.weights])
        hits = torch.stack([results[name][1] for name in self.weights])
        self.values += with_counted(torch.stack([losses, hits, counts]).to(self.values))

    def read(self, prefix: str = "") -> dict[str, float]:
        """{loss, <output>_loss, <output>_accuracy}, of all processes; starts again at 0."""
        if dist.is_initialized():
            dist.all_reduce(self.values)
        columns = self.values.T.tolist()
        self.values.zero_()
        metrics = {prefix + "loss": 0.0}
        for (name, weight), (loss, hit, count, counted) in zip(self.weights.items(), columns,
                                                               strict=True):
            mean = loss / count if count else 0.0
            metrics[prefix + "loss"] += weight * mean
            metrics[f"{prefix}{name}_loss"] = mean
            if counted or not count:                        # an alignment has no right and wrong
                metrics[f"{prefix}{name}_accuracy"] = hit / counted if counted else 0.0
        return metrics


def with_counted(sums: torch.Tensor) -> torch.Tensor:
    """Losses, hits (NaN: not counted) and numbers of targets, (3, outputs), as Sums.values.

    Older checkpoints hold such sums. Those of four rows are returned as they are.
    """
    if len(sums) == 4:
        return sums
    losses, hits, counts = sums
    return torch.stack([losses, hits.nan_to_num(), counts, counts * ~hits.isnan()])


class Log:
    """Prints reports, writes OUT/metrics.jsonl, and counts samples, tokens and unreadable images.

    Losses and accuracies are those of all processes. The other counts are those of this process:
    metrics.jsonl has the first one's. Every process names the images that it could not decode in
    unreadable_RANK.txt (after a resume, some of them twice). A resumed run first drops the lines of
    metrics.jsonl that the interrupted one wrote after its last checkpoint, an incomplete one
    included. Then it writes what an undisturbed run would. Every line also goes to --log's loggers.
    """

    def __init__(self, run: "Run", state: "State", work: Work | None = None):
        """work: for the utilization, which is left out without it; the first process has it."""
        self.run, self.counters, self.work = run, state.counters, work
        self.sums = Sums(run.config.loss_weights, run.machine.device)
        self.path = run.out / "metrics.jsonl"
        self.unreadable_path = run.out / f"unreadable_{run.machine.rank}.txt"
        self.losses = []                # of all reports
        self.spikes = 0                 # reports whose loss was far above those before (is_spike)
        self.validated = -1             # step of the last validation
        self.late = 0                   # reports in a row in which the loader was too slow
        known, self.loggers = {}, Loggers((), run.out)
        if run.machine.rank == 0:
            kept, dropped = self.lines_until(state.step)
            known = {"lines": kept}
            self.loggers = Loggers(run.settings.log, run.out, state.step, kept, dropped)
        for metrics in run.machine.union(known)["lines"]:
            self.remember(metrics)
        if run.saved:
            self.take_sums(run.saved.get("sums", []))
        self.start_window()

    def lines_until(self, step: int) -> tuple[list[dict], list[dict]]:
        """Drops what metrics.jsonl says of later steps -> (what is left of it, what it said)."""
        if not self.path.exists():
            return [], []
        lines = map(parse_line, self.path.read_text(errors="replace").splitlines()) if step else []
        lines = [line for line in lines if line]
        kept = [line for line in lines if line["step"] <= step]
        disk.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept, [line for line in lines if line["step"] > step]

    def remember(self, metrics: dict) -> None:
        """Keeps what later reports need of a line."""
        if "val_loss" in metrics:
            self.validated = metrics["step"]
        else:
            self.spikes += is_spike(metrics["loss"], self.losses[-10:])
            self.losses.append(metrics["loss"])

    def sums_of_all(self) -> list[torch.Tensor]:
        """The sums since the last report of each process: a checkpoint keeps them."""
        machine = self.run.machine
        parts = machine.union({machine.rank: self.sums.values.cpu()})
        return [parts[rank] for rank in range(0, machine.world, machine.tensor)]

    def take_sums(self, sums: list[torch.Tensor]) -> None:
        """What sums_of_all gave. With another number of processes the first one takes them all."""
        rank, world = self.run.machine.data_rank, self.run.machine.data_world
        if len(sums) == world:
            self.sums.values += with_counted(sums[rank]).to(self.sums.values.device)
        elif rank == 0:
            for one in sums:
                self.sums.values += with_counted(one).to(self.sums.values.device)

    def start_window(self) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        self.samples, self.waiting, self.tokens_before = 0, 0.0, self.counters["tokens"]

    def write(self, metrics: dict) -> None:
        if self.run.machine.rank == 0:
            with disk.naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        self.loggers.write(metrics)
        self.remember(metrics)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens here is not counted as training."""
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.began += time.perf_counter() - began
        self.cpu_began += time.process_time() - cpu_began

    def micro_batch(self, results: dict, counts: torch.Tensor, notes: dict) -> None:
        """Counts a micro-batch; Halt if too many images cannot be decoded."""
        self.sums.add(results, counts)
        for name in ("samples", "tokens", "padded_tokens", "cut"):
            self.counters[name] += notes[name]
        if not notes["unreadable"]:
            return
        self.counters["unreadable"] += len(notes["unreadable"])
        with disk.naming(self.unreadable_path), open(self.unreadable_path, "a") as file:
            file.writelines(line + "\n" for line in notes["unreadable"])
        bad, seen = self.counters["unreadable"], self.counters["samples"]
        limit = self.run.settings.max_unreadable
        if bad > max(10, limit * seen):
            raise Halt(f"{bad} of {seen} images cannot be decoded (named in "
                       f"{self.unreadable_path}), more than --max-unreadable {limit}")

    def step(self, rate: float, norm: torch.Tensor) -> None:
        self.rate, self.norm = rate, norm
        self.samples += self.run.settings.global_batch

    def validation(self, metrics: dict, step: int, best: bool = False) -> None:
        """Prints and writes a validation. best: of all so far, by --keep-best."""
        self.write({"step": step, **metrics})
        self.run.machine.say(f"step {step:>6} | validation {losses_line(metrics, 'val_')}"
                             f"{' | the best' if best else ''}")

    def report(self, state: "State") -> None:
        """Prints and writes the means since the last report; Halt if gradients stay non-finite."""
        s, machine, counters = self.run.settings, self.run.machine, self.counters
        metrics = self.sums.read()          # waits for the device, so the clock below is honest
        if state.skipped_in_a_row >= s.max_skipped:
            raise Halt(f"step {state.step}: {int(state.skipped_in_a_row)} gradients in a row were "
                       "not finite; a lower --lr, --clip or --precision bf16 may help")
        seconds = time.perf_counter() - self.began
        counters["seconds"] += seconds
        counters["cpu_seconds"] += time.process_time() - self.cpu_began
        counters["skipped"] = int(state.skipped)
        speed = self.samples / seconds
        metrics = {
            "step": state.step, **metrics, "lr": self.rate, "gradient_norm": float(self.norm),
            "samples_per_second": speed, "pairs_per_second_per_device": speed / machine.world,
            **self.utilization(seconds), "data_wait": self.waiting / seconds,
            "memory_gb": memory_gb(machine.device),
            "padding": 1 - counters["tokens"] / counters["padded_tokens"],
            "skipped": counters["skipped"], "unreadable": counters["unreadable"],
            "cut": counters["cut"], "seconds": counters["seconds"],
            "cpu_seconds": counters["cpu_seconds"]}
        self.write(metrics)
        remaining = (s.steps - state.step) * s.global_batch / speed
        parts = [f"step {state.step:>6}/{s.steps}", losses_line(metrics), f"lr {self.rate:.1e}",
                 speed_line(metrics, machine.world),
                 f"data wait {100 * metrics['data_wait']:.0f} %",
                 f"{metrics['memory_gb']:.1f} GB", f"ETA {clock(remaining)}"]
        for name, what in (("skipped", "steps skipped"), ("unreadable", "images unreadable"),
                           ("cut", "captions cut")):
            if counters[name]:
                parts.append(f"{counters[name]} {what}")
        machine.say(" | ".join(parts))
        self.watch_loader(metrics["data_wait"])
        self.start_window()

    def watch_loader(self, waiting: float) -> None:
        """Says what helps where a GPU waited for its batches in three reports in a row.

        waiting: share of the time since the last report.
        """
        machine = self.run.machine
        self.late = self.late + 1 if waiting > WAIT else 0
        if self.late == 3 and machine.device.type == "cuda":
            workers = loader_workers(self.run.workers, machine.device)
            machine.say(f"the GPU waits for pictures {100 * waiting:.0f} % of the time: more than "
                        f"{workers} of --workers help where there are more cores, and so do "
                        "--decode-on-device and files of smaller pictures (prepare.py --shorter)")

    def utilization(self, seconds: float) -> dict[str, float]:
        """{"mfu": that of the first process's device since the last report}, where it is known."""
        if not self.work:
            return {}
        pairs = self.samples / self.run.machine.world
        tokens = (self.counters["tokens"] - self.tokens_before) / self.run.machine.tensor
        return {"mfu": self.work.utilization(pairs, tokens, seconds)}


def parse_line(line: str) -> dict | None:
    """A line of metrics.jsonl; None for one that was cut off by a crash, or damaged."""
    try:
        metrics = json.loads(line)
        loss = metrics["val_loss"] if "val_loss" in metrics else metrics["loss"]
        whole = isinstance(metrics["step"], int) and isinstance(loss, float)
        return metrics if whole else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def is_spike(loss: float, before: list[float]) -> bool:
    """Whether a report's loss is more than a quarter above the mean of the reports before it."""
    return len(before) >= 3 and loss > 1.25 * sum(before) / len(before)


def speed_line(metrics: dict, devices: int) -> str:
    """96 samples/s = 8 x 12 | MFU 31.0 %"""
    line = f"{metrics['samples_per_second']:.0f} samples/s"
    if devices > 1:
        line += f" = {devices} x {metrics['pairs_per_second_per_device']:.0f}"
    return f"{line} | MFU {100 * metrics['mfu']:.1f} %" if "mfu" in metrics else line


def losses_line(metrics: dict, prefix: str = "") -> str:
    """loss 2.345 | reconstructed 2.1 (45 %) left_to_right 2.5 (40 %) …"""
    parts = []
    for key, value in metrics.items():
        if not key.startswith(prefix) or not key.endswith("_loss"):
            continue
        name = key.removeprefix(prefix).removesuffix("_loss")
        part = f"{name} {value:.3f}"
        accuracy = metrics.get(f"{prefix}{name}_accuracy")
        if accuracy is not None:
            part += f" ({100 * accuracy:.0f} %)"
        parts.append(part)
    return f"loss {metrics[prefix + 'loss']:.4f} | {' '.join(parts)}"


def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


# -------------------------------------------------------------------------------------------------
# Before the first step.

def describe(run: "Run", model: nn.Module, step: int, work: Work | None = None) -> None:
    """Prints what is about to run. work: what the first process knows of its device."""
    s, machine = run.settings, run.machine
    table = run.tables["train"]
    texts = {"vqa": "questions", "nlvr2": "statements"}.get(s.task, "captions")
    epochs = s.steps * s.global_batch / len(table.row_of)
    processes = f"{machine.world} processes"
    if machine.tensor > 1:
        processes = f"{machine.data_world} groups of {machine.tensor} processes"
    machine.say(f"{s.task} with {' + '.join(run.config.loss_weights)} | "
                f"recipe {s.recipe or 'none'} | model {s.load or s.model}, "
                f"{count_parameters(model) / 1e6:.1f} M parameters | {machine.precision} on "
                f"{device_name(machine.device)}{f', {work}' if work else ''}")
    if not s.hold_out and run.tables["val"]:
        machine.say("training takes the validation split too, so what validation says is no test "
                    "(--hold-out keeps it apart)")
    machine.say(f"{len(table.row_of):,} {texts} of {len(table):,} images | global batch "
                f"{s.global_batch} = {processes} x {run.accumulation} x "
                f"{run.micro_batch} | {s.steps} steps from step {step} = {epochs:.1f} epochs")
    if s.captions_per_image > 1:
        machine.say(f"up to {s.captions_per_image} {texts} share an image: it passes the model "
                    "once for all of them")


def write_config(run: "Run", model: nn.Module) -> None:
    """Writes OUT/config.json: a run directory explains itself."""
    if run.machine.rank > 0:
        return
    described = {
        "command": " ".join(sys.argv), "settings": asdict(run.settings),
        "config": asdict(run.config), "precision": run.machine.precision,
        "processes": run.machine.world, "device": device_name(run.machine.device),
        "micro_batch": run.micro_batch, "accumulation": run.accumulation,
        "parameters": count_parameters(model),
        "files": {split: table.paths for split, table in run.tables.items() if table},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}
    disk.write_text(run.out / "config.json", json.dumps(described, indent=2) + "\n")


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu x {torch.get_num_threads()}"
