"""What both tokenizers share: the table of tokens, the special tokens, a cache of words.

BPE is in tokenizer.py, WordPiece in wordpiece.py. Here is also what opens their files.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import index, itemgetter
from pathlib import Path

import regex

from storage.disk import complete_file, read_json

CACHED_WORDS = 65_536       # words whose ids are remembered: about 16 MB in each data worker
LONGEST_WORD = 1_000        # letters; a longer one is neither remembered nor learned from
TABLES = ("merges.txt", "vocab.txt", "vocab.json", "added_tokens.json")


class Tokenizer:
    """A table of tokens, with all that does not depend on how words are cut into them.

    vocab         {token: id} as trained
    added         {token: id} of the special tokens that were added
    ids           {token: id} of both
    tokens        a list, the inverse of `ids`: `tokens[i]` is the token with id i
    special_ids   the ids of `added` and of the tokens in `NAMED`

    A subclass says how a text is cut into words (`_split`), what the ids of one word are
    (`_word_ids`), how ids become text (`_join`), and what its files contain (`_files`).
    """

    NAMED = ()              # the names of the cls, pad, sep, unk and mask tokens

    def __init__(self, vocab: dict[str, int], added: dict[str, int] | None = None):
        self.added = dict(added or {})
        self.ids = vocab | self.added
        if set(self.ids.values()) != set(range(len(self.ids))) or "" in self.added:
            raise ValueError(f"the ids of its {len(self.ids)} tokens are not 0, 1, 2, ...: a token "
                             "or an id occurs twice, or one is missing or empty")
        "".join(self.ids).encode()      # ValueError for what no file in UTF-8 can hold
        self.vocab = dict(sorted(vocab.items(), key=itemgetter(1)))
        self.tokens = sorted(self.ids, key=self.ids.get)
        names = (*self.NAMED, *self.added)
        self.special_ids = {self.ids[name] for name in names if name in self.ids}
        self._cache = {}    # word -> its ids

    def __len__(self):
        return len(self.tokens)

    def token_to_id(self, token: str) -> int:
        if token not in self.ids:
            raise ValueError(f"{token!r} is not one of the {len(self)} tokens of this vocabulary")
        return self.ids[token]

    def id_to_token(self, i: int) -> str:
        return self.tokens[self._check([i])[0]]

    cls_id = property(lambda self: self.token_to_id(self.NAMED[0]))
    pad_id = property(lambda self: self.token_to_id(self.NAMED[1]))
    sep_id = property(lambda self: self.token_to_id(self.NAMED[2]))
    unk_id = property(lambda self: self.token_to_id(self.NAMED[3]))
    mask_id = property(lambda self: self.token_to_id(self.NAMED[4]))

    def _check(self, ids):
        """The ids, a list, array or tensor of integers, as a list; ValueError for an unknown id."""
        ids = [index(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"id {i} is outside the vocabulary of {len(self)} tokens")
        return ids

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Append special tokens, and return the ids of all `tokens`.

        A token that is special already keeps its id; an ordinary token is a ValueError.
        """
        for token in tokens:
            if token not in self.ids:
                self.ids[token] = self.added[token] = len(self)
                self.special_ids.add(len(self))
                self.tokens.append(token)
            elif self.ids[token] not in self.special_ids:
                raise ValueError(f"{token!r} is an ordinary token and cannot be added as special")
        return [self.ids[token] for token in tokens]

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The ids of a text, without special tokens around it.

        specials=False: special tokens that the text spells out are plain text. Their ids never
                        appear, except WordPiece's [UNK] for a word that it cannot write.
        specials=True:  they become their ids. As in RoBERTa, "<mask>" also takes the white space
                        to its left: "a <mask> dog" becomes "a", "<mask>", " dog".
        """
        text.encode()       # ValueError for a lone surrogate, which no file in UTF-8 can contain
        if not specials or not self.special_ids:
            return self._encode_plain(text)
        names = [self.tokens[i] for i in self.special_ids]
        names.sort(key=len, reverse=True)               # where two names match, the longer one wins
        pattern = "|".join(map(regex.escape, names))
        ids = []
        for part in regex.split(f"({pattern})", regex.sub(r"\s+<mask>", "<mask>", text)):
            if part in names:
                ids.append(self.ids[part])
            else:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text):
        ids = []
        for word in self._split(text):
            ids += self._cache.get(word) or self._remembered_ids(word)
        return ids

    def _remembered_ids(self, word):
        ids = self._word_ids(word)
        if len(self._cache) < CACHED_WORDS and len(word) <= LONGEST_WORD:
            self._cache[word] = ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; skip_special leaves special tokens out."""
        ids = self._check(ids)
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids]
        return self._join(ids)

    def files(self) -> dict[str, str]:
        """{name: text} of the files that `load` and transformers read."""
        added = {"added_tokens.json": json.dumps(self.added, ensure_ascii=False)}
        return self._files() | (added if self.added else {})

    def save(self, directory: str | Path) -> None:
        """Write `files`. A run that is killed never leaves those of two tokenizers mixed."""
        with ExitStack() as stack:      # the file that is entered first gets its name last
            for name, text in self.files().items():
                partial = stack.enter_context(complete_file(Path(directory, name)))
                partial.write_text(text, encoding="utf-8")
            for name in TABLES:         # of an older tokenizer
                Path(directory, name).unlink(missing_ok=True)


@contextmanager
def named(*paths: str | Path) -> Iterator[None]:
    """Put the names of files in front of the message of any ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{' and '.join(map(str, paths))}: {error}") from None


def read_ids(path: str | Path) -> dict[str, int]:
    """A table of tokens, JSON; ValueError, with the file's name, for anything else."""
    ids = read_json(path)
    if not isinstance(ids, dict) or any(type(i) is not int for i in ids.values()):
        raise ValueError(f"{path}: expected a JSON object of token: id")
    return ids


def read_added(table: str | Path) -> tuple[dict[str, int], list[Path]]:
    """The added tokens of the file beside a table; the paths of both, for messages."""
    table = Path(table)
    path = table.with_name("added_tokens.json")
    return (read_ids(path), [table, path]) if path.exists() else ({}, [table])
