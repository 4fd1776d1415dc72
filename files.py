"""The Arrow files: what is in them, what they are called, and which files make a dataset.

    find_files("data/4m", ["coco", "vg"], "train")      # the files of two datasets' training split
    known_datasets("data/4m")                           # what there is in a directory

Schemas and names are ViLT's, so that files made for ViLT, METER or FLM open as they are. One row
per image. data.py reads them, sources/shards.py writes them.
"""

import fnmatch
from pathlib import Path

import pyarrow as pa

CAPTIONS = pa.schema([("image", pa.binary()), ("caption", pa.list_(pa.string())),
                      ("image_id", pa.string()), ("split", pa.string())])
VQA = pa.schema([("image", pa.binary()), ("questions", pa.list_(pa.string())),
                 ("answers", pa.list_(pa.list_(pa.string()))),
                 ("answer_labels", pa.list_(pa.list_(pa.int64()))),
                 ("answer_scores", pa.list_(pa.list_(pa.float64()))), ("image_id", pa.int64()),
                 ("question_id", pa.list_(pa.int64())), ("split", pa.string())])
NLVR2 = pa.schema([("image_0", pa.binary()), ("image_1", pa.binary()),
                   ("questions", pa.list_(pa.string())), ("answers", pa.list_(pa.string())),
                   ("identifier", pa.string())])

# Kind of data -> dataset -> split -> file names, all ViLT's. Any other dataset NAME is what
# prepare.py writes: NAME_KIND_SPLIT.arrow, or NAME_00000.arrow, … of img2dataset (train).
FILES = {
    "caption": {
        "coco": {"train": ["coco_caption_karpathy_train.arrow",
                           "coco_caption_karpathy_restval.arrow"],
                 "val": ["coco_caption_karpathy_val.arrow"],
                 "test": ["coco_caption_karpathy_test.arrow"]},
        "f30k": {"train": ["f30k_caption_karpathy_train.arrow"],
                 "val": ["f30k_caption_karpathy_val.arrow"],
                 "test": ["f30k_caption_karpathy_test.arrow"]},
        "vg": {"train": ["vg.arrow"]},
        "sbu": {"train": ["sbu_*.arrow"]},
        "gcc": {"train": ["conceptual_caption_train_*.arrow"],
                "val": ["conceptual_caption_val_*.arrow"]},
        "cc12m": {"train": ["conceptual_caption12M_train_*.arrow"],
                  "val": ["conceptual_caption12M_val_*.arrow"]},
    },
    # Training takes train and most of val; the last images of val ("val") choose the checkpoint.
    "vqa": {
        "vqav2": {"train": ["vqav2_train.arrow", "vqav2_trainable_val.arrow"],
                  "val": ["vqav2_rest_val.arrow"], "all-val": ["vqav2_val.arrow"],
                  "test": ["vqav2_test.arrow"], "test-dev": ["vqav2_test-dev.arrow"]},
    },
    "nlvr2": {
        "nlvr2": {"train": ["nlvr2_train.arrow"], "val": ["nlvr2_dev.arrow"],
                  "test": ["nlvr2_test1.arrow"]},
    },
}


def find_files(directory, datasets, split: str, kind: str = "caption") -> list[Path]:
    """The Arrow files of some datasets' split, in a fixed order.

    kind: caption, vqa or nlvr2. No `datasets` means known_datasets. FileNotFoundError if a dataset
    has no training files; any other split may be missing.
    """
    directory, found = Path(directory), []
    names = arrow_files(directory)
    for dataset in datasets or known_datasets(directory, kind):
        files = files_of(names, dataset, split, kind)
        if not files and split == "train":
            raise FileNotFoundError(f"{directory}: no {kind} files of dataset {dataset!r}; "
                                    f"{' or '.join(patterns_of(dataset, split, kind))} expected")
        found += [directory / name for name in files]
    return found


def arrow_files(directory) -> list[str]:
    """The names of all Arrow files in a directory, sorted."""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory of Arrow files")
    return sorted(path.name for path in Path(directory).glob("*.arrow"))


def patterns_of(dataset: str, split: str, kind: str) -> list[str]:
    """What the files of a dataset's split are called."""
    if dataset in FILES[kind]:
        return FILES[kind][dataset].get(split, [])
    patterns = [f"{dataset}_{kind}_{split}.arrow"]
    if (kind, split) == ("caption", "train"):
        patterns.append(f"{dataset}_[0-9]*.arrow")
    if (kind, split) == ("nlvr2", "val"):
        patterns.append(f"{dataset}_nlvr2_dev.arrow")
    return patterns


def files_of(names: list[str], dataset: str, split: str, kind: str) -> list[str]:
    """Those of some file names that belong to a dataset's split."""
    found = []
    for pattern in patterns_of(dataset, split, kind):
        found += fnmatch.filter(names, pattern)
    return found


def splits_of(directory, kind: str = "caption") -> dict[str, list[str]]:
    """Dataset -> its splits, of all datasets of a kind that have a file in a directory."""
    names, found, published = arrow_files(directory), {}, set()
    for dataset, splits in FILES[kind].items():
        for split in splits:
            files = files_of(names, dataset, split, kind)
            if files:
                found.setdefault(dataset, []).append(split)
                published.update(files)
    for name in names:
        stem = name.removesuffix(".arrow")
        dataset, marker, split = stem.rpartition(f"_{kind}_")
        if kind == "caption" and not marker:        # perhaps a shard of img2dataset: NAME_00000
            dataset, _, number = stem.rpartition("_")
            split = "train" if number.isdecimal() else ""
        if name in published or not dataset or not split:
            continue
        if (kind, split) == ("nlvr2", "dev"):
            split = "val"
        if split not in found.setdefault(dataset, []):
            found[dataset].append(split)
    return found


def known_datasets(directory, kind: str = "caption") -> list[str]:
    """The datasets of a kind with training files in a directory; where there are none, all.

    FileNotFoundError if there is not one file of the kind.
    """
    splits = splits_of(directory, kind)
    if not splits:
        raise FileNotFoundError(f"{directory}: no {kind} files here (such as "
                                f"NAME_{kind}_train.arrow); prepare.py and tools/toy.py write them")
    return [name for name in splits if "train" in splits[name]] or list(splits)
