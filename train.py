"""ONE training loop: pretraining and every fine-tuning task.

    python train.py --task pretrain --recipe toy --data data/toy --out runs/toy
    torchrun --nproc_per_node 8 train.py --task pretrain --recipe flm-b32 --data DIR --tokenizer DIR --out runs/flm
    python train.py --task pretrain --recipe toy --data data/toy --out runs/toy --resume      # goes on where it stopped

The global batch is the only knob: it is split into micro-batches, accumulated and dealt to the processes, and the gradient
is that of the mean over the global batch however it was split. A step is an optimizer step, everywhere.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils.data import DataLoader

import flm
import tokenizer
import vilt
import weights
from data import GlobalBatches, evaluation_batches, token_lengths
from machine import choose_precision, loader_workers, memory_gb, set_up
from tasks import GROUPS, MODELS, RECIPES, TASKS, UNDECAYED, normalized, task_of

# ---------------------------------------------------------------------------------------------------------------------
# Config: the settings below and the fields of the models' Configs, each a flag. A flag beats the recipe, the recipe the default.

@dataclass(frozen=True)
class Settings:
    task: str = "pretrain"
    recipe: str = ""                # a row of tasks.RECIPES[task]; its values stand where no flag is given
    model: str = "base-b32"         # a row of tasks.MODELS; every field of its Config is a flag too
    load: str = ""                  # a checkpoint to start from, ours or a released one: its sizes, weights and tokenizer
    vit: str = ""                   # a file to start the image side from: CLIP's (FLM), a ViT's (ViLT)
    text: str = ""                  # a file to start the text side from: RoBERTa's or BERT's
    data: str = ""                  # directory of Arrow files
    datasets: tuple = ()            # names of datasets in it (coco vg sbu gcc …); none: all that are found
    tokenizer: str = ""             # directory of vocab.json + merges.txt (or vocab.txt); none: train one on the captions
    out: str = ""                   # directory of the run: config.json, metrics.jsonl, last.pt
    resume: bool = False            # go on from OUT/last.pt, if it is there
    # optimization
    steps: int = 10_000
    epochs: float = 0.0             # in place of steps: so many passes over the data
    global_batch: int = 256         # pairs per optimizer step, over all processes
    micro_batch: int = 0            # pairs per forward pass of one process; 0: as many as its share of the global batch
    lr: float = 1e-4                # peak rate of the group "base"
    head_lr_scale: float = 5.0            # multiples of lr: vocabulary and task heads …
    fusion_lr_scale: float = 5.0          # … fusion layers, reconstructor, and what leads to them
    warmup: float = 0.05            # share of the steps with a linearly rising rate; then it falls linearly to 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 0.0               # largest norm of the gradient; 0: not clipped
    max_skipped: int = 10           # non-finite gradients in a row before the run stops
    # data
    max_tokens: int = 50            # longer captions are cut, and counted
    false_captions: int = 15        # retrieval: false captions beside each image's own
    bucket: int = 1                 # so many global batches are cut from captions sorted together: less padding in small ones
    pad_to: int = 0                 # captions are padded to a multiple of this; 0: 8 on a GPU, whose kernels want it, else 1
    augment: bool = False           # RandAugment(2, 9)
    max_unreadable: float = 0.01    # share of undecodable images at which the run stops
    workers: int = -1               # loader processes; -1: up to eight on a GPU, none on a CPU (they would share its cores)
    # machine
    device: str = ""                # cpu, cuda, …; default: cuda where there is one
    precision: str = ""             # fp32, bf16, fp16; default: on a GPU bf16 (fp16 where it has no bf16), on a CPU fp32
    compile: bool = False
    shard: bool = False             # fully sharded parameters (FSDP2) instead of DDP
    seed: int = 0
    # reporting
    log_every: int = 50
    eval_every: int = 1000          # 0: never
    eval_samples: int = 5000        # captions of the validation split that are looked at, evenly spread; 0: all
    save_every: int = 1000
    keep: int = 0                   # every so many steps, keep a checkpoint under its own name; 0: only last.pt


# What may differ between a run and its resumption without changing what is learned.
FREE_TO_CHANGE = {"resume", "out", "data", "micro_batch", "workers", "device", "compile", "shard", "log_every",
                  "eval_every", "eval_samples", "pad_to", "save_every", "keep", "max_unreadable", "max_skipped", "tokenizer"}


def parse(argv):
    """Command line -> (Settings, the model's Config fields that were asked for by the recipe or a flag)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings_fields = {f.name: f for f in fields(Settings)}
    sizes = {config: {f.name: f for f in fields(config)} for config in (flm.Config, vilt.Config)}
    config_fields = sizes[vilt.Config] | sizes[flm.Config]
    for group, some in (("settings", settings_fields), ("model sizes and losses", config_fields)):
        group = parser.add_argument_group(group)
        for name, field in some.items():
            kind = type(field.default)
            how = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+")}.get(kind, dict(type=kind))
            defaults = {which: f[name].default for which, f in (("FLM", sizes[flm.Config]), ("ViLT", sizes[vilt.Config]))
                        if some is config_fields and name in f} or {"default": field.default}
            group.add_argument("--" + name.replace("_", "-"), default=None,
                               help=", ".join(f"{which} {value!r}" for which, value in defaults.items()), **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    task, recipe = given.get("task", Settings.task), given.get("recipe", "")
    if task not in TASKS:
        parser.error(f"--task {task}: one of {', '.join(TASKS)} is expected")
    if recipe and recipe not in RECIPES[task]:
        parser.error(f"--recipe {recipe}: one of {', '.join(RECIPES[task])} is expected for task {task}")
    merged = RECIPES[task].get(recipe, {}) | given
    if merged.get("epochs") and "steps" in given and "epochs" not in given:
        merged["epochs"] = 0.0              # a flag beats the recipe
    merged["datasets"] = tuple(merged.get("datasets", ()))
    if merged.setdefault("model", Settings.model) not in MODELS:
        parser.error(f"--model {merged['model']}: one of {', '.join(MODELS)} is expected")
    for name in merged:
        if name in config_fields and not merged.get("load") and name not in sizes[type(MODELS[merged["model"]])]:
            parser.error(f"--{name.replace('_', '-')}: model {merged['model']} has no such setting")
    for flag in ("data", "out"):
        if not merged.get(flag):
            parser.error(f"--{flag} is needed: the directory of {'Arrow files' if flag == 'data' else 'the run'}")
    return (Settings(**{k: v for k, v in merged.items() if k in settings_fields}),
            {k: v for k, v in merged.items() if k in config_fields})


# ---------------------------------------------------------------------------------------------------------------------
# Processes and devices.

def split_batch(settings, world):
    """The global batch -> (micro-batch, micro-batches that one process accumulates per step)."""
    share, rest = divmod(settings.global_batch, world)
    micro = settings.micro_batch or share
    if rest or micro < 1 or share % micro:
        raise ValueError(f"global batch {settings.global_batch} does not divide into {world} processes x micro-batches of "
                         f"{micro or settings.micro_batch}")
    return micro, share // micro


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule.

def parameter_groups(model, settings):
    """AdamW's groups: {base, head, fusion} (tasks.GROUPS) x {decayed, not}; every parameter in exactly one.

    Decayed are matrices (weights of linear layers, convolutions, embeddings); biases, LayerNorms, the class token and the
    grid of the image's positions are not.
    """
    scales = {"base": 1.0, "head": settings.head_lr_scale, "fusion": settings.fusion_lr_scale}
    groups = {(group, decayed): [] for group in scales for decayed in (True, False)}
    for name, parameter in model.named_parameters():
        group = next((g for g, prefixes in GROUPS[type(model.config)].items() if name.startswith(prefixes)), "base")
        groups[group, parameter.ndim >= 2 and name not in UNDECAYED].append(parameter)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    return [{"params": parameters, "scale": scales[group], "weight_decay": settings.weight_decay if decayed else 0.0}
            for (group, decayed), parameters in groups.items() if parameters]


def rate_at(step, settings):
    """The share of the peak rate at a step, counted from 0: linear from 0 over the warm-up, then linear to 0."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return step / warmup
    return max(0.0, (settings.steps - step) / max(1, settings.steps - warmup))


# ---------------------------------------------------------------------------------------------------------------------
# Small tools of the loop.

class Sums:
    """Losses, hits and counts, summed on the device without waiting for it; read and reset when something is printed."""

    def __init__(self, names, device):
        self.names, self.values = list(names), torch.zeros(3, len(names), dtype=torch.float64, device=device)

    def add(self, results, counts):
        self.values += torch.stack([torch.stack([results[name][0].detach() for name in self.names]),
                                    torch.stack([results[name][1] for name in self.names]),
                                    counts]).to(self.values)

    def read(self, loss_weights, prefix=""):
        """-> {loss, <output>_loss, <output>_accuracy}: means over all processes' targets; the sums start anew."""
        if dist.is_initialized():
            dist.all_reduce(self.values)
        losses, hits, counts = self.values.tolist()
        self.values.zero_()
        means = {name: (loss / count, hit / count) if count else (0.0, 0.0)
                 for name, loss, hit, count in zip(self.names, losses, hits, counts)}
        out = {prefix + "loss": sum(loss_weights[name] * means[name][0] for name in self.names)}
        for name, (loss, accuracy) in means.items():
            out[f"{prefix}{name}_loss"] = loss
            if not math.isnan(accuracy):                        # (an alignment has no right and wrong)
                out[f"{prefix}{name}_accuracy"] = accuracy
        return out


def to_device(batch, device, config):
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch | {name: normalized(config, batch[name]) for name in ("image", "image_1") if name in batch}


def clock(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


@torch.no_grad()
def evaluate(model, task, table, settings, device, autocast, rank, world):
    """Losses and accuracies on a table's captions, each counted once whatever the number of processes."""
    count = len(table.row_of)
    some = min(settings.eval_samples or count, count)
    chosen = [i * count // some for i in range(some)]
    size = settings.micro_batch or max(1, settings.global_batch // world)
    batches = evaluation_batches(token_lengths(table, task.tok, chosen), chosen, size)
    rounds = -(-len(batches) // world)
    # A process that has nothing left repeats the first batch, uncounted: sharded models must run in step.
    mine = [batches[k] if k < len(batches) else batches[0] for k in range(rank, rounds * world, world)]
    counted = [k < len(batches) for k in range(rank, rounds * world, world)]
    loader = DataLoader(task.dataset(table, train=False), batch_sampler=mine, collate_fn=task.collate,
                        num_workers=loader_workers(settings, device), pin_memory=device.type == "cuda")
    weights_of = task.config.loss_weights
    sums = Sums(weights_of, device)
    model.eval()
    for (batch, notes), counts in zip(loader, counted):
        with autocast:
            results = model(to_device(batch, device, task.config))
        if counts:
            sums.add(results, torch.tensor([notes["counts"][name] for name in weights_of], device=device))
    model.train()
    return sums.read(weights_of, "val_")


# ---------------------------------------------------------------------------------------------------------------------
# The run.

class Halt(Exception):
    """The run stops itself; the message says why."""


def main(argv=None):
    settings, config_flags = parse(argv)
    try:
        train(settings, config_flags)
    except (FileNotFoundError, ValueError, Halt) as error:
        if os.environ.get("DEBUG"):         # the sentence is for users; this is for whoever changes the code
            raise
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(settings, config_flags):
    rank, world, device = set_up(settings)
    say = print if rank == 0 else lambda *a, **k: None
    out = Path(settings.out)
    checkpoint = out / "last.pt"
    if checkpoint.exists() and not settings.resume:
        raise ValueError(f"{checkpoint} exists: --resume goes on from it; for a new run choose another --out")
    saved = weights.read(checkpoint) if settings.resume and checkpoint.exists() else None
    micro_batch, accumulation = split_batch(settings, world)
    for flag in ("vit", "text", "load"):
        if getattr(settings, flag) and not Path(getattr(settings, flag)).exists():
            raise FileNotFoundError(f"--{flag} {getattr(settings, flag)}: there is no such file")
    precision = choose_precision(settings, device)

    # data
    source = weights.load(settings.load) if settings.load and not saved else None
    config = weights.config_of(saved) if saved else source.config if source else MODELS[settings.model]
    for name in config_flags.keys() - {field.name for field in fields(config)}:
        raise ValueError(f"--{name.replace('_', '-')}: the model of {settings.load} has no such setting")
    meant = MODELS[RECIPES[settings.task].get(settings.recipe, {}).get("model", settings.model)]
    published = settings.recipe and not settings.recipe.startswith("toy")       # toy's do for either backbone
    if source and published and type(meant) is not type(config):
        raise ValueError(f"--recipe {settings.recipe} starts from a model of {weights.backbone_of(meant)}; {settings.load} is "
                         f"one of {weights.backbone_of(config)}")
    if settings.task == "retrieval" and settings.false_captions < 1:
        raise ValueError(f"--false-captions {settings.false_captions}: at least 1 is expected, or there is no choice")
    task_class = task_of(settings.task, config)
    tables = {split: task_class.table(settings, split) for split in ("train", "val")}
    tok = task_class.add_special_tokens(open_tokenizer(settings, config_flags, saved, source, tables["train"], rank, say))
    config = replace(config, **{"pooler": True} | config_flags)         # the task takes away what it does not train
    config = task_class.adapt(replace(config, vocab_size=len(tok), cls_id=tok.cls_id, pad_id=tok.pad_id,
                                      sep_id=tok.sep_id, mask_id=tok.mask_id), settings)
    if config_flags.get("label_smoothing") and config.head != "vocab":
        raise ValueError(f"--label-smoothing {config.label_smoothing}: is for words, which head {config.head} does not say")
    answers = task_class.answers(settings) if config.head == "vqa" else None
    if saved and answers != saved.get("answers"):
        raise ValueError(f"{checkpoint}: --resume with another answer list in {settings.data} than the run's")
    max_tokens = min(settings.max_tokens, config.max_tokens)
    pad_to = settings.pad_to or (8 if device.type == "cuda" else 1)
    if config.head == "vocab" and config.itm and micro_batch < 2:
        raise ValueError("image-text matching takes its wrong pictures from the micro-batch: it must hold 2 pairs at least")
    task = task_class(replace(settings, max_tokens=max_tokens, pad_to=pad_to), config, tok)
    lengths = training_lengths(tables["train"], tok, out, rank).clip(max=max_tokens)
    sampler = GlobalBatches(lengths, settings.global_batch, settings.seed, settings.bucket)
    if settings.epochs:
        settings = replace(settings, steps=round(settings.epochs * sampler.steps_per_epoch))

    # model; everybody draws the same weights
    torch.manual_seed(settings.seed)
    model = bare_model = weights.model_of(config)
    if not saved and (settings.load or settings.vit or settings.text):
        loaded_answers = getattr(source, "answer_list", None)
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("head.")}
        del source
        say(weights.start(model, settings.vit, settings.text, settings.load))
        if answers and loaded_answers and loaded_answers != answers:
            model.load_state_dict(fresh, strict=False)
            say(f"the head is drawn anew: {settings.load} answers from another list than that of {settings.data}")
    model.to(device)
    if settings.shard:
        from torch.distributed.fsdp import fully_shard
        if world == 1:
            raise ValueError("--shard needs several processes: start with torchrun")
        for layers in [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer)
        fully_shard(model)
    if settings.compile:
        model.compile(dynamic=True)     # captions and their numbers of targets differ from batch to batch
    groups = parameter_groups(bare_model, settings)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step, counters = 0, None
    if saved:
        check_same_run(checkpoint, saved, settings, config)
        set_state_dict(bare_model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
                       options=StateDictOptions(full_state_dict=True))
        scaler.load_state_dict(saved["scaler"])
        step, counters = saved["step"], saved["counters"]
    if world > 1 and not settings.shard:
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None)
    autocast = torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision),
                              enabled=precision != "fp32")
    loader = DataLoader(task.dataset(tables["train"], train=True),
                        batch_sampler=sampler.micro_batches(step, settings.steps, micro_batch, rank, world),
                        collate_fn=task.collate, num_workers=loader_workers(settings, device),
                        pin_memory=device.type == "cuda")

    if rank == 0:
        describe_run(out, settings, config, precision, world, micro_batch, accumulation, tables, bare_model, step)
    log = Log(out / "metrics.jsonl", step, rank)
    loss_weights = config.loss_weights
    sums = Sums(loss_weights, device)
    seen = counters or dict(samples=0, unreadable=0, cut=0, tokens=0, padded_tokens=0, skipped=0, seconds=0.0)
    skipped = torch.tensor(float(seen["skipped"]), device=device)
    skipped_in_a_row = torch.zeros((), device=device)
    window, window_samples, waited = time.perf_counter(), 0, 0.0        # what is measured since the last report
    first_step = step
    batches = iter(loader)
    model.train()

    while True:
        last, fresh = step == settings.steps, step > first_step     # fresh: not what the checkpoint already knew
        due = lambda every: every and (step % every == 0 or last)
        if tables["val"] and due(settings.eval_every) and (fresh or not saved):
            began = time.perf_counter()
            metrics = evaluate(model if settings.shard else bare_model, task, tables["val"], task.settings, device,
                               autocast, rank, world)
            log.write({"step": step, **metrics})
            say(f"step {step:>6} | validation " + report(metrics, loss_weights, "val_"))
            window += time.perf_counter() - began
        if fresh and (due(settings.save_every) or due(settings.keep) or last):
            model_state, optimizer_state = get_state_dict(
                bare_model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                contents = dict(answers=answers, model=model_state, config=config, task=settings.task,
                                tokenizer_files=weights.pack_tokenizer(tok), optimizer=optimizer_state,
                                scaler=scaler.state_dict(), step=step, settings=asdict(settings),
                                counters=seen | dict(skipped=int(skipped)))
                weights.save(checkpoint, **contents)
                if due(settings.keep):
                    weights.save(out / f"step_{step}.pt", **contents)
        if last:
            break

        # Dropout's random numbers are a function of the step, as the data is: nothing to save, nothing to restore.
        torch.manual_seed(hash((settings.seed, step, rank)) % 2 ** 63)
        rate = rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["scale"] * rate

        # The mean of each loss is over the targets of the global batch, so they are counted before the first backward.
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(accumulation)]
        waited += time.perf_counter() - began
        counts = torch.tensor([[notes["counts"][name] for name in loss_weights] for _, notes in micro_batches],
                              dtype=torch.float32).to(device, non_blocking=True)                # (accumulation, losses)
        totals = counts.sum(0)
        if world > 1:
            dist.all_reduce(totals)
        factors = world / totals.clamp(min=1)                   # DDP and FSDP average over the processes
        for i, (batch, notes) in enumerate(micro_batches):
            sync = i == accumulation - 1
            if settings.shard:
                bare_model.set_requires_gradient_sync(sync)
            with model.no_sync() if world > 1 and not settings.shard and not sync else contextlib.nullcontext():
                with autocast:
                    results = model(to_device(batch, device, config))
                loss = sum(loss_weights[name] * results[name][0] * factor for name, factor in zip(loss_weights, factors))
                scaler.scale(loss).backward()
            sums.add(results, counts[i])
            for name in ("samples", "tokens", "padded_tokens", "cut"):
                seen[name] += notes[name]
            seen["unreadable"] += len(notes["unreadable"])
            log.unreadable(notes["unreadable"])
        if seen["unreadable"] > max(10, settings.max_unreadable * seen["samples"]):
            raise Halt(f"{seen['unreadable']} of {seen['samples']} images cannot be decoded (named in "
                       f"{log.unreadable_path}), more than --max-unreadable {settings.max_unreadable}")

        # A gradient that is not finite is skipped and counted, on the device: the loop never waits to find out.
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in bare_model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = (~torch.isfinite(norm)).float()
        skipped, skipped_in_a_row = skipped + bad, (skipped_in_a_row + bad) * bad
        if settings.clip:
            torch.nn.utils.clip_grads_with_norm_(bare_model.parameters(), settings.clip, norm)
        if not scaler.is_enabled():
            optimizer.found_inf = bad                           # the fused AdamW does nothing where this is 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        window_samples += settings.global_batch

        if step % settings.log_every == 0 or step == settings.steps:
            metrics = sums.read(loss_weights)                   # waits for the device: the clock below is honest
            if skipped_in_a_row >= settings.max_skipped:
                raise Halt(f"step {step}: {int(skipped_in_a_row)} gradients in a row were not finite; a lower --lr, "
                           f"--clip or --precision bf16 may help")
            now = time.perf_counter()
            speed = window_samples / (now - window)
            seen["seconds"] += now - window                     # of training alone, whatever is evaluated in between
            metrics = {"step": step, **metrics, "lr": settings.lr * rate, "gradient_norm": float(norm),
                       "samples_per_second": speed, "data_wait": waited / (now - window), "memory_gb": memory_gb(device),
                       "padding": 1 - seen["tokens"] / seen["padded_tokens"], "skipped": int(skipped),
                       "unreadable": seen["unreadable"], "cut": seen["cut"], "seconds": seen["seconds"]}
            log.write(metrics)
            eta = (settings.steps - step) * settings.global_batch / speed
            trouble = {"steps skipped": int(skipped), "images unreadable": seen["unreadable"], "captions cut": seen["cut"]}
            say(f"step {step:>6}/{settings.steps} | {report(metrics, loss_weights)} | lr {metrics['lr']:.1e} | "
                f"{speed:.0f} samples/s | data wait {100 * metrics['data_wait']:.0f} % | {metrics['memory_gb']:.1f} GB | "
                f"ETA {clock(eta)}" + "".join(f" | {count} {what}" for what, count in trouble.items() if count), flush=True)
            window, waited, window_samples = now, 0.0, 0
    say(f"done after {clock(seen['seconds'])} of training: {checkpoint}")


def report(metrics, names, prefix=""):
    """loss 2.345 | reconstructed 2.1 (45 %) forward 2.5 (40 %) …"""
    def part(name):
        accuracy = metrics.get(f"{prefix}{name}_accuracy")
        return f"{name} {metrics[f'{prefix}{name}_loss']:.3f}" + (f" ({100 * accuracy:.0f} %)" if accuracy is not None else "")
    return f"loss {metrics[prefix + 'loss']:.4f} | " + " ".join(map(part, names))


def open_tokenizer(settings, config_flags, saved, source, table, rank, say):
    """The checkpoint's tokenizer, else that of --tokenizer, else one trained on the captions (kept in OUT/tokenizer)."""
    if saved:
        return weights.unpack_tokenizer(saved["tokenizer"])
    if source and source.tokenizer:
        return source.tokenizer
    if settings.tokenizer:
        return tokenizer.load(settings.tokenizer)
    if source:
        raise ValueError(f"{settings.load} carries no tokenizer: --tokenizer DIR must name the directory of its files")
    size = config_flags.get("vocab_size", MODELS[settings.model].vocab_size)
    if size > 10_000:
        whose, files = (("BERT", "vocab.txt") if isinstance(MODELS[settings.model], vilt.Config) else
                        ("RoBERTa", "vocab.json and merges.txt"))
        raise ValueError(f"--model {settings.model} has {whose}'s vocabulary of {size}: --tokenizer DIR must name the "
                         f"directory of its {files} (or choose a --vocab-size to train one)")
    directory = Path(settings.out) / "tokenizer"
    if rank == 0:
        say(f"training a tokenizer of {size} tokens on {len(table.row_of):,} captions")
        tokenizer.BPE.train(table.texts(), size).save(directory)
    if dist.is_initialized():
        dist.barrier()
    return tokenizer.load(directory)


def training_lengths(table, tok, out, rank):
    """token_lengths of the training captions, counted once by the first process and kept in OUT/token_lengths.npy."""
    path = out / "token_lengths.npy"
    if rank == 0 and not (path.exists() and len(np.load(path, mmap_mode="r")) == len(table.row_of)):
        out.mkdir(parents=True, exist_ok=True)
        np.save(path, token_lengths(table, tok))
    if dist.is_initialized():
        dist.barrier()
    return np.load(path)


def check_same_run(path, saved, settings, config):
    """A run resumes under the settings it was started with; ValueError names those that differ.

    What the version that saved it did not know yet stood, as it were, at its default.
    """
    ours = {k: v for k, v in (asdict(settings) | asdict(config)).items() if k not in FREE_TO_CHANGE}
    theirs = asdict(Settings()) | asdict(type(config)()) | saved["settings"] | saved["config"]
    differ = [f"{k} {theirs.get(k)!r} -> {v!r}" for k, v in ours.items()
              if theirs.get(k) != v and not (k == "datasets" and list(theirs.get(k, ())) == list(v))]
    if differ:
        raise ValueError(f"{path}: --resume with other settings than the run's: {', '.join(differ)}")


def describe_run(out, settings, config, precision, world, micro_batch, accumulation, tables, model, step):
    """Prints what is about to run and writes it to OUT/config.json: a run directory explains itself."""
    out.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    described = {"command": " ".join(sys.argv), "settings": asdict(settings), "config": asdict(config),
                 "precision": precision, "processes": world, "micro_batch": micro_batch, "accumulation": accumulation,
                 "parameters": parameters, "files": {k: t.paths for k, t in tables.items() if t},
                 "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                 "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}"}
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    train_table = tables["train"]
    print(settings.task, "with", " + ".join(config.loss_weights),
          f"| recipe {settings.recipe or 'none'} | model {settings.load or settings.model}, "
          f"{parameters / 1e6:.1f} M parameters | {precision} on {described['device']}")
    texts = {"vqa": "questions", "nlvr2": "statements"}.get(settings.task, "captions")
    print(f"{len(train_table.row_of):,} {texts} of {len(train_table):,} images | global batch {settings.global_batch} "
          f"= {world} processes x {accumulation} x {micro_batch} | {settings.steps} steps from step {step} = "
          f"{settings.steps * settings.global_batch / len(train_table.row_of):.1f} epochs")


class Log:
    """metrics.jsonl, a line per report, and unreadable.txt; only the first process writes the former.

    A resumed run first drops the lines that the interrupted one wrote after its last checkpoint, a torn one included.
    """

    def __init__(self, path, step, rank):
        self.path = path if rank == 0 else None
        self.unreadable_path = path.with_name(f"unreadable_{rank}.txt")
        if self.path and path.exists():
            kept = [line for line in path.read_text().splitlines() if self.step_of(line) <= step] if step else []
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, path)

    @staticmethod
    def step_of(line):
        try:
            return json.loads(line)["step"]
        except ValueError:
            return math.inf             # the process was killed while it wrote this line

    def write(self, metrics):
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def unreadable(self, lines):
        if lines:
            with open(self.unreadable_path, "a") as file:
                file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
