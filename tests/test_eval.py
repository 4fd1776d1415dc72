"""What eval.py asks of a model, how it counts the answers, what it writes, and what it says of single pictures."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ANSWERS, WORDS, caption, finetune, picture, tiny, write_captions, write_world

import eval as evaluation
import flm
import layers
import metrics
import predict
from tools import probe

import weights
from data import Captions, Questions, Statements
from tokenizer import BPE

ROOT = Path(__file__).resolve().parents[1]


# -- the downstream tasks, from a pretrained model to the files of results -------------------------------------------------

KINDS = {"vqa": ("flm", "mlm", "vilt"), "nlvr2": ("flm", "vilt"), "caption": ("flm", "ar")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Fine-tuned models of KINDS; the answer list is gone, it has to come out of the checkpoint."""
    root = write_world(tmp_path_factory.mktemp("eval"))
    for task, kinds in KINDS.items():
        for kind in kinds:
            finetune(root, task, kind, root / f"{task}-{kind}")
            if task == "vqa":
                balance(root, kind)
    (root / "mine_vqa_answers.json").unlink()
    return root


def balance(world, kind):
    """A step teaches little, and all answers are one: gives every answer's logit mean 0 and variance 1 over the questions."""
    path, said = world / f"vqa-{kind}/last.pt", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "task_logits", lambda model, batch: said.append(layers.task_logits(model, batch)) or said[-1])
        evaluate(world, "vqa", kind, world / "balance")
    mean, std = said[0].mean(0), said[0].std(0)

    def standardise(state):
        state["head.3.weight"].div_(std[:, None])
        state["head.3.bias"].sub_(mean).div_(std)
    changed(path, path, standardise)


def changed(source, path, change):
    """Writes a checkpoint with other weights."""
    saved = weights.read(source)
    change(saved["model"])
    weights.save(path, saved["model"], weights.config_of(saved), saved["task"], saved["tokenizer"],
                 answers=saved["answers"])
    return path


def evaluate(world, task, kind, out, *more):
    evaluation.main([task, str(world / f"{task}-{kind}/last.pt"), "--data", str(world), "--out", str(out), "--device", "cpu",
                     *map(str, more)])
    return {path.name: path.read_text() for path in out.iterdir()}


def questions(world):
    return Questions([world / "mine_vqa_val.arrow"])


@pytest.mark.parametrize("kind", KINDS["vqa"])
def test_vqa_answers_every_question_once_and_is_scored_officially(world, tmp_path, capsys, kind):
    files = {size: evaluate(world, "vqa", kind, tmp_path / str(size), "--batch-size", size) for size in (1, 3, 64)}
    assert files[1] == files[3] == files[64]                # whatever else is in the batch, to the letter
    results, table = json.loads(files[1]["vqa_val_results.json"]), questions(world)
    asked = [table.details(i)["question_id"] for i in range(len(table.row_of))]
    assert [row["question_id"] for row in results] == asked and all(set(row) == {"question_id", "answer"} for row in results)
    assert len({row["answer"] for row in results}) > 1
    official = metrics.vqa_accuracy(results, json.loads((world / "mine_vqa_annotations_val.json").read_text()))
    scores = json.loads(files[1]["vqa_val_scores.json"])["right image"]
    assert scores == pytest.approx({name: official[name] / 100 for name in ("overall", "yes/no", "other")})  # no numbers asked
    printed = capsys.readouterr().out
    assert f"{official['overall']:.2f} %" in printed and "mine_vqa_annotations_val.json" in printed
    assert "2 rows have pictures that cannot be decoded and were shown as black, the first: " in printed
    assert "val.arrow row 3" in printed


def test_vqa_answers_are_those_of_the_picture_and_the_question(world, tmp_path):
    """Asked of each picture alone, through other code."""
    model, table = weights.load(world / "vqa-vilt/last.pt"), questions(world)
    files = evaluate(world, "vqa", "vilt", tmp_path / "out")
    said = {row["question_id"]: row["answer"] for row in json.loads(files["vqa_val_results.json"])}
    for i in range(0, len(table.row_of), 3):
        if table.row_of[i] not in (3, 7):
            (tmp_path / "x.jpg").write_bytes(table.image(table.row_of[i]))
            assert predict.ask(model, tmp_path / "x.jpg", table.text(i), k=1)[0][0] == said[table.details(i)["question_id"]]


def test_without_annotations_the_score_is_that_of_the_labels(world, tmp_path):
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    for split in ("train", "val"):
        (data_folder / f"mine_vqa_{split}.arrow").symlink_to(world / f"mine_vqa_{split}.arrow")
    files = evaluate(world, "vqa", "flm", tmp_path / "out", "--data", data_folder)
    said = {row["question_id"]: row["answer"] for row in json.loads(files["vqa_val_results.json"])}
    table, total = questions(world), 0.0
    for i in range(len(table.row_of)):
        d = table.details(i)
        total += {ANSWERS[label]: score for label, score in zip(d["labels"], d["scores"])}.get(said[d["question_id"]], 0.0)
    assert json.loads(files["vqa_val_scores.json"])["right image"]["overall"] == pytest.approx(total / len(said))
    with pytest.raises(SystemExit, match="nowhere.json: there is no such file of annotations"):
        evaluate(world, "vqa", "flm", tmp_path / "out", "--annotations", "nowhere.json")


@pytest.mark.parametrize("kind", KINDS["nlvr2"])
def test_nlvr2s_prediction_file_scores_as_printed(world, tmp_path, capsys, kind):
    files = {size: evaluate(world, "nlvr2", kind, tmp_path / str(size), "--batch-size", size) for size in (1, 3, 64)}
    assert files[1] == files[3] == files[64]
    lines, table = files[1]["nlvr2_val_predictions.csv"].splitlines(), Statements([world / "mine_nlvr2_dev.arrow"])
    truth = [{"identifier": table.cell("identifier", row).as_py(), "label": table.cell("answers", row)[0].as_py()}
             for row in range(len(table))]
    assert len(lines) == len(truth) and all(line.rsplit(",", 1)[1] in ("True", "False") for line in lines)
    subsets = {"balanced": json.loads((world / "nlvr2_balanced_dev.json").read_text())}
    official, scores = metrics.nlvr2_scores(lines, truth, subsets), json.loads(files[1]["nlvr2_val_scores.json"])["right images"]
    assert scores == pytest.approx(official) and set(scores) == {
        "accuracy", "consistency", "balanced accuracy", "balanced consistency"}
    printed = capsys.readouterr().out
    assert all(f"{100 * value:.2f} %" in printed for value in official.values()) and "dev.arrow row 6" in printed


def test_nlvr2s_answers_are_those_of_the_two_pictures_in_their_order(world, tmp_path, monkeypatch):
    logits, shares = layers.task_logits, []
    monkeypatch.setattr(evaluation, "task_logits", lambda *a: shares.append(logits(*a)) or shares[-1])
    for kind in ("flm", "vilt"):
        shares.clear()
        model, table = weights.load(world / f"nlvr2-{kind}/last.pt"), Statements([world / "mine_nlvr2_dev.arrow"])
        lines = evaluate(world, "nlvr2", kind, tmp_path / kind)["nlvr2_val_predictions.csv"].splitlines()
        said = torch.cat(shares).softmax(-1)[:, 1]
        near = lambda *pictures: (said - predict.compare(model, *pictures, table.text(row))).abs().min()
        swapped = 0
        for row in [row for row in range(len(table)) if row != 6]:
            left, right = (tmp_path / f"{kind}{row}{which}.jpg" for which in (0, 1))
            for which, path in enumerate((left, right)):
                path.write_bytes(table.image(row, which))
            share = predict.compare(model, left, right, table.text(row))
            assert lines[row] == f"{table.cell('identifier', row).as_py()},{share > 0.5}"
            assert near(left, right) < 1e-5
            swapped += near(right, left) > 1e-5
        assert swapped > 5


@pytest.mark.parametrize("kind", KINDS["caption"])
def test_captions_are_written_once_for_every_image_and_scored_as_printed(world, tmp_path, capsys, kind):
    for how in (("--beams", 2), ("--top-p", 0.9, "--seed", 3), ())[0 if kind == "flm" else 2:]:
        files = {size: evaluate(world, "caption", kind, tmp_path / f"{len(how)}-{size}", "--batch-size", size,
                                "--max-tokens", 8, *how) for size in ((3, 64) if how else (1, 3, 64))}
        assert files[3] == files.get(1, files[64]) == files[64]
    results, table = json.loads(files[3]["captions_test_results.json"]), Captions([world / "mine_caption_test.arrow"])
    assert [row["image_id"] for row in results] == list(range(len(table))) and len({row["caption"] for row in results}) > 1
    assert not any("<" in row["caption"] for row in results)        # no <bos>, no <eos>
    references = {i: [] for i in range(len(table))}
    for i, row in enumerate(table.row_of.tolist()):
        references[row].append(table.text(i))
    expected = metrics.caption_scores(results, references)
    expected.pop("per_image")
    assert json.loads(files[3]["captions_test_scores.json"])["right image"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "7 images, 14 references" in printed and f"{100 * expected['ROUGE_L']:.2f} %" in printed


def test_captions_are_those_of_the_picture_alone(world, tmp_path, capsys):
    table = Captions([world / "mine_caption_test.arrow"])
    results = json.loads(evaluate(world, "caption", "flm", tmp_path)["captions_test_results.json"])
    for row in (0, 1, 2):
        (tmp_path / "x.jpg").write_bytes(table.image(row))
        capsys.readouterr()
        evaluation.main(["describe", str(world / "caption-flm/last.pt"), str(tmp_path / "x.jpg")])
        assert capsys.readouterr().out.strip() == results[row]["caption"].strip()


def test_a_file_of_results_appears_whole_beside_the_checkpoint(world):
    evaluation.main(["nlvr2", str(world / "nlvr2-vilt/last.pt"), "--data", str(world), "--examples", "3"])
    folder = world / "nlvr2-vilt/nlvr2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "examples.json", "nlvr2_val_predictions.csv", "nlvr2_val_scores.json"]
    examples = json.loads((folder / "examples.json").read_text())["examples"]
    assert len(examples) == 3 and all(e["right"] == (e["answer"] == e["truth"]) for e in examples)
    assert examples[0]["images"] == ["image_0", "image_1"] and examples[0]["file"].endswith("mine_nlvr2_dev.arrow")


def test_a_question_that_comes_twice_makes_no_results_file(world, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("mine_vqa_train.arrow", "mine_nlvr2_train.arrow"):
        (folder / name).symlink_to(world / name)
    for name in ("vqav2_rest_val.arrow", "nlvr2_dev.arrow"):
        (folder / name).symlink_to(world / ("mine_vqa_val.arrow" if "vqa" in name else "mine_nlvr2_dev.arrow"))
    (folder / "mine_vqa_val.arrow").symlink_to(world / "mine_vqa_val.arrow")
    (folder / "mine_nlvr2_val.arrow").symlink_to(world / "mine_nlvr2_dev.arrow")
    with pytest.raises(SystemExit, match="some question ids come more than once, so no results file is valid"):
        evaluate(world, "vqa", "flm", tmp_path / "out", "--data", folder, "--datasets", "mine", "vqav2")
    with pytest.raises(SystemExit, match="some identifiers come more than once, so no prediction file is valid"):
        evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder, "--datasets", "mine", "nlvr2")


def linked(world, folder, *names):
    """A folder with some of the world's files; "a=b": b under the name a."""
    folder.mkdir()
    for name in names:
        (folder / name.partition("=")[0]).symlink_to(world / (name.partition("=")[2] or name))
    return folder


def test_labels_are_read_against_the_datas_own_list_and_compared_as_strings(world, tmp_path):
    """The data's list in another order and longer than the model's: the same labels mean other answers."""
    folder = linked(world, tmp_path / "data", "mine_vqa_val.arrow")
    listed = ["kite", *ANSWERS[::-1]]
    (folder / "mine_vqa_answers.json").write_text(json.dumps(listed))
    files = evaluate(world, "vqa", "flm", tmp_path / "out", "--data", folder)
    said = {row["question_id"]: row["answer"] for row in json.loads(files["vqa_val_results.json"])}
    table = questions(world)
    details = [table.details(i) for i in range(len(table.row_of))]
    total = sum({listed[k]: score for k, score in zip(d["labels"], d["scores"])}.get(said[d["question_id"]], 0) for d in details)
    assert json.loads(files["vqa_val_scores.json"])["right image"]["overall"] == pytest.approx(total / len(said))
    (folder / "mine_vqa_answers.json").write_text('["yes"]')
    with pytest.raises(SystemExit, match="label . is past the end of the answer list, which has 1 answers"):
        evaluate(world, "vqa", "flm", tmp_path / "none", "--data", folder)
    assert not (tmp_path / "none").exists()


def test_of_several_datasets_the_one_trained_on_is_evaluated(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_nlvr2_dev.arrow", "other_nlvr2_test.arrow=mine_nlvr2_dev.arrow")
    with pytest.raises(SystemExit, match="--datasets must name one of mine, other"):        # it was trained on all there was
        evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    finetune(world, "nlvr2", "flm", tmp_path / "nlvr2-named", "--datasets", "mine")
    assert evaluate(tmp_path, "nlvr2", "named", tmp_path / "out", "--data", folder)["nlvr2_val_predictions.csv"].count("\n") == 10
    with pytest.raises(SystemExit, match="no nlvr2 files of split 'test': mine has val"):
        evaluate(tmp_path, "nlvr2", "named", tmp_path / "none", "--data", folder, "--split", "test")
    assert not (tmp_path / "none").exists()


def test_a_subset_of_other_statements_is_refused(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_nlvr2_dev.arrow")
    (folder / "nlvr2_balanced_dev.json").write_text('["dev-0-0-0", "dev-99-0-0"]')
    with pytest.raises(SystemExit, match="nlvr2_balanced_dev.json: names 1 statements that are not in .*, such as dev-99-0-0"):
        evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    (folder / "nlvr2_balanced_dev.json").write_text("[")
    with pytest.raises(SystemExit, match="nlvr2_balanced_dev.json: not JSON"):
        evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    (folder / "nlvr2_balanced_dev.json").write_text('["dev-99-0-0"]')        # the official data's, which these are not
    assert "balanced accuracy" not in evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)["nlvr2_val_scores.json"]


def test_annotations_of_other_questions_make_no_results(world, tmp_path):
    (tmp_path / "x.json").write_text('{"annotations": [{"question_id": 1, "answers": [{"answer": "a"}], "answer_type": "other"}]}')
    with pytest.raises(SystemExit, match="x.json: 1 questions have no prediction, the first is 1"):
        evaluate(world, "vqa", "flm", tmp_path / "out", "--annotations", tmp_path / "x.json")
    assert not (tmp_path / "out").exists()


def test_bfloat16_evaluation_nearly_gives_float32s_answers(world, tmp_path):
    one, two = (evaluate(world, "vqa", "flm", tmp_path / p, "--precision", p)["vqa_val_results.json"] for p in ("fp32", "bf16"))
    same = [a == b for a, b in zip(json.loads(one), json.loads(two), strict=True)]
    assert sum(same) > 0.7 * len(same)
    files = evaluate(world, "caption", "flm", tmp_path / "captions", "--precision", "bf16", "--max-tokens", 5, "--beams", 2)
    assert len(json.loads(files["captions_test_results.json"])) == 7


# -- without a picture -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_with_black_pictures_nothing_is_seen(world, tmp_path, monkeypatch, task):
    """A model for which all words are alike says one thing of all questions, and with the pictures many."""
    def forget_words(state):
        state["embed.word.weight"].zero_(), state["embed.position.weight"].zero_()

    changed(world / f"{task}-flm/last.pt", tmp_path / f"{task}-blind/last.pt", forget_words)
    said, logits = [], evaluation.task_logits
    monkeypatch.setattr(evaluation, "task_logits", lambda model, batch: said.append(logits(model, batch)) or said[-1])
    seen, to_device = [], evaluation.to_device
    monkeypatch.setattr(evaluation, "to_device", lambda batch, *a: seen.append(batch) or to_device(batch, *a))
    files = evaluate(tmp_path, task, "blind", tmp_path / "out", "--data", world, "--blank")
    with_pictures, without = said
    assert without.std(0).max() < 1e-4 < 1e-2 < with_pictures.std(0).min()
    names = [name for name in ("image", "image_1") if name in seen[1]]
    assert len(names) == (2 if task == "nlvr2" else 1) and all(seen[0][n].any() and not seen[1][n].any() for n in names)
    assert len(json.loads(files[f"{task}_val_scores.json"])) == 2


def test_black_pictures_are_no_results_and_cost_no_column_where_not_asked_for(world, tmp_path, capsys):
    plain = evaluate(world, "caption", "flm", tmp_path / "plain", "--max-tokens", 5)
    both = evaluate(world, "caption", "flm", tmp_path / "both", "--max-tokens", 5, "--blank")
    assert plain["captions_test_results.json"] == both["captions_test_results.json"]
    one, two = (json.loads(files["captions_test_scores.json"]) for files in (plain, both))
    assert list(one) == ["right image"] and list(two) == ["right image", "no image"]
    assert one["right image"] == two["right image"]


# -- single pictures -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photo(world):
    (world / "photo.jpg").write_bytes(picture(1))
    (world / "other.png").write_bytes(picture(2, (30, 50), "PNG"))
    (world / "letter.txt").write_text("no picture at all")
    return world / "photo.jpg"


def single_command(*arguments):
    evaluation.main([str(a) for a in arguments])


def test_ask_prints_the_likeliest_answers_of_the_checkpoints_own_list(world, photo, capsys):
    single_command("ask", world / "vqa-flm/last.pt", photo, "is the dog red?", "-k", 3)
    lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split(" %  ")[0]) for line in lines]
    assert len(lines) == 3 and shares == sorted(shares, reverse=True)
    assert all(line.split(" %  ")[1] in ANSWERS for line in lines)
    single_command("ask", world / "vqa-flm/last.pt", photo, "is the dog red?", "-k", 100)
    assert len(capsys.readouterr().out.splitlines()) == len(ANSWERS)


@torch.no_grad()
def test_search_orders_pictures_by_the_score_of_the_pair(world, photo):
    model = weights.load(world / "vilt.pt")
    found = predict.search(model, "a red dog", [photo, world / "other.png"])
    scores = {}
    for path, score in found:
        text = model.encode_text(predict.token_ids(model, "a red dog"))
        logits = model.itm_head(model.fuse(predict.encode_pictures(model, [path]), text).pooled)[0]
        scores[path] = score
        assert score == pytest.approx(math.log(torch.softmax(logits, -1)[1]), abs=1e-5)
    assert [path for path, _ in found] == sorted(scores, key=lambda p: -scores[p]) and len(found) == 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flm", "mlm", "vilt"])
def test_fill_puts_the_likeliest_word_into_every_blank(world, photo, kind):
    model = weights.load(world / f"{kind}.pt")
    tok = model.tokenizer
    text, words = predict.fill(model, photo, "a red <mask> on a car")
    (word, share), = words
    ids = torch.tensor([[0, *tok.encode("a red <mask> on a car", specials=True), 2]])
    place = ids[0].tolist().index(tok.mask_id)
    logits = model.vocab_logits(model.fuse(predict.encode_pictures(model, [photo]), model.encode_text(ids)).reconstructed[0, place])
    shares = logits.softmax(-1)
    logits[[0, 1, 2, 3, 4]] = -math.inf
    best = int(logits.argmax())
    assert word == tok.decode([best]).strip() and share == pytest.approx(shares[best].item(), abs=1e-5)
    assert text == tok.decode([*ids[0, 1:place].tolist(), best, *ids[0, place + 1:-1].tolist()])
    text, words = predict.fill(model, photo, "<mask> red <mask> <mask> car")
    assert len(words) == 3 and "<mask>" not in text and text.endswith(" car") and all(0 < share <= 1 for _, share in words)


@torch.no_grad()
def test_several_blanks_are_read_again_with_the_guesses_in_them(world, photo, monkeypatch):
    model, reads = weights.load(world / "flm.pt"), []
    tok, encode_text = model.tokenizer, model.encode_text
    visual = predict.encode_pictures(model, [photo])
    monkeypatch.setattr(model, "encode_text", lambda ids: reads.append(ids) or encode_text(ids))
    text, words = predict.fill(model, photo, "<mask> red <mask> <mask> car", rounds=50)
    blanks = (reads[0][0] == tok.mask_id).nonzero()[:, 0].tolist()
    assert len(blanks) == 3 <= len(reads)
    for read, then in zip(reads, reads[1:] + reads[-1:]):       # the last one is what it makes of itself
        shares = model.vocab_logits(model.fuse(visual, encode_text(read)).reconstructed[0, blanks]).softmax(-1)
        shares[:, :5] = 0
        assert torch.equal(then[0, blanks], shares.argmax(-1))
        assert then[0, 1:blanks[0]].tolist() == read[0, 1:blanks[0]].tolist() and then.shape == read.shape
    assert text == tok.decode(reads[-1][0, 1:-1].tolist())
    assert [share for _, share in words] == pytest.approx(shares.amax(-1).tolist(), abs=1e-6)
    reads.clear()
    predict.fill(model, photo, "<mask> red <mask> <mask> car", rounds=2)
    assert len(reads) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["<eos>", "</s>"])
def test_a_caption_ends_at_eos_or_at_the_end_of_the_text(world, photo, name):
    model = weights.load(world / "caption-flm/last.pt")
    assert predict.write_captions(model, predict.encode_pictures(model, [photo]), max_tokens=6)[0]
    model.vocab_head.decoder.bias[model.tokenizer.ids[name]] += 1000
    assert predict.write_captions(model, predict.encode_pictures(model, [photo]), max_tokens=6, no_repeat=1) == [""]     # not twice


@pytest.mark.parametrize("arguments, sentence", [
    (("ask", "vqa-flm", "nowhere.jpg", "why?"), "nowhere.jpg: there is no such picture"),
    (("ask", "vqa-flm", "letter.txt", "why?"), "letter.txt: not a picture that can be read"),
    (("ask", "vqa-vilt", "photo.jpg", "why " * 50), "a text of .* tokens; this model reads at most 24"),
    (("ask", "nlvr2-flm", "photo.jpg", "why?"), "a model of task nlvr2 with head nlvr2; needed is what train.py --task vqa"),
    (("ask", "mlm", "photo.jpg", "why?"), "a model of task pretrain with head vocab; needed is what train.py --task vqa"),
    (("compare", "vqa-flm", "photo.jpg", "photo.jpg", "a dog"), "needed is what train.py --task nlvr2"),
    (("compare", "nlvr2-vilt", "photo.jpg", "letter.txt", "a dog"), "letter.txt: not a picture that can be read"),
    (("describe", "vqa-flm", "photo.jpg"), "needed is what train.py --task caption"),
    (("describe", "vilt", "photo.jpg"), "needed is what train.py --task caption"),
    (("describe", "caption-flm", "letter.txt"), "letter.txt: not a picture that can be read"),
    (("search", "vqa-flm", "a dog", "photo.jpg"), "needed is what train.py --task retrieval"),
    (("search", "flm", "a dog", "photo.jpg", "nowhere.jpg"), "nowhere.jpg: there is no such picture"),
    (("fill", "flm", "photo.jpg", "a dog"), "there is no <mask> in 'a dog'"),
    (("fill", "ar", "photo.jpg", "a <mask>"), "this is ar with head vocab"),
    (("fill", "vqa-flm", "photo.jpg", "a <mask>"), "this is flm with head vqa"),
    (("vqa", "caption-flm", "--data", "."), "needed is what train.py --task vqa"),
    (("words", "vqa-flm", "--data", "."), "needed is what train.py --task pretrain"),
    (("ask", "vqa-flm", "photo.jpg", "why?", "-k", "0"), "0 answers: at least 1"),
    (("describe", "caption-flm", "photo.jpg", "--temperature", "2"), "--temperature 2.0: changes nothing without --top-p"),
    (("describe", "caption-flm", "photo.jpg", "--length-penalty", "2"), "--length-penalty 2.0: changes nothing without --beams"),
    (("describe", "caption-flm", "photo.jpg", "--top-p", "0"), "top_p 0.0.*: sampling needs a top_p of 0 < p <= 1"),
    (("describe", "caption-flm", "photo.jpg", "--max-tokens", "99"), "max_tokens 99 after a prompt of 1"),
    (("describe", "caption-flm", "photo.jpg", "--max-tokens", "0"), "max_tokens 0 after a prompt of 1"),
    (("describe", "caption-flm", "photo.jpg", "--beams", "9999"), "9999 beams: the vocabulary has"),
    (("caption", "caption-flm", "--data", ".", "--seed", "2"), "--seed 2: changes nothing without --top-p"),
    (("caption", "caption-flm", "--data", ".", "--examples", "-1"), "--examples -1: at least 0"),
    (("vqa", "vqa-flm", "--data", ".", "--annotations", "letter.txt"), "letter.txt: not JSON"),
    (("words", "flm", "--data", ".", "--groups", "letter.txt"), "letter.txt: not JSON"),
    (("retrieval", "flm", "--data", ".", "--top", "-1"), "--top -1: 0 or more is expected"),
    (("caption", "flm", "--data", "."), "a model of task pretrain with head vocab; needed is what train.py --task caption"),
    (("nlvr2", "nlvr2-flm", "--data", "nowhere"), "nowhere: there is no such directory"),
], ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:30])
def test_what_cannot_be_done_is_said_in_a_sentence(world, photo, monkeypatch, arguments, sentence):
    monkeypatch.chdir(world)
    command, model, *more = arguments
    path = f"{model}/last.pt" if "-" in model else f"{model}.pt"
    with pytest.raises(SystemExit, match=f"^eval.py: .*{sentence}"):
        single_command(command, path, *more)
    assert not (world / command).exists()               # no empty folder of results beside a refused checkpoint


def test_official_scores_without_their_tools_are_refused_before_a_caption_is_written(world, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^eval.py: .*needs pycocoevalcap"):
        single_command("caption", str(world / "caption-flm/last.pt"), "--data", "nowhere", "--official")


def test_checkpoints_without_a_tokenizer_need_a_folder_that_fits(world, photo, tmp_path, capsys):
    saved = weights.read(world / "caption-flm/last.pt")
    weights.save(tmp_path / "bare.pt", saved["model"], weights.config_of(saved), "caption", None)
    with pytest.raises(SystemExit, match="bare.pt carries no tokenizer: --tokenizer DIR"):
        single_command("describe", tmp_path / "bare.pt", photo)
    single_command("describe", world / "caption-flm/last.pt", photo)
    single_command("describe", tmp_path / "bare.pt", photo, "--tokenizer", world / "tok")       # <bos> and <eos> come last
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs
    BPE.train([" ".join(WORDS)] * 3, 310).save(tmp_path / "large")
    with pytest.raises(SystemExit, match="large: a tokenizer of .* tokens; the model knows"):
        single_command("describe", tmp_path / "bare.pt", photo, "--tokenizer", tmp_path / "large")


# -- several processes -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(world, tmp_path):
    one = evaluate(world, "vqa", "flm", tmp_path / "one", "--batch-size", 3)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                          str(29900 + os.getpid() % 40), str(ROOT / "eval.py"), "vqa", str(world / "vqa-flm/last.pt"),
                          "--data", str(world), "--out", str(tmp_path / "two"), "--device", "cpu", "--batch-size", "3"],
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert two.returncode == 0, two.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "two").iterdir()} == one
    assert two.stdout.count("2 rows have pictures that cannot be decoded") == 1
