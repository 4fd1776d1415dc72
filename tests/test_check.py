"""prepare.py check: what it says about good files, and every kind of wrong one."""

import json

import pyarrow as pa
import pytest
from conftest import (ANSWERS, arrow, checked, jsonl, noise_picture, prepare_main, put, sentence,
                      write_questions)

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
                       ("none", "no captions"),
                       ("ids", "answer_labels is list<int64>, list<list<int64>> expected")):
        capsys.readouterr()
        status, printed = checked(capsys, tmp_path / f"{name}.arrow", finished)
        assert status == 1 and f"{name}.arrow" in printed and part in printed
        assert "good" in printed                            # the other file


def test_check_finds_wrong_captions_and_pictures(tmp_path, capsys):
    good = noise_picture(1, size=(300, 300))
    path = tmp_path / "x.arrow"
    arrow(path, {"image": [good, good[:len(good) // 2], b"", None, b"text"],
                 "caption": [["ok"], [], ["fine", " "], ["x"], ["y"]], "split": ["val"] * 5})
    check_finds(capsys, path, "1 rows without a caption", "1 empty captions",
                "2 pictures that cannot be read", "row 1: undecodable: image file is truncated",
                "row 4: undecodable: in none of the formats",
                "2 pictures that are missing", "row 2: missing", "row 3: missing")
    assert "1 pictures that cannot be read" in checked(capsys, path, "--fast")[1]


QUESTIONS = {"image": [noise_picture()] * 2, "questions": [["a", "b"], ["c"]],
             "question_id": [[1, 2], [3]], "answer_labels": [[[0], []], [[0]]],
             "answer_scores": [[[0.3], []], [[1.0]]]}


def test_check_finds_wrong_questions(tmp_path, capsys):
    path = tmp_path / "x.arrow"
    arrow(path, QUESTIONS | {"questions": [["a", "b"], [" "]], "question_id": [[1, 2], [2]]})
    check_finds(capsys, path, "1 empty questions", "1 question ids that an earlier")
    for wrong, part in (({"question_id": [[1, 2], []]}, "row 1: not one question_id"),
                        ({"answer_labels": [[[-1], []], [[0]]]}, "row 0: a label below 0"),
                        ({"answer_scores": [[[1.5], []], [[1.0]]]}, "row 0: a score that")):
        arrow(path, QUESTIONS | wrong)
        check_finds(capsys, path, f"cannot be read: {path} {part}")


def test_check_finds_wrong_statements(tmp_path, capsys):
    good, path = noise_picture(), tmp_path / "x.arrow"
    columns = {"image_0": [good] * 3, "image_1": [good, b"broken", good],
               "questions": [["a"], ["b"], ["c"]], "answers": [["True"], ["False"], ["True"]],
               "identifier": ["dev-1-0-0", "dev-1-0-0", "dev-1-0-1"]}
    arrow(path, columns)
    check_finds(capsys, path, "row 1: undecodable", "1 pictures that cannot be read",
                "1 identifiers that an earlier")
    arrow(path, columns | {"answers": [["True"], ["true"], ["True"]]})
    check_finds(capsys, path, "row 1: an answer that is neither")


def test_pictures_that_are_missing_are_wrong_in_training_and_counted_in_evaluation(
        tmp_path, capsys):
    path = tmp_path / "x.arrow"
    for split, status in (("val", 0), ("trainable_val", 1)):
        arrow(path, QUESTIONS | {"image": [b"", noise_picture()], "split": [split] * 2})
        assert checked(capsys, path)[0] == status
    for name, status in (("dev", 0), ("train", 1)):
        arrow(path, {"image_0": [b""], "image_1": [noise_picture()], "questions": [["a"]],
                     "answers": [["True"]], "identifier": [f"{name}-1-0-0"]})
        status_found, printed = checked(capsys, path)
        assert status_found == status
        assert ("1 missing pictures; their statements were kept" in printed) == (status == 0)


def test_check_takes_folders(tmp_path, finished, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.arrow").write_text("hello")
    status, printed = checked(capsys, tmp_path)
    assert status == 1 and "five_caption_train.arrow" in printed and "bad.arrow" in printed
    said = sentence(capsys, "check", tmp_path / "empty")
    assert "no .arrow or .tar files are in this folder" in said


def test_check_finds_labels_that_the_answer_list_beside_them_does_not_have(tmp_path, capsys):
    """As training would; without a list beside them, no label is too large."""
    write_questions(tmp_path / "mine_vqa_train.arrow", 6, 0)
    assert checked(capsys, tmp_path / "mine_vqa_train.arrow")[0] == 0
    (tmp_path / "mine_vqa_answers.json").write_text(json.dumps(ANSWERS[:2]))
    status, printed = checked(capsys, tmp_path / "mine_vqa_train.arrow")
    assert status == 1 and "is past the end of the answer list, which has 2 answers" in printed
