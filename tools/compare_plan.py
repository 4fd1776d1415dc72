"""What a comparison has to do, what it decided, and what it found so far.

    comparison = Comparison(options)                # opens OUT, where all of it is kept
    for stage in comparison.stages():               # the units of a stage may be done in any order
        for unit in stage:
            if not comparison.is_done(unit):
                result = comparison.work(unit)()            # in any process
                print(comparison.keep(unit, result))        # in this one

The stages: how fast a step of each contender is; which rate suits it; moment 1 of all runs; moment
2 of all; … and after some moments, fine-tuning for tasks.
"""

import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recipes import RECIPES
from storage import disk
from tools.compare_contenders import (CONTENDERS, Contender, common_flags, has_own_rate,
                                      read_contender, settings_of)
from tools.compare_quality import ALL, Quality, open_quality, task_scores, ways_of_asking
from tools.compare_run import Track, advance, measure_speed
from training.report import Halt

SEARCH_SEED = 100               # of the runs that search for a rate: no run of the comparison's
SEARCH_SHARE = 1 / 3            # of the training time of a run


@dataclass(frozen=True)
class Unit:
    """A piece of work that one process does on its own, and that is done again if interrupted."""
    kind: str                   # speed, rate, moment or task
    contender: Contender
    seed: int = 0
    moment: int = 0             # from 1
    factor: float = 1.0         # rate: multiple of the recipe's peak rate
    task: str = ""


class Comparison:
    """What is compared, what was decided and found so far (all of it is in OUT), what is to do."""

    def __init__(self, options):
        self.options, self.out = options, Path(options.out)
        self.quality = open_quality(options.data, options.groups, options.captions)
        added = [read_contender(line) for line in options.contender]
        everyone = [*CONTENDERS, *added]
        self.named = {contender.name: contender for contender in everyone}
        folders = {contender.folder for contender in everyone}
        if len(folders) < len(everyone) or "" in folders:
            raise ValueError("--contender: each needs a name of its own")
        unknown = set(options.only) - self.named.keys()
        if unknown:
            raise ValueError(f"--only {min(unknown)!r}: one of {', '.join(self.named)} is expected")
        self.contenders = everyone
        if options.only:
            self.contenders = [c for c in everyone if c.name in options.only or c in added]
        self.settings = {c.name: settings_of(c, options) for c in everyone}
        self.rates = self.read("rates.json", {})
        self.plan = self.read("plan.json", {"options": {}, "contenders": {}})
        self.take_plan()

    def take_plan(self):
        """Writes into the plan what is compared; ValueError if OUT is of another comparison."""
        o, planned = self.options, self.plan["contenders"]
        ours = {"data": o.data, "recipe": o.recipe, "minutes": o.minutes, "moments": o.moments,
                "decay": o.decay, "rates": o.rates, "captions": o.captions,
                "task_steps": o.task_steps, "groups": self.quality.groups,
                "split": self.quality.split, "device": o.device}
        for name, value in self.plan["options"].items():
            if ours.get(name) != value:
                raise ValueError(f"{self.out}: was begun with {name} {disk.shortened(value, 60)}, "
                                 f"not {disk.shortened(ours.get(name), 60)}; choose another --out")
        self.plan["options"] = ours
        for c in [*self.contenders, *self.searched()]:
            known = planned.setdefault(c.name, {"flags": c.flags, "steps": [], "runs": {}})
            if known["flags"] != c.flags:
                raise ValueError(f"{self.out}: {c.name!r} was begun with the flags "
                                 f"{known['flags']!r}; choose another name")
            known |= {"principal": c.principal, "objective": self.objective(c),
                      "rate_of": self.rate_source(c).name, "every_row": c.every_row}
            for seed in self.seeds(c) if c in self.contenders else []:
                known["runs"][str(seed)] = f"{c.folder}-{seed}"

    def read(self, name: str, default):
        path = self.out / name
        return disk.read_json(path) if path.exists() else default

    def write(self):
        disk.write_text(self.out / "plan.json", json.dumps(self.plan, indent=1) + "\n")
        disk.write_text(self.out / "rates.json", json.dumps(self.rates, indent=1) + "\n")

    # -- which runs --------------------------------------------------------------------------------

    def seeds(self, contender: Contender) -> range:
        """The seeds that a contender runs with."""
        every = contender.principal or self.options.all_seeds
        return range(self.options.seeds if every else 1)

    def rate_source(self, contender: Contender) -> Contender:
        """The contender whose search finds this one's rate; for one that --contender added, the
        first of the table with the same objective.
        """
        if contender in CONTENDERS:
            return self.named[contender.rate_of or contender.name]
        for known in CONTENDERS:
            if self.objective(known) == self.objective(contender) and not known.rate_of:
                return known
        return contender

    def objective(self, contender: Contender) -> str:
        return self.settings[contender.name][1].objective

    def searched(self) -> list[Contender]:
        """The contenders for which a rate is searched, each once."""
        if len(self.options.rates) == 1:
            return []
        sources = [self.rate_source(c) for c in self.contenders if not has_own_rate(c)]
        return list(dict.fromkeys(sources))

    def stages(self) -> Iterator[list[Unit]]:
        """All that there is to do. The units of a stage may be done in any order."""
        o = self.options
        everyone = dict.fromkeys([*self.contenders, *self.searched()])
        yield [Unit("speed", c) for c in everyone]
        yield [Unit("rate", c, SEARCH_SEED, 1, factor)
               for c in self.searched() for factor in o.rates]
        for k in range(1, o.moments + 1):
            yield [Unit("moment", c, seed, k)
                   for seed in range(o.seeds) for c in self.contenders if seed in self.seeds(c)]
            if k in o.task_moments:
                yield [Unit("task", c, 0, k, task=task)
                       for task in o.tasks for c in self.contenders if c.principal]

    def to_do(self) -> list[Unit]:
        return [unit for stage in self.stages() for unit in stage if not self.is_done(unit)]

    def is_done(self, unit: Unit) -> bool:
        name, known = unit.contender.name, self.plan["contenders"][unit.contender.name]
        if unit.kind == "speed":
            return "seconds_per_step" in known
        if unit.kind == "rate":
            return str(unit.factor) in self.rates.get(name, {}).get("tried", {})
        moments = self.moments(unit.contender, unit.seed)
        if unit.kind == "moment":
            return unit.moment in moments
        return unit.moment in moments and unit.task in moments[unit.moment]["tasks"]

    def moments(self, contender: Contender, seed: int) -> dict[int, dict]:
        """What was found at the moments of a run: {moment: what advance returned}."""
        found = self.read(f"{contender.folder}-{seed}/moments.json", [])
        return {moment["moment"]: moment for moment in found}

    # -- what a unit is told, and what becomes of its result ---------------------------------------

    def work(self, unit: Unit) -> Callable[[], object]:
        """The call that does a unit, for another process."""
        o, c = self.options, unit.contender
        if unit.kind == "speed":
            return partial(measure_speed, self.track(unit, self.peak_rate(c, 1.0)))
        if unit.kind == "rate":
            seconds = SEARCH_SHARE * 60 * o.minutes
            steps = self.steps_in(c, seconds, self.plan["contenders"][c.name]["seconds_per_step"])
            warmup = min(round(self.settings[c.name][0].warmup * steps), steps // 2)
            track = self.track(unit, self.peak_rate(c, unit.factor), warmup)
            return partial(try_rate, track, steps, self.quality, self.way(c))
        if unit.kind == "moment":
            steps, known = self.decide_steps(c, unit.moment), self.plan["contenders"][c.name]
            track = self.track(unit, known["rate"], known["warmup"])
            return partial(advance, track, unit.moment, steps, self.quality)
        folder = self.out / f"{c.folder}-{unit.seed}"
        return partial(task_scores, unit.task, str(folder / f"moment_{unit.moment}.pt"),
                       str(folder / f"{unit.task}_{unit.moment}"), self.task_steps(unit.task),
                       unit.seed, o.data, o.recipe, self.quality.split, o.device)

    def keep(self, unit: Unit, result) -> str:
        """Writes down what a unit found -> the same in a few words."""
        c, name = unit.contender, unit.contender.name
        if unit.kind == "speed":
            self.plan["contenders"][name]["seconds_per_step"] = result
            self.write()
            return f"{name}: {result:.3f} s a step"
        if unit.kind == "rate":
            known = self.rates.setdefault(name, {"peak": self.peak_rate(c, 1.0), "tried": {},
                                                 "by": f"{ALL}, {self.way(c)}"})
            known["tried"][str(unit.factor)] = result
            self.write()
            return f"{name} at a rate of {self.peak_rate(c, unit.factor):.1e}: {percent(result)}"
        moments = self.moments(c, unit.seed)
        if unit.kind == "moment":
            moments[unit.moment] = result
            known = result["cloze"][self.way(c)]
            groups = ", ".join(f"{group} {percent(known[group]['right'])}"
                               for group in dict.fromkeys([*list(known)[:2], ALL]))
            says = f"step {result['steps']}, {result['seconds']:.0f} s: {groups} ({self.way(c)})"
        else:
            moments[unit.moment]["tasks"][unit.task] = result
            says = ", ".join(f"{score} {percent(share)}" for score, share in result.items())
            says = f"{unit.task}: {says}"
        path = self.out / f"{c.folder}-{unit.seed}" / "moments.json"
        disk.write_text(path, json.dumps([moments[k] for k in sorted(moments)], indent=1) + "\n")
        return f"moment {unit.moment} of {name}, seed {unit.seed}: {says}"

    def track(self, unit: Unit, rate: float, warmup: int = 0) -> Track:
        c = unit.contender
        out = self.out / f"{c.folder}-{unit.seed}"
        if unit.kind == "rate":
            out = self.out / "rates" / f"{c.folder}-{unit.factor:g}"
        flags = [*common_flags(self.options), *shlex.split(c.flags), "--lr", repr(rate),
                 "--seed", str(unit.seed)]
        settings = self.settings[c.name][0]
        if settings.muon_lr:                # the search is for both rates together
            flags += ["--muon-lr", repr(settings.muon_lr * rate / settings.lr)]
        return Track(str(out), tuple(flags), warmup, self.options.decay, c.every_row)

    def way(self, contender: Contender) -> str:
        """How a contender is asked for words: from both sides where it can be."""
        return ways_of_asking(self.settings[contender.name][1])[0]

    def peak_rate(self, contender: Contender, factor: float) -> float:
        return factor * self.settings[contender.name][0].lr

    def rate(self, contender: Contender) -> float:
        """The peak rate that a contender trains with: the best one of the search."""
        if has_own_rate(contender):
            return self.peak_rate(contender, 1.0)
        if len(self.options.rates) == 1:
            return self.peak_rate(contender, self.options.rates[0])
        tried = self.rates[self.rate_source(contender).name]["tried"]
        return self.peak_rate(contender, float(max(tried, key=tried.get)))

    def steps_in(self, contender: Contender, seconds: float, per_step: float) -> int:
        steps = round(seconds / per_step)
        if steps < 4:
            raise ValueError(f"--minutes {self.options.minutes}: too short: {contender.name} has "
                             f"{steps} steps until its first moment")
        return steps

    def decide_steps(self, contender: Contender, k: int) -> int:
        """The number of steps of moment k; the first time, the rate and the warm-up too.

        They are decided once for all seeds, from what a step took until the moment before, and
        written down before anything is trained: an interrupted run goes on with the same.
        """
        known = self.plan["contenders"][contender.name]
        steps, per_step = known["steps"], known["seconds_per_step"]
        if len(steps) >= k:
            return steps[k - 1]
        if k > 1:
            before = [self.moments(contender, seed)[k - 1] for seed in self.seeds(contender)]
            per_step = sum(m["seconds"] / m["steps"] for m in before) / len(before)
        end = 60 * self.options.minutes
        steps.append(self.steps_in(contender, end * k / self.options.moments, per_step))
        if k == 1:
            share = self.settings[contender.name][0].warmup
            known["warmup"] = min(round(share * end / per_step), steps[0] // 2)
            known["rate"] = self.rate(contender)
        else:
            steps[k - 1] = max(steps[k - 1], steps[k - 2] + 1)
        self.write()
        return steps[k - 1]

    def task_steps(self, task: str) -> int:
        """Steps of fine-tuning: the same for all, and no more than the recipe has."""
        return min(self.options.task_steps, RECIPES[task][self.options.recipe]["steps"])

    def seconds_planned(self, unit: Unit) -> float:
        """Seconds of training in a unit, as far as it is known before."""
        o, end = self.options, 60 * self.options.minutes
        if unit.kind == "moment":       # of the trunk since the moment before, and the branch
            return end / o.moments * ((1 - o.decay) + o.decay * unit.moment)
        if unit.kind == "rate":
            return SEARCH_SHARE * end
        per_step = self.plan["contenders"][unit.contender.name].get("seconds_per_step", 0.2)
        if unit.kind == "speed":
            return 20 * per_step
        return 2 * per_step * self.task_steps(unit.task)    # a guess, until one was seen


def try_rate(track: Track, steps: int, quality: Quality, way: str) -> float:
    """The share of all words that a run knows at its end; 0 if its loss is not finite.

    Its weights are removed: nobody asks for them again.
    """
    known = 0.0
    try:
        known = advance(track, 1, steps, quality)["cloze"][way][ALL]["right"]
    except Halt:
        pass
    for path in Path(track.out).glob("*.pt"):
        path.unlink()
    return known


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
