"""Arrow files -> samples -> batches: everything between the disk and the model.

    table = Captions(find_files("data/toy", ["toy"], "train"))    # memory-mapped: opening 100 GB costs nothing
    dataset = CaptionDataset(table, tok, Square(64), max_tokens=50, train=True)
    sampler = GlobalBatches(token_lengths(table, tok), global_batch=64, seed=0)
    samples = [dataset[epoch, i] for epoch, i in next(sampler.micro_batches(0, 1, 64))]
    ids, images = pad_texts([s["ids"] for s in samples], tok.pad_id), pad_pictures([s["image"] for s in samples])

Letters: B batch, L text length (tokens), H, W height and width of a picture (pixels).
"""

import fnmatch
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# The files: ViLT's schemas, so that files made for ViLT, METER or FLM open as they are. One row per image.

CAPTIONS = pa.schema([("image", pa.binary()), ("caption", pa.list_(pa.string())),
                      ("image_id", pa.string()), ("split", pa.string())])
VQA = pa.schema([("image", pa.binary()), ("questions", pa.list_(pa.string())),
                 ("answers", pa.list_(pa.list_(pa.string()))), ("answer_labels", pa.list_(pa.list_(pa.int64()))),
                 ("answer_scores", pa.list_(pa.list_(pa.float64()))), ("image_id", pa.int64()),
                 ("question_id", pa.list_(pa.int64())), ("split", pa.string())])
NLVR2 = pa.schema([("image_0", pa.binary()), ("image_1", pa.binary()), ("questions", pa.list_(pa.string())),
                   ("answers", pa.list_(pa.string())), ("identifier", pa.string())])


class Writer:
    """Streams rows into an Arrow IPC file that appears under its name only when it is complete.

        with Writer("toy_caption_train.arrow", CAPTIONS) as out:
            out.write({"image": jpeg, "caption": ["a red circle"], "image_id": "0", "split": "train"})

    Rows leave memory in record batches of at most `batch_rows` rows or `batch_bytes` bytes of images, so a file of any
    length is written in flat memory. Until the block ends without an error the bytes stand in `NAME.partial`; after an
    error that file is removed and nothing else has changed.
    """

    def __init__(self, path, schema, batch_rows=1000, batch_bytes=32 << 20):
        self.path, self.schema = Path(path), schema
        self.batch_rows, self.batch_bytes = batch_rows, batch_bytes
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.images = [field.name for field in schema if field.type == pa.binary()]
        self.rows, self.bytes, self.written = [], 0, 0

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = pa.OSFile(str(self.partial), "wb")
        self.stream = pa.ipc.new_file(self.file, self.schema)
        return self

    def write(self, row):
        """Appends one row, a dict with exactly the schema's columns."""
        if set(row) != set(self.schema.names):
            raise ValueError(f"{self.path}: a row has the columns {sorted(row)}, the schema wants {self.schema.names}")
        self.rows.append(row)
        self.written += 1
        self.bytes += sum(len(row[name]) for name in self.images)
        if len(self.rows) >= self.batch_rows or self.bytes >= self.batch_bytes:
            self.flush()

    def flush(self):
        if self.rows:
            self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows, self.bytes = [], 0

    def __exit__(self, error, *_):
        complete = False
        try:
            if error is None:
                self.flush()
            self.stream.close()
            self.file.close()
            complete = error is None
        finally:                                    # a full disk ends here too
            if complete:
                os.replace(self.partial, self.path)     # atomic: a reader sees the whole file or none
            else:
                self.partial.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong to which dataset. The names are ViLT's; any other NAME reads what `prepare.py --name NAME` writes.

FILES = {"caption": {
    "coco": {"train": ["coco_caption_karpathy_train.arrow", "coco_caption_karpathy_restval.arrow"],
             "val": ["coco_caption_karpathy_val.arrow"], "test": ["coco_caption_karpathy_test.arrow"]},
    "f30k": {split: [f"f30k_caption_karpathy_{split}.arrow"] for split in ("train", "val", "test")},
    "vg": {"train": ["vg.arrow"]},
    "sbu": {"train": ["sbu_*.arrow"]},
    "gcc": {"train": ["conceptual_caption_train_*.arrow"], "val": ["conceptual_caption_val_*.arrow"]},
    "cc12m": {"train": ["conceptual_caption12M_train_*.arrow"], "val": ["conceptual_caption12M_val_*.arrow"]},
}, "vqa": {     # trained on all but the last images of val, which choose the checkpoint
    "vqav2": {"train": ["vqav2_train.arrow", "vqav2_trainable_val.arrow"], "val": ["vqav2_rest_val.arrow"],
              "all-val": ["vqav2_val.arrow"], "test": ["vqav2_test.arrow"], "test-dev": ["vqav2_test-dev.arrow"]},
}, "nlvr2": {
    "nlvr2": {"train": ["nlvr2_train.arrow"], "val": ["nlvr2_dev.arrow"], "test": ["nlvr2_test1.arrow"]},
}}


def find_files(directory, datasets, split, kind="caption"):
    """The Arrow files of some datasets' split, in a fixed order. A dataset may lack a split other than train.

    kind: caption, vqa or nlvr2. Without `datasets`, known_datasets. FileNotFoundError names directory and dataset.
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


def arrow_files(directory):
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory of Arrow files")
    return sorted(path.name for path in Path(directory).glob("*.arrow"))


def patterns_of(dataset, split, kind):
    """What the files of a dataset's split are called."""
    if dataset in FILES[kind]:
        return FILES[kind][dataset].get(split, [])
    return [f"{dataset}_{kind}_{split}.arrow"] + {("caption", "train"): [f"{dataset}_[0-9]*.arrow"],
                                                  ("nlvr2", "val"): [f"{dataset}_nlvr2_dev.arrow"]}.get((kind, split), [])


def files_of(names, dataset, split, kind):
    return [name for pattern in patterns_of(dataset, split, kind) for name in fnmatch.filter(names, pattern)]


def splits_of(directory, kind="caption"):
    """{dataset: its splits} of all datasets of a kind with files in a directory, whatever the splits; first ViLT's."""
    names, ours = arrow_files(directory), {}
    vilts = {dataset: [split for split in splits if files_of(names, dataset, split, kind)]
             for dataset, splits in FILES[kind].items()}
    patterns = [pattern for splits in FILES[kind].values() for some in splits.values() for pattern in some]
    for name in names:
        dataset, found, split = name.removesuffix(".arrow").rpartition(f"_{kind}_")
        if found and dataset and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            ours.setdefault(dataset, []).append("val" if (kind, split) == ("nlvr2", "dev") else split)
    return {name: splits for name, splits in vilts.items() if splits} | dict(sorted(ours.items()))


def known_datasets(directory, kind="caption"):
    """The names of the datasets of a kind whose training files stand in a directory; where there are none, of all.

    FileNotFoundError if there is not one file of the kind.
    """
    splits = splits_of(directory, kind)
    if not splits:
        raise FileNotFoundError(f"{directory}: no {kind} files here (such as NAME_{kind}_train.arrow); prepare.py and "
                                "toy.py write them")
    return [name for name in splits if "train" in splits[name]] or list(splits)


def read_json(path, what=None):
    """The contents of a JSON file (what=list: a list of strings); ValueError names a file that holds something else."""
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if what is list and not (isinstance(contents, list) and all(isinstance(text, str) for text in contents)):
        raise ValueError(f"{path}: a JSON list of strings is expected")
    return contents


# ---------------------------------------------------------------------------------------------------------------------
# Reading.

class Table:
    """Rows of any number of Arrow files as one sequence, memory-mapped, opened lazily and anew in every process.

    `columns` must exist in each file. Only row counts are kept in memory; no picture is touched before it is asked for.
    """

    def __init__(self, paths, columns):
        self.paths = [str(path) for path in paths]
        self.files = {}                                     # path -> open reader, of this process
        batch_rows = []
        self.batches = []                                   # (path, number of the record batch in it)
        for path in self.paths:
            reader = self._open(path)
            missing = [name for name in columns if name not in reader.schema.names]
            if missing:
                raise ValueError(f"{path}: has no column {', '.join(missing)}; its columns are {reader.schema.names}")
            for i in range(reader.num_record_batches):
                self.batches.append((path, i))
                batch_rows.append(reader.get_batch(i).num_rows)
        self.starts = np.concatenate([[0], np.cumsum(batch_rows, dtype=np.int64)])      # first row of each batch

    def _open(self, path):
        if path not in self.files:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path}: there is no such file")
            try:
                self.files[path] = pa.ipc.open_file(pa.memory_map(path))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path}: not a complete Arrow IPC file ({str(error).splitlines()[0]})") from None
        return self.files[path]

    def __getstate__(self):                                 # a worker maps the files itself
        return self.__dict__ | {"files": {}}

    def batch(self, number):
        path, i = self.batches[number]
        return self._open(path).get_batch(i)

    def cell(self, column, row):
        """One value, as an Arrow scalar; nothing else of the row is read."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.batch(number).column(column)[int(row - self.starts[number])]

    def __len__(self):
        return int(self.starts[-1])

    def place(self, row):
        """Where a row stands: (path, row in that file)."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        path = self.batches[number][0]
        first = next(i for i, (p, _) in enumerate(self.batches) if p == path)
        return path, int(row - self.starts[first])


class Captions(Table):
    """Image-caption pairs: `len(table.row_of)` captions of `len(table)` images.

    row_of (captions,): the row of each caption's image, from Arrow's offset buffers: no caption becomes a Python string
    before it is used.
    """
    IMAGES, TEXT, MORE = ("image",), "caption", ()

    def __init__(self, paths):
        super().__init__(paths, [*self.IMAGES, self.TEXT, *self.MORE])
        rows, first = [np.empty(0, np.int64)], []
        for number in range(len(self.batches)):
            column = self.batch(number).column(self.TEXT)
            if not (pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type)):
                raise ValueError(f"{self.batches[number][0]}: column {self.TEXT} is {column.type}, list<string> expected")
            offsets = column.offsets.to_numpy()                                         # (rows + 1,)
            first.append(int(offsets[0]))
            rows.append(np.repeat(np.arange(len(column)) + self.starts[number], np.diff(offsets)))
        self.row_of = np.concatenate(rows)
        self.first_value = np.array(first)                                              # of each batch, in its values
        self.caption_starts = np.concatenate([[0], np.cumsum([len(r) for r in rows[1:]], dtype=np.int64)])
        if not len(self.row_of):
            raise ValueError(f"{', '.join(self.paths) or 'no file'}: no captions in it")

    def text(self, i):
        """Caption i of all, str."""
        number = int(np.searchsorted(self.caption_starts, i, side="right")) - 1
        values = self.batch(number).column(self.TEXT).values
        return values[int(i - self.caption_starts[number] + self.first_value[number])].as_py()

    def image(self, row, which=0):
        """The encoded picture of a row (the first or second of a pair), bytes without a copy."""
        return self.cell(self.IMAGES[which], row).as_buffer()

    def first_of(self, row):
        """The number of a row's first caption."""
        return int(np.searchsorted(self.row_of, row))

    def details(self, i):
        """What the file says of caption i beside its text."""
        return {}

    def texts(self):
        """All captions, one after the other; a record batch of them is in memory at a time."""
        for number in range(len(self.batches)):
            values = self.batch(number).column(self.TEXT).values
            yield from values[self.first_value[number]:][:int(np.diff(self.caption_starts)[number])].to_pylist()


class Questions(Captions):
    """Questions about pictures, and their answers as labels of the answer list with scores (none in test files)."""
    TEXT, MORE = "questions", ("answer_labels", "answer_scores", "question_id")

    def details(self, i):
        row = int(self.row_of[i])
        place = i - self.first_of(row)
        lists = [self.cell(name, row) for name in self.MORE]                # ViLT's test files have empty ones
        labels, scores, question_id = (cell[place].as_py() if len(cell) else None for cell in lists)
        return {"labels": labels or [], "scores": scores or [], "question_id": question_id}


class Statements(Captions):
    """Statements about two pictures, true or false."""
    IMAGES, TEXT, MORE = ("image_0", "image_1"), "questions", ("answers", "identifier")

    def details(self, i):
        row = int(self.row_of[i])
        place, count = i - self.first_of(row), len(self.cell("questions", row))
        identifier = self.cell("identifier", row).as_py()
        # ViLT's files name the pair only; the statement's number is then its place in the row's list.
        whole = count == 1 and identifier.count("-") >= 3
        return {"label": int(self.cell("answers", row)[place].as_py() == "True"),
                "identifier": identifier if whole else f"{identifier}-{place}"}


def token_lengths(table, tok, numbers=None):
    """Tokens of each caption (or of those numbered), `<s>` and `</s>` included, int32: the sampler's sorting key.

    Some 100,000 captions a second. Their length in bytes would be free, but is a poor guess of it: sorted by bytes,
    batches of 64 real captions out of 4,096 are 22 % padding; sorted by tokens 3 % (docs/LOG.md).
    """
    texts, count = (table.texts(), len(table.row_of)) if numbers is None else (map(table.text, numbers), len(numbers))
    texts = tqdm(texts, "counting tokens", count, unit=" captions", delay=5, mininterval=1)
    return np.fromiter((len(tok.encode(text)) + 2 for text in texts), np.int32, count)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures. Tensors stay uint8 until they are on the device, where a byte a pixel has arrived.

@dataclass(frozen=True)
class Square:
    """CLIP's shape: the shorter side becomes `side` pixels, and the square in the middle is kept.

    >>> Square(224)(640, 480)           # width and height -> those of the whole picture, and of what is kept of it
    ((298, 224), (224, 224))
    """
    side: int

    def __call__(self, width, height):
        longer = int(self.side * max(width, height) / min(width, height))
        return (self.side, longer) if width <= height else (longer, self.side), (self.side, self.side)


@dataclass(frozen=True)
class Whole:
    """ViLT's shape: all of the picture, its shorter side about `shorter` pixels, the longer at most 1333/800 of that.

    Both sides are then floored to a multiple of the patch size.

    >>> Whole(384, 32)(500, 375)
    ((512, 384), (512, 384))
    """
    shorter: int
    patch: int

    def __call__(self, width, height):
        scale, longest = self.shorter / min(width, height), int(1333 / 800 * self.shorter)
        sides = (scale * width, self.shorter) if height < width else (self.shorter, scale * height)
        if max(sides) > longest:        # (two steps, as the original: one product rounds differently now and then)
            scale = longest / max(sides)
            sides = (sides[0] * scale, sides[1] * scale)
        size = tuple(max(self.patch, int(side + 0.5) // self.patch * self.patch) for side in sides)
        return size, size


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# What is opened at all. Pillow knows more, but some of its readers start other programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def to_rgb(image):
    """Any mode to RGB. Sixteen bits are scaled to eight; Pillow alone would clip them, to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def decode(encoded, shape, fast=False, augment=None):
    """Encoded bytes -> uint8 tensor (3, H, W) of a shape (Square or Whole), resized by bicubic interpolation.

    fast, for training: libjpeg decodes at 1/2, 1/4 or 1/8 where that still has the pixels, and torch resizes instead of
    Pillow, 2.3 times faster on photographs and the same but for a grey level here and there. augment: a PIL -> PIL
    function, applied before the resize as CLIP's fine-tuning does. For what is no picture, whatever Pillow's readers raise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"in none of the formats {', '.join(FORMATS)}") from None
        if fast and image.format == "JPEG":
            scale = min(shape(*image.size)[0]) / min(image.size)
            image.draft("RGB", (int(np.ceil(image.width * scale)), int(np.ceil(image.height * scale))))
        image = to_rgb(image)
    if augment is not None:
        image = augment(image)
    (width, height), (kept_width, kept_height) = shape(*image.size)
    if not fast:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)                         # (3, H, W)
    if fast:
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = round((width - kept_width) / 2), round((height - kept_height) / 2)
    return pixels[:, top:top + kept_height, left:left + kept_width].contiguous()        # (3, H, W)


def normalize(images, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (B, 3, H, W) -> float32, on whatever device it is: (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return (images.float() / 255 - mean) / std


class CaptionDataset(torch.utils.data.Dataset):
    """Samples of a Captions table (or Questions, Statements). `dataset[epoch, i]` is caption i, drawn for that epoch.

    A sample is a pure function of (seed, epoch, i): the number of workers or processes and a resume change nothing.
    An image that cannot be decoded is named in the sample's "unreadable". In training the sample is then that of the
    next row that can, and the training loop counts and stops when they are many; in evaluation, where every question
    wants its answer, the picture is black.
    clean: str -> str, applied to every text; around: token ids put between `<s>` and the text, and between it and `</s>`.
    """

    def __init__(self, table, tok, shape, max_tokens, train, seed=0, augment=False, clean=str, around=((), ())):
        self.table, self.tok, self.shape, self.max_tokens = table, tok, shape, max_tokens
        self.train, self.seed, self.clean, self.around = train, seed, clean, around
        self.augment = None
        if augment:
            from torchvision.transforms import RandAugment      # slow to import, and only fine-tuning wants it
            self.augment = RandAugment(2, 9)

    def __len__(self):
        return len(self.table.row_of)

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng([self.seed, epoch, i])
        unreadable = []
        for attempt in range(100):
            row = int(self.table.row_of[i])
            pictures, wrong = self.pictures(row, rng)
            unreadable += wrong
            if not (wrong and self.train):
                break
            i = int(np.searchsorted(self.table.row_of, row, side="right")) % len(self)      # the next row's first
        else:
            raise ValueError(f"100 images in a row cannot be decoded, the last one {unreadable[-1]}")
        ids, cut = self.tokens(i)
        return {"image": pictures[0], "images": pictures, "ids": ids, "row": row, "index": i, "rng": rng, "train": self.train,
                "cut": cut, "unreadable": unreadable} | self.table.details(i)

    def pictures(self, row, rng=None):
        """The pictures of a row, and a line for each that cannot be decoded and is black."""
        pictures, wrong = [], []
        for which in range(len(self.table.IMAGES)):
            try:
                if self.augment is None:
                    pictures.append(decode(self.table.image(row, which), self.shape, fast=self.train))
                    continue
                with torch.random.fork_rng(devices=[]):     # RandAugment draws from torch's global state
                    torch.manual_seed(int(rng.integers(2 ** 62)))
                    pictures.append(decode(self.table.image(row, which), self.shape, self.train, self.augment))
            except Exception as error:      # Pillow's readers raise what the broken bytes lead to, not only OSError
                path, place = self.table.place(row)
                wrong.append(f"{path} row {place}: {error or type(error).__name__}")
                width, height = self.shape(1, 1)[1]
                pictures.append(torch.zeros(3, height, width, dtype=torch.uint8))
        return pictures, wrong

    def tokens(self, i):
        """Caption i, `<s>` and `</s>` included -> (token ids, whether it was cut to fit)."""
        ids, (before, after) = self.tok.encode(self.clean(self.table.text(i))), self.around
        kept = ids[:self.max_tokens - 2 - len(before) - len(after)]
        return [self.tok.cls_id, *before, *kept, *after, self.tok.sep_id], len(kept) < len(ids)


def pad_texts(texts, pad_id, multiple=1, limit=None):
    """Lists of token ids -> int64 (B, L).

    L is the longest, rounded up to a multiple, but not past `limit`, the longest that the model takes.
    """
    longest = max(map(len, texts))
    length = max(longest, min(-(-longest // multiple) * multiple, limit or 10 ** 9))
    out = torch.full((len(texts), length), pad_id)
    for row, ids in zip(out, texts):
        row[:len(ids)] = torch.tensor(ids)
    return out


def pad_pictures(pictures):
    """uint8 (3, h, w) of any shapes -> (B, 3, H, W), each at the top left, black around it."""
    H, W = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    if all(picture.shape[1:] == (H, W) for picture in pictures):
        return torch.stack(pictures)
    out = pictures[0].new_zeros(len(pictures), 3, H, W)
    for place, picture in zip(out, pictures):
        place[:, :picture.shape[1], :picture.shape[2]] = picture
    return out


def mask_words(ids, word_starts, rate, mask_id, replacements, rng):
    """BERT's masking of whole words: picks words, replaces 80 % of their tokens by `<mask>`, 10 % by a random one.

    ids: one caption's token ids, `<s>` and `</s>` at its ends; word_starts: for the ids in between, whether a word starts
    there; replacements: the ids that a random token is drawn from. Of W words, rate · W are picked, rounded up or down at
    random so that the mean is `rate`, but at least one.
    Returns (masked ids, positions that were picked), both int64 arrays.   (BERT, section 3.1.)
    """
    ids = np.array(ids)
    word = np.cumsum(word_starts)                                   # 1, 1, 2, 3, …: the word of each inner token
    words = int(word[-1]) if len(word) else 0
    if words == 0:
        return ids, np.empty(0, np.int64)
    count = min(words, max(1, int(rate * words + rng.random())))
    picked = 1 + np.flatnonzero(np.isin(word, 1 + rng.choice(words, count, replace=False)))
    fate = rng.random(len(picked))
    ids[picked[fate < 0.8]] = mask_id
    swapped = picked[(fate >= 0.8) & (fate < 0.9)]
    ids[swapped] = rng.choice(replacements, len(swapped))
    return ids, picked


# ---------------------------------------------------------------------------------------------------------------------
# Order. What is seen at a step is a pure function of (seed, epoch, step): resuming is arithmetic.

class GlobalBatches:
    """Shuffles, cuts into global batches, sorts each by caption length, deals micro-batches to the processes.

    Sorting leaves next to no padding; dealing neighbours at the same time gives the processes equal work; and the same
    global batch is trained on whatever their number. The captions that do not fill the last batch of an epoch sit out;
    every epoch shuffles anew.

    Small batches are too few captions for that: with `bucket` above 1 the captions of so many global batches are sorted
    together, so that one batch has short captions and another long ones, in random order.
    """

    def __init__(self, lengths, global_batch, seed, bucket=1):
        if global_batch > len(lengths):
            raise ValueError(f"global batch {global_batch}: there are only {len(lengths)} captions to train on")
        if bucket < 1:
            raise ValueError(f"--bucket {bucket}: at least 1 global batch is sorted at a time")
        self.lengths, self.size, self.seed, self.bucket = lengths, global_batch, seed, bucket
        self.steps_per_epoch = len(lengths) // global_batch
        self.epoch, self.order = None, None

    def batch(self, step):
        """The global batch of a step: caption numbers (size,), shortest first."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.shuffle(np.random.default_rng([self.seed, epoch]))
        numbers = self.order[k * self.size:(k + 1) * self.size]
        return numbers[np.argsort(self.lengths[numbers], kind="stable")]

    def shuffle(self, rng):
        """The order of an epoch: caption numbers, one global batch after the other."""
        order = rng.permutation(len(self.lengths))
        if self.bucket == 1:
            return order
        order = order[:self.steps_per_epoch * self.size]
        group = np.arange(len(order)) // (self.size * self.bucket)
        batches = order[np.lexsort((self.lengths[order], group))].reshape(-1, self.size)
        return rng.permutation(batches).ravel()

    def micro_batches(self, start, stop, micro_batch, rank=0, world=1):
        """This process's micro-batches of the steps start..stop-1, lists of (epoch, caption number) for a DataLoader."""
        for step in range(start, stop):
            numbers, epoch = self.batch(step), step // self.steps_per_epoch
            for first in range(rank * micro_batch, self.size, world * micro_batch):
                yield [(epoch, int(i)) for i in numbers[first:first + micro_batch]]


def evaluation_batches(lengths, numbers, size):
    """Batches of captions of similar length, each of `numbers` exactly once: lists of (epoch 0, caption number).

    lengths: the sorting key of each of `numbers`, in their order.
    """
    numbers = np.asarray(numbers)[np.argsort(lengths, kind="stable")]
    return [[(0, int(i)) for i in numbers[first:first + size]] for first in range(0, len(numbers), size)]
