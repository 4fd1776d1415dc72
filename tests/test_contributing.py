"""The examples of CONTRIBUTING.md do what the page says, each on tiny models."""

import re
from pathlib import Path

import conftest
import pytest
import torch
from conftest import (ROOT, TRAIN_FLM, finetune, names_in, picture, prepare_main, train_command,
                      write_caption_world, write_world)

import masks
import predict
import recipes
import tasks
import train
import weights

STEPS = "--global-batch 16 --steps 1 --lr 1e-3 --eval-every 0".split()


def example(heading):
    """The code under a heading of the page."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page[page.index(f"\n## {heading}\n"):][4:].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.S)
    return code


@pytest.fixture(autouse=True)
def tables():
    """The tables that examples add a row to are as before after each test."""
    tables = tasks.TASKS, masks.OBJECTIVES, weights.BACKBONES, recipes.MODELS
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def test_a_task_of_the_page_trains_and_answers(tmp_path, monkeypatch):
    exec(example("A task"), {"__name__": "entailment"})
    monkeypatch.setattr(conftest, "ANSWERS", ["entailment", "neutral", "contradiction"])
    world = write_world(tmp_path)
    checkpoint = finetune(world, "entailment", "flm", tmp_path / "run")
    (tmp_path / "photo.jpg").write_bytes(picture(1))
    model = predict.open_model(checkpoint)
    assert model.task == "entailment"
    said = predict.ask(model, tmp_path / "photo.jpg", "a red dog")
    assert {answer for answer, _ in said} == set(conftest.ANSWERS)


def test_an_objective_of_the_page_trains_and_does_not_see_what_it_predicts(tmp_path):
    exec(example("An objective"), {})
    assert masks.predicting_rows("backwards", 5) == {"right_to_left": range(2, 5)}
    world = write_caption_world(tmp_path)
    train.main(train_command(world, tmp_path / "run", "--task", "pretrain", "--objective",
                             "backwards", *STEPS))
    model = weights.load(tmp_path / "run/last.pt")
    assert model.config.loss_weights == {"right_to_left": 1.0}
    ids = conftest.caption(9, 9)
    images = torch.zeros(1, 3, 16, 16)
    changed = ids.clone()
    changed[0, 3] += 1                      # row 4 predicts token 3
    outputs = [model.fuse(model.encode_image(images), model.encode_text(some)).right_to_left
               for some in (ids, changed)]
    same = (outputs[0] - outputs[1]).abs().amax(-1)[0] < 1e-6
    assert same.tolist() == [False, False, False, False, True, True, True, True, True]


def test_a_backbone_of_the_page_trains_and_opens_again(tmp_path):
    names = {"__name__": __name__}
    exec(example("A backbone"), names)
    world = write_caption_world(tmp_path)
    sizes = ["toy-stem" if word == "toy" else word for word in TRAIN_FLM]
    train.main(train_command(world, tmp_path / "run", "--task", "pretrain", *STEPS, sizes=sizes))
    model = weights.load(tmp_path / "run/last.pt")
    assert type(model) is names["StemFLM"] and model.config.stem == 16
    assert model.vit.patch[0].weight.shape == (16, 3, 3, 3)
    assert weights.backbone_of(model.config) == "stem"


def test_a_data_set_of_the_page_is_whole_and_is_trained_on(tmp_path, capsys):
    world, out = write_caption_world(tmp_path / "world"), tmp_path / "mine"
    out.mkdir()
    for seed, name in enumerate(("one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes(picture(seed))
    exec(example("A data set"), {"out": out, "photographs": tmp_path})
    assert names_in(out) == ["mine_caption_train.arrow"]
    prepare_main("check", out)
    assert "2" in capsys.readouterr().out
    train.main(train_command(out, tmp_path / "run", "--task", "pretrain", "--tokenizer",
                             world / "tok", *STEPS[2:],
                             "--global-batch", 2))
    assert Path(tmp_path / "run/last.pt").is_file()
