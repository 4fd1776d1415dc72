"""What a comparison found: times to a quality, their ratios with intervals, tables and pictures.

    write("runs/compare")       # compare.json, compare.md, compare.png, variants.png

A *yardstick* is one kind of quality: the colours that are known from both sides, the score in VQA.
A contender's *curve* has a point for each moment: seconds of training, quality. Between two moments
it is a straight line. Before the first one nothing is known: a quality that is there at the first
moment was reached "within" its time. The curve of several seeds is the mean of theirs, moment by
moment, of the seconds and of the quality.

The *ratio* of a rival is how many times as long as FLM it trains until both are equally good:
t_rival(q) / t_FLM(q) at the best quality q of the rival's curve. Its 90 % interval comes from a
bootstrap. 2,000 times, seeds are drawn with replacement, as many as there are, of the rival and of
FLM apart. From their mean curves come a best quality and a ratio. Of these ratios 5 % lie below the
interval and 5 % above. One counts as 0 where FLM does not get there at all, and as if FLM took all
of the time to its first moment where it is there by then: both err in the rival's favour. An
interval over three seeds is a rough one.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

import disk
from tools import plot
from tools.compare_quality import ALL, BOTH, LEFT

QUALITIES = (0.5, 0.8, 0.9, 0.95)
DRAWS = 2000
# The scores of tasks that are shown: (task, score, title).
TASK_SCORES = (("vqa", "overall", "VQA"), ("nlvr2", "accuracy", "NLVR2"),
               ("caption", "true", "captions that are true"), ("caption", "CIDEr", "CIDEr"),
               ("retrieval", "ir_r10", "R@10 of images"), ("retrieval", "tr_r10", "R@10 of texts"))


class Yardstick(NamedTuple):
    """One kind of quality, and where the record of a moment has it."""
    title: str
    place: tuple                        # ("cloze", way, group) or ("tasks", task, score)

    def of(self, moment: dict, picture: str = "right") -> float | None:
        """The quality at a moment; None if it was not measured. picture: right or another."""
        found = moment
        for key in self.place:
            if key not in found:
                return None
            found = found[key]
        if self.place[0] == "cloze":
            return found[picture]
        return found if picture == "right" else None


class Curve(NamedTuple):
    """Quality against training time, at moments. A mean of several, or one seed's."""
    seconds: np.ndarray                 # (moments,)
    quality: np.ndarray                 # (moments,)


class Reached(NamedTuple):
    """When a curve is at a quality first."""
    seconds: float
    within: bool                        # at its first moment already: so long, or less


# -------------------------------------------------------------------------------------------------
# Curves, times, ratios.

def curves(contender: dict, yardstick: Yardstick, picture: str = "right") -> list[Curve]:
    """A curve for each seed that was measured by this yardstick; over the moments that all have."""
    found = []
    for run in contender["runs"]:
        points = [(moment["seconds"], yardstick.of(moment, picture)) for moment in run["moments"]]
        points = [point for point in points if point[1] is not None]
        if points:
            found.append(np.array(points, float).T)                             # (2, moments)
    shared = min((points.shape[1] for points in found), default=0)
    return [Curve(*points[:, :shared]) for points in found]


def mean_curve(some: list[Curve]) -> Curve:
    return Curve(np.mean([curve.seconds for curve in some], axis=0),
                 np.mean([curve.quality for curve in some], axis=0))


def time_to(curve: Curve, quality: float) -> Reached | None:
    """When a curve first reaches a quality; None if it never does.

    >>> curve = Curve(np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.3, 0.2]))
    >>> time_to(curve, 0.2).seconds, time_to(curve, 0.05), time_to(curve, 0.4)
    (15.0, Reached(seconds=10.0, within=True), None)
    """
    above = np.flatnonzero(curve.quality >= quality)
    if not len(above):
        return None
    k = int(above[0])
    if k == 0:
        return Reached(float(curve.seconds[0]), True)
    (before, after), (low, high) = curve.seconds[k - 1:k + 1], curve.quality[k - 1:k + 1]
    return Reached(float(before + (after - before) * (quality - low) / (high - low)), False)


def ratio_of(rival: Curve, ours: Curve) -> tuple[float, Reached, Reached | None]:
    """t_rival / t_ours at the rival's best quality, and both times.

    The ratio is 0 where ours never gets there.
    """
    quality = rival.quality.max()
    theirs, own = time_to(rival, quality), time_to(ours, quality)
    return (theirs.seconds / own.seconds if own else 0.0), theirs, own


def compare(rival: list[Curve], ours: list[Curve]) -> dict:
    """The ratio of a rival (its seeds' curves) to ours, with its interval.

    -> {"quality", "seconds": {"rival", "ours"}, "within": {"rival", "ours"}, "ratio", "interval"}
    seconds.ours and ratio are None where ours never gets there; interval is None for one seed.
    """
    ratio, theirs, own = ratio_of(mean_curve(rival), mean_curve(ours))
    interval = None
    if len(rival) > 1 and len(ours) > 1:
        rng, drawn = np.random.default_rng(0), []
        for _ in range(DRAWS):
            some = [rival[k] for k in rng.integers(len(rival), size=len(rival))]
            others = [ours[k] for k in rng.integers(len(ours), size=len(ours))]
            drawn.append(ratio_of(mean_curve(some), mean_curve(others))[0])
        interval = np.percentile(drawn, (5, 95)).tolist()
    return {"quality": float(mean_curve(rival).quality.max()),
            "seconds": {"rival": theirs.seconds, "ours": own.seconds if own else None},
            "within": {"rival": theirs.within, "ours": own.within if own else False},
            "ratio": ratio if own else None, "interval": interval}


# -------------------------------------------------------------------------------------------------
# All of it.

def collect(out: Path) -> dict:
    """What OUT holds: the plan, and the moments of all runs."""
    path = out / "plan.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no comparison here yet")
    plan = disk.read_json(path)
    contenders = []
    for name, known in plan["contenders"].items():
        runs = []
        for seed, folder in known["runs"].items():
            moments = out / folder / "moments.json"
            if moments.exists():
                runs.append({"seed": int(seed), "moments": disk.read_json(moments)})
        if runs:
            contenders.append({"name": name} | known | {"runs": runs})
    rates = out / "rates.json"
    return {"options": plan["options"], "contenders": contenders,
            "rates": disk.read_json(rates) if rates.exists() else {}}


def yardsticks(found: dict) -> list[Yardstick]:
    """The yardsticks by which at least one contender was measured, in the order of the pictures."""
    groups = [*found["options"]["groups"], ALL]
    all_of_them = [Yardstick(f"{group}, {way}", ("cloze", way, group))
                   for way in (BOTH, LEFT) for group in groups]
    all_of_them += [Yardstick(title, ("tasks", task, score)) for task, score, title in TASK_SCORES]
    return [yardstick for yardstick in all_of_them
            if any(curves(contender, yardstick) for contender in found["contenders"])]


def add_results(found: dict):
    """Adds `times` and `ratios`: of each yardstick, of all contenders that it was applied to.

    The ratios are those of the other contenders to the first one with objective flm.
    """
    found["times"], found["ratios"] = [], []
    ours = next((c for c in found["contenders"] if c["objective"] == "flm"), None)
    for yardstick in yardsticks(found):
        for contender in found["contenders"]:
            some = curves(contender, yardstick)
            if not some:
                continue
            about = {"yardstick": yardstick.title, "contender": contender["name"]}
            mean = mean_curve(some)
            others = curves(contender, yardstick, "another")
            another = mean_curve(others).quality if others else None
            best = int(mean.quality.argmax())
            reached = {str(q): time_to(mean, q) for q in QUALITIES}
            found["times"].append(about | {
                "seeds": len(some), "last": float(mean.seconds[-1]),
                "best": float(mean.quality[best]),
                "another": None if another is None else float(another[best]),
                "seconds": {q: at and at.seconds for q, at in reached.items()},
                "within": [q for q, at in reached.items() if at and at.within]})
            if ours and contender is not ours and curves(ours, yardstick):
                own = curves(ours, yardstick)
                found["ratios"].append(about | compare(some, own) | {
                    "another": found["times"][-1]["another"],
                    "last": float(mean_curve(own).seconds[-1])})


def write(out: str | Path):
    """Writes the results of what is done so far."""
    out = Path(out)
    found = collect(out)
    add_results(found)
    disk.write_text(out / "compare.json", json.dumps(found, indent=1) + "\n")
    disk.write_text(out / "compare.md", markdown(found))
    measured = yardsticks(found)
    if measured:
        draw(found, measured, [c for c in found["contenders"] if c["principal"]],
             out / "compare.png")
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
    if found["ratios"]:
        parts += ["## How many times as long as FLM, until both are equally good\n",
                  "At the best quality that the rival reaches. Where it is as good with another "
                  "picture, it has only learned to guess.\n",
                  ratio_table(found["ratios"])]
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
        lines.append([row["yardstick"], row["contender"], share(row["quality"]),
                      share(row["another"]),
                      seconds_text(seconds["rival"], within["rival"], row["last"]),
                      seconds_text(seconds["ours"], within["ours"], row["last"]),
                      ratio_text(row), interval])
    return table(["yardstick", "rival", "its best", "with another picture", "reached after",
                  "FLM is there after", "ratio", "90 % interval"], lines)


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
    lines = []
    for row in rows:
        times = [seconds_text(row["seconds"][str(q)], str(q) in row["within"], row["last"])
                 for q in QUALITIES]
        lines.append([row["contender"], str(row["seeds"]), *times, share(row["best"]),
                      share(row["another"])])
    return table(["contender", "seeds", *(f"{100 * q:.0f} %" for q in QUALITIES), "best",
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

COLOURS = {"flm": plot.BLUE, "mlm": plot.VERMILLION, "ar": plot.GREEN, "prefix": plot.PINK}
DASHES = ["-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
GROUPS_SHOWN = 3                        # the first of the groups of words, each way; and all words


def draw(found: dict, measured: list[Yardstick], contenders: list[dict], path: Path):
    """Draws a panel for each yardstick, with a curve for each contender.

    The band spans the seeds. Contenders of one objective have one colour.
    """
    shown = {*list(found["options"]["groups"])[:GROUPS_SHOWN], ALL}
    panels = [yardstick for yardstick in measured
              if yardstick.place[0] == "tasks" or yardstick.place[2] in shown]
    styles, counted = {}, {}
    for contender in contenders:
        place = counted.setdefault(contender["objective"], 0)
        styles[contender["name"]] = {"color": COLOURS[contender["objective"]],
                                     "ls": DASHES[place % len(DASHES)]}
        counted[contender["objective"]] += 1
    columns = 4 if len(panels) > 6 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    plt.switch_backend("Agg")
    with plt.rc_context(plot.STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(plot.WIDTH, 0.8 + 2.4 * rows),
                                    squeeze=False, sharex=True, layout="constrained")
        for axis in axes.flat[len(panels):]:
            axis.axis("off")
        for axis, yardstick in zip(axes.flat, panels, strict=False):
            draw_panel(axis, yardstick, contenders, styles)
        for axis in axes[-1]:
            axis.set_xlabel("seconds of training")
        handles = [plt.Line2D([], [], lw=2, label=name, **style) for name, style in styles.items()]
        handles.append(plt.Line2D([], [], color=plot.GREY, lw=1, label="with another picture"))
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
        with contextlib.redirect_stdout(None):          # it would tell after every moment
            plot.save(figure, str(path))


def draw_panel(axis, yardstick: Yardstick, contenders: list[dict], styles: dict):
    for contender in contenders:
        some = curves(contender, yardstick)
        if not some:
            continue
        mean, style = mean_curve(some), styles[contender["name"]]
        qualities = 100 * np.array([curve.quality for curve in some])           # (seeds, moments)
        axis.plot(mean.seconds, 100 * mean.quality, lw=1.8, marker="o", ms=2.5, **style)
        axis.fill_between(mean.seconds, qualities.min(0), qualities.max(0), lw=0, alpha=0.18,
                          color=style["color"])
        others = curves(contender, yardstick, "another")
        if others:
            mean = mean_curve(others)
            axis.plot(mean.seconds, 100 * mean.quality, lw=0.7, color=plot.GREY, alpha=0.6)
    axis.set_title(f"{yardstick.title}, %", loc="left", size=10)
    axis.set(xlim=(0, None), ylim=(0, max(10, axis.get_ylim()[1])))
    axis.grid(color=plot.PALE, lw=0.7)
