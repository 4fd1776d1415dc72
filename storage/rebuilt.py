"""What ViLT's own Arrow files lack, from what they and the official files have.

    official_identifiers("dev.json", [("dev-850-0", "There are two dogs.")])    # ["dev-850-0-1"]
    rebuilt_answers(Path("data/vqav2_answers.json"), "vqav2")           # ["net", "pitcher", …]

NLVR2's statements have no identifier of their own there, and VQA no answer list. METER and FLM use
the same files.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from storage.disk import shortened
from storage.files import VQA, Table, find_files, nested, outermost, refuse, splits_of

# -------------------------------------------------------------------------------------------------
# The identifiers of NLVR2's statements.

def official_identifiers(path: str | Path, statements: Iterable[tuple[str, str]]) -> list[str]:
    """The identifier of each (pair, sentence), by a file of NLVR2's official JSON lines.

    ViLT's files name only the pair, such as dev-850-0, and not the number of the sentence. Where a
    pair has a sentence twice, the first is named by the first line of the file, as in ViLT's rows.
    ValueError for a statement that is not in the file.
    """
    official, names = nlvr2_identifiers(path), []
    for pair, sentence in statements:
        left = official.get((pair, single_blanks(sentence)))
        if not left:
            raise ValueError(f"{path}: has no more statements of pair {pair} that read "
                             f"{shortened(repr(sentence))}")
        names.append(left.pop(0))
    return names


def nlvr2_identifiers(path: str | Path) -> dict[tuple[str, str], list[str]]:
    """{(pair, sentence with single blanks): identifiers} of NLVR2's official JSON lines."""
    found = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            identifier, sentence = entry["identifier"], single_blanks(entry["sentence"])
            pair, _, _ = identifier.rpartition("-")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{path} line {number}: {{"identifier": "dev-850-0-1", "sentence": '
                             '"…"} expected, as in the official files of NLVR2') from None
        found.setdefault((pair, sentence), []).append(identifier)
    return found


def single_blanks(text: str) -> str:
    """A text without the white space around it, and with one blank for any other."""
    return " ".join(text.split())


# -------------------------------------------------------------------------------------------------
# The answer list of VQA.

MOST_ANSWERS = 1_000_000        # in a list that is rebuilt: a false label would ask for gigabytes


class AnswerLabels(Table):
    """The answer list that VQA files imply: their `answers` spell out their `answer_labels`.

    ValueError for a label with two texts. A file without the columns, or without answers as those
    of tests, implies nothing.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.text_of = {}               # label -> its text
        super().__init__(paths, {}, {name: VQA.field(name).type
                                     for name in ("answers", "answer_labels")})

    def take(self, path: str, first_row: int, batch: pa.RecordBatch) -> None:
        if batch.num_columns < 2:
            return
        texts, text_lists = nested(batch.column("answers"))
        labels, lists = nested(batch.column("answer_labels"))
        for level, (of_texts, of_labels) in enumerate(zip(text_lists, lists, strict=False)):
            refuse(path, first_row, of_texts != of_labels,
                   "not one of answers for each of answer_labels", lists[:level])
        if not len(labels):
            return
        labels = labels.to_numpy(False).astype(np.int64)
        refuse(path, first_row, (labels < 0) | (labels >= MOST_ANSWERS),
               f"a label that is not from 0 to {MOST_ANSWERS:,}", lists)
        texts = texts.dictionary_encode()
        codes = texts.indices.to_numpy(False).astype(np.int64)
        _, firsts = np.unique(labels * len(texts) + codes, return_index=True)
        for first in firsts.tolist():
            label, text = int(labels[first]), texts[first].as_py()
            known = self.text_of.setdefault(label, text)
            if known != text:
                raise ValueError(f"{path} row {first_row + outermost(first, lists)}: label {label} "
                                 f"is {shortened(repr(text))} here, and {shortened(repr(known))} "
                                 "before, so the files have no answer list in common")

    def listed(self) -> list[str]:
        """The answers, by label. One that no question has in its place is called "(label 17)"."""
        count = max(self.text_of, default=-1) + 1
        return [self.text_of.get(label, f"(label {label})") for label in range(count)]


def rebuilt_answers(path: Path, dataset: str) -> list[str]:
    """The answer list that a dataset's VQA files imply, as ViLT's have no list beside them.

    path: where the list was expected. FileNotFoundError if the files have no answers.
    """
    paths = []
    for split in splits_of(path.parent, "vqa").get(dataset, ()):
        paths += find_files(path.parent, [dataset], split, "vqa")
    return list(listed_once(path, tuple((str(path), os.stat(path).st_mtime_ns) for path in paths)))


@functools.cache
def listed_once(path: Path, known: tuple[tuple[str, int], ...]) -> list[str]:
    """The answer list of some files, and a line that says so; once for each state of the files."""
    table = AnswerLabels([name for name, _ in known])
    answers, seen = table.listed(), len(table.text_of)
    if not answers:
        raise FileNotFoundError(f"{path}: there is no answer list; prepare.py writes it beside "
                                "the questions")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{path}: there is no such file, so the answer list is that of the labels in "
              f"{table.named()}: {len(answers):,} answers"
              + (f", of which {len(answers) - seen:,} never occur" if seen < len(answers) else ""))
    return answers
