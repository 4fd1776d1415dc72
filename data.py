"""Arrow files -> samples -> batches: everything between the disk and the model.

    table = Captions(find_files("data/toy", ["toy"], "train"))          # memory-mapped, checked
    dataset = CaptionDataset(table, tok, Square(64), max_tokens=50, train=True)
    samples = dataset.samples([(0, 3), (0, 7)])         # epoch 0, the captions 3 and 7
    ids = pad_texts([sample["ids"] for sample in samples], tok.pad_id)
    images = pictures.pad_pictures([sample["image"] for sample in samples])

Letters: B batch, L text length (tokens), H, W height and width of an image (pixels).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from pictures import Encoded, Jpeg, Shape, decode, keep_jpeg
from storage import files
from storage.disk import shortened
from storage.files import Table, nested, outermost, refuse, running_sum
from vocabulary import Tokenizer

# -------------------------------------------------------------------------------------------------
# Reading.

class Captions(Table):
    """Image-caption pairs: `len(table.row_of)` captions of `len(table)` images.

    row_of (captions,): the row of each caption's image. It comes from Arrow's offset buffers: no
    caption becomes a Python string before it is used.
    """
    SCHEMA = files.CAPTIONS
    IMAGES: tuple = ("image",)          # columns of encoded images
    TEXT = "caption"                    # the column of texts, a list for each row
    MORE: tuple = ()                    # columns that belong to the texts
    OPTIONAL: tuple = ("image_id",)     # read where it is there

    def __init__(self, paths: Iterable[str | Path]):
        self.first_value = []           # of each batch: where its texts begin in Arrow's values
        self.counts = []                # of each batch: the number of texts of each row
        types = {field.name: field.type for field in self.SCHEMA}
        needed = (*self.IMAGES, self.TEXT, *self.MORE)
        super().__init__(paths, {name: types[name] for name in needed},
                         {name: types[name] for name in self.OPTIONAL})
        # The first text of each batch.
        self.text_starts = running_sum([some.sum() for some in self.counts])
        counts = np.concatenate([np.empty(0, np.int64), *self.counts])
        self.row_of = np.repeat(np.arange(len(self)), counts)
        del self.counts
        if not len(self.row_of):
            raise ValueError(f"{self.named()}: no captions in it")

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        offsets = batch.column(self.TEXT).offsets.to_numpy()                        # (rows + 1,)
        self.first_value.append(int(offsets[0]))
        self.counts.append(np.diff(offsets))

    def text(self, i: int) -> str:
        """Text i of all."""
        number = int(np.searchsorted(self.text_starts, i, side="right")) - 1
        values = self.batch(number).column(self.TEXT).values
        return values[int(i - self.text_starts[number] + self.first_value[number])].as_py()

    def texts(self) -> Iterator[str]:
        """All texts, in order; those of one record batch are in memory at a time."""
        for number, count in enumerate(np.diff(self.text_starts)):
            values = self.batch(number).column(self.TEXT).values
            yield from values.slice(self.first_value[number], int(count)).to_pylist()

    def image(self, row: int, which: int = 0) -> pa.Buffer:
        """The encoded image of a row (the first or second of a pair), without a copy."""
        return self.cell(self.IMAGES[which], row).as_buffer()

    def first_of(self, row: int) -> int:
        """The number of a row's first text."""
        return int(np.searchsorted(self.row_of, row))

    def details(self, i: int) -> dict:
        """What the file says of text i besides the text."""
        return {}


class Questions(Captions):
    """Questions about images; answers are labels of the answer list with scores (tests: none)."""
    SCHEMA, TEXT = files.VQA, "questions"
    MORE = ("answer_labels", "answer_scores", "question_id")

    def __init__(self, paths: Iterable[str | Path]):
        self.largest_label, self.largest_place = -1, ""     # of all; and where it is: "FILE row 3"
        super().__init__(paths)

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        super().take(path, first_row, batch)
        asked = self.counts[-1]                                                     # (rows,)
        labels, label_lists = nested(batch.column("answer_labels"))
        scores, score_lists = nested(batch.column("answer_scores"))
        labels, scores = labels.to_numpy(False), scores.to_numpy(False)
        _, (ids, *_) = nested(batch.column("question_id"))

        def check(bad, what, lengths=()):
            refuse(path, first_row, bad, what, lengths)

        check(ids != asked, "not one question_id for each question")
        # ViLT's test files have an empty list in each row, ours an empty list for each question.
        check((label_lists[0] != asked) & (label_lists[0] != 0),
              "not one list of answer_labels for each question")
        for level, (of_labels, of_scores) in enumerate(zip(label_lists, score_lists, strict=False)):
            check(of_labels != of_scores, "not one of answer_scores for each of answer_labels",
                  label_lists[:level])
        check(labels < 0, "a label below 0", label_lists)
        check(~((scores > 0) & (scores <= 1)), "a score that is not above 0 and at most 1",
              score_lists)
        if len(labels) and labels.max() > self.largest_label:
            self.largest_label = int(labels.max())
            row = first_row + outermost(int(labels.argmax()), label_lists)
            self.largest_place = f"{path} row {row}"

    def check_labels(self, count: int) -> None:
        """ValueError for labels that an answer list of `count` answers does not have."""
        if self.largest_label >= count:
            raise ValueError(f"{self.largest_place}: label {self.largest_label} is past the end of "
                             f"the answer list, which has {count} answers")

    def details(self, i: int) -> dict:
        row = int(self.row_of[i])
        place = i - self.first_of(row)
        found = []
        for name in self.MORE:
            cell = self.cell(name, row)
            found.append(cell[place].as_py() if len(cell) else [])
        labels, scores, question_id = found
        return {"labels": labels, "scores": scores, "question_id": question_id}


class Statements(Captions):
    """Statements about two images, true or false."""
    SCHEMA, IMAGES, TEXT = files.NLVR2, ("image_0", "image_1"), "questions"
    MORE, OPTIONAL = ("answers", "identifier"), ("identifiers",)

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        super().take(path, first_row, batch)
        if "identifiers" in batch.schema.names:
            _, (counts, *_) = nested(batch.column("identifiers"))
            refuse(path, first_row, counts != self.counts[-1],
                   "not one of identifiers for each statement")
        answers, (counts, *_) = nested(batch.column("answers"))
        refuse(path, first_row, counts != self.counts[-1], "not one answer for each statement")
        if len(answers) and not pa.types.is_boolean(answers.type):
            known = pc.is_in(answers, pa.array(["True", "False"], answers.type))
            refuse(path, first_row, ~known.to_numpy(False),
                   'an answer that is neither "True" nor "False"', [counts])

    def details(self, i: int) -> dict:
        row = int(self.row_of[i])
        place = i - self.first_of(row)
        answer = self.cell("answers", row)[place].as_py()           # "True", or a boolean
        pair, identifier = self.cell("identifier", row).as_py(), None
        if "identifiers" in self.batch(self.batch_of(row)).schema.names:
            identifier = self.cell("identifiers", row)[place].as_py()
        elif pair.count("-") == 3 and len(self.cell("questions", row)) == 1:
            identifier = pair               # older files: a row for each statement
            pair = identifier.rpartition("-")[0]
        # ViLT's files name the pair only, and its statements are in another order than their
        # numbers (rebuilt.official_identifiers).
        return {"label": int(str(answer) == "True"), "identifier": identifier, "pair": pair}


def token_lengths(table: Captions, tok: Tokenizer,
                  numbers: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Tokens of each text, or of those numbered, `<s>` and `</s>` included, int32: the sorting key.

    About 100,000 captions a second. Their length in bytes would cost nothing, but batches sorted by
    it are 22 % padding; sorted by tokens, 3 % (docs/LOG.md).
    """
    if numbers is None:
        texts, count = table.texts(), len(table.row_of)
    else:
        texts, count = map(table.text, numbers), len(numbers)
    texts = tqdm(texts, "counting tokens", count, unit=" captions", delay=5, mininterval=1)
    return np.fromiter((len(tok.encode(text)) + 2 for text in texts), np.int32, count)


# -------------------------------------------------------------------------------------------------
# Samples and batches.

class CaptionDataset(torch.utils.data.Dataset):
    """Samples of a Captions table (or Questions, Statements): `dataset[epoch, i]` is text i.

    A sample is a pure function of (seed, epoch, i): the number of workers or processes, and
    resuming, change nothing. Texts of one image can be asked for as a group, `(epoch, i, j, …)`.
    The image is then decoded once, and the generator of the first text draws what is random of it:
    such samples are a function of (seed, epoch, group).

    An image that cannot be decoded is named in the sample's "unreadable". In training the next row
    with a readable image is used instead, and its first text, or as many as the group has. The run
    stops (report.Log.micro_batch) when more than 10 images, and more than 1 % of those seen
    (--max-unreadable), could not be decoded. In evaluation, where every question needs an answer,
    the image is black.

    clean: str -> str, applied to every text. around: token ids put between `<s>` and the text, and
    between the text and `</s>`. augment: RandAugment(2, 9). With `keeps_jpegs` set, a JPEG that the
    device can decode is left as it is (pictures.Jpeg).
    """
    keeps_jpegs = False

    def __init__(self, table: Captions, tok: Tokenizer, shape: Shape, max_tokens: int, train: bool,
                 seed: int = 0, augment: bool = False, clean: Callable[[str], str] = str,
                 around: tuple[tuple, tuple] = ((), ())):
        self.table, self.tok, self.shape = table, tok, shape
        self.max_tokens, self.train, self.seed = max_tokens, train, seed
        self.clean, self.around = clean, around
        self.augment = None
        if augment:
            from torchvision.transforms import RandAugment      # slow to import
            self.augment = RandAugment(2, 9)

    def __len__(self) -> int:
        return len(self.table.row_of)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        [sample] = self.samples([key])
        return sample

    def samples(self, keys: list[tuple[int, ...]]) -> list[dict]:
        """The samples of a batch: each key is (epoch, text), or (epoch, text, …) of a group."""
        samples = []
        for epoch, *texts in keys:
            samples += self.group(epoch, texts)
        return samples

    __getitems__ = samples          # under this name torch's DataLoader asks for a whole batch

    def group(self, epoch: int, texts: list[int]) -> list[dict]:
        """A sample for each of some texts of one image."""
        rngs = [np.random.default_rng([self.seed, epoch, i]) for i in texts]
        unreadable = []
        for _ in range(100):
            row = int(self.table.row_of[texts[0]])
            pictures, wrong = self.pictures(row, rngs[0])
            unreadable += wrong
            if not wrong or not self.train:
                break
            texts = self.texts_after(row, len(texts))
        else:
            raise ValueError("100 images in a row cannot be decoded, the last one "
                             f"{unreadable[-1]}")
        samples = []
        for i, rng in zip(texts, rngs, strict=True):
            ids, cut = self.tokens(i)
            sample = {"image": pictures[0], "images": pictures, "ids": ids, "cut": cut, "row": row,
                      "index": i, "rng": rng, "train": self.train,
                      "shares_image": bool(samples),        # with the sample before it
                      "unreadable": [] if samples else unreadable}
            samples.append(sample | self.table.details(i))
        return samples

    def texts_after(self, row: int, count: int) -> list[int]:
        """The first `count` texts of the next row that has any; of too few, some come again."""
        row_of = self.table.row_of
        first = int(np.searchsorted(row_of, row, side="right")) % len(self)
        there = int(np.searchsorted(row_of, row_of[first], side="right")) - first
        return [first + k % there for k in range(count)]

    def pictures(self, row: int, rng: np.random.Generator | None = None
                 ) -> tuple[list[Tensor | Jpeg], list[str]]:
        """The images of a row, and a line for each that cannot be decoded and is black."""
        pictures, wrong = [], []
        for which in range(len(self.table.IMAGES)):
            encoded = self.table.image(row, which)
            try:
                jpeg = self.keeps_jpegs and keep_jpeg(encoded, self.shape, self.table.where(row))
                pictures.append(jpeg or self.decode(encoded, rng))
            except Exception as error:      # Pillow's readers raise whatever broken bytes lead to
                reason = shortened(error) or type(error).__name__
                wrong.append(f"{self.table.where(row)}: {reason}")
                width, height = self.shape(1, 1)[1]
                pictures.append(torch.zeros(3, height, width, dtype=torch.uint8))
        return pictures, wrong

    def decode(self, encoded: Encoded, rng: np.random.Generator | None) -> Tensor:
        if self.augment is None:
            return decode(encoded, self.shape, fast=self.train)
        with torch.random.fork_rng(devices=[]):     # RandAugment draws from torch's global state
            torch.manual_seed(int(rng.integers(2 ** 62)))
            return decode(encoded, self.shape, self.train, self.augment)

    def tokens(self, i: int) -> tuple[list[int], bool]:
        """Text i as token ids, and whether it was cut: `encode`."""
        return self.encode(self.table.text(i))

    def encode(self, text: str) -> tuple[list[int], bool]:
        """A text as token ids, `<s>` and `</s>` included, and whether it was cut to max_tokens.

        The end of the text is cut off, never the tokens around it. Logs and eval.py count it.
        """
        before, after = self.around
        ids = self.tok.encode(self.clean(text))
        kept = ids[:self.max_tokens - 2 - len(before) - len(after)]
        return [self.tok.cls_id, *before, *kept, *after, self.tok.sep_id], len(kept) < len(ids)


def pad_texts(texts: list[list[int]], pad_id: int, pad_to: int | tuple[int, ...] = 1,
              limit: int | None = None) -> Tensor:
    """Lists of token ids -> int64 (B, L).

    L is the longest, rounded up to a multiple of pad_to, or to the next of several lengths, but not
    beyond `limit`, the longest the model takes. What is longer than all lengths has L = limit.
    """
    longest = max(map(len, texts))
    if isinstance(pad_to, int):
        length = math.ceil(longest / pad_to) * pad_to
    else:
        length = min((some for some in pad_to if some >= longest), default=limit or longest)
    if limit is not None and length > limit:
        length = max(longest, limit)
    out = torch.full((len(texts), length), pad_id)
    for row, ids in zip(out, texts, strict=True):
        row[:len(ids)] = torch.tensor(ids)
    return out


def mask_words(ids: list[int], word_starts: list[bool], rate: float, mask_id: int,
               replacements: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """BERT's masking, of whole words: 80 % of their tokens become `<mask>`, 10 % a random token.

    The fate of each token is drawn apart from the others of its word.
    ids: a caption's tokens, `<s>` and `</s>` at its ends. word_starts: for the tokens in between,
    whether a word starts there. replacements: the ids that random tokens are drawn from. Of W
    words, rate · W are picked, rounded up or down at random so that the mean is `rate`, but at
    least one. Returns (masked ids, positions that were picked), both int64.   (BERT, section 3.1.)
    """
    ids = np.array(ids)
    word = np.cumsum(word_starts)               # 1, 1, 2, 3, …: the word of each inner token
    words = int(word[-1]) if len(word) else 0
    if words == 0:
        return ids, np.empty(0, np.int64)
    count = min(words, max(1, int(rate * words + rng.random())))
    chosen = 1 + rng.choice(words, count, replace=False)
    picked = 1 + np.flatnonzero(np.isin(word, chosen))
    fate = rng.random(len(picked))
    ids[picked[fate < 0.8]] = mask_id
    swapped = picked[(fate >= 0.8) & (fate < 0.9)]
    ids[swapped] = rng.choice(replacements, len(swapped))
    return ids, picked
