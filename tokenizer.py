"""Text to token ids and back: byte-level BPE (GPT-2, RoBERTa) for FLM, WordPiece (BERT) for ViLT.

    python tokenizer.py train --vocab-size 1000 --out DIR captions.txt    # one text per line
    python tokenizer.py encode DIR "A girl plays."                        # prints ids and tokens

BPE is here, WordPiece in wordpiece.py, what both share in vocabulary.py. Both have the same
methods, and give the ids of `tokenizers` and `transformers`:

    tok = load("roberta-base")        # a directory with vocab.json and merges.txt, or vocab.txt
    tok.encode("a cat")               # [102, 4758], without special tokens around it
    tok.decode([102, 4758])           # "a cat"
    tok.word_starts([102, 4758])      # [True, True]: where words begin, for whole-word masking
    tok.cls_id, tok.pad_id, tok.sep_id, tok.unk_id, tok.mask_id, len(tok)

**Text is only text.** `encode` reads "</s>" in a caption as ordinary characters, so nothing
that was written on the web can end a sequence or mask a word. `encode(text, specials=True)` is
for text of our own, such as "a <mask> dog".
"""

import argparse
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import regex
from tqdm import tqdm

from storage.disk import command, shortened
from vocabulary import LONGEST_WORD, Tokenizer, named, read_added, read_ids
from wordpiece import WordPiece

# GPT-2's words: a contraction; letters, digits or other marks, with the space in front of them;
# white space. "(?!\S)" leaves the last of several spaces to the word that follows:
# "it's   a dog!" -> it|'s|  | a| dog|!
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# A token is a string of bytes. In files, a byte is written as its character in Latin-1 if that is
# visible, and else as the next character from U+0100 on. The space, which is the 33rd invisible
# byte, becomes U+0120: " cat" is written "Ġcat".
_visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
_invisible = [byte for byte in range(256) if byte not in _visible]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _visible}
CHAR_OF_BYTE |= {byte: chr(256 + n) for n, byte in enumerate(_invisible)}
LATIN = {ord(char): chr(byte) for byte, char in CHAR_OF_BYTE.items()}      # for str.translate


class BPE(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Text is cut into words and a word into bytes. Then two neighbours are merged into one token,
    the pair that was learned first before all others, until no known pair is left. No character
    is unknown: one that was never seen stays a few bytes.

    >>> tok = BPE.train(["low low low lower newest newest widest"], vocab_size=268)
    >>> [left + "+" + right for left, right in tok.merges]
    ['l+o', 'lo+w', 'e+s', 'Ġ+low', 'es+t', 'e+w', 'n+ew']
    >>> tok.encode("low lowest")
    [262, 264, 265]
    >>> [tok.id_to_token(i) for i in tok.encode("low lowest")]
    ['low', 'Ġlow', 'est']
    >>> tok.word_starts(tok.encode("low lowest"))
    [True, True, False]
    >>> tok.decode(tok.encode("naïve 🐶"))
    'naïve 🐶'
    >>> tok.encode("<mask>") == [tok.mask_id], tok.encode("<mask>", specials=True) == [tok.mask_id]
    (False, True)
    """

    NAMED = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

    def __init__(self, vocab: dict[str, int], merges: Iterable[tuple[str, str]],
                 added: dict[str, int] | None = None):
        """merges: pairs of tokens, in the order in which they were learned."""
        super().__init__(vocab, added)
        ordinary = "".join(token for token, i in self.ids.items() if i not in self.special_ids)
        if not LATIN.keys() >= set(map(ord, ordinary)):
            raise ValueError("not byte-level BPE: a token has characters that stand for no byte")
        self.merges = [tuple(pair) for pair in merges]
        self._byte_ids = [self.token_to_id(CHAR_OF_BYTE[byte]) for byte in range(256)]
        self._merges = {}       # (left id, right id) -> (rank, id of both together)
        for rank, (left, right) in enumerate(self.merges):
            merged = self.ids[left + right]
            if merged not in self.special_ids:          # no text may spell a special token
                self._merges[self.ids[left], self.ids[right]] = (rank, merged)

    @classmethod
    def load(cls, vocab_json: str | Path, merges_txt: str | Path) -> "BPE":
        """Read the two files, and added_tokens.json if it is beside them."""
        vocab = read_ids(vocab_json)
        added, tables = read_added(vocab_json)
        merges = []
        with named(merges_txt):
            lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines, 1):
                if line.startswith("#version") or not line:
                    continue
                pair = line.split(" ")
                if len(pair) != 2 or not vocab.keys() >= {*pair, "".join(pair)}:
                    raise ValueError(f"line {number}: expected two tokens that together make a "
                                     f"token of {vocab_json}, got {shortened(repr(line))}")
                merges.append(pair)
        with named(*tables):
            return cls(vocab, merges, added)

    def _files(self):
        lines = [f"{left} {right}\n" for left, right in self.merges]
        return {"merges.txt": "#version: 0.2\n" + "".join(lines),
                "vocab.json": json.dumps(self.vocab, ensure_ascii=False, separators=(",", ":"))}

    def _split(self, text):
        return WORDS.findall(text)

    def _word_ids(self, word):
        """The ids of one word. The pair of the lowest rank is merged first, the leftmost of equals.

        With a heap, n bytes take n log n steps: the web has "words" of a million letters.
        """
        merges = self._merges
        parts = [self._byte_ids[byte] for byte in word.encode()]
        end = len(parts)
        parts.append(None)                  # found at position `end` and at -1; in no known pair
        before = list(range(-1, end))       # the positions of each part's neighbours
        after = [*range(1, end + 1), end]
        heap = []                           # rank * end + position of the left part
        for left, pair in enumerate(pairwise(parts)):
            if pair in merges:
                heap.append(merges[pair][0] * end + left)
        heapq.heapify(heap)
        while heap:
            rank, left = divmod(heapq.heappop(heap), end)
            right = after[left]
            merge = merges.get((parts[left], parts[right]))
            if not merge or merge[0] != rank:
                continue                    # one of the two has been merged with another part
            parts[left] = merge[1]
            parts[right] = None             # now a part of the left one
            after[left] = after[right]
            before[after[left]] = left
            for place in (before[left], left):              # the two new pairs
                merge = merges.get((parts[place], parts[after[place]]))
                if merge:
                    heapq.heappush(heap, merge[0] * end + place)
        return [part for part in parts if part is not None]

    def _join(self, ids):
        """Gives back the text that was encoded. Half a character, not UTF-8, becomes U+FFFD."""
        spelled = b""
        for special, run in groupby(ids, key=self.special_ids.__contains__):
            written = "".join([self.tokens[i] for i in run])
            spelled += written.encode() if special else written.translate(LATIN).encode("latin-1")
        return spelled.decode("utf-8", errors="replace")

    def word_starts(self, ids: Iterable[int]) -> list[bool]:
        """For each id: does a word begin here? Punctuation and 's are words too, as in WORDS.

            A   Ġskate  board  ing  Ġman   's   .   </s>
            x   x       .      .    x      x    x   x        (x = True)

        The Ġ does not tell: the first word and 's have none. Neither do two neighbours: "'" and "s"
        are one word in "it's" and two in "''s". So the text is cut into words again.
        """
        flags = []
        for special, run in groupby(self._check(ids), key=self.special_ids.__contains__):
            tokens = [self.tokens[i] for i in run]
            if special:
                flags += [True] * len(tokens)
                continue
            spelled = "".join(tokens).translate(LATIN).encode("latin-1")
            begins = []                     # for each byte: does a word begin here?
            for word in WORDS.findall(spelled.decode("utf-8", errors="surrogateescape")):
                size = len(word.encode("utf-8", errors="surrogateescape"))
                begins += [True] + [False] * (size - 1)
            offset = 0
            for token in tokens:
                flags.append(begins[offset])
                offset += len(token)        # one character is written for each byte
        return flags

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = NAMED,
              min_frequency: int = 2) -> "BPE":
        """Learn a vocabulary. Ids: the special tokens, the 256 bytes, then one for each merge.

        Each step merges the most frequent pair of neighbours; of equally frequent ones, the pair
        with the lowest ids. Training ends at `vocab_size` tokens, or when no pair occurs
        `min_frequency` times. The result is that of `tokenizers.ByteLevelBPETokenizer`, except
        that no merge may spell a special token, and that words over LONGEST_WORD are left out.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of str, one per text, not a single str")
        tokens = [*specials, *sorted(CHAR_OF_BYTE.values())]
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) < len(tokens) or vocab_size < len(tokens):
            raise ValueError(f"vocab_size={vocab_size}: expected at least {len(tokens)}, for 256 "
                             f"bytes and the specials {' '.join(specials)}, all different")

        # Each different word is kept once: 100,000 captions have a million words, 20,000 different.
        frequency = Counter()
        for text in tqdm(texts, desc="words", disable=None):
            frequency.update(WORDS.findall(text))
        frequency = {word: n for word, n in frequency.items() if len(word) <= LONGEST_WORD}
        times = list(frequency.values())
        words = []                          # words[w] occurs times[w] times
        for word in frequency:
            words.append([ids[CHAR_OF_BYTE[byte]] for byte in word.encode()])

        counts = Counter()                  # pair -> how often it occurs
        found_in = defaultdict(set)         # pair -> the numbers w of the words that contain it

        def count(w):
            for pair in pairwise(words[w]):
                counts[pair] += times[w]
                found_in[pair].add(w)

        for w in range(len(words)):
            count(w)
        heap = [(-occurrences, pair) for pair, occurrences in counts.items()]
        heapq.heapify(heap)
        merges = []
        while heap and len(tokens) < vocab_size:
            negative, pair = heapq.heappop(heap)
            if -negative != counts[pair]:   # since then, other merges took some of its places
                heapq.heappush(heap, (-counts[pair], pair))
                continue
            if counts[pair] < max(min_frequency, 1):
                break
            left, right = pair
            merged = tokens[left] + tokens[right]
            if merged in specials:
                continue
            merges.append((tokens[left], tokens[right]))
            new = len(tokens)
            tokens.append(merged)

            born = set()                    # the pairs of the new token with its neighbours
            for w in found_in.pop(pair):
                word = words[w]
                for old_pair in pairwise(word):
                    counts[old_pair] -= times[w]
                i = 0
                while i + 1 < len(word):
                    if word[i] == left and word[i + 1] == right:
                        word[i:i + 2] = [new]
                    i += 1
                count(w)
                born.update(new_pair for new_pair in pairwise(word) if new in new_pair)
            for new_pair in born:
                heapq.heappush(heap, (-counts[new_pair], new_pair))
        vocab = {token: i for i, token in enumerate(tokens)}
        added = {token: vocab[token] for token in specials if token not in cls.NAMED}
        return cls(vocab, merges, added)


def load(directory: str | Path) -> BPE | WordPiece:
    """The tokenizer in a directory: BPE for vocab.json and merges.txt, WordPiece for vocab.txt."""
    directory = Path(directory)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        return BPE.load(directory / "vocab.json", directory / "merges.txt")
    if (directory / "vocab.txt").exists():
        return WordPiece.load(directory / "vocab.txt")
    raise FileNotFoundError(f"{directory}: no tokenizer here; "
                            "expected vocab.json and merges.txt, or vocab.txt")


def _lines(paths):
    for path in paths:
        with named(path), open(path, encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE, or encode a text.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="learn a vocabulary from text files")
    train.add_argument("files", nargs="+", metavar="FILE.txt", help="texts, one per line")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N",
                       help="number of tokens, with the 256 bytes and 5 special tokens")
    train.add_argument("--min-frequency", type=int, default=2, metavar="N",
                       help="merge only pairs that occur at least N times (default: 2)")
    train.add_argument("--out", required=True, metavar="DIR", help="directory for its files")
    encode = commands.add_parser("encode", help="print the ids and the tokens of a text")
    encode.add_argument("directory", metavar="DIR", help="directory of a tokenizer's files")
    encode.add_argument("text", help="the text to encode")
    encode.add_argument("--specials", action="store_true",
                        help='read "<mask>" and the like as special tokens (default: as text)')
    with command("tokenizer.py"):
        args = parser.parse_args(argv)
        if args.command == "train":
            texts = _lines(args.files)
            tok = BPE.train(texts, args.vocab_size, min_frequency=args.min_frequency)
            tok.save(args.out)
            print(f"{args.out}: {len(tok)} tokens, {len(tok.merges)} merges")
        else:
            tok = load(args.directory)
            ids = tok.encode(args.text, specials=args.specials)
            print(*ids)
            print(*map(tok.id_to_token, ids))


if __name__ == "__main__":
    main()
