"""Checkpoints: opens ours and other people's; saves ours so that a crash never leaves half a file.

    python weights.py info pretrain_4m.ckpt             # what it is, what becomes of its tensors
    python weights.py convert pretrain_4m.ckpt flm.safetensors --tokenizer roberta-base
    python weights.py convert runs/vilt/last.pt exported --to transformers
    python weights.py download clip-b32                 # without a name: the list
    python weights.py push runs/toy owner/name          # to the Hub; --load hf:owner/name opens it

    model = load("pretrain_4m.ckpt")    # in eval mode; has .task .tokenizer .answer_list .report
    model = load("toy")                 # by a name: of models/, or hf:OWNER/NAME on the Hub
    print(start(model, vit="ViT-B-32.pt", text="roberta-base"))     # begins as the paper does

No file runs code (released/files.py), none is opened whose bytes do not match its checksums
(released/whole.py), and none is taken "more or less": every tensor is accounted for in a
`names.Report`, and what cannot be is an error that names it.

Files are mapped, not read: until a weight is written to, it is a page of its file. So a file that
is open must not be changed in place. `save` never does: it writes a new one under the old name.
"""

import argparse
import json
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flm
import tokenizer
import vilt
from released import begin, card, download, hub, models, names
from released.export import ARCHITECTURES, export  # noqa: F401 (others use both)
from released.files import (check_tensors, one_sentence, open_file, open_folder, plain_dict,
                            plain_tensors, read_config, tensors_in)
from released.models import Source, Undrawn
from released.named import locate
from released.names import Report
from released.whole import carried, write_safetensors, write_torch
from storage import disk
from tasks import TASKS, Config
from vocabulary import Tokenizer

FORMAT = "flm-vilt-1"
BACKBONES = {"flm": (flm.Config, flm.FLM), "vilt": (vilt.Config, vilt.ViLT)}


def backbone_of(config: Config) -> str:
    """The name of a Config's model in checkpoints."""
    for name, (config_class, _) in BACKBONES.items():
        if type(config) is config_class:
            return name
    raise TypeError(f"{type(config).__name__} is the Config of no backbone")


# Settings of a Config that the first checkpoints lack: their defaults are meant.
ADDED = ("image_positions", "label_smoothing", "silent_attention")


def config_of(contents: dict) -> Config:
    """The Config of a checkpoint of ours, as `read` returned it.

    ValueError unless it has all of a Config's fields, no other, and values that go together.
    """
    backbone, values = contents["backbone"], contents["config"]
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r}: one of {', '.join(BACKBONES)} is expected")
    config_class = BACKBONES[backbone][0]
    known = [field.name for field in fields(config_class)]
    unknown = [name for name in values if name not in known]
    missing = [name for name in known if name not in values and name not in ADDED]
    if unknown or missing:
        what = f"has no field {unknown[0]!r}" if unknown else f"needs {missing[0]}"
        raise ValueError(f"its config: a Config of {backbone} {what}")
    return config_class(**values)


def model_of(config: Config) -> nn.Module:
    """The model that a Config describes, its weights freshly drawn."""
    return BACKBONES[backbone_of(config)][1](config)


def outline_of(config: Config) -> nn.Module:
    """The model that a Config describes, without weights: it takes no memory and little time."""
    with torch.device("meta"), Undrawn():
        return model_of(config)


# -- our own files ---------------------------------------------------------------------------------

def save(path: str | Path, model: dict, config: Config, task: str, tokenizer_files: dict | None,
         **more: Any) -> None:
    """Writes a checkpoint; it appears under its name only when all of it is on the disk.

    model: a state dict. tokenizer_files: what pack_tokenizer returns. more: plain values, among
    them `answers`, the list of a VQA head; in a torch file also tensors (an optimizer's, …).
    A name that ends in .safetensors makes a safetensors file, with all but the weights as JSON in
    its metadata; any other name makes a torch file.
    """
    path = Path(path)
    about = {"format": FORMAT, "backbone": backbone_of(config), "config": asdict(config),
             "task": task, "tokenizer": tokenizer_files, **more}
    if path.suffix == ".safetensors":
        write_safetensors(path, model, {name: json.dumps(value) for name, value in about.items()})
    else:
        write_torch(path, about | {"model": model})


def save_model(path: str | Path, model: nn.Module, half: bool = False, **more: Any) -> None:
    """Writes a model that `load` returned, with its tokenizer and answers, without an optimizer.

    half: in float16, from which `load` makes float32 again; ValueError for weights beyond its
    range. more: as `save` takes it.
    """
    state = model.state_dict()
    if half:
        state = {name: tensor.half() for name, tensor in state.items()}
        names.check_finite(state, {name: [name] for name in state}, f"{path}: in half precision")
    files = pack_tokenizer(model.tokenizer) if model.tokenizer else None
    settings = {name: value for name, value in model.about.items() if name != "whose"}
    save(path, state, model.config, model.task, files, step=model.step, answers=model.answer_list,
         settings=settings, **more)


def read(path: str | Path) -> dict:
    """Opens a checkpoint of ours, of both kinds of files, as the dict of what `save` was given.

    Its weights fit its config, and all that it holds is plain (open_ours); a run compares the rest
    with itself. ValueError in one sentence for anything else.
    """
    source = open_source(path)
    if source.family is not names.OURS:
        raise ValueError(f"{path}: it is {source.family.about}; a checkpoint of this project is "
                         f"expected")
    return source.contents


def check_fit(found: dict, own: dict, needed: Iterable[str], path: str | Path,
              called: dict) -> None:
    """ValueError unless a file's tensors fit the model's, and those that it needs are there.

    found, own: our name -> tensor, of the file and of the model. called: our name -> the file's.
    """
    problems = [f"lacks {name}" for name in needed if name not in found]
    for name, tensor in found.items():
        theirs = " + ".join(called.get(name, [name]))
        shape = tuple(tensor.shape)
        if name not in own:
            problems.append(f"has {theirs} {shape}, for which the model has no place")
        elif tensor.shape != own[name].shape:
            problems.append(f"has {theirs} {shape}, expected {tuple(own[name].shape)}")
    if problems:
        more = ", …" if len(problems) > 3 else ""
        raise ValueError(f"{path}: does not fit the model: it {', '.join(problems[:3])}{more}")


def load_exactly(model: nn.Module, state: dict, path: str | Path, called: dict | None = None,
                 assign: bool = False) -> None:
    """Fills a model from a state dict that must have exactly its names and shapes.

    ValueError says which it has not. called: our name -> the file's names, for that sentence.
    assign: the model gets these tensors themselves, not copies.
    """
    own = model.state_dict()
    check_fit(state, own, own, path, called or {})
    model.load_state_dict(state, assign=assign)


def pack_tokenizer(tok: Tokenizer) -> dict[str, str]:
    """The tokenizer's files as {name: text}, to travel inside a checkpoint."""
    return dict(sorted(tok.files().items()))


def unpack_tokenizer(files: dict | None) -> tokenizer.BPE | tokenizer.WordPiece | None:
    """What pack_tokenizer packed; None for a checkpoint without one."""
    if not files:
        return None
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name, text in files.items():
                (Path(directory) / Path(name).name).write_text(text, encoding="utf-8")
            return tokenizer.load(directory)
        except (OSError, TypeError, ValueError, RecursionError) as error:
            what = str(error).replace(f"{directory}/", "").replace(directory, "")
            raise ValueError(f"its tokenizer: {what.lstrip(': ')}") from None


# -- opening any file ------------------------------------------------------------------------------

# Names in checkpoints written before 2026-11-26 -> what they are called now.
RENAMED = {"forward_weight": "left_to_right_weight", "reverse_weight": "right_to_left_weight",
           "head_lr": "head_lr_scale", "fusion_lr": "fusion_lr_scale"}

def open_source(path: str | Path, trust: bool = False) -> Source:
    """Opens a file, a folder of the Hub, or what has a name (released/named.py).

    ValueError or FileNotFoundError in a sentence.
    """
    path = locate(path)
    with one_sentence(path):
        if path.is_dir():
            folder, (contents, files) = path, open_folder(path)
        else:
            folder, contents, files = path.parent, open_file(path, trust), [path]
        if not isinstance(contents, dict):
            raise ValueError(f"not a checkpoint of this project, nor a table of tensors, but a "
                             f"{type(contents).__name__}")
        size = sum(file.stat().st_size for file in files)
        tensors = tensors_in(contents)
        state = {names.unwrapped(name): tensor for name, tensor in tensors.items()}
        if len(state) < len(tensors):
            raise ValueError("two of its tensors have one name, but for what wrappers put into it")
        source = Source(path, names.OURS, state, {}, contents, folder, files)
        if contents.get("format") == FORMAT:
            check_tensors(plain_tensors(contents), size)
            open_ours(source)
            return source
        check_tensors(state.items(), size)
        source.family = names.family_of(state)
        if source.family is None:
            raise ValueError(f"not a checkpoint of this project nor of another that is known here; "
                             f"it holds {len(state)} tensors ({', '.join(list(state)[:3])}, …)")
        source.settings = read_config(folder / "config.json")
        if source.family in (names.FLM, names.VILT):
            hyper = plain_dict(contents.get("hyper_parameters"))
            source.settings = (hyper | plain_dict(contents.get("config"))
                               | plain_dict(hyper.get("config")))
        return source


# What opening needs of a checkpoint of ours; a run that resumes compares the rest with itself.
PARTS = {"backbone": str, "config": dict, "model": dict, "task": str, "tokenizer": dict,
         "answers": list, "step": int, "settings": dict}
NEEDED = ("backbone", "config", "model", "task", "tokenizer")

def open_ours(source: Source) -> None:
    """Checks a checkpoint of ours, all of whose values are plain, against itself.

    ValueError unless its parts are there and of their types, its config is one, its tensors are
    those of that model, its tokenizer opens, and its answers are as many as the head has.
    """
    contents, state = source.contents, source.state
    missing = [name for name in NEEDED if name not in contents]
    if missing:
        raise ValueError(f"a damaged checkpoint of this project, without {', '.join(missing)}")
    for name in PARTS.keys() & contents.keys():
        part, kind = contents[name], PARTS[name]
        absent = part is None and name in ("tokenizer", "answers")
        if not absent and (not isinstance(part, kind) or isinstance(part, bool)):
            has = type(part).__name__
            raise ValueError(f"its {name} is a {has}, a {kind.__name__} is expected")
    contents["model"] = state
    for part in ("config", "settings"):
        contents[part] = {RENAMED.get(name, name): value
                          for name, value in plain_dict(contents.get(part)).items()}
    config = config_of(contents)
    layers = [value for name, value in contents["config"].items() if name.endswith("layers")]
    if sum(layers) > len(state):        # said before somebody waits for a billion layers
        raise ValueError(f"its model is missing layers: the config has {sum(layers):,}, "
                         f"but there are {len(state)} tensors")
    own = outline_of(config).state_dict()
    check_fit(state, own, own, source.path, {})
    source.settings, source.answers = contents["settings"], contents.get("answers")
    source.tok = unpack_tokenizer(contents["tokenizer"])
    if contents.get("step", 0) < 0:
        raise ValueError(f"its step is {contents['step']}, at least 0 is expected")
    if contents["task"] not in TASKS:
        raise ValueError(f"its task {contents['task']!r}: one of {', '.join(TASKS)} is expected")
    texts = [answer for answer in source.answers or [] if isinstance(answer, str)]
    if source.answers and not len(texts) == len(source.answers) == config.answers:
        raise ValueError(f"it lists {len(texts)} answers as text, its head has {config.answers}")


def load(path: str | Path, trust: bool = False, **overrides: Any) -> nn.Module:
    """Opens a checkpoint of a whole model. Returns it in eval mode, on the CPU, in float32.

    The file may be ours; FLM's (pretrained, VQAv2, NLVR2, captioning, retrieval; its masked and
    autoregressive baselines); ViLT's own; transformers' ViLT, a folder or a file.
    trust: run a TorchScript archive of unknown origin. overrides: fields of the Config that no
    file stores and the rule gets wrong (vit_heads). ValueError or FileNotFoundError in a sentence.

    Memory: float32 files are mapped; of half-precision files a float32 copy is made.

    The model has .task ("pretrain", "vqa", "nlvr2", "caption", "retrieval"), .tokenizer and
    .answer_list (None where the file has none), .step, .report (a names.Report) and .about (whose,
    recipe, data, datasets). A fine-tuned one has .head.
    """
    return model_in(open_source(path, trust), **overrides)


def model_in(source: Source, **overrides: Any) -> nn.Module:
    """The whole model of an opened file, as `load` returns it."""
    report, source.told = Report(), overrides
    with one_sentence(source.path):
        config, found, called, task = model_parts(source, report)
        model = outline_of(config)
        load_exactly(model, found, source.path, called, assign=True)
        names.check_finite(found, called, source.path)
    model.task, model.tokenizer, model.answer_list = task, source.tok, source.answers
    model.step, model.report, model.about = source.step(), report, source.about()
    return model.eval()


def model_parts(source: Source, report: Report) -> tuple[Config, dict, dict, str]:
    """A whole model -> (Config, our tensors, our name -> the file's names, task)."""
    if source.family is names.FLM:
        return models.flm_parts(source, report)
    if source.family in (names.VILT, names.VILT_TRANSFORMERS):
        return models.vilt_parts(source, report)
    if source.family is not names.OURS:
        raise ValueError(f"{source.family.about}, a part of a model: {use(source)}")
    contents = source.contents
    found, called = names.translate(source.state, source.family, report, source.path)
    config = config_of(contents | {"config": contents["config"] | source.told})
    return config, found, called, contents["task"]


def use(source: Source) -> str:
    return f"train.py {source.family.flag} begins from it"


# -- beginning from what others trained ------------------------------------------------------------

def start(model: nn.Module, vit: str | None = None, text: str | None = None,
          checkpoint: str | None = None, trust: bool = False) -> Report:
    """Fills a freshly drawn model, in place, with what others trained. The device does not matter.

    vit, text: for pretraining. FLM takes CLIP's ViT, less its last block, and RoBERTa's or BERT's
    embeddings and first layers; ViLT takes all of a ViT, and BERT's embeddings alone.
    checkpoint: for fine-tuning, any file that `load` opens, of the same backbone; vit and text win
    over it. trust: run a TorchScript archive of unknown origin.
    Position grids are interpolated to the model's resolution; a larger vocabulary keeps its fresh
    rows. ValueError or FileNotFoundError in a sentence if a file does not fit.
    """
    report, own, filled = Report(), model.state_dict(), set()
    if isinstance(model.config, flm.Config):
        vit_parts, text_parts = begin.clip_parts, begin.text_parts
    else:
        vit_parts, text_parts = begin.vit_parts, begin.bert_embeddings
    files = [(checkpoint, checkpoint_parts), (vit, vit_parts), (text, text_parts)]
    for path, parts_of in files:
        if not path:
            continue
        source = open_source(path, trust)
        with one_sentence(source.path):
            found, called = parts_of(source, model, report)
        names.check_finite(found, called, path)
        for name, tensor in found.items():
            found[name] = begin.adapt(name, tensor, own, called[name], report, path)
        # A module is filled as a whole; of a checkpoint, only the parts may be missing.
        modules = {name.split(".")[0] for name in found}
        needed = [name for name in own if name.split(".")[0] in modules
                  or (parts_of is checkpoint_parts and begin.part_of(name) is None)]
        check_fit(found, own, needed, path, called)
        with torch.no_grad():
            for name, tensor in found.items():
                own[name].copy_(tensor)
        filled |= found.keys()
    for name in own:
        if name not in filled:
            report.add("fresh", [name],
                       f"{begin.part_of(name) or name.split('.')[0]}: drawn at random", "the model")
    return report


def checkpoint_parts(source: Source, model: nn.Module, report: Report) -> tuple[dict, dict]:
    """All of a checkpoint that a model has a place for -> (our tensors, our name -> the file's)."""
    c = model.config
    source.assumed = {name: getattr(c, name) for name in begin.head_fields(c)}
    config, found, called, _ = model_parts(source, report)
    if type(config) is not type(c):
        raise ValueError(f"a checkpoint of {backbone_of(config)}, "
                         f"but the model is {backbone_of(c)}")
    begin.keep_fitting_parts(config, found, called, model, report, source.path)
    return found, called


# -- commands --------------------------------------------------------------------------------------

def summary(path: str | Path, trust: bool = False, verify: bool = False) -> str:
    """What a file is, in lines of text. verify: ValueError for a file that carries no checksums."""
    source = open_source(path, trust)
    checksums = ", ".join(filter(None, map(carried, source.files)))
    if verify and not checksums:
        raise ValueError(f"{path}: this kind of file carries no checksums; what weights.py convert "
                         "writes does")
    checksums = checksums or "none in this kind of file"
    if source.family.flag:
        count = sum(tensor.numel() for tensor in source.state.values())
        return (f"{path}\nwhose        {source.family.about}\nparameters   {count:,}\n"
                f"checksums    {checksums}\nuse          {use(source)}")
    model = model_in(source)
    c, tok, answers = model.config, model.tokenizer, model.answer_list
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        "whose": model.about["whose"],
        "model": backbone_of(c),
        "task": model.task,
        "step": f"{model.step:,}",
        "recipe": model.about["recipe"],
        "data": ", ".join(filter(None, [model.about["data"], *model.about["datasets"]])),
        "parameters": f"{count:,}",
        "config": ", ".join(f"{name}={value}" for name, value in asdict(c).items()),
        "tokenizer": f"{type(tok).__name__}, {len(tok):,} tokens" if tok else "none in the file",
        "checksums": checksums,
    }
    if answers:
        rows["answers"] = f"{c.answers:,}: {', '.join(answers[:5])}, …"
    elif c.answers:
        rows["answers"] = f"{c.answers:,}, of which the file has no list"
    lines = [textwrap.fill(f"{name:<13}{value}", 100, subsequent_indent=" " * 13)
             for name, value in rows.items() if value]
    return "\n".join([str(path), *lines, "tensors", str(model.report)])


def read_answers(path: str | Path) -> list[str]:
    """A JSON list of answers, or a table {number: answer}."""
    answers = disk.read_json(path)
    if isinstance(answers, dict):
        answers = [answers.get(str(i)) for i in range(len(answers))]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}: a JSON list of answers, or a table from 0, 1, … to answers, "
                         f"is expected")
    return answers


def convert(args: argparse.Namespace) -> None:
    model, output = load(args.input, args.trust), Path(args.output)
    if args.tokenizer:
        model.tokenizer = tokenizer.load(args.tokenizer)
    if args.answers:
        model.answer_list = read_answers(args.answers)
        if len(model.answer_list) != model.config.answers:
            raise ValueError(f"{args.answers}: {len(model.answer_list)} answers, "
                             f"but the model has {model.config.answers}")
    print(model.report)
    if args.to == "transformers":
        left_out = export(model, output)
        print(f"wrote {output}")
        if isinstance(model.config, vilt.Config):
            print(f"all LayerNorms with eps {model.config.text_eps}")
        if left_out:
            print(f"transformers goes without {', '.join(left_out)}")
        return
    if output.suffix not in (".pt", ".safetensors") and not output.is_dir():
        output = output.with_name(output.name + ".safetensors")
    save_model(output, model)
    print(f"wrote {output}")


def push(args: argparse.Namespace) -> None:
    hub.check_push(args.repository)
    given = Path(args.folder)
    checkpoint = given / "last.pt" if given.is_dir() else given
    run, model = card.read_run(checkpoint.parent), load(checkpoint)
    model.about = card.without_folders(model.about)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model.safetensors"), model)
        model.tokenizer.save(folder)
        card.write(Path(folder), args.repository, run, backbone_of(model.config))
        print(f"wrote {hub.push(Path(folder), args.repository, args.public)}")


def fetch(args: argparse.Namespace) -> None:
    print(download.fetch(args.name, args.out) if args.name else download.table())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="weights.py {info,convert,download,push} … (weights.py COMMAND --help explains)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="weights.py")
    trusting = argparse.ArgumentParser(add_help=False)
    trusting.add_argument("--trust", action="store_true", help=(
        "open a TorchScript archive that OpenAI has not published; it is a program, which then "
        "runs (default: refuse it)"))
    info = commands.add_parser("info", parents=[trusting], help="print what a file is")
    info.add_argument("path", help="any checkpoint file, a folder of the Hub, or a name")
    info.add_argument("--verify", action="store_true", help=(
        "fail if the file carries no checksums (default: compare those that there are)"))
    info.set_defaults(run=lambda args: print(summary(args.path, args.trust, args.verify)))
    p = commands.add_parser("convert", parents=[trusting], help=(
        "write a checkpoint of ours from any file, or a model for transformers"))
    p.add_argument("input", help="any checkpoint of a whole model, or a folder of the Hub")
    p.add_argument("output", help=(
        "the file to write: NAME.pt is a torch file, all else a safetensors file; with "
        "--to transformers, the folder to write"))
    p.add_argument("--to", choices=("ours", "transformers"), default="ours", help=(
        "whose layout to write; of FLM, transformers gets ViT and text layers (default: ours)"))
    p.add_argument("--tokenizer", metavar="DIR", help=(
        "folder of vocab.json and merges.txt, or of vocab.txt, to put into the file "
        "(default: the input's tokenizer, if it has one)"))
    p.add_argument("--answers", metavar="FILE", help=(
        "JSON list of a VQA head's answers, or a table from number to answer, to put into the file "
        "(default: the input's answers, if it has any)"))
    p.set_defaults(run=convert)
    p = commands.add_parser("download", help="fetch released files")
    p.add_argument("name", nargs="?", help="what to fetch (default: print the list of names)")
    p.add_argument("--out", default=".", metavar="DIR", help=(
        "folder to put the file into; a name of several files gets a folder inside it "
        "(default: the current folder)"))
    p.set_defaults(run=fetch)
    p = commands.add_parser("push", help="put the model of a run on the Hugging Face Hub")
    p.add_argument("folder", metavar="RUN", help="the folder of a run, or a checkpoint in it")
    p.add_argument("repository", metavar="OWNER/NAME", help="where to; it is made if it is new")
    p.add_argument("--public", action="store_true", help="let everybody see it (default: private)")
    p.set_defaults(run=push)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with disk.command("weights.py"):
        args = parse(argv)
        args.run(args)


if __name__ == "__main__":
    main()
