"""Damaged files of the project: Arrow files, checkpoints, tokenizers, answer lists.

Each part makes one try. Bytes are damaged at random. What a format means is damaged too: columns of
a table, offsets, the pickle of a checkpoint with its sum mended, ids of a vocabulary.
"""

import io
import json
import random
import struct
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save

from tools.faults_downloads import damage, json_bytes, mutated
from tools.faults_tries import BATCH, FLM, MIDDLE, ONCE, Try, differing_tensors, start, wait

# -- Arrow files -----------------------------------------------------------------------------------

def rows_of(t: Try, kind: str) -> pa.Table:
    """The first rows of the drawn world's training file of a kind, as one batch."""
    whole = pa.ipc.open_file(str(t.world.data / f"toy_{kind}_train.arrow")).read_all()
    return whole.slice(0, 24).combine_chunks()


def arrow_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as file:
        file.write_table(table)
    return buffer.getvalue()


def each(column: str, change):
    """A change of one column's values, as a function of rows."""
    return lambda rows: [row | {column: [change(one) for one in row[column]]} for row in rows]


def every(column: str, value):
    """The same value in every row, as a function of rows."""
    return lambda rows: [row | {column: value} for row in rows]


# What a row must not say: checking and training refuse it …
BAD_ROWS = {
    "vqa": {
        "labels -1": each("answer_labels", lambda some: [-1] * len(some)),
        "labels 10^9": each("answer_labels", lambda some: [10 ** 9] * len(some)),
        "scores nan": each("answer_scores", lambda some: [float("nan")] * len(some)),
        "scores 1e30": each("answer_scores", lambda some: [1e30] * len(some)),
        "scores -5": each("answer_scores", lambda some: [-5.0] * len(some)),
        "more labels than scores": each("answer_labels", lambda some: [*some, 1]),
        "labels null": each("answer_labels", lambda some: [None]),
        "scores null": each("answer_scores", lambda some: [None]),
        "fewer labels than questions": lambda rows: [
            row | {"answer_labels": row["answer_labels"][:1]} for row in rows]},
    "nlvr2": {
        "answers true": each("answers", str.lower),
        "answers yes": each("answers", lambda one: "yes"),
        "answers null": each("answers", lambda one: None), "no answers": every("answers", [])},
    "caption": {"lists null": every("caption", None), "no captions": every("caption", [])}}
# … and what they may read or refuse, both alike.
ODD_ROWS = {
    "vqa": {
        "questions null": each("questions", lambda one: None),
        "question ids null": each("question_id", lambda one: None)},
    "nlvr2": {"identifier null": every("identifier", None)},
    "caption": {"captions null": each("caption", lambda one: None),
                "image ids null": every("image_id", None)}}
# The columns that training reads.
READ = {"caption": ["image", "caption"],
        "vqa": ["image", "questions", "answer_labels", "answer_scores", "question_id"],
        "nlvr2": ["image_0", "image_1", "questions", "answers"]}
ODD_TYPES = {
    "image": [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())],
    "caption": [pa.list_(pa.large_string()), pa.large_list(pa.string()), pa.list_(pa.string_view()),
                pa.list_(pa.dictionary(pa.int32(), pa.string())), pa.list_(pa.binary())]}


def arrow(t: Try):
    """A table with damaged bytes, odd values, or columns of other types; checked and trained on."""
    kind = t.rng.choice(["caption", "caption", "vqa", "nlvr2"])
    how = t.rng.choice(["bytes", "numbers", "rows", "type"])
    table, refused = rows_of(t, kind), False
    contents = arrow_bytes(table)
    if how == "bytes":
        contents = damage(contents, t.rng)
    elif how == "numbers":
        contents = damage_numbers(contents, t.rng)
        refused = wait(start(lambda: validate(contents, READ[kind]))).outcome != "ok"
    elif how == "rows":
        name, change = t.rng.choice(list((BAD_ROWS[kind] | ODD_ROWS[kind]).items()))
        rows = change(table.to_pylist())
        contents = arrow_bytes(pa.Table.from_pylist(rows, schema=table.schema))
        refused = name in BAD_ROWS[kind]
        how += f": {name}"
    elif kind == "caption":
        column = t.rng.choice(list(ODD_TYPES))
        other = t.rng.choice(ODD_TYPES[column])
        place = table.schema.get_field_index(column)
        values = pa.array(table[column].to_pylist(), other)
        contents = arrow_bytes(table.set_column(place, column, values))
        how += f": {other}"
    path = t.write(f"toy_{kind}_train.arrow", contents)
    t.write("toy_vqa_answers.json", (t.world.data / "toy_vqa_answers.json").read_bytes())
    short = how if ":" in how else f"{kind}, {how}"
    checked = t.run("prepare.py", "check", path, "--workers", 1, names=[path],
                    what=f"check ({short})")
    if refused and checked.outcome == "ok":
        t.wrong("prepare.py check finds nothing wrong")
    task = {"caption": "pretrain"}.get(kind, kind)
    begin = FLM if task == "pretrain" else ["--task", task, "--recipe", "toy", "--load",
                                            t.world.model("itm")]
    trained = t.run("train.py", *begin, *BATCH, *ONCE, "--steps", 3, "--data", t.folder, "--out",
                    t.folder / "run", names=[path], what=f"train ({short})")
    if refused and trained.outcome == "ok":
        t.wrong("it is trained on")
    elif checked.outcome == "ok" and trained.outcome == "sentence":
        t.wrong(f"check finds nothing wrong, but training says: {trained.last_line}")


def damage_numbers(contents: bytes, rng: random.Random) -> bytes:
    """The bytes with other 32-bit numbers in place of small ones, as offsets are."""
    numbers = np.frombuffer(contents[:len(contents) // 4 * 4], np.int32).copy()
    small = np.flatnonzero((numbers > 0) & (numbers < len(contents)))
    for place in rng.sample(list(small), rng.randint(1, 2)):
        numbers[place] = rng.choice([0, -1, 2 ** 31 - 1, -2 ** 31, int(numbers[place]) + 10 ** 6])
    return numbers.tobytes() + contents[len(contents) // 4 * 4:]


def validate(contents: bytes, columns: list[str]):
    """Arrow's own check of a file; it may end the interpreter, so it is called in a child."""
    reader = pa.ipc.open_file(pa.py_buffer(contents))
    for number in range(reader.num_record_batches):
        reader.get_batch(number).select(columns).validate()


# -- Checkpoints, tokenizers, answers --------------------------------------------------------------

def damaged_pickle(archive: bytes, rng: random.Random) -> bytes:
    """A torch file with other bytes in its pickle, whose sum in the zip is right."""
    entry = next(entry for entry in zipfile.ZipFile(io.BytesIO(archive)).infolist()
                 if entry.filename.endswith("data.pkl"))
    lengths = struct.unpack("<HH", archive[entry.header_offset + 26:entry.header_offset + 30])
    begin = entry.header_offset + 30 + sum(lengths)
    b = bytearray(archive)
    for _ in range(rng.randint(1, 4)):
        b[rng.randrange(begin, begin + entry.file_size)] = rng.randrange(256)
    sums = (entry.CRC, zlib.crc32(b[begin:begin + entry.file_size]))
    return bytes(b).replace(*(struct.pack("<I", one) for one in sums))


def checkpoints(t: Try):
    """A damaged checkpoint: told about, and resumed from."""
    reference = t.world.reference("flm", 1)
    whole = (reference / f"step_{MIDDLE}.pt").read_bytes()
    kind = t.rng.choice(["zip", "zip", "pickle", "legacy", "safetensors"])
    name = "last.pt"
    if kind == "zip":
        contents = damage(whole, t.rng)
    elif kind == "pickle":
        contents = damaged_pickle(whole, t.rng)
    elif kind == "legacy":
        buffer = io.BytesIO()
        contents = torch.load(io.BytesIO(whole), weights_only=True)
        torch.save(contents, buffer, _use_new_zipfile_serialization=False)
        contents = damage(buffer.getvalue(), t.rng)
    else:
        name = "model.safetensors"
        contents = damage(save(torch.load(io.BytesIO(whole), weights_only=True)["model"]), t.rng)
    path = t.write(f"run/{name}", contents)
    t.run("weights.py", "info", path, names=[path], what=f"weights.py info ({kind})")
    if kind not in ("zip", "pickle"):           # runs save no others
        return
    resumed = t.run("train.py", *t.world.run_flags("flm"), "--out", path.parent, "--resume",
                    names=[path], what=f"--resume ({kind})")
    # A pickle with its sum mended may say anything, also another weight.
    if kind == "zip" and resumed.outcome == "ok" and differing_tensors(
            reference / name, path, ["model"]):
        t.wrong("it was resumed from, to other weights")


def odd_vocab(text: bytes, rng: random.Random) -> bytes:
    """RoBERTa's vocab.json with one entry that is none, or in another form."""
    table = json.loads(text)
    token = rng.choice(list(table))
    whole = [b"[" * 100_000, b"\xef\xbb\xbf" + text, json.dumps(list(table)).encode()]
    value = rng.choice([len(table) + 5, -1, 1.0, True, 2 ** 70, "1", float("nan"), None, "twice"])
    table["another" if value == "twice" else token] = table[token] if value == "twice" else value
    return rng.choice([json.dumps(table).encode()] * 4 + whole)


def tokenizers(t: Try):
    """A damaged tokenizer: encodes a text, trains a model."""
    vocab = (t.world.tokenizer / "vocab.json").read_bytes()
    merges = (t.world.tokenizer / "merges.txt").read_bytes()
    words = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\nskate\n"
    what = t.rng.choice(["vocab bytes", "vocab values", "merges bytes", "merges lines", "words",
                         "added tokens"])
    lines = (words if what == "words" else merges).split(b"\n")
    lines[t.rng.randrange(len(lines))] = t.rng.choice([
        b"", b" ", b"a", b"a b c", b"\xff x", b"a\tb", b"a b\r", b"#version: 0.3", b"[PAD]",
        lines[0], b"x" * 10 ** 6])
    files = {"vocab.json": vocab, "merges.txt": merges}
    if what == "vocab bytes":
        files["vocab.json"] = damage(vocab, t.rng)
    elif what == "vocab values":
        files["vocab.json"] = odd_vocab(vocab, t.rng)
    elif what == "merges bytes":
        files["merges.txt"] = damage(merges, t.rng)
    elif what == "merges lines":
        files["merges.txt"] = b"\n".join(lines)
    elif what == "words":
        files = {"vocab.txt": t.rng.choice([b"\n".join(lines), damage(words, t.rng)])}
    else:
        files["added_tokens.json"] = t.rng.choice([
            b"{", b"[]", b'{"<x>": 5}', b'{"<x>": 300}', b'{"": 300}', b'{"<x>": true}',
            b"[" * 100_000, b'{"<s>": 9}', b'{"a": 300}', b"\xff"])
    for name, contents in files.items():
        folder = t.write(f"tok/{name}", contents).parent
    t.run("tokenizer.py", "encode", folder, "a big red circle é😀 <mask>", "--specials",
          names=[folder], timeout=30, what=f"tokenizer.py ({what})")
    if t.number % 3 == 0:
        t.run("train.py", *FLM, *BATCH, *ONCE, "--data", t.world.data, "--tokenizer", folder,
              "--out", t.folder / "run", names=[folder], what="train.py --tokenizer")


def answer_lists(t: Try):
    """An answer list with odd values: put into a checkpoint, evaluated, trained with."""
    answers = json.loads((t.world.data / "toy_vqa_answers.json").read_text())
    if t.rng.random() < 0.2:
        answers = {str(number): answer for number, answer in enumerate(answers)}
    for _ in range(t.rng.choice([0, 1, 1, 2])):
        answers = mutated(answers, t.rng)
    path = t.write("toy_vqa_answers.json", json_bytes(answers, t.rng))
    for file in t.world.data.glob("toy_vqa_*.arrow"):
        (t.folder / file.name).symlink_to(file)
    model = t.world.model("vqa")
    t.run("weights.py", "convert", model, t.folder / "out.pt", "--answers", path, names=[path],
          what="convert --answers")
    t.run("eval.py", "vqa", model, "--data", t.folder, "--out", t.folder / "scores",
          names=[t.folder], what="eval.py vqa (answers)")
    if t.number % 3 == 0:
        t.run("train.py", "--task", "vqa", "--recipe", "toy", "--load", t.world.model("itm"),
              *BATCH, *ONCE, "--data", t.folder, "--out", t.folder / "run",
              names=[t.folder], what="train.py --task vqa (answers)")
