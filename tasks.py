"""One table of tasks: what each reads, what it adds to a batch, its losses and defaults; and one of published recipes.

`task_of(name, config)(settings, config, tok)` gives the training loop all that is particular to a task; `RECIPES[name]` are
the settings of a published command, as `train.py --recipe name` uses and prints them; `MODELS[name]` the sizes of a model.
"""

from dataclasses import replace

import numpy as np
import torch

import flm
import vilt
from data import CLIP_MEAN, CLIP_STD, CaptionDataset, Captions, Square, Whole, find_files, mask_words, normalize, pad_batch

MODELS = flm.PRESETS | vilt.PRESETS

# Settings of train.py; whatever a recipe does not name keeps train.py's default, and a flag overrides both.
RECIPES = {
    # The drawn world of toy.py: about six minutes on two CPU cores.
    "toy": dict(model="toy", steps=2000, global_batch=32, micro_batch=16, lr=1e-3, warmup=0.05, head_lr=1.0, fusion_lr=1.0,
                clip=1.0, eval_every=400, eval_samples=1000, log_every=100, save_every=400),
    # A small model for a few thousand photographs of one's own, from scratch.
    "small": dict(model="small", steps=2000, global_batch=64, micro_batch=32, lr=5e-4, warmup=0.05, head_lr=1.0,
                  fusion_lr=1.0, clip=1.0, eval_every=250, log_every=20),
    # The paper's pretraining on COCO, VG, SBU and CC3M: 30,000 steps of 4,096 pairs at 288 pixels.
    "flm-b32": dict(model="base-b32", image_size=288, steps=30_000, global_batch=4096, micro_batch=64, lr=8e-5,
                    warmup=0.05, head_lr=5.0, fusion_lr=5.0, max_tokens=50, datasets=("coco", "vg", "sbu", "gcc")),
}
# The objectives that the paper compares with, under the same recipe.
RECIPES |= {f"{objective}-b32": RECIPES["flm-b32"] | dict(objective=objective) for objective in ("mlm", "ar", "prefix")}

# ViLT's paper, on the same four datasets: 2,500 steps of warm-up however long the run.
RECIPES |= {f"vilt-{steps // 1000}k": dict(
    model="vilt", steps=steps, global_batch=4096, micro_batch=64, lr=1e-4, warmup=2500 / steps, head_lr=1.0,
    max_tokens=40, datasets=("coco", "vg", "sbu", "gcc")) for steps in (25_000, 50_000, 100_000, 200_000)}
# COCO alone, as ColossalAI's example trains it: 16 accumulated batches of 256, Adam without decay. (That example has masked
# words only; `--no-itm` leaves the others out here too.)
RECIPES["vilt-coco"] = RECIPES["vilt-25k"] | dict(datasets=("coco",), lr=1e-3, beta2=0.99, weight_decay=0.0, clip=1.0,
                                                  micro_batch=256)
RECIPES["vilt-toy"] = RECIPES["toy"] | dict(model="vilt-toy", max_tokens=40)
RECIPES["vilt-small"] = RECIPES["small"] | dict(model="vilt-small", max_tokens=40)


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


def places(config, pictures, rngs=None):
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


def see(model, batch):
    """encode_image of a batch's pictures, normalised."""
    return model.encode_image(batch["image"], **{name: batch[name] for name in ("sizes", "patches") if name in batch})


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining.

class Pretrain:
    """Image-caption pairs; what is hidden of them and asked for is the backbone's (`draw`)."""

    @staticmethod
    def adapt(config):
        """Only parameters that are trained exist: without image-text matching nothing trains the pooler."""
        return replace(config, pooler=config.itm)

    @staticmethod
    def table(settings, split):
        """The captions of a split, or None where the datasets have no such split."""
        files = find_files(settings.data, settings.datasets, split)
        return Captions(files) if files else None

    def __init__(self, settings, config, tok):
        self.settings, self.config, self.tok = settings, config, tok
        special = [tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id]
        self.words = np.setdiff1d(np.arange(len(tok)), special)             # what mlm's random tokens are drawn from

    def dataset(self, table, train):
        s = self.settings
        return CaptionDataset(table, self.tok, shape_of(self.config), s.max_tokens, train, s.seed, s.augment and train)

    def collate(self, samples):
        """Samples -> (batch, notes). The batch is a dict of tensors for the model; the notes stay on the host.

        What is random is drawn here, from each sample's own generator: masked words, prefixes, hidden spans, patches, and
        which rows predict. So the loop knows the number of targets without asking the device.
        """
        c = self.config
        batch = pad_batch(samples, c.pad_id, self.settings.pad_to, c.max_tokens)
        counts = self.draw(samples, batch)
        B, L = batch["ids"].shape
        notes = {"counts": counts, "samples": B, "tokens": sum(len(sample["ids"]) for sample in samples),
                 "padded_tokens": B * L, "cut": sum(sample["cut"] for sample in samples),
                 "unreadable": [line for sample in samples for line in sample["unreadable"]]}
        return batch, notes

    def mask_words(self, samples, batch, rate=1.0):
        """Masks words of every caption: adds `masked_ids` (B, L) to the batch -> their places, int64 (targets,) in B L.

        rate: the share of the masked words that is asked for.
        """
        masked, places = batch["ids"].clone(), []
        for b, sample in enumerate(samples):
            ids, starts = sample["ids"], self.tok.word_starts(sample["ids"][1:-1])
            masked_ids, picked = mask_words(ids, starts, self.config.mask_rate, self.config.mask_id, self.words, sample["rng"])
            masked[b, :len(ids)] = torch.from_numpy(masked_ids)
            if rate < 1:
                picked = picked[sample["rng"].random(len(picked)) < rate]
            places.append(b * masked.shape[1] + picked)
        batch["masked_ids"] = masked
        return torch.from_numpy(np.concatenate(places))

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

    # Names of parameters -> learning-rate group; what no prefix names is in the group "base".
    GROUPS = {"head": ("vocab_head.", "itm_head."),
              "fusion": ("text_to_fusion.", "image_to_fusion.", "fusion_layers.", "text_reconstructor.",
                         "fusion_reconstructor.", "pooler.")}
    UNDECAYED = ("vit.position",)       # tables that weight decay leaves alone, beside all vectors

    def draw(self, samples, batch):
        """Adds what `FLM.forward` asks for -> the number of targets of each output."""
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

    GROUPS = {"head": ("vocab_head.", "itm_head.", "patch_head.")}
    UNDECAYED = ("position",)

    def draw(self, samples, batch):
        """Adds what `ViLT.forward` asks for -> the number of targets of each loss."""
        c, B, rng = self.config, len(samples), samples[0]["rng"]
        batch["mlm_rows"] = self.mask_words(samples, batch)
        rngs = [sample["rng"] for sample in samples] if samples[0]["train"] else None
        batch |= places(c, [sample["image"] for sample in samples], rngs)
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


TASKS = {"pretrain": {flm.Config: PretrainFLM, vilt.Config: PretrainViLT}}


def task_of(name, config):
    """The class of a task for a model's backbone."""
    return TASKS[name][type(config)]
