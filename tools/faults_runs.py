"""Disturbed runs: stopped, killed, resumed, two at once, on a disk that fails. One try each."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import torch

import weights
from tools.faults_downloads import JPEG
from tools.faults_files import arrow_bytes, rows_of
from tools.faults_tries import (BATCH, FLM, MIDDLE, ONCE, Try, command, differences,
                                differing_tensors, launch, leaves, read_checkpoint, start, wait)

ROOT = Path(__file__).resolve().parents[1]


# -- Killed and stopped runs -----------------------------------------------------------------------

def moment(t: Try, out: Path, longest: float, children: list):
    """Waits until a random moment of a run; one time in three, until it writes a file."""
    end = time.monotonic() + t.rng.uniform(0, longest)
    writing = t.rng.random() < 0.33
    if writing:
        end += longest
    while time.monotonic() < end and all(child.running() for child in children):
        if writing and list(out.glob("*.partial")):
            time.sleep(t.rng.uniform(0, 0.01))
            break
        time.sleep(0.001)


def met(children: list) -> bool:
    """Whether the processes have met: the first one speaks after that.

    Before it, launchers end the others where one died; alone they wait for it.
    """
    return bool(children[0].texts[0])


def finish(t: Try, run: str, processes: int, out: Path, what: str, faults: int):
    """Resumes a disturbed run until it is done, and compares it with an undisturbed one."""
    argv = [*t.world.run_flags(run), "--out", out, "--resume"]
    results = [wait(child, 120) for child in launch(argv, processes)]
    bad = [result for result in results if result.outcome != "ok"]
    if bad:
        t.record(what, bad[0].outcome, f"resuming: {bad[0].last_line}", bad[0].err)
        return
    found = differences(t.world.reference(run, processes), out)
    t.record(what, "wrong" if found else "ok", "; ".join(found[:4]), times=faults)
    if list(out.glob("*.partial")):
        t.wrong("a partial file is left")


def chosen_run(t: Try) -> tuple[str, int]:
    """(name, processes) of a run; the runs take turns, so that each is tried."""
    kinds = ["flm", "mlm", "vilt", "vqa"]
    return kinds[t.number % 4], 1 + (t.number // 4) % 2


def kills(t: Try):
    """SIGKILL at random moments, of all processes or of one; then resumed until done."""
    run, processes = chosen_run(t)
    out, faults = t.folder / "run", t.rng.randint(2, 4)
    longest = 0.7 * t.world.seconds[run, processes]
    what = f"{run}, {processes} process{'es' * (processes - 1)}"
    for _ in range(faults):
        children = launch([*t.world.run_flags(run), "--out", out, "--resume"], processes)
        moment(t, out, longest, children)
        one = t.rng.random() < 0.4 and processes > 1 and met(children)
        victim = t.rng.randrange(processes)
        others = [child for rank, child in enumerate(children) if one and rank != victim]
        for child in children:
            if child not in others:
                child.kill()
                wait(child)
        for child in others:            # they must notice it, and say so
            result = wait(child, timeout=45)
            if result.outcome not in ("ok", "sentence"):
                t.record(f"{what}: another one was killed", result.outcome, result.last_line,
                         result.err)
    finish(t, run, processes, out, what, faults)


def terms(t: Try):
    """SIGTERM, SIGINT or SIGUSR1 at a random moment; then resumed until done."""
    run, processes = chosen_run(t)
    out = t.folder / "run"
    number = t.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    children = launch([*t.world.run_flags(run), "--out", out, "--resume"], processes)
    moment(t, out, t.world.seconds[run, processes], children)
    begun = (out / "config.json").exists()
    told = children if t.rng.random() < 0.6 or not met(children) else [t.rng.choice(children)]
    for child in told:
        child.send(number)
    what = f"{number.name}, {processes} process{'es' * (processes - 1)}"
    results = [wait(child, timeout=30) for child in children]
    for rank, (child, result) in enumerate(zip(children, results, strict=True)):
        outcome = result.outcome
        done = outcome == "ok"                      # the signal came after the last step
        # Before training has begun, the signal itself may end a process, and then the others end.
        early = not begun and (result.killed or outcome == "sentence" and child not in told)
        if done or early or outcome in ("timeout", "traceback"):
            t.record(what, "ok" if early else outcome, result.last_line, result.err)
        elif result.code != 128 + number or result.killed:
            t.record(what, "wrong", f"process {rank} of {len(told)} that were told ends with "
                     f"code {result.code}{', by the signal itself' if result.killed else ''}: "
                     f"{result.last_line}")
        elif rank == 0 and len(result.err.strip().splitlines()) != 1:
            t.record(what, "unclear", f"{len(result.err.splitlines())} lines: {result.last_line}")
        else:
            t.record(what, "sentence")
    finish(t, run, processes, out, f"{what}: resumed", 1)


# -- Checkpoints that make no sense ----------------------------------------------------------------

MISSING = object()
ODD = [MISSING, None, "x", -5, 10 ** 9, 2 ** 70, 35.5, True, math.nan, [], {}]


def odd_tensor(tensor: torch.Tensor, how: str, rng: random.Random) -> torch.Tensor:
    match how:
        case "nan" | "inf":
            return torch.full_like(tensor, float(how))
        case "half" | "int64" | "complex64" | "float64":
            return tensor.to(getattr(torch, how))
        case "short":
            return tensor.flatten()[:1]
        case "scalar":
            return torch.tensor(1.0)
        case "long":
            return torch.zeros(tensor.numel() + 3)
    return tensor[None]                                                             # (1, …)


def changed(value, how: str, rng: random.Random):
    """A value with all of its tensors changed in the same way."""
    if isinstance(value, dict):
        return {key: changed(one, how, rng) for key, one in value.items()}
    if torch.is_tensor(value):
        return odd_tensor(value, how, rng)
    return value


def nonsense(contents: dict, rng: random.Random) -> tuple[dict, str]:
    """A checkpoint with one change that no run makes -> (contents, what was changed).

    Changes that only the one who made them could tell, such as another finite weight, are not made.
    """
    names = ["model", "optimizer", "optimizer", "step", "counters", "scaler", "settings", "config",
             "task", "files", "answers", "tokenizer", "format", "backbone"]
    way = [rng.choice(names)]
    holder = contents
    while isinstance(holder[way[-1]], dict) and holder[way[-1]] and rng.random() < 0.7:
        holder[way[-1]] = holder = dict(holder[way[-1]])
        way.append(rng.choice(list(holder)))
    value = holder[way[-1]]
    place = ".".join(map(str, way))
    if any(torch.is_tensor(one) for _, one in leaves(value)) and rng.random() < 0.7:
        how = rng.choice(["nan", "inf", "half", "int64", "complex64", "float64", "short", "scalar",
                          "long", "wrapped"])
        holder[way[-1]] = changed(value, how, rng)
        return contents, f"{place}: tensors {how}"
    odd = rng.choice(ODD)
    if odd is MISSING:
        del holder[way[-1]]
        return contents, f"{place}: missing"
    holder[way[-1]] = odd
    return contents, f"{place}: {odd!r}"


def save_again(contents: dict, path: Path):
    """Writes a checkpoint with sums that are right, where what it holds can be written so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = ("format", "backbone", "config", "task", "tokenizer", "model")
    more = {name: value for name, value in contents.items() if name not in given}
    try:
        config = weights.config_of(contents)
        weights.save(path, contents["model"], config, contents["task"], contents["tokenizer"],
                     **more)
    except Exception:               # whatever nonsense leads to
        torch.save(contents, path)


def resume(t: Try):
    """A last.pt whose training state makes no sense: refused, or resumed to the same weights."""
    reference = t.world.reference("flm", 1)
    contents, what = nonsense(read_checkpoint(reference / f"step_{MIDDLE}.pt"), t.rng)
    path = t.folder / "run" / "last.pt"
    save_again(contents, path)
    part = what.split(".")[0].split(":")[0]
    result = t.run("train.py", *t.world.run_flags("flm"), "--out", path.parent, "--resume",
                   names=[path], what=f"--resume ({part})")
    t.records[-1]["words"] = f"{what} | {result.last_line}"
    if result.outcome == "ok" and differing_tensors(reference / "last.pt", path, ["model"]):
        t.wrong(f"{what} | it was resumed from, to other weights")


# -- Two writers -----------------------------------------------------------------------------------

def writers(t: Try):
    """Two runs in one folder; two that save one file; two prepare.py with the same output."""
    [two_runs, two_savers, two_conversions][t.number % 3](t)


def two_runs(t: Try):
    out = t.folder / "run"
    argv = [*t.world.run_flags("flm"), "--out", out, "--resume"]
    children = [start(command("train.py", argv))]
    time.sleep(t.rng.uniform(0, t.world.seconds["flm", 1]))
    children.append(start(command("train.py", argv)))
    results = [wait(child, names=[out]) for child in children]
    for result in results:
        t.record("two runs in one folder", result.outcome, result.last_line, result.err)
    finish(t, "flm", 1, out, "two runs in one folder: the result", 1)


def two_savers(t: Try):
    path = t.folder / "last.pt"
    contents = read_checkpoint(t.world.model("flm"))
    contents["optimizer"] = {"x": torch.ones(3_000_000)}

    def save_often():
        for _ in range(15):
            save_again(contents, path)

    children = [start(save_often), start(save_often)]
    reads, broken = 0, ""
    while all(child.running() for child in children):
        if path.exists():
            reads += 1
            try:
                weights.read(path)
            except ValueError as error:
                broken = str(error)
    for child in children:
        result = wait(child)
        t.record("two savers of one file", result.outcome, result.last_line, result.err)
    t.record("reads of that file", "wrong" if broken else "ok", broken, times=max(1, reads))


def two_conversions(t: Try):
    source = caption_list(t, t.folder / "source", 150)
    out = t.folder / "out"
    argv = ["jsonl", source, "--out", out, "--workers", 1, "--shorter", 64]
    convert = command("prepare.py", argv)
    children = [start(convert)]
    time.sleep(t.rng.uniform(0, 0.3))
    children.append(start(convert))
    for child in children:
        result = wait(child, names=[out])
        t.record("two prepare.py at once", result.outcome, result.last_line, result.err)
    made = out / "list_caption_train.arrow"
    result = t.run("prepare.py", "check", made, "--workers", 1, what="what they wrote")
    if result.outcome != "ok" or pa.ipc.open_file(str(made)).read_all().num_rows != 150:
        t.wrong("they left a file that is not whole")


def caption_list(t: Try, folder: Path, count: int) -> Path:
    """Pictures with names in other scripts, and a list of them for prepare.py."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        (folder / f"é {number}.jpg").write_bytes(JPEG)
        lines.append(json.dumps({"image": f"é {number}.jpg", "caption": f"a café 😀 {number}"},
                                ensure_ascii=False))
    (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "list.jsonl"


# -- The disk --------------------------------------------------------------------------------------

def disk_faults(t: Try):
    """A full disk, forbidden places, files for folders, odd names, another locale."""
    kinds = [full_disk, forbidden, in_the_way, odd_names]
    if t.number == 4:                   # slow: new interpreters
        c_locale(t)
    else:
        kinds[t.number % 4](t)


def writing_commands(t: Try, out: Path) -> dict[str, list]:
    """Title -> a command line that writes to a path."""
    source = t.folder / "source" / "list.jsonl"
    if not source.exists():
        caption_list(t, source.parent, 30)
    flm, data = t.world.model("flm"), t.world.data
    return {
        "train.py": ["train.py", *FLM, *BATCH, *ONCE, "--data", data, "--out", out],
        "convert": ["weights.py", "convert", flm, out / "x.pt"],
        "jsonl": ["prepare.py", "jsonl", source, "--out", out, "--workers", 1],
        "toy make": ["toy.py", "make", "--out", out, "--images", 20, "--eval-images", 5,
                     "--workers", 1],
        "tokenizer train": ["tokenizer.py", "train", source, "--vocab-size", 280, "--out", out],
        "eval.py vqa": ["eval.py", "vqa", t.world.model("vqa"), "--data", data, "--out", out]}


def full_disk(t: Try):
    """The system refuses to write more than so many bytes into a file."""
    limits = {resource.RLIMIT_FSIZE: t.rng.choice([20_000, 50_000, 100_000, 200_000, 400_000])}
    if t.rng.random() < 0.5:
        title, argv = t.rng.choice(list(writing_commands(t, t.folder / "out").items()))
        if argv[0] in ("prepare.py", "toy.py", "tokenizer.py"):     # no temporary files
            limits = {resource.RLIMIT_FSIZE: t.rng.choice([100, 1_000, 10_000])}
        t.run(*argv, names=[t.folder], limits=limits, what=f"full disk: {title}")
        left = t.folder / "out"
    else:
        left = t.folder / "run"
        left.mkdir()
        reference = t.world.reference("flm", 1)
        shutil.copy(reference / f"step_{MIDDLE}.pt", left / "last.pt")
        (left / "metrics.jsonl").write_text("")
        t.run("train.py", *t.world.run_flags("flm"), "--out", left, "--resume", names=[left],
              limits=limits, what="full disk: --resume")
        whole = read_checkpoint(left / "last.pt")["step"]
        if t.records[-1]["outcome"] == "sentence" and whole < MIDDLE:
            t.wrong("the old checkpoint is gone")
    if list(left.rglob("*.partial")):
        t.wrong("a partial file is left")


def forbidden(t: Try):
    """A folder or a file that another user may not use."""
    user = 65534 if os.getuid() == 0 else None
    closed = t.folder / "closed"
    closed.mkdir()
    t.folder.chmod(0o777)
    t.folder.parent.chmod(0o755)
    if t.rng.random() < 0.5:
        title, argv = t.rng.choice(list(writing_commands(t, closed / "out").items()))
        closed.chmod(0o555)
        t.run(*argv, names=[closed], user=user, what=f"forbidden: {title}")
        return
    shutil.copytree(t.world.data, closed / "data")
    shutil.copytree(t.world.tokenizer, closed / "tok")
    shutil.copy(t.world.model("flm"), closed / "last.pt")
    for path in (closed / "last.pt", closed / "tok" / "vocab.json", closed / "data" /
                 "toy_caption_train.arrow"):
        path.chmod(0)
    closed.chmod(0o755)
    train = ["train.py", *FLM, *BATCH, *ONCE, "--out", t.folder / "run", "--data"]
    title, argv = t.rng.choice([
        ("data", [*train, closed / "data"]),
        ("--tokenizer", [*train, t.world.data, "--tokenizer", closed / "tok"]),
        ("--load", [*train[:1], "--load", closed / "last.pt", *BATCH, *ONCE, "--out",
                    t.folder / "run", "--data", t.world.data]),
        ("info", ["weights.py", "info", closed / "last.pt"]),
        ("check", ["prepare.py", "check", closed / "data" / "toy_caption_train.arrow"])])
    result = t.run(*argv, names=[closed], user=user, what=f"forbidden to read: {title}")
    if result.outcome == "sentence" and "not a complete" in result.err + result.out:
        t.wrong(f"a forbidden file is said to be damaged: {result.last_line}")


def in_the_way(t: Try):
    """A file where a folder should be, or a folder where a file should be."""
    if t.rng.random() < 0.5:
        out = t.write("file", b"x") / t.rng.choice(["", "below"])
        title, argv = t.rng.choice(list(writing_commands(t, out).items()))
        t.run(*argv, names=[t.folder / "file"], what=f"a file in the way: {title}")
        return
    name = t.rng.choice(["last.pt", "metrics.jsonl", "config.json", "tokenizer/vocab.json"])
    out = t.folder / "run"
    (out / name).mkdir(parents=True)
    t.run("train.py", *FLM, *BATCH, *ONCE, "--data", t.world.data, "--out", out, "--resume",
          names=[out], what=f"a folder called {name}")


ODD_NAMES = ["with space", "ünïcødé 😀", "new\nline", "quote'\"$HOME`x`", "-dash", "percent%s{x}",
             "x" * 200, "star*[a]?"]


def odd_names(t: Try):
    """Folders with odd names, from raw captions to a model that fills a blank."""
    folder = t.folder / t.rng.choice(ODD_NAMES)
    listed = caption_list(t, folder / "source", 20)
    arrow, model = folder / "data" / "mine_caption_train.arrow", folder / "run" / "last.pt"
    train = [*FLM, *BATCH, *ONCE, "--data", arrow.parent, "--out", model.parent]
    for name, *argv in (
            ("prepare.py", "jsonl", listed, "--out", arrow.parent, "--name", "mine"),
            ("prepare.py", "check", arrow), ("train.py", *train), ("train.py", *train, "--resume"),
            ("weights.py", "info", model), ("weights.py", "convert", model, folder / "x.pt"),
            ("eval.py", "fill", model, listed.parent / "é 0.jpg", "a <mask>")):
        if t.run(name, *argv, what=f"odd names: {name}").outcome != "ok":
            t.wrong(f"folder {folder.name!r}: {t.records[-1]['words']}")


def c_locale(t: Try):
    """File names and captions beyond ASCII, where the locale knows only ASCII."""
    listed = caption_list(t, t.folder / "source é", 30)
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arrows, run = t.folder / "data é", t.folder / "run é"
    for argv in (["prepare.py", "jsonl", listed, "--out", arrows],
                 ["train.py", *FLM, *BATCH, *ONCE, "--data", arrows, "--out", run],
                 ["eval.py", "fill", run / "last.pt", listed.parent / "é 0.jpg", "a café <mask>"]):
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, timeout=120,
                              capture_output=True)
        err = done.stderr.decode(errors="replace")
        outcome = "traceback" if "Traceback" in err else "ok" if done.returncode == 0 else "wrong"
        t.record(f"C locale: {argv[0]}", outcome, err.strip()[-200:], err)
        if outcome != "ok":
            return


def descriptors(t: Try):
    """1,000 Arrow files where 256 may be open, trained on and checked."""
    contents = arrow_bytes(rows_of(t, "caption").slice(0, 1))
    for number in range(1000):
        t.write(f"data/mine_{number:05}.arrow", contents)
    limits = {resource.RLIMIT_NOFILE: 256}
    out = t.folder / "run"
    train = [*FLM, *BATCH, *ONCE, "--data", t.folder / "data", "--out", out]
    for name, *argv in (("train.py", *train), ("train.py", *train, "--steps", 1, "--resume"),
                        ("prepare.py", "check", "--fast", *sorted((t.folder / "data").iterdir()))):
        result = t.run(name, *argv, what=f"1,000 files: {name}", limits=limits, timeout=120)
        if result.outcome == "sentence":
            t.wrong(result.last_line)
