"""A web page on which to try models: fill in words, ask, describe, compare, search, see the masks.

    make demo                                           # installs what it needs, starts it
    python -m tools.demo runs/mine/last.pt runs/mine-vqa/last.pt
    python -m tools.demo --host 0.0.0.0 --port 8000     # others on the network may come, too

Without checkpoints it opens those of models/, or what `make` and its targets have trained. It has a
tab for everything that the checkpoints can do, and says how to make what is missing. Where there is
no photograph at hand, it draws scenes of the toy world, of which all is known.

The page is served from this machine to this machine alone, unless --host says otherwise. Nothing is
sent or fetched elsewhere. What is uploaded is removed when the page ends.

Needs `pip install '.[demo]'` (Gradio). The page is laid out in demo_page.py, what it shows is
computed in demo_answers.py.
"""

import argparse
import importlib.util
import os
import tempfile
import time

from eval import MODEL_FLAGS, add_flag
from tools import demo_answers
from training import machine

FLAGS = [
    ("--host NAME", "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in"),
    ("--port N", None, "port to listen on; default: the first free one from 7860"),
]


def check_gradio():
    """ValueError where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs a package: pip install '.[demo]'")


def serve(args):
    """Opens the models, starts the page, prints its address, and stays until Ctrl-C."""
    check_gradio()
    place = machine.set_up(args.device, args.precision)
    checkpoints = args.checkpoints or demo_answers.existing_defaults()
    models = demo_answers.open_models(checkpoints, place.device, args.tokenizer or "")
    with tempfile.TemporaryDirectory(prefix="demo_") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1",
                       "GRADIO_TEMP_DIR": folder}
        from tools import demo_page
        address = demo_page.start(demo_page.Page(models, place, folder), args.host, args.port)
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help=(
        "files or folders that weights.py opens; default: the models of models/, or of `make`"))
    for flag, default, about in [*FLAGS, *MODEL_FLAGS]:
        add_flag(parser, flag, default, about)
    args = parser.parse_args(argv)
    with machine.running("demo.py"):
        serve(args)


if __name__ == "__main__":
    main()
