"""The contenders of a comparison: ways to pretrain, as flags of train.py.

    contender = read_contender("FLM, spans of 0.7: --corruption-rate 0.7")
    settings, config = settings_of(contender, options)      # ValueError for flags that do not fit
"""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass, replace

import flm
from recipes import MODELS
from training.settings import Settings, parse


@dataclass(frozen=True)
class Contender:
    """A way to pretrain."""
    name: str
    flags: str                  # of train.py
    principal: bool = False     # runs with every seed, and is fine-tuned; others have one seed
    rate_of: str = ""           # the contender whose rate it takes; "": one is searched for it
    every_row: bool = False     # the vocabulary head reads every row, as in the originals

    @property
    def folder(self) -> str:
        """Its name in names of folders: "MLM 15 %" -> mlm-15."""
        return re.sub("[^a-z0-9.]+", "-", self.name.lower()).strip("-")


# MLM has two principals: 15 % is what everybody uses (BERT), and not its best rate.
CONTENDERS = [
    Contender("FLM", "", principal=True),
    Contender("MLM 15 %", "--objective mlm --mask-rate 0.15", principal=True),
    Contender("MLM 40 %", "--objective mlm --mask-rate 0.4", principal=True),
    Contender("AR", "--objective ar", principal=True),
    Contender("PrefixLM", "--objective prefix"),
    Contender("MLM 50 %", "--objective mlm --mask-rate 0.5", rate_of="MLM 40 %"),
    Contender("FLM, spans of 0.3", "--corruption-rate 0.3", rate_of="FLM"),
    Contender("FLM, spans of 0.5", "--corruption-rate 0.5", rate_of="FLM"),
    # Where does FLM's lead come from? Its parts, one by one.
    Contender("FLM without the streams' losses",
              "--left-to-right-weight 0 --right-to-left-weight 0", rate_of="FLM"),
    Contender("FLM, 15 % predicted", "--prediction-rate 0.15", rate_of="FLM"),
    # The same work for fewer passes of the ViT.
    Contender("FLM, 3 captions of an image", "--captions-per-image 3", rate_of="FLM"),
    # The same models at the speed of the published code.
    Contender("FLM, as the original runs it", "--pad-to 50", rate_of="FLM", every_row=True),
    Contender("MLM 15 %, as the original runs it",
              "--objective mlm --mask-rate 0.15 --pad-to 50", rate_of="MLM 15 %", every_row=True),
]

# Flags of train.py that are the same for all contenders, or that the comparison decides.
DECIDED = {"--task", "--recipe", "--data", "--out", "--resume", "--dry-run", "--seed", "--steps",
           "--epochs", "--warmup", "--decay", "--device", "--workers", "--help", "-h",
           "--list-recipes"}


def read_contender(line: str) -> Contender:
    """ "name: flags" as a contender."""
    name, colon, flags = line.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"--contender {line!r}: NAME: FLAGS is expected, such as "
                         "'FLM, spans of 0.7: --corruption-rate 0.7'")
    return Contender(name.strip(), flags.strip())


def settings_of(contender: Contender, options) -> tuple[Settings, flm.Config]:
    """What a contender's flags ask for. ValueError, in a sentence that names it, if they do not."""
    who, said = f"contender {contender.name!r}", io.StringIO()
    try:
        flags = shlex.split(contender.flags)
        decided = DECIDED & {flag.partition("=")[0] for flag in flags}
        if decided:
            raise ValueError(f"{min(decided)} is decided by the comparison")
        with contextlib.redirect_stderr(said):
            settings, config_flags = parse([*common_flags(options), *flags, "--out", "OUT"])
        if not isinstance(MODELS[settings.model], flm.Config):
            raise ValueError(f"model {settings.model} has none of the objectives "
                             f"{', '.join(flm.OBJECTIVES)}")
        return settings, replace(MODELS[settings.model], **config_flags)
    except SystemExit:          # argparse's way to refuse a flag
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(f"{who}: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def common_flags(options) -> list[str]:
    """The flags of train.py that all contenders share."""
    device = ["--device", options.device] if options.device else []
    return ["--task", "pretrain", "--recipe", options.recipe, "--data", options.data, *device]


def has_own_rate(contender: Contender) -> bool:
    return any(flag.partition("=")[0] == "--lr" for flag in shlex.split(contender.flags))
