"""Retrieval: the scores of all pairs of N images and M captions.

    gallery = Gallery(model, dataset)               # N images, M captions, nothing encoded yet
    path = scores_file(gallery, folder, "scores", machine, resume=True)     # NaN: to be computed
    fill_scores(gallery, np.load(path, mmap_mode="r+"), images)

It encodes once and fuses many:

    N times      Gallery.encode_image   FLM: the whole ViT; ViLT: the projection of the patches
    M times      Gallery.encode_texts   FLM: the text layers, and the class query through the
                                        reconstructor beside them; ViLT: the word embeddings
    N x M times  predict.match_score    FLM: text_to_fusion, the fusion layers, and the class query
                                        through the reconstructor beside them; ViLT: all its
                                        blocks; both: pooler and head

FLM's keys and values of an image, in the cross-attentions, are computed once for each batch of
captions: N x M / texts_at_once times.

Letters: N images, M captions, B captions of a batch, L text length, D width.
All functions run on the device where the model is, under the caller's autocast.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import flm
import layers
import pictures
import predict
import tasks
import vilt
import weights
from data import CaptionDataset, pad_texts
from layers import encode_batch_images
from predict import device_of, match_score, picture_batch
from storage import disk, files
from tasks import Model
from training.machine import Machine


class Gallery:
    """N images and M captions of a data set, encoded when they are wanted.

    images, captions: take the first images of the table only, and the first captions of each; 0
    means all.
    rows (N,): the table's rows of the images. numbers (M,): its captions. image_of (M,): the image
    of each caption, 0..N-1.
    unreadable: one line for each picture so far that cannot be decoded and is black.
    cut: number of captions that were cut to the tokens that the model reads.
    """

    def __init__(self, model: Model, dataset: CaptionDataset, images: int = 0, captions: int = 0):
        self.model, self.dataset = model, dataset
        self.unreadable, self.cut = [], 0
        row_of = dataset.table.row_of           # of all captions, rising
        rows = np.unique(row_of)
        self.rows = rows[:images] if images else rows
        chosen = row_of <= self.rows[-1]
        if captions:
            place = np.arange(len(row_of)) - np.searchsorted(row_of, row_of)    # among its image's
            chosen &= place < captions
        self.numbers = np.flatnonzero(chosen)
        self.image_of = np.searchsorted(self.rows, row_of[self.numbers])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.numbers)

    def encode_image(self, i: int) -> Tensor | vilt.Visual:
        """The visual of image i of 0..N-1."""
        config, device = self.model.config, device_of(self.model)
        pictures, wrong = self.dataset.pictures(int(self.rows[i]))
        self.unreadable += wrong
        return encode_batch_images(self.model, picture_batch(config, pictures, device))

    def tokens(self) -> list[list[int]]:
        """The token ids of all M captions, in order."""
        tokens = [self.dataset.tokens(int(number)) for number in self.numbers]
        self.cut = sum(cut for _, cut in tokens)
        return [ids for ids, _ in tokens]

    def encode_texts(self, tokens: list[list[int]]) -> flm.Text | vilt.Text:
        """The model's Text of B captions, for the class vector alone."""
        device = device_of(self.model)
        ids = pad_texts(tokens, self.model.config.pad_id).to(device)                    # (B, L)
        text = self.model.encode_text(ids, class_only=True)
        if isinstance(text, flm.Text) and torch.is_autocast_enabled(device.type):
            return text.to(torch.get_autocast_dtype(device.type))
        return text             # ViLT adds to its tokens in float32

    def contents_hash(self, precision: str) -> str:
        """A hash of all that the scores depend on, 16 hexadecimal digits.

        These are the model's tensors, the tokenizer, the captions' token ids, the pictures' bytes,
        the precision, and the code that computes. Files and tensors are read where they are mapped,
        about a gigabyte a second.
        """
        digest = hashlib.blake2b(digest_size=8)

        def add(part):
            part = memoryview(part)
            digest.update(part.nbytes.to_bytes(8, "little"))    # else "ab", "c" would be "a", "bc"
            digest.update(part)

        model = self.model
        tokenizer_files = weights.pack_tokenizer(model.tokenizer)
        add(repr((model.config, precision, tokenizer_files, torch.__version__)).encode())
        for code in (data, files, flm, layers, pictures, predict, tasks, vilt):
            add(Path(code.__file__).read_bytes())
        add(Path(__file__).read_bytes())
        for name, tensor in model.state_dict().items():
            add(name.encode())
            add(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for ids in self.tokens():
            add(np.array(ids))
        for row in self.rows:
            add(self.dataset.table.image(int(row)) or b"")
        return digest.hexdigest()


@torch.no_grad()
def texts_that_fit(gallery: Gallery, least: int = 256) -> int:
    """How many captions may be scored at a time: `least`, doubled as long as a GPU has the memory.

    The longest captions are tried. On a CPU it is `least`: more would gain nothing there.
    """
    device, tokens = device_of(gallery.model), gallery.tokens()
    if device.type == "cpu":
        return least
    tokens.sort(key=len, reverse=True)
    visual, size = gallery.encode_image(0), least
    while size < len(tokens):
        try:                    # twice as many as will be scored, for the other captions' memory
            match_score(gallery.model, visual, gallery.encode_texts(tokens[:4 * size]))
        except torch.OutOfMemoryError:
            break
        size *= 2
    torch.cuda.empty_cache()
    return size


@torch.no_grad()
def fill_scores(gallery: Gallery, scores: np.ndarray, images: Iterable[int],
                texts_at_once: int = 256, quiet: bool = False) -> None:
    """Scores some images of a gallery with all of its captions, into their rows of scores (N, M).

    images: which of the N. Rows that hold no NaN are complete and left as they are. So `scores`
    may be a file that several processes share, or that an interrupted run left.
    Memory: all encoded captions stay on the device, in FLM 2 M L D floats (halves under autocast).
    quiet: no progress bars.
    """
    tokens = gallery.tokens()
    # Captions of similar length are encoded together, so there is little padding.
    order = np.argsort([len(ids) for ids in tokens], kind="stable")         # (M,)
    batches = [order[first:first + texts_at_once] for first in range(0, len(order), texts_at_once)]
    bar = tqdm(batches, "encoding captions", unit=" batches", leave=False, disable=quiet)
    texts = [gallery.encode_texts([tokens[i] for i in batch]) for batch in bar]

    todo = [i for i in images if np.isnan(scores[i]).any()]
    # It counts pairs: an image with all captions may take minutes.
    bar = tqdm(None, "scoring", len(todo) * len(tokens), unit=" pairs", unit_scale=True,
               leave=False, disable=quiet)
    for i in todo:
        visual = gallery.encode_image(i)
        row = np.empty(len(tokens), dtype=np.float32)
        for batch, text in zip(batches, texts, strict=True):
            row[batch] = match_score(gallery.model, visual, text).cpu().numpy()
            bar.update(len(batch))
        scores[i] = row
    bar.close()


def scores_file(gallery: Gallery, folder: Path, name: str, place: Machine, resume: bool) -> Path:
    """The path of a NumPy file of scores (N, M), which all processes of `place` fill together.

    It holds NaN where nothing is computed yet. The file is fresh, unless `resume` finds that an
    earlier run left one of the same contents: its name ends with their hash. Files of this name and
    of other contents are removed.
    """
    path = None
    if place.rank == 0:
        N, M = gallery.shape
        path = folder / f"{name}.{N}x{M}.{gallery.contents_hash(place.precision)}.npy"
        if resume and path.is_file():
            done = int((~np.isnan(np.load(path, mmap_mode="r")).any(1)).sum())
            place.say(f"{path}: {done:,} of {N:,} images are scored already")
        else:
            if resume:
                place.say(f"{folder}: no scores of this model, tokenizer, data and code yet")
            with disk.complete_file(path) as fresh:
                np.lib.format.open_memmap(fresh, "w+", np.float32, (N, M))[:] = np.nan
        for old in folder.glob(f"{name}.*.npy"):
            if old != path:
                old.unlink()
    # All processes wait here for the first one.
    return place.union({} if path is None else {"path": path})["path"]
