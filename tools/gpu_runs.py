"""Rows of `python -m tools.bench gpu` that are whole runs; and the loader."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import flm
import tokenizer
from data import Captions
from pictures import Square, Undecoded, check_decoder, decode, keep_jpeg
from storage.disk import shortened
from storage.tar_index import table_of
from tasks import PretrainFLM
from tools.drawn import draw_photos
from tools.gpu_steps import Place
from tools.probe import IMAGES
from training.loading import decoded_ahead, load
from training.settings import Settings

ROOT = Path(__file__).parents[1]


def command(*arguments) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def run(*arguments):
    """Runs a script of the repository; ValueError with the end of what it said where it fails."""
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{arguments[0]} ended with {done.returncode}: "
                         f"{shortened(done.stderr[-1000:] or done.stdout[-1000:], 1000)}")


def world(place: Place) -> Path:
    """The folder of the toy world, drawn where it is not there."""
    folder = place.scratch / "toy"
    if not (folder / "toy_words.json").exists():
        images = ("--images", 200, "--eval-images", 40) if place.small else ()
        run("-m", "tools.toy", "make", "--out", folder, *images)
    return folder


def pretraining(place: Place, name: str, *more) -> list:
    """The arguments of a pretraining on the toy world into the folder `name`."""
    if place.small:
        more += ("--global-batch", 4, "--micro-batch", 4)
    return ["train.py", "--task", "pretrain", "--recipe", "toy", "--device", place.device.type,
            "--data", world(place), "--out", place.scratch / name, "--eval-every", 0, *more]


def losses(place: Place, name: str) -> list[float]:
    lines = (place.scratch / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def precisions(place: Place) -> dict:
    """200 steps in bf16, in fp16 with the loss scaler, and in float32, from the same weights.

    -> the mean losses of the last 50 steps, and the steps that fp16 skipped.
    """
    steps = 4 if place.small else 200
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        if place.device.type == "cpu" and precision == "fp16":
            continue                                        # too slow there, and nobody's choice
        name = f"loss_{precision}"
        if not (place.scratch / name / "last.pt").exists():
            run(*pretraining(place, name, "--precision", precision, "--steps", steps,
                             "--log-every", max(1, steps // 4)))
        found[f"loss_{precision}"] = losses(place, name)[-1]
    last = place.scratch / "loss_fp16/metrics.jsonl"
    if last.exists():
        found["skipped_fp16"] = json.loads(last.read_text().splitlines()[-1])["skipped"]
    return found


def killed(place: Place) -> dict:
    """A run that is killed (SIGKILL) and resumed, beside one that is not.

    -> the largest differences of a loss and of a weight. On GPUs some sums have another order each
    time, so they need not be 0.
    """
    steps, every = (6, 2) if place.small else (60, 20)
    more = ("--steps", steps, "--save-every", every, "--log-every", every)
    run(*pretraining(place, "whole", *more, "--resume"))
    out = place.scratch / "killed"
    if not (out / "last.pt").exists():
        process = subprocess.Popen(command(*pretraining(place, "killed", *more)), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / "last.pt").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    stopped_at = torch.load(out / "last.pt", weights_only=True, map_location="cpu")["step"]
    run(*pretraining(place, "killed", *more, "--resume"))
    one, other = losses(place, "whole"), losses(place, "killed")
    first, second = (torch.load(place.scratch / name / "last.pt", weights_only=True,
                                map_location="cpu")["model"] for name in ("whole", "killed"))
    return {"stopped_at": stopped_at,
            "loss_difference": max(abs(a - b) for a, b in zip(one, other, strict=True)),
            "weight_difference": max((first[name] - second[name]).abs().max().item()
                                     for name in first)}


def toy(place: Place) -> dict:
    """A whole pretraining on the toy world until colours and shapes are right 95 times in 100."""
    sizes = ("--flags=--steps 4 --device cpu", "--first", 2, "--captions", 20) if place.small \
        else ("--flags=--steps 700 --decay 1", "--first", 500)
    run("-m", "tools.speedrun", "--data", world(place), "--out", place.scratch / "speedrun",
        "--seeds", 1, *sizes)
    found = json.loads((place.scratch / "speedrun/seed_0.json").read_text())
    last = found["asked"][-1]
    return {"seconds_to_95": found["seconds"], "step": found["step"] or last["step"],
            "colours": last["colours"][IMAGES[0]], "shapes": last["shapes"][IMAGES[0]]}


def photos(place: Place, shorter: int = 0) -> Captions:
    """Captions of drawn JPEGs, 640 x 480 or of this shorter side; they cost what photographs do."""
    path = place.scratch / f"photos_{shorter or 480}.arrow"
    if not path.exists():
        draw_photos(path, place.scaled(2048), (shorter * 4 // 3, shorter) if shorter
                    else (640, 480))
    return table_of([path])


def loader(place: Place, workers: int, shorter: int = 0, on_device: bool = False) -> dict:
    """Pictures a second of the data loader. shorter: as in `photos`. on_device: as
    --decode-on-device has it.
    """
    table = photos(place, shorter)
    tok = tokenizer.BPE.train(table.texts(), 300)
    task = PretrainFLM(Settings(pad_to=1), replace(flm.PRESETS["base-b32"], pooler=False), tok)
    dataset = task.dataset(table, train=True)
    dataset.keeps_jpegs = on_device
    size = place.scaled(64)
    rounds = max(2, place.scaled(128) // workers)           # each worker makes a batch in a round
    numbers = [[(0, table.first_of((first + k) % len(table))) for k in range(size)]
               for first in range(0, rounds * workers * size, size)]
    batches = load(dataset, numbers, task.collate, workers, place.device)
    if on_device:
        check_decoder(place.device)
        batches = decoded_ahead(batches, place.device, 4)
    for _ in range(workers):                                # the first round starts the workers
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    place.wait()
    return {"pictures_per_second": (rounds - 1) * workers * size / (time.perf_counter() - began)}


def decoded(place: Place) -> dict:
    """Pictures decoded and resized on the device beside Pillow's, exact ones.

    -> the largest and the mean difference in grey levels; and how many of the pictures differ from
    themselves, decoded several batches at a time while the device multiplies matrices.
    """
    table, shape = photos(place), Square(224)
    check_decoder(place.device)             # or Pillow would be compared with itself
    encoded = [bytes(table.image(row)) for row in range(place.scaled(512, 8))]
    batch = Undecoded([keep_jpeg(one, shape, "a picture") for one in encoded])
    alone, unreadable = batch.decoded(place.device)
    place.wait()
    square = torch.ones(place.scaled(8192), place.scaled(8192), device=place.device)
    busy = []
    for _ in range(4):
        for _ in range(10):
            square @ square
        busy.append(batch.decoded(place.device)[0])
    exact = torch.stack([decode(one, shape) for one in encoded[:64]])
    apart = (alone[:64].cpu().int() - exact.int()).abs()
    changed = sum((some != alone).flatten(1).any(1).sum().item() for some in busy)
    return {"largest_difference": apart.max().item(),
            "mean_difference": apart.float().mean().item(), "refused": len(unreadable),
            "changed": changed}
