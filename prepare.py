"""Raw downloads -> Arrow files with ViLT's names and columns.

    python prepare.py coco downloads/coco --out data/4m --shorter 384
    python prepare.py img2dataset downloads/cc3m --out data/4m
    python prepare.py vqav2 downloads/vqa --out data/vqa
    python prepare.py folder photographs --name mine --out data/mine
    python prepare.py jsonl captions.jsonl --name mine --out data/mine
    python prepare.py check data/mine/mine_caption_train.arrow
    python prepare.py stats data/mine --out mine.png

`prepare.py COMMAND --help` shows the layout that COMMAND expects, and its flags.

Without --shorter the original bytes of the pictures are stored. A file appears under its name only
when it is complete. To continue a run that was stopped, start it again. What was left out, and why,
is in NAME.skipped.jsonl beside each file.
"""

import os
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sources import captions, questions
from sources.check import check
from sources.shards import convert
from sources.stats import stats
from storage import disk


class Source(NamedTuple):
    shards: Callable                # (parsed arguments) -> the Shards to write
    root: str                       # what ROOT is
    writes: str                     # the files
    flags: tuple[str, ...] = ()     # besides those of COMMON


SOURCES = {
    "coco": Source(
        captions.coco,
        "folder with {train2014,val2014}/*.jpg and karpathy/dataset_coco.json (or without "
        "karpathy/, or in Karpathy's caption_datasets.zip)",
        "coco_caption_karpathy_{train,restval,val,test}.arrow"),
    "f30k": Source(
        captions.f30k,
        "folder with flickr30k-images/*.jpg and karpathy/dataset_flickr30k.json (or without "
        "karpathy/, or in Karpathy's caption_datasets.zip)",
        "f30k_caption_karpathy_{train,val,test}.arrow"),
    "vg": Source(
        captions.vg,
        "folder with images/{VG_100K,VG_100K_2}/*.jpg and annotations/region_descriptions.json",
        "vg.arrow"),
    "sbu": Source(
        captions.sbu,
        "folder with images_train/*/* and annot.json, a list of [path, caption]",
        "sbu_{0..}.arrow",
        ("--shards",)),
    "cc3m": Source(
        captions.cc3m,
        "folder with images_{train,val}/*/* and {train,val}_annot.json, lists of [path, caption]",
        "conceptual_caption_{train,val}_{0..}.arrow",
        ("--shards",)),
    "cc12m": Source(
        captions.cc12m,
        "the same as for cc3m",
        "conceptual_caption12M_{train,val}_{0..}.arrow",
        ("--shards",)),
    "img2dataset": Source(
        captions.img2dataset,
        "folders, or quoted patterns, of WebDataset .tar files: KEY.jpg and KEY.txt or KEY.json",
        "NAME_{name of the tar}.arrow",
        ("--name", "--split")),
    "karpathy": Source(
        captions.karpathy,
        "folder with the pictures, or with images/, and Karpathy's dataset_{coco,flickr30k,"
        "flickr8k}.json, his caption_datasets.zip as it comes, or a dataset.json in his layout",
        "NAME_caption_{split}.arrow",
        ("--name",)),
    "folder": Source(
        captions.folder,
        "folder with the pictures, or with images/, and captions.csv, .tsv or .txt: its first line "
        "names the columns image (a file name) and caption, several lines for one picture are "
        "fine. A column split says where a picture belongs; without it, a hash of its name puts "
        "90 %% of them into train, 5 %% into val and 5 %% into test",
        "NAME_caption_{train,val,test}.arrow",
        ("--name",)),
    "jsonl": Source(
        captions.jsonl,
        'file with lines of {"image": path relative to the file, "captions": ["…"]}, '
        'optionally "split" (train) and "image_id"; "caption": "…" is allowed too',
        "NAME_caption_{split}.arrow",
        ("--name",)),
    "vqav2": Source(
        questions.vqav2,
        "folder with {train2014,val2014,test2015}/*.jpg, v2_OpenEnded_mscoco_*_questions.json and "
        "v2_mscoco_*_annotations.json; or with images/, questions_{split}.json and "
        "annotations_{split}.json in the same formats",
        "vqav2_{train,val,trainable_val,rest_val,test,test-dev}.arrow, vqav2_answers.json and "
        "vqav2_annotations_{split}.json",
        ("--name", "--answers", "--at-least", "--labels")),
    "nlvr2": Source(
        questions.nlvr2,
        "folder with images/train/*/*.png, dev/*.png, test1/*.png and nlvr2/data/*.json "
        "(or nlvr/nlvr2/data/*.json)",
        "nlvr2_{train,dev,test1}.arrow and nlvr2_{balanced,unbalanced}_{dev,test1}.json"),
    "vqa-jsonl": Source(
        questions.vqa_jsonl,
        'file with lines of {"image": path relative to the file, "question": "…", '
        '"answers": ["…"]}, optionally "split" (train), "image_id", "question_id", "answer_type" '
        'and "question_type"',
        "NAME_vqa_{split}.arrow, NAME_vqa_answers.json and NAME_vqa_annotations_{split}.json",
        ("--name", "--answers", "--at-least")),
    "nlvr2-jsonl": Source(
        questions.nlvr2_jsonl,
        'file with lines of {"images": [left, right], "sentence": "…", "label": true}, '
        'optionally "split" (train) and "identifier"',
        "NAME_nlvr2_{split}.arrow",
        ("--name",)),
}


def number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from low to high."""
    def parse(text):
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return parse


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FLAGS = {
    "--out": dict(
        type=Path, required=True, metavar="DIR",
        help="folder for the Arrow files, made if it is missing (required)"),
    "--shorter": dict(
        type=number(1, 16384), metavar="PIXELS",
        help="store JPEGs with a shorter side of at most PIXELS (default: the original bytes)"),
    "--quality": dict(
        type=number(1, 100), default=90, metavar="Q",
        help="quality of those JPEGs, from 1 to 100 (default: %(default)s)"),
    "--workers": dict(
        type=number(1, 256), default=min(CORES, 32), metavar="N",
        help="number of threads that decode pictures (default: one per core, here %(default)s)"),
    "--force": dict(
        action="store_true", help="write finished files again (default: leave them as they are)"),
    "--name": dict(
        help="NAME in the names of the files (default: the name of ROOT; vqav2 without --name "
             "writes vqav2_*, with it NAME_vqa_*)"),
    "--split": dict(
        default="train", help="what the column `split` says (default: %(default)s)"),
    "--answers": dict(
        type=Path, metavar="FILE",
        help="JSON list of the answers to use (default: made from all annotations but test's)"),
    "--at-least": dict(
        type=number(1, 10 ** 9), default=1, metavar="N",
        help="list answers that most people give to at least N questions (default: 9 for vqav2, "
             "otherwise 1)"),
    "--labels": dict(
        choices=("normalized", "raw"), default="normalized",
        help="count the annotators' answers as the official accuracy compares them, or as they "
             "were typed, as ViLT, METER and FLM do: 1 %% of the questions differ "
             "(default: %(default)s)"),
    "--shards": dict(
        type=number(1, 100_000), metavar="N",
        help="number of training files, the same whenever the command is continued (default: one "
             "for each 100,000 pictures, but at most 30 for cc3m and 9 for sbu: the loaders of "
             "ViLT, METER and FLM read no more)"),
    "--fast": dict(
        action="store_true",
        help="read only the headers of the pictures (default: decode them all)"),
}
COMMON = ("--out", "--shorter", "--quality", "--workers", "--force")


def parser() -> ArgumentParser:
    top = ArgumentParser(prog="prepare.py", usage="prepare.py COMMAND …", description=__doc__,
                         formatter_class=RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, source in SOURCES.items():
        sub = commands.add_parser(
            name, usage=f"prepare.py {name} ROOT --out DIR [flags]",
            help=f"-> {source.writes}", description=f"Writes {source.writes}.",
            aliases=["gcc"] if name == "cc3m" else [])
        several = "+" if name == "img2dataset" else None
        sub.add_argument("root", type=Path, nargs=several, metavar="ROOT", help=source.root)
        for flag in COMMON + source.flags:
            sub.add_argument(flag, **FLAGS[flag])
        sub.set_defaults(run=convert, source=source.shards)
    commands.choices["vqav2"].set_defaults(at_least=9)
    about = ("reads finished files back: schema, texts, every picture; "
             "the exit status is 1 if something is wrong")
    sub = commands.add_parser("check", usage="prepare.py check FILE.arrow or FOLDER … [flags]",
                              help=about, description=about)
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE.arrow",
                     help="what to read, also a .tar of img2dataset; of a folder, all *.arrow "
                          "files in it, or all *.tar")
    for flag in ("--fast", "--workers"):
        sub.add_argument(flag, **FLAGS[flag])
    sub.set_defaults(run=check)
    about = ("what a data set is like: numbers, words, sizes, what comes twice within and across "
             "files, and a contact sheet")
    sub = commands.add_parser("stats", usage="prepare.py stats FILE.arrow or FOLDER … [flags]",
                              help=about, description=about)
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE.arrow",
                     help="what to read, also a .tar of img2dataset; of a folder, all *.arrow "
                          "files in it, or all *.tar")
    sub.add_argument("--out", type=Path, metavar="FILE.png",
                     help="draw a contact sheet: pictures with their texts (default: none)")
    sub.add_argument("--json", type=Path, metavar="FILE",
                     help="write the numbers as JSON (default: they are only printed)")
    sub.add_argument("--fast", action="store_true",
                     help="look at 1,000 pictures of each file, evenly spread (default: at all)")
    sub.add_argument("--workers", **FLAGS["--workers"])
    sub.set_defaults(run=stats)
    return top


def main(arguments: list[str] | None = None) -> None:
    with disk.command("prepare.py", "finished files stay, the same command continues"):
        args = parser().parse_args(arguments)
        Image.init()                                        # once, before the threads
        args.run(args)


if __name__ == "__main__":
    main()
