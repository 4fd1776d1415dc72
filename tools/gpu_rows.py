"""What `python -m tools.bench gpu` measures: a table, the most important rows first."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tools import gpu_runs as runs
from tools import gpu_steps as steps


@dataclass(frozen=True)
class Row:
    """One question. The name is its key in the file of results."""
    name: str
    says: str               # what the page calls it
    seconds: int            # it takes about so long on an H100: guessed, until it was run
    function: Callable      # (place, **told) -> {name: number}
    told: dict = field(default_factory=dict)
    group: str = "step"     # the page's table


# Lengths of the texts of four micro-batches, as sorting deals COCO's captions: quartiles' means.
LENGTHS = (10, 12, 13, 17)
# Each switch alone, beside the row "two micro-batches".
SWITCHES = ("--chunk-loss", "--keep-casts", "--checkpoint-activations")


def table() -> list[Row]:
    """All rows, in the order in which they are measured."""
    step, base = steps.step, "base-b32 "
    rows = [
        Row("peak bf16", "matrix product, bf16", 4, steps.peak, {"precision": "bf16"}, "card"),
        Row("peak fp32", "matrix product, float32", 4, steps.peak, {"precision": "fp32"}, "card"),
        Row("copy", "copy within the memory", 4, steps.copy, {}, "card"),
        Row("parity", "against the CPU's float32; expected below 1e-4 in fp32, in bf16 below 0.01 "
            "(losses) and 0.05 (gradients)", 40, steps.parity, {}, "trust"),
        Row("step 256", base + "at 256", 20, step, {"plan": True})]
    for size in (64, 128, 512, 1024):
        rows.append(Row(f"step {size}", f"{base}at {size}", 12, step, {"micro_batch": size}))
    rows.append(Row("two micro-batches", base + "at 2 x 256", 12, step, {"lengths": (13, 13)}))
    for flag in SWITCHES:
        rows.append(Row(f"two {flag}", f"{base}at 2 x 256, {flag}", 15, step,
                        {"lengths": (13, 13), "more": (flag,)}))
    rows += [
        Row("cudnn", base + "at 256, with cuDNN's attention", 15, step, {"cudnn": True}),
        Row("step 256 compiled", base + "at 256, --compile", 90, step, {"more": ("--compile",)})]
    rows += [
        Row("score", "retrieval", 15, steps.scoring, {}, "answers"),
        Row("captions greedy", "greedy captions", 15, steps.captions, {"beams": 1}, "answers"),
        Row("captions beams", "captions, 5 beams", 20, steps.captions, {"beams": 5}, "answers"),
        Row("loader 8", "8 workers, 640 x 480", 40, runs.loader, {"workers": 8}, "loader"),
        Row("loader 8 small", "8 workers, shorter side 288", 25, runs.loader,
            {"workers": 8, "shorter": 288}, "loader"),
        Row("loader 14", "14 workers, 640 x 480", 12, runs.loader, {"workers": 14}, "loader"),
        Row("loader decoded", "4 workers, 640 x 480, --decode-on-device", 15, runs.loader,
            {"workers": 4, "on_device": True}, "loader"),
        Row("decoded", "decoded on the device against Pillow, in grey levels", 15, runs.decoded, {},
            "trust"),
        Row("loader 2", "2 workers, 640 x 480", 40, runs.loader, {"workers": 2}, "loader"),
        Row("launches 64", base + "at 64", 25, steps.launches, {"micro_batch": 64}, "launches"),
        Row("launches 256", base + "at 256", 25, steps.launches, {"micro_batch": 256}, "launches"),
        Row("vilt", "ViLT at 256", 20, step, {"model": "vilt", "plan": True}),
        Row("base-b16", "base-b16 at 128", 15, step, {"model": "base-b16", "micro_batch": 128})]
    for task, size in (("vqa", 256), ("nlvr2", 128), ("caption", 256), ("retrieval", 32)):
        rows.append(Row(f"task {task}", f"{base}{task} at {size}", 12, step,
                        {"task": task, "micro_batch": size}))
    rows += [
        Row("toy", "the toy world to 95 %", 120, runs.toy, {}, "trust"),
        Row("killed", "killed and resumed", 60, runs.killed, {}, "trust"),
        Row("precisions", "200 steps by precision", 80, runs.precisions, {}, "trust"),
        Row("large-l14-336", "large-l14-336 at 32", 30, step,
            {"model": "large-l14-336", "micro_batch": 32, "plan": True}),
        Row("large recomputed", "large-l14-336 at 128, --checkpoint-activations", 30, step,
            {"model": "large-l14-336", "micro_batch": 128,
             "more": ("--checkpoint-activations",)}),
        Row("fits", base + "with --micro-batch auto", 40, steps.fits),
        Row("ddp", base + "at 256 in DDP of one process", 15, steps.grouped, {"ddp": True}),
        Row("ddp views", base + "at 256 in DDP, --bucket-views", 15, steps.grouped,
            {"ddp": True, "more": ("--bucket-views",)}),
        Row("ddp static", base + "at 256 in DDP, --static-graph", 15, steps.grouped,
            {"ddp": True, "more": ("--static-graph",)}),
        Row("shard", base + "at 256, --shard with one process", 20, steps.grouped,
            {"more": ("--shard",)}),
        Row("step fp32", base + "at 64, float32", 12, step,
            {"precision": "fp32", "micro_batch": 64})]
    for pad in (1, 4, 8, 16):
        rows.append(Row(f"pad {pad}", f"{base}at 4 x 256, --pad-to {pad}", 15, step,
                        {"lengths": LENGTHS, "more": ("--pad-to", str(pad))}))
    rows += [
        Row("step 1024 chunked", base + "at 1024, --chunk-loss", 20, step,
            {"micro_batch": 1024, "more": ("--chunk-loss",)}),
        Row("two --compile", base + "at 2 x 256, --compile", 60, step,
            {"lengths": (13, 13), "more": ("--compile",)})]
    for name, more in (("static", steps.STATIC), ("graphs", steps.GRAPHS)):
        rows.append(Row(f"step 64 {name}", f"{base}at 64, {' '.join(more)}", 60, step,
                        {"micro_batch": 64, "more": more}))
    rows.append(Row("graphs", "gradients of two micro-batches in CUDA graphs", 60, steps.graphs, {},
                    "trust"))
    rows.append(Row("pad 8 compiled", base + "at 4 x 256, --pad-to 8 --compile", 120, step,
                    {"lengths": LENGTHS, "more": ("--pad-to", "8", "--compile")}))
    return rows
