"""Time to quality: CPU seconds of training until the toy model reads its pictures.

    python -m tools.speedrun --data data/toy --out runs/speedrun --flags="--steps 700 --decay 1"
    python -m tools.speedrun --data data/toy --out runs/mine --flags="--steps 500 --muon-lr 0.02"

From random weights until the words for colours and those for shapes are both right 95 times in 100
(`--quality`), each asked with the right image, in captions of the test split. The clock counts all
that training does, also making the batches, but no evaluation: CPU seconds of the process on one
thread, or seconds where there is a GPU. `--flags` are those of train.py, over recipe toy. Of three
seeds the median counts. docs/RECORDS.md keeps the records. A new one comes with its seeds' files
(OUT/seed_N.json).
"""

import argparse
import json
import shlex
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import train
from data import Captions
from storage import disk
from storage.disk import read_json
from storage.files import find_files
from tools.probe import IMAGES, word_table
from training import machine as machines, settings as train_settings
from training.loading import batches_of
from training.report import Log
from training.runs import open_run

GROUPS = ("colours", "shapes")


def clock(device: torch.device) -> float:
    """Seconds of CPU time of this process; on a GPU, of the clock on the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def speedrun(flags: list[str], quality: float, first: int, every: int, captions: int) -> dict:
    """Trains one model until it has the quality, or to the end of its schedule.

    It is asked every so many steps from step `first` on.
    -> {"seconds", "step": of the first time that it had the quality, None if it never had;
        "command", "device", "asked": [{"step", "seconds", group: {image: share}}]}
    """
    settings, config_flags = train_settings.parse(flags)
    machine = machines.set_up(settings.device, settings.precision)
    settings = replace(settings, precision=machine.precision)
    train_settings.check(settings, machine)
    run = open_run(settings, config_flags, machine)
    table = Captions(find_files(settings.data, run.settings.datasets, "test"))
    words = read_json(Path(settings.data) / "toy_words.json")
    groups = {name: words[name] for name in GROUPS}
    state = train.build_state(run)
    log = Log(run, state)
    state.bare.train()
    found = {"seconds": None, "step": None, "command": shlex.join(flags),
             "device": machine.device.type, "asked": []}
    seconds, began = 0.0, clock(machine.device)
    batches = batches_of(run, 0)
    while state.step < settings.steps:
        micro_batches = [next(batches) for _ in range(run.accumulation)]
        train.train_step(run, state, micro_batches, log)
        last = state.step == settings.steps
        if not last and (state.step < first or (state.step - first) % every):
            continue
        seconds += clock(machine.device) - began
        state.bare.eval()
        state.bare.tokenizer = run.task.tok
        accuracy = word_table(state.bare, table, groups, captions)["accuracy"]
        state.bare.train()
        found["asked"].append({"step": state.step, "seconds": seconds, **accuracy})
        shares = ", ".join(f"{name} {100 * accuracy[name][IMAGES[0]]:.1f} %" for name in GROUPS)
        print(f"seed {settings.seed}, step {state.step}, {seconds:.0f} s: {shares}", flush=True)
        if all(accuracy[name][IMAGES[0]] >= quality for name in GROUPS):
            return found | {"seconds": seconds, "step": state.step}
        began = clock(machine.device)
    return found


def report(results: list[dict], quality: float):
    """Prints each seed's time and the median, in which a seed that never got there is the last."""
    times = [result["seconds"] for result in results]
    for seed, seconds in enumerate(times):
        print(f"seed {seed}: " + ("never" if seconds is None else f"{seconds:.0f} s"))
    median = statistics.median(float("inf") if seconds is None else seconds for seconds in times)
    said = "not reached" if median == float("inf") else f"{median:.0f} s"
    print(f"colours and shapes at {100 * quality:g} %: {said} (median of {len(times)} seeds)")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.speedrun", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the toy world")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="folder for the seeds' results; a seed that is there is not run again")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (3)")
    parser.add_argument("--quality", type=float, default=0.95, metavar="SHARE",
                        help="share of the words that must be right (0.95)")
    parser.add_argument("--first", type=int, default=600, metavar="STEP",
                        help="step after which the model is asked first (600)")
    parser.add_argument("--every", type=int, default=50, metavar="N",
                        help="steps between two times of asking (50)")
    parser.add_argument("--captions", type=int, default=1000, metavar="N",
                        help="test captions whose words are asked (1000)")
    parser.add_argument("--flags", default="", help="flags of train.py")
    args = parser.parse_args(argv)
    with disk.command("speedrun.py"):
        results = []
        for seed in range(args.seeds):
            path = Path(args.out) / f"seed_{seed}.json"
            flags = ["--task", "pretrain", "--recipe", "toy", "--data", args.data, "--out",
                     str(Path(args.out) / f"seed_{seed}"), "--seed", str(seed),
                     *shlex.split(args.flags)]
            if not path.exists():
                found = speedrun(flags, args.quality, args.first, args.every, args.captions)
                disk.write_text(path, json.dumps(found, indent=1) + "\n")
            results.append(read_json(path))
        report(results, args.quality)


if __name__ == "__main__":
    main()
