"""Damages things at random, and looks what the commands do: `make faults`.

    python -m tools.faults                              # ten minutes on two cores, every part
    python -m tools.faults --minutes 60 --seed 7
    python -m tools.faults --only arrow kills
    python -m tools.faults --only arrow --seed 7 --first 123 --tries 1      # one try again

A command may do what it was asked, or refuse in one sentence that names what is wrong. Everything
else is a fault: a traceback, a killed interpreter, a hang, gigabytes, a wrong result with exit code
0. A run that was stopped must go on to the very weights, optimizer state and metrics of a run that
nobody stopped.

Every try is a function of the seed, its part and its number. The exit status is 1 if something
broke; its inputs are kept in --keep. The tries are made in forked children (faults_tries.py), by as
many processes as --workers says.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from storage import disk
from tools import faults_downloads, faults_files, faults_runs
from tools.faults_tries import OUTCOMES, Try, World, remove


class Part(NamedTuple):
    """A kind of tries."""
    run: Callable[[Try], None]
    share: int                  # of the time
    stage: int                  # what it needs of the world: see World.make
    most: int = 10 ** 9         # tries after which there is nothing new


PARTS = {
    "descriptors": Part(faults_runs.descriptors, 1, 2, 1),
    "pictures": Part(faults_downloads.pictures, 3, 0),
    "arrow": Part(faults_files.arrow, 4, 2),
    "json": Part(faults_downloads.json_files, 2, 0),
    "tar": Part(faults_downloads.tar_files, 2, 0),
    "checkpoints": Part(faults_files.checkpoints, 3, 2),
    "tokenizers": Part(faults_files.tokenizers, 2, 2),
    "answers": Part(faults_files.answer_lists, 2, 2),
    "resume": Part(faults_runs.resume, 4, 2),
    "writers": Part(faults_runs.writers, 2, 2),
    "disk": Part(faults_runs.disk_faults, 3, 2),
    "kills": Part(faults_runs.kills, 8, 3),
    "terms": Part(faults_runs.terms, 5, 3),
}


# -- The campaign ----------------------------------------------------------------------------------

def work(options: argparse.Namespace, root: Path, world: World, worker: int):
    """One worker's tries of every part; their records go to a file."""
    names = [name for name in PARTS if name in options.only]
    end = options.until
    with open(root / f"records_{worker}.jsonl", "w") as file:
        for place, name in enumerate(names):
            part = PARTS[name]
            left = end - time.time()
            shares = [PARTS[other].share for other in names[place:]]
            part_end = time.time() + left * part.share / sum(shares)
            last = min(part.most, options.first + (options.tries or part.most))
            for number in range(options.first + worker, last, options.workers):
                if not options.tries and time.time() > part_end:
                    break
                for record in one_try(options, root, world, name, number):
                    file.write(json.dumps(record) + "\n")
                file.flush()


def one_try(options: argparse.Namespace, root: Path, world: World, name: str,
            number: int) -> list[dict]:
    """Makes one try; its folder stays if something broke, as long as there are few of its kind."""
    folder = root / f"{name}_{number}"
    folder.mkdir()
    rng = random.Random(f"{options.seed} {name} {number}")
    t = Try(name, number, rng, folder, world)
    try:
        PARTS[name].run(t)
    except Exception as error:              # a fault of the campaign, or a file that it cannot read
        t.record("the try itself", "wrong", disk.shortened(f"{type(error).__name__}: {error}"))
    kept = options.keep / folder.name
    if t.broke and len(list(options.keep.glob(f"{name}_*"))) < options.kept:
        (folder / "records.json").write_text(json.dumps(t.records, indent=1))
        folder.rename(kept)
    else:
        remove(folder)
    return t.records


def campaign(options: argparse.Namespace) -> list[dict]:
    """All tries of some parts -> their records."""
    with tempfile.TemporaryDirectory(prefix=".faults", dir=options.keep) as name:
        root = Path(name)
        root.chmod(0o755)                   # some tries run as another user
        world = World(root / "world")
        began = time.time()
        world.make(max(PARTS[name].stage for name in options.only))
        print(f"the world of the tries took {time.time() - began:.0f} s", flush=True)
        options.until = time.time() + 60 * options.minutes
        workers = []
        for worker in range(options.workers):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    work(options, root, world, worker)
                    code = 0
                finally:
                    os._exit(code)
            workers.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in workers]
        if any(codes):
            raise ValueError("a worker ended before its time")
        lines = [line for path in sorted(root.glob("records_*.jsonl"))
                 for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def report(records: list[dict]) -> int:
    """Prints what was tried, what held, and what broke -> the number of what broke."""
    print(f"\n{'part':<14}{'tried':>8}{'held':>8}{'broke':>8}   outcomes")
    total = Counter()
    for name in PARTS:
        counts = Counter()
        for record in records:
            if record["part"] == name:
                counts[record["outcome"]] += record["times"]
        if counts:
            print_row(name, counts)
            total += counts
    print_row("all", total)
    kinds = {}
    for record in records:
        if not OUTCOMES[record["outcome"]]:
            kinds.setdefault((record["part"], record["what"], record["outcome"]), []).append(record)
    for (part, what, outcome), some in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"\n{outcome} x {len(some)}: {part}, {what} (try {some[0]['number']})")
        for words in list(dict.fromkeys(disk.shortened(one["words"]) for one in some))[:4]:
            print(f"    {words}")
    return broken(total)


def broken(counts: Counter) -> int:
    return sum(count for outcome, count in counts.items() if not OUTCOMES[outcome])


def print_row(name: str, counts: Counter):
    tried, broke = sum(counts.values()), broken(counts)
    listed = ", ".join(f"{outcome} {counts[outcome]:,}" for outcome in OUTCOMES if counts[outcome])
    print(f"{name:<14}{tried:>8,}{tried - broke:>8,}{broke:>8,}   {listed}")


# -- The command line ------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.faults", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=10, metavar="X",
        help="how long to try, without what it takes to make small models first (default: 10)")
    add("--seed", type=int, metavar="N", help="other numbers, other faults (default: a new one)")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"parts to try, of {', '.join(PARTS)} (default: all)")
    add("--tries", type=int, default=0, metavar="N",
        help="number of tries of each part, however long they take (default: as time allows)")
    add("--first", type=int, default=0, metavar="N",
        help="number of the first try, to make one again (default: 0)")
    add("--workers", type=int, default=2, metavar="N", help="tries at the same time (default: 2)")
    add("--keep", type=Path, metavar="DIR",
        help="folder for the inputs of tries that broke (default: a new one for temporary files)")
    add("--kept", type=int, default=20, metavar="N",
        help="number of tries of a part that are kept (default: 20)")
    options = parser.parse_args(argv)
    if options.seed is None:
        options.seed = random.randrange(10 ** 6)
    options.keep = options.keep or Path(tempfile.gettempdir()) / f"faults_{options.seed}"
    options.keep.mkdir(parents=True, exist_ok=True)
    return options


def main(argv: list[str] | None = None):
    options = parse(argv)
    with disk.command("faults.py", f"the inputs of tries that broke are in {options.keep}"):
        print(f"seed {options.seed}; inputs of tries that break are kept in {options.keep}",
              flush=True)
        broke = report(campaign(options))
    if broke:
        print(f"\n{broke:,} broke: python -m tools.faults --only PART --seed {options.seed} "
              f"--first TRY --tries 1 makes a try again; inputs are in {options.keep}")
        sys.exit(1)


if __name__ == "__main__":
    main()
