"""Models by name.

The door to them, the cards that tools/cards.py measures, and what lies in models/.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import TRAIN_FLM, WORDS, picture, tiny, write_captions

import eval
import train
import weights
from released import named
from tokenizer import BPE
from tools import cards, probe, toy

SIZE = 20_000_000               # bytes of all models together


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the working directory, with models/ of its own: one untrained "small"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "MODELS", tmp_path / "models")
    tok = BPE.train([" ".join(WORDS)] * 3, 300)
    model = tiny(vocab_size=len(tok), mask_id=tok.mask_id, pooler=False)
    weights.save("small.pt", model.state_dict(), model.config, "pretrain",
                 weights.pack_tokenizer(tok))
    weights.save_model(named.MODELS / "small.safetensors", weights.load("small.pt"), half=True)
    return tmp_path


# -- the door --------------------------------------------------------------------------------------

def test_a_name_opens_the_model_of_models_in_float32_equal_to_its_halves(here):
    whole, model = weights.load("small.pt").state_dict(), weights.load("small")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name].half().float())
    # they were rounded
    assert not torch.equal(model.embed.word.weight, whole["embed.word.weight"])
    tok = weights.load("small.pt").tokenizer
    assert model.tokenizer.encode("a red cat") == tok.encode("a red cat")


def test_a_path_that_exists_wins_over_a_name(here):
    os.rename("small.pt", "small")
    words = weights.load("small").embed.word.weight
    assert words.equal(weights.load(here / "small").embed.word.weight)
    assert named.locate("small") == Path("small")


def test_an_unknown_name_is_told_those_that_there_are(here, monkeypatch):
    weights.save_model(named.MODELS / "other.safetensors", weights.load("small"))
    sentence = (r"smal: there is no such checkpoint, "
                r"and no model of this name \(models/ has other, small\)")
    with pytest.raises(FileNotFoundError, match=sentence):
        weights.load("smal")
    with pytest.raises(FileNotFoundError, match="^x/smal: there is no such checkpoint$"):
        weights.load("x/smal")
    monkeypatch.setattr(named, "MODELS", here / "nothing")
    with pytest.raises(FileNotFoundError, match="models/ has none; `make models` makes them"):
        weights.load("small")


def test_every_command_takes_a_name_and_writes_into_runs(here, capsys):
    write_captions(here / "mine_caption_train.arrow", 8)
    write_captions(here / "mine_caption_test.arrow", 6, seed=2)
    (here / "groups.json").write_text(json.dumps({"colours": ["red", "blue"]}))
    (here / "x.jpg").write_bytes(picture(0))
    weights.main(["info", "small"])
    weights.main(["convert", "small", "again.pt"])
    eval.main(["fill", "small", "x.jpg", "a <mask> cat"])
    probe.main(["words", "small", "--data", str(here), "--splits", "test", "--groups",
                "groups.json"])
    assert (here / "runs/models/small/words.json").is_file()
    train.main(["--task", "caption", "--load", "small", "--data", str(here), "--out", "tuned",
                "--steps", "1", "--global-batch", "2",
                "--device", "cpu", "--workers", "0", "--eval-every", "0"])
    eval.main(["caption", "tuned/last.pt", "--data", str(here)])
    assert (here / "tuned/caption").is_dir()            # of a path: beside it, as ever
    capsys.readouterr()
    for main, command in ((eval.main, ["fill", "smal", "x.jpg", "a"]),
                          (weights.main, ["info", "smal"]),
                          (train.main,
                           ["--task", "caption", "--load", "smal", "--data", str(here), "--out",
                            "y"])):
        with pytest.raises(SystemExit,
                           match="smal: there is no such checkpoint, and no model of this name"):
            main(command)


def test_weights_beyond_half_precision_are_refused(here):
    model = weights.load("small.pt")
    with torch.no_grad():
        model.embed.word.weight[3, 3] = 70_000.0
    sentence = "x.safetensors: in half precision: embed.word.weight holds NaN or infinite"
    with pytest.raises(ValueError, match=sentence):
        weights.save_model("x.safetensors", model, half=True)
    assert not Path("x.safetensors").exists()


# -- cards -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 scenes of the toy world to train on, and 100 of each other split."""
    out = tmp_path_factory.mktemp("world")
    toy.make(out, images=40, eval_images=100, workers=1)
    return out


def common_flags(world):
    return ["--data", str(world), "--steps", "2", "--global-batch", "8", "--device", "cpu",
            "--workers", "0",
            "--eval-every", "0", "--max-tokens", "40"]


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Runs of two steps in runs/: toy, and toy-vqa that starts from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(named, "MODELS", tmp_path / "models")
    common = common_flags(world)
    for command in (["--task", "pretrain", *TRAIN_FLM, *common, "--out", "runs/toy"],
                    ["--task", "vqa", "--load", "runs/toy/last.pt", *common, "--out",
                     "runs/toy-vqa"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *command])        # config.json keeps it
        train.main(command)
    return tmp_path / "runs"


@pytest.mark.slow
def test_a_card_has_what_was_measured_and_is_refused_when_it_lies_by_four_points(
        run, world, capsys):
    for name in ("toy", "toy-vqa"):
        cards.main(["make", f"runs/{name}", name, "--data", str(world)])
        file = named.MODELS / f"{name}.safetensors"
        text = file.with_suffix(".md").read_text()
        assert text == cards.card_text(file)
    cards.main(["check", "toy-vqa", "--data", str(world)])
    contents = weights.read(file)
    assert text.index("--task pretrain") < text.index("--task vqa") and text.count("# 2 steps") == 2
    row = contents["card"]["scores"][0]
    assert f"| test | answers | {100 * row['shares']['right image']:.1f} % |" in text
    row["shares"]["right image"] += 0.04
    found = cards.measure(file, world, ("test",))
    lines = cards.differences(contents["card"], found)
    assert len(lines) == 1 and lines[0].startswith("test, answers, right image: ")


@pytest.mark.slow
@pytest.mark.parametrize("task, asked, pictures, more", [
    ("nlvr2", {"statements": 50}, 2, []), ("caption", {"captions that are true": 100}, 2, []),
    ("retrieval", {"the picture of a text of 100": 100, "the text of a picture of 100": 100}, 1,
     ["--false-captions", "2"])])
def test_every_task_has_scores_for_its_card(task, asked, pictures, more, world, tmp_path,
                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--task", "pretrain", *TRAIN_FLM, *common_flags(world), "--out", "toy"])
    train.main(["--task", task, "--load", "toy/last.pt", *common_flags(world), "--out", "tuned",
                *more])
    found = cards.measure("tuned/last.pt", world, ("test",))
    assert {row["score"]: row["asked"] for row in found} == asked
    assert all(len(row["shares"]) == pictures and 0 <= min(row["shares"].values()) <= 1
               for row in found)
    assert cards.score_table(found).count("\n") == 1 + len(asked)


def test_what_no_card_can_be_made_of_is_a_sentence(here, run, world):
    for message, arguments in (("a name of letters", ["runs/toy", "../x"]),
                               ("no such checkpoint", ["runs/none", "x"]),
                               ("config.json", ["loose", "x"])):
        Path("loose").mkdir(exist_ok=True)
        os.replace("small.pt", "loose/last.pt") if Path("small.pt").exists() else None
        with pytest.raises(SystemExit, match=f"^cards.py: .*{message}"):
            cards.main(["make", *arguments, "--data", str(world)])
    with pytest.raises(SystemExit, match="carries no card"):
        cards.main(["show", "small"])


# -- what lies in models/ --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The first 300 scenes of the toy world's evaluation splits, drawn anew."""
    out = tmp_path_factory.mktemp("scenes")
    toy.make(out, images=1, eval_images=300, workers=1)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", named.model_names() or [None])
def test_each_model_opens_and_its_card_holds_on_scenes_drawn_now(name, request):
    if name is None:
        pytest.skip("models/ has no models: `make models` makes them")
    file = named.locate(name)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == cards.card_text(file)
    assert weights.load(name).tokenizer is not None
    found = cards.measure(file, request.getfixturevalue("scenes"), ("test",), captions=150)
    assert len(found) * len(found[0]["shares"]) >= 2
    assert cards.differences(cards.card_of(file), found) == []


def test_models_are_small():
    sizes = {file.name: file.stat().st_size for file in named.MODELS.glob("*.safetensors")}
    if not sizes:
        pytest.skip("models/ has no models: `make models` makes them")
    assert max(sizes.values()) <= cards.LARGEST and sum(sizes.values()) <= SIZE, sizes
