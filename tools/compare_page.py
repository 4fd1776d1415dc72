"""The page of a comparison: its tables, and its pictures.

    write("runs/compare")       # compare.json, compare.md, compare.png, variants.png
"""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from storage import disk
from tools.compare_quality import ALL, BOTH
from tools.compare_result import (QUALITIES, Yardstick, add_results, collect, curves, mean_curve,
                                  yardsticks)
from tools.figures import (BLUE, GREEN, GREY, INK, ORANGE, PALE, PINK, SKY, STYLE, VERMILLION,
                           WIDTH, save)


def write(out: str | Path):
    """Writes the results of what is done so far."""
    out = Path(out)
    found = collect(out)
    add_results(found)
    disk.write_text(out / "compare.json", json.dumps(found, indent=1) + "\n")
    disk.write_text(out / "compare.md", markdown(found))
    measured = yardsticks(found)
    if measured:
        principals = [c for c in found["contenders"] if c["principal"]]
        draw(found, measured, principals or found["contenders"], out / "compare.png")
        draw(found, measured, found["contenders"], out / "variants.png")


# -------------------------------------------------------------------------------------------------
# Tables.

def markdown(found: dict) -> str:
    """The tables of compare.md."""
    o = found["options"]
    devices = {moment["device"] for contender in found["contenders"]
               for run in contender["runs"] for moment in run["moments"]}
    clock = "seconds on the GPU" if "cuda" in devices else "CPU seconds on one thread"
    parts = [f"# Quality against training time\n\n{o['data']}, recipe {o['recipe']}, "
             f"{o['minutes']:g} minutes of training ({clock}), {o['moments']} moments; "
             f"{o['captions']} captions of split {o['split']}.\n"]
    variants = {c["name"] for c in found["contenders"] if c["objective"] == "flm"}
    rivals = [row for row in found["ratios"] if row["contender"] not in variants]
    if rivals:
        parts += ["## How many times as long as FLM a rival trains, until both are equally good\n",
                  "At the best quality that the rival reaches, and at given ones that both reach. "
                  "Where it is as good with another picture, it has only learned to guess.\n",
                  ratio_table(rivals)]
    if len(rivals) < len(found["ratios"]):
        parts += ["## The same for variants of FLM\n",
                  ratio_table([row for row in found["ratios"] if row["contender"] in variants])]
    for title in dict.fromkeys(row["yardstick"] for row in found["times"]):
        rows = [row for row in found["times"] if row["yardstick"] == title]
        parts += [f"## Seconds until {title}\n", time_table(rows)]
    parts += ["## Rates that were tried\n", rate_table(found["rates"])] if found["rates"] else []
    parts += ["## Runs\n", run_table(found["contenders"])]
    return "\n".join(parts)


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def seconds_text(seconds: float | None, within: bool, last: float) -> str:
    if seconds is None:
        return f"not within {last:.0f} s"
    return f"within {seconds:.0f} s" if within else f"{seconds:.0f} s"


def ratio_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        seconds, within = row["seconds"], row["within"]
        interval = "one seed"
        if row["interval"]:
            interval = " - ".join(f"{end:.1f}" for end in row["interval"])
        if within["ours"] and within["rival"]:
            interval = ""
        at = [f"{row['at'][str(q)]:.1f}" if str(q) in row["at"] else "" for q in QUALITIES]
        lines.append([row["yardstick"], row["contender"], share(row["quality"]),
                      share(row["another"]),
                      seconds_text(seconds["rival"], within["rival"], row["last"]),
                      seconds_text(seconds["ours"], within["ours"], row["last"]),
                      ratio_text(row), interval, *at])
    return table(["yardstick", "rival", "its best", "with another picture", "reached after",
                  "FLM is there after", "ratio", "90 % interval",
                  *(f"at {100 * q:.0f} %" for q in QUALITIES)], lines)


def ratio_text(row: dict) -> str:
    """A ratio; where a time is only known to be within the first moment, which side is open."""
    within = row["within"]
    if row["ratio"] is None:
        return "FLM does not get there"
    if within["ours"] and within["rival"]:
        return "both at the first moment"
    bound = "at least " if within["ours"] else "at most " if within["rival"] else ""
    return f"{bound}{row['ratio']:.1f}"


def time_table(rows: list[dict]) -> str:
    """A row for each contender, a column for each of QUALITIES that one of them reaches."""
    reached = [q for q in QUALITIES if any(row["seconds"][str(q)] is not None for row in rows)]
    lines = []
    for row in rows:
        times = [seconds_text(row["seconds"][str(q)], str(q) in row["within"], row["last"])
                 for q in reached]
        lines.append([row["contender"], str(row["seeds"]), *times, share(row["best"]),
                      share(row["another"])])
    return table(["contender", "seeds", *(f"{100 * q:.0f} %" for q in reached), "best",
                  "with another picture"], lines)


def rate_table(rates: dict) -> str:
    lines = []
    for name, known in rates.items():
        tried = known["tried"]
        best = max(tried, key=tried.get)
        cells = []
        for factor, known_words in tried.items():
            text = f"{float(factor) * known['peak']:.1e}: {share(known_words)}"
            cells.append(f"**{text}**" if factor == best else text)
        lines.append([name, known["by"], ", ".join(cells)])
    return table(["contender", "by", "rate: words known after a third of the time"], lines)


def run_table(contenders: list[dict]) -> str:
    lines = []
    for contender in contenders:
        last = [run["moments"][-1] for run in contender["runs"]]
        steps, seconds = last[0]["steps"], np.mean([moment["seconds"] for moment in last])
        rate = f"{contender['rate']:.1e}"
        if contender["rate_of"] != contender["name"]:
            rate += f" (of {contender['rate_of']})"
        flags = contender["flags"] + (" (head on every row)" if contender["every_row"] else "")
        lines.append([contender["name"], flags, rate, str(len(last)), f"{steps:,}",
                      f"{seconds:.0f} s", f"{seconds / steps:.3f} s"])
    return table(["contender", "flags", "rate", "seeds", "steps", "training time", "a step"], lines)


# -------------------------------------------------------------------------------------------------
# The picture.

# Principals have the colour of their objective, variants have one each.
COLOURS = {"flm": BLUE, "mlm": VERMILLION, "ar": GREEN, "prefix": PINK}
VARIANTS = [SKY, ORANGE, PINK, INK, "#7F3C8D", "#8C510A", "#9A9A00", "#5A6E8C"]
DASHES = {"flm": "-", "mlm": "--", "ar": ":", "prefix": "-."}       # of variants
GROUPS_SHOWN = 2                        # the first of the groups of words; and all words
COLUMNS = 3


def styles_of(contenders: list[dict]) -> dict[str, dict]:
    """{name: colour and dashes of its curve}"""
    styles, principals, variants = {}, Counter(), 0
    for contender in contenders:
        objective = contender["objective"]
        if contender["principal"]:
            dashes = ["-", "--", ":"][principals[objective] % 3]
            styles[contender["name"]] = {"color": COLOURS[objective], "ls": dashes}
            principals[objective] += 1
        else:
            color = VARIANTS[variants % len(VARIANTS)]
            styles[contender["name"]] = {"color": color, "ls": DASHES[objective]}
            variants += 1
    return styles


def shown(found: dict, yardstick: Yardstick) -> bool:
    """Whether a yardstick has a panel: of words, the first groups, and from both sides all words"""
    if yardstick.place[0] == "tasks":
        return True
    _, way, group = yardstick.place
    return group in list(found["options"]["groups"])[:GROUPS_SHOWN] or (way, group) == (BOTH, ALL)


def draw(found: dict, measured: list[Yardstick], contenders: list[dict], path: Path):
    """Draws a panel for each yardstick, with a curve for each contender; bands span the seeds."""
    panels = [yardstick for yardstick in measured if shown(found, yardstick)]
    styles, rows = styles_of(contenders), math.ceil(len(panels) / COLUMNS)
    plt.switch_backend("Agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, COLUMNS, figsize=(WIDTH, 0.9 + 2.6 * rows),
                                    squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels):]:
            axis.axis("off")
        for axis, yardstick in zip(axes.flat, panels, strict=False):
            draw_panel(axis, yardstick, contenders, styles)
        figure.supxlabel("seconds of training", size=10)
        handles = [plt.Line2D([], [], lw=2, label=name, **style) for name, style in styles.items()]
        handles.append(plt.Line2D([], [], color=GREY, lw=0.8, label="with another picture"))
        figure.legend(handles=handles, loc="outside upper center",
                      ncols=5 if len(handles) <= 5 else 3)
        with contextlib.redirect_stdout(None):          # the command says what was written
            save(figure, str(path))


def draw_panel(axis, yardstick: Yardstick, contenders: list[dict], styles: dict):
    for contender in contenders:
        some = curves(contender, yardstick)
        if not some:
            continue
        mean, style = mean_curve(some), styles[contender["name"]]
        qualities = 100 * np.array([curve.quality for curve in some])           # (seeds, moments)
        axis.plot(mean.seconds, 100 * mean.quality, lw=1.6, marker="o", ms=2.5, **style)
        axis.fill_between(mean.seconds, qualities.min(0), qualities.max(0), lw=0, alpha=0.18,
                          color=style["color"])
        others = curves(contender, yardstick, "another")
        if others:
            mean = mean_curve(others)
            axis.plot(mean.seconds, 100 * mean.quality, lw=0.7, color=GREY, alpha=0.6)
    axis.set_title(f"{yardstick.title}, %", loc="left", size=10)
    axis.set(xlim=(0, None), ylim=(0, max(10, axis.get_ylim()[1])))
    axis.grid(color=PALE, lw=0.7)
