"""prepare.py stats: what it counts, and what it finds twice."""

import io
import json

import numpy as np
import pytest
from conftest import (arrow, noise_picture, picture, prepare_main, sentence, write_captions,
                      write_questions, write_statements)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sources import stats
from sources.stats import alike, bits_set, look_at
from sources.stats import shared as shared_keys

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out


def caption_file(path, pictures, captions):
    arrow(path, {"image": pictures, "caption": captions,
                 "image_id": [str(i) for i in range(len(pictures))]})


def encoded(image, format="JPEG", **options):
    image.save(out := io.BytesIO(), format, **options)
    return out.getvalue()


def found(capsys, tmp_path, *arguments):
    """(the numbers, what was printed)"""
    capsys.readouterr()
    prepare_main("stats", *arguments, "--json", tmp_path / "stats.json")
    return json.loads((tmp_path / "stats.json").read_text()), capsys.readouterr().out


@pytest.fixture
def two_files(tmp_path):
    """A training file, and a test file that has one of its pictures, a smaller copy of another, and
    a caption."""
    data = tmp_path / "data"
    data.mkdir()
    pictures = [picture(seed, (160, 120)) for seed in range(6)]
    smaller = encoded(Image.open(io.BytesIO(pictures[3])).resize((80, 60)), quality=60)
    grey = encoded(Image.open(io.BytesIO(picture(9, (50, 90)))).convert("L"), "PNG")
    caption_file(data / "a_caption_train.arrow", [*pictures, pictures[1], b"broken"],
                 [["A red dog.", "a red  DOG"], ["two cats"], ["cats"], ["birds"], ["a bird"],
                  ["the sea"], ["seas"], ["a broken one"]])
    caption_file(data / "a_caption_val.arrow", [pictures[0], smaller, grey],
                 [["a red dog!"], ["a flock"], ["something grey"]])
    return data


def test_what_is_in_two_files_and_what_comes_twice_in_one(two_files, tmp_path, capsys):
    report, printed = found(capsys, tmp_path, two_files)
    twice, pair = report["more than once"], "a_caption_train and a_caption_val"
    assert twice["texts"] == {"within": {"a_caption_train": 1, "a_caption_val": 0},
                              "across": {pair: 1}}
    assert twice["copies of pictures"] == {"within": {"a_caption_train": 1, "a_caption_val": 0},
                                           "across": {pair: 1}}
    assert twice["pictures that look alike"]["across"] == {pair: 2}
    assert report["examples that look alike"] == [
        "a_caption_train row 1, a_caption_train row 6",
                                                  "a_caption_train row 0, a_caption_val row 0"]
    assert f"copies of pictures, in two files: {pair} 1" in printed


def test_numbers_of_texts_words_and_pictures(two_files, tmp_path, capsys):
    report, printed = found(capsys, tmp_path, two_files)
    train, val = (report["files"][f"a_caption_{split}"] for split in ("train", "val"))
    assert (train["rows"], train["texts"], train["words"]) == (8, 9, 18)
    assert train["commonest words"]["red"] == 2 and "a" not in train["commonest words"]
    assert train["words in a text"] == {"least": 1, "5 % at most": 1, "median": 2,
                                        "95 % at most": 3, "most": 3}
    looks = val["pictures"]
    assert (looks["looked at"], looks["unreadable"], looks["grey"]) == (3, 0, 1)
    assert looks["formats"] == {"JPEG": 2, "PNG": 1}
    assert (looks["shorter side"]["least"], looks["longer side"]["most"]) == (50, 160)
    assert train["pictures"]["unreadable"] == 1 and "1 missing or unreadable" in printed


def test_a_contact_sheet_shows_pairs_and_broken_pictures_too(two_files, tmp_path, capsys):
    write_statements(two_files / "a_nlvr2_dev.arrow", 5, 3, broken=(2,))
    prepare_main("stats", two_files, "--out", tmp_path / "sheet.png", "--fast")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1280 and sheet.height > 300
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 100


def test_answers_are_counted_by_their_scores_and_statements_by_their_truth(tmp_path, capsys):
    write_questions(tmp_path / "a_vqa_train.arrow", 9, 1)
    truth = write_statements(tmp_path / "a_nlvr2_dev.arrow", 10, 4)
    report, printed = found(capsys, tmp_path, tmp_path)
    answers = report["files"]["a_vqa_train"]["commonest answers"]
    assert set(answers) == {"yes", "no", "red", "blue", "2", "dog"}
    assert sum(answers.values()) == pytest.approx(1, abs=1e-3)
    share = sum(answer == "True" for answer in truth.values()) / len(truth)
    assert report["files"]["a_nlvr2_dev"]["commonest answers"]["True"] == pytest.approx(share)
    assert f"True {100 * share:.1f} %" in printed
    # ViLT's test files have no answers; its NLVR2 files may have booleans.
    arrow(tmp_path / "test.arrow", {
        "image": [noise_picture()], "questions": [["a", "b"]], "question_id": [[1, 2]],
        "answers": [[]], "answer_labels": [[]], "answer_scores": [[]], "image_id": [1]})
    numbers, _ = found(capsys, tmp_path, tmp_path / "test.arrow")
    assert "commonest answers" not in numbers["files"]["test"]


def test_fast_looks_at_some_pictures_of_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stats, "SAMPLE", 5)
    write_captions(tmp_path / "x_caption_train.arrow", 20)
    whole, _ = found(capsys, tmp_path, tmp_path)
    some, _ = found(capsys, tmp_path, tmp_path, "--fast")
    looks = [report["files"]["x_caption_train"]["pictures"]["looked at"]
             for report in (whole, some)]
    assert looks == [20, 5]


def test_what_cannot_be_opened_is_one_sentence(tmp_path, capsys):
    (tmp_path / "bad.arrow").write_text("hello")
    assert "bad.arrow: not a complete" in sentence(capsys, "stats", tmp_path)


# -- hashes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, at_least", [
    ("size", 0.6), ("quality", 0.8), ("brightness", 0.9), ("format", 1)])
def test_most_changed_copies_look_alike_and_other_pictures_never_do(shared, change, at_least):
    """Of 7,000 photographs of 112 pixels: 79 %, 93 %, 99 %, 100 % of the copies, no other pair."""
    paths = sorted((shared / "data/flickr8k_small/images").rglob("*.jpg"))[:800:20]
    looks = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
        other = {"size": lambda: encoded(image.resize((image.width * 3 // 4,
                                                       image.height * 3 // 4))),
                 "quality": lambda: encoded(image, quality=50),
                 "brightness": lambda: encoded(image.point(lambda value: int(value * 0.9))),
                 "format": lambda: encoded(image, "PNG")}[change]()
        looks += [look_at(path.read_bytes()), look_at(other)]
    groups = alike(np.array([look.picture for look in looks], np.uint64)).reshape(-1, 2)
    assert np.mean(groups[:, 0] == groups[:, 1]) >= at_least
    assert len(np.unique(groups[:, 0])) == len(paths)
    assert all(a.contents != b.contents for a, b in zip(looks[::2], looks[1::2]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 ** 32), st.integers(1, 12), st.integers(0, 5))
def test_groups_are_those_of_comparing_every_pair(seed, originals, flips):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2 ** 64, originals, np.uint64)
    copies = hashes.copy()
    for _ in range(flips):
        copies ^= np.uint64(1) << rng.integers(0, 64, originals, np.uint64)
    hashes = rng.permutation(np.concatenate([hashes, copies, hashes]))
    near = bits_set((hashes[:, None] ^ hashes).reshape(-1)).reshape(len(hashes), -1) <= stats.NEAR
    groups = alike(hashes)
    expected = near.copy()
    for _ in range(len(hashes)):
        expected = expected @ near
    assert np.array_equal(groups[:, None] == groups, expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9)), min_size=1, max_size=5))
def test_shared_counts_the_keys_that_two_files_have(parts):
    counts = shared_keys([np.array(part, np.int64) for part in parts])
    assert counts.tolist() == [[len(set(a) & set(b)) for b in parts] for a in parts]


def test_no_pictures_at_all_are_no_groups():
    assert len(alike(np.empty(0, np.uint64))) == 0
