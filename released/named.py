"""Where a checkpoint lies: the one door through which what a command is given becomes a path.

    locate("runs/toy/last.pt")          # a path that exists is taken as it is
    locate("toy")                       # models/toy.safetensors, which lies in this repository
    locate("hf:owner/name@v1")          # the Hub's folder of that version, fetched once

`weights.load` and every command that takes a checkpoint come through here.
"""

import re
from pathlib import Path

from released.hub import fetch_model

MODELS = Path(__file__).resolve().parents[1] / "models"
HUB = "hf:"
NAME = re.compile(r"[\w-]+")            # neither a folder nor an ending


def model_names() -> list[str]:
    """The names of the models in models/."""
    return sorted(file.stem for file in MODELS.glob("*.safetensors"))


def locate(checkpoint: str | Path) -> Path:
    """The file or folder that a path, a name of models/ or hf:OWNER/NAME stands for.

    FileNotFoundError or ValueError in a sentence where there is none.
    """
    name = str(checkpoint)
    if Path(checkpoint).exists():
        return Path(checkpoint)
    if name.startswith(HUB):
        return fetch_model(name.removeprefix(HUB))
    if NAME.fullmatch(name):
        if name in model_names():
            return MODELS / f"{name}.safetensors"
        known = ", ".join(model_names()) or "none; `make models` makes them"
        raise FileNotFoundError(f"{name}: there is no such checkpoint, and no model of this name "
                                f"(models/ has {known})")
    raise FileNotFoundError(f"{name}: there is no such checkpoint")


def beside(checkpoint: str | Path, name: str) -> Path:
    """Where a command writes what it makes of a checkpoint, unless it is told another place.

    That is beside the checkpoint; for one that is known by its name alone, in runs/models/NAME.
    """
    if Path(checkpoint).exists():
        return Path(checkpoint).with_name(name)
    return Path("runs", "models", str(checkpoint).removeprefix(HUB), name)
