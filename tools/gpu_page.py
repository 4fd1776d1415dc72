"""The page of what was measured on a GPU: GPU.md, gpu.png, and the numbers, gpu.json.

    python -m tools.gpu_page runs/gpu.json --out docs

Plans (training/plan.py) then take the measured utilization from docs/gpu.json. Results of a CPU or
of the small setting are refused: they are no measurements of a GPU.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from storage import disk
from tools.gpu_rows import Row, table

TITLES = {"card": "The card", "step": "Training steps", "launches": "Kernels and gaps of a step",
          "answers": "Scores and captions", "loader": "Pictures from the loader",
          "trust": "The same numbers"}
NAMES = {"peak_tflops": "TFLOP/s", "gb_per_second": "GB/s", "pairs_per_second": "pairs/s",
         "tflops": "TFLOP/s on real tokens", "gigabytes": "GB at the peak",
         "planned_gigabytes": "GB planned", "gaps": "share without a kernel",
         "coco_minutes": "minutes for COCO's 5k x 25k", "images_per_second": "images encoded/s",
         "captions_per_second": "captions/s", "pictures_per_second": "pictures/s"}


def numbers(result: dict, peak: float | None) -> str:
    """A row's numbers in words; what failed says so."""
    if "failed" in result:
        return result["failed"]
    said = []
    for key, value in result.items():
        if key == "took" or not isinstance(value, int | float):
            continue
        said.append(f"{value:,.4g} {NAMES.get(key, key.replace('_', ' '))}")
        if key == "tflops" and peak:
            said.append(f"{100 * value / peak:.1f} % of the measured peak")
    return "; ".join(said)


def page(found: dict, rows: list[Row]) -> str:
    """GPU.md."""
    measured = found["rows"]
    peaks = {name: measured.get(f"peak {name}", {}).get("peak_tflops") for name in ("bf16", "fp32")}
    cuda = f", CUDA {found['cuda']}, cuDNN {found['cudnn']}" if "cuda" in found else ""
    lines = ["# Measured on a GPU", "",
             f"{found['card']}, {found['gigabytes']:.0f} GB; {found['cores']} CPU cores; torch "
             f"{found['torch']}{cuda}. By `python -m tools.bench gpu`; this page by `python -m "
             "tools.gpu_page`. All pictures and words are drawn; texts have 13 tokens where "
             "nothing else is said. A step is train.py's, optimizer included, in bf16. \"On real "
             "tokens\" counts the matrix products that the captions need, and no padding.", "",
             "![Pairs a second and memory by micro-batch](gpu.png)", ""]
    for group, title in TITLES.items():
        some = [row for row in rows if row.group == group and row.name in measured]
        if not some:
            continue
        lines += [f"## {title}", "", "| | |", "|---|---|"]
        for row in some:
            peak = peaks["fp32" if row.told.get("precision") == "fp32" else "bf16"]
            lines.append(f"| {row.says} | {numbers(measured[row.name], peak)} |")
        lines.append("")
    missing = [row.says for row in rows if row.name not in measured]
    lines += ["## Not reached", "", ", ".join(missing) + "." if missing else "Nothing.", ""]
    return "\n".join(lines)


def draw(found: dict, rows: list[Row], path: Path):
    """Pairs a second and memory by micro-batch, and each switch beside the step without it."""
    measured = found["rows"]
    sizes, speed, memory = [], [], []
    for row in rows:
        result = measured.get(row.name, {})
        if row.name.startswith("step ") and row.name[5:].isdecimal() and "failed" not in result:
            if result:
                sizes.append(int(row.name[5:]))
                speed.append(result["pairs_per_second"])
                memory.append(result["gigabytes"])
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, values, label in ((left, speed, "pairs a second"), (middle, memory, "GB")):
        axis.plot([sizes[k] for k in order], [values[k] for k in order], "o-")
        axis.set(xlabel="micro-batch, base-b32", ylabel=label, ylim=(0, None))
    shown = [row for row in rows if row.name.startswith("two ")
             and "pairs_per_second" in measured.get(row.name, {})]
    right.barh([row.name.removeprefix("two ") for row in shown],
               [measured[row.name]["pairs_per_second"] for row in shown])
    right.set(xlabel="pairs a second, 2 x 256")
    figure.suptitle(found["card"])
    with disk.complete_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="file that python -m tools.bench gpu wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the page")
    args = parser.parse_args(argv)
    with disk.command("gpu_page.py"):
        found = disk.read_json(args.results)
        if not isinstance(found, dict) or "rows" not in found:
            raise ValueError(f"{args.results}: not a file of python -m tools.bench gpu")
        if found["small"] or "cuda" not in found:
            small = " in the small setting" if found["small"] else ""
            raise ValueError(f"{args.results}: measured on {found['card']}{small}; a page of a GPU "
                             "needs a GPU")
        rows = table()
        disk.write_text(args.out / "GPU.md", page(found, rows))
        draw(found, rows, args.out / "gpu.png")
        disk.write_text(args.out / "gpu.json", json.dumps(found, indent=1) + "\n")
        print(f"{args.out}: GPU.md, gpu.png, gpu.json")


if __name__ == "__main__":
    main(sys.argv[1:])
