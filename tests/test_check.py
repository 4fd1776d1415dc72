"""prepare.py check: what it says about good files, and every kind of wrong one."""

import pyarrow as pa
import pytest
from conftest import arrow, checked, jsonl, noise_picture, prepare_main, put

pytestmark = pytest.mark.slow       # nothing else imports it, so `make quick` leaves it out


@pytest.fixture
def finished(tmp_path):
    """A caption file of five rows."""
    put(tmp_path / "1.jpg", noise_picture(size=(70, 30)))
    jsonl(tmp_path / "five.jsonl", *({"image": "1.jpg", "caption": "a dog", "image_id": i}
                                     for i in range(5)))
    prepare_main("jsonl", tmp_path / "five.jsonl", "--out", tmp_path)
    return tmp_path / "five_caption_train.arrow"


def check_finds(capsys, path, *parts):
    """The file is wrong, and what is printed has all these parts."""
    status, printed = checked(capsys, path)
    assert status == 1
    for part in parts:
        assert part in printed, part


def test_check_describes_a_good_file(finished, capsys):
    capsys.readouterr()
    status, printed = checked(capsys, finished)
    assert status == 0 and "good" in printed
    for part in ("5 images, 5 captions", "train 5", "2 to 2, median 2", "30 to 30, median 30"):
        assert part in printed


def test_check_accepts_files_that_vilt_wrote_itself(tmp_path, capsys):
    arrow(tmp_path / "vg.arrow", {"image": [noise_picture()], "caption": [["a b c d e"]],
                                  "width": [[5]], "image_id": ["1"]})
    status, printed = checked(capsys, tmp_path / "vg.arrow")
    assert status == 0 and "columns: image, caption, width" in printed
    # The test files of ViLT have an empty list in each row.
    arrow(tmp_path / "test.arrow", {
        "image": [noise_picture()], "questions": [["a", "b"]], "question_id": [[1, 2]],
        "answers": [[]], "answer_labels": [[]], "answer_scores": [[]], "image_id": [1]})
    assert checked(capsys, tmp_path / "test.arrow")[0] == 0


def test_check_accepts_the_toy_worlds_files(tmp_path, capsys):
    from tools import toy
    toy.make(tmp_path, images=4, eval_images=2, workers=1)
    capsys.readouterr()
    status, printed = checked(capsys, *tmp_path.glob("toy_*.arrow"))
    assert status == 0 and "statements" in printed and "questions" in printed


def test_check_names_files_that_are_cut_foreign_or_missing(tmp_path, finished, capsys):
    put(tmp_path / "cut.arrow", finished.read_bytes()[:-40])
    put(tmp_path / "text.arrow", "hello")
    put(tmp_path / "empty.arrow", "")
    arrow(tmp_path / "vqa.arrow", {"image": [b""], "questions": [["why"]]})
    arrow(tmp_path / "flat.arrow", {"image": [b""], "caption": ["one text"]})
    arrow(tmp_path / "ids.arrow", {"image": [b""], "questions": [["why"]], "question_id": [1],
                                   "answer_labels": [[0]], "answer_scores": [[1.0]]})
    arrow(tmp_path / "none.arrow", {"image": pa.array([], pa.binary()),
                                    "caption": pa.array([], pa.list_(pa.string()))})
    for name, part in (("cut", "complete"), ("text", "complete"), ("empty", "complete"),
                       ("gone", "no such file"), ("vqa", "no column"), ("flat", "list<string>"),
                       ("none", "no captions"), ("ids", "cannot be read")):
        capsys.readouterr()
        status, printed = checked(capsys, tmp_path / f"{name}.arrow", finished)
        assert status == 1 and f"{name}.arrow" in printed and part in printed
        assert "good" in printed                            # the other file


def test_check_finds_wrong_captions_and_pictures(tmp_path, capsys):
    good = noise_picture(1, size=(300, 300))
    path = tmp_path / "x.arrow"
    arrow(path, {"image": [good, good[:len(good) // 2], b"", None],
                 "caption": [["ok"], [], ["fine", " "], ["x"]], "split": ["val"] * 4})
    check_finds(capsys, path, "1 rows without a caption", "1 empty captions",
                "3 pictures that cannot be read", "row 1: truncated", "row 2: undecodable",
                "row 3: null")
    assert "2 pictures that cannot be read" in checked(capsys, path, "--fast")[1]


def test_check_finds_wrong_questions(tmp_path, capsys):
    arrow(tmp_path / "x.arrow", {
        "image": [noise_picture()] * 4,
        "questions": [["a", "b"], ["c"], ["d"], [" "]],
        "question_id": [[1, 2], [2], [3, 4], [5]],
        "answers": [[["x"], []], [["x"]], [[]], [[]]],
        "answer_labels": [[[0], []], [[0, 1]], [[]], [[]]],
        "answer_scores": [[[1.5], []], [[0.3]], [[]], [[]]]})
    check_finds(capsys, tmp_path / "x.arrow", "1 empty questions",
                "1 rows with another number of question ids", "1 question ids that an earlier",
                "1 rows whose answers, labels and scores", "1 scores outside")


def test_check_finds_wrong_statements(tmp_path, capsys):
    good = noise_picture()
    arrow(tmp_path / "x.arrow", {
        "image_0": [good, good, good],
        "image_1": [good, b"broken", good],
        "questions": [["a"], ["b"], ["c"]],
        "answers": [["True"], ["true"], []],
        "identifier": ["dev-1-0-0", "dev-1-0-0", "dev-1-0-1"]})
    check_finds(capsys, tmp_path / "x.arrow", "row 1: undecodable",
                "1 pictures that cannot be read", "2 rows without one answer",
                "1 identifiers that an earlier")
