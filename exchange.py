"""Captions with one word exchanged: wrong ones that only a close look tells from the right ones.

    exchange = Exchange("data/toy/toy_exchange.json")       # {group: [words]}
    exchange("a star left of the ring", said=set(), rng=rng)
    # "a star right of the ring"

Another picture's caption is mostly wrong in every word. Who is to tell it from the right one need
not compare anything: which things are there is enough. With one word exchanged, it is not.
(Used in image-text matching: `tasks.PretrainFLM.exchange_words`.)
"""

import re
from collections.abc import Collection
from pathlib import Path

from data import CaptionDataset
from storage.disk import read_json


class Exchange:
    """Exchanges one word of a text for another of its group: "left" for "right", "two" for "three".

    The words of a group must fit into the same sentences, or the text alone would give the
    exchange away: "one" goes with "a star" and "two" with "stars". ValueError for a file that is
    not {group: [two words or more]}.
    """

    def __init__(self, path: str | Path):
        self.others = {}                # word -> the other words of its groups
        groups = read_json(path)
        if not isinstance(groups, dict):
            raise ValueError(f"{path}: a JSON file {{group: [words]}} is expected")
        for name, words in groups.items():
            good = isinstance(words, list) and all(isinstance(word, str) for word in words)
            if not good or len(set(words)) < 2:
                raise ValueError(f"{path}: group {name!r} is not a list of two words or more")
            for word in words:
                rest = [other for other in words if other != word]
                self.others.setdefault(word, []).extend(rest)

    def __call__(self, text: str, said: Collection[str], rng) -> str | None:
        """The text with one word exchanged; None where it has no word that could be.

        said: words that are true of the picture, since its other captions say them. They are not
        put in.
        """
        places = []
        for found in re.finditer(r"\w+", text):
            others = [word for word in self.others.get(found[0], ()) if word not in said]
            if others:
                places.append((found, others))
        if not places:
            return None
        found, others = places[rng.integers(len(places))]
        return text[:found.start()] + others[rng.integers(len(others))] + text[found.end():]


class ExchangedWords(CaptionDataset):
    """Samples with `wrong_ids`: their captions with one word exchanged (or None), as token ids."""
    exchange: Exchange

    def group(self, epoch: int, texts: list[int]) -> list[dict]:
        samples = super().group(epoch, texts)
        for sample in samples:
            text = self.table.text(sample["index"])
            wrong = self.exchange(text, self.said(sample["row"]), sample["rng"])
            sample["wrong_ids"] = None if wrong is None else self.encode(wrong)[0]
        return samples

    def said(self, row: int) -> set[str]:
        """All words of the captions of a picture."""
        first, last = self.table.first_of(row), self.table.first_of(row + 1)
        texts = (self.table.text(i) for i in range(first, last))
        return {word for text in texts for word in re.findall(r"\w+", text)}
