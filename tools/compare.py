"""Quality against training time: FLM beside the objectives that it is compared with.

    python -m tools.compare --data data/toy --out runs/compare  # under an hour on two free cores
    python -m tools.compare --minutes 1 --seeds 1 --only FLM "MLM 40 %"         # a rough picture
    python -m tools.compare --contender "FLM, spans of 0.7: --corruption-rate 0.7"      # one more
    python -m tools.compare --data DIR --recipe small --out runs/photographs    # real captions
    python -m tools.compare --out runs/compare --report     # the results so far, once more

Every contender trains for the same time, and is looked at at eight moments of it. All runs take
turns: moment 1 of all, then moment 2 of all, so that whatever else the machine does hits all alike.
The command may be stopped at any time; the same command goes on. One with more seeds, contenders or
tasks adds to what is there. OUT holds

    compare.md, compare.json, compare.png, variants.png     the results
    plan.json, rates.json                   what was decided: rates, warm-up, steps of each moment
    flm-0/, mlm-15-0/, …                    a run each: moments.json, and the models moment_K.pt

Where to find what
    the contenders                          compare_contenders.py
    what is to be done, and in what order   compare_plan.py
    a run: its schedule, its time           compare_run.py
    what the models are asked               compare_quality.py
    times, ratios, their intervals          compare_result.py
    the tables and pictures                 compare_page.py
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch

from recipes import RECIPES
from storage import disk
from tasks import FINE_TUNING
from tools import compare_page
from tools.compare_plan import Comparison, Unit
from tools.compare_quality import TOY_WORDS
from training.report import clock

# -------------------------------------------------------------------------------------------------
# Working through what there is to do.

def work_through(comparison: Comparison, workers: int):
    """Does all that is not done yet, a stage after the other."""
    forecast = Forecast(comparison, workers)
    print_plan(comparison, forecast)
    with processes(workers) as pool:
        for stage in comparison.stages():
            units = [unit for unit in stage if not comparison.is_done(unit)]
            works = [comparison.work(unit) for unit in units]
            for k, result, seconds in as_they_finish(works, pool):
                says = comparison.keep(units[k], result)
                forecast.took(units[k], seconds)
                print(f"{says} | {forecast}", flush=True)


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yields a pool of processes, which end with the block; of one, None: this process works."""
    if count == 1:
        torch.set_num_threads(1)
        yield None
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin_process)
    try:
        yield pool
    except BaseException:                   # Ctrl-C too
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def begin_process():
    """What a process of the pool does first: one thread, and an end when it is told to."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()


def stop(number: int, frame):
    """Ends this process, and the script that it may be waiting for."""
    sys.exit(128 + number)


def end_with(parent: int):
    """Ends this process when the one that started it is gone, however it ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    os._exit(1)


def as_they_finish(works: list[Callable], pool) -> Iterator[tuple[int, object, float]]:
    """Calls functions -> (number in the list, result, seconds by the clock), as they finish."""
    if pool is None:
        for k, work in enumerate(works):
            yield k, *timed(work)
        return
    number_of = {pool.submit(timed, work): k for k, work in enumerate(works)}
    for future in as_completed(number_of):
        try:
            yield number_of[future], *future.result()
        except SystemExit:                  # it was told to stop
            raise KeyboardInterrupt from None
        except BrokenProcessPool:
            raise ValueError("a process ended before its work was done, perhaps for want of "
                             "memory; the same command goes on") from None


def timed(work: Callable) -> tuple[object, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


# -------------------------------------------------------------------------------------------------
# How long it takes.

class Forecast:
    """How long the rest takes: as planned, times what finished units took for what was planned."""

    def __init__(self, comparison: Comparison, workers: int):
        self.comparison, self.workers = comparison, workers
        self.planned, self.seconds = Counter(), Counter()       # of each kind of unit

    def took(self, unit: Unit, seconds: float):
        self.planned[unit.kind] += self.comparison.seconds_planned(unit)
        self.seconds[unit.kind] += seconds

    def left(self) -> float:
        """Seconds of all processes together until everything is done."""
        total = 0.0
        for unit in self.comparison.to_do():
            # Beside training there are batches to make and questions to ask.
            ratio = 1.3
            if self.planned[unit.kind]:
                ratio = self.seconds[unit.kind] / self.planned[unit.kind]
            total += ratio * self.comparison.seconds_planned(unit)
        return total

    def __str__(self) -> str:
        return f"{len(self.comparison.to_do())} to do, {clock(self.left() / self.workers)} to go"


def print_plan(comparison: Comparison, forecast: Forecast):
    """Prints what will run, and what it will take."""
    o = comparison.options
    width = max(len(c.name) for c in comparison.contenders)
    for c in comparison.contenders:
        seeds = ", ".join(map(str, comparison.seeds(c)))
        print(f"{c.name:<{width}}  seeds {seeds:<9} {c.flags}")
    times = ", ".join(f"{60 * o.minutes * k / o.moments:.0f}" for k in range(1, o.moments + 1))
    print(f"moments at {times} seconds of training; {comparison.quality.captions} captions of "
          f"split {comparison.quality.split}; tasks: {' '.join(o.tasks) or 'none'}")
    kinds = Counter(unit.kind for unit in comparison.to_do())
    what = {"speed": "first steps for their speed", "rate": "trials of rates",
            "moment": "moments of runs", "task": "fine-tunings"}
    counted = ", ".join(f"{kinds[kind]} {words}" for kind, words in what.items() if kinds[kind])
    print(f"to do: {counted or 'nothing'}: about {clock(forecast.left())} of CPU time, "
          f"{clock(forecast.left() / forecast.workers)} by {forecast.workers} processes. "
          "Ctrl-C at any time: the same command goes on.", flush=True)


# -------------------------------------------------------------------------------------------------
# The command line.

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/toy", metavar="DIR",
        help="folder of Arrow files (default: data/toy)")
    add("--out", default="runs/compare", metavar="DIR",
        help="folder of the runs and results (default: runs/compare)")
    add("--recipe", default="toy", metavar="NAME",
        help="recipe of train.py that all contenders share (default: toy)")
    add("--minutes", type=float, default=1.5, metavar="X",
        help="training time of a run, on one thread of a CPU or on a GPU (default: 1.5)")
    add("--moments", type=int, default=8, metavar="N",
        help="number of moments at which a run is looked at, evenly spread (default: 8)")
    add("--seeds", type=int, default=3, metavar="N",
        help="runs of each principal contender; the others have one (default: 3)")
    add("--all-seeds", action="store_true", help="as many runs of every contender")
    add("--workers", type=int, default=2, metavar="N",
        help="processes at the same time, each with one thread; on a GPU say 1 (default: 2)")
    add("--decay", type=float, default=0.2, metavar="X",
        help="share of a run's steps after the warm-up, its last ones, in which the rate falls to "
        "0 (default: 0.2)")
    add("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], metavar="X",
        help="multiples of the recipe's peak rate that are tried; one alone is taken as it is "
        "(default: 0.5 1 2)")
    add("--contender", action="append", default=[], metavar="LINE",
        help='one more contender, "NAME: FLAGS of train.py"; may be repeated')
    add("--only", nargs="+", default=[], metavar="NAME",
        help="these contenders of the table, and those of --contender (default: all)")
    add("--captions", type=int, default=400, metavar="N",
        help="at most this many captions are asked for all their words (default: 400)")
    add("--groups", default="", metavar="FILE",
        help=f"JSON {{group: [words]}} (default: {TOY_WORDS} of --data, else tools/words_en.json)")
    add("--tasks", nargs="*", metavar="NAME",
        help=f"tasks that principals are fine-tuned for, of {', '.join(FINE_TUNING)} (default: vqa "
        "in the toy world, else caption and retrieval)")
    add("--task-moments", type=int, nargs="+", metavar="K",
        help="moments from which they are fine-tuned (default: half of them, and the last)")
    add("--task-steps", type=int, default=300, metavar="N",
        help="steps of fine-tuning, at most those of the task's recipe (default: 300)")
    add("--device", default="", metavar="NAME",
        help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    add("--plan", action="store_true", help="print what would run, and stop")
    add("--report", action="store_true", help="write the results of what is done so far, and stop")
    options = parser.parse_args(argv)
    if options.tasks is None:
        toy = (Path(options.data) / TOY_WORDS).is_file()
        options.tasks = ["vqa"] if toy else ["caption", "retrieval"]
    if options.task_moments is None:
        n = options.moments
        options.task_moments = sorted({max(1, n // 2), n})
    return options


def check(options: argparse.Namespace):
    """ValueError for flags that make no sense."""
    for flag in ("moments", "seeds", "workers", "task_steps"):
        if getattr(options, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} {getattr(options, flag)}: at least 1 is expected")
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes}: more than 0 is expected")
    if not 0 < options.decay <= 1:
        raise ValueError(f"--decay {options.decay}: a share above 0, at most 1, is expected")
    if not all(rate > 0 for rate in options.rates):
        raise ValueError(f"--rates {' '.join(map(str, options.rates))}: each must be above 0")
    if options.recipe not in RECIPES["pretrain"]:
        raise ValueError(f"--recipe {options.recipe}: one of {', '.join(RECIPES['pretrain'])} is "
                         "expected")
    for task in options.tasks:
        if task not in FINE_TUNING:
            raise ValueError(f"--tasks {task}: one of {', '.join(FINE_TUNING)} is expected")
        if "steps" not in RECIPES[task].get(options.recipe, {}):
            raise ValueError(f"--tasks {task}: has no recipe {options.recipe} with a number of "
                             "steps; --tasks without a name has no tasks")
    for moment in options.task_moments:
        if not 1 <= moment <= options.moments:
            raise ValueError(f"--task-moments {moment}: 1 to {options.moments} are the moments")


def print_results(out: Path):
    print((out / "compare.md").read_text(encoding="utf-8"))
    print(f"wrote {out}/compare.md, compare.json, compare.png and variants.png")


def main(argv: list[str] | None = None):
    options = parse(argv)
    out = Path(options.out)
    with disk.command("compare.py", "the same command goes on"):
        if options.report:
            compare_page.write(out)
            print_results(out)
            return
        check(options)
        os.environ["OMP_NUM_THREADS"] = "1"         # of the processes that are started
        if options.plan:
            comparison = Comparison(options)
            print_plan(comparison, Forecast(comparison, options.workers))
            return
        with disk.one_writer(out / ".lock", options.out):
            disk.remove_partials(out, "*.json", "*.md")
            comparison = Comparison(options)
            comparison.write()
            work_through(comparison, options.workers)
            compare_page.write(out)
        print_results(out)


if __name__ == "__main__":
    main()
