"""One table of tasks: what each reads, what it adds to a batch, its losses and defaults; and one of published recipes.

`task_of(name, config)(settings, config, tok)` gives the training loop all that is particular to a task; `RECIPES[task][name]`
are the settings of a published command, as `train.py --task task --recipe name` uses and prints them; `MODELS[name]` the
sizes of a model.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import flm
import vilt
from data import (CLIP_MEAN, CLIP_STD, FILES, CaptionDataset, Captions, Questions, Square, Statements, Whole, find_files,
                  known_datasets, mask_words, normalize, pad_pictures, pad_texts, read_json)

MODELS = flm.PRESETS | vilt.PRESETS

# Settings of train.py; whatever a recipe does not name keeps train.py's default, and a flag overrides both.
PRETRAINING = {
    # The drawn world of toy.py. The ViT and the text layers learn at a third of the others' rate: at the full one, what patches
    # show soon drowns where they are (docs/LOG.md).
    "toy": dict(model="toy", steps=4000, global_batch=32, micro_batch=32, bucket=16, lr=3e-4, warmup=0.05, head_lr_scale=3.3,
                fusion_lr_scale=3.3, clip=1.0, eval_every=800, eval_samples=1000, log_every=100, save_every=400),
}
# Some more of it, with image-text matching beside: that is what first trains the class vector, which tasks read.
PRETRAINING["toy-itm"] = PRETRAINING["toy"] | dict(steps=2000, itm=True)
PRETRAINING |= {
    # A small model for a few thousand photographs of one's own, from scratch.
    "small": dict(model="small", steps=2000, global_batch=64, micro_batch=32, lr=5e-4, warmup=0.05, head_lr_scale=1.0,
                  fusion_lr_scale=1.0, clip=1.0, eval_every=250, log_every=20),
    # The paper's pretraining on COCO, VG, SBU and CC3M: 30,000 steps of 4,096 pairs at 288 pixels.
    "flm-b32": dict(model="base-b32", image_size=288, steps=30_000, global_batch=4096, micro_batch=64, lr=8e-5,
                    warmup=0.05, head_lr_scale=5.0, fusion_lr_scale=5.0, max_tokens=50, datasets=("coco", "vg", "sbu", "gcc")),
}
# The objectives that the paper compares with, under the same recipe.
PRETRAINING |= {f"{objective}-b32": PRETRAINING["flm-b32"] | dict(objective=objective) for objective in ("mlm", "ar", "prefix")}

# ViLT's paper, on the same four datasets: 2,500 steps of warm-up however long the run.
PRETRAINING |= {f"vilt-{steps // 1000}k": dict(
    model="vilt", steps=steps, global_batch=4096, micro_batch=64, lr=1e-4, warmup=2500 / steps, head_lr_scale=1.0,
    max_tokens=40, datasets=("coco", "vg", "sbu", "gcc")) for steps in (25_000, 50_000, 100_000, 200_000)}
# COCO alone, as ColossalAI's example trains it: 16 accumulated batches of 256, Adam without decay. (That example has masked
# words only; `--no-itm` leaves the others out here too.)
PRETRAINING["vilt-coco"] = PRETRAINING["vilt-25k"] | dict(datasets=("coco",), lr=1e-3, beta2=0.99, weight_decay=0.0,
                                                          clip=1.0, micro_batch=256)
PRETRAINING["vilt-toy"] = PRETRAINING["toy"] | dict(model="vilt-toy", max_tokens=40, steps=3000, lr=2.5e-3, head_lr_scale=1.0,
                                                  fusion_lr_scale=1.0)
PRETRAINING["vilt-small"] = PRETRAINING["small"] | dict(model="vilt-small", max_tokens=40)

# Fine-tuning. FLM's published commands (--load names what it starts from), then ViLT's.
FLM_TUNING = dict(model="base-b32", warmup=0.1, augment=True, fusion_lr_scale=5.0, head_lr_scale=5.0, max_tokens=50)
VILT_TUNING = dict(model="vilt", warmup=0.1, augment=True, epochs=10, lr=1e-4, head_lr_scale=1.0, max_tokens=40)
TOY_TUNING = dict(model="toy", steps=1600, global_batch=64, micro_batch=64, bucket=16, lr=1e-4, warmup=0.05, head_lr_scale=10.0,
                  fusion_lr_scale=5.0, clip=1.0, eval_every=400, eval_samples=500, log_every=100, save_every=400)
RECIPES = {
    "pretrain": PRETRAINING,
    "vqa": {
        "flm-b32": FLM_TUNING | dict(datasets=("vqav2",), image_size=576, epochs=10, global_batch=512, lr=5e-6, head_lr_scale=50.0),
        "vilt": VILT_TUNING | dict(datasets=("vqav2",), global_batch=256, head_lr_scale=10.0),
        "toy": TOY_TUNING},
    "nlvr2": {
        "flm-b32": FLM_TUNING | dict(datasets=("nlvr2",), image_size=288, epochs=10, global_batch=256, lr=1e-5, head_lr_scale=10.0),
        "vilt": VILT_TUNING | dict(datasets=("nlvr2",), global_batch=128),
        # So slowly, or noise wears off what the VQA model knows before the head has begun to compare (docs/LOG.md).
        "toy": TOY_TUNING | dict(global_batch=32, micro_batch=32, lr=2e-5, head_lr_scale=50.0)},
    "caption": {
        "flm-b32": FLM_TUNING | dict(datasets=("coco",), image_size=288, epochs=20, global_batch=256, lr=3e-6),
        "toy": TOY_TUNING | dict(steps=2400, global_batch=32, micro_batch=32, lr=2e-4, head_lr_scale=5.0)},
    "retrieval": {
        "flm-b32": FLM_TUNING | dict(datasets=("f30k",), image_size=384, epochs=10, global_batch=512, lr=5e-6),
        "flm-b32-coco": FLM_TUNING | dict(datasets=("coco",), image_size=384, epochs=10, global_batch=512, lr=5e-6),
        "vilt": VILT_TUNING | dict(datasets=("f30k",), global_batch=256),
        "vilt-coco": VILT_TUNING | dict(datasets=("coco",), global_batch=256),
        "toy": TOY_TUNING | dict(steps=240, global_batch=16, micro_batch=16, false_captions=7, lr=5e-5, eval_every=120)},
}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, as each backbone takes them.

def shape_of(config):
    """The shape that a model's pictures are resized to: CLIP's square, or ViLT's whole picture."""
    if isinstance(config, vilt.Config):
        return Whole(config.image_size, config.patch_size)
    return Square(config.image_size)


def normalized(config, images):
    """uint8 (B, 3, H, W) -> float32, by the mean and deviation that the model's weights were trained with."""
    mean, std = (vilt.MEAN, vilt.STD) if isinstance(config, vilt.Config) else (CLIP_MEAN, CLIP_STD)
    return normalize(images, mean, std)


def patch_layout(config, pictures, rngs=None):
    """What a model must know of a batch's pictures (3, h, w) beside their pixels: nothing (FLM), sizes and patches (ViLT).

    ViLT in training shows at most max_patches patches of each, drawn by `rngs`; without rngs it shows all.
    """
    if not isinstance(config, vilt.Config):
        return {}
    sizes = [[side // config.patch_size for side in picture.shape[1:]] for picture in pictures]
    columns = max(w for _, w in sizes)                                      # of the padded grid
    limit = config.max_patches if rngs else 0
    chosen = [vilt.some_patches(h, w, limit, rng) for (h, w), rng in zip(sizes, rngs or [None] * len(sizes))]
    patches = torch.full((len(pictures), max(len(row) for row, _ in chosen)), -1)
    for place, (row, column) in zip(patches, chosen):
        place[:len(row)] = torch.from_numpy(row * columns + column)
    return {"sizes": torch.tensor(sizes), "patches": patches}


# ---------------------------------------------------------------------------------------------------------------------
# What all tasks share.

# Which of a model's parameters learn at head_lr_scale and fusion_lr_scale times the rate, by the beginning of their names; the others
# are the group "base".
GROUPS = {
    flm.Config: {"head": ("vocab_head.", "itm_head.", "head."),
                 "fusion": ("text_to_fusion.", "image_to_fusion.", "fusion_layers.", "text_reconstructor.",
                            "fusion_reconstructor.", "pooler.")},
    vilt.Config: {"head": ("vocab_head.", "itm_head.", "patch_head.", "head.")},
}
UNDECAYED = ("vit.position", "image_position", "position")        # tables that weight decay leaves alone, beside all vectors


class Task:
    """What all tasks share: a table of texts with their pictures, and how samples become a batch."""

    KIND, TABLE = "caption", Captions
    targets = True          # whether batches hold what the loss needs, or (eval.py) only what is shown and asked

    @classmethod
    def adapt(cls, config, settings=None, answers=0):
        """The model's Config as the task needs it: only parameters that are trained exist."""
        patches = {"mpp": False} if isinstance(config, vilt.Config) else {}
        return replace(config, head=cls.HEAD, answers=answers, pooler=True, itm=False, **patches)

    @staticmethod
    def add_special_tokens(tok):
        """The tokenizer as the task needs it."""
        return tok

    @classmethod
    def table(cls, settings, split):
        """The texts of a split, or None where the datasets have no such split."""
        files = find_files(settings.data, settings.datasets, split, cls.KIND)
        return cls.TABLE(files) if files else None

    def __init__(self, settings, config, tok):
        self.settings, self.config, self.tok = settings, config, tok

    def dataset(self, table, train, dataset_class=CaptionDataset, **more):
        s = self.settings
        return dataset_class(table, self.tok, shape_of(self.config), s.max_tokens, train, s.seed, s.augment and train, **more)

    def collate(self, samples):
        """Samples -> (batch, notes). The batch is a dict of tensors for the model; the notes stay on the host.

        What is random is drawn here, from each sample's own generator: masked words, prefixes, hidden spans, patches, and
        which rows predict. So the loop knows the number of targets without asking the device.
        """
        c, texts = self.config, self.texts(samples)
        rngs = [sample["rng"] for sample in samples] if samples[0]["train"] else None
        batch = {"image": pad_pictures([sample["image"] for sample in samples]),
                 "ids": pad_texts(texts, c.pad_id, self.settings.pad_to, c.max_tokens)}
        batch |= patch_layout(c, [sample["image"] for sample in samples], rngs)
        counts = self.draw(samples, batch)
        notes = {"counts": counts, "samples": len(samples), "tokens": sum(map(len, texts)),
                 "padded_tokens": batch["ids"].numel(), "cut": sum(sample["cut"] for sample in samples),
                 "unreadable": [line for sample in samples for line in sample["unreadable"]]}
        return batch, notes

    def texts(self, samples):
        """The token ids of the batch's texts, in order."""
        return [sample["ids"] for sample in samples]

    def draw(self, samples, batch):
        """Adds to the batch what the model's `forward` asks for -> the number of targets of each loss."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining.

class Pretrain(Task):
    """Image-caption pairs; what is hidden of them and asked for is the backbone's."""

    @classmethod
    def adapt(cls, config, settings=None):
        """Without image-text matching nothing trains the pooler."""
        return replace(config, pooler=config.itm)

    def __init__(self, settings, config, tok):
        super().__init__(settings, config, tok)
        special = [tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id]
        self.words = np.setdiff1d(np.arange(len(tok)), special)             # what mlm's random tokens are drawn from

    def mask_words(self, samples, batch, rate=1.0):
        """Masks words of every caption: adds `masked_ids` (B, L) to the batch -> their places, int64 (targets,) in B L.

        rate: the share of the masked words that is asked for.
        """
        masked, picks = batch["ids"].clone(), []
        for b, sample in enumerate(samples):
            ids, starts = sample["ids"], self.tok.word_starts(sample["ids"][1:-1])
            masked_ids, picked = mask_words(ids, starts, self.config.mask_rate, self.config.mask_id, self.words, sample["rng"])
            masked[b, :len(ids)] = torch.from_numpy(masked_ids)
            if rate < 1:
                picked = picked[sample["rng"].random(len(picked)) < rate]
            picks.append(b * masked.shape[1] + picked)
        batch["masked_ids"] = masked
        return torch.from_numpy(np.concatenate(picks))

    @staticmethod
    def other_pictures(samples):
        """A wrong picture for every caption, from the batch: that of the caption so many places on.

        -> (index (B,) of its picture, (B,) whether that happens to be the right one all the same)
        """
        B = len(samples)
        shift = int(samples[0]["rng"].integers(1, max(2, B)))
        other = (torch.arange(B) + shift) % B
        row = torch.tensor([sample["row"] for sample in samples])
        return other, row == row[other]


class PretrainFLM(Pretrain):
    """Language modeling with any of flm.OBJECTIVES, image-text matching beside it on request."""

    def draw(self, samples, batch):
        c = self.config
        if not samples[0]["train"]:         # evaluation hides from each word itself only, and asks for every word
            c = replace(c, corruption_rate=0.0, prediction_rate=1.0)
        B, L = batch["ids"].shape
        outputs = [name for name in c.loss_weights if name != "itm"]
        if c.objective == "mlm":
            batch["reconstructed_rows"] = self.mask_words(samples, batch, c.prediction_rate)
        else:
            rows, prefixes, spans = {name: [] for name in outputs}, [], []
            for b, sample in enumerate(samples):
                rng, n, prefix = sample["rng"], len(sample["ids"]), 0
                if c.objective == "prefix":
                    prefix = int(rng.integers(0, max(1, n - 2)))            # at least one word is left to predict
                prefixes.append(prefix)
                spans.append(flm.draw_spans(n, L, c.corruption_rate, rng) if c.corruption_rate else None)
                for name, positions in flm.predicting_rows(c.objective, n, prefix).items():
                    positions = np.asarray(positions, dtype=np.int64)
                    if c.prediction_rate < 1:
                        positions = positions[rng.random(len(positions)) < c.prediction_rate]
                    rows[name].append(b * L + positions)
            batch |= {f"{name}_rows": torch.from_numpy(np.concatenate(rows[name])) for name in outputs}
            if c.objective == "prefix":
                batch["prefix"] = torch.tensor(prefixes)
            if c.corruption_rate and c.objective == "flm":
                batch["first"], batch["last"] = (torch.from_numpy(np.stack(ends)) for ends in zip(*spans))
        counts = {name: len(batch[f"{name}_rows"]) for name in outputs}
        if c.itm:
            batch["other_image"], batch["same_image"] = self.other_pictures(samples)
            counts["itm"] = 2 * B
        return counts


class PretrainViLT(Pretrain):
    """Masked words, image-text matching with word-patch alignment, masked patches on request."""

    def draw(self, samples, batch):
        c, B, rng = self.config, len(samples), samples[0]["rng"]
        batch["mlm_rows"] = self.mask_words(samples, batch)
        counts = {"mlm": len(batch["mlm_rows"])}
        if c.itm:                           # half of the captions are shown another's picture
            other, same = self.other_pictures(samples)
            right = torch.zeros(B, dtype=torch.bool)
            right[torch.from_numpy(rng.permutation(B)[:-(-B // 2)])] = True
            batch["image_of"] = torch.where(right, torch.arange(B), other)
            batch["same_image"] = right | same
            counts |= {"itm": B, "wpa": B} if c.wpa_weight else {"itm": B}
        if c.mpp:
            picked = np.zeros(batch["patches"].shape, dtype=bool)
            hidden = picked.copy()
            for sample, real, p, h in zip(samples, (batch["patches"] >= 0).sum(1).tolist(), picked, hidden):
                p[:real] = sample["rng"].random(real) < c.patch_mask_rate
                h[:real] = p[:real] & (sample["rng"].random(real) < 0.8)    # the others stay, and are asked for too
            batch["mpp_rows"] = torch.from_numpy(np.flatnonzero(picked))
            batch["hidden_patches"] = torch.from_numpy(hidden)
            counts["mpp"] = 3 * len(batch["mpp_rows"])
        return counts


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning.

class VQA(Task):
    """Which of the answer list is the answer? Soft targets, as ten people answered."""

    KIND, TABLE, HEAD = "vqa", Questions, "vqa"

    @classmethod
    def adapt(cls, config, settings=None):
        return super().adapt(config, answers=len(cls.answers(settings)))

    @classmethod
    def answers(cls, settings):
        """The answer list that belongs to the data: a list of strings, the position is the label."""
        names = settings.datasets or known_datasets(settings.data, cls.KIND)
        if len(names) > 1:
            raise ValueError(f"{settings.data}: holds questions of {', '.join(names)}, each with an answer list of its own; "
                             f"--datasets must name one")
        path = Path(settings.data) / f"{names[0]}{'' if names[0] in FILES[cls.KIND] else '_vqa'}_answers.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no answer list; prepare.py writes it beside the questions")
        return read_json(path, list)

    def draw(self, samples, batch):
        if not self.targets:
            return {"vqa": len(samples)}
        targets = torch.zeros(len(samples), self.config.answers)
        for target, sample in zip(targets, samples):
            if sample["labels"] and max(sample["labels"]) >= len(target):
                raise ValueError(f"question {sample['question_id']}: label {max(sample['labels'])} is past the end of the "
                                 f"answer list, which has {len(target)} answers")
            target[sample["labels"]] = torch.tensor(sample["scores"], dtype=torch.float32)
        batch["targets"] = targets
        return {"vqa": len(samples)}


class NLVR2(Task):
    """Is the statement true of the two pictures?"""

    KIND, TABLE, HEAD = "nlvr2", Statements, "nlvr2"

    def draw(self, samples, batch):
        seconds = [sample["images"][1] for sample in samples]
        rngs = [sample["rng"] for sample in samples] if samples[0]["train"] else None
        batch["image_1"] = pad_pictures(seconds)
        batch |= {f"{name}_1": value for name, value in patch_layout(self.config, seconds, rngs).items()}
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
        return {"nlvr2": len(samples)}


def full_stop(text):
    """A caption as captioning learns it: ending with one full stop.

    >>> full_stop("A dog runs .. ")
    'A dog runs.'
    """
    return text.rstrip(" .\n\t") + "."


class Caption(Task):
    """Captions, word by word from the left: the forward stream alone, on `<s> <bos> w1 … wk <eos> </s>`."""

    @classmethod
    def adapt(cls, config, settings=None):
        if not isinstance(config, flm.Config):
            raise ValueError("captioning needs a model that can read from left to right; ViLT reads from both sides only")
        return replace(config, objective="ar", head="vocab", answers=0, pooler=False, itm=False)

    @staticmethod
    def add_special_tokens(tok):
        tok.add_tokens([BOS, EOS])
        return tok

    def dataset(self, table, train):
        around = tuple((self.tok.ids[token],) for token in (BOS, EOS))
        return super().dataset(table, train, clean=full_stop, around=around)

    def draw(self, samples, batch):
        L = batch["ids"].shape[1]
        rows = [b * L + np.arange(1, len(sample["ids"]) - 1) for b, sample in enumerate(samples)]
        batch["left_to_right_rows"] = torch.from_numpy(np.concatenate(rows))
        return {"left_to_right": len(batch["left_to_right_rows"])}


BOS, EOS = "<bos>", "<eos>"


class OneOfMany(CaptionDataset):
    """Samples with `others`: token ids of `false_captions` captions of other images."""
    false_captions = 15

    def __getitem__(self, key):
        sample = super().__getitem__(key)
        rows, rng, chosen = self.table.row_of, sample["rng"], []
        if rows[0] == rows[-1]:
            raise ValueError(f"{', '.join(self.table.paths)}: captions of one image only, so none is false")
        while len(chosen) < self.false_captions:
            drawn = int(rng.integers(len(rows)))
            if rows[drawn] != sample["row"]:
                chosen.append(drawn)
        return sample | {"others": [self.tokens(i)[0] for i in chosen]}


class Retrieval(Task):
    """Which of some captions is the image's? The image is encoded once for all of them."""

    HEAD = "retrieval"

    def dataset(self, table, train):
        dataset = super().dataset(table, train, OneOfMany)
        dataset.false_captions = self.settings.false_captions
        return dataset

    def texts(self, samples):
        return [ids for sample in samples for ids in (sample["ids"], *sample["others"])]

    def draw(self, samples, batch):
        return {"retrieval": len(samples)}


TASKS = {"pretrain": {flm.Config: PretrainFLM, vilt.Config: PretrainViLT}, "vqa": VQA, "nlvr2": NLVR2, "caption": Caption,
         "retrieval": Retrieval}


def task_of(name, config):
    """The class of a task, for a model's backbone."""
    found = TASKS[name]
    return found[type(config)] if isinstance(found, dict) else found
