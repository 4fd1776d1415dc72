"""What a run says of itself, and the model card that is made of it.

    run = read_run("runs/x")                    # config.json, and the last lines of metrics.jsonl
    write(folder, "owner/name", run, "flm")     # README.md and config.json for the Hub

Paths of the machine that trained stay there: of each, only the last part goes into a card.
"""

import json
from pathlib import Path
from typing import Any

from storage import disk

# Settings that are paths.
PATHS = ("data", "out", "load", "vit", "text", "tokenizer", "exchange")
NEEDED = {"command", "settings", "config", "parameters"}       # of a run's config.json
BACKBONES = {"flm": "FLM", "vilt": "ViLT"}
# Task -> (what the model does, how it is asked, the Hub's word for it).
DOES = {
    "pretrain": ("pretrained on captions", 'fill {} photo.jpg "a <mask> on a <mask>"', None),
    "vqa": ("fine-tuned to answer questions about a picture",
            'ask {} photo.jpg "what colour is it?"', "visual-question-answering"),
    "nlvr2": ("fine-tuned to judge statements about two pictures",
              'compare {} left.jpg right.jpg "both pictures show a dog"', None),
    "caption": ("fine-tuned to describe pictures", "describe {} photo.jpg", "image-to-text"),
    "retrieval": ("fine-tuned to find pictures by text",
                  'search {} "a dog on a sofa" photographs/', None),
}
CARD = """\
---
tags:
- vision-language
- flm-vilt
{pipeline}---

# {name}

{backbone} with {parameters:,} parameters, {does}. Written by `weights.py push`, from what the
run's config.json and metrics.jsonl say.

## Use

    python eval.py {use}
    model = weights.load("{address}")       # in Python

The tokenizer is in model.safetensors, and beside it.

## Scores

{scores}

These are the run's own last reports, in training and on its validation data. They are no official
scores, which eval.py gives.

## Training

{training}
"""


def read_run(run: Path) -> dict:
    """A run's config.json, with "training" and "validation": its last reports, {} if there is none.

    ValueError for a folder that is no run of train.py.
    """
    if not (run / "config.json").is_file() or not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run}: not the folder of a run, which has config.json and metrics.jsonl")
    described = disk.read_json(run / "config.json")
    if not isinstance(described, dict) or not NEEDED <= described.keys():
        raise ValueError(f"{run}/config.json: not that of a run of train.py")
    described |= {"training": {}, "validation": {}}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            report = json.loads(line)
        except ValueError:              # the line at which a run was killed
            continue
        if isinstance(report, dict):
            described["training" if "seconds" in report else "validation"] = report
    return described


def without_folders(settings: dict) -> dict:
    """Settings, of whose paths only the last part is left."""
    return {name: Path(value).name if name in PATHS and isinstance(value, str) else value
            for name, value in settings.items()}


def public_config(run: dict, backbone: str) -> dict:
    """The config.json that goes with a model to the Hub."""
    kept = {name: run[name] for name in ("config", "precision", "versions") if name in run}
    settings = without_folders(run["settings"])
    return {"backbone": backbone, "task": settings["task"], **kept, "settings": settings,
            "step": run["training"].get("step", 0)}


def model_card(repository: str, run: dict, backbone: str) -> str:
    """The README.md of a model on the Hub, as Markdown. run: what `read_run` returned."""
    address = f"hf:{repository}"
    settings = without_folders(run["settings"])
    does, use, pipeline = DOES[settings["task"]]
    training = {name: value for name, value in settings.items() if value}
    training |= {name: run[name] for name in ("precision", "processes", "device") if name in run}
    training |= {f"{name} version": value for name, value in run.get("versions", {}).items()}
    return CARD.format(
        name=repository.split("/")[1], address=address, use=use.format(address), does=does,
        backbone=BACKBONES[backbone], parameters=run["parameters"], scores=scores_of(run),
        pipeline=f"pipeline_tag: {pipeline}\n" if pipeline else "",
        training=table(["setting", "value"], list(training.items())))


def scores_of(run: dict) -> str:
    """Losses and accuracies of the last reports, side by side."""
    trained, validated, rows = run["training"], run["validation"], []
    named = [name for name in trained if name.endswith(("loss", "accuracy"))]
    for name in named:
        rows.append((name, number(trained[name]), number(validated.get(f"val_{name}"))))
    return table(["", f"training, step {trained.get('step', 0):,}",
                  f"validation, step {validated.get('step', 0):,}"], rows)


def number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def table(heads: list[str], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(folder: Path, repository: str, run: dict, backbone: str) -> None:
    """Writes config.json and README.md, which stand beside the weights on the Hub."""
    config = public_config(run, backbone)
    disk.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    disk.write_text(folder / "README.md", model_card(repository, run, backbone))
