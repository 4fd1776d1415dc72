"""How fast each thing is, beside another way to compute the same.

    python -m tools.bench step --precision fp32 bf16      # a training step, beside the original's
    python -m tools.bench padding FILES --tokenizer DIR   # the share of padding in real captions
    python -m tools.bench gpu --help                      # all there is to know about a GPU

Ways to compute the same are first checked to agree. Then they are measured in one process, in turns
(A B A B …), so that noise hits all of them alike. The fastest round of each way counts. On a CPU,
CPU seconds are compared, on one thread: they hardly depend on what else the machine does.

"The original" is the published FLM code. It pads captions to 50 tokens, applies the vocabulary
head to every row, and computes everything again for each pair of an image and a caption.

Letters: B batch, N captions, L text length (padded), n real tokens, P image tokens, V vocabulary.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import profile, record_function

import flm
import layers
import masks
import tokenizer
import vilt
import weights
from generate import generate
from pictures import Square, decode
from predict import match_score
from storage.tar_index import table_of
from tasks import Caption, PretrainFLM, PretrainViLT, Retrieval, to_device
from tools import gpu
from tools.bench_padding import padding
from tools.drawn import draw_photos, drawn_samples, drawn_task
from training import machine
from training.flops import count_flops
from training.settings import Settings

# -- Measuring -------------------------------------------------------------------------------------

@dataclass
class Way:
    """One of several ways to compute the same."""
    name: str
    forward: Callable                               # () -> what all ways agree in
    model: torch.nn.Module | None = None            # None: nothing to check
    optimizer: torch.optim.Optimizer | None = None  # of a training step: `forward` gives losses

    def run(self, precision, device):
        """What is measured: the forward pass, or the whole step as train.py's loop takes it."""
        autocast = torch.autocast(device.type, torch.bfloat16, precision == "bf16")
        with torch.set_grad_enabled(self.optimizer is not None), autocast:
            result = self.forward()
        if self.optimizer is not None:
            result.sum().backward()
            with record_function("optimizer"):
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                torch.nn.utils.get_total_norm(gradients)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def answer(self):
        """The result in float32, without dropout."""
        self.model.eval()
        result = self.forward()
        self.model.train(self.optimizer is not None)
        return result


def check(ways: list[Way]):
    """Raises ValueError where a way's answer differs from that of the last one.

    A difference of 1e-4 is allowed; on a GPU 1e-2, because it may compute float32 in TF32.
    """
    expected = ways[-1].answer()
    for way in ways[:-1]:
        difference = (way.answer() - expected).abs().max().item()
        if not difference <= (1e-2 if expected.is_cuda else 1e-4):      # a NaN is refused too
            raise ValueError(f"{way.name} and {ways[-1].name} do not compute the same: "
                             f"the largest difference is {difference:.3g}")


def measure(function, device) -> float:
    """Runs a function -> its CPU seconds in this process, or on a GPU its seconds there."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    began = time.process_time()
    function()
    return time.process_time() - began


def compare(ways, amount, unit, args) -> list[dict]:
    """Checks that the ways agree, measures them in turns -> rows of a table.

    amount, unit: what one run deals with, such as 4 pairs. Speed-ups are against the last way.
    """
    if ways[-1].model is not None:
        check(ways)
    seconds = {(precision, way): [] for precision in args.precision for way in range(len(ways))}
    for _ in range(1 + args.rounds):                    # the first round warms up
        for (precision, k), rounds in seconds.items():
            rounds.append(measure(partial(ways[k].run, precision, args.device), args.device))
    best = {key: min(rounds[1:]) for key, rounds in seconds.items()}
    return [{"precision": precision, "way": ways[k].name, "seconds": spent,
             f"{unit}/s": amount / spent, "speed-up": best[precision, len(ways) - 1] / spent}
            for (precision, k), spent in best.items()]


def print_table(rows):
    """Prints dicts with equal keys as columns."""
    for cells in (rows[0], *(row.values() for row in rows)):
        texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"{texts[0]:>10}{texts[1]:>32}" + "".join(f"{text:>12}" for text in texts[2:]))


# -- Training steps on random pictures and words ---------------------------------------------------

def make_batch(task_class, preset, args, pad_to, share=1):
    """A task, a batch of it on the device, and for each output: weight / number of targets.

    share: number of samples that share an image; all batches have args.batch images.
    """
    task = drawn_task(task_class, preset, Settings(max_tokens=preset.max_tokens, pad_to=pad_to))
    samples = drawn_samples(task, args.batch * share, args.tokens, args.captions, share)
    batch, notes = task.collate(samples)
    weights_of = task.config.loss_weights.items()
    scales = {name: weight / notes["counts"][name] for name, weight in weights_of}
    return task, to_device(batch, args.device, task.config), scales


def make_flm(task_class, args):
    """An FLM, its task, and the same batch and scales as we pad it and as the original does."""
    preset = flm.PRESETS[args.preset]
    ours = 8 if args.device.type == "cuda" else 1       # as train.py
    task, *short = make_batch(task_class, preset, args, ours)
    _, *long = make_batch(task_class, preset, args, max(50, args.tokens))
    torch.manual_seed(0)
    return flm.FLM(task.config).to(args.device), task, short, long


def losses(forward, batch, scales):
    """The outputs' shares in the total loss, as in train.py: (outputs,)"""
    results = forward(batch)
    return torch.stack([scales[name] * results[name][0] for name in scales])


def adamw(model):
    """An optimizer that changes nothing, so that all ways are measured on the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def flm_steps(task_class, original, args):
    """An FLM's training step: ours, on request compiled, and the original's -> Ways"""
    model, _, short, long = make_flm(task_class, args)
    forwards = {"ours": partial(losses, model, *short),
                "original": partial(losses, partial(original, model), *long)}
    if args.compile:
        forwards = {"ours, compiled": partial(losses, torch.compile(model), *short)} | forwards
    optimizer = adamw(model)
    return [Way(name, forward, model, optimizer) for name, forward in forwards.items()]


def original_pretraining(model, batch, count_hits=True):
    """The losses of FLM.forward in the original's way: the head on all L rows of all outputs.

    Rows that predict nothing are scored too and then ignored; hits are always counted. For every
    objective, without image-text matching.
    """
    ids, results = batch["ids"], {}
    text = model.encode_text(batch.get("masked_ids", ids), batch.get("first"), batch.get("last"),
                             batch.get("prefix"))
    fused = model.fuse(model.encode_image(batch["image"]), text)
    for name in model.config.loss_weights:
        rows = batch[f"{name}_rows"]
        targets = torch.full((ids.numel() + 1,), -100, device=ids.device)   # (B L + 1)
        targets[rows] = ids.flatten()[rows + masks.SHIFT[name]]
        targets = targets[:-1]      # (B L): the last one took what padding rows, -1, say
        logits = model.vocab_logits(getattr(fused, name)).flatten(0, 1)     # (B L, V)
        loss = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
        results[name] = loss, (logits.argmax(-1) == targets).float().sum()
    return results


def step(args):
    """a training step of ours beside the original's"""
    return compare(flm_steps(PretrainFLM, original_pretraining, args), args.batch, "pairs", args)


def share(args):
    """the work of a training step where 1, 2, 3 or 5 captions share an image, without padding"""
    rows = []
    for count in (1, 2, 3, 5):
        task, batch, _ = make_batch(PretrainFLM, flm.PRESETS[args.preset], args, 1, count)
        used = 3 * flops(task.config, batch) / len(batch["ids"])        # forwards and backwards
        rows.append({"captions": count, "way": "of an image", "GFLOP each": used / 1e9})
    alone = rows[0]["GFLOP each"]
    return [row | {"fewer %": 100 * (1 - row["GFLOP each"] / alone)} for row in rows]


# -- The parts of a step, by torch's profiler ------------------------------------------------------

HEAD, REST = "vocabulary head + loss", "the rest"
PARTS = {       # part -> the names of its modules
    "ViT": "vit|image_to_fusion", "embeddings": "embed", "text layers": r"text_layers\.\d+",
    "fusion layers": r"text_to_fusion|fusion_layers\.\d+",
    "reconstructor": r"(text|fusion)_reconstructor\.\d+", HEAD: "vocab_head",
    "optimizer": "-"}                                   # no module: Way.run labels it


def seconds_of_parts(events, on_gpu):
    """Adds up a profile -> {(part, "forward" or "backward"): seconds}.

    Forwards, an operation belongs to the label that it ran under. What follows the vocabulary head
    is the loss, and counts with it. Backwards, it belongs to the part of the operation to which
    autograd gave the same number.
    """
    seconds, part_of, part, backward = Counter(), {}, REST, False
    for event in events:                                # in the order in which they began
        if event.device_type.name != "CPU":
            continue                                    # a kernel: counted where it was launched
        if event.cpu_parent is None:
            backward = event.name.startswith("autograd::engine::evaluate_function")
            if backward:
                part = part_of.get(event.sequence_nr, REST)
            elif event.name in PARTS:
                part = event.name
            elif part != HEAD:
                part = REST
            spent = event.device_time_total if on_gpu else event.cpu_time_total
            seconds[part, "backward" if backward else "forward"] += spent / 1e6
        if not backward and event.sequence_nr >= 0:
            part_of[event.sequence_nr] = part           # the last one of a number is differentiated
    return seconds


def parts(args):
    """the share of each part in a training step of ours"""
    way = flm_steps(PretrainFLM, original_pretraining, args)[0]
    for part, pattern in PARTS.items():
        for name, module in way.model.named_modules():
            if re.fullmatch(pattern, name):
                module.forward = record_function(part)(module.forward)
    rows = []
    for precision in args.precision:
        way.run(precision, args.device)                 # warms up
        with profile() as profiler:
            for _ in range(args.rounds):
                way.run(precision, args.device)
        seconds = seconds_of_parts(profiler.events(), args.device.type == "cuda")
        for part in [*PARTS, REST]:
            forward, backward = seconds[part, "forward"], seconds[part, "backward"]
            share = (forward + backward) / sum(seconds.values())
            rows.append({"precision": precision, "part": part, "forward s": forward / args.rounds,
                         "backward s": backward / args.rounds, "share %": 100 * share})
    return rows


# -- ViLT's step, beside transformers' -------------------------------------------------------------

def transformers_batch(config, batch):
    """The same batch for transformers: masks of real pixels and tokens, labels everywhere."""
    pixels, ids = batch["image"], batch["ids"]
    h, w = (batch["sizes"] * config.patch_size).T[:, :, None]                       # (B, 1)
    rows, columns = (torch.arange(side, device=ids.device) for side in pixels.shape[2:])
    real = (rows < h)[:, :, None] & (columns < w)[:, None]                          # (B, H, W)
    labels = torch.full_like(ids, -100).flatten()                                   # (B L)
    labels[batch["mlm_rows"]] = ids.flatten()[batch["mlm_rows"]]
    return {"pixel_values": pixels, "pixel_mask": real.long(), "input_ids": batch["masked_ids"],
            "attention_mask": (ids != config.pad_id).long(), "labels": labels.view_as(ids)}


def vilt_step(args):
    """a step of ViLT's masked words beside transformers' ViltForMaskedLM"""
    from transformers import ViltForMaskedLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    preset = vilt.PRESETS[args.preset]
    preset = replace(preset, itm=False, dropout=0.0, max_patches=0,     # all patches are shown
                     eps=preset.text_eps)               # transformers has one for all LayerNorms
    task, batch, scales = make_batch(PretrainViLT, preset, args, pad_to=8)
    torch.manual_seed(0)
    model = vilt.ViLT(task.config).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        weights.export(model, folder)
        copy = ViltForMaskedLM.from_pretrained(folder).to(args.device).train()
    same = transformers_batch(task.config, batch)
    ways = [Way("ours", partial(losses, model, batch, scales), model, adamw(model)),
            Way("transformers", lambda: copy(**same).loss[None], copy, adamw(copy))]
    return compare(ways, args.batch, "pairs", args)


# -- Retrieval, fine-tuning for it, and captions ---------------------------------------------------

def pair_by_pair(model, batch):
    """layers.task_logits in the original's way, the image encoded for each caption -> (N, 1)"""
    images = batch["image"].repeat_interleave(len(batch["ids"]) // len(batch["image"]), dim=0)
    fused = model.fuse(model.encode_image(images), model.encode_text(batch["ids"]))
    return model.head(fused.pooled)


def original_tuning(model, batch):
    logits = pair_by_pair(model, batch).view(len(batch["image"]), -1)               # (B, captions)
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return {"retrieval": layers.loss_and_hits(logits, first)}


def tune(args):
    """a step of fine-tuning for retrieval, beside encoding the image for each caption"""
    return compare(flm_steps(Retrieval, original_tuning, args), args.batch, "images", args)


def retrieval(args):
    """images scored against captions, beside computing each pair for itself"""
    model, _, (short, _), (long, _) = make_flm(Retrieval, args)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(short["ids"], class_only=True)
    ways = [Way("captions encoded before", lambda: match_score(
                model, model.encode_image(short["image"]), text)[:, None], model),
            Way("ours", lambda: layers.task_logits(model, short), model),
            Way("original", lambda: pair_by_pair(model, long), model)]
    return compare(ways, args.batch * args.captions, "pairs", args)


def captions(args):
    """greedy captions of --tokens words, keys and values kept, beside computing all words again"""
    model, task, (batch, _), _ = make_flm(Caption, args)
    model.eval()

    def written(cache):
        visual = model.encode_image(batch["image"])
        ids, _ = generate(model, visual, [task.tok.ids["<bos>"]], [], args.tokens, cache=cache)
        return torch.tensor(ids, device=args.device)                                # (B, tokens)

    ways = [Way("kept", lambda: written(cache=True), model),
            Way("computed again", lambda: written(cache=False), model)]
    return compare(ways, args.batch, "captions", args)


# -- The loader ------------------------------------------------------------------------------------

def loader(args):
    """pictures/s of one core: the whole loader, and decoding alone in two ways"""
    with tempfile.TemporaryDirectory() as scratch:
        files = args.files or [Path(scratch) / "drawn.arrow"]
        if not args.files:
            draw_photos(files[0])
        table = table_of(files)
        photos = [table.image(row).to_pybytes() for row in range(min(len(table), 128))]
        config, tok = flm.PRESETS["base-b32"], tokenizer.BPE.train(table.texts(), 300)
        task = PretrainFLM(Settings(pad_to=1), replace(config, pooler=False), tok)
        whole = torch.utils.data.DataLoader(
            task.dataset(table, train=True), args.batch, collate_fn=task.collate,
            sampler=[(0, table.first_of(row)) for row in range(len(photos))])

        def decoded(fast):
            return [decode(photo, Square(288), fast) for photo in photos]

        print(f"{len(photos)} pictures of {sum(map(len, photos)) / len(photos) / 1000:.0f} kB")
        ways = [Way("whole loader", lambda: list(whole)),
                Way("decoding, fast as in training", lambda: decoded(fast=True)),
                Way("decoding, exact as the original", lambda: decoded(fast=False))]
        return compare(ways, len(photos), "pictures", args)


# -- FLOPs -----------------------------------------------------------------------------------------

def flops(config: flm.Config, batch: dict, forward: Callable | None = None) -> int:
    """FLOPs of a forward pass of a model with this Config, or of another way to compute it."""
    return count_flops(weights.outline_of(config), batch, forward)


# -- The command line ------------------------------------------------------------------------------

COMMANDS = {"step": step, "share": share, "parts": parts, "vilt": vilt_step, "tune": tune,
            "retrieval": retrieval, "captions": captions, "loader": loader, "padding": padding}


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", usage="python -m tools.bench COMMAND [FILES] [FLAGS]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:10} {command.__doc__}" for name, command in COMMANDS.items())
        + "\ngpu        a GPU, row by row: python -m tools.bench gpu --help")
    add = parser.add_argument
    add("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    add("files", nargs="*", type=Path, help="Arrow files of captions, of loader also tars (loader: "
        "default drawn)")
    add("--tokenizer", type=Path, default=".", help="padding: its directory (default: this one)")
    add("--preset", default="", metavar="NAME",
        help="sizes of the model, see recipes.MODELS (default: base-b32; for vilt: vilt)")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"],
        help="of the forward pass: float32, bfloat16 autocast or both (default: fp32)")
    add("--tokens", type=int, default=13, help="tokens of a caption (default: 13, COCO's mean)")
    add("--batch", nargs="+", type=int, default=[4], help="images in a batch (default: 4); "
        "with several sizes the command runs once for each")
    add("--captions", type=int, default=16, help="of an image: tune, retrieval (default: 16)")
    add("--compile", action="store_true", help="measure our step under torch.compile too")
    add("--rounds", type=int, default=3, help="how often each way is measured (default: 3)")
    add("--json", type=Path, help="file to write the numbers to (default: none)")
    args = parser.parse_args(argv)
    for name, least in (("tokens", 3), ("batch", 1), ("captions", 1), ("rounds", 1)):
        if np.min(getattr(args, name)) < least:
            parser.error(f"--{name}: at least {least} is expected")
    presets = vilt.PRESETS if args.command == "vilt" else flm.PRESETS
    args.preset = args.preset or ("vilt" if args.command == "vilt" else "base-b32")
    if args.preset not in presets:
        parser.error(f"--preset {args.preset}: {args.command} expects one of {', '.join(presets)}")
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        gpu.main(argv[1:])
        return
    args = parse(argv)
    torch.set_num_threads(1)
    results, sizes = {}, args.batch
    with machine.running("bench.py"):
        args.device = machine.set_up(args.device).device
        try:
            for args.batch in sizes:
                results[args.batch] = COMMANDS[args.command](args)
                print_table(results[args.batch])
        except torch.OutOfMemoryError:
            print(f"batches of {args.batch} do not fit into the memory")
        except ImportError as error:
            raise ValueError(error) from None
    if args.json:
        run = {"command": argv or sys.argv, "torch": torch.__version__, "device": str(args.device)}
        args.json.write_text(json.dumps(run | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
