"""Questions and statements: VQAv2, NLVR2 and your own; answer list, what is left out, resuming.

Layouts are made here; the last tests read the real questions of the shared material.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (checked, jsonl, names_in, noise_picture, prepare_main, put, rows, sentence,
                      skipped)

from metrics import normalize_answer, vqa_accuracy
from sources import questions as source
from sources.questions import answer_list, soft_labels, ten
from storage.files import NLVR2, VQA

pytestmark = pytest.mark.slow       # nothing else imports it, so `make quick` leaves it out
ROOT = Path(__file__).resolve().parents[1]


def vqa_rows(path):
    return {row["image_id"]: row for row in rows(path, VQA)}


def read(path):
    return json.loads(path.read_text())


def annotation(question_id, image_id, answers, majority=None):
    """An official annotation; `answers`: ten of them, as {answer: how many}."""
    typed = [answer for answer, count in answers.items() for _ in range(count)]
    return {"question_id": question_id, "image_id": image_id, "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": majority if majority is not None else typed[0],
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                        for i, answer in enumerate(typed)]}


def question(question_id, image_id, text="what is it?"):
    return {"question_id": question_id, "image_id": image_id, "question": text}


def put_vqa(root, year, questions, annotations=None):
    put(root / f"v2_OpenEnded_mscoco_{year}_questions.json", {"questions": questions})
    if annotations is not None:
        put(root / f"v2_mscoco_{year}_annotations.json", {"annotations": annotations})


def coco_picture(root, folder, image_id):
    return root / folder / f"COCO_{folder}_{image_id:012}.jpg"


@pytest.fixture
def official(tmp_path):
    return official_vqa(tmp_path / "vqa")


def official_vqa(root, val_images=4):
    """Three images in train, some in val, two in test -> root.

    "cat" is the majority 9 times, "dog" 6 times.
    """
    val_ids = range(100, 100 + val_images)
    train = [question(10 * i + k, i) for i in (1, 2) for k in range(6)]
    train += [question(30, 3), question(16, 1)]
    val = [question(10 * i, i) for i in val_ids]
    cats = {"A cat.": 7, "dog": 3}
    dogs = {"dog": 6, "cat": 2, "cow": 2}
    answered = [annotation(q["question_id"], q["image_id"], cats, "a cat") for q in train[:6]]
    answered += [annotation(q["question_id"], q["image_id"], dogs) for q in train[6:12]]
    answered += [annotation(30, 3, {"bee": 10}), annotation(16, 1, {"ant": 10})]
    asked = [annotation(q["question_id"], q["image_id"], {"cat": 10}) for q in val[:3]]
    asked += [annotation(q["question_id"], q["image_id"], {"dog": 1, "bee": 9}, "bee")
              for q in val[3:]]
    put_vqa(root, "train2014", train, answered)
    put_vqa(root, "val2014", val[::-1], asked)      # the rows are in the order of the image ids
    put_vqa(root, "test2015", [question(500, 50), question(510, 51)])
    put_vqa(root, "test-dev2015", [question(510, 51)])
    for folder, ids in (("train2014", (1, 2, 3)), ("val2014", val_ids), ("test2015", (50, 51))):
        for image_id in ids:
            put(coco_picture(root, folder, image_id), noise_picture(image_id))
    return root


# --------------------------------------------------------------------------------------------------
# VQAv2

def test_vqav2_writes_vilts_files_and_labels(tmp_path, official):
    out = tmp_path / "out"
    prepare_main("vqav2", official, "--out", out)
    splits = ("train", "val", "trainable_val", "rest_val", "test", "test-dev")
    assert {path.name for path in out.glob("*.arrow")} == {f"vqav2_{one}.arrow" for one in splits}
    assert read(out / "vqav2_answers.json") == ["cat"]

    train = vqa_rows(out / "vqav2_train.arrow")
    assert list(train) == [1, 2]        # the only question of image 3 has no answer of the list
    assert train[2] == {
        "image": noise_picture(2), "questions": ["what is it?"] * 6, "answers": [["cat"]] * 6,
        "answer_labels": [[0]] * 6, "answer_scores": [[0.6]] * 6, "image_id": 2,
        "question_id": [20, 21, 22, 23, 24, 25], "split": "train"}
    assert train[1]["question_id"] == [10, 11, 12, 13, 14, 15]
    assert train[1]["answer_scores"] == [[1.0]] * 6
    reason = "question without an answer of the list: question"
    assert skipped(out / "vqav2_train.skipped.jsonl") == {
        "train2014/COCO_train2014_000000000001.jpg": f"{reason} 16",
        "train2014/COCO_train2014_000000000003.jpg": f"{reason} 30"}
    annotations = read(out / "vqav2_annotations_train.json")["annotations"]
    assert [entry["question_id"] for entry in annotations] == [*range(10, 16), *range(20, 26)]
    assert vqa_rows(out / "vqav2_test.arrow").keys() == {50, 51}
    dev = vqa_rows(out / "vqav2_test-dev.arrow")
    assert dev[51]["question_id"] == [510] and dev[51]["split"] == "test-dev"
    assert dev[51]["answer_labels"] == dev[51]["answers"] == [[]]


def test_evaluation_files_keep_the_questions_that_the_list_cannot_answer(tmp_path, official):
    """The official accuracy counts them: leaving them out would raise the score."""
    out = tmp_path / "out"
    prepare_main("vqav2", official, "--out", out)
    val = vqa_rows(out / "vqav2_val.arrow")
    assert list(val) == [100, 101, 102, 103]
    assert val[103]["answer_labels"] == [[]] == val[103]["answer_scores"]
    assert list(vqa_rows(out / "vqav2_rest_val.arrow")) == [102, 103]
    assert list(vqa_rows(out / "vqav2_trainable_val.arrow")) == [100, 101]


def test_rest_val_is_the_last_images_of_val_and_trainable_val_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "REST", 3)
    root, out = official_vqa(tmp_path / "vqa", val_images=10), tmp_path / "out"
    for image_id in (50, 51):           # and without the pictures of test no file of test
        coco_picture(root, "test2015", image_id).unlink()
    (root / "test2015").rmdir()
    prepare_main("vqav2", root, "--out", out)
    assert list(vqa_rows(out / "vqav2_rest_val.arrow")) == [107, 108, 109]
    # The answers of 103 and later are not in the list.
    assert list(vqa_rows(out / "vqav2_trainable_val.arrow")) == [100, 101, 102]
    assert len(skipped(out / "vqav2_trainable_val.skipped.jsonl")) == 4
    assert "vqav2_test.arrow" not in names_in(out)


def test_annotations_beside_a_file_are_official_and_of_its_questions_only(tmp_path, official):
    for image_id in (101, 102):         # one of trainable_val, one of rest_val
        put(coco_picture(official, "val2014", image_id), b"broken")
    out = tmp_path / "out"
    prepare_main("vqav2", official, "--out", out)
    originals = {entry["question_id"]: entry for entry in
                 read(official / "v2_mscoco_val2014_annotations.json")["annotations"]}
    for split, ids in (("val", [1000, 1010, 1020, 1030]), ("rest_val", [1020, 1030]),
                       ("trainable_val", [1000])):
        written = read(out / f"vqav2_annotations_{split}.json")["annotations"]
        assert [entry["question_id"] for entry in written] == ids
        for entry in written:
            original = originals[entry["question_id"]]
            typed = [answer["answer"] for answer in original["answers"]]
            assert [answer["answer"] for answer in entry["answers"]] == typed
            assert {**original, "answers": None} == {**entry, "answers": None}
    assert not (out / "vqav2_annotations_test.json").exists()


def test_vqa_leaves_out_and_names_what_cannot_be_used(tmp_path, official, capsys):
    put_vqa(official, "val2014",
            [question(1000, 100), question(1001, 100, " "), question(1000, 100, "again?"),
             question(1002, 100), question(1003, 100, "half \ud800"), question(1004, 100, " why? "),
             question(1010, 101), question(1020, 102), question(1030, 103)],
            [*(annotation(q, q // 10, {"cat": 10}) for q in (1000, 1001, 1003, 1004, 1010, 1020)),
             annotation(1030, 103, {" ": 10}), annotation(9999, 999, {"cat": 10}),
             annotation(1000, 100, {"dog": 10})])
    cut = noise_picture(3)[:200]
    coco_picture(official, "val2014", 101).unlink()
    put(coco_picture(official, "val2014", 102), cut)
    prepare_main("vqav2", official, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    for part in ("1 missing file", "1 truncated", "1 duplicate question id",
                 "1 question without an annotation"):
        assert part in printed, part
    val = vqa_rows(tmp_path / "out/vqav2_val.arrow")
    assert {image_id: row["question_id"] for image_id, row in val.items()} == {
        100: [1000, 1004], 101: [1010], 102: [1020]}
    assert val[100]["questions"] == ["what is it?", "why?"]
    assert val[100]["answers"] == [["cat"], ["cat"]]
    # Without their pictures, questions are answered all the same; but nothing is learned from them.
    assert val[101]["image"] == val[102]["image"] == b""
    assert list(vqa_rows(tmp_path / "out/vqav2_trainable_val.arrow")) == [100]
    log = (tmp_path / "out/vqav2_val.skipped.jsonl").read_text().splitlines()
    found = [(entry["key"], entry["reason"]) for entry in map(json.loads, log)]
    assert sorted(found) == sorted([
        ("val2014/COCO_val2014_000000000100.jpg", "empty question: question 1001"),
        ("val2014/COCO_val2014_000000000100.jpg", "duplicate question id: question 1000"),
        ("val2014/COCO_val2014_000000000100.jpg", "question without an annotation: question 1002"),
        ("val2014/COCO_val2014_000000000100.jpg", "question is not Unicode: question 1003"),
        ("val2014/000000000101.jpg", "missing file (questions kept)"),
        ("val2014/COCO_val2014_000000000102.jpg", "truncated (questions kept)"),
        ("val2014/COCO_val2014_000000000103.jpg", "question with empty answers: question 1030")])


def test_answers_are_listed_from_nine_times_on_in_order_of_appearance():
    answers = ["two"] * 4 + ["rare"] * 8 + ["The"] * 9 + ["Yes."] * 9 + ["2"] * 5
    found = [source.Annotation(answer, (answer,), "other", "") for answer in answers]
    assert answer_list(found, 9) == ["2", "", "yes"]


@pytest.mark.parametrize("answers, scores", [
    (["red"] * 2 + ["x"] * 8, [0.6, 1.0]), (["Red!"] * 3 + ["x"] * 7, [0.9, 1.0]),
    (["red"], [1.0]), (["red", "blue"], [1.0, 1.0]), (["red", "red", "blue"], [1.0, 0.9]),
    ([*"vwxyz"], [0.6] * 5)])
def test_soft_scores_are_those_of_ten_annotators_and_fewer_are_repeated(answers, scores):
    assert len(ten(answers)) == 10
    label_of = {normalize_answer(answer): i for i, answer in enumerate(dict.fromkeys(answers))}
    assert soft_labels(answers, label_of)[1] == scores


@pytest.mark.parametrize("answers, normalized, raw", [
    (["one way"] * 10, {}, {}), (["1 way"] * 10, {"1 way": 1.0}, {"1 way": 1.0}),
    (["one way"] * 9 + ["1 way"], {"1 way": 1.0}, {"1 way": 0.3}),
    (["yes"] * 2 + ["Yes"] * 8, {"yes": 1.0}, {"yes": 0.6}), (["yes\n"] * 10, {"yes": 1.0}, {}),
    (["no"] * 9 + ["The"], {"no": 1.0, "": 0.3}, {"no": 1.0})])
def test_answers_are_counted_as_the_official_accuracy_compares_them_or_as_typed(
        answers, normalized, raw):
    listed = ["yes", "no", "1 way", ""]
    label_of = {answer: label for label, answer in enumerate(listed)}
    for expected, as_typed in ((normalized, False), (raw, True)):
        labels, scores = soft_labels(answers, label_of, as_typed)
        assert dict(zip([listed[label] for label in labels], scores, strict=True)) == expected
        for answer in listed:
            official = vqa_accuracy([{"question_id": 1, "answer": answer}], {"annotations": [{
                "question_id": 1, "answer_type": "other",
                "answers": [{"answer": one} for one in answers]}]})["overall"]
            assert as_typed or official == 100 * expected.get(answer, 0)


def test_labels_raw_counts_answers_as_typed(tmp_path, official):
    for how in ("normalized", "raw"):
        prepare_main("vqav2", official, "--out", tmp_path / how, "--labels", how)
        train = vqa_rows(tmp_path / how / "vqav2_train.arrow")
        # Of image 2: six dogs, two cats, two cows. Of image 1, "A cat." seven times: raw has none.
        assert train[2]["answer_scores"] == [[0.6]] * 6 and (1 in train) == (how == "normalized")
        assert vqa_rows(tmp_path / how / "vqav2_val.arrow")[100]["answer_scores"] == [[1.0]]


def test_what_everybody_says_of_ones_own_picture_is_right_in_the_official_score(tmp_path):
    """The official accuracy takes a unanimous answer to the letter, and one person is unanimous."""
    put(tmp_path / "1.jpg", noise_picture())
    for i, answers in enumerate((["Two Dogs."], ["Red", "Red "], ["red", "Red!", "blue"])):
        jsonl(tmp_path / "x.jsonl", {"image": "1.jpg", "question": "?", "answers": answers})
        out = tmp_path / str(i)
        prepare_main("vqa-jsonl", tmp_path / "x.jsonl", "--out", out)
        row = vqa_rows(out / "x_vqa_train.arrow")[0]
        for answer, score in zip(row["answers"][0], row["answer_scores"][0], strict=True):
            official = vqa_accuracy([{"question_id": 1, "answer": answer}],
                                    read(out / "x_vqa_annotations_train.json"))
            assert official["overall"] == pytest.approx(100 * score) and score > 0.8


def test_an_answer_list_can_be_given_and_its_labels_are_used(tmp_path, official, capsys):
    given = tmp_path / "list.json"
    put(given, ["bee", "dog", "cat"])
    prepare_main("vqav2", official, "--out", tmp_path / "out", "--answers", given)
    assert read(tmp_path / "out/vqav2_answers.json") == ["bee", "dog", "cat"]
    train = vqa_rows(tmp_path / "out/vqav2_train.arrow")
    assert train[1]["answer_labels"][0] == [2, 1] and train[3]["answer_labels"] == [[0]]
    for wrong in ("[]", '["a", "a"]', '{"a": 0}', "[1]"):
        put(given, wrong)
        assert "list.json" in sentence(capsys, "vqav2", official, "--out", tmp_path / "o",
                                       "--answers", given)


def test_finished_files_and_another_answer_list_are_not_mixed(tmp_path, official, capsys):
    out = tmp_path / "out"
    command = ("vqav2", official, "--out", out)
    prepare_main(*command)
    (out / "vqav2_val.arrow").unlink()
    assert "not the answer list" in sentence(capsys, *command, "--at-least", 1)
    before = (out / "vqav2_train.arrow").stat().st_mtime_ns
    prepare_main(*command)              # the same list: what is missing is written, the rest stays
    assert (out / "vqav2_val.arrow").exists()
    assert (out / "vqav2_train.arrow").stat().st_mtime_ns == before
    prepare_main(*command, "--at-least", 1, "--force")
    assert read(out / "vqav2_answers.json") == ["cat", "dog", "bee", "ant"]
    assert vqa_rows(out / "vqav2_train.arrow")[2]["answers"][0] == ["dog", "cat"]


def test_a_running_run_keeps_its_answer_list(tmp_path, official, capsys):
    """Another list, written meanwhile, would give other meanings to the labels of its files."""
    out = tmp_path / "out"
    code = """if True:
        import sys, pathlib; from storage import disk
        with disk.one_writer(pathlib.Path(sys.argv[1]), ""):
            print(flush=True)
            sys.stdin.read()"""
    other = subprocess.Popen([sys.executable, "-c", code, out / ".vqav2_answers.json.lock"],
                             cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    message = sentence(capsys, "vqav2", official, "--out", out)
    assert f"vqav2_answers.json: process {other.pid} on " in message
    other.communicate()
    put(out / "vqav2_answers.json.0123abcd.partial", "left over")
    prepare_main("vqav2", official, "--out", out)
    assert not [name for name in names_in(out) if "partial" in name or "lock" in name]


def test_vqav2_without_train_makes_no_other_answer_list_silently(tmp_path, official, capsys):
    (official / "v2_OpenEnded_mscoco_train2014_questions.json").unlink()
    command = ("vqav2", official, "--out", tmp_path / "out")
    assert "the answer list is made of train and val" in sentence(capsys, *command)
    put(tmp_path / "list.json", ["cat"])
    prepare_main(*command, "--answers", tmp_path / "list.json")
    written = names_in(tmp_path / "out")
    assert "vqav2_train.arrow" not in written and "vqav2_val.arrow" in written


@pytest.mark.parametrize("questions, annotations, part", [
    ([{"question_id": 1, "image_id": "x", "question": "?"}], [],
     "questions_train.json: questions[0]"),
    ([question(1, 1), {"image_id": 1}], [], "questions[1]"),
    ([question(1, 2 ** 63)], [], "questions[0]"),
    ([question(1, 1)], [{"question_id": 1}], "annotations_train.json: annotations[0]"),
    ([question(1, 1)], [annotation(1, 1, {}, "x")], "annotations[0]"),
    ([question(1, 1)], [annotation(1, 1, {"x": 10}) | {"answer_type": {}}], "annotations[0]"),
    ([question(1, float("inf"))], [], "questions[0]"),
    ({}, [], "official layout"),
    ([question(1, 1)], [annotation(1, 1, {"x": 10})], "--at-least")])
def test_wrong_questions_and_annotations_are_named(tmp_path, capsys, questions, annotations, part):
    put(tmp_path / "questions_train.json", {"questions": questions})
    put(tmp_path / "annotations_train.json", {"annotations": annotations})
    put(tmp_path / "images/1.jpg", noise_picture())
    assert part in sentence(capsys, "vqav2", tmp_path, "--out", tmp_path / "out")


def test_two_pictures_of_one_number_are_refused(tmp_path, capsys):
    put(tmp_path / "questions_test.json", {"questions": [question(1, 1)]})
    put(tmp_path / "images/a_1.jpg", noise_picture())
    put(tmp_path / "images/b/01.png", noise_picture())
    assert "a_1.jpg" in sentence(capsys, "vqav2", tmp_path, "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# Your own questions

def test_own_questions_are_gathered_by_image(tmp_path):
    for name in ("a/1.jpg", "2.png", "3.jpg"):
        put(tmp_path / name, noise_picture(len(name)))
    jsonl(tmp_path / "mine.jsonl",
          {"image": "a/1.jpg", "question": "what colour?", "answers": ["Red", "red.", "", "pink"]},
          {"image": "2.png", "question": "how many?", "answers": "two"},
          {"image": "a/1.jpg", "question": "is it old?", "answers": ["no"]},
          {"image": "3.jpg", "question": "what colour?", "answers": "green", "split": "val"},
          {"image": "3.jpg", "question": "and this?", "split": "val"},
          {"image": "2.png", "question": "nobody knows", "split": "test"})
    out = tmp_path / "out"
    prepare_main("vqa-jsonl", tmp_path / "mine.jsonl", "--out", out, "--name", "own")
    assert read(out / "own_vqa_answers.json") == ["red", "2", "no", "green"]
    train = vqa_rows(out / "own_vqa_train.arrow")
    assert train[0] == {
        "image": noise_picture(7), "questions": ["what colour?", "is it old?"],
        "answers": [["red"], ["no"]], "answer_labels": [[0], [2]], "answer_scores": [[1.0], [1.0]],
        "image_id": 0, "question_id": [1, 3], "split": "train"}
    assert train[1]["answers"] == [["2"]]
    assert skipped(out / "own_vqa_train.skipped.jsonl") == {
        "a/1.jpg": "empty answer (question kept): question 1"}
    assert vqa_rows(out / "own_vqa_val.arrow")[2]["questions"] == ["what colour?"]
    assert skipped(out / "own_vqa_val.skipped.jsonl") == {
        "3.jpg": "question without an annotation: question 5"}
    # Nobody answered the questions of test, so nothing is missing there.
    assert vqa_rows(out / "own_vqa_test.arrow")[1]["answer_labels"] == [[]]
    assert not (out / "own_vqa_annotations_test.json").exists()
    asked = read(out / "own_vqa_annotations_train.json")["annotations"]
    assert [(a["question_id"], a["answer_type"], len(a["answers"])) for a in asked] == [
        (1, "other", 10), (3, "yes/no", 10), (2, "number", 10)]


def test_the_ids_of_own_questions_are_kept(tmp_path, capsys):
    put(tmp_path / "1.jpg", noise_picture())
    path = tmp_path / "x.jsonl"
    line = {"image": "1.jpg", "question": "why?", "answers": "so", "image_id": 77,
            "question_id": "770"}
    jsonl(path, line, {**line, "question": "why not?"})
    prepare_main("vqa-jsonl", path, "--out", tmp_path / "out")
    assert vqa_rows(tmp_path / "out/x_vqa_train.arrow")[77]["question_id"] == [770]
    assert skipped(tmp_path / "out/x_vqa_train.skipped.jsonl") == {
        "1.jpg": "duplicate question id: question 770"}
    for wrong in ({**line, "image_id": 7.5}, {**line, "image": "2.jpg"}, {**line, "answers": [3]},
                  {**line, "question": None}, [], {**line, "image": "../1.jpg"}):
        jsonl(path, line, wrong)
        assert "x.jsonl, line 2" in sentence(capsys, "vqa-jsonl", path, "--out", tmp_path / "o")


def test_answers_of_a_test_split_stay_out_of_the_list(tmp_path):
    put(tmp_path / "1.jpg", noise_picture())
    jsonl(tmp_path / "x.jsonl", *({"image": "1.jpg", "question": "?", "answers": split,
                                   "split": split} for split in ("train", "val", "test")))
    prepare_main("vqa-jsonl", tmp_path / "x.jsonl", "--out", tmp_path / "out")
    assert read(tmp_path / "out/x_vqa_answers.json") == ["train", "val"]
    assert vqa_rows(tmp_path / "out/x_vqa_test.arrow")[0]["answers"] == [[]]
    assert (tmp_path / "out/x_vqa_annotations_test.json").exists()


# --------------------------------------------------------------------------------------------------
# NLVR2

def official_nlvr2(root, train="images/train", data="nlvr2/data"):
    """Two statements in train; three in dev and in test1, about two pairs of pictures."""
    def line(identifier, label, **more):
        sentence = f" says {identifier} "
        return {"identifier": identifier, "sentence": sentence, "label": label, **more}
    jsonl(root / data / "train.json", line("train-10-0-1", "True", directory="36"),
          line("train-10-1-0", "False", directory=36))
    for split in ("dev", "test1"):
        jsonl(root / data / f"{split}.json", line(f"{split}-7-0-0", "True"),
              line(f"{split}-7-0-1", "False"), line(f"{split}-8-2-0", "False"))
        jsonl(root / data / f"balanced/balanced_{split}.json", line(f"{split}-7-0-1", "False"))
        jsonl(root / data / f"unbalanced/unbalanced_{split}.json", line(f"{split}-8-2-0", "False"))
    for i in (0, 1):
        for name in ("dev/dev-7-0", "dev/dev-8-2", "test1/test1-7-0", "test1/test1-8-2",
                     f"{train}/36/train-10-0", f"{train}/36/train-10-1"):
            put(root / f"{name}-img{i}.png", noise_picture(i, format="PNG"))


@pytest.mark.parametrize("train, data", [("images/train", "nlvr2/data"),
                                         ("images_train", "nlvr/nlvr2/data")])
def test_nlvr2_has_a_row_for_each_pair_with_the_identifier_of_each_statement(tmp_path, train, data):
    official_nlvr2(tmp_path, train, data)
    out = tmp_path / "out"
    prepare_main("nlvr2", tmp_path, "--out", out)
    assert names_in(out) == [
        "nlvr2_balanced_dev.json", "nlvr2_balanced_test1.json", "nlvr2_dev.arrow",
        "nlvr2_test1.arrow", "nlvr2_train.arrow", "nlvr2_unbalanced_dev.json",
        "nlvr2_unbalanced_test1.json"]
    assert rows(out / "nlvr2_train.arrow", NLVR2) == [
        {"image_0": noise_picture(0, format="PNG"), "image_1": noise_picture(1, format="PNG"),
         "answers": [answer], "questions": [f"says {identifier}"],
         "identifier": identifier[:-2], "identifiers": [identifier]}
        for identifier, answer in (("train-10-0-1", "True"), ("train-10-1-0", "False"))]
    found = rows(out / "nlvr2_dev.arrow", NLVR2)
    assert [row["identifier"] for row in found] == ["dev-7-0", "dev-8-2"]
    assert [row["identifiers"] for row in found] == [["dev-7-0-0", "dev-7-0-1"], ["dev-8-2-0"]]
    assert found[0]["questions"] == ["says dev-7-0-0", "says dev-7-0-1"]
    assert found[0]["answers"] == ["True", "False"]
    assert read(out / "nlvr2_balanced_dev.json") == ["dev-7-0-1"]
    assert read(out / "nlvr2_unbalanced_test1.json") == ["test1-8-2-0"]


def test_nlvr2_leaves_out_and_names_what_cannot_be_used(tmp_path, capsys):
    official_nlvr2(tmp_path)
    (tmp_path / "dev/dev-8-2-img1.png").unlink()
    put(tmp_path / "dev/dev-7-0-img0.png", b"no picture")
    lines = (tmp_path / "nlvr2/data/test1.json").read_text()
    put(tmp_path / "nlvr2/data/test1.json", lines + lines.splitlines()[0])
    (tmp_path / "nlvr2/data/balanced/balanced_test1.json").unlink()
    prepare_main("nlvr2", tmp_path, "--out", tmp_path / "out")
    assert "balanced_test1.json is missing" in capsys.readouterr().out
    undecodable = ("undecodable (statements kept): "
                   "in none of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF: image_0")
    assert set(skipped(tmp_path / "out/nlvr2_dev.skipped.jsonl").values()) == {
        undecodable, "missing file (statements kept): image_1"}
    assert skipped(tmp_path / "out/nlvr2_test1.skipped.jsonl") == {
        "test1-7-0: test1-7-0-img0.png, test1-7-0-img1.png": "duplicate identifier: test1-7-0-0"}
    # Not one pair of dev has both pictures: the folder must be a wrong one.
    assert not list(tmp_path.glob("out/*dev.arrow")) and not list(tmp_path.glob("out/*dev.json"))


def test_statements_to_be_judged_are_kept_without_their_pictures(tmp_path):
    """A prediction file needs them all; only training needs the pictures."""
    official_nlvr2(tmp_path)
    (tmp_path / "dev/dev-8-2-img1.png").unlink()
    put(tmp_path / "images/train/36/train-10-1-img0.png", b"no picture")
    prepare_main("nlvr2", tmp_path, "--out", tmp_path / "out")
    assert read(tmp_path / "out/nlvr2_unbalanced_dev.json") == ["dev-8-2-0"]
    *_, last = rows(tmp_path / "out/nlvr2_dev.arrow", NLVR2)
    assert last["identifiers"] == ["dev-8-2-0"] and last["image_0"] and last["image_1"] == b""
    trained = rows(tmp_path / "out/nlvr2_train.arrow", NLVR2)
    assert [row["identifiers"] for row in trained] == [["train-10-0-1"]]


def test_own_statements(tmp_path, capsys):
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / name, noise_picture(len(name)))
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    line = {"images": ["a.jpg", "b.jpg"], "sentence": "both are noise", "label": True}
    jsonl(path, line, {**line, "label": "false", "split": "test-p"},
          {**line, "split": "dev", "identifier": "dev-1-0-1"}, {**line, "sentence": " "},
          {**line, "sentence": "neither is", "label": False})
    prepare_main("nlvr2-jsonl", path, "--out", out)
    for split, pair, identifiers, answers in (
            ("train", "train-1-0", ["train-1-0-0", "train-5-0-0"], ["True", "False"]),
            ("dev", "dev-1-0", ["dev-1-0-1"], ["True"]),
            ("test-p", "test_p-2-0", ["test_p-2-0-0"], ["False"])):
        row, = rows(out / f"x_nlvr2_{split}.arrow", NLVR2)
        assert row["identifier"] == pair and row["identifiers"] == identifiers
        assert row["answers"] == answers
    assert skipped(out / "x_nlvr2_train.skipped.jsonl") == {
        "train-1-0: a.jpg, b.jpg": "empty statement: train-4-0-0"}
    for wrong in ({**line, "images": ["a.jpg"]}, {**line, "label": None}, {**line, "sentence": 1},
                  [], {**line, "identifier": "one"}, {**line, "images": ["a.jpg", "/b.jpg"]}):
        jsonl(path, line, wrong)
        assert "x.jsonl, line 2" in sentence(capsys, "nlvr2-jsonl", path, "--out", tmp_path / "o")


def test_shorter_applies_to_both_pictures_of_a_statement(tmp_path, capsys):
    official_nlvr2(tmp_path)
    prepare_main("nlvr2", tmp_path, "--out", tmp_path / "out", "--shorter", 12)
    capsys.readouterr()
    status, printed = checked(capsys, tmp_path / "out/nlvr2_dev.arrow")
    assert status == 0 and "12 to 12, median 12" in printed
    assert "2 pairs of images, 3 statements" in printed


# --------------------------------------------------------------------------------------------------
# Real questions

def test_real_questions_and_answers_arrive_complete(tmp_path, shared, capsys):
    root = shared / "data/vqa_small"
    prepare_main("vqav2", root, "--out", tmp_path, "--at-least", 2)
    answers = read(tmp_path / "vqav2_answers.json")
    assert {"yes", "no"} <= set(answers)
    pictures = {int(path.stem[-12:]): path for path in (root / "images").rglob("*.jpg")}
    total = 0
    for split in ("train", "val", "test"):
        found = vqa_rows(tmp_path / f"vqav2_{split}.arrow")
        asked = {(entry["question_id"], entry["image_id"], entry["question"])
                 for entry in read(root / f"questions_{split}.json")["questions"]}
        total += len(asked)
        written = {(question_id, row["image_id"], text) for row in found.values()
                   for question_id, text in zip(row["question_id"], row["questions"], strict=True)}
        left = set()
        if split == "train":            # questions that teach nothing are left out, and named
            log = (tmp_path / "vqav2_train.skipped.jsonl").read_text().splitlines()
            left = {int(json.loads(line)["reason"].split("question ")[-1]) for line in log}
        assert written <= asked and {item[0] for item in asked - written} == left
        people = {entry["question_id"]: [answer["answer"] for answer in entry["answers"]]
                  for entry in read(root / f"annotations_{split}.json")["annotations"]}
        for image_id, row in found.items():
            assert row["image"] == pictures[image_id].read_bytes()
            for question_id, texts, labels, scores in zip(
                    row["question_id"], row["answers"], row["answer_labels"],
                    row["answer_scores"], strict=True):
                assert [answers[label] for label in labels] == texts
                for text, score in zip(texts, scores, strict=True):
                    plain = people[question_id].count(text)     # without any normalisation
                    assert score >= (0, .3, .6, .9, 1)[min(plain, 4)]
    assert total == 112
    assert checked(capsys, *tmp_path.glob("*.arrow"))[0] == 0


def test_the_official_score_of_soft_targets_is_their_score(shared):
    """On 1,200 real questions, the score in training is what the official evaluation gives."""
    content = read(shared / "fixtures/vqa_eval/annotations.json")["annotations"]
    people = {entry["question_id"]: [answer["answer"] for answer in entry["answers"]]
              for entry in content}
    listed = sorted({normalize_answer(answer) for answers in people.values() for answer in answers})
    label_of = {answer: label for label, answer in enumerate(listed)}
    predictions, scores = [], {}
    for question_id, answers in people.items():
        labels, soft = soft_labels(answers, label_of)
        # A unanimous "one way" is not listed, and "1 way", which is, scores nothing.
        answer = listed[labels[-1]] if labels else normalize_answer(answers[0])
        predictions.append({"question_id": question_id, "answer": answer})
        scores[question_id] = 100 * soft[-1] if labels else 0
    assert vqa_accuracy(predictions,
                        {"annotations": content})["per_question"] == pytest.approx(scores)
