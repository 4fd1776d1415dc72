"""A try: a command in a forked child, and what became of it.

    result = wait(start(command("train.py", ["--task", "pretrain", …])), names=["last.pt"])
    result.outcome, result.code     # "sentence", 1

Everything is imported once, before the forks, so a try begins in milliseconds, not in seconds.
"""

import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

import eval as evaluation
import prepare
import tokenizer
import train
import weights
from tools import toy

# The commands import these when they need them. Who runs as another user then may not.
for name in ("encodings.utf_8_sig", *(f"multiprocessing.{part}" for part in (
        "connection", "pool", "popen_fork", "queues", "synchronize"))):
    importlib.import_module(name)

COMMANDS = {"train.py": train.main, "eval.py": evaluation.main, "weights.py": weights.main,
            "prepare.py": prepare.main, "tokenizer.py": tokenizer.main, "toy.py": toy.main}

# What can become of a try, and whether that is how it should be.
OUTCOMES = {
    "ok": True,             # exit code 0
    "sentence": True,       # refused, in a sentence that names what is wrong
    "unclear": False,       # refused without naming the file, or in a text that nobody reads
    "traceback": False,
    "signal": False,        # the interpreter was killed: a fault of memory
    "timeout": False,
    "memory": False,        # more memory than the inputs can need
    "wrong": False,         # exit code 0, or a sentence, though something else was right
}
LONGEST_SENTENCE = 2500     # characters of the last line of an error


# -- Children --------------------------------------------------------------------------------------

@dataclass
class Result:
    """What became of a child."""
    outcome: str
    code: int               # the exit code as a shell sees it: 128 + N for signal N
    killed: bool            # whether a signal ended it, not its own exit
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line that it wrote, of its errors if it wrote some."""
        lines = (self.err.strip() or self.out.strip()).replace("\r", "\n").splitlines()
        return lines[-1] if lines else ""


@dataclass
class Child:
    """A running child. Its words come through pipes: some tries forbid it to write into files."""
    pid: int
    pipes: list[int]                # of what it prints, and of its errors
    began: float
    texts: list[bytes] = field(default_factory=lambda: [b"", b""])
    status: int | None = None       # as waitpid tells it; None while it runs

    def listen(self):
        """Takes what it has written since."""
        for which, pipe in enumerate(self.pipes):
            with suppress(BlockingIOError):
                while part := os.read(pipe, 1 << 20):
                    self.texts[which] += part

    def running(self) -> bool:
        self.listen()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = status
        return self.status is None

    def send(self, number: int):
        """Sends it a signal, unless it has ended."""
        if self.running():
            os.kill(self.pid, number)

    def kill(self):
        """Ends it and the processes that it started."""
        if self.running():
            for end in (os.killpg, os.kill):
                with suppress(ProcessLookupError):      # no group yet, or ended this moment
                    end(self.pid, signal.SIGKILL)
            _, self.status = os.waitpid(self.pid, 0)


def command(name: str, argv: Sequence) -> Callable:
    """A command line as a function of no arguments."""
    def run():
        sys.argv = [name, *map(str, argv)]
        COMMANDS[name](sys.argv[1:])
    return run


def start(function: Callable, env: dict | None = None, limits: dict | None = None,
          user: int | None = None) -> Child:
    """Calls a function in a forked child.

    limits: {resource.RLIMIT_…: number}. user: the id under which it runs, instead of ours.
    """
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for pipe, end in ((out, out_end), (err, err_end)):
            os.close(end)
            os.set_blocking(pipe, False)
        return Child(pid, [out, err], time.monotonic())
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out_end, 1)
        os.dup2(err_end, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        os.environ.update(env or {})
        torch.set_num_threads(1)            # the parent's other threads are not here
        faulthandler.disable()              # it would print where a crash happened
        for which, limit in (limits or {}).items():
            resource.setrlimit(which, (limit, limit))
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        code = exit_code(function)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)      # the parent's own work must not go on here


def exit_code(function: Callable) -> int:
    """Calls a function as the interpreter calls a program -> the exit code."""
    try:
        function()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(child: Child, timeout: float = 60, memory: int = 2500, names: Sequence = ()) -> Result:
    """Waits until a child ends -> Result.

    timeout: seconds, after which it is killed. memory: MB of its own, above which it is killed.
    names: a refusal must name one of these.
    """
    outcome, pause = "", 0.002
    while child.running() and not outcome:
        if time.monotonic() - child.began > timeout:
            outcome = "timeout"
        elif megabytes(child.pid) > memory:
            outcome = "memory"
        time.sleep(pause)
        pause = min(0.03, pause * 1.3)
    child.kill()
    child.listen()
    for pipe in child.pipes:
        os.close(pipe)
    child.pipes = []
    texts = [text.decode(errors="replace") for text in child.texts]
    code = os.waitstatus_to_exitcode(child.status)
    result = Result(outcome, 128 - code if code < 0 else code, code < 0, *texts)
    result.outcome = outcome or outcome_of(result, names)
    return result


def outcome_of(result: Result, names: Sequence) -> str:
    """The outcome of a child that ended by itself."""
    if result.killed:
        return "signal"
    if "Traceback (most recent call last)" in result.err:
        return "traceback"
    if result.code == 0:
        return "ok"
    text = result.err + result.out
    named = not names or any(str(name) in text for name in names)
    return "sentence" if named and len(result.last_line) <= LONGEST_SENTENCE else "unclear"


def megabytes(pid: int) -> float:
    """The memory of a process that is not a file's, in MB."""
    try:
        with open(f"/proc/{pid}/status") as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
    except OSError:                     # it ended, or the system does not tell
        return 0.0


def launch(argv: Sequence, processes: int, **how) -> list[Child]:
    """Starts train.py as one or several processes on this machine."""
    if processes == 1:
        return [start(command("train.py", argv), **how)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(command("train.py", argv), env={
        "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, **how) for rank in range(processes)]


# -- A try, and what the tries share ---------------------------------------------------------------

@dataclass
class Try:
    """One try of a part: where it works, its random numbers, and what it found.

    A part's tries are functions of (seed, part, number), so each can be done again alone.
    """
    part: str
    number: int
    rng: random.Random
    folder: Path            # its own, empty; kept if something broke
    world: "World"
    records: list[dict] = field(default_factory=list)

    def run(self, name: str, *argv, what: str = "", names: Sequence = (), timeout: float = 60,
            memory: int = 2500, **how) -> Result:
        """Runs a command and records what became of it. what: how the table calls it."""
        return self.call(command(name, argv), what or f"{name} {argv[0]}", names, timeout, memory,
                         **how)

    def call(self, function: Callable, what: str, names: Sequence = (), timeout: float = 60,
             memory: int = 2500, **how) -> Result:
        """Calls a function in a child and records what became of it."""
        result = wait(start(function, **how), timeout, memory, names)
        self.record(what, result.outcome, result.last_line, result.err)
        return result

    def record(self, what: str, outcome: str, words: str = "", err: str = "", times: int = 1):
        """Records a result; `times`: how many faults it stands for."""
        self.records.append({"part": self.part, "number": self.number, "what": what,
                             "outcome": outcome, "words": words, "err": err[-3000:],
                             "times": times})

    def wrong(self, why: str):
        """The last result is not what it had to be."""
        self.records[-1] |= {"outcome": "wrong", "words": why}

    @property
    def broke(self) -> bool:
        return not all(OUTCOMES[record["outcome"]] for record in self.records)

    def write(self, name: str, contents: bytes) -> Path:
        """Writes an input into the try's folder -> its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        return path


# The smallest models that have everything.
FLM = ["--task", "pretrain", "--recipe", "toy", "--image-size", 32, "--vit-width", 32,
       "--vit-layers", 1, "--vit-heads", 2, "--text-width", 32, "--text-layers", 1, "--text-heads",
       2, "--width", 32, "--heads", 2, "--fusion-layers", 1, "--reconstructor-text-layers", 1,
       "--reconstructor-fusion-layers", 1, "--vocab-size", 300]
VILT = ["--task", "pretrain", "--recipe", "vilt-toy", "--image-size", 32, "--width", 24,
        "--layers", 1, "--heads", 2, "--mlp-width", 48, "--vocab-size", 300]
BATCH = ["--global-batch", 8, "--micro-batch", 4, "--device", "cpu", "--workers", 0]
STEPS, MIDDLE = 24, 15
# None of these numbers divides another.
OFTEN = ["--steps", STEPS, "--save-every", 5, "--log-every", 3, "--eval-every", 8,
         "--eval-samples", 40, "--keep", MIDDLE]
ONCE = ["--steps", 1, "--eval-every", 0, "--log-every", 1]
TIMES = ("samples_per_second", "pairs_per_second_per_device", "mfu", "data_wait", "memory_gb",
         "seconds", "cpu_seconds")


@dataclass
class World:
    """A small drawn world, small models, and runs that nothing disturbed; tries only read it."""
    root: Path
    seconds: dict = field(default_factory=dict)     # of each undisturbed run

    @property
    def data(self) -> Path:
        return self.root / "toy"

    @property
    def tokenizer(self) -> Path:
        return self.reference("flm", 1) / "tokenizer"

    def model(self, task: str) -> Path:
        """A checkpoint: "flm", "itm", or a task."""
        return (self.reference("flm", 1) if task == "flm" else self.root / task) / "last.pt"

    def reference(self, run: str, processes: int) -> Path:
        """The folder of an undisturbed run."""
        return self.root / f"{run}_{processes}"

    def run_flags(self, run: str) -> list:
        """The flags of a run, without --out."""
        start_of = {
            "flm": [*FLM, "--dropout", 0.1, "--corruption-rate", 0.3, "--prediction-rate", 0.7],
            "mlm": [*FLM, "--objective", "mlm", "--itm"],
            "vilt": [*VILT, "--dropout", 0.1],
            "vqa": ["--task", "vqa", "--recipe", "toy", "--load", self.model("itm")]}
        return [*start_of[run], *BATCH, *OFTEN, "--data", self.data]

    def make(self, stage: int):
        """Makes what the tries need. 1: the drawn world; 2: models; 3: undisturbed runs."""
        if stage >= 1:
            argv = ["make", "--out", self.data, "--images", 160, "--eval-images", 30, "--size", 32,
                    "--workers", 1]
            self.finished(start(command("toy.py", argv)))
        if stage >= 2:
            base = [*BATCH, "--steps", 5, "--eval-every", 0, "--data", self.data]
            argv = [*FLM, "--itm", *base, "--out", self.root / "itm"]
            self.finished(start(command("train.py", argv)))
            self.undisturbed(("flm", 1))
            self.finished(*[start(command("train.py", [
                "--task", task, "--recipe", "toy", "--load", self.model("itm"), *base, "--out",
                self.root / task])) for task in ("vqa", "nlvr2", "caption")])
        if stage >= 3:
            self.undisturbed(("mlm", 1), ("vilt", 1), ("vqa", 1))
            for run in ("flm", "mlm", "vilt", "vqa"):
                self.undisturbed((run, 2))

    def finished(self, *children: Child):
        for child in children:
            result = wait(child, timeout=300)
            if result.outcome != "ok":
                raise RuntimeError(f"the world of the tries cannot be made: {result.err}")

    def undisturbed(self, *runs: tuple[str, int]):
        """Runs that nothing disturbs, at the same time. How long they take is kept."""
        began = time.monotonic()
        children = {}
        for run, processes in runs:
            argv = [*self.run_flags(run), "--out", self.reference(run, processes)]
            children[run, processes] = launch(argv, processes)
        for run, some in children.items():
            self.finished(*some)
            self.seconds[run] = time.monotonic() - began


# -- Comparing runs --------------------------------------------------------------------------------

def leaves(value, name: str = ""):
    """(dotted name, value) of every leaf of nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            yield from leaves(one, f"{name}.{key}")
    else:
        yield name, value


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's contents, past all checks of the project."""
    return torch.load(path, map_location="cpu", weights_only=True)


def differing_tensors(a: Path, b: Path, parts: Sequence[str]) -> list[str]:
    """Names of what is not equal, bit by bit, in these parts of two checkpoints."""
    ours, theirs = ({name: value for name, value in leaves({part: contents[part] for part in parts})
                     if not name.endswith(".seconds")}
                    for contents in map(read_checkpoint, (a, b)))
    different = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        same = torch.equal(one, other) if torch.is_tensor(one) else one == other
        if not same:
            different.append(name)
    return different


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without what depends on the clock."""
    with open(folder / "metrics.jsonl") as lines:
        return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
                for line in lines]


def differences(reference: Path, out: Path) -> list[str]:
    """In what a run differs from an undisturbed one: weights, optimizer, counters, metrics."""
    found = differing_tensors(reference / "last.pt", out / "last.pt",
                              ("model", "optimizer", "scaler", "step", "counters"))
    ours, theirs = metrics_of(out), metrics_of(reference)
    if len(ours) != len(theirs):
        found.append(f"metrics.jsonl has {len(ours)} lines, not {len(theirs)}")
    for one, other in zip(ours, theirs, strict=False):
        names = [name for name in other if one.get(name) != other[name]]
        if names:
            found.append(f"metrics of step {other['step']}: {', '.join(names[:3])}")
    return found


def remove(folder: Path):
    """Removes a folder, also what a try has locked in it."""
    for path, _, _ in os.walk(folder):      # from the top: what is below opens after this
        os.chmod(path, 0o755)
    shutil.rmtree(folder, ignore_errors=True)
