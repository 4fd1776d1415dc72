"""prepare.py: every layout of captions, what is left out and named, resuming, flat memory.

All pictures are drawn here, except for the test that reads ../shared/data/coco_small.
"""

import io
import itertools
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import (checked, jsonl, names_in, noise_picture, prepare_main, put, rows, sentence,
                      skipped, tar, texts)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

import prepare
from sources import captions, shards
from storage.files import REGIONS

pytestmark = pytest.mark.slow       # nothing else imports it, so `make quick` leaves it out

ROOT = Path(__file__).resolve().parents[1]


def karpathy_entry(filename, split, *captions, **more):
    sentences = [{"raw": caption, "tokens": caption.split(), "sentid": 0} for caption in captions]
    return {"filename": filename, "split": split, **more, "sentences": sentences}


# --------------------------------------------------------------------------------------------------
# Layouts

def test_coco_makes_one_file_per_karpathy_split(tmp_path):
    root, out = tmp_path / "coco", tmp_path / "out"
    entries = []
    splits = ("train", "restval", "val", "test")
    for i, split in enumerate(splits):
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{i}.jpg"
        put(root / folder / name, noise_picture(i))
        entries.append(karpathy_entry(name, split, f" caption {i}. ", "twice", filepath=folder))
    put(root / "karpathy/dataset_coco.json", {"images": entries, "dataset": "coco"})
    prepare_main("coco", root, "--out", out)
    assert names_in(out) == sorted(f"coco_caption_karpathy_{split}.arrow" for split in splits)
    assert rows(out / "coco_caption_karpathy_restval.arrow") == [
        {"image": noise_picture(1), "caption": ["caption 1.", "twice"],
         "image_id": "COCO_val2014_1.jpg", "split": "restval"}]


def test_f30k_finds_its_pictures(tmp_path):
    put(tmp_path / "flickr30k-images/7.jpg", noise_picture())
    put(tmp_path / "karpathy/dataset_flickr30k.json",
        {"images": [karpathy_entry("7.jpg", "test", "a dog")]})
    prepare_main("f30k", tmp_path, "--out", tmp_path / "out")
    assert texts(tmp_path / "out/f30k_caption_karpathy_test.arrow") == {"7.jpg": ["a dog"]}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, folder, command, out", [
    ("flickr8k", "Images", "karpathy", "x_caption_test"),
    ("flickr30k", "flickr30k-images", "f30k", "f30k_caption_karpathy_test"),
    ("flickr30k", "flickr30k-images", "karpathy", "x_caption_test"),
    ("coco", "val2014", "coco", "coco_caption_karpathy_test"),
    ("coco", "val2014", "karpathy", "x_caption_test")])
def test_karpathys_own_files_are_found_and_pictures_that_they_do_not_name_are_counted(
        tmp_path, capsys, packed, name, folder, command, out):
    """Of the three in his zip it is the one that names the pictures of the folder."""
    root, lists = tmp_path / "x", {}
    for other in ("coco", "flickr8k", "flickr30k"):
        more = {"filepath": "val2014"} if other == "coco" else {}
        lists[f"dataset_{other}.json"] = {"images": [
            karpathy_entry(f"{other}{i}.jpg", "test", f"é {other}", **more) for i in (1, 2)]}
    for i in (1, 3):
        put(root / folder / f"{name}{i}.jpg", noise_picture(i))
    if packed:
        with zipfile.ZipFile(root / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file, content in lists.items():
                archive.writestr(file, json.dumps(content, ensure_ascii=False))
    else:
        for file, content in lists.items():
            put(root / file, content)
    prepare_main(command, root, "--out", tmp_path / "out")
    assert texts(tmp_path / f"out/{out}.arrow") == {f"{name}1.jpg": [f"é {name}"]}
    assert list(skipped(tmp_path / f"out/{out}.skipped.jsonl").values()) == ["missing file"]
    printed = capsys.readouterr().out
    assert "has no captions of 1 pictures in the folder, such as " in printed
    assert f"{name}3.jpg" in printed


def test_a_zip_that_is_none_is_one_sentence(tmp_path, capsys):
    put(tmp_path / "images/1.jpg", noise_picture())
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset_coco.json", json.dumps({"images": ["x" * 999]}))
    whole = (tmp_path / "caption_datasets.zip").read_bytes()
    damaged = whole[:60] + bytes([255 - whole[60]]) + whole[61:]
    for data in (b"", b"no zip", whole[:100], damaged):
        put(tmp_path / "caption_datasets.zip", data)
        message = sentence(capsys, "karpathy", tmp_path, "--out", tmp_path / "out")
        assert "caption_datasets.zip is not a complete .zip file" in message
    put(tmp_path / "caption_datasets.zip", whole)
    assert "images[0]" in sentence(capsys, "karpathy", tmp_path, "--out", tmp_path / "out")


# Each says the same, and most as others write it.
TABLES = {
    "captions.txt": "image,caption\na 1.jpg,one\nb.jpg,\"two, and \"\"more\"\"\"\n"
                    "a 1.jpg, three \n",
    "captions.csv": "\ufeffcaption;Image\r\none;a 1.jpg\r\n\"two, and \"\"more\"\"\";b.jpg\r\n\r\n"
                    "three;./a 1.jpg\r\n",
    "captions.tsv": "n\timage\tcaption\n1\ta 1.jpg\tone\n2\tb.jpg\ttwo, and \"more\"\n"
                    "3\ta 1.jpg\tthree"}


@pytest.mark.parametrize("file", TABLES)
@pytest.mark.parametrize("folder", [".", "Images"])
def test_a_folder_of_pictures_with_a_table_of_captions(tmp_path, capsys, file, folder):
    root = tmp_path / "x"
    put(root / file, TABLES[file])
    for name in ("a 1.jpg", "b.jpg", "c.JPG"):
        put(root / folder / name, noise_picture(len(name)))
    prepare_main("folder", root, "--out", tmp_path / "out", "--name", "mine")
    found = {}
    for path in (tmp_path / "out").glob("*.arrow"):
        found |= texts(path)
        for row in rows(path):
            assert path.name == f"mine_caption_{captions.split_of(row['image_id'])}.arrow"
    assert found == {"a 1.jpg": ["one", "three"], "b.jpg": ["two, and \"more\""]}
    printed = capsys.readouterr().out
    assert "2 pictures, split by a hash of their names" in printed
    assert "has no captions of 1 pictures in the folder, such as c.JPG" in printed


def test_the_split_of_a_table_is_kept_and_what_is_missing_is_named(tmp_path, capsys):
    root = tmp_path / "x"
    put(root / "captions.csv", "image,caption,split\n1.jpg,one,test\n2.jpg,two,\n1.jpg,,test\n"
                               "gone.jpg,x,test\n")
    for name in ("1.jpg", "2.jpg"):
        put(root / name, noise_picture())
    prepare_main("folder", root, "--out", tmp_path / "out")
    assert texts(tmp_path / "out/x_caption_test.arrow") == {"1.jpg": ["one"]}
    assert texts(tmp_path / "out/x_caption_train.arrow") == {"2.jpg": ["two"]}
    assert skipped(tmp_path / "out/x_caption_test.skipped.jsonl") == {
        "gone.jpg": "missing file", "1.jpg": "empty caption (image kept)"}
    assert "3 pictures, as its column split says: 2 test, 1 train" in capsys.readouterr().out


def test_a_hash_splits_pictures_in_ninety_five_and_five_percent():
    counts = Counter(captions.split_of(f"{number}.jpg") for number in range(10_000))
    assert abs(counts["train"] - 9000) < 100 and abs(counts["val"] - 500) < 80


@pytest.mark.parametrize("table, part", [
    ("", "first line"), ("picture,caption\n", "first line"),
                                         ("image,caption,caption\n", "first line"),
    ("image,caption\n1.jpg,one\n1.jpg,a dog, running\n", "line 3: 3 columns"),
    ("image,caption\n1.jpg\n", "line 2: 1 columns"), ("image,caption\n../1.jpg,x\n", "line 2"),
    ('image,caption\n1.jpg,"open\n1.jpg,one\n', "line 2: not a row"),
                                         ("image,caption\n,x\n", "line 2"),
    ('image,caption\n1.jpg,"a" b\n', "line 2: not a row"),
                                         ("image,caption\n1.jpg," + "x" * 200_000, "line 2"),
    ("image,caption,split\n1.jpg,x,train\n1.jpg,y,val\n",
     "line 3: the picture 1.jpg is of split val"),
    ("image,caption,split\n1.jpg,x,a/b\n", "line 2")])
def test_wrong_tables_are_named_with_their_line(tmp_path, capsys, table, part):
    put(tmp_path / "captions.csv", table)
    put(tmp_path / "1.jpg", noise_picture())
    message = sentence(capsys, "folder", tmp_path, "--out", tmp_path / "out")
    assert "captions.csv" in message and part in message and len(message) < 800


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(['"', '""', ",", ";", "\t", "\n", "\r\n", "1.jpg", "a dog", "split",
                                 "image", "caption",
                                 "\0", "é", "\udcff", "/x", "..", " "]), max_size=20),
       st.sampled_from(["", "image,caption\n",
"image\tcaption\tsplit\n", "\ufeff"]))
def test_any_table_is_prepared_or_refused_in_one_sentence(tmp_path, parts, header):
    put(tmp_path / "1.jpg", noise_picture())
    put(tmp_path / "captions.txt", (header + "".join(parts)).encode("utf-8", "surrogateescape"))
    try:
        prepare_main("folder", tmp_path, "--out", tmp_path / "out", "--force", "--workers", 1)
    except SystemExit as stop:
        message = str(stop.code)
        assert str(tmp_path) in message and "\n" not in message and len(message) < 800
    assert not list(tmp_path.glob("out/.*"))


def test_vg_takes_region_phrases_and_their_boxes_from_both_folders(tmp_path, capsys):
    for i, name in ((1, "VG_100K/10.jpg"), (2, "VG_100K_2/2.jpg"), (3, "VG_100K_2/3.jpg")):
        put(tmp_path / "images" / name, noise_picture(i))
    phrases = {10: ["red roof", " ", "a  tree "], 2: ["sky"], 4: ["lost"]}
    regions = [{"id": i, "regions": [
        {"region_id": 1, "image_id": i, "phrase": phrase, "x": n, "y": 10 + n, "width": 20 + n,
         "height": 30 + n} for n, phrase in enumerate(found)]} for i, found in phrases.items()]
    put(tmp_path / "annotations/region_descriptions.json", regions)
    prepare_main("vg", tmp_path, "--out", tmp_path / "out")
    assert rows(tmp_path / "out/vg.arrow", REGIONS) == [
        {"image": noise_picture(2), "caption": ["sky"], "width": [20], "height": [30], "x": [0],
         "y": [10], "image_id": "2"},
        {"image": noise_picture(1), "caption": ["red roof", "a  tree"], "width": [20, 22],
         "height": [30, 32], "x": [0, 2], "y": [10, 12], "image_id": "10"}]
    assert skipped(tmp_path / "out/vg.skipped.jsonl") == {
        "images/VG_100K_2/3.jpg": "no caption", "images/VG_100K/4.jpg": "missing file",
        "images/VG_100K/10.jpg": "empty caption (image kept)"}
    for wrong in ({"phrase": "no box"}, {"phrase": None}, {}, 5, "abcde", ["abc"],
                  {**regions[0]["regions"][0], "x": 0.5},
                  {**regions[0]["regions"][0], "y": 2 ** 70}):
        regions[1]["regions"] = [wrong]
        put(tmp_path / "annotations/region_descriptions.json", regions)
        message = sentence(capsys, "vg", tmp_path, "--out", tmp_path / "o")
        assert "region_descriptions.json: image 2: expected" in message


def test_sbu_is_cut_into_shards_and_understands_every_spelling_of_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "SHARD_ROWS", 1)
    out, train = tmp_path / "out", "images_train"
    for name in ("0000/0000001", "0000/0000002", "0001/0001000", "0001/0001001", "0001/0001009"):
        put(tmp_path / train / name, noise_picture(len(name)))
    put(tmp_path / "annot.json", [
        [f"{train}/0000/0000001", "one"], [f"/old/disk/{train}/0000/0000002", "two"],
        ["0001/0001000", "three"], ["0001001", "four"], ["0002/gone", "five"]])
    prepare_main("sbu", tmp_path, "--out", out, "--shards", 3)
    assert names_in(out) == ["sbu_0.arrow", "sbu_1.arrow", "sbu_2.skipped.jsonl"]
    assert texts(out / "sbu_0.arrow") == {"0000001": ["one"], "0000002": ["two"]}
    assert texts(out / "sbu_1.arrow") == {"0001000": ["three"], "0001001": ["four"]}
    assert skipped(out / "sbu_2.skipped.jsonl") == {f"{train}/0002/gone": "missing file",
                                                    f"{train}/0001/0001009": "no caption"}


@pytest.mark.parametrize("command, prefix", [
    ("cc3m", "conceptual_caption"), ("gcc", "conceptual_caption"),
    ("cc12m", "conceptual_caption12M")])
def test_conceptual_captions_have_train_and_val_shards(tmp_path, command, prefix):
    for split in ("train", "val"):
        put(tmp_path / f"images_{split}/0000/0000001", noise_picture())
        put(tmp_path / f"{split}_annot.json",
            [[f"images_{split}/0000/0000001", split], ["0000/0000001", "again"]])
    prepare_main(command, tmp_path, "--out", tmp_path / "out")
    for split in ("train", "val"):
        assert rows(tmp_path / f"out/{prefix}_{split}_0.arrow") == [
            {"image": noise_picture(), "caption": [split, "again"],
             "image_id": "0000001", "split": split}]


@pytest.mark.parametrize("command, prefix, pictures, shards", [
    ("sbu", "sbu", 10, 9), ("cc3m", "conceptual_caption_train", 40, 30), ("sbu", "sbu", 3, 3),
    ("cc12m", "conceptual_caption12M_train", 40, 40)])
def test_there_are_as_many_shards_as_the_originals_loaders_read(
        tmp_path, monkeypatch, command, prefix, pictures, shards):
    monkeypatch.setattr(captions, "SHARD_ROWS", 1)
    annotation = "annot.json" if command == "sbu" else "train_annot.json"
    names = [f"{number:07}" for number in range(pictures)]
    for name in names:
        put(tmp_path / f"images_train/0000/{name}", noise_picture())
    put(tmp_path / annotation, [[name, "text"] for name in names])
    listed = prepare.parser().parse_args([command, str(tmp_path), "--out", str(tmp_path / "out")])
    shards_of = list(listed.source(listed))
    assert len(shards_of) <= shards and shards_of[0].name == f"{prefix}_0"
    assert sum(shard.count for shard in shards_of) == pictures
    assert [record.row["image_id"] for shard in shards_of for record in shard.records()] == names


def test_tar_shards_become_files_one_by_one(tmp_path):
    out = tmp_path / "out"
    png = noise_picture(1, format="PNG")
    tar(tmp_path / "cc/00000.tar", [
        ("0.jpg", noise_picture(0)), ("0.json", b'{"caption": "json"}'), ("0.txt", b"from txt\n"),
        ("1.png", png), ("1.json", b'{"caption": "json alone", "url": "x"}'),
        ("2.webp", noise_picture(2, format="WEBP")),
        ("2.json", b'{"caption": null, "top_caption": "top"}'),
        ("3.jpg", noise_picture(3)), ("3.json", b'{"caption": null}'),
        ("4.txt", b"the download failed"),
        ("deep/5.x.JPG", b""), ("deep/5.jpeg", noise_picture(5)), ("deep/5.txt", "é".encode())])
    tar(tmp_path / "cc/00001.tar", [("10000.jpg", noise_picture(9)), ("10000.txt", b"second")])
    prepare_main("img2dataset", tmp_path / "cc", "--out", out, "--split", "val")
    assert names_in(out) == ["cc_00000.arrow", "cc_00000.skipped.jsonl", "cc_00001.arrow"]
    assert texts(out / "cc_00000.arrow") == {
        "0": ["from txt"], "1": ["json alone"], "2": ["top"], "deep/5": ["é"]}
    assert rows(out / "cc_00000.arrow")[1]["image"] == png
    assert rows(out / "cc_00001.arrow")[0]["split"] == "val"
    assert skipped(out / "cc_00000.skipped.jsonl") == {
        "3": "empty caption", "4": "missing file: no picture of this key"}
    prepare_main("img2dataset", tmp_path / "cc/*1.tar", "--out", tmp_path / "two", "--name", "some")
    assert names_in(tmp_path / "two") == ["some_00001.arrow"]


def test_jsonl_lines_of_one_image_become_one_row(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "3.jpg"):
        put(tmp_path / name, noise_picture(1))
    jsonl(tmp_path / "mine.jsonl",
          {"image": "a/1.jpg", "caption": "one"},
          {"image": "./a/1.jpg", "captions": ["two"]},
          {"image": "3.jpg", "captions": ["held out"], "split": "val", "image_id": 33},
          {"image": "a/2.jpg", "caption": "three"},
          {"image": "a/1.jpg", "caption": "too late"})
    prepare_main("jsonl", tmp_path / "mine.jsonl", "--out", tmp_path / "out")
    assert texts(tmp_path / "out/mine_caption_train.arrow") == {
        "a/1.jpg": ["one", "two"], "a/2.jpg": ["three"]}
    assert texts(tmp_path / "out/mine_caption_val.arrow") == {"33": ["held out"]}
    assert skipped(tmp_path / "out/mine_caption_train.skipped.jsonl") == {
        "a/1.jpg": "duplicate: an earlier row has this image_id"}


def test_equal_file_names_in_two_folders_keep_their_own_captions(tmp_path):
    for folder in "ab":
        put(tmp_path / f"images_train/{folder}/1.jpg", noise_picture(ord(folder)))
        put(tmp_path / f"k/images/{folder}/1.jpg", noise_picture(ord(folder)))
    put(tmp_path / "annot.json", [[f"images_train/{folder}/1.jpg", folder] for folder in "ab"])
    put(tmp_path / "k/dataset.json", {"images": [
        karpathy_entry("1.jpg", "train", folder, filepath=folder) for folder in "ab"]})
    prepare_main("sbu", tmp_path, "--out", tmp_path / "out")
    prepare_main("karpathy", tmp_path / "k", "--out", tmp_path / "out")
    assert texts(tmp_path / "out/sbu_0.arrow") == {
        "images_train/a/1.jpg": ["a"], "images_train/b/1.jpg": ["b"]}
    written = rows(tmp_path / "out/k_caption_train.arrow")
    assert [(row["image_id"], row["caption"], row["image"]) for row in written] == [
        ("a/1.jpg", ["a"], noise_picture(97)), ("b/1.jpg", ["b"], noise_picture(98))]


def test_real_photographs_and_captions_arrive_complete(tmp_path, shared, capsys):
    source = shared / "data/coco_small"
    prepare_main("karpathy", source, "--out", tmp_path)
    found = {split: rows(tmp_path / f"coco_small_caption_{split}.arrow")
             for split in ("train", "val", "test")}
    assert {split: len(found[split]) for split in found} == {"train": 188, "val": 23, "test": 23}
    assert len(names_in(tmp_path)) == 3
    expected = {image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
                for image in json.loads((source / "dataset.json").read_text())["images"]}
    written = {row["image_id"]: row for split in found for row in found[split]}
    assert {name: row["caption"] for name, row in written.items()} == expected
    assert sum(map(len, expected.values())) == 1171
    for name, row in written.items():
        assert row["image"] == (source / "images" / name).read_bytes()
    assert checked(capsys, *tmp_path.glob("*.arrow"))[0] == 0


# --------------------------------------------------------------------------------------------------
# Broken and odd pictures

def test_broken_pictures_and_empty_captions_are_left_out_counted_and_named(tmp_path, capsys):
    whole = noise_picture(1, size=(200, 200))
    png = noise_picture(1, (200, 200), format="PNG")
    headers = [b"IHDR" + struct.pack(">IIBBBBB", width, width * 3 // 4, 8, 2, 0, 0, 0)
               for width in (40, 20_000)]                   # the second says 300 megapixels
    bomb = [header + struct.pack(">I", zlib.crc32(header)) for header in headers]
    files = {"ok.jpg": whole, "cut.jpg": whole[:len(whole) // 2], "cut.png": png[:-40],
             "text.jpg": b"<html>404</html>", "empty.jpg": b"", "blank.jpg": whole,
             "half.jpg": whole, "odd.jpg": whole,
             "bomb.png": noise_picture(format="PNG").replace(*bomb)}
    for name, data in files.items():
        put(tmp_path / name, data)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    captions = {"blank.jpg": [" \n", None], "half.jpg": ["", "kept"],
                "odd.jpg": ["\ud800 half a character"]}
    long = "x" * 5000
    keys = [*files, "folder.jpg", "pipe.jpg", "endless.jpg", "gone.jpg", "nul\0.jpg", long]
    jsonl(tmp_path / "x.jsonl", *({"image": key, "captions": captions.get(key, ["text"])}
                                  for key in keys))
    prepare_main("jsonl", tmp_path / "x.jsonl", "--out", tmp_path / "out")
    assert texts(tmp_path / "out/x_caption_train.arrow") == {
        "ok.jpg": ["text"], "half.jpg": ["kept"]}
    left = skipped(tmp_path / "out/x_caption_train.skipped.jsonl")
    assert {key: reason.split(":")[0] for key, reason in left.items()} == {
        "cut.jpg": "truncated", "cut.png": "truncated", "text.jpg": "undecodable",
        "empty.jpg": "undecodable", "bomb.png": "undecodable", "blank.jpg": "empty caption",
        "half.jpg": "empty caption (image kept)", "odd.jpg": "caption is not Unicode",
        "folder.jpg": "unreadable file", "pipe.jpg": "unreadable file",
        "endless.jpg": "unreadable file", long: "unreadable file", "gone.jpg": "missing file",
        "nul\0.jpg": "unreadable file"}
    assert "bomb" in left["bomb.png"]
    printed = capsys.readouterr().out
    assert "2 images, 2 captions" in printed and "3 undecodable, 2 truncated" in printed


@pytest.fixture
def odd(tmp_path):
    """A folder of pictures of every mode -> {name: bytes}; odd.jsonl lists them."""
    pictures = {
        "cmyk.jpg": noise_picture(3, mode="CMYK"),
        "gray.jpg": noise_picture(3, mode="L"),
        "palette.png": noise_picture(3, mode="P", format="PNG"),
        "palette.gif": noise_picture(3, mode="P", format="GIF"),
        "alpha.png": noise_picture(3, mode="RGBA", format="PNG"),
        "bits.png": noise_picture(3, mode="1", format="PNG")}
    deep = io.BytesIO()
    Image.fromarray(np.full((30, 40), 128 << 8, np.uint16)).save(deep, "PNG")
    pictures["deep.png"] = deep.getvalue()
    for name, data in pictures.items():
        put(tmp_path / name, data)
    jsonl(tmp_path / "odd.jsonl", *({"image": name, "caption": name} for name in pictures))
    return pictures


def test_pictures_of_every_mode_keep_their_bytes_or_become_rgb_jpegs(tmp_path, odd):
    prepare_main("jsonl", tmp_path / "odd.jsonl", "--out", tmp_path / "out")
    stored = rows(tmp_path / "out/odd_caption_train.arrow")
    assert {row["image_id"]: row["image"] for row in stored} == odd
    for limit, size in ((15, (20, 15)), (100, (40, 30))):           # nothing is enlarged
        out = tmp_path / f"out{limit}"
        prepare_main("jsonl", tmp_path / "odd.jsonl", "--out", out, "--shorter", limit)
        stored = {row["image_id"]: Image.open(io.BytesIO(row["image"]))
                  for row in rows(out / "odd_caption_train.arrow")}
        assert stored.keys() == odd.keys()
        for image in stored.values():
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        grey = np.asarray(stored["deep.png"]).astype(int)
        assert np.abs(grey - 128).max() <= 1                        # 16 bits: scaled, not clipped


@pytest.mark.parametrize("size, limit, expected", [
    ((641, 427), 64, (96, 64)), ((427, 641), 64, (64, 96)), ((2000, 1501), 100, (133, 100)),
    ((64, 64), 64, (64, 64)), ((900, 9), 5, (500, 5))])
def test_shorter_is_the_length_of_the_shorter_side(size, limit, expected):
    image = Image.open(io.BytesIO(shards.encoded(noise_picture(1, size), limit)))
    assert image.size == expected


def test_shorter_applies_the_cameras_orientation_and_plain_copies_keep_it():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6       # turn by 90 degrees clockwise to see it upright
    colours = Image.new("RGB", (80, 40), "red")
    colours.paste("blue", (40, 0, 80, 40))  # left red, right blue; upright: top red, bottom blue
    out = io.BytesIO()
    colours.save(out, "JPEG", exif=exif, quality=95)
    for limit, size in ((20, (20, 40)), (500, (40, 80))):
        turned = Image.open(io.BytesIO(shards.encoded(out.getvalue(), limit)))
        assert turned.size == size and not turned.getexif()
        top, bottom = (turned.getpixel((size[0] // 2, y)) for y in (3, size[1] - 4))
        assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]
    assert shards.encoded(out.getvalue()) == out.getvalue()
    assert shards.encoded(noise_picture(1), 30) == noise_picture(1)     # small and upright already


# --------------------------------------------------------------------------------------------------
# Runs: order, resuming, killed, memory

def many(folder, count):
    for i in range(count):
        put(folder / f"{i}.jpg", noise_picture(i, size=(30 + 40 * (i % 5), 30)))
    jsonl(folder / "many.jsonl", *({"image": f"{i}.jpg", "caption": str(i)} for i in range(count)))
    return folder / "many.jsonl"


def test_the_order_and_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    source = many(tmp_path, 60)
    put(tmp_path / "7.jpg", b"broken")
    first, second = tmp_path / "out1", tmp_path / "out5"
    prepare_main("jsonl", source, "--out", first, "--workers", 1, "--shorter", 24)
    prepare_main("jsonl", source, "--out", second, "--workers", 5, "--shorter", 24)
    assert names_in(first) == ["many_caption_train.arrow", "many_caption_train.skipped.jsonl"]
    for name in names_in(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert [row["image_id"] for row in rows(first / "many_caption_train.arrow")] == [
        f"{i}.jpg" for i in range(60) if i != 7]


def test_a_second_run_leaves_finished_files_alone_and_force_redoes_them(tmp_path, capsys):
    source, out = many(tmp_path, 3), tmp_path / "out"
    put(tmp_path / "1.jpg", b"broken")
    for name in ("many_caption_train.arrow", "many_caption_train.skipped.jsonl"):
        put(out / f"{name}.0123abcd.partial", "left over")
    prepare_main("jsonl", source, "--out", out)
    assert names_in(out) == ["many_caption_train.arrow", "many_caption_train.skipped.jsonl"]
    put(tmp_path / "1.jpg", noise_picture(1))
    capsys.readouterr()
    prepare_main("jsonl", source, "--out", out)
    assert "already finished" in capsys.readouterr().out
    assert len(rows(out / "many_caption_train.arrow")) == 2
    prepare_main("jsonl", source, "--out", out, "--force")
    assert len(rows(out / "many_caption_train.arrow")) == 3
    assert names_in(out) == ["many_caption_train.arrow"]    # the log of the old file is gone


def test_force_on_lost_pictures_does_not_destroy_the_finished_file(tmp_path, capsys):
    source, out = many(tmp_path, 2), tmp_path / "out"
    prepare_main("jsonl", source, "--out", out)
    for i in range(2):
        (tmp_path / f"{i}.jpg").unlink()
    assert "2 missing file" in sentence(capsys, "jsonl", source, "--out", out, "--force")
    assert len(rows(out / "many_caption_train.arrow")) == 2


# prepare.py with a picture that is read for ever: the run cannot finish. It says when it is there.
STUCK = """if True:
    import sys, time
    import prepare
    from sources import shards
    read = shards.read_picture

    def read_picture(path):
        if path.name == "stuck.jpg":
            print("stuck", flush=True)
            time.sleep(3600)
        return read(path)

    shards.read_picture = read_picture
    prepare.main(sys.argv[1:])"""


def test_a_running_and_a_killed_run_are_in_nobodys_way(tmp_path, capsys):
    """The second is told who writes the same file; other files are written; nothing is left."""
    source, out = many(tmp_path, 20), tmp_path / "out"
    lines = source.read_text()
    put(source, lines + json.dumps({"image": "stuck.jpg", "caption": "never"}))
    process = subprocess.Popen([sys.executable, "-c", STUCK, "jsonl", source, "--out", out],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    try:
        assert "stuck\n" in process.stdout         # reads on until then
        put(source, lines)
        message = sentence(capsys, "jsonl", source, "--out", out)
        assert f"many_caption_train.arrow: process {process.pid} on " in message
        prepare_main("jsonl", source, "--out", out, "--name", "other")
        assert len(rows(out / "other_caption_train.arrow")) == 20
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = set(names_in(out)) - {"other_caption_train.arrow"}
    assert len(left) == 3 and "many_caption_train.arrow" not in left        # two partials, the lock
    prepare_main("jsonl", source, "--out", out)
    assert len(rows(out / "many_caption_train.arrow")) == 20
    assert names_in(out) == ["many_caption_train.arrow", "other_caption_train.arrow"]


def test_a_disk_without_room_is_one_sentence_and_the_finished_file_stays(tmp_path):
    source, out = many(tmp_path, 20), tmp_path / "out"
    prepare_main("jsonl", source, "--out", out)
    before = (out / "many_caption_train.arrow").read_bytes()
    code = """if True:
        import resource, sys, prepare
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        prepare.main(sys.argv[1:])"""
    run = subprocess.run([sys.executable, "-c", code, "jsonl", source, "--out", out, "--force"],
                         cwd=ROOT, capture_output=True, text=True)
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"{out / 'many_caption_train.arrow'}: File too large; a limit" in said
    assert names_in(out) == ["many_caption_train.arrow"]
    assert (out / "many_caption_train.arrow").read_bytes() == before


def test_a_file_where_the_folder_should_be_is_named(tmp_path, capsys):
    source = many(tmp_path, 1)
    put(tmp_path / "file", "x")
    for out in ("file", "file/below"):
        message = sentence(capsys, "jsonl", source, "--out", tmp_path / out)
        assert str(tmp_path / "file") in message and "a file stands where" in message


def test_names_that_are_not_ascii_work_where_the_locale_knows_only_ascii(tmp_path):
    folder = tmp_path / "é 😀"
    put(folder / "ü.jpg", noise_picture())
    put(folder / "l.jsonl", json.dumps({"image": "ü.jpg", "caption": "café"}, ensure_ascii=False))
    put(folder / "dataset.json", {"images": [karpathy_entry("ü.jpg", "train", "é")]})
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (folder / "images").mkdir()
    code = """if True:
        import sys, prepare
        folder = sys.argv[1]
        prepare.main(["jsonl", folder + "/l.jsonl", "--out", sys.argv[2]])
        prepare.main(["karpathy", folder, "--out", sys.argv[2], "--name", "k"])
        prepare.main(["img2dataset", folder, "--out", sys.argv[2], "--name", "t"])"""
    tar(folder / "0.tar", [("ä.jpg", noise_picture()), ("ä.txt", "ß".encode())])
    run = subprocess.run([sys.executable, "-c", code, folder, folder / "ö"], cwd=ROOT,
                         env=os.environ | ascii_only, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert texts(folder / "ö/l_caption_train.arrow") == {"ü.jpg": ["café"]}
    assert texts(folder / "ö/k_caption_train.arrow") == {"ü.jpg": ["é"]}
    assert texts(folder / "ö/t_0.arrow") == {"ä": ["ß"]}


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """200 MB of pictures, written in a process of its own."""
    put(tmp_path / "p.bmp", noise_picture(1, size=(128, 104), format="BMP"))
    jsonl(tmp_path / "x.jsonl", *({"image": "p.bmp", "caption": "the same", "image_id": str(i)}
                                  for i in range(5_000)))
    code = """if True:
        import resource, sys, prepare
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        prepare.main(["jsonl", sys.argv[1] + "/x.jsonl", "--out", sys.argv[1]])
        print("GREW", peak() - before)"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    assert (tmp_path / "x_caption_train.arrow").stat().st_size > 190e6
    assert float(run.stdout.split("GREW")[1]) < 150


# --------------------------------------------------------------------------------------------------
# Refusals: one sentence with the file's name

@pytest.mark.parametrize("path", [
    "../out.jpg", "a/../../out.jpg", "/etc/out.jpg", "..\\out.jpg", "C:\\out.jpg"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, capsys, path):
    put(tmp_path / "out.jpg", noise_picture())
    (tmp_path / "d/images_train").mkdir(parents=True)
    jsonl(tmp_path / "d/x.jsonl", {"image": path, "caption": "text"})
    put(tmp_path / "d/annot.json", [[path, "text"]])
    put(tmp_path / "d/dataset.json", {"images": [karpathy_entry(path, "train", "text")]})
    tar(tmp_path / "d/0.tar", [(path, noise_picture())])
    for command, source, name in (("jsonl", "d/x.jsonl", "x.jsonl, line 1"),
                                  ("sbu", "d", "annot.json"), ("karpathy", "d", "dataset.json"),
                                  ("img2dataset", "d", "0.tar")):
        message = sentence(capsys, command, tmp_path / source, "--out", tmp_path / "out")
        assert "leaves the folder" in message and name in message
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("command, name, content, part", [
    ("karpathy", "dataset.json", "{", "JSON"), ("karpathy", "dataset.json", "[]", '{"images": '),
    ("karpathy", "dataset.json", '{"images": [{"filename": "a.jpg"}]}', "images[0]"),
    ("karpathy", "dataset.json",
     '{"images": [{"filename": "a.jpg", "split": "../x", "sentences": []}]}', "'../x'"),
    ("karpathy", "dataset.json",
     '{"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}]}',
     "images[0]"),
    ("sbu", "annot.json", '{"a": 1}', "[...]"), ("sbu", "annot.json", '[["a", "b"], ["c"', "JSON"),
    ("sbu", "annot.json", '[["a", "b"], 5]', "entry 1"), ("sbu", "annot.json", '[["a"]]',
                                                          "entry 0"),
    ("jsonl", "", '{"image": "a.jpg", "caption": "x"}\n\n{', "line 3"),
                                                          ("jsonl", "", "[]", "line 1"),
    ("jsonl", "", '{"image": 5, "caption": "x"}', "line 1"),
    ("jsonl", "", '{"image": "a.jpg", "captions": "not a list"}', "line 1"),
    ("jsonl", "", '{"image": "a.jpg", "caption": "x", "image_id": {}}', "line 1"),
    ("jsonl", "", '{"a":' * 100_000, "line 1"), ("sbu", "annot.json", "[" * 100_000, "recursion"),
    ("vg", "annotations/region_descriptions.json", '[{"id": 1e400, "regions": []}]', "entry 0")])
def test_wrong_annotations_are_named(tmp_path, capsys, command, name, content, part):
    (tmp_path / "x/images_train").mkdir(parents=True)
    root = tmp_path / "x" if name else tmp_path / "x.jsonl"
    put(root / name, content)
    message = sentence(capsys, command, root, "--out", tmp_path / "out")
    assert str(root / name) in message and part in message and len(message) < 800


STRANGE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
STRANGE |= st.sampled_from(
    ["x" * 5000, "\ud800", "\0", "/etc/passwd", "../x", [], {}, [[]], {"raw": 1},
     ["x" * 1000] * 99])


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["filename", "filepath", "split", "sentences", "sentids", "raw"]), STRANGE)
def test_odd_values_in_karpathys_file_are_left_out_or_one_sentence(tmp_path, key, value):
    put(tmp_path / "images/a.jpg", noise_picture())
    wrong = karpathy_entry("a.jpg", "train", "a dog")
    (wrong["sentences"][0] if key == "raw" else wrong)[key] = value
    good = karpathy_entry("a.jpg", "train", "a cat")
    put(tmp_path / "dataset.json", {"images": [good, wrong]})
    try:
        prepare_main("karpathy", tmp_path, "--out", tmp_path / "out", "--force", "--workers", 1)
    except SystemExit as stop:
        message = str(stop.code)
        assert str(tmp_path / "dataset.json") in message and "Traceback" not in message
        assert "\n" not in message and len(message) < 800
    else:
        assert texts(tmp_path / "out" / f"{tmp_path.name}_caption_train.arrow").keys() <= {"a.jpg"}
    assert not list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize("command", list(prepare.SOURCES))
def test_a_folder_of_another_layout_is_refused(tmp_path, capsys, command):
    for root in (tmp_path, tmp_path / "missing"):
        assert str(root) in sentence(capsys, command, root, "--out", tmp_path / "out")


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path, capsys):
    parts = {"jpg": noise_picture(), "txt": b"x"}
    tar(tmp_path / "0.tar", [(f"{i}.{end}", data) for i in range(3) for end, data in parts.items()])
    whole = (tmp_path / "0.tar").read_bytes()
    damaged = whole[:1536] + bytes([1]) * 512 + whole[2048:]          # the second header
    for data in (whole[:700], whole[:1024], whole[:2048], whole[:2500], damaged, b""):
        put(tmp_path / "0.tar", data)
        assert "0.tar" in sentence(capsys, "img2dataset", tmp_path, "--out", tmp_path / "out")
        assert not list(tmp_path.glob("out/*"))


def false_header(name, size, kind=b"0", sparse=b""):
    """A header of a tar that says what it likes, with the right sum. size: 12 bytes."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[156:157] = kind
    header[386:386 + len(sparse)] = sparse
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def number_of_tar(value):
    """A number of any size and sign, in twelve bytes."""
    return (b"\x80" if value >= 0 else b"\xff") + value.to_bytes(11, "big", signed=True)


@settings(max_examples=80, deadline=2000, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"V"]),
       st.sampled_from([-2 ** 62, -1024, -512, -1, 2 ** 31, 2 ** 62, 2 ** 80])
       | st.integers(0, 3000))
def test_a_tar_with_a_false_size_is_read_once_at_most_and_takes_no_memory(tmp_path, kind, size):
    text = tarfile.TarInfo("b.txt")
    text.size = 3
    put(tmp_path / "0.tar", text.tobuf() + b"cat".ljust(512, b"\0")
        + false_header("a.jpg", number_of_tar(size), kind) + noise_picture().ljust(1024, b"\0")
        + bytes(1024))
    tracemalloc.start()
    try:
        members = list(itertools.islice(captions.tar_records(tmp_path / "0.tar", "train"), 20))
        assert len(members) < 20
    except SystemExit as stop:
        assert "0.tar" in str(stop.code) and len(str(stop.code)) < 600
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_members_that_are_no_plain_files_are_left_out_by_name(tmp_path):
    """A sparse member of 30 GB in a few bytes, links, a device, and a chain of long names."""
    holes = (b"%011o\0" % (8 * 2 ** 30) + b"%011o\0" % 512).ljust(96, b"\0") + b"\0"
    sparse = false_header("a.jpg", b"%011o\0" % 512, b"S", holes + number_of_tar(30 * 2 ** 30))
    others = b""
    for name, kind in (("b.jpg", b"1"), ("c.jpg", b"2"), ("d.jpg", b"3"), ("e.jpg", b"6")):
        others += false_header(name, b"0" * 11 + b"\0", kind)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as file:
        for name, data in (("f.jpg", noise_picture()), ("f.txt", b"a dog"), ("g.jpg", b"1234")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    put(tmp_path / "t/0.tar", sparse + bytes(512) + others + whole.getvalue())
    prepare_main("img2dataset", tmp_path / "t", "--out", tmp_path / "out")
    assert texts(tmp_path / "out/t_0.arrow") == {"f": ["a dog"]}
    assert list(skipped(tmp_path / "out/t_0.skipped.jsonl")) == list("abcdeg")
    put(tmp_path / "t/0.tar", false_header("n", b"%011o\0" % 2, b"L") + b"n".ljust(512, b"\0"))
    chain = (tmp_path / "t/0.tar").read_bytes() * 5000
    put(tmp_path / "t/0.tar", chain)
    with pytest.raises(SystemExit, match="0.tar is not a complete .tar file"):
        list(captions.tar_records(tmp_path / "t/0.tar", "train"))


# --------------------------------------------------------------------------------------------------
# The command line

@pytest.mark.parametrize("command", [*prepare.SOURCES, "check"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main([command, "--help"])
    assert stop.value.code == 0 and "--workers" in capsys.readouterr().out


def test_every_flag_says_what_it_does_and_its_default():
    for flag, options in prepare.FLAGS.items():
        assert "(default: " in options["help"] or "(required)" in options["help"], flag


def test_the_commands_of_the_docstring_are_understood():
    commands = [line for line in prepare.__doc__.splitlines() if "  python prepare.py" in line]
    for command in commands:
        prepare.parser().parse_args(shlex.split(command)[2:])
    assert len(commands) == 7


def test_a_refusal_on_the_command_line_is_one_sentence_without_a_traceback(tmp_path):
    refused = subprocess.run([sys.executable, ROOT / "prepare.py", "coco", tmp_path,
                              "--out", tmp_path], capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("prepare.py: ")
    assert refused.stderr.count("\n") == 1
