"""Arrow files that the original ViLT's own converters wrote.

They open, are checked, trained on and evaluated as they are. The files lie in
../shared/fixtures/converters, with the official annotations beside them.
"""

import json
import re

import pyarrow as pa
import pytest
from conftest import (TRAIN_FLM, WORDS, arrow, checked, finetune, prepare_main, put, tiny,
                      train_outcome)
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import metrics
import train
import weights
from data import Captions, Questions, Statements
from sources.questions import soft_labels
from storage.files import CAPTIONS, NLVR2, REGIONS, VQA
from storage.rebuilt import AnswerLabels, official_identifiers, rebuilt_answers
from tasks import VQA as VQATask
from tokenizer import BPE
from training.settings import Settings

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

CAPTION_FILES = ["coco_caption_karpathy_test", "f30k_caption_karpathy_test",
                 "conceptual_caption_train_0", "sbu_0", "vg"]
SCHEMAS = {**dict.fromkeys(CAPTION_FILES, CAPTIONS), "vg": REGIONS, "vqav2_train": VQA,
           "vqav2_rest_val": VQA,
           "nlvr2_dev": NLVR2.remove(NLVR2.get_field_index("identifiers"))}


@pytest.fixture(scope="module")
def originals(shared):
    folder = shared / "fixtures/converters"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: Arrow files that ViLT's converters wrote are needed")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer and a tiny pretrained model."""
    root = tmp_path_factory.mktemp("converters")
    tok = BPE.train([" ".join(WORDS)] * 3, 330)
    tok.save(root / "tok")
    model = tiny(objective="flm", itm=True, vocab_size=len(tok), cls_id=tok.cls_id,
                 pad_id=tok.pad_id, sep_id=tok.sep_id,
                 mask_id=tok.mask_id)
    weights.save(root / "flm.pt", model.state_dict(), model.config, "pretrain",
                 weights.pack_tokenizer(tok))
    return root


def linked(originals, folder, *names):
    """A folder with some of the files, and the model, for conftest.finetune.

    "new=old" gives a file another name.
    """
    folder.mkdir()
    for name in names:
        new, _, old = name.partition("=")
        (folder / f"{new}.arrow").symlink_to(originals / f"{old or new}.arrow")
    return folder


def table_of(path):
    return pa.ipc.open_file(str(path)).read_all()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(*arguments):
    evaluation.main([*map(str, arguments), "--device", "cpu", "--batch-size", "64"])


# -- what is in them -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*SCHEMAS, "vqav2_test"])
def test_check_finds_nothing_wrong(originals, capsys, name):
    status, printed = checked(capsys, originals / f"{name}.arrow")
    assert status == 0 and "    good" in printed, printed


@pytest.mark.parametrize("name", SCHEMAS)
def test_our_columns_are_theirs(originals, name):
    assert table_of(originals / f"{name}.arrow").schema.remove_metadata().equals(SCHEMAS[name])


def test_image_ids_are_file_names_without_a_folder(originals):
    for name in ("conceptual_caption_train_0", "sbu_0"):
        assert all(re.fullmatch(r"\d{7}", i)
                   for i in table_of(originals / f"{name}.arrow")["image_id"].to_pylist())


def test_each_caption_of_vg_has_its_box_in_step(originals):
    table = table_of(originals / "vg.arrow")
    counts = [len(captions) for captions in table["caption"].to_pylist()]
    for name in ("width", "height", "x", "y"):
        assert [len(values) for values in table[name].to_pylist()] == counts


# -- captions --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CAPTION_FILES)
def test_three_steps_of_pretraining_on_their_captions(world, originals, tmp_path, name):
    folder = linked(originals, tmp_path / "data", f"mine_caption_train={name}")
    train.main([*TRAIN_FLM, "--data", str(folder), "--tokenizer", str(world / "tok"), "--out",
                str(tmp_path / "run"),
                *"--steps 3 --global-batch 8 --log-every 1 --eval-every 0 --itm".split()])
    losses = [line["loss"] for line in train_outcome(tmp_path / "run")[0] if "loss" in line]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)


def test_their_files_are_found_by_their_names(world, originals, tmp_path):
    folder = linked(originals, tmp_path / "data", *CAPTION_FILES)
    train.main([*TRAIN_FLM, "--data", str(folder), "--tokenizer", str(world / "tok"), "--out",
                str(tmp_path / "run"),
                *"--steps 1 --global-batch 8 --eval-every 0 --datasets vg sbu gcc".split()])
    assert (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("name, dataset",
                         [("coco_caption_karpathy_test", "coco"),
                          ("f30k_caption_karpathy_test", "f30k")])
def test_captioning_and_retrieval_on_their_test_files(world, originals, tmp_path, capsys, name,
                                                      dataset):
    folder = linked(originals, tmp_path / "data", name, f"{name.removesuffix('test')}train={name}")
    (folder / "flm.pt").symlink_to(world / "flm.pt")
    captioner = finetune(folder, "caption", "flm", tmp_path / "caption", "--steps", 3)
    evaluate("caption", captioner, "--data", folder, "--datasets", dataset, "--max-tokens", 4,
             "--out", tmp_path / "out")
    path, = (tmp_path / "out").glob("captions_*_results.json")
    table = Captions([folder / f"{name}.arrow"])
    assert len(json.loads(path.read_text())) == len(table)
    retriever = finetune(folder, "retrieval", "flm", tmp_path / "retrieval", "--steps", 3,
                         "--false-captions", 2)
    evaluate("retrieval", retriever, "--data", folder, "--datasets", dataset, "--images", 12,
             "--out", tmp_path / "out")
    assert "recall" in capsys.readouterr().out.lower()


# -- VQA -------------------------------------------------------------------------------------------

def test_their_answer_list_is_rebuilt_from_their_labels(originals, tmp_path, capsys):
    """The recording is the list of the whole files.

    Here, 153 of its 411 answers are no question's label.
    """
    folder = linked(originals, tmp_path / "data", "vqav2_train", "vqav2_rest_val", "vqav2_test")
    answers = VQATask.answers(Settings(task="vqa", data=str(folder)))
    recorded = json.loads((originals / "vqav2_answers_rebuilt.json").read_text())
    assert len(answers) == 410 and [a for a in answers if not a.startswith("(label ")] == [
        recorded[label] for label, a in enumerate(answers) if not a.startswith("(label ")]
    assert sum(a == b for a, b in zip(answers, recorded)) == 257 and answers[0] == "(label 0)"
    printed = capsys.readouterr().out
    assert "vqav2_answers.json: there is no such file" in printed
    assert "410 answers, of which 153 never occur" in printed
    assert VQATask.answers(Settings(task="vqa", data=str(folder))) == answers
    assert not capsys.readouterr().out


def test_three_steps_of_vqa_on_their_files_and_the_official_accuracy(
        world, originals, tmp_path, capsys):
    folder = linked(originals, tmp_path / "data", "vqav2_train", "vqav2_rest_val", "vqav2_test")
    (folder / "flm.pt").symlink_to(world / "flm.pt")
    checkpoint = finetune(folder, "vqa", "flm", tmp_path / "run", "--steps", 3)
    assert weights.load(checkpoint).config.answers == 410
    annotations = originals / "vqav2_rest_val_annotations.json"
    evaluate("vqa", checkpoint, "--data", folder, "--annotations", annotations, "--out",
             tmp_path / "out")
    path, = (tmp_path / "out").glob("vqa_*_results.json")
    results = json.loads(path.read_text())
    assert len(results) == 438
    score = metrics.vqa_accuracy(results, json.loads(annotations.read_text()))["overall"]
    assert f"{score:.2f} %" in capsys.readouterr().out
    evaluate("vqa", checkpoint, "--data", folder, "--split", "test", "--out", tmp_path / "test")
    path, = (tmp_path / "test").glob("vqa_*_results.json")
    assert len(json.loads(path.read_text())) == len(Questions([folder / "vqav2_test.arrow"]).row_of)


def test_raw_labels_are_theirs_row_by_row(originals, tmp_path):
    split = "rest_val"
    theirs = {row["image_id"]: row
              for row in table_of(originals / f"vqav2_{split}.arrow").to_pylist()}
    for image_id, row in theirs.items():
        put(tmp_path / f"raw/images/{image_id:012}.jpg", row["image"])
    for what in ("questions", "annotations"):
        put(tmp_path / f"raw/{what}_{split}.json",
            (originals / f"vqav2_{split}_{what}.json").read_bytes())
    answers = ["--answers", originals / "vqav2_answers_rebuilt.json"]
    prepare_main("vqav2", tmp_path / "raw", "--out", tmp_path / "out", "--labels", "raw", *answers)
    ours = {row["image_id"]: row
            for row in table_of(tmp_path / f"out/vqav2_{split}.arrow").to_pylist()}
    assert ours.keys() == theirs.keys()
    for image_id, row in theirs.items():
        assert ours[image_id] == row | {"split": split}
    # Ours by default: the official accuracy of each answer, which theirs are not on some questions.
    prepare_main("vqav2", tmp_path / "raw", "--out", tmp_path / "normalized", *answers)
    normalized = table_of(tmp_path / f"normalized/vqav2_{split}.arrow").to_pylist()
    differ = [row["image_id"] for row in normalized
              if row["answer_scores"] != theirs[row["image_id"]]["answer_scores"]]
    assert 0 < len(differ) < 0.05 * len(normalized)


def test_targets_are_the_official_accuracy_of_each_answer_of_the_list(originals):
    content = json.loads((originals / "vqav2_rest_val_annotations.json").read_text())["annotations"]
    listed = json.loads((originals / "vqav2_answers_rebuilt.json").read_text())
    label_of = {answer: label for label, answer in enumerate(listed)}
    targets = {}
    for entry in content:
        labels, scores = soft_labels([answer["answer"] for answer in entry["answers"]], label_of)
        targets[entry["question_id"]] = {listed[label]: score
                                         for label, score in zip(labels, scores, strict=True)}
    # Every answer that somebody gave, normalised or not, and that the list has: if it has no label,
    # it scores nothing.
    given = {}
    for entry in content:
        forms = {form(answer["answer"])
                 for answer in entry["answers"] for form in (str, metrics.normalize_answer)}
        given[entry["question_id"]] = sorted(forms & label_of.keys())
    for rank in range(max(map(len, given.values()))):
        chosen = {question_id: (answers[rank:] or [""])[0]
                  for question_id, answers in given.items()}
        predictions = [{"question_id": question_id, "answer": answer}
                       for question_id, answer in chosen.items()]
        found = metrics.vqa_accuracy(predictions, {"annotations": content})["per_question"]
        for question_id, answer in chosen.items():
            if answer:
                expected = 100 * targets[question_id].get(answer, 0.0)
                assert found[question_id] == pytest.approx(expected), (question_id, answer)
    assert sum(map(len, given.values())) > 600


# -- NLVR2 -----------------------------------------------------------------------------------------

def test_their_statements_have_no_identifier_but_that_of_the_official_lines(originals):
    table = Statements([originals / "nlvr2_dev.arrow"])
    details = [table.details(i) for i in range(len(table.row_of))]
    assert {d["identifier"] for d in details} == {None} and details[0]["pair"] == "dev-850-0"
    official = {line["identifier"]: line for line in lines(originals / "nlvr2_dev_official.jsonl")}
    names = official_identifiers(originals / "nlvr2_dev_official.jsonl",
                                 zip([d["pair"] for d in details], table.texts(), strict=True))
    assert len(set(names)) == len(names) == 1041 and set(names) == official.keys()
    for name, d, text in zip(names, details, table.texts(), strict=True):
        assert (official[name]["sentence"],
                official[name]["label"]) == (text, str(bool(d["label"])))
        assert name.rpartition("-")[0] == d["pair"]
    place_in_row = [f"{d['pair']}-{i - table.first_of(table.row_of[i])}"
                    for i, d in enumerate(details)]
    assert 100 < sum(name != invented for name, invented in zip(names, place_in_row, strict=True))


def test_three_steps_of_nlvr2_on_their_file_and_a_prediction_file_with_official_names(
        world, originals, tmp_path, capsys):
    folder = linked(originals, tmp_path / "data", "nlvr2_train=nlvr2_dev")
    (folder / "flm.pt").symlink_to(world / "flm.pt")
    some = table_of(originals / "nlvr2_dev.arrow").slice(0, 60)
    with pa.ipc.new_file(str(folder / "nlvr2_dev.arrow"), some.schema) as file:
        file.write_table(some)
    pairs = set(some["identifier"].to_pylist())
    checkpoint = finetune(folder, "nlvr2", "flm", tmp_path / "run", "--steps", 3)
    evaluate("nlvr2", checkpoint, "--data", folder, "--out", tmp_path / "bare")
    assert "accuracy" in capsys.readouterr().out and not list((tmp_path / "bare").glob("*.csv"))
    evaluate("nlvr2", checkpoint, "--data", folder, "--statements",
             originals / "nlvr2_dev_official.jsonl",
             "--out", tmp_path / "out")
    path, = (tmp_path / "out").glob("nlvr2_*_predictions.csv")
    official = [line for line in lines(originals / "nlvr2_dev_official.jsonl")
                if line["identifier"].rpartition("-")[0] in pairs]
    scores = metrics.nlvr2_scores(path.read_text().splitlines(), official)
    printed = capsys.readouterr().out
    assert all(f"{100 * score:.2f} %" in printed for score in scores.values()) and len(scores) == 2


def test_our_rows_of_the_official_statements_are_theirs(originals, tmp_path):
    """Their pictures and the official lines, through our converter.

    This gives their file and one more column.
    """
    theirs = table_of(originals / "nlvr2_dev.arrow").to_pylist()
    for row in theirs:
        for which in (0, 1):
            put(tmp_path / f"raw/dev/{row['identifier']}-img{which}.png", row[f"image_{which}"])
    put(tmp_path / "raw/nlvr2/data/dev.json", (originals / "nlvr2_dev_official.jsonl").read_bytes())
    prepare_main("nlvr2", tmp_path / "raw", "--out", tmp_path / "out")
    ours = table_of(tmp_path / "out/nlvr2_dev.arrow")
    assert ours.drop_columns("identifiers").to_pylist() == theirs
    table = Statements([tmp_path / "out/nlvr2_dev.arrow"])
    assert {table.details(i)["identifier"] for i in range(len(table.row_of))} == {
        line["identifier"] for line in lines(originals / "nlvr2_dev_official.jsonl")}


# -- what they lack, on files made here ------------------------------------------------------------

def official_lines(path, *statements):
    path.write_text("".join(json.dumps({"identifier": name, "sentence": text}) + "\n"
                            for name, text in statements))
    return path


def test_a_sentence_that_a_pair_has_twice_gets_both_identifiers_in_the_order_of_the_file(tmp_path):
    path = official_lines(tmp_path / "dev.json", ("dev-1-0-2", " a  dog"), ("dev-1-0-0", "a cat"),
                          ("dev-1-0-1", "a dog"),
                          ("dev-1-1-0", "a dog"))
    asked = [("dev-1-0", "a dog"), ("dev-1-1", "a dog"), ("dev-1-0", "a\tdog "),
             ("dev-1-0", "a cat")]
    assert official_identifiers(path, asked) == ["dev-1-0-2", "dev-1-1-0", "dev-1-0-1", "dev-1-0-0"]
    with pytest.raises(ValueError,
                       match="dev.json: has no more statements of pair dev-1-0 that read 'a dog'"):
        official_identifiers(path, [("dev-1-0", "a dog")] * 3)


@pytest.mark.parametrize("line",
                         ["[]", "{", '{"identifier": 1, "sentence": "x"}',
                          '{"identifier": "dev-1-0-0"}', "\ud800",
                          '{"identifier": "dev-1-0-0", "sentence": null}'])
def test_a_file_of_other_lines_is_refused_with_the_number_of_the_line(tmp_path, line):
    path = official_lines(tmp_path / "dev.json", ("dev-1-0-2", "a dog"))
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="dev.json line 3: "):
        official_identifiers(path, [])


def statements(path, identifier, **more):
    rows = len(identifier)
    arrow(path, {"image_0": [b""] * rows, "image_1": [b""] * rows, "questions": [["a", "b"]] * rows,
                 "answers": [["True", "False"]] * rows, "identifier": identifier, **more})
    return Statements([path])


def test_statements_are_named_by_their_own_column_or_in_older_files_by_their_row(tmp_path):
    table = statements(tmp_path / "x", ["dev-7-0", "dev-8-0"],
                       identifiers=[["dev-7-0-3", "dev-7-0-1"], ["dev-8-0-0", "x"]])
    assert [table.details(i)["identifier"] for i in range(4)] == [
        "dev-7-0-3", "dev-7-0-1", "dev-8-0-0", "x"]
    assert [table.details(i)["pair"] for i in range(4)] == [
        "dev-7-0", "dev-7-0", "dev-8-0", "dev-8-0"]
    with pytest.raises(ValueError, match="x row 1: not one of identifiers for each statement"):
        statements(tmp_path / "x", ["dev-7-0", "dev-8-0"], identifiers=[["a", "b"], ["c"]])
    arrow(tmp_path / "old",
          {"image_0": [b""], "image_1": [b""], "questions": [["a"]], "answers": [["True"]],
           "identifier": ["dev-7-0-3"]})
    assert Statements([tmp_path / "old"]).details(0) == {"label": 1, "identifier": "dev-7-0-3",
                                                         "pair": "dev-7-0"}
    table = statements(tmp_path / "vilt", ["dev-7-0", "dev-8-0-1"])
    assert [table.details(i)["identifier"] for i in range(4)] == [None] * 4


def answered(path, texts, labels):
    arrow(path, {"answers": texts, "answer_labels": labels})
    return path


def test_a_label_with_two_answers_is_one_sentence_with_file_and_label(tmp_path):
    one = answered(tmp_path / "vqav2_train.arrow", [[["cat", "dog"]], [["cat"]]], [[[3, 0]], [[3]]])
    assert AnswerLabels([one]).listed() == ["dog", "(label 1)", "(label 2)", "cat"]
    two = answered(tmp_path / "vqav2_rest_val.arrow", [[["dog"]], [[], ["cow"]]],
                   [[[0]], [[], [3]]])
    with pytest.raises(ValueError,
                       match="vqav2_rest_val.arrow row 1: label 3 is 'cow' here, and 'cat' before"):
        AnswerLabels([one, two])
    with pytest.raises(ValueError, match="vqav2_rest_val.arrow row 1: label 3"):
        rebuilt_answers(tmp_path / "vqav2_answers.json", "vqav2")


@pytest.mark.parametrize("texts, labels, sentence", [
    ([[["a", "b"]]], [[[0]]], "row 0: not one of answers for each"),
                                                     ([[["a"], ["b"]]], [[[0]]],
                                                      "row 0: not one of answers"),
    ([[["a"]], [["b"]]], [[[0]], [[-1]]], "row 1: a label that is not from 0 to 1,000,000"),
    ([[["a"]]], [[[2 ** 60]]], "row 0: a label that is not from 0")])
def test_answers_that_are_no_list_are_refused_with_their_row(tmp_path, texts, labels, sentence):
    with pytest.raises(ValueError, match=f"x {sentence}"):
        AnswerLabels([answered(tmp_path / "x", texts, labels)])


def test_files_without_answers_say_that_there_is_no_list(tmp_path):
    answered(tmp_path / "vqav2_test.arrow", [[], []], [[], []])
    arrow(tmp_path / "vqav2_rest_val.arrow", {"questions": [["?"]]})
    with pytest.raises(FileNotFoundError, match="vqav2_answers.json: there is no answer list"):
        rebuilt_answers(tmp_path / "vqav2_answers.json", "vqav2")


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=4), max_size=3),
                min_size=1, max_size=6))
def test_a_rebuilt_list_spells_out_every_label(tmp_path_factory, labels):
    names = [f"answer {label}" for label in range(10)]
    path = tmp_path_factory.mktemp("x") / "x.arrow"
    schema = pa.schema([VQA.field("answers"), VQA.field("answer_labels")])
    table = pa.table({"answers": [[[names[k] for k in some] for some in row] for row in labels],
                      "answer_labels": labels}, schema=schema)
    with pa.ipc.new_file(str(path), schema) as file:
        file.write_table(table, max_chunksize=2)
    listed = AnswerLabels([path]).listed()
    seen = {k for row in labels for some in row for k in some}
    assert len(listed) == max(seen, default=-1) + 1
    assert all(listed[k] == (names[k] if k in seen else f"(label {k})") for k in range(len(listed)))
