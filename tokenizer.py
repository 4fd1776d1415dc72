"""Text <-> token ids: byte-level BPE (GPT-2, RoBERTa) for FLM, WordPiece (BERT uncased) for ViLT.

    python tokenizer.py train --vocab-size 1000 --out DIR captions.txt     # one text per line -> vocab.json, merges.txt
    python tokenizer.py encode DIR "A girl plays."                         # prints ids and pieces

Both tokenizers have one interface, and both give the ids of `tokenizers` and `transformers`:

    tok = load("roberta-base")                       # a folder with vocab.json + merges.txt, or with vocab.txt
    tok.encode("a cat")   -> [102, 4758]             # no special tokens around
    tok.decode([102, 4758]) -> "a cat"
    tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id, len(tok)
    tok.word_starts(ids)  -> [True, False, ...]      # where words begin, for whole-word masking

**Text is only text.** `encode` reads "</s>" in a caption as the four characters it is, so nothing that somebody wrote
on the web can end a sequence or mask a word. `encode(text, specials=True)` is for our own text, such as "a <mask> dog".
"""

import argparse
import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from itertools import accumulate
from operator import index, itemgetter
from pathlib import Path

import regex
from tqdm import tqdm

CACHED_WORDS = 1 << 16      # words whose ids are remembered: about 16 MB, in each data worker


def _read(path, expected, parse=str):
    """`parse` of a file's text; if that is not possible, one sentence with the path and what should have been there."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; expected {expected}") from None
    except ValueError as error:         # not UTF-8, not JSON
        raise ValueError(f"{path}: {error}; expected {expected}") from None


def _token_ids(text):
    ids = json.loads(text)
    if not isinstance(ids, dict) or any(type(i) is not int for i in ids.values()):
        raise ValueError("not a JSON object of token: id")
    return ids


def _read_added(table):
    """`added_tokens.json` beside a table: where transformers, too, keeps what the table itself does not hold."""
    path = Path(table).with_name("added_tokens.json")
    return _read(path, "the added tokens as JSON, token: id", _token_ids) if path.exists() else {}


class Tokenizer:
    """What both tokenizers share: the table token <-> id, and the special tokens.

    Special are the five tokens in `NAMED` and all added ones. `tokens[i]` is the token of id i, `ids[token]` its id,
    and `vocab` the table without added tokens.
    """

    NAMED = ()              # the names of cls, pad, sep, unk, mask

    def __init__(self, vocab, added=None):
        added = added or {}
        if moved := [token for token in added if vocab.get(token, added[token]) != added[token]]:
            raise ValueError(f"the added token {moved[0]!r} has another id in the vocabulary")
        self.vocab, self.ids = dict(sorted(vocab.items(), key=itemgetter(1))), {**vocab, **added}
        self.tokens = sorted(self.ids, key=self.ids.get)
        if [self.ids[token] for token in self.tokens] != list(range(len(self.tokens))):
            raise ValueError(f"the ids of its {len(self.tokens)} tokens are not 0, 1, 2, ... without gap or repetition")
        self.special_ids = {self.ids[name] for name in (*self.NAMED, *added) if name in self.ids}

    def __len__(self):
        return len(self.tokens)

    def __contains__(self, token):
        return token in self.ids

    def token_to_id(self, token):
        if token not in self.ids:
            raise ValueError(f"{token!r} is not one of the {len(self)} tokens of this vocabulary")
        return self.ids[token]

    def id_to_token(self, i):
        return self.tokens[self._checked([i])[0]]

    cls_id = property(lambda self: self.token_to_id(self.NAMED[0]))
    pad_id = property(lambda self: self.token_to_id(self.NAMED[1]))
    sep_id = property(lambda self: self.token_to_id(self.NAMED[2]))
    unk_id = property(lambda self: self.token_to_id(self.NAMED[3]))
    mask_id = property(lambda self: self.token_to_id(self.NAMED[4]))

    def _checked(self, ids):
        """`ids` (list, array or tensor of integers) as a list; an id outside the table is an error, -1 included."""
        ids = [index(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            wrong = next(i for i in ids if not 0 <= i < len(self))
            raise ValueError(f"id {wrong} is outside the vocabulary of {len(self)} tokens")
        return ids

    def add_tokens(self, tokens):
        """Append special tokens to the vocabulary; returns their ids. A token that is special already keeps its id."""
        ordinary = [token for token in tokens if token in self.ids and self.ids[token] not in self.special_ids]
        if wrong := ordinary + [token for token in tokens if not token]:
            raise ValueError(f"{wrong[0]!r} cannot be added as a special token: it is empty or an ordinary token")
        for token in tokens:
            if token not in self.ids:
                self.special_ids.add(len(self))
                self.ids[token] = len(self)
                self.tokens.append(token)
        return [self.ids[token] for token in tokens]

    @property
    def added(self):
        """The special tokens beyond the five named ones, {token: id}."""
        return {self.tokens[i]: i for i in sorted(self.special_ids) if self.tokens[i] not in self.NAMED}

    def encode(self, text, specials=False):
        """Text -> list of ids, with no special tokens around.

        specials=False: special tokens spelled out in the text are plain text, and their ids never appear (but for
                        WordPiece's [UNK], which stands for words that it cannot write).
        specials=True:  they become their ids; for text that we wrote ourselves. As in RoBERTa, "<mask>" also takes the
                        white space to its left: "a <mask> dog" -> "a", "<mask>", " dog".
        A lone surrogate (half of a UTF-16 pair, which Python's str permits and UTF-8 does not) is a ValueError.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start} of the text is the lone surrogate {text[error.start]!r}, "
                             "which cannot be encoded") from None
        if not specials or not self.special_ids:
            return self._encode_plain(text)
        names = sorted((self.tokens[i] for i in self.special_ids), key=len, reverse=True)     # the longest match wins
        parts = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)           # plain, special, plain, ...
        ids = []
        for plain, special in zip(parts[::2], [*parts[1::2], None]):
            ids += self._encode_plain(plain.rstrip() if special == "<mask>" else plain)
            ids += [self.ids[special]] if special is not None else []
        return ids

    def save(self, directory):
        """Write the table and, if tokens were added, added_tokens.json: the files that `load` and transformers read."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "added_tokens.json").unlink(missing_ok=True)    # an older one would add to this table
        added = {"added_tokens.json": json.dumps(self.added, ensure_ascii=False)} if self.added else {}
        for name, text in (self._files() | added).items():
            Path(directory, name).write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE

# GPT-2's idea of a word: a contraction; letters, digits or other marks with at most one space in front; white space.
# "(?!\S)" leaves the last of several spaces to the word that follows:  "it's   a dog!" -> it|'s|  | a| dog|!
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A token is a string of bytes. The files write each byte as one visible character: itself where that is visible in
# Latin-1, and otherwise the next from U+0100 on. So the space, the 33rd invisible byte, is U+0120: " cat" -> "Ġcat".
_visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_invisible = [byte for byte in range(256) if byte not in _visible]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _visible} | {byte: chr(256 + n) for n, byte in enumerate(_invisible)}
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


class BPE(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Text is cut into words and a word into bytes; then the pair of neighbours that was learned first is merged, again
    and again, until no pair is known. No character is unknown: what was never seen stays bytes.

    >>> tok = BPE.train(["low low low lower newest newest widest"], vocab_size=268)
    >>> [a + "+" + b for a, b in tok.merges]
    ['l+o', 'lo+w', 'e+s', 'Ġ+low', 'es+t', 'e+w', 'n+ew']
    >>> tok.encode("low lowest")
    [262, 264, 265]
    >>> [tok.id_to_token(i) for i in tok.encode("low lowest")]
    ['low', 'Ġlow', 'est']
    >>> tok.decode(tok.encode("naïve 🐶"))
    'naïve 🐶'
    >>> tok.word_starts(tok.encode("low lowest"))
    [True, True, False]
    >>> tok.encode("<mask>") == [tok.mask_id], tok.encode("<mask>", specials=True) == [tok.mask_id]
    (False, True)
    """

    NAMED = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

    def __init__(self, vocab, merges, added=None):
        """vocab {token: id}, merges [(left, right), ...] in the order learned, added {token: id}: all plain values."""
        super().__init__(vocab, added)
        if missing := [char for char in BYTE_OF_CHAR if char not in self.vocab]:
            raise ValueError(f"it has no token {missing[0]!r}; a byte-level table has one for each of the 256 bytes")
        self.merges = [tuple(pair) for pair in merges]
        self._byte_ids = [self.ids[CHAR_OF_BYTE[byte]] for byte in range(256)]
        # (left id, right id) -> (rank, id of both together). A merge that would spell a special token is left out.
        self._merges = {(self.ids[left], self.ids[right]): (rank, self.ids[left + right])
                        for rank, (left, right) in enumerate(self.merges)
                        if self.ids[left + right] not in self.special_ids}
        self._cache = {}
        self._bytes = [token.encode() if i in self.special_ids or not BYTE_OF_CHAR.keys() >= set(token) else
                       bytes(BYTE_OF_CHAR[char] for char in token) for i, token in enumerate(self.tokens)]

    def add_tokens(self, tokens):
        ids = super().add_tokens(tokens)
        self._bytes += [token.encode() for token in self.tokens[len(self._bytes):]]
        return ids

    @classmethod
    def load(cls, vocab_json, merges_txt):
        """Read the two files that `save`, `tokenizers` and transformers write, and added_tokens.json beside them."""
        vocab = _read(vocab_json, "a BPE vocabulary as JSON, token: id", _token_ids)
        merges = []
        for number, line in enumerate(_read(merges_txt, "BPE merges, two tokens a line").split("\n"), 1):
            if line.startswith("#version") or not line:
                continue
            pair = line.split(" ")
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"{merges_txt}, line {number}: expected two tokens and one space, got {line!r}")
            if unknown := [token for token in (*pair, "".join(pair)) if token not in vocab]:
                raise ValueError(f"{merges_txt}, line {number}: {unknown[0]!r} is not in {vocab_json}")
            merges.append(pair)
        added = _read_added(vocab_json)
        try:
            return cls(vocab, merges, added)
        except ValueError as error:
            raise ValueError(f"{vocab_json}: {error}") from None

    def _files(self):
        return {"vocab.json": json.dumps(self.vocab, ensure_ascii=False, separators=(",", ":")),
                "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in self.merges)}

    def _encode_plain(self, text):
        ids = []
        for word in WORDS.findall(text):
            ids += self._cache.get(word) or self._merge(word)
        return ids

    def _merge(self, word):
        """The ids of one word. Of all known pairs the lowest rank goes first, and of equal ones the leftmost.

        A heap and a linked list: n log n, since the web has "words" of 100,000 letters.
        """
        parts = [self._byte_ids[byte] for byte in word.encode()]            # a part that was swallowed becomes None
        n = len(parts)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))       # positions of the living neighbours
        heap = [(self._merges[pair][0], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in self._merges]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            found = self._merges.get((parts[i], parts[j])) if j < n else None
            if not found or found[0] != rank:
                continue                                                    # a neighbour has changed meanwhile
            parts[i], parts[j] = found[1], None
            after[i] = k = after[j]
            if k < n:
                before[k] = i
            for a, b in ((before[i], i), (i, k)):                           # the merged part has two new pairs
                if a >= 0 and b < n and (pair := (parts[a], parts[b])) in self._merges:
                    heapq.heappush(heap, (self._merges[pair][0], a))
        ids = [part for part in parts if part is not None]
        if len(self._cache) < CACHED_WORDS:
            self._cache[word] = ids
        return ids

    def decode(self, ids, skip_special=False):
        """Ids -> text; decode(encode(text)) == text. Bytes that are not UTF-8 (half a character) become U+FFFD."""
        ids = self._checked(ids)
        return b"".join(self._bytes[i] for i in ids
                        if not (skip_special and i in self.special_ids)).decode("utf-8", errors="replace")

    def word_starts(self, ids):
        """For each id: does a word begin here? A word is a piece of WORDS: punctuation and 's are words too.

            A   Ġskate  board  ing  Ġman   's   .   </s>
            x   x       .      .    x      x    x   x        (x = True)

        A leading Ġ does not decide it (the first word has none, nor has 's), and neither do two neighbours: "'" + "s"
        is one word in "it's" and two in "''s". So the text itself is cut once more, between the special tokens.
        """
        ids = self._checked(ids)
        spelled, flags, begin = [self._bytes[i] for i in ids], [True] * len(ids), 0
        for end in [k for k, i in enumerate(ids) if i in self.special_ids] + [len(ids)]:
            run = spelled[begin:end]
            text = b"".join(run).decode("utf-8", errors="surrogateescape")      # keeps the length of a cut character
            size = len if text.isascii() else lambda word: len(word.encode("utf-8", errors="surrogateescape"))
            starts = {0, *accumulate(map(size, WORDS.findall(text)))}           # in bytes
            flags[begin:end] = [offset in starts for offset in accumulate(map(len, run[:-1]), initial=0)][:len(run)]
            begin = end + 1
        return flags

    @classmethod
    def train(cls, texts, vocab_size, specials=NAMED, min_frequency=2):
        """Learn the merges from an iterable of str. Ids: the specials, the 256 bytes, then one for each merge.

        Each step merges the most frequent pair of neighbours; of equally frequent ones, the one with the lowest ids. It
        ends at `vocab_size` tokens, or earlier when no pair occurs `min_frequency` times. The result is that of
        `tokenizers.ByteLevelBPETokenizer`, except that here no merge may spell a special token.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, one per text, not a single str")
        tokens = [*specials, *sorted(BYTE_OF_CHAR)]
        if len(set(tokens)) < len(tokens) or vocab_size < len(tokens):
            raise ValueError(f"vocab_size={vocab_size}: expected at least {len(tokens)}, for 256 bytes and the "
                             f"specials {' '.join(specials)}, all different")

        # Only distinct words matter, and how often each occurs: 100,000 captions have a million words, 20,000 distinct.
        frequency = Counter()
        for text in tqdm(texts, desc="words", disable=None):
            frequency.update(WORDS.findall(text))
        times, ids = list(frequency.values()), {token: i for i, token in enumerate(tokens)}
        words = [[ids[CHAR_OF_BYTE[byte]] for byte in word.encode()] for word in frequency]

        counts, where = Counter(), defaultdict(set)     # of each pair: how often, and in which words
        for w, word in enumerate(words):
            for pair in zip(word, word[1:]):
                counts[pair] += times[w]
                where[pair].add(w)
        heap = [(-counts[pair], pair) for pair in counts]
        heapq.heapify(heap)

        merges = []
        progress = tqdm(total=vocab_size, initial=len(tokens), desc="merges", disable=None)
        while heap and len(tokens) < vocab_size:
            negative, pair = heapq.heappop(heap)
            if -negative != counts[pair]:               # other merges took some of it: back in line
                heapq.heappush(heap, (-counts[pair], pair))
                continue
            if counts[pair] < max(min_frequency, 1):
                break
            left, right = pair
            if tokens[left] + tokens[right] in specials:
                continue
            new = len(tokens)                           # never an old token: what two places spell alike, merges alike
            tokens.append(tokens[left] + tokens[right])
            merges.append((tokens[left], tokens[right]))

            born = set()                                # the pairs that the new token has with its neighbours
            for w in where.pop(pair):
                word, n, i = words[w], times[w], 0
                while i + 1 < len(word):
                    if word[i] == left and word[i + 1] == right:
                        word[i:i + 2] = [new]
                        changes = [((word[i - 1], left), (word[i - 1], new))] if i > 0 else []
                        changes += [((right, word[i + 1]), (new, word[i + 1]))] if i + 1 < len(word) else []
                        for lost, won in changes:
                            counts[lost] -= n
                            counts[won] += n
                            where[won].add(w)
                            born.add(won)
                    i += 1
            for pair in born:
                heapq.heappush(heap, (-counts[pair], pair))
            progress.update()
        progress.close()
        added = {token: ids[token] for token in specials if token not in cls.NAMED}
        return cls({token: i for i, token in enumerate(tokens)}, merges, added)


# ---------------------------------------------------------------------------------------------------------------------
# WordPiece

# The ideographs that BERT takes as words of their own. (BERT writes 2B820 for 2B920; this is what `tokenizers` reads.)
IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
              (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


class _Fold(dict):
    """BERT's clean-up of a character, as a table for `str.translate` that computes an entry when it is first needed.

    >>> "Don't  panic,\\tZoë\\x00!".translate(_Fold()).split()
    ['don', "'", 't', 'panic', ',', 'zoë', '!']
    """

    def __missing__(self, code):
        char, kind = chr(code), unicodedata.category(chr(code))
        if char in "\t\n\r" or char.isspace() and kind != "Cc":
            folded = " "
        elif kind in ("Cc", "Cf", "Co", "Mn") or code == 0xFFFD:    # controls; accents, once NFD has split them off
            folded = ""
        elif kind[0] == "P" or char in "$+<=>^`|~" or any(first <= code <= last for first, last in IDEOGRAPHS):
            folded = f" {char} "
        else:
            folded = char.lower()
        self[code] = folded
        return folded


FOLD = _Fold()


class WordPiece(Tokenizer):
    """BERT uncased (Devlin et al. 2019): lower case, no accents, punctuation apart; the longest known piece goes first.

    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "skate", "##board", "##er", "cafe", "!"]
    >>> tok = WordPiece({word: i for i, word in enumerate(words)})
    >>> tok.encode("A skateboarder, Café!")
    [5, 6, 7, 8, 1, 9, 10]
    >>> tok.word_starts([5, 6, 7, 8, 1, 9, 10])
    [True, True, False, False, True, True, True]
    >>> tok.decode([5, 6, 7, 8, 1, 9, 10])
    'a skateboarder [UNK] cafe!'

    The ids are those of `transformers.BertTokenizerFast`, but for characters that Unicode gained or reclassified after
    about 2015: that library froze its tables of punctuation and accents then, and Python's are newer.
    """

    NAMED = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")

    def __init__(self, vocab, added=None):
        super().__init__(vocab, added)
        self._cache, self._unknown = {}, [self.unk_id]
        self._pieces = {token: i for token, i in self.vocab.items() if i not in self.special_ids}

    @classmethod
    def load(cls, vocab_txt):
        """Read vocab.txt, a token a line, and `added_tokens.json` beside it."""
        tokens = _read(vocab_txt, "a WordPiece vocabulary, one token a line").removesuffix("\n").split("\n")
        vocab = {}
        for number, token in enumerate(tokens, 1):
            if token in vocab:
                raise ValueError(f"{vocab_txt}, line {number}: {token!r} stands already on line {vocab[token] + 1}")
            vocab[token] = number - 1
        added = _read_added(vocab_txt)
        try:
            return cls(vocab, added)
        except ValueError as error:
            raise ValueError(f"{vocab_txt}: {error}") from None

    def _files(self):
        return {"vocab.txt": "".join(f"{token}\n" for token in self.vocab)}

    def _encode_plain(self, text):
        ids = []
        for word in unicodedata.normalize("NFD", text).translate(FOLD).split():
            ids += self._cache.get(word) or self._split(word)
        return ids

    def _split(self, word):
        """The ids of one word: the longest piece at its start, again for the rest; one [UNK] if that fails anywhere."""
        ids, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = "##" * (start > 0) + word[start:end]
                if piece in self._pieces:
                    break
            else:
                break
            ids.append(self._pieces[piece])
            start = end
        ids = ids if start == len(word) else self._unknown
        if len(self._cache) < CACHED_WORDS:
            self._cache[word] = ids
        return ids

    def decode(self, ids, skip_special=False):
        """Ids -> text: pieces glued, words set apart, no space before . , ? !  What encode folded away stays away."""
        text = ""
        for i in self._checked(ids):
            if skip_special and i in self.special_ids:
                continue
            token = self.tokens[i]
            glued = text and token.startswith("##")
            text += (" " if text and not glued and token[0] not in ".,?!" else "") + token[2 if glued else 0:]
        return text

    def word_starts(self, ids):
        """For each id: does a word begin here? All but the ## pieces do."""
        return [not self.tokens[i].startswith("##") for i in self._checked(ids)]


def load(directory):
    """The tokenizer in a folder: BPE if it holds vocab.json and merges.txt, WordPiece if it holds vocab.txt."""
    directory = Path(directory)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        return BPE.load(directory / "vocab.json", directory / "merges.txt")
    if (directory / "vocab.txt").exists():
        return WordPiece.load(directory / "vocab.txt")
    raise FileNotFoundError(f"{directory}: no tokenizer here; expected vocab.json and merges.txt, or vocab.txt")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer, or encode a text.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files, one text per line")
    train.add_argument("files", nargs="+", metavar="FILE.txt")
    train.add_argument("--vocab-size", type=int, required=True, help="all tokens, with the 256 bytes and 5 specials")
    train.add_argument("--min-frequency", type=int, default=2, help="merge only pairs that occur so often (default 2)")
    train.add_argument("--out", required=True, metavar="DIR", help="where vocab.json and merges.txt go")
    encode = commands.add_parser("encode", help="print the ids and the pieces of a text")
    encode.add_argument("directory", metavar="DIR", help="a folder with vocab.json and merges.txt, or with vocab.txt")
    encode.add_argument("text")
    encode.add_argument("--specials", action="store_true", help='read "<mask>" and the like as special tokens')
    args = parser.parse_args(argv)
    try:
        if args.command == "train":
            lines = (line.rstrip("\n") for path in args.files for line in open(path, encoding="utf-8"))
            tok = BPE.train(lines, args.vocab_size, min_frequency=args.min_frequency)
            tok.save(args.out)
            print(f"{args.out}: {len(tok)} tokens, {len(tok.merges)} merges")
        else:
            tok = load(args.directory)
            ids = tok.encode(args.text, specials=args.specials)
            print(*ids)
            print(*map(tok.id_to_token, ids))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
