"""Samples of random pictures and words in the shapes of real ones: for measuring and planning.

    task = drawn_task(PretrainFLM, flm.PRESETS["base-b32"], pad_to=8)
    batch, notes = task.collate(drawn_samples(task, 64, tokens=13))
"""

from dataclasses import replace

import numpy as np
import torch

import tokenizer
from settings import Settings
from tasks import VQA, Task, shape_of

# Width and height of photographs, as COCO's are; answers, as VQAv2's list has them.
SHAPES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 500), (640, 400)]
ANSWERS = 3129


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
