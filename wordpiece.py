"""WordPiece, BERT's tokenizer, for ViLT: loaded and used. (`tokenizer.load` opens its folder.)"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import regex

from vocabulary import Tokenizer, named, read_added

# The ideographs that BERT takes as words of their own. One range begins at 2B920 instead of 2B820:
# a mistake in BERT's code, which `tokenizers` keeps.
IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
              (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


class _CleanUp(dict):
    """BERT's clean-up of characters: a table for `str.translate` that fills itself when used.

    >>> "Don't  panic,\\tZoë\\x00!".translate(_CleanUp()).split()
    ['don', "'", 't', 'panic', ',', 'zoë', '!']
    """

    def __missing__(self, code):
        char = chr(code)
        kind = unicodedata.category(char)
        ideograph = any(first <= code <= last for first, last in IDEOGRAPHS)
        if char in "\t\n\r" or (char.isspace() and kind != "Cc"):
            self[code] = " "
        elif kind in ("Cc", "Cf", "Co", "Mn") or code == 0xFFFD:    # Mn: accents, split off by NFD
            self[code] = ""
        elif kind.startswith("P") or char in "$+<=>^`|~" or ideograph:
            self[code] = f" {char} "
        else:
            self[code] = char.lower()
        return self[code]


CLEAN_UP = _CleanUp()


class WordPiece(Tokenizer):
    """BERT uncased (Devlin et al. 2019): lower case, no accents, punctuation apart.

    A word is cut from left to right, each time at the end of the longest known piece.

    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "skate", "##board", "##er"]
    >>> tok = WordPiece({word: i for i, word in enumerate([*words, "cafe", "!"])})
    >>> tok.encode("A skateboarder, Café!")
    [5, 6, 7, 8, 1, 9, 10]
    >>> tok.word_starts([5, 6, 7, 8, 1, 9, 10])
    [True, True, False, False, True, True, True]
    >>> tok.decode([5, 6, 7, 8, 1, 9, 10])
    'a skateboarder [UNK] cafe!'

    The ids are those of `transformers.BertTokenizerFast`, except for characters that Unicode added
    or reclassified after about 2015: its tables are of that time, and Python's are newer.
    """

    NAMED = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")

    def __init__(self, vocab: dict[str, int], added: dict[str, int] | None = None):
        super().__init__(vocab, added)
        self._unknown = [self.unk_id]
        self._pieces = {token: i for token, i in self.vocab.items() if i not in self.special_ids}
        self._longest = max(map(len, self.vocab))

    @classmethod
    def load(cls, vocab_txt: str | Path) -> "WordPiece":
        """Read vocab.txt, one token a line, and added_tokens.json if it is beside it."""
        added, tables = read_added(vocab_txt)
        with named(*tables):
            tokens = Path(vocab_txt).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            return cls({token: i for i, token in enumerate(tokens)}, added)

    def _files(self):
        return {"vocab.txt": "".join(f"{token}\n" for token in self.vocab)}

    def _split(self, text):
        return unicodedata.normalize("NFD", text).translate(CLEAN_UP).split()

    def _word_ids(self, word):
        """The ids of one word; [UNK] if it has more than 100 characters or no piece fits."""
        if len(word) > 100:
            return self._unknown
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start > 0 else ""
            end = min(len(word), start + self._longest)
            while end > start and prefix + word[start:end] not in self._pieces:
                end -= 1
            if end == start:
                return self._unknown
            ids.append(self._pieces[prefix + word[start:end]])
            start = end
        return ids

    def _join(self, ids):
        """Case, accents, and the spaces around most punctuation do not come back."""
        text = " ".join([self.tokens[i] for i in ids]).replace(" ##", "")
        return regex.sub(r" (?=[.,?!])", "", text)

    def word_starts(self, ids: Iterable[int]) -> list[bool]:
        """For each id: does a word begin here? All tokens begin one except the ## pieces."""
        return [not self.tokens[i].startswith("##") for i in self._check(ids)]
