"""What eval.py writes and prints: answers to every text, official scores, and refusals."""

import json

import pyarrow as pa
import pytest
import torch
from conftest import ANSWERS, WORDS, arrow, finetune, picture, together, write_world

import eval as evaluation
import layers
import metrics
import predict
import tasks
import weights
from data import Captions, Questions, Statements
from tokenizer import BPE

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

KINDS = {"vqa": ("flm", "mlm", "vilt"), "nlvr2": ("flm", "vilt"), "caption": ("flm", "ar")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Fine-tuned models of KINDS. The answer list is gone: it has to come out of the checkpoint."""
    root = write_world(tmp_path_factory.mktemp("eval"))
    for task, kinds in KINDS.items():
        for kind in kinds:
            finetune(root, task, kind, root / f"{task}-{kind}")
            if task == "vqa":
                balance(root, kind)
    (root / "mine_vqa_answers.json").unlink()
    return root


def balance(world, kind):
    """Gives every answer's logit mean 0 and variance 1 over the questions.

    A step of training teaches little, so all answers would be the same one.
    """
    path, logits = world / f"vqa-{kind}/last.pt", []
    with pytest.MonkeyPatch.context() as patch:
        record_logits(patch, logits)
        evaluate(world, "vqa", kind, world / "balance")
    logits = torch.cat(logits)
    mean, std = logits.mean(0), logits.std(0)

    def standardise(state):
        state["head.3.weight"].div_(std[:, None])
        state["head.3.bias"].sub_(mean).div_(std)
    changed(path, path, standardise)


def record_logits(patch, logits):
    """Adds the logits of every batch that eval.py asks for to a list."""
    def task_logits(model, batch):
        logits.append(layers.task_logits(model, batch))
        return logits[-1]
    patch.setattr(evaluation, "task_logits", task_logits)


def changed(source, path, change):
    """Writes a checkpoint with other weights."""
    saved = weights.read(source)
    change(saved["model"])
    weights.save(path, saved["model"], weights.config_of(saved), saved["task"], saved["tokenizer"],
                 answers=saved["answers"])
    return path


def main(*arguments):
    evaluation.main([str(argument) for argument in arguments])


def evaluate(world, task, kind, out, *more):
    """Runs a command on a model of KINDS -> {name of a file of results: its text}."""
    checkpoint = world / f"{task}-{kind}/last.pt"
    main(task, checkpoint, "--data", world, "--out", out, "--device", "cpu", *more)
    return {path.name: path.read_text() for path in out.iterdir()}


def linked(world, folder, *names):
    """A folder with some of the world's files; "a=b": b under the name a."""
    folder.mkdir()
    for name in names:
        new, _, old = name.partition("=")
        (folder / new).symlink_to(world / (old or name))
    return folder


def questions(world):
    return Questions([world / "mine_vqa_val.arrow"])


def soft_score(table, listed, answer_of):
    """The mean soft score of answers, by the labels of the table and the list that they mean."""
    total = 0.0
    for i in range(len(table.row_of)):
        d = table.details(i)
        pairs = zip(d["labels"], d["scores"], strict=True)
        truth = {listed[label]: score for label, score in pairs}
        total += truth.get(answer_of[d["question_id"]], 0.0)
    return total / len(answer_of)


# -- VQA -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS["vqa"])
def test_vqa_answers_every_question_once_and_is_scored_officially(world, tmp_path, capsys, kind):
    files = {size: evaluate(world, "vqa", kind, tmp_path / str(size), "--batch-size", size)
             for size in (1, 3, 64)}
    assert files[1] == files[3] == files[64]        # whatever else is in the batch, to the letter
    results, table = json.loads(files[1]["vqa_val_results.json"]), questions(world)
    asked = [table.details(i)["question_id"] for i in range(len(table.row_of))]
    assert [row["question_id"] for row in results] == asked
    assert all(set(row) == {"question_id", "answer"} for row in results)
    assert len({row["answer"] for row in results}) > 1
    annotations = json.loads((world / "mine_vqa_annotations_val.json").read_text())
    official = metrics.vqa_accuracy(results, annotations)
    scores = json.loads(files[1]["vqa_val_scores.json"])["right image"]
    types = ("overall", "yes/no", "other")                          # no numbers are asked for
    assert scores == pytest.approx({name: official[name] / 100 for name in types})
    printed = capsys.readouterr().out
    assert f"{official['overall']:.2f} %" in printed
    assert "mine_vqa_annotations_val.json" in printed
    assert ("2 rows have pictures that cannot be decoded and were shown as black, the first: "
            in printed)
    assert "val.arrow row 3" in printed


def test_vqa_answers_are_those_of_the_picture_and_the_question(world, tmp_path):
    """Asked of each picture alone, through predict.ask."""
    model, table = weights.load(world / "vqa-vilt/last.pt"), questions(world)
    files = evaluate(world, "vqa", "vilt", tmp_path / "out")
    results = json.loads(files["vqa_val_results.json"])
    said = {row["question_id"]: row["answer"] for row in results}
    for i in range(0, len(table.row_of), 3):
        if table.row_of[i] not in (3, 7):
            (tmp_path / "x.jpg").write_bytes(table.image(table.row_of[i]))
            (answer, _), = predict.ask(model, tmp_path / "x.jpg", table.text(i), k=1)
            assert answer == said[table.details(i)["question_id"]]


def test_without_annotations_the_score_is_that_of_the_labels(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_vqa_train.arrow", "mine_vqa_val.arrow")
    files = evaluate(world, "vqa", "flm", tmp_path / "out", "--data", folder)
    results = json.loads(files["vqa_val_results.json"])
    expected = soft_score(questions(world), ANSWERS,
                          {row["question_id"]: row["answer"] for row in results})
    scores = json.loads(files["vqa_val_scores.json"])["right image"]
    assert scores["overall"] == pytest.approx(expected)
    with pytest.raises(SystemExit, match="nowhere.json: there is no such file of annotations"):
        evaluate(world, "vqa", "flm", tmp_path / "out", "--annotations", "nowhere.json")


def test_labels_are_read_against_the_datas_own_list_and_compared_as_strings(world, tmp_path):
    """The data's list is in another order and longer: the same labels mean other answers."""
    folder = linked(world, tmp_path / "data", "mine_vqa_val.arrow")
    listed = ["kite", *ANSWERS[::-1]]
    (folder / "mine_vqa_answers.json").write_text(json.dumps(listed))
    files = evaluate(world, "vqa", "flm", tmp_path / "out", "--data", folder)
    results = json.loads(files["vqa_val_results.json"])
    expected = soft_score(questions(world), listed,
                          {row["question_id"]: row["answer"] for row in results})
    scores = json.loads(files["vqa_val_scores.json"])["right image"]
    assert scores["overall"] == pytest.approx(expected)
    (folder / "mine_vqa_answers.json").write_text('["yes"]')
    with pytest.raises(SystemExit, match="label . is past the end of the answer list, which has 1"):
        evaluate(world, "vqa", "flm", tmp_path / "none", "--data", folder)
    assert not (tmp_path / "none").exists()


def test_annotations_of_other_questions_make_no_results(world, tmp_path):
    other = {"question_id": 1, "answers": [{"answer": "a"}], "answer_type": "other"}
    (tmp_path / "x.json").write_text(json.dumps({"annotations": [other]}))
    with pytest.raises(SystemExit, match="x.json: 1 questions have no prediction, the first is 1"):
        evaluate(world, "vqa", "flm", tmp_path / "out", "--annotations", tmp_path / "x.json")
    assert not (tmp_path / "out").exists()


def test_a_model_of_nan_makes_no_results(world, tmp_path):
    """Every answer would be the first of the list, and score."""
    for task in ("vqa", "caption"):
        changed(world / f"{task}-flm/last.pt", tmp_path / f"{task}-nan/last.pt",
                lambda state: state["embed.word.weight"].fill_(torch.nan))
        with pytest.raises(SystemExit,
                           match="^eval.py: .*last.pt: .* holds NaN or infinite numbers"):
            evaluate(tmp_path, task, "nan", tmp_path / task, "--data", world)
        assert not (tmp_path / task).exists()


# -- NLVR2 -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS["nlvr2"])
def test_nlvr2s_prediction_file_scores_as_printed(world, tmp_path, capsys, kind):
    files = {size: evaluate(world, "nlvr2", kind, tmp_path / str(size), "--batch-size", size)
             for size in (1, 3, 64)}
    assert files[1] == files[3] == files[64]
    lines = files[1]["nlvr2_val_predictions.csv"].splitlines()
    table = Statements([world / "mine_nlvr2_dev.arrow"])
    truth = [{"identifier": table.details(row)["identifier"],
              "label": table.cell("answers", row)[0].as_py()} for row in range(len(table))]
    assert len(lines) == len(truth)
    assert all(line.rsplit(",", 1)[1] in ("True", "False") for line in lines)
    subsets = {"balanced": json.loads((world / "nlvr2_balanced_dev.json").read_text())}
    official = metrics.nlvr2_scores(lines, truth, subsets)
    scores = json.loads(files[1]["nlvr2_val_scores.json"])["right images"]
    assert scores == pytest.approx(official)
    assert set(scores) == {"accuracy", "consistency", "balanced accuracy", "balanced consistency"}
    printed = capsys.readouterr().out
    assert all(f"{100 * value:.2f} %" in printed for value in official.values())
    assert "dev.arrow row 6" in printed


@pytest.mark.parametrize("kind", KINDS["nlvr2"])
def test_nlvr2s_answers_are_those_of_both_pictures_in_order(world, tmp_path, monkeypatch, kind):
    logits = []
    record_logits(monkeypatch, logits)
    model = weights.load(world / f"nlvr2-{kind}/last.pt")
    table = Statements([world / "mine_nlvr2_dev.arrow"])
    files = evaluate(world, "nlvr2", kind, tmp_path / "out")
    lines = files["nlvr2_val_predictions.csv"].splitlines()
    shares = torch.cat(logits).softmax(-1)[:, 1]
    swapped = 0
    for row in [row for row in range(len(table)) if row != 6]:
        left, right = (tmp_path / f"{row}{which}.jpg" for which in (0, 1))
        for which, path in enumerate((left, right)):
            path.write_bytes(table.image(row, which))
        share = predict.compare(model, left, right, table.text(row))
        assert lines[row] == f"{table.details(row)['identifier']},{share > 0.5}"
        assert (shares - share).abs().min() < 1e-5
        other_way = predict.compare(model, right, left, table.text(row))
        swapped += bool((shares - other_way).abs().min() > 1e-5)
    assert swapped > 2


def vilts_statements(world, folder):
    """The world's statements as ViLT writes them: a row for each pair, without their numbers.

    -> the official JSON lines. A sentence is about two pairs, and the second pair has two more.
    """
    table = Statements([world / "mine_nlvr2_dev.arrow"])
    columns = {"image_0": [], "image_1": [], "questions": [], "answers": [], "identifier": []}
    lines = []
    for row in range(len(table)):
        d = table.details(row)
        pair, sentences = f"dev-{row // 2}-{row % 2}", [table.text(row)]
        if row == 1:
            sentences = ["two dogs", table.text(row), "  a red\ncat"]
        columns["image_0"].append(table.image(row, 0).to_pybytes())
        columns["image_1"].append(table.image(row, 1).to_pybytes())
        columns["questions"].append(sentences)
        columns["answers"].append([str(bool(d["label"]))] * len(sentences))
        columns["identifier"].append(pair)
        # the numbers of the sentences are not their places
        numbers = [0] if len(sentences) == 1 else [2, 0, 1]
        lines += [{"identifier": f"{pair}-{number}", "sentence": " ".join(text.split()),
                   "label": str(bool(d["label"]))}
                  for number, text in zip(numbers, sentences, strict=True)]
    folder.mkdir()
    arrow(folder / "mine_nlvr2_dev.arrow", columns)
    return lines


def test_statements_of_vilts_own_files_have_no_invented_identifiers(world, tmp_path, capsys):
    """ViLT's identifiers are of pairs: the CSV would score other statements than were asked."""
    lines = vilts_statements(world, tmp_path / "data")
    statements = tmp_path / "dev.json"
    statements.write_text("\n".join(map(json.dumps, lines[::-1])))
    alone = evaluate(world, "nlvr2", "flm", tmp_path / "alone", "--data", tmp_path / "data")
    assert "--statements" in capsys.readouterr().out
    named = evaluate(world, "nlvr2", "flm", tmp_path / "named", "--data", tmp_path / "data",
                     "--statements", statements)
    assert "--statements" not in capsys.readouterr().out
    assert not [name for name in alone if name.endswith(".csv")]
    scores, of_named = (json.loads(files["nlvr2_val_scores.json"])["right images"]
                        for files in (alone, named))
    assert list(scores) == ["accuracy"] and scores["accuracy"] == of_named["accuracy"]
    csv = named["nlvr2_val_predictions.csv"].splitlines()
    assert [line.split(",")[0] for line in csv] == [line["identifier"] for line in lines]
    assert of_named == pytest.approx(metrics.nlvr2_scores(csv, lines))
    statements.write_text(json.dumps(lines[0]))
    with pytest.raises(SystemExit, match="dev.json: .* statements of pair dev-0-1"):
        evaluate(world, "nlvr2", "flm", tmp_path / "none", "--data", tmp_path / "data",
                 "--statements", statements)
    assert not (tmp_path / "none").exists()


def test_of_several_datasets_the_one_trained_on_is_evaluated(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_nlvr2_dev.arrow",
                    "other_nlvr2_test.arrow=mine_nlvr2_dev.arrow")
    # this model was trained on all there was
    with pytest.raises(SystemExit, match="--datasets must name one of mine, other"):
        evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    finetune(world, "nlvr2", "flm", tmp_path / "nlvr2-named", "--datasets", "mine")
    files = evaluate(tmp_path, "nlvr2", "named", tmp_path / "out", "--data", folder)
    assert files["nlvr2_val_predictions.csv"].count("\n") == 10
    with pytest.raises(SystemExit, match="no nlvr2 files of split 'test': mine has val"):
        evaluate(tmp_path, "nlvr2", "named", tmp_path / "none", "--data", folder, "--split", "test")
    assert not (tmp_path / "none").exists()


def test_a_subset_of_other_statements_is_refused(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_nlvr2_dev.arrow")
    subset = folder / "nlvr2_balanced_dev.json"
    for text, sentence in (
            ('["dev-0-0-0", "dev-99-0-0"]', "names 1 statements .* not in .*, such as dev-99-0-0"),
            ("[", "not JSON")):
        subset.write_text(text)
        with pytest.raises(SystemExit, match=f"nlvr2_balanced_dev.json: {sentence}"):
            evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    subset.write_text('["dev-99-0-0"]')         # the official data's, which these are not
    files = evaluate(world, "nlvr2", "flm", tmp_path / "out", "--data", folder)
    assert "balanced accuracy" not in files["nlvr2_val_scores.json"]


def test_a_file_of_results_appears_whole_beside_the_checkpoint(world):
    main("nlvr2", world / "nlvr2-vilt/last.pt", "--data", world, "--examples", 3)
    folder = world / "nlvr2-vilt/nlvr2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "examples.json", "examples_val.json", "nlvr2_val_predictions.csv", "nlvr2_val_scores.json"]
    assert (folder / "examples.json").read_text() == (folder / "examples_val.json").read_text()
    examples = json.loads((folder / "examples.json").read_text())["examples"]
    assert len(examples) == 3 and all(e["right"] == (e["answer"] == e["truth"]) for e in examples)
    assert examples[0]["images"] == ["image_0", "image_1"]
    assert examples[0]["file"].endswith("mine_nlvr2_dev.arrow")


def test_a_question_that_comes_twice_makes_no_results_file(world, tmp_path):
    folder = linked(world, tmp_path / "data", "mine_vqa_train.arrow", "mine_nlvr2_train.arrow",
                    "mine_vqa_val.arrow", "vqav2_rest_val.arrow=mine_vqa_val.arrow",
                    "mine_nlvr2_val.arrow=mine_nlvr2_dev.arrow",
                    "nlvr2_dev.arrow=mine_nlvr2_dev.arrow")
    for task, what, both in (("vqa", "question ids", ("mine", "vqav2")),
                             ("nlvr2", "identifiers", ("mine", "nlvr2"))):
        sentence = f"some {what} come more than once, so no results file is valid"
        with pytest.raises(SystemExit, match=sentence):
            evaluate(world, task, "flm", tmp_path / "out", "--data", folder, "--datasets", *both)


# -- captions --------------------------------------------------------------------------------------

# Flags -> what they add to the names of the files.
OPTIONS = {(): "_max-tokens8", ("--beams", 2): "_max-tokens8_beams2",
           ("--top-p", 0.9, "--seed", 3): "_max-tokens8_top-p0.9_seed3"}

@pytest.mark.parametrize("kind, how", [
    ("flm", ("--beams", 2)), ("flm", ("--top-p", 0.9, "--seed", 3)), ("flm", ()), ("ar", ())])
def test_every_image_gets_one_caption_and_the_printed_score(world, tmp_path, capsys, kind, how):
    files = {size: evaluate(world, "caption", kind, tmp_path / str(size), "--batch-size", size,
                            "--max-tokens", 8, *how) for size in ((3, 64) if how else (1, 3, 64))}
    assert all(some == files[3] for some in files.values())
    name = OPTIONS[how]
    results = json.loads(files[3][f"captions_test{name}_results.json"])
    table = Captions([world / "mine_caption_test.arrow"])
    assert [row["image_id"] for row in results] == list(range(len(table)))
    assert len({row["caption"] for row in results}) > 1
    assert not any("<" in row["caption"] for row in results)        # no <bos>, no <eos>
    references = {"annotations": [{"image_id": row, "caption": table.text(i)}
                                  for i, row in enumerate(table.row_of.tolist())]}
    expected = metrics.caption_scores(results, references)
    expected.pop("per_image")
    scores = json.loads(files[3][f"captions_test{name}_scores.json"])
    assert scores["right image"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "7 images, 14 references" in printed
    assert f"{100 * expected['ROUGE_L']:.2f} %" in printed


def test_captions_are_those_of_the_picture_alone(world, tmp_path, capsys):
    table = Captions([world / "mine_caption_test.arrow"])
    results = json.loads(evaluate(world, "caption", "flm", tmp_path)["captions_test_results.json"])
    for row in (0, 1, 2):
        (tmp_path / "x.jpg").write_bytes(table.image(row))
        capsys.readouterr()
        main("describe", world / "caption-flm/last.pt", tmp_path / "x.jpg")
        assert capsys.readouterr().out.strip() == results[row]["caption"].strip()


# -- without a picture, in other precisions --------------------------------------------------------

@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_with_black_pictures_nothing_is_seen(world, tmp_path, monkeypatch, task):
    """A model for which all words are alike says one thing of all black pictures."""
    def forget_words(state):
        state["embed.word.weight"].zero_()
        state["embed.position.weight"].zero_()

    changed(world / f"{task}-flm/last.pt", tmp_path / f"{task}-blind/last.pt", forget_words)
    logits, seen, original = [], [], tasks.to_device

    def to_device(batch, *more):
        seen.append(batch)
        return original(batch, *more)

    record_logits(monkeypatch, logits)
    monkeypatch.setattr("evaluation.to_device", to_device)
    files = evaluate(tmp_path, task, "blind", tmp_path / "out", "--data", world, "--blank")
    assert len(logits) == len(seen) == 4        # the first two texts, and the others, each twice
    with_pictures, without = torch.cat(logits[:2]), torch.cat(logits[2:])
    assert without.std(0).max() < 1e-4 < 1e-2 < with_pictures.std(0).min()
    names = {"image", "image_1"} & seen[3].keys()
    assert len(names) == (2 if task == "nlvr2" else 1)
    assert all(seen[1][name].any() and not seen[3][name].any() for name in names)
    of_black = json.loads(files[f"{task}_val_black_scores.json"])
    assert len(json.loads(files[f"{task}_val_scores.json"])) == len(of_black) == 1


def test_black_pictures_have_files_of_their_own(world, tmp_path):
    """So a run without --blank, before or after, takes nothing away."""
    plain = evaluate(world, "caption", "flm", tmp_path / "plain", "--max-tokens", 5)
    both = evaluate(world, "caption", "flm", tmp_path / "both", "--max-tokens", 5, "--blank")
    assert plain.items() <= both.items()
    black = json.loads(both["captions_test_max-tokens5_black_results.json"])
    assert [row["image_id"] for row in black] == list(range(7))
    assert len({row["caption"] for row in black}) == 1              # there is nothing to tell apart
    scores = json.loads(both["captions_test_max-tokens5_black_scores.json"])
    assert list(scores) == ["no image"] and len(both) == len(plain) + 2


def test_runs_with_other_options_write_other_files(world, tmp_path):
    written = {}
    for options in ((), ("--beams", 2), ("--images", 3), ("--split", "val"),
                    ("--precision", "bf16"), ("--datasets", "mine"), ("--top-p", 0.5)):
        files = evaluate(world, "caption", "flm", tmp_path, "--max-tokens", 4, *options)
        files.pop("examples.json")                                  # the last run's
        assert len(files) == len(written) + 3 and written.items() <= files.items()
        written = files
    assert "captions_test_max-tokens4_datasets-mine_results.json" not in written    # in table order
    assert "captions_test_datasets-mine_max-tokens4_results.json" in written
    default = evaluate(world, "vqa", "flm", tmp_path / "vqa", "--batch-size", 7, "--examples", 2)
    assert default.keys() == {"vqa_val_results.json", "vqa_val_scores.json", "examples_val.json",
                              "examples.json"}


def test_the_first_images_get_the_captions_that_they_get_among_all(world, tmp_path, capsys):
    files = {count: evaluate(world, "caption", "flm", tmp_path / str(count), "--max-tokens", 5,
                             "--images", count) for count in (0, 3, 99)}
    everything, three, many = (json.loads(text) for some in files.values()
                               for name, text in some.items() if name.endswith("_results.json"))
    assert three == everything[:3] and many == everything
    assert "3 images, 6 references" in capsys.readouterr().out


@pytest.mark.parametrize("name, official", [
    ("COCO_val2014_000000391895.jpg", 391895), ("000000391895.jpg", 391895), ("391895", 391895),
    (391895, 391895), ("1000092795.jpg", "1000092795.jpg"),     # Flickr30k's
    ("1000268201_693b08cb0e.jpg", "1000268201_693b08cb0e.jpg"),
    ("COCO_dogs.jpg", "COCO_dogs.jpg"), ("dog", "dog"), ("", "")])
def test_cocos_images_have_their_numbers_and_others_keep_their_names(name, official):
    found = evaluation.official_id(name)
    assert found == official and type(found) is type(official)


def coco_world(world, folder, ids):
    """The test file of the world with other image ids, in a folder of its own."""
    columns = pa.ipc.open_file(str(world / "mine_caption_test.arrow")).read_all()
    where = columns.schema.names.index("image_id")
    folder.mkdir(exist_ok=True)
    arrow(folder / "mine_caption_test.arrow", columns.set_column(where, "image_id", [ids]))
    return columns["caption"].to_pylist()


def test_the_official_tools_take_the_captions_of_cocos_images(world, tmp_path):
    """COCO.loadRes, which COCOEvalCap and the server begin with, wants the ids of the images."""
    numbers = [391895, 522418, 184613, 318219, 554625, 574769, 60623]
    texts = coco_world(world, tmp_path / "data",
                       pa.array([f"COCO_val2014_{number:012}.jpg" for number in numbers]))
    annotations = [{"image_id": number, "id": 10 * number + k, "caption": text}
                   for number, some in zip(numbers, texts) for k, text in enumerate(some)]
    official = {"images": [{"id": number} for number in numbers], "annotations": annotations,
                "info": {}, "licenses": [], "type": "captions"}
    (tmp_path / "annotations.json").write_text(json.dumps(official))
    evaluate(world, "caption", "flm", tmp_path / "out", "--data", tmp_path / "data")
    path = tmp_path / "out/captions_test_results.json"
    results = json.loads(path.read_text())
    assert isinstance(results, list) and "caption" in results[0]
    assert {row["image_id"] for row in results} == set(numbers)     # what loadRes asserts
    coco = pytest.importorskip("pycocotools.coco", reason="the extra `metrics` is not installed")
    loaded = coco.COCO(tmp_path / "annotations.json").loadRes(str(path))
    assert sorted(loaded.getImgIds()) == sorted(numbers)
    eval_cap = pytest.importorskip("pycocoevalcap.eval", reason="only pycocotools is installed")
    assert sorted(eval_cap.COCOEvalCap(loaded, loaded).params["image_id"]) == sorted(numbers)


def test_image_ids_may_be_a_column_of_numbers(world, tmp_path):
    coco_world(world, tmp_path / "data", pa.array([9, 8, 7, 6, 5, 4, 3]))
    files = evaluate(world, "caption", "flm", tmp_path / "out", "--data", tmp_path / "data")
    results = json.loads(files["captions_test_results.json"])
    assert [row["image_id"] for row in results] == [9, 8, 7, 6, 5, 4, 3]


def test_half_precision_nearly_gives_float32s_answers(world, tmp_path):
    answers = {}
    for precision in ("fp32", "bf16", "fp16"):
        files = evaluate(world, "vqa", "flm", tmp_path / precision, "--precision", precision)
        name = "" if precision == "fp32" else f"_precision-{precision}"
        answers[precision] = json.loads(files[f"vqa_val{name}_results.json"])
    for precision in ("bf16", "fp16"):
        pairs = zip(answers["fp32"], answers[precision], strict=True)
        same = [a == b for a, b in pairs]
        assert sum(same) > 0.7 * len(same)
    files = evaluate(world, "caption", "flm", tmp_path / "captions", "--precision", "bf16",
                     "--max-tokens", 5, "--beams", 2)
    results = files["captions_test_max-tokens5_beams2_precision-bf16_results.json"]
    assert len(json.loads(results)) == 7


# -- single pictures, and what cannot be done ------------------------------------------------------

@pytest.fixture(scope="module")
def photo(world):
    (world / "photo.jpg").write_bytes(picture(1))
    (world / "other.png").write_bytes(picture(2, (30, 50), "PNG"))
    (world / "letter.txt").write_text("no picture at all")
    return world / "photo.jpg"


def test_ask_prints_the_likeliest_answers_of_the_checkpoints_own_list(world, photo, capsys):
    main("ask", world / "vqa-flm/last.pt", photo, "is the dog red?", "-k", 3)
    lines = [line.split(" %  ") for line in capsys.readouterr().out.splitlines()]
    shares = [float(share) for share, _ in lines]
    assert len(lines) == 3 and shares == sorted(shares, reverse=True)
    assert all(answer in ANSWERS for _, answer in lines)
    main("ask", world / "vqa-flm/last.pt", photo, "is the dog red?", "-k", 100)
    assert len(capsys.readouterr().out.splitlines()) == len(ANSWERS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_single_pictures_are_answered_in_any_precision(world, photo, capsys, precision):
    for command, model, *arguments in (
            ("describe", "caption-flm/last.pt", photo, "--beams", 2),
            ("compare", "nlvr2-flm/last.pt", photo, world / "other.png", "a dog"),
            ("search", "vilt.pt", "a dog", photo, world / "other.png"),
            ("rank", "vilt.pt", photo, "a dog", "a red cat")):
        main(command, world / model, *arguments, "--precision", precision, "--device", "cpu")
    described, compared, *found, first, second = capsys.readouterr().out.splitlines()
    assert described and compared.startswith(("True (", "False ("))
    scores = [float(line.split()[0]) for line in found]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    assert {first[10:], second[10:]} == {"a dog", "a red cat"}
    assert float(first[:8]) >= float(second[:8])
    main("fill", world / "flm.pt", photo, "a <mask> dog", "--precision", precision)
    printed = capsys.readouterr().out
    assert printed.startswith("a") and " dog\n" in printed and " %  " in printed


def test_search_takes_folders_and_patterns_and_names_what_is_no_picture(world, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.JPG").write_bytes(picture(number))
    (folder / "more/5.png").write_bytes(picture(5, format="PNG"))
    (folder / "broken.jpg").write_bytes(picture(6)[:300])
    (folder / "notes.txt").write_text("no picture, and not called one")

    def found(*arguments):
        main("search", world / "vilt.pt", "a dog", *arguments, "--device", "cpu")
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    everything, said = found(folder)
    assert len(everything) == 5 and "broken.jpg: not a picture" in said and "notes" not in said
    assert found(folder / "more", folder / "?.JPG", folder / "2.JPG")[0] == everything
    assert found(folder / "**/*.*", "-k", 3)[0] == everything[:3]
    assert "notes.txt: not a picture" in found(folder / "*")[1]
    with pytest.raises(SystemExit, match="^eval.py: .*broken.jpg: not a picture that can be read"):
        found(folder / "broken.jpg")
    (tmp_path / "empty").mkdir()
    for nothing, sentence in (("empty", "there are no pictures in it"),
                              ("*.gif", "there is no such picture")):
        with pytest.raises(SystemExit, match=f"^eval.py: .*{sentence}"):
            found(folder, tmp_path / nothing)


@pytest.mark.parametrize("arguments, sentence", [
    ("ask vqa-flm nowhere.jpg why?", "nowhere.jpg: there is no such picture"),
    ("ask vqa-flm letter.txt why?", "letter.txt: not a picture that can be read"),
    ("ask vqa-vilt photo.jpg " + "why," * 50, "a text of .* tokens; this model reads at most 24"),
    ("ask nlvr2-flm photo.jpg why?",
     "a model of task nlvr2 with head nlvr2; needed is what train.py --task vqa"),
    ("ask mlm photo.jpg why?",
     "a model of task pretrain with head vocab; needed is what train.py --task vqa"),
    ("ask vqa-flm photo.jpg why? -k 0", "0 answers: at least 1"),
    ("ask vqa-flm photo.jpg why? --precision int8", "--precision int8: one of fp32, bf16, fp16"),
    ("ask vqa-flm photo.jpg why? --device tpu", "--device tpu: cpu or cuda is expected"),
    ("compare vqa-flm photo.jpg photo.jpg dog", "needed is what train.py --task nlvr2"),
    ("compare nlvr2-vilt photo.jpg letter.txt dog", "letter.txt: not a picture that can be read"),
    ("describe vqa-flm photo.jpg", "needed is what train.py --task caption"),
    ("describe vilt photo.jpg", "needed is what train.py --task caption"),
    ("describe caption-flm letter.txt", "letter.txt: not a picture that can be read"),
    ("describe caption-flm photo.jpg --temperature 2",
     "--temperature 2.0: changes nothing without --top-p"),
    ("describe caption-flm photo.jpg --length-penalty 2",
     "--length-penalty 2.0: changes nothing without --beams"),
    ("describe caption-flm photo.jpg --top-p 0", "top_p 0.0: sampling needs a top_p of 0 < p <= 1"),
    ("describe caption-flm photo.jpg --max-tokens 99", "max_tokens 99 after a prompt of 1"),
    ("describe caption-flm photo.jpg --max-tokens 0", "max_tokens 0 after a prompt of 1"),
    ("describe caption-flm photo.jpg --beams 9999", "9999 beams: the vocabulary has"),
    ("search vqa-flm dog photo.jpg", "needed is what train.py --task retrieval"),
    ("search flm dog photo.jpg nowhere.jpg", "nowhere.jpg: there is no such picture"),
    ("search vilt dog photo.jpg -k -1", "-k -1: at least 0 is expected"),
    ("caption caption-flm --data . --images -1", "--images -1: at least 0 is expected"),
    ("fill flm photo.jpg dog", "there is no <mask> in 'dog'"),
    ("fill ar photo.jpg <mask>", "this is ar with head vocab"),
    ("fill vqa-flm photo.jpg <mask>", "this is flm with head vqa"),
    ("vqa caption-flm --data .", "needed is what train.py --task vqa"),
    ("vqa vqa-flm --data . --annotations letter.txt", "letter.txt: not JSON"),
    ("nlvr2 nlvr2-flm --data nowhere", "nowhere: there is no such directory"),
    ("caption flm --data .",
     "a model of task pretrain with head vocab; needed is what train.py --task caption"),
    ("caption caption-flm --data . --seed 2", "--seed 2: changes nothing without --top-p"),
    ("caption caption-flm --data . --examples -1", "--examples -1: at least 0"),
    ("retrieval flm --data . --images -1", "--images -1: at least 0 is expected"),
    ("retrieval flm --data . --captions -2", "--captions -2: at least 0 is expected"),
    ("retrieval flm --data . --batch-size 0", "--batch-size 0: at least 1 is expected"),
    ("retrieval flm --data . --split tset", "no caption files of split 'tset'"),
])
def test_what_cannot_be_done_is_said_in_a_sentence(world, photo, monkeypatch, arguments, sentence):
    monkeypatch.chdir(world)
    command, model, *more = arguments.split()
    path = f"{model}/last.pt" if "-" in model else f"{model}.pt"
    with pytest.raises(SystemExit, match=f"^eval.py: .*{sentence}"):
        main(command, path, *more)
    assert not (world / command).exists()       # no empty folder of results beside the checkpoint


def test_official_scores_without_their_tools_are_refused_first(world, monkeypatch):
    """Before a caption is written, which may take hours."""
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^eval.py: .*needs pycocoevalcap"):
        main("caption", world / "caption-flm/last.pt", "--data", "nowhere", "--official")


def test_checkpoints_without_a_tokenizer_need_a_folder_that_fits(world, photo, tmp_path, capsys):
    saved = weights.read(world / "caption-flm/last.pt")
    weights.save(tmp_path / "bare.pt", saved["model"], weights.config_of(saved), "caption", None)
    with pytest.raises(SystemExit, match="bare.pt carries no tokenizer: --tokenizer DIR"):
        main("describe", tmp_path / "bare.pt", photo)
    main("describe", world / "caption-flm/last.pt", photo)
    # <bos> and <eos> are added, and come last
    main("describe", tmp_path / "bare.pt", photo, "--tokenizer", world / "tok")
    ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == theirs
    BPE.train([" ".join(WORDS)] * 3, 310).save(tmp_path / "large")
    with pytest.raises(SystemExit, match="large: a tokenizer of .* tokens; the model knows"):
        main("describe", tmp_path / "bare.pt", photo, "--tokenizer", tmp_path / "large")


def test_every_flag_of_every_command_has_a_help_text(capsys):
    for function in evaluation.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main(function.__name__, "--help")
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "--precision" in text and "--device" in text
    for _, rows in evaluation.COMMANDS.values():
        for flag, default, about in [*rows, *evaluation.MODEL_FLAGS]:
            told = default is not None or "default: " in about or not flag.startswith("-")
            assert about and told, flag


# -- several processes -----------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(world, tmp_path):
    one = evaluate(world, "vqa", "flm", tmp_path / "one", "--batch-size", 3)
    printed = together(2, ["vqa", world / "vqa-flm/last.pt", "--data", world, "--device", "cpu",
                           "--out", tmp_path / "two", "--batch-size", 3], "eval")
    assert {path.name: path.read_text() for path in (tmp_path / "two").iterdir()} == one
    assert printed.count("2 rows have pictures that cannot be decoded") == 1
