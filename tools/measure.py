"""How things are measured: in turns, in the parts of a training step, and as tables. (For bench.py and bench_tasks.py.)

Letters: B batch, L text length (padded), n real tokens of a caption.
"""

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import machine
import train

# ---------------------------------------------------------------------------------------------------------------------
# In turns, as tables.

def now(device):
    """Seconds, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_of(args):
    return machine.set_up(train.Settings(device=args.device))[2]


def autocast(device, precision):
    """As in train.py: fp32, or bf16 where that is precise enough."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def in_turns(functions, rounds, warmup=1):
    """{name: function} -> {name: what its calls returned}: A B A B …, the first `warmup` rounds not counted."""
    results = {name: [] for name in functions}
    turns = [(k, name) for k in range(-warmup, rounds) for name in functions]
    for k, name in tqdm(turns, "measuring", leave=False, disable=None):      # a bar on terminals only
        result = functions[name]()
        if k >= 0:
            results[name].append(result)
    return results


def print_table(rows):
    """A list of dicts with equal keys, as aligned columns: numbers to the right, words to the left."""
    def show(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 4}f}"

    cells = [list(rows[0])] + [[show(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    words = [isinstance(value, str) for value in rows[0].values()]
    for line in cells:
        print("  ".join(f"{c:<{w}}" if left else f"{c:>{w}}" for c, w, left in zip(line, widths, words)).rstrip())


# ---------------------------------------------------------------------------------------------------------------------
# Training steps.

HEAD, OPTIMIZER, REST = "vocabulary head + loss", "optimizer", "masks and the rest"


def draw(config, images, captions, n, L, seed=0):
    """Random images, uint8 as the loader makes them, and captions of n real tokens, padded to L."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((captions, L), config.pad_id)
    ids[:, :n] = torch.randint(5, config.vocab_size - 1, (captions, n), generator=generator)   # past special tokens
    ids[:, 0], ids[:, n - 1] = config.cls_id, config.sep_id
    size = images, 3, config.image_size, config.image_size
    return {"image": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator), "ids": ids}


def text_lengths(args, device):
    """L of our captions and of the original's, which are all padded to one length."""
    multiple = padding_multiple(device)
    return {"ours": -(-args.tokens // multiple) * multiple, "original": max(args.pad, args.tokens)}


def padding_multiple(device):
    """As in train.py, captions are padded to a multiple of this."""
    return 8 if device.type == "cuda" else 1


@dataclass
class Way:
    """One way to take a step."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    forward: object                     # (model, batch on the device) -> {output: (sum of its losses, hits)}
    batch: dict | None = None           # of tensors, on the host
    counts: dict | None = None          # output -> number of its targets in the batch
    parts: dict = field(default_factory=dict)           # what a Stopwatch tells apart: part -> names of modules
    methods: dict = field(default_factory=dict)         # and part -> a method of the model


class Rig:
    """Ways to take a training step. A subclass fills `ways`, {name: Way}."""

    def __init__(self, args, config):
        self.device, self.config, self.ways = device_of(args), config, {}

    def pinned(self, batch):
        return {k: v.pin_memory() for k, v in batch.items()} if self.device.type == "cuda" else batch

    @torch.no_grad()
    def check(self, output, *names):
        """ValueError unless these ways compute the same loss in float32, without dropout -> their losses."""
        losses = []
        for way in (self.ways[name] for name in names):
            total, _ = way.forward(way.model.eval(), train.to_device(way.batch, self.device, self.config))[output]
            losses.append(float(total) / way.counts[output])
        if not max(losses) - min(losses) <= 1e-4:
            raise ValueError(f"{' and '.join(names)} do not compute the same: "
                             f"losses of {' and '.join(map(str, losses))}")
        return losses

    def step(self, name, precision, forward=None, mark=lambda part, direction: None, now=now):
        """One optimizer step as in train.py's loop -> seconds (of forward and backward, of the whole step)."""
        way, weights, device = self.ways[name], self.config.loss_weights, self.device
        began = now(device)
        mark(REST, "forward")
        batch = train.to_device(way.batch, device, self.config)
        with autocast(device, precision):
            results = (forward or way.forward)(way.model, batch)
        loss = sum(weights[output] * total / way.counts[output] for output, (total, _) in results.items())
        mark(HEAD, "backward")
        loss.backward()
        middle = now(device)
        mark(OPTIMIZER, "forward")
        norm = torch.nn.utils.get_total_norm([p.grad for p in way.model.parameters() if p.grad is not None])
        way.optimizer.found_inf = (~torch.isfinite(norm)).float()
        way.optimizer.step()
        way.optimizer.zero_grad(set_to_none=True)
        mark(REST, "forward")
        return middle - began, now(device) - began

    def clocked(self, name, precision):
        """A step under the stopwatch -> {(part, direction): seconds}"""
        way = self.ways[name]
        watch = Stopwatch(way.model, self.device, way.parts, way.methods)
        self.step(name, precision, mark=watch.mark)
        watch.remove()
        return dict(watch.seconds)


def adamw(model):
    """A rate of 0 costs the same arithmetic, and all that is compared is measured on the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def compare(seconds, B, references):
    """Prints and returns a row per way to take a step: of its rounds the shortest.

    seconds: {(precision, name): [seconds of (forward + backward, the whole step) …]}; references: name -> the name that
    it is compared with (none: with nothing).
    """
    best, rows = {key: np.min(times, axis=0) for key, times in seconds.items()}, []
    for (precision, name), (both, whole) in best.items():
        reference = best.get((precision, references.get(name)))
        gain = ["", ""] if reference is None else [float(reference[0] / both), float(reference[1] / whole)]
        rows.append({"precision": precision, "variant": name, "fwd+bwd s": float(both), "step s": float(whole),
                     "pairs/s fwd+bwd": float(B / both), "pairs/s step": float(B / whole),
                     "speed-up fwd+bwd": gain[0], "speed-up step": gain[1]})
    print_table(rows)
    print("\nthe shortest of the rounds; the speed-ups of all of them, forward + backward and step:")
    for (precision, name), times in seconds.items():
        if references.get(name, name) != name:
            pairs = zip(times, seconds[precision, references[name]])
            print(f"  {precision}, {name}: " + ", ".join(f"{r[0] / t[0]:.2f} {r[1] / t[1]:.2f}" for t, r in pairs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step, clocked while a real step runs.

class Stopwatch:
    """Says which part is running, forwards and backwards, and adds up its seconds.

    Forwards a part begins where its module is called. Backwards it begins where the gradient reaches the module's
    output, a place marked by a node in the graph; autograd works through nodes in the reverse order of their making, so
    a part runs to its end before the one that was called before it. So every moment belongs to exactly one part.
    """

    def __init__(self, model, device, parts, methods={}):
        self.device, self.seconds, self.current = device, defaultdict(float), None
        self.model, self.methods, self.hooks = model, methods, []
        for part, names in parts.items():
            for m in (module for name, module in model.named_modules() if re.fullmatch(names, name)):
                self.hooks.append(m.register_forward_pre_hook(lambda *_, p=part: self.mark(p, "forward")))
                self.hooks.append(m.register_forward_hook(lambda *a, p=part: self.leave(p, a[-1])))
        for part, name in methods.items():
            setattr(model, name, self.clocked(part, getattr(model, name)))      # stands before the class's own

    def mark(self, part, direction):
        time = now(self.device)
        if self.current:
            self.seconds[self.current] += time - self.since
        self.current, self.since = (part, direction), time

    def leave(self, part, output):
        if part != HEAD:                            # the loss that follows the head belongs to it
            self.mark(REST, "forward")
        if isinstance(output, tuple):               # the gradient comes through the first
            return Mark.apply(output[0], self, part), *output[1:]
        return Mark.apply(output, self, part)

    def clocked(self, part, method):
        def call(*args):
            self.mark(part, "forward")
            return self.leave(part, method(*args))
        return call

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        for name in self.methods.values():
            delattr(self.model, name)


class Mark(torch.autograd.Function):
    """The identity; tells a stopwatch that the gradient has come to this place."""

    @staticmethod
    def forward(ctx, x, stopwatch, part):
        ctx.stopwatch, ctx.part = stopwatch, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.stopwatch.mark(ctx.part, "backward")
        return gradient, None, None


def shares(seconds, names):
    """Prints and returns a row per part of one clocked step."""
    rows, total = [], sum(seconds.values())
    for part in names:
        forward, backward = seconds.get((part, "forward"), 0.0), seconds.get((part, "backward"), 0.0)
        rows.append({"part": part, "forward s": forward, "backward s": backward, "both s": forward + backward,
                     "share %": 100 * (forward + backward) / total})
    print_table(rows)
    return rows
