"""Samples of random pictures and words in the shapes of real ones: for measuring and planning.

    run = drawn_run(["--task", "pretrain", "--model", "base-b32"], machine)
    batch, notes = drawn_batch(run.task, 64, tokens=13)
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tokenizer
from recipes import MODELS
from sources.shards import Writer
from storage.files import CAPTIONS
from tasks import VQA, Task, shape_of, task_of
from training.machine import Machine
from training.runs import Run
from training.settings import Settings, parse, split_batch

# Width and height of photographs, as COCO's are; answers, as VQAv2's list has them.
SHAPES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 500), (640, 400)]
ANSWERS = 3129


def drawn_run(flags: list[str], machine: Machine, texts: int = 0) -> Run:
    """The Run that train.py would open with these flags, but for its data and its checkpoint.

    texts: of the training data, for recipes that count in epochs.
    """
    settings, config_flags = parse([*flags, "--data", "drawn", "--out", "none"])
    if settings.load:
        raise ValueError("--load: no weights are needed here; --model names their sizes")
    if settings.epochs:
        if not texts:
            raise ValueError(f"recipe {settings.recipe} counts in epochs: --texts says of how many "
                             "texts, or --steps how many steps")
        per_epoch = texts // settings.global_batch
        settings = replace(settings, steps=round(settings.epochs * per_epoch))
    micro_batch, accumulation = split_batch(settings, machine)
    preset = replace(MODELS[settings.model], **config_flags, pooler=True)
    settings = replace(settings, pad_to=settings.pad_to or 8, precision=machine.precision)
    task = drawn_task(task_of(settings.task, preset), preset, settings)
    return Run(settings, machine, task.config, task, {"train": None, "val": None}, None,
               micro_batch, accumulation, None, None, None)


def drawn_batch(task: Task, pairs: int, tokens: int) -> tuple[dict, dict]:
    """A batch of so many pairs, and its notes (Task.collate)."""
    captions = 1 + (task.settings.false_captions if task.HEAD == "retrieval" else 0)
    most = min(tokens, task.settings.max_tokens)
    return task.collate(drawn_samples(task, pairs, most, captions))


def drawn_task(task_class: type[Task], preset, settings: Settings) -> Task:
    """A task whose vocabulary is as large as the preset's, and whose words are numbers."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(5, preset.vocab_size))]
    tok = tokenizer.WordPiece({name: number for number, name in enumerate(names)})
    tok = task_class.add_special_tokens(tok)
    config = replace(preset, vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id,
                     sep_id=tok.sep_id, mask_id=tok.mask_id)
    if task_class is VQA:
        config = super(VQA, VQA).adapt(config, answers=ANSWERS)
    else:
        config = task_class.adapt(config, settings)
    max_tokens = min(settings.max_tokens, config.max_tokens)
    return task_class(replace(settings, max_tokens=max_tokens), config, tok)


def drawn_samples(task: Task, count: int, tokens: int, captions: int = 1,
                  share: int = 1) -> list[dict]:
    """Samples as a task's dataset gives them, in training.

    tokens: of each text. captions: texts of a sample, the first one true (Retrieval). share: number
    of samples that share an image.
    """
    tok, samples = task.tok, []
    for b in range(count):
        rng = np.random.default_rng([0, b])
        ids = rng.integers(5, len(tok), (captions, tokens))
        ids[:, 0], ids[:, -1] = tok.cls_id, tok.sep_id
        first, *others = ids.tolist()
        _, (width, height) = shape_of(task.config)(*SHAPES[b % len(SHAPES)])
        pictures = [torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))]
        if task.HEAD == "nlvr2":
            pictures.append(pictures[0].flip(2))
        samples.append({"ids": first, "others": others, "image": pictures[0], "images": pictures,
                        "labels": [b % ANSWERS], "scores": [1.0], "label": b % 2, "row": b,
                        "rng": rng, "train": True, "cut": False, "unreadable": [],
                        "shares_image": b % share > 0})
    return samples


def draw_photos(path: Path, count: int = 128, size: tuple[int, int] = (640, 480)):
    """Writes pictures of smooth noise, as JPEGs that cost about what a photograph costs."""
    rng = np.random.default_rng(0)
    with Writer(path, CAPTIONS) as out:
        for number in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
            jpeg = io.BytesIO()
            noise.resize(size, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
            out.write({"image": jpeg.getvalue(), "caption": ["a picture of nothing but noise"],
                       "image_id": str(number), "split": "train"})
