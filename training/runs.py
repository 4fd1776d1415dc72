"""A run, opened: its data, tokenizer, model, checkpoint, and whether they go together.

    run = open_run(settings, config_flags, machine)     # what train.py's loop then trains
"""

import json
import os
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from torch import nn

import tokenizer
import vilt
import weights
from batches import GlobalBatches
from data import Captions, token_lengths
from recipes import MODELS
from storage import disk
from tasks import Config, Task, task_of
from vocabulary import Tokenizer
from training import checkpoints, parallel
from training.machine import Machine
from training.settings import AUTO, Settings, check_model, check_same_run, check_task, split_batch

# A short validation comes early: (its step, its number of captions). What is wrong with the
# validation split shows in the first minute, not after the first thousand steps.
FIRST_LOOK = (10, 200)


@dataclass
class Run:
    """What stays the same from the first step to the last."""
    settings: Settings
    machine: Machine
    config: Config                  # the model's Config, as the task needs it
    task: Task
    tables: dict                    # split -> table; val may be None
    sampler: GlobalBatches
    micro_batch: int
    accumulation: int               # micro-batches of one process per step
    answers: list | None            # vqa: the answer list
    saved: dict | None              # the checkpoint it resumes from; None once training begins
    source: object                  # the model of --load; None once training begins
    workers: int = -1               # loading processes; train.py sets loading.workers_needed

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def checkpoint(self) -> Path:
        return self.out / "last.pt"

    @property
    def files(self) -> list[list]:
        """[[name, rows]] of the training data: what a resumed run must find again."""
        return self.tables["train"].rows_of_files()

    def due(self, every: int, step: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is done now."""
        return bool(every) and step > 0 and (step % every == 0 or step == self.settings.steps)

    def report_due(self, step: int) -> bool:
        """Whether a report follows this step; the first comes after step 1."""
        return step == 1 or self.due(self.settings.log_every, step)

    def validation_due(self, step: int) -> int:
        """On how many captions of the validation split the model is tried now; 0: on none."""
        every, table = self.settings.eval_every, self.tables["val"]
        if not table or not every:
            return 0
        samples = min(self.settings.eval_samples or len(table.row_of), len(table.row_of))
        if self.due(every, step):
            return samples
        return min(FIRST_LOOK[1], samples) if step == FIRST_LOOK[0] else 0


def open_run(settings: Settings, config_flags: dict, machine: Machine) -> Run:
    """Opens data, tokenizer and checkpoint, and checks that all of it goes together."""
    checkpoint, saved, source = None, None, None
    if settings.resume:
        checkpoint, saved = checkpoints.open_saved(Path(settings.out))
    if saved and settings.micro_batch == AUTO:
        found = saved["settings"].get("micro_batch")        # as it was: dropout draws the same
        settings = replace(settings, micro_batch=found if type(found) is int and found else AUTO)
    micro_batch, accumulation = split_batch(settings, machine)
    if settings.load and not saved:
        source = weights.load(settings.load, trust=settings.trust)
    if saved:
        config = weights.config_of(saved)
    else:
        config = source.config if source else MODELS[settings.model]
    if source:
        check_model(settings, config_flags, config)

    task_class = task_of(settings.task, config)
    tables = {split: task_class.table(settings, split) for split in ("train", "val")}
    tok = open_tokenizer(settings, config_flags, saved, source, tables["train"], machine)
    tok = task_class.add_special_tokens(tok)
    config = fit_config(config, config_flags, tok, task_class, settings)
    check_task(settings, config_flags, config, micro_batch)
    parallel.check(config, machine.tensor, machine.data_world if settings.shard else 1)
    answers = task_class.answers(settings) if config.head == "vqa" else None
    if settings.keep_best and not (tables["val"] and settings.eval_every):
        raise ValueError(f"--keep-best {settings.keep_best}: this run has no validation")
    if saved and answers != saved.get("answers"):
        raise ValueError(f"{checkpoint}: --resume with another answer list in {settings.data} "
                         "than the run's")
    max_tokens = min(settings.max_tokens, config.max_tokens)
    pad_to = settings.pad_to or (8 if machine.device.type == "cuda" else 1)
    task = task_class(replace(settings, max_tokens=max_tokens, pad_to=pad_to), config, tok)
    lengths = training_lengths(tables["train"], tok, Path(settings.out), machine)
    sampler = GlobalBatches(lengths.clip(max=max_tokens), settings.global_batch, settings.seed,
                            settings.bucket, tables["train"].row_of, settings.captions_per_image)
    if settings.epochs:
        settings = replace(settings, steps=round(settings.epochs * sampler.steps_per_epoch))
    run = Run(settings, machine, config, task, tables, sampler, micro_batch, accumulation, answers,
              saved, source, settings.workers)
    if saved:
        check_same_run(checkpoint, saved, settings, config, run.files)
        checkpoints.check_saved(checkpoint, saved, run)
    return run


def fit_config(config: Config, config_flags: dict, tok: Tokenizer, task_class: type[Task],
               settings: Settings) -> Config:
    """A model's Config with the flags' values, the tokenizer's sizes, and the head of the task."""
    # `adapt` removes a pooler that the task does not train.
    config = replace(config, **config_flags, pooler=True)
    config = replace(config, vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id,
                     sep_id=tok.sep_id, mask_id=tok.mask_id)
    return task_class.adapt(config, settings)


def open_tokenizer(settings: Settings, config_flags: dict, saved: dict | None,
                   source: nn.Module | None, table: Captions, machine: Machine) -> Tokenizer:
    """The checkpoint's tokenizer, else that of --tokenizer, else one trained on the captions.

    The last one is kept in OUT/tokenizer.
    """
    if saved:
        return weights.unpack_tokenizer(saved["tokenizer"])
    if source and source.tokenizer:
        return source.tokenizer
    if settings.tokenizer:
        return tokenizer.load(settings.tokenizer)
    if source:
        raise ValueError(f"{settings.load} carries no tokenizer: --tokenizer DIR must name the "
                         "directory of its files")
    size = config_flags.get("vocab_size", MODELS[settings.model].vocab_size)
    if size > 10_000:
        name, files = "RoBERTa", "vocab.json and merges.txt"
        if isinstance(MODELS[settings.model], vilt.Config):
            name, files = "BERT", "vocab.txt"
        raise ValueError(f"--model {settings.model} has {name}'s vocabulary of {size}: --tokenizer "
                         f"DIR must name the directory of its {files} (or choose a --vocab-size "
                         "to train one)")
    directory = Path(settings.out) / "tokenizer"
    if machine.rank == 0:
        print(f"training a tokenizer of {size} tokens on {len(table.row_of):,} captions")
        tokenizer.BPE.train(table.texts(), size).save(directory)
    machine.wait()
    return tokenizer.load(directory)


def training_lengths(table: Captions, tok: Tokenizer, out: Path, machine: Machine) -> np.ndarray:
    """token_lengths of the training captions, counted once by the first process and kept in OUT.

    The file's name is derived from the data files and the tokenizer that they were counted with.
    """
    path = None
    if machine.rank == 0:
        files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in table.paths]
        counted = [files, weights.pack_tokenizer(tok)]
        name = blake2b(json.dumps(counted).encode(), digest_size=4).hexdigest()
        path = out / f"token_lengths_{name}.npy"
        if not path.exists():
            lengths = token_lengths(table, tok)
            with disk.complete_file(path) as partial, open(partial, "wb") as file:
                np.save(file, lengths)
    # All processes wait here for the first one.
    return np.load(machine.union({"path": path} if path else {})["path"])
