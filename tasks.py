"""The tasks, one class each.

A task's class says what it reads, what it hides, what it asks, and which head the model needs:
`task_of(name, config)(settings, config, tok)`.

What is hidden and predicted is drawn here: masked words, prefixes, hidden spans, patches, and which
rows predict. Each sample's own generator draws it, so it does not depend on the number of
processes. Only the wrong images of image-text matching depend on the micro-batch, and which
sample's generator draws what is random of an image that several share: it is the first.

Letters: B batch, M images of it (B, or fewer), L text length, K patches, D width.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flm
import masks
import vilt
from data import CaptionDataset, Captions, Questions, Statements, mask_words, pad_texts
from exchange import Exchange, ExchangedWords
from pictures import (CLIP_MEAN, CLIP_STD, Jpeg, Shape, Square, Undecoded, Whole, normalize,
                      pad_pictures)
from storage.disk import read_json
from storage.files import FILES, find_files, known_datasets
from storage.rebuilt import rebuilt_answers
from storage.tar_index import table_of
from tokenizer import Tokenizer

if TYPE_CHECKING:           # for the annotations alone: that file comes later
    from training.settings import Settings

Config = flm.Config | vilt.Config
Model = flm.FLM | vilt.ViLT


# -------------------------------------------------------------------------------------------------
# Images, as each backbone takes them.

def shape_of(config: Config) -> Shape:
    """The shape that a model's images are resized to: CLIP's square, or ViLT's whole image."""
    if isinstance(config, vilt.Config):
        return Whole(config.image_size, config.patch_size)
    return Square(config.image_size)


def normalized(config: Config, images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, by the mean and deviation of the model's pretraining."""
    if isinstance(config, vilt.Config):
        return normalize(images, vilt.MEAN, vilt.STD)
    return normalize(images, CLIP_MEAN, CLIP_STD)


def to_device(batch: dict, device: torch.device, config: Config) -> dict:
    """A collated batch on the device, its images normalised there."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    for name in ("image", "image_1"):
        if name in batch:
            batch[name] = normalized(config, batch[name])
    return batch


def patch_layout(config: Config, pictures: list[Tensor],
                 rngs: Sequence[np.random.Generator | None] | None = None) -> dict[str, Tensor]:
    """What ViLT must know of a batch's images (3, h, w) besides their pixels: `sizes`, `patches`.

    FLM needs nothing. In training, ViLT shows at most max_patches patches of each image, drawn by
    `rngs`; without rngs it shows all.
    """
    if not isinstance(config, vilt.Config):
        return {}
    sizes = [[side // config.patch_size for side in picture.shape[1:]] for picture in pictures]
    columns = max(w for _, w in sizes)                                      # of the padded grid
    limit = config.max_patches if rngs else 0
    places = []
    for (h, w), rng in zip(sizes, rngs or [None] * len(sizes), strict=True):
        row, column = vilt.some_patches(h, w, limit, rng)
        places.append(torch.from_numpy(row * columns + column))
    patches = torch.full((len(pictures), max(map(len, places))), -1)                        # (B, K)
    for line, place in zip(patches, places, strict=True):
        line[:len(place)] = place
    return {"sizes": torch.tensor(sizes), "patches": patches}


def gather(pictures: list[Tensor | Jpeg]) -> Tensor | Undecoded:
    """The pictures of a batch: uint8 (B, 3, H, W), or what becomes that on the device."""
    if any(isinstance(picture, Jpeg) for picture in pictures):
        return Undecoded(pictures)
    return pad_pictures(pictures)


def image_owners(samples: list[dict]) -> list[dict]:
    """Those of the samples that have an image of their own; each other one has that before it."""
    return [sample for sample in samples if not sample["shares_image"]]


def image_numbers(batch: dict) -> Tensor:
    """Which of a batch's images belongs to each text, (B,); without `image_of`, each its own."""
    return batch.get("image_of", torch.arange(len(batch["ids"])))


def round_rows(batch: dict) -> None:
    """Fills up the rows that predict words with -1, so that there are few numbers of them.

    All outputs get as many: the most that one has, rounded up to an eighth of B L. With a small set
    of lengths L (--pad-to 16 24 32) there is so a small set of shapes.
    """
    names = [name for name in batch if name.endswith("_rows") and name != "mpp_rows"]
    step = math.ceil(batch["ids"].numel() / 8)
    most = max((len(batch[name]) for name in names), default=0)
    count = math.ceil(most / step) * step
    for name in names:
        batch[name] = F.pad(batch[name], (0, count - len(batch[name])), value=-1)


# -------------------------------------------------------------------------------------------------
# What all tasks share.

class Task:
    """What a task reads, and how its samples become a batch."""

    KIND, TABLE = "caption", Captions       # which files it reads
    HEAD = ""                               # which head the model has
    targets = True      # whether batches hold the targets of the loss; eval.py needs none

    @classmethod
    def adapt(cls, config: Config, settings: "Settings | None" = None, answers: int = 0) -> Config:
        """The model's Config as the task needs it: only parameters that are trained exist."""
        config = replace(config, head=cls.HEAD, answers=answers, pooler=True, itm=False)
        return replace(config, mpp=False) if isinstance(config, vilt.Config) else config

    @staticmethod
    def add_special_tokens(tok: Tokenizer) -> Tokenizer:
        """The tokenizer as the task needs it."""
        return tok

    @classmethod
    def table(cls, settings: "Settings", split: str) -> Captions | None:
        """The texts of a split, or None where the datasets have no such split.

        Without settings.hold_out, those of "train" are those of train and val.
        """
        files = find_files(settings.data, settings.datasets, split, cls.KIND)
        if split == "train" and not settings.hold_out:
            files += find_files(settings.data, settings.datasets, "val", cls.KIND)
        return table_of(files, cls.TABLE) if files else None

    def __init__(self, settings: "Settings", config: Config, tok: Tokenizer):
        self.settings, self.config, self.tok = settings, config, tok

    def dataset(self, table: Captions, train: bool,
                dataset_class: type[CaptionDataset] = CaptionDataset,
                **more: object) -> CaptionDataset:
        """The samples of a table."""
        s = self.settings
        return dataset_class(table, self.tok, shape_of(self.config), s.max_tokens, train, s.seed,
                             s.augment and train, **more)

    def collate(self, samples: list[dict]) -> tuple[dict, dict]:
        """Samples -> (batch, notes): tensors for the model, and what the loop counts and reports.

        Where samples share images, each image is in the batch once, and `image_of` (B,) says which
        one belongs to each sample.
        The masks and targets are drawn here, on the CPU, so the loop knows the number of targets
        without asking the device.
        """
        c, texts, owners = self.config, self.texts(samples), image_owners(samples)
        rngs = [sample["rng"] for sample in owners] if samples[0]["train"] else None
        pictures = [sample["image"] for sample in owners]
        batch = {"image": gather(pictures),
                 "ids": pad_texts(texts, c.pad_id, self.settings.pad_to, c.max_tokens)}
        if len(owners) < len(samples):
            owns = torch.tensor([not sample["shares_image"] for sample in samples])
            batch["image_of"] = owns.cumsum(0) - 1                                          # (B,)
        batch |= patch_layout(c, pictures, rngs)
        counts = self.draw(samples, batch)
        if not isinstance(self.settings.pad_to, int):
            round_rows(batch)
        unreadable = [line for sample in samples for line in sample["unreadable"]]
        # The log's samples are images, or pairs of them: its share of unreadable ones is of these.
        notes = {"counts": counts, "samples": len(owners), "tokens": sum(map(len, texts)),
                 "padded_tokens": batch["ids"].numel(), "unreadable": unreadable,
                 "cut": sum(sample["cut"] for sample in samples)}
        return batch, notes

    def texts(self, samples: list[dict]) -> list[list[int]]:
        """The token ids of the batch's texts, in order."""
        return [sample["ids"] for sample in samples]

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        """Adds to the batch what the model's losses need -> the number of targets of each loss."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------
# Pretraining.

class Pretrain(Task):
    """Image-caption pairs; what is hidden of them and asked for depends on the backbone."""

    @classmethod
    def adapt(cls, config: Config, settings: "Settings | None" = None) -> Config:
        return replace(config, pooler=config.itm)       # nothing else trains the pooler

    def __init__(self, settings: "Settings", config: Config, tok: Tokenizer):
        super().__init__(settings, config, tok)
        special = [tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id]
        self.words = np.setdiff1d(np.arange(len(tok)), special)     # mlm's random tokens

    def mask_words(self, samples: list[dict], batch: dict, asked: float = 1.0) -> Tensor:
        """Masks words of every caption -> the rows that predict, indices into B L.

        Adds `masked_ids` (B, L). asked: the share of the masked tokens that are predicted.
        A random token may be any but the special ones: <s>, <pad>, </s>, <unk>, <mask>.
        """
        c, masked, places = self.config, batch["ids"].clone(), []
        for b, sample in enumerate(samples):
            ids, rng = sample["ids"], sample["rng"]
            starts = self.tok.word_starts(ids[1:-1])
            masked_ids, picked = mask_words(ids, starts, c.mask_rate, c.mask_id, self.words, rng)
            masked[b, :len(ids)] = torch.from_numpy(masked_ids)
            if asked < 1:
                picked = picked[rng.random(len(picked)) < asked]
            places.append(b * masked.shape[1] + picked)
        batch["masked_ids"] = masked
        return torch.from_numpy(np.concatenate(places))

    @staticmethod
    def other_pictures(samples: list[dict], batch: dict) -> tuple[Tensor, Tensor]:
        """A wrong image for every caption, from the micro-batch: all images move on by one shift.

        -> (index (B,) of each caption's image, (B,) bool: it happens to be the right one after all)
        Captions that share an image get the same wrong one. It can be right after all where two
        groups of a micro-batch are of one row.
        A training micro-batch holds at least two images (settings.check_task). A validation batch
        of one pair gets its own image, which counts as right.
        """
        M = len(batch["image"])
        shift = int(samples[0]["rng"].integers(1, max(2, M)))
        other = (image_numbers(batch) + shift) % M                                          # (B,)
        row = torch.tensor([sample["row"] for sample in samples])
        row_of_image = torch.tensor([sample["row"] for sample in image_owners(samples)])    # (M,)
        return other, row == row_of_image[other]


class PretrainFLM(Pretrain):
    """Language modeling with any of flm.OBJECTIVES, and image-text matching on request."""

    def dataset(self, table: Captions, train: bool) -> CaptionDataset:
        if not (self.config.itm and self.settings.exchange):
            return super().dataset(table, train)
        dataset = super().dataset(table, train, ExchangedWords)
        dataset.exchange = Exchange(self.settings.exchange)
        return dataset

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        c = self.config
        if not samples[0]["train"]:
            # evaluation: flm hides from each query its own word alone, and every word is asked for
            # (of mlm, every masked one)
            c = replace(c, corruption_rate=0.0, prediction_rate=1.0)
        if c.objective == "mlm":
            batch["reconstructed_rows"] = self.mask_words(samples, batch, c.prediction_rate)
        else:
            self.draw_rows(samples, batch, c)
        counts = {name: len(batch[f"{name}_rows"]) for name in c.loss_weights if name != "itm"}
        if c.itm:
            batch["other_image"], batch["same_image"] = self.other_pictures(samples, batch)
            if self.settings.exchange:
                self.exchange_words(samples, batch)
            counts["itm"] = 2 * len(samples)
        return counts

    def exchange_words(self, samples: list[dict], batch: dict) -> None:
        """Makes about half of the wrong pairs hard: the right image, a word of the caption changed.

        Adds `wrong_ids` (B, L): what stands beside `other_image` in the wrong pairs.
        """
        texts, own = self.texts(samples), image_numbers(batch)
        for b, sample in enumerate(samples):
            if sample["wrong_ids"] and sample["rng"].random() < 0.5:
                texts[b] = sample["wrong_ids"]
                batch["other_image"][b] = own[b]
                batch["same_image"][b] = False
        batch["wrong_ids"] = pad_texts(texts, self.config.pad_id, self.settings.pad_to,
                                       self.config.max_tokens)

    def draw_rows(self, samples: list[dict], batch: dict, c: flm.Config) -> None:
        """Adds the rows that predict, `<output>_rows`, and what is hidden from each query.

        Objective prefix: `prefix`. flm with a corruption rate: `first`, `last` of the spans.
        """
        L = batch["ids"].shape[1]
        rows, prefixes, spans = defaultdict(list), [], []
        for b, sample in enumerate(samples):
            rng, n = sample["rng"], len(sample["ids"])
            prefix = 0
            if c.objective == "prefix":
                prefix = int(rng.integers(0, max(1, n - 2)))    # 0..n-3: leaves a token to predict
            prefixes.append(prefix)
            if c.objective == "flm" and c.corruption_rate:
                spans.append(masks.draw_spans(n, L, c.corruption_rate, rng))
            for name, positions in masks.predicting_rows(c.objective, n, prefix).items():
                positions = np.asarray(positions, dtype=np.int64)
                if c.prediction_rate < 1:
                    positions = positions[rng.random(len(positions)) < c.prediction_rate]
                rows[name].append(b * L + positions)
        for name, places in rows.items():
            batch[f"{name}_rows"] = torch.from_numpy(np.concatenate(places))
        if c.objective == "prefix":
            batch["prefix"] = torch.tensor(prefixes)
        if spans:
            batch["first"] = torch.from_numpy(np.stack([first for first, _ in spans]))      # (B, L)
            batch["last"] = torch.from_numpy(np.stack([last for _, last in spans]))


class PretrainViLT(Pretrain):
    """Masked words, image-text matching with word-patch alignment, masked patches on request."""

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        c, B = self.config, len(samples)
        batch["mlm_rows"] = self.mask_words(samples, batch)
        counts = {"mlm": len(batch["mlm_rows"])}
        if c.itm:                           # half of the captions are shown another's image
            other, same = self.other_pictures(samples, batch)
            right = torch.zeros(B, dtype=torch.bool)
            half = (B + 1) // 2
            right[torch.from_numpy(samples[0]["rng"].permutation(B)[:B - half])] = True
            batch["shown_image"] = torch.where(right, image_numbers(batch), other)
            batch["same_image"] = right | same
            counts["itm"] = B
            if c.wpa_weight:
                counts["wpa"] = B
        if c.mpp:
            self.mask_patches(samples, batch)
            counts["mpp"] = 3 * len(batch["mpp_rows"])
        return counts

    def mask_patches(self, samples: list[dict], batch: dict) -> None:
        """Adds `mpp_rows`, the patches asked for, and `hidden_patches` (M, K), 80 % of them.

        Captions that share an image are asked for the same patches of it.
        """
        picked = np.zeros(batch["patches"].shape, dtype=bool)                               # (M, K)
        hidden = picked.copy()
        real_counts = (batch["patches"] >= 0).sum(1).tolist()
        for m, (sample, real) in enumerate(zip(image_owners(samples), real_counts, strict=True)):
            rng = sample["rng"]
            picked[m, :real] = rng.random(real) < self.config.patch_mask_rate
            hidden[m, :real] = picked[m, :real] & (rng.random(real) < 0.8)
        asked = picked[image_numbers(batch)]                                                # (B, K)
        batch["mpp_rows"] = torch.from_numpy(np.flatnonzero(asked))
        batch["hidden_patches"] = torch.from_numpy(hidden)


# -------------------------------------------------------------------------------------------------
# Fine-tuning.

class VQA(Task):
    """Visual question answering over a list of answers; soft targets, as ten people answered."""

    KIND, TABLE, HEAD = "vqa", Questions, "vqa"

    @classmethod
    def adapt(cls, config: Config, settings: "Settings | None" = None) -> Config:
        return super().adapt(config, answers=len(cls.answers(settings)))

    @classmethod
    def answers(cls, settings: "Settings") -> list[str]:
        """The answer list of the data: the position of an answer is its label."""
        names = settings.datasets or known_datasets(settings.data, cls.KIND)
        if len(names) > 1:
            raise ValueError(f"{settings.data}: holds questions of {', '.join(names)}, each with "
                             "an answer list of its own; --datasets must name one")
        middle = "" if names[0] in FILES[cls.KIND] else "_vqa"
        path = Path(settings.data) / f"{names[0]}{middle}_answers.json"
        return read_json(path, list) if path.is_file() else rebuilt_answers(path, names[0])

    @classmethod
    def table(cls, settings: "Settings", split: str) -> Captions | None:
        """The questions of a split, whose labels are all in the answer list of the data."""
        table = super().table(settings, split)
        try:
            count = len(cls.answers(settings)) if table else 0
        except (FileNotFoundError, ValueError):
            return table            # who needs the answer list says so; eval.py has the model's
        if table:
            table.check_labels(count)
        return table

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        if not self.targets:
            return {"vqa": len(samples)}
        targets = torch.zeros(len(samples), self.config.answers)
        for target, sample in zip(targets, samples, strict=True):
            target[sample["labels"]] = torch.tensor(sample["scores"], dtype=torch.float32)
        batch["targets"] = targets
        return {"vqa": len(samples)}


class NLVR2(Task):
    """Natural-language visual reasoning: a statement is true or false of two images."""

    KIND, TABLE, HEAD = "nlvr2", Statements, "nlvr2"

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        owners = image_owners(samples)
        seconds = [sample["images"][1] for sample in owners]
        rngs = [sample["rng"] for sample in owners] if samples[0]["train"] else None
        batch["image_1"] = gather(seconds)
        for name, tensor in patch_layout(self.config, seconds, rngs).items():
            batch[f"{name}_1"] = tensor
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
        return {"nlvr2": len(samples)}


BOS, EOS = "<bos>", "<eos>"


def full_stop(text: str) -> str:
    """A caption as captioning learns it: ending with one full stop.

    >>> full_stop("A dog runs .. ")
    'A dog runs.'
    """
    return text.rstrip(" .\n\t") + "."


class Caption(Task):
    """Captions, word by word from the left, on `<s> <bos> w1 … wk <eos> </s>`.

    Only the left-to-right stream is trained and decodes: the row of `<bos>` predicts w1, that of wk
    predicts `<eos>` (and that of `<eos>` predicts `</s>`).
    """

    @classmethod
    def adapt(cls, config: Config, settings: "Settings | None" = None) -> Config:
        if not isinstance(config, flm.Config):
            raise ValueError("captioning needs a model that can read from left to right; "
                             "ViLT reads from both sides only")
        return replace(config, objective="ar", head="vocab", answers=0, pooler=False, itm=False)

    @staticmethod
    def add_special_tokens(tok: Tokenizer) -> Tokenizer:
        tok.add_tokens([BOS, EOS])
        return tok

    def dataset(self, table: Captions, train: bool) -> CaptionDataset:
        around = ((self.tok.ids[BOS],), (self.tok.ids[EOS],))
        return super().dataset(table, train, clean=full_stop, around=around)

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        L = batch["ids"].shape[1]
        rows = []
        for b, sample in enumerate(samples):
            rows.append(b * L + np.arange(1, len(sample["ids"]) - 1))
        batch["left_to_right_rows"] = torch.from_numpy(np.concatenate(rows))
        return {"left_to_right": len(batch["left_to_right_rows"])}


class OneOfMany(CaptionDataset):
    """Samples with `others`: the token ids of `false_captions` captions of other images."""
    false_captions = 15

    def group(self, epoch: int, texts: list[int]) -> list[dict]:
        [sample] = super().group(epoch, texts)
        rows, chosen = self.table.row_of, []
        if rows[0] == rows[-1]:
            raise ValueError(f"{self.table.named()}: captions of one image only, so none is false")
        while len(chosen) < self.false_captions:
            drawn = int(sample["rng"].integers(len(rows)))
            if rows[drawn] != sample["row"]:
                chosen.append(drawn)
        return [sample | {"others": [self.tokens(i)[0] for i in chosen]}]


class Retrieval(Task):
    """Retrieval: the true caption of an image among false ones. The image is encoded once."""

    HEAD = "retrieval"

    def dataset(self, table: Captions, train: bool) -> CaptionDataset:
        dataset = super().dataset(table, train, OneOfMany)
        dataset.false_captions = self.settings.false_captions
        return dataset

    def texts(self, samples: list[dict]) -> list[list[int]]:
        return [ids for sample in samples for ids in (sample["ids"], *sample["others"])]

    def draw(self, samples: list[dict], batch: dict) -> dict[str, int]:
        return {"retrieval": len(samples)}


TASKS = {"pretrain": Pretrain, "vqa": VQA, "nlvr2": NLVR2, "caption": Caption,
         "retrieval": Retrieval}
FINE_TUNING = [name for name in TASKS if name != "pretrain"]


def task_of(name: str, config: Config) -> type[Task]:
    """The class of a task, for a model's backbone."""
    if name != "pretrain":
        return TASKS[name]
    return PretrainViLT if isinstance(config, vilt.Config) else PretrainFLM
