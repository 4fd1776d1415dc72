"""What a recipe would take on GPUs, without its data: memory by part, pairs a second, days.

    python -m tools.plan --task pretrain --recipe flm-b32 --micro-batch 256 --processes 8
    python -m tools.plan --task vqa --recipe flm-b32 --texts 658111 --processes 8
    python -m tools.plan --task pretrain --model large-l14-336 --shard --processes 64 …

All other flags are train.py's. Where the data is there, `train.py … --dry-run` knows its lengths.
Pictures and words are drawn: pictures in the model's size, texts of --tokens tokens for the time,
and of --longest for the memory, since a step's longest micro-batch decides about that.
"""

import argparse
import sys
from dataclasses import replace

import torch

from tasks import to_device
from tools.drawn import drawn_batch, drawn_run
from train import build_state, train_step
from training.flops import PASSES, count_flops
from training.machine import Machine, running
from training.memory import step_memory
from training.plan import Cost, say_plan
from training.report import count_parameters
from training.settings import check, parse as parse_settings
from weights import outline_of

SAMPLES = 4         # whose FLOPs are counted


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, allow_abbrev=False,
        usage="python -m tools.plan [--processes N] [--tokens N] [--longest N] [--texts N] FLAGS …",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, default=1, help="number of GPUs, one process each (default: 1)")
    add("--tokens", type=int, default=13, help="of a text on average, <s> and </s> included "
        "(default: 13, COCO's captions)")
    add("--longest", type=int, default=0, help="of a text in the longest micro-batch (default: "
        "what the model or --max-tokens allows, so that nothing longer can come)")
    add("--texts", type=int, default=0, help="texts of the training data, for recipes that count "
        "in epochs (default: none)")
    return parser.parse_known_args(argv)


def planned_run(args, flags: list[str]):
    """The Run of the flags on so many GPUs."""
    settings, _ = parse_settings([*flags, "--data", "drawn", "--out", "none"])
    machine = Machine(0, args.processes, torch.device("cuda"), settings.precision or "bf16",
                      tensor=settings.tensor_parallel)
    run = drawn_run(flags, machine, args.texts)
    check(run.settings, machine)
    return run


def main(argv=None):
    with running("plan.py"):
        args, flags = parse(argv)
        for name, least in (("processes", 1), ("tokens", 3), ("longest", 0), ("texts", 0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name}: at least {least} is expected")
        run = planned_run(args, flags)
        s, task = run.settings, run.task
        longest = args.longest or task.settings.max_tokens
        print(f"{s.task} with {' + '.join(run.config.loss_weights)} | recipe {s.recipe or 'none'} "
              f"| model {s.model}, {count_parameters(outline_of(run.config)) / 1e6:.1f} M "
              f"parameters | global batch {s.global_batch} = {args.processes} processes x "
              f"{run.accumulation} x {run.micro_batch} | {s.steps:,} steps")
        exact = type(task)(replace(task.settings, pad_to=1), run.config, task.tok)
        sample, _ = drawn_batch(exact, SAMPLES, args.tokens)
        sample = to_device(sample, torch.device("cpu"), run.config)
        per_pair = PASSES * count_flops(outline_of(run.config).eval(), sample) / SAMPLES
        batch = drawn_batch(task, run.micro_batch, longest)
        memory = step_memory(run, build_state, train_step, batch, on_gpu=True)
        cost = Cost(per_pair, args.tokens, s.steps * s.global_batch, args.processes)
        say_plan(run, memory, cost, tuple(batch[0]["ids"].shape), on_gpu=True)


if __name__ == "__main__":
    main(sys.argv[1:])
