"""Measures what there is to know about a GPU: one command, a row at a time, most important first.

    python -m tools.bench gpu --out runs/gpu.json               # all rows (25 minutes on an H100)
    python -m tools.bench gpu --out runs/gpu.json --minutes 9   # those that fit; again: the others
    python -m tools.bench gpu --list                            # the rows, and how long each takes
    python -m tools.gpu_page runs/gpu.json --out docs           # GPU.md, gpu.png, gpu.json

Each row is in the file as soon as it is measured, and is not measured again. Rows run in a process
of their own: what does not fit into memory, fails, crashes or hangs becomes a row that says so, and
the next row goes on. It runs without a network. Needed are torch, torchvision, numpy, pillow,
pyarrow, regex, safetensors, tqdm and matplotlib; what is missing is named before anything is
measured. Nothing of the card's settings is touched.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from pathlib import Path

from storage import disk

NEEDED = ("torch", "torchvision", "numpy", "PIL", "pyarrow", "regex", "safetensors", "tqdm",
          "matplotlib")
# A row that takes so many times as long as it should, and a minute, is stopped.
PATIENCE = 4


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.bench gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu.json"), metavar="FILE",
        help="results, written after each row; those that are there stay (default: runs/gpu.json)")
    add("--minutes", type=float, default=0.0, metavar="X",
        help="stop before so many minutes have passed (default: when all is measured)")
    add("--rows", nargs="+", default=[], metavar="NAME", help="these alone (default: all)")
    add("--again", action="store_true", help="measure failed rows again")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--small", action="store_true", help="tiny sizes, to try the command itself out")
    add("--scratch", type=Path, default=Path("runs/gpu"), metavar="DIR",
        help="folder for the toy world and runs (default: runs/gpu)")
    add("--list", action="store_true", help="print the rows and stop")
    return parser.parse_args(argv)


def describe(device, small: bool) -> dict:
    """Card and versions, as the page names them."""
    import torch

    from training import machine, report

    about = {"card": report.device_name(device), "small": small, "torch": torch.__version__,
             "python": platform.python_version(), "gigabytes": 0.0,
             "cores": machine.os.cpu_count()}
    if device.type == "cuda":
        about["gigabytes"] = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return about


def work(names: list[str], device: str, small: bool, scratch: str, results):
    """Measures rows and sends ("begins", name) and ("done", name, result) for each.

    It leaves after an error of CUDA, after which a process can compute nothing more, and after a
    profile, which can make all that follows slower.
    """
    os.setsid()                         # so that whoever stops it stops what it started, too
    import torch

    from tools.gpu_rows import table
    from tools.gpu_steps import Place
    from training import machine

    place = Place(machine.set_up(device, "bf16").device, small, Path(scratch))
    if small:
        torch.compiler.set_stance("force_eager")        # compiling takes minutes on a CPU
    place.scratch.mkdir(parents=True, exist_ok=True)
    rows = {row.name: row for row in table()}
    for name in names:
        row = rows[name]
        results.send(("begins", name, None))
        began, leave = time.perf_counter(), row.group == "launches"
        try:
            found = row.function(place, **row.told)
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        except (Exception, SystemExit) as error:        # whatever it is, the other rows go on
            found = {"failed": f"{type(error).__name__}: {disk.shortened(error, 300)}"}
            leave = any(word in str(error) for word in ("CUDA", "cuDNN", "CUBLAS", "Triton"))
        found["took"] = time.perf_counter() - began
        results.send(("done", name, found))
        if leave:
            return
        place.free()


class Worker:
    """A process that measures rows."""

    def __init__(self, names: list[str], args, device: str):
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(names, device, args.small,
                                                          str(args.scratch), sender))
        self.process.start()
        sender.close()                  # so that the pipe ends when the process does

    def next_message(self, seconds: float):
        """Its next message; None where it ends first; TimeoutError."""
        if not self.receiver.poll(max(0.0, seconds)):
            raise TimeoutError
        try:
            return self.receiver.recv()
        except EOFError:
            self.process.join()
            return None

    def stop(self):
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:          # not yet a group of its own
                self.process.kill()
        self.process.join()


def measure(args, device: str, found: dict, rows: list, deadline: float):
    """Measures rows one after the other, and writes each when it is there."""
    def write(name, result):
        found["rows"][name] = result
        disk.write_text(args.out, json.dumps(found, indent=1) + "\n")
        numbers = result.get("failed") or ", ".join(
            f"{key} {value:.4g}" for key, value in result.items()
            if isinstance(value, float | int))
        print(f"{name:<32}{numbers}", flush=True)

    left = list(rows)
    while left:
        left = [row for row in left if time.monotonic() + row.seconds < deadline]
        if not left:
            break
        worker, current = Worker([row.name for row in left], args, device), None
        finished = 0                                # rows of this worker
        limit = 120.0                               # for torch to be imported
        try:
            while left:
                room = deadline - time.monotonic()
                try:
                    message = worker.next_message(min(limit, room))
                except TimeoutError:
                    if room > limit and current:
                        write(current, {"failed": f"stopped after {limit:.0f} s"})
                    elif room > limit:
                        raise ValueError("a process that measures did not start in "
                                         f"{limit:.0f} s") from None
                    left = [] if room <= limit else [r for r in left if r.name != current]
                    break
                if message is None:                 # it crashed, or left
                    code = worker.process.exitcode
                    if current:
                        write(current, {"failed": f"the process ended with {code}"})
                        left = [row for row in left if row.name != current]
                    elif code and not finished:
                        raise ValueError(f"a process that measures ended with {code} before its "
                                         "first row")
                    break
                kind, current, result = message
                row = next(row for row in left if row.name == current)
                if kind == "begins":
                    limit = PATIENCE * row.seconds + 60
                    if time.monotonic() + row.seconds > deadline:
                        break                       # a shorter one may fit
                    continue
                write(current, result)
                finished += 1
                left, current, limit = [r for r in left if r.name != row.name], None, 60.0
        finally:
            worker.stop()


def main(argv=None):
    args = parse(argv)
    deadline = time.monotonic() + (60 * args.minutes or float("inf"))
    with disk.command("bench.py gpu", "the rows so far are kept: the same command goes on"):
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"this Python lacks {', '.join(missing)}: carry their wheels, and "
                             "install them with pip install --no-index")
        from training.machine import find_device
        from tools.gpu_rows import table

        rows = table()
        if args.list:
            for row in rows:
                print(f"{row.name:<32}{row.seconds:>5} s  {row.says}")
            print(f"{sum(row.seconds for row in rows) / 60:.0f} minutes in all, guessed")
            return
        unknown = set(args.rows) - {row.name for row in rows}
        if unknown:
            raise ValueError(f"--rows {', '.join(sorted(unknown))}: --list names the rows")
        device = find_device(args.device, 1, 0)
        found = describe(device, args.small) | {"rows": {}}
        if args.out.exists():
            before = disk.read_json(args.out)
            if not isinstance(before, dict) or "rows" not in before:
                raise ValueError(f"{args.out}: not a file of this command")
            for key in ("card", "small", "torch"):
                if before.get(key) != found[key]:
                    raise ValueError(f"{args.out}: measured with {key} {before.get(key)}, and here "
                                     f"is {found[key]}; choose another --out")
            found["rows"] = before["rows"]
        done = {name for name, row in found["rows"].items()
                if not (args.again and "failed" in row)}
        left = [row for row in rows if row.name not in done
                and (not args.rows or row.name in args.rows)]
        # `timeout` ends a command so; its worker, a group of its own, would go on.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            measure(args, str(device), found, left, deadline)
        finally:
            signal.signal(signal.SIGTERM, before)
        not_yet = [row.name for row in rows if row.name not in found["rows"]]
        failed = [name for name, row in found["rows"].items() if "failed" in row]
        print(f"{args.out}: {len(found['rows'])} of {len(rows)} rows, {len(failed)} failed"
              + (f"; not reached: {', '.join(not_yet)}" if not_yet else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
