"""Every setting of a run, each a flag of train.py; and the checks of settings against each other.

    settings, config_flags = parse(["--task", "pretrain", "--recipe", "toy", "--data", …])

The fields below and those of the models' Configs are the flags. The comment beside a field is the
flag's help text, and a comment line above fields is the title of their group. A flag beats the
recipe, and the recipe beats the default.
"""

import argparse
import inspect
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import flm
import vilt
from recipes import MODELS, RECIPES
from released.named import locate
from storage.disk import shortened
from tasks import TASKS, Config
from training import loggers
from training.machine import Machine
from weights import backbone_of


@dataclass(frozen=True)
class Settings:
    """What train.py is told besides the model's Config."""
    # the run
    task: str = "pretrain"          # pretrain, vqa, nlvr2, caption or retrieval
    recipe: str = ""                # name of a recipe in recipes.RECIPES; flags beat its settings
    data: str = ""                  # folder of Arrow files; or of img2dataset's .tar files, or a
                                    # quoted pattern of them, such as "shards/{00000..00331}.tar"
                                    # (captions only; those of a folder `val` beside them validate)
    datasets: tuple = ()          # names of datasets in it (coco vg sbu gcc …); none: all there are
    out: str = ""                   # directory of the run: config.json, metrics.jsonl, last.pt
    resume: bool = False            # go on from OUT/last.pt, if it is there
    seed: int = 0                   # seed of all random numbers
    # what it starts from
    model: str = "base-b32"         # name of a model in recipes.MODELS; --load beats it
    load: str = ""                 # a checkpoint, ours or a released one: sizes, weights, tokenizer
                                    # (a file, a folder, or a name: toy of models/, hf:OWNER/NAME)
    vit: str = ""                 # a file to start the image side from: CLIP's, or for ViLT a ViT's
    text: str = ""                  # a file to start the text side from: RoBERTa's or BERT's
    trust: bool = False             # run the code of TorchScript files that OpenAI did not publish
    tokenizer: str = ""             # directory of vocab.json and merges.txt, or of vocab.txt, if
                                    # no checkpoint has one; default: train one on the captions
    # optimization
    steps: int = 10_000             # optimizer steps
    epochs: float = 0.0             # number of epochs; overrides --steps
    global_batch: int = 256         # pairs per optimizer step, over all processes
    micro_batch: int = 0            # at most so many pairs per forward pass of one process, a
                                    # divisor of its share; 0: its share, on a CPU at most 32; auto:
                                    # as many as fit into memory, found before the first step
    lr: float = 1e-4                # peak learning rate of the group "base"
    head_lr_scale: float = 5.0      # multiple of lr: vocabulary and task heads
    fusion_lr_scale: float = 5.0  # multiple of lr: fusion layers, reconstructor, what leads to them
    muon_lr: float = 0.0            # peak learning rate of Muon, which steps the matrices of base
                                    # and fusion in AdamW's place; 0: AdamW steps all
    warmup: float = 0.05            # share of the steps in which the rate rises from 0
    decay: float = 1.0              # share of the steps after them, the last ones, in which the
                                    # rate falls to 0; between the two it stays at its peak
    weight_decay: float = 0.01      # of matrices and embeddings; vectors and image positions: none
    beta1: float = 0.9              # AdamW's decay of the mean gradient
    beta2: float = 0.98             # AdamW's decay of the mean squared gradient
    clip: float = 0.0               # largest norm of the gradient; 0: not clipped
    max_skipped: int = 10           # non-finite gradients in a row that stop the run at a report
    # data
    hold_out: bool = True           # keep the validation split out of training; some published
                                    # numbers come from training on it too
    max_tokens: int = 50            # tokens of a caption with <s> and </s>; longer ones are cut
    exchange: str = ""              # JSON {group: [words]}; half of FLM's wrong pairs in matching
                                    # (--itm) are then captions with a word exchanged in its group
    false_captions: int = 15        # retrieval: false captions beside each image's own
    captions_per_image: int = 1     # at most so many captions share an image in a micro-batch: it
                                    # is decoded, and passes the ViT, once for all of them
    bucket: int = 1                 # global batches sorted by length together; more: less padding
    pad_to: int = 0                 # pad captions to a multiple of N tokens; 0: 8 on GPU, 1 on CPU;
                                    # several numbers: to the next of these lengths, and round the
                                    # rows that predict words up, so that --compile makes few graphs
    augment: bool = False           # RandAugment(2, 9) of the training images before the resize
    max_unreadable: float = 0.01    # share of undecodable images above which the run stops, if they
                                    # are more than 10; each process looks at its own share
    workers: int = -1               # data-loading processes; -1: on a GPU as many as keep up with
                                    # it, if there are the cores; none on a CPU
    decode_on_device: bool = False  # the device decodes and resizes the JPEGs of training (a GPU by
                                    # nvJPEG) ahead of the steps, in place of the loading processes
    # the machine
    device: str = ""                # cpu, cuda or cuda:N; default: a GPU where there is one
    precision: str = ""             # fp32, bf16 or fp16; default: bf16 on a GPU that has it, else
                                    # fp16; fp32 on a CPU
    compile: bool = False           # compile the model with torch.compile
    cuda_graphs: bool = False       # with --compile and several lengths of --pad-to, on one GPU:
                                    # launch the kernels of a compiled graph at once
    chunk_loss: bool = False        # the loss of words without the memory of all logits, and the
                                    # accuracies of words at the reported steps alone
    checkpoint_activations: bool = False    # recompute the ViT and the fusion layers for their
                                    # gradients: less memory, a third more work in them
    keep_casts: bool = False        # bf16 and fp16: cast the weights once for all micro-batches of
                                    # a step; a second copy of them, in halves
    bucket_views: bool = False      # several processes: gradients lie in the buckets in which DDP
                                    # sends them; saves a copy of them
    static_graph: bool = False      # several processes, one micro-batch a step: tell DDP that all
                                    # steps use the same parameters, as they do here
    shard: bool = False             # fully sharded parameters (FSDP2) instead of DDP
    tensor_parallel: int = 1        # processes over which each layer is divided; the others, in
                                    # groups of so many, share the data
    peak_tflops: float = 0.0        # TFLOP/s of one device, for the utilization that reports give;
                                    # 0: measured at the start by a matrix product
    # reporting
    log: tuple = ()                 # where else the numbers go: tensorboard, wandb or trackio, any
                                    # of them; OUT/metrics.jsonl has them always
    log_every: int = 50             # steps between two reports; the first comes after step 1
    eval_every: int = 1000          # steps between two validations, after a short one at step 10;
                                    # 0: never
    eval_samples: int = 5000        # captions of the validation split, evenly spread; 0: all
    save_every: int = 1000          # steps between two checkpoints, OUT/last.pt
    keep: int = 0                   # steps between two checkpoints kept as OUT/step_N.pt; 0: none
    keep_best: str = ""             # a number of the validation, such as val_loss: the checkpoint
                                    # that is best by it is kept as OUT/best.pt
    dry_run: bool = False           # print what would run, with its memory, and stop; OUT gets the
                                    # token counts and a newly trained tokenizer


# What may differ between a run and its resumption. The order of the data and the mean gradient
# stay the same. (A new micro_batch or number of processes changes what dropout draws, the wrong
# images of matching, and which groups of --captions-per-image are cut.)
FREE_TO_CHANGE = {"resume", "out", "data", "epochs", "micro_batch", "workers", "device", "compile",
                  "shard", "log_every", "eval_every", "eval_samples", "pad_to", "save_every",
                  "keep", "keep_best", "max_unreadable", "max_skipped", "tokenizer", "trust",
                  "dry_run", "peak_tflops", "log", "chunk_loss",
                  "checkpoint_activations", "keep_casts", "bucket_views", "static_graph",
                  "tensor_parallel", "decode_on_device", "cuda_graphs"}


# A CPU gains nothing from larger micro-batches, and its memory is needed for other things.
LARGEST_ON_A_CPU = 32
AUTO = -1                           # micro_batch: as many as fit (training/fitting.py)

# Fields of the models' Configs that the task and the tokenizer decide: they are no flags.
SET_BY_TASK = {"head", "answers", "pooler", "cls_id", "pad_id", "sep_id", "mask_id"}


# -------------------------------------------------------------------------------------------------
# The command line.

def documented_fields(config_class: type) -> dict[str, tuple[str, str]]:
    """Field -> (its group, its help text), from the comments in a dataclass's source."""
    found, group, name = {}, "", ""
    for line in inspect.getsource(config_class).splitlines():
        title = re.match(r"    # (.+)", line)
        field = re.match(r"    (\w+): \w+ = .+?  # (.+)", line)
        more = re.match(r"     +# (.+)", line)
        if title:
            group = title[1]
        elif field:
            name = field[1]
            found[name] = (group, field[2])
        elif more and name:
            found[name] = (found[name][0], f"{found[name][1]} {more[1]}")
        elif line.startswith("    def "):
            break
    return found


def pairs(text: str) -> int:
    """A number of pairs, or AUTO."""
    if text == "auto":
        return AUTO
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a number of pairs, or auto, is expected")
    return int(text)


# Fields whose flags take more than a value of their type.
FORMS = {"micro_batch": {"type": pairs}, "pad_to": {"nargs": "+"}}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of Settings and of the models' Configs."""
    groups = {}

    def add(title, name, kind, text):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        how = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}
        how |= FORMS.get(name, {})
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        if kind is tuple:
            how = {"nargs": "+", "metavar": "NAME"}
        flag = "--" + name.replace("_", "-")
        groups[title].add_argument(flag, default=None, help=text.replace("%", "%%"), **how)

    help_of = documented_fields(Settings)
    for field in fields(Settings):
        title, text = help_of[field.name]
        has_value = type(field.default) in (str, int, float) and field.default != ""
        if has_value and "default:" not in text:
            text += f" (default: {field.default})"
        add(title, field.name, type(field.default), text)

    vilt_fields = {field.name: field for field in fields(vilt.Config)}
    flm_help, vilt_help = documented_fields(flm.Config), documented_fields(vilt.Config)
    for field in fields(flm.Config):
        twin = vilt_fields.pop(field.name, None)
        if field.name in SET_BY_TASK:
            continue
        title, text = flm_help[field.name]
        text += f" (default: {field.default})"
        if twin:
            text += f"; ViLT: {vilt_help[field.name][1]} (default: {twin.default})"
        add(f"model: {title}" if title else "model", field.name, type(field.default), text)
    for field in vilt_fields.values():
        text = f"{vilt_help[field.name][1]} (default: {field.default})"
        add("model: ViLT alone", field.name, type(field.default), text)


def parse(argv: list[str] | None) -> tuple[Settings, dict]:
    """Command line -> (Settings, the fields of the model's Config that recipe or flags ask for)."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="ONE training loop: pretraining and every fine-tuning task.",
        usage="train.py --task TASK --data DIR --out DIR [--recipe NAME] [--FLAG VALUE …]",
        epilog="Published settings: train.py --list-recipes", allow_abbrev=False)
    parser.add_argument("--list-recipes", action="store_true", help="print all recipes and stop")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    given = {name: value for name, value in flags.items() if value is not None}
    if given.pop("list_recipes"):
        list_recipes()
        sys.exit(0)
    task, recipe = given.get("task", Settings.task), given.get("recipe", "")
    if task not in TASKS:
        parser.error(f"--task {task}: one of {', '.join(TASKS)} is expected")
    recipes = RECIPES.get(task, {})
    if recipe and recipe not in recipes:
        parser.error(f"--recipe {recipe}: one of {', '.join(recipes)} is expected "
                     f"for task {task}")
    merged = recipes.get(recipe, {}) | given
    if "steps" in given and "epochs" not in given:
        merged["epochs"] = 0.0              # a flag beats the recipe's epochs
    if "pad_to" in given:                   # a multiple, or several lengths
        lengths = tuple(given["pad_to"])
        merged["pad_to"] = lengths if len(lengths) > 1 else lengths[0]
    for name in ("datasets", "log"):
        merged[name] = tuple(merged.get(name, ()))
    model = merged.setdefault("model", Settings.model)
    if model not in MODELS:
        parser.error(f"--model {model}: one of {', '.join(MODELS)} is expected")
    for flag, what in (("data", "Arrow files"), ("out", "the run")):
        if not merged.get(flag):
            parser.error(f"--{flag} is needed: the directory of {what}")
    names = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in merged.items() if name in names})
    config_flags = {name: value for name, value in merged.items() if name not in names}
    if not settings.load:
        try:
            check_config_flags(config_flags, MODELS[model], f"model {model}")
        except ValueError as error:
            parser.error(str(error))
    return settings, config_flags


def list_recipes() -> None:
    """Prints every recipe with its settings."""
    for task, recipes in RECIPES.items():
        print(task)
        for name, row in recipes.items():
            splits = "train" if row.get("hold_out", Settings.hold_out) else "train+val"
            settings = " ".join(f"{key}={value}" for key, value in row.items() if key != "hold_out")
            print(f"  {name:<13} splits={splits} {settings}")


# -------------------------------------------------------------------------------------------------
# Checks.

def check(settings: Settings, machine: Machine) -> None:
    """ValueError or FileNotFoundError for settings that do not go together."""
    s = settings
    for flag in ("vit", "text", "load"):
        if getattr(s, flag):
            locate(getattr(s, flag))
    if s.exchange and not Path(s.exchange).exists():
        raise FileNotFoundError(f"--exchange {s.exchange}: there is no such file")
    for checkpoint in (Path(s.out) / "last.pt", Path(s.out) / "previous.pt"):
        if checkpoint.exists() and not (s.resume or s.dry_run):
            raise ValueError(f"{checkpoint} exists: --resume goes on from it; for a new run choose "
                             "another --out")
    loggers.check(s.log)
    if not 0 <= s.peak_tflops < math.inf:
        raise ValueError(f"--peak-tflops {s.peak_tflops}: TFLOP/s of one device are expected")
    if s.seed < 0:
        raise ValueError(f"--seed {s.seed}: at least 0 is expected")
    lengths = [s.pad_to] if isinstance(s.pad_to, int) else s.pad_to
    if s.pad_to and min(lengths) < 1:
        raise ValueError(f"--pad-to {' '.join(map(str, lengths))}: lengths in tokens are expected")
    if not 0 < s.decay <= 1:
        raise ValueError(f"--decay {s.decay}: a share above 0, at most 1, is expected")
    if s.shard and s.muon_lr:
        raise ValueError("--muon-lr needs whole matrices, which --shard cuts")
    if s.shard and s.micro_batch == AUTO:
        raise ValueError("--micro-batch auto needs whole models, which --shard cuts: a process "
                         "that runs out of memory would leave the others waiting")
    if s.shard and machine.data_world == 1:
        several = f"more than {s.tensor_parallel}" if machine.tensor > 1 else "several"
        raise ValueError(f"--shard needs {several} processes: start with torchrun")
    check_tensor_parallel(s)
    if s.task == "retrieval" and s.false_captions < 1:
        raise ValueError(f"--false-captions {s.false_captions}: at least 1 is expected, or there "
                         "is no choice")
    if s.decode_on_device and s.augment:
        raise ValueError("--decode-on-device does not go with --augment, which changes pictures "
                         "before they are resized, in the loading processes")
    if s.captions_per_image < 1:
        raise ValueError(f"--captions-per-image {s.captions_per_image}: at least 1 is expected")
    if s.captions_per_image > 1 and s.task == "retrieval":
        raise ValueError(f"--captions-per-image {s.captions_per_image}: retrieval shows an image "
                         "with one true caption, and --false-captions says with how many others")
    if s.cuda_graphs and (not s.compile or isinstance(s.pad_to, int) or machine.world > 1
                          or s.micro_batch == AUTO):
        raise ValueError("--cuda-graphs needs --compile, several lengths of --pad-to (each shape "
                         "is a graph), a --micro-batch other than auto, and a single process")
    _, accumulation = split_batch(s, machine)
    if s.static_graph and (accumulation > 1 or s.micro_batch == AUTO):
        raise ValueError("--static-graph: DDP sends the gradients of each micro-batch then, so a "
                         "process must have one a step: its share of the global batch")


def check_tensor_parallel(settings: Settings) -> None:
    """ValueError for what does not go with --tensor-parallel. (Sizes: parallel.check.)"""
    s = settings
    if s.tensor_parallel == 1:
        return
    if s.muon_lr:
        raise ValueError("--muon-lr needs whole matrices, which --tensor-parallel divides")
    if s.micro_batch == AUTO:
        raise ValueError("--micro-batch auto needs whole models, which --tensor-parallel divides")
    for flag in ("compile", "chunk_loss", "bucket_views", "static_graph"):
        if getattr(s, flag):
            raise ValueError(f"--{flag.replace('_', '-')} does not go with --tensor-parallel")
    if s.precision == "fp16":
        raise ValueError("--precision fp16 does not go with --tensor-parallel: bf16 or fp32 does")


def split_batch(settings: Settings, machine: Machine) -> tuple[int, int]:
    """The global batch -> (micro-batch, micro-batches that one process accumulates per step).

    A process's share is cut into equal micro-batches of at most --micro-batch pairs. What fits into
    memory (AUTO) is not known yet: then they are as for 0.
    """
    share, rest = divmod(settings.global_batch, machine.data_world)
    most = LARGEST_ON_A_CPU if machine.device.type == "cpu" else share
    if settings.micro_batch not in (0, AUTO):
        most = settings.micro_batch
    if rest or share < 1 or most < 1:
        raise ValueError(f"--global-batch {settings.global_batch} --micro-batch "
                         f"{settings.micro_batch}: {machine.data_world} processes cannot share it")
    micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    return micro, share // micro


def check_config_flags(config_flags: dict, config: Config, what: str) -> None:
    """ValueError for a flag that the model's Config does not have. what: how to call the model."""
    names = {field.name for field in fields(config)}
    for name in config_flags:
        if name not in names:
            raise ValueError(f"--{name.replace('_', '-')}: {what} has no such setting")


def check_model(settings: Settings, config_flags: dict, config: Config) -> None:
    """ValueError for settings that do not go with the model that --load opened."""
    s = settings
    check_config_flags(config_flags, config, f"the model of {s.load}")
    if not s.recipe or s.recipe.startswith("toy"):      # toy's serve either backbone
        return
    meant = MODELS[RECIPES[s.task][s.recipe]["model"]]
    if type(meant) is not type(config):
        raise ValueError(f"--recipe {s.recipe} starts from a model of {backbone_of(meant)}; "
                         f"{s.load} is one of {backbone_of(config)}")


def check_task(settings: Settings, config_flags: dict, config: Config, micro_batch: int) -> None:
    """ValueError for settings that do not go with the Config that the task made of the model's."""
    if config_flags.get("label_smoothing") and config.head != "vocab":
        raise ValueError(f"--label-smoothing {config_flags['label_smoothing']}: is for words, "
                         f"which head {config.head} does not predict")
    if settings.chunk_loss and config.head != "vocab":
        raise ValueError(f"--chunk-loss: is for words, which head {config.head} does not predict")
    if settings.exchange and not (isinstance(config, flm.Config) and config.itm):
        raise ValueError("--exchange: is for FLM's image-text matching (--itm)")
    most = settings.captions_per_image
    if config.head == "vocab" and config.itm and micro_batch <= most:
        raise ValueError("image-text matching takes its wrong images from the micro-batch: it must "
                         f"hold at least {most + 1} pairs")


def check_same_run(path: Path, saved: dict, settings: Settings, config: Config,
                   files: list) -> None:
    """ValueError unless a run resumes with the settings and the data that it was started with.

    (The answer list of vqa is compared in runs.open_run.)
    Settings added since the checkpoint was written count as their defaults. More steps are allowed.
    files: [[name, rows]] of the training data.
    """
    ours = asdict(settings) | asdict(config)
    theirs = asdict(Settings()) | asdict(type(config)()) | saved["settings"] | saved["config"]
    ours["datasets"], theirs["datasets"] = list(ours["datasets"]), list(theirs["datasets"])
    differ = [f"{name} {theirs.get(name)!r} -> {value!r}" for name, value in ours.items()
              if name not in FREE_TO_CHANGE and theirs.get(name) != value]
    if type(theirs["steps"]) is int and theirs["steps"] < settings.steps:
        differ = [text for text in differ if not text.startswith("steps ")]
    if differ:
        raise ValueError(f"{path}: --resume with other settings than the run's: "
                         f"{', '.join(differ)}")
    before = saved.get("files", files)
    if before != files:
        raise ValueError(f"{path}: --resume with other data than the run's, [file, rows]: "
                         f"{shortened(before)} -> {shortened(files)}")
