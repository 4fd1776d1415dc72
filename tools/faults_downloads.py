"""Damaged downloads, as prepare.py and eval.py may meet them: pictures, JSON, tar files.

Each part makes one try. Bytes are damaged at random. Where a format has a structure, that is
damaged too: values of a JSON file, headers of a tar with their sums mended.
"""

import copy
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

import data
import flm
import predict
import tasks
import vilt
from pictures import Square, decode
from storage import disk
from storage.tar_index import TarCaptions
from tools.faults_tries import Try


def damage(contents: bytes, rng: random.Random) -> bytes:
    """The bytes with one kind of damage: of a disk, of a transfer, or aimed at the head or end."""
    b = bytearray(contents)
    place, count = rng.randrange(len(b)), rng.randint(1, 30)
    odd = [0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)]
    match rng.choice(["bit", "bytes", "cut", "zeros", "ones", "insert", "repeat", "head", "end"]):
        case "bit":
            b[place] ^= 1 << rng.randrange(8)
        case "bytes":
            for _ in range(count):
                b[rng.randrange(len(b))] = rng.randrange(256)
        case "cut":
            del b[place:]
        case "zeros":
            b[place:place + 10 * count] = bytes(len(b[place:place + 10 * count]))
        case "ones":
            b[place:place + 8] = b"\xff" * len(b[place:place + 8])
        case "insert":
            b[place:place] = rng.randbytes(count)
        case "repeat":
            b[place:place] = b[place:place + 100]
        case "head":
            for _ in range(rng.randint(1, 6)):
                b[rng.randrange(min(len(b), 256))] = rng.choice(odd)
        case "end":
            for _ in range(rng.randint(1, 6)):
                b[-1 - rng.randrange(min(len(b), 600))] = rng.choice(odd)
    return bytes(b)


# -- Pictures --------------------------------------------------------------------------------------

def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pictures_of_all_kinds() -> dict[str, bytes]:
    """File name -> bytes: the formats and modes that are opened, each with red left, blue right."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:, :40], pixels[:, 40:] = (220, 20, 20), (20, 20, 220)
    image = Image.fromarray(pixels)
    ramp = np.linspace(0, 1, 48 * 80).reshape(48, 80)
    turned = Image.Exif()
    turned[0x112] = 6
    two = dict(save_all=True, append_images=[image.rotate(90)])
    kinds = {
        "rgb.jpg": (image, "JPEG", {}), "progressive.jpg": (image, "JPEG", {"progressive": True}),
        "grey.jpg": (image.convert("L"), "JPEG", {}),
        "cmyk.jpg": (image.convert("CMYK"), "JPEG", {}),
        "turned.jpg": (image, "JPEG", {"exif": turned}),
        "profile.jpg": (image, "JPEG", {"icc_profile": bytes(500)}),
        "rgb.png": (image, "PNG", {}), "rgba.png": (image.convert("RGBA"), "PNG", {}),
        "palette.png": (image.convert("P"), "PNG", {}), "one.png": (image.convert("1"), "PNG", {}),
        "moving.png": (image, "PNG", two), "moving.gif": (image.convert("P"), "GIF", two),
        "rgb.webp": (image, "WEBP", {}), "moving.webp": (image, "WEBP", two),
        "16.png": (Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG", {}),
        "float.tif": (Image.fromarray(ramp.astype(np.float32)), "TIFF", {}),
        "int32.tif": (Image.fromarray((ramp * (2 ** 31 - 1)).astype(np.int32)), "TIFF", {}),
        "rgb.bmp": (image, "BMP", {}), "wide.png": (Image.new("L", (60_000, 1), 9), "PNG", {}),
        "dot.png": (image.crop((0, 0, 1, 1)), "PNG", {})}
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        kinds[f"{compression}.tif"] = (image, "TIFF", {"compression": compression})
    return {name: encoded(picture, format, **options)
            for name, (picture, format, options) in kinds.items()}


ALL_PICTURES = pictures_of_all_kinds()
JPEG = ALL_PICTURES["rgb.jpg"]
CONFIGS = [flm.PRESETS["toy"], flm.PRESETS["base-b32"], vilt.PRESETS["vilt"]]


def pictures(t: Try):
    """20 pictures, most of them damaged: prepared, decoded as in training, opened alone."""
    names = []
    for number in range(20):
        kind = t.rng.choice(list(ALL_PICTURES))
        whole = t.rng.random() < 0.2
        contents = ALL_PICTURES[kind] if whole else damage(ALL_PICTURES[kind], t.rng)
        names.append(f"{number}_{'whole' if whole else 'damaged'}_{kind}")
        t.write(names[-1], contents)
    lines = [json.dumps({"image": name, "caption": "x"}) + "\n" for name in names]
    listed = t.write("list.jsonl", "".join(lines).encode())
    smaller = t.rng.choice([[], ["--shorter", 32]])
    out = t.folder / "out"
    result = t.run("prepare.py", "jsonl", listed, "--out", out, "--workers", 1, *smaller,
                   names=[t.folder])
    arrow, skipped = out / "list_caption_train.arrow", out / "list_caption_train.skipped.jsonl"
    config = t.rng.choice(CONFIGS)
    if result.outcome == "ok":
        taken = pa.ipc.open_file(str(arrow)).read_all().num_rows if arrow.exists() else 0
        left = len(skipped.read_text().splitlines()) if skipped.exists() else 0
        if taken + left != len(names):
            t.wrong(f"of {len(names)} pictures {taken} were taken and {left} left out")
    if result.outcome == "ok" and arrow.exists():
        t.call(lambda: decode_rows(arrow, config), "decoding what prepare.py took")
    t.call(lambda: open_alone(t.folder, names, config), "opening single pictures")


def decode_rows(arrow: Path, config):
    """Decodes a file's pictures as training and as evaluation do; any error is a fault."""
    table = data.Captions([arrow])
    for row in range(len(table)):
        for fast in (False, True):
            decode(table.image(row), tasks.shape_of(config), fast=fast)


def open_alone(folder: Path, names: list[str], config):
    """Opens pictures as eval.py does; a sentence must name each that is refused."""
    for name in names:
        try:
            pixels = predict.open_picture(folder / name, config).float()
        except ValueError as error:
            assert str(folder / name) in str(error) and "\n" not in str(error), error
            assert "_whole_" not in name or "wide" in name, error
        else:
            if "_whole_" in name:
                assert looks_right(name, pixels), f"{name} is not seen as it looks"


def looks_right(name: str, pixels: torch.Tensor) -> bool:
    """Whether an undamaged picture is seen as it looks: red left, blue right; or dark to bright."""
    if name.endswith(("_wide.png", "_dot.png", "one.png")):
        return True
    if name.endswith(("_16.png", "float.tif", "int32.tif")):
        return bool(pixels[:, -4:].mean() - pixels[:, :4].mean() > 80)
    first, last = pixels[:, :, :4].mean((1, 2)), pixels[:, :, -4:].mean((1, 2))       # (RGB,)
    if name.endswith("turned.jpg"):     # a quarter turn: what was left is above
        first, last = pixels[:, :4].mean((1, 2)), pixels[:, -4:].mean((1, 2))
    if name.endswith("grey.jpg"):
        return bool(first.mean() > last.mean())
    return bool(first[0] > first[2] + 80 and last[2] > last[0] + 80)


# -- JSON ------------------------------------------------------------------------------------------

ODD_VALUES = [None, True, 0, -1, 1.5, 2 ** 70, float("inf"), float("nan"), "", " ", "\ud800", "\0",
              "a" * 5000, [], {}, [[]], [None], {"a": 1}, "../../etc/passwd", "/etc/passwd", "é",
              ["x"] * 50, "-0", "1e5"]


def places(value, place: tuple = ()) -> Iterator[tuple]:
    """Every place in nested dicts and lists, as the keys that lead there."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        if isinstance(one, (dict, list)):
            yield from places(one, (*place, key))
        else:
            yield (*place, key)


def mutated(value, rng: random.Random):
    """A copy of a JSON value with another value, or another key, at one place."""
    value = copy.deepcopy(value)
    *way, last = rng.choice(list(places(value))[1:])
    holder = value
    for key in way:
        holder = holder[key]
    match rng.choice(["set", "remove", "repeat", "rename"]):
        case "remove":
            del holder[last]
        case "repeat" if isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        case "rename" if isinstance(holder, dict):
            holder[str(rng.choice(ODD_VALUES))] = holder.pop(last)
        case _:
            holder[last] = rng.choice(ODD_VALUES)
    return value


def json_bytes(value, rng: random.Random) -> bytes:
    """A value as JSON, one time in five not quite."""
    text = json.dumps(value)
    whole = text.encode()
    return rng.choice([whole] * 28 + [
        b"\xef\xbb\xbf" + whole, whole[:len(whole) // 2], b"[" * 100_000, text.encode("utf-16"),
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000, whole + b"\n{}", whole.replace(b'"', b"'", 2)])


KARPATHY = {"images": [
    {"filename": name, "split": split, "filepath": "", "sentences": [{"raw": "x y"}, {"raw": "z"}]}
    for name, split in (("a.jpg", "train"), ("b.jpg", "val"))]}
QUESTIONS = {"questions": [{"question_id": n, "image_id": n, "question": "what?"} for n in (1, 2)]}
ANNOTATIONS = {"annotations": [
    {"question_id": n, "image_id": n, "multiple_choice_answer": "red", "answer_type": "other",
     "answers": [{"answer": "red", "answer_id": k} for k in range(10)]} for n in (1, 2)]}
# Command -> {file: contents}. The first file or the folder is its ROOT.
SOURCES = {
    "jsonl": {"list.jsonl": [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "captions": [
        "y", "z"], "split": "val", "image_id": "7"}, {"image": "a.jpg", "caption": "w"}]},
    "vqa-jsonl": {"list.jsonl": [
        {"image": "a.jpg", "question": "q?", "answers": ["a", "b"], "question_id": 4},
        {"image": "b.jpg", "question": "r?", "answers": ["a"], "split": "val", "image_id": 9}]},
    "nlvr2-jsonl": {"list.jsonl": [
        {"images": ["a.jpg", "b.jpg"], "sentence": "s", "label": True},
        {"images": ["b.jpg", "a.jpg"], "sentence": "t", "label": "False", "split": "dev",
         "identifier": "x-1-0-0"}]},
    "karpathy": {"dataset.json": KARPATHY}, "f30k": {"karpathy/dataset_flickr30k.json": KARPATHY},
    "vg": {"annotations/region_descriptions.json": [
        {"id": n, "regions": [{"image_id": n, "phrase": "a b", "width": 3, "height": 4, "x": 0,
                               "y": 1}]} for n in (1, 2)]},
    "sbu": {"annot.json": [["images_train/0/1", "x"], ["images_train/0/2", "y"]]},
    "vqav2": {"questions_train.json": QUESTIONS, "annotations_train.json": ANNOTATIONS}}
PICTURES = ["a.jpg", "b.jpg", "images/a.jpg", "images/b.jpg", "images/1.jpg", "images/2.jpg",
            "images_train/0/1", "images_train/0/2", "images/VG_100K/1.jpg", "images/VG_100K/2.jpg",
            "flickr30k-images/a.jpg", "flickr30k-images/b.jpg"]


def json_files(t: Try):
    """Captions, questions and statements as JSON with odd values in odd places, prepared."""
    name = t.rng.choice(list(SOURCES))
    for picture in PICTURES:
        if name == "vg" or "VG" not in picture:
            t.write(picture, JPEG)
    chosen = t.rng.choice(list(SOURCES[name]))
    written = []
    for file, contents in SOURCES[name].items():
        for _ in range(t.rng.choice([0, 1, 1, 1, 2, 3]) if file == chosen else 0):
            contents = mutated(contents, t.rng) if contents else t.rng.choice(ODD_VALUES)
            if not isinstance(contents, (dict, list)):
                break
        lines = contents if file.endswith(".jsonl") and isinstance(contents, list) else [contents]
        written.append(t.write(file, b"\n".join(json_bytes(line, t.rng) for line in lines)))
    root = written[0] if name.endswith("jsonl") else t.folder
    least = ["--at-least", 1] if name == "vqav2" else []
    result = t.run("prepare.py", name, root, "--out", t.folder / "out", "--workers", 1,
                   *least, names=[t.folder], timeout=30)
    made = list((t.folder / "out").glob("*.arrow")) if result.outcome == "ok" else []
    if made:
        checked = t.run("prepare.py", "check", *made, "--workers", 1,
                        what=f"check of {name}'s files")
        if checked.outcome != "ok":
            t.wrong(f"prepare.py wrote what its check refuses: {checked.out[-300:]}")


# -- Tar files -------------------------------------------------------------------------------------

def shard_bytes(format: int) -> bytes:
    """A WebDataset shard of five pictures with captions."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as shard:
        for number in range(5):
            for ending, contents in (("jpg", JPEG), ("txt", b"a caption"), ("json", b'{"key": 1}')):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(contents)
                shard.addfile(member, io.BytesIO(contents))
    return buffer.getvalue()


SIZES = [b"77777777777\0", b"\x80\0\0\0" + (2 ** 62).to_bytes(8, "big"), b"\xff" * 12,
         b"\xff" * 4 + (2 ** 64 - 1024).to_bytes(8, "big"), b"-1".ljust(12, b"\0"), b"0" * 12]
NAMES = [b"../../x.jpg", b"/etc/x.jpg", b"a\0b", b"\xff\xfe.jpg", b"." * 90, b"", b"C:\\x.jpg"]
PAX = [b"20 size=-1000000000\n", b"99999999 path=x\n", b"0 x=y\n", b"-5 a=b\n", b"17 mtime=nan99\n",
       b"29 size=4611686018427387904\n", b"24 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"]


def damaged_header(shard: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A shard with a lie in one member's header, whose sum is right -> (bytes, what lies)."""
    b = bytearray(shard)
    at = rng.choice([at for at in range(0, len(b), 512) if b[at + 257:at + 262] == b"ustar"])
    what = rng.choice(["size", "type", "name", "link", "pax", "sparse"])
    if what == "size":
        b[at + 124:at + 136] = rng.choice(SIZES)
        b[at + 156] = rng.choice(b"0xLg")
    elif what == "type":
        b[at + 156] = rng.choice(b"0123456789KLSxgVMNDA\x00\x80")
    elif what == "name":
        b[at:at + 100] = rng.choice(NAMES).ljust(100, b"\0")
    elif what == "link":
        b[at + 156:at + 257] = rng.choice([b"1", b"2"]) + b"/etc/passwd".ljust(100, b"\0")
    elif what == "pax":
        body = rng.choice(PAX)
        b[at + 124:at + 136], b[at + 156] = b"%011o\0" % len(body), ord("x")
        b[at + 512:at + 1024] = body.ljust(512, b"\0")
    else:                       # 30 GB, of which 512 bytes are in the file
        b[at + 156], b[at + 482] = ord("S"), 0
        b[at + 386:at + 410] = b"%011o\0%011o\0" % (8 * 2 ** 30 - 512, 512)
        b[at + 483:at + 495] = b"\x80\0\0\0" + (30 * 2 ** 30).to_bytes(8, "big")
    b[at + 148:at + 156] = b" " * 8
    b[at + 148:at + 156] = b"%06o\0 " % sum(b[at:at + 512])
    return bytes(b), what


def tar_files(t: Try):
    """A damaged WebDataset shard, prepared, and read as it lies."""
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    contents, what = shard_bytes(t.rng.choice(formats)), "bytes"
    if t.rng.random() < 0.7:
        contents, what = damaged_header(contents, t.rng)
    else:
        contents = damage(contents, t.rng)
    path = t.write("00000.tar", contents)
    t.run("prepare.py", "img2dataset", t.folder, "--out", t.folder / "out", "--workers", 1,
          names=[path], timeout=20, what=f"img2dataset ({what})")
    t.call(lambda: decode_tar(path), "reading it by its index", names=[path], timeout=20)


def decode_tar(path: Path):
    """Reads each row of a tar as training does; a sentence may refuse it."""
    with disk.command("tar"):
        table = TarCaptions([path])
        dataset = data.CaptionDataset(table, None, Square(24), 50, train=False)
        for row in range(len(table)):
            dataset.pictures(row)
        list(table.texts())
