"""What a comparison found: times to a quality, and their ratios with intervals.

    found = collect(Path("runs/compare"))       # the runs, as compare.json has them
    add_results(found)                          # … and `times`, `ratios`

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

from pathlib import Path
from typing import NamedTuple

import numpy as np

from storage import disk
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


def ratios_at(rival: Curve, ours: Curve) -> dict[str, float]:
    """The ratio at each of QUALITIES that both reach, and not by their first moments already."""
    found = {}
    for quality in QUALITIES:
        theirs, own = time_to(rival, quality), time_to(ours, quality)
        if theirs and own and not theirs.within and not own.within:
            found[str(quality)] = theirs.seconds / own.seconds
    return found


def compare(rival: list[Curve], ours: list[Curve]) -> dict:
    """The ratio of a rival (its seeds' curves) to ours, with its interval.

    -> {"quality", "seconds": {"rival", "ours"}, "within": {"rival", "ours"}, "ratio", "interval",
    "at": ratios at QUALITIES}. seconds.ours and ratio are None where ours never gets there, the
    interval is None for one seed.
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
            "ratio": ratio if own else None, "interval": interval,
            "at": ratios_at(mean_curve(rival), mean_curve(ours))}


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
