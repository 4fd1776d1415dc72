"""One table of tasks: what each reads, what it adds to a batch, its losses and defaults; and one of published recipes.

`TASKS[name](settings, config, tok)` gives the training loop all that is particular to a task; `RECIPES[name]` are the
settings of a published command, as `train.py --recipe name` uses and prints them.
"""

from dataclasses import replace

import numpy as np
import torch

import flm
from data import CaptionDataset, Captions, find_files, mask_words, pad_batch

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


class Pretrain:
    """Language modeling on image-caption pairs with any of flm.OBJECTIVES, image-text matching beside it on request."""

    # Names of parameters -> learning-rate group; what no prefix names is in the group "base".
    GROUPS = {"head": ("vocab_head.", "itm_head."),
              "fusion": ("text_to_fusion.", "image_to_fusion.", "fusion_layers.", "text_reconstructor.",
                         "fusion_reconstructor.", "pooler.")}

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
        return CaptionDataset(table, self.tok, self.config.image_size, s.max_tokens, train, s.seed, s.augment and train)

    def collate(self, samples):
        """Samples -> (batch, notes). The batch is a dict of tensors for `FLM.forward`; the notes stay on the host.

        What is random is drawn here, from each sample's own generator: masked words, prefixes, hidden spans, and which
        rows predict. So the loop knows the number of targets without asking the device.
        """
        c, tok = self.config, self.tok
        if not samples[0]["train"]:         # evaluation hides from each word itself only, and asks for every word
            c = replace(c, corruption_rate=0.0, prediction_rate=1.0)
        batch = pad_batch(samples, c.pad_id, self.settings.pad_to, c.max_positions - 2)
        B, L = batch["ids"].shape
        rows = {name: [] for name in c.loss_weights if name != "itm"}
        prefixes, spans, masked = [], [], batch["ids"].clone()
        for b, sample in enumerate(samples):
            ids, rng, n, prefix = sample["ids"], sample["rng"], len(sample["ids"]), 0
            if c.objective == "mlm":
                masked_ids, picked = mask_words(ids, tok.word_starts(ids[1:-1]), c.mask_rate, c.mask_id, self.words, rng)
                masked[b, :n] = torch.from_numpy(masked_ids)
                predicting = {"reconstructed": picked}
            else:
                if c.objective == "prefix":
                    prefix = int(rng.integers(0, max(1, n - 2)))            # at least one word is left to predict
                predicting = flm.predicting_rows(c.objective, n, prefix)
            prefixes.append(prefix)
            spans.append(flm.draw_spans(n, L, c.corruption_rate, rng) if c.corruption_rate else None)
            for name, positions in predicting.items():
                positions = np.asarray(positions, dtype=np.int64)
                if c.prediction_rate < 1:
                    positions = positions[rng.random(len(positions)) < c.prediction_rate]
                rows[name].append(b * L + positions)
        for name, positions in rows.items():
            batch[f"{name}_rows"] = torch.from_numpy(np.concatenate(positions))
        if c.objective == "mlm":
            batch["masked_ids"] = masked
        if c.objective == "prefix":
            batch["prefix"] = torch.tensor(prefixes)
        if c.corruption_rate and c.objective == "flm":
            batch["first"], batch["last"] = (torch.from_numpy(np.stack(ends)) for ends in zip(*spans))
        counts = {name: len(batch[f"{name}_rows"]) for name in rows}
        if c.itm:
            shift = int(samples[0]["rng"].integers(1, max(2, B)))           # every caption meets another's image
            batch["other_image"] = (torch.arange(B) + shift) % B
            row = torch.tensor([sample["row"] for sample in samples])
            batch["same_image"] = row == row[batch["other_image"]]
            counts["itm"] = 2 * B
        notes = {"counts": counts, "samples": B, "tokens": sum(len(sample["ids"]) for sample in samples),
                 "padded_tokens": B * L, "cut": sum(sample["cut"] for sample in samples),
                 "unreadable": [line for sample in samples for line in sample["unreadable"]]}
        return batch, notes


TASKS = {"pretrain": Pretrain}
