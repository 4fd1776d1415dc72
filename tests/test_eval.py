"""What eval.py asks of a model, and how it counts the answers."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import WORDS, write_captions
from test_flm import caption, tiny

import eval as evaluation
import flm
import probe
import weights
from data import Captions
from tokenizer import BPE


@pytest.mark.parametrize("objective", flm.OBJECTIVES)
@torch.no_grad()
def test_no_guess_knows_the_word_it_guesses(objective):
    model, n = tiny(objective=objective), 9
    visual, ids = model.encode_image(torch.randn(1, 3, 24, 24)), caption(n, 12)
    base = probe.reconstruct(model, visual, ids)
    first = 2 if objective in ("ar", "prefix") else 1
    for i in range(first, n - 1):
        for word in (50, 60, 70):
            changed = ids.clone()
            changed[0, i] = word
            assert probe.reconstruct(model, visual, changed)[0, i] == base[0, i]


@torch.no_grad()
def test_guesses_come_from_both_sides_where_the_objective_allows():
    """A later word moves the scores of an earlier guess for flm and mlm, never for ar."""
    for objective, both in (("flm", True), ("mlm", True), ("ar", False)):
        model, ids = tiny(objective=objective), caption(9, 9)
        visual = model.encode_image(torch.randn(1, 3, 24, 24))
        guesses = {tuple(probe.reconstruct(model, visual, torch.cat([ids[:, :7], torch.tensor([[w, 2]])], 1))[0, 2:6].tolist())
                   for w in range(10, 90)}
        assert (len(guesses) > 1) == both


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_captions(root / "mine_caption_train.arrow", 4)
    write_captions(root / "mine_caption_test.arrow", 20, seed=3)
    tok = BPE.train([" ".join(WORDS)] * 3, 300)         # too few for all words: some are several tokens
    config = replace(tiny().config, vocab_size=len(tok), mask_id=tok.mask_id, pooler=False)
    model = flm.FLM(config)
    weights.save(root / "last.pt", model.state_dict(), config, "pretrain", weights.pack_tokenizer(tok), step=0)
    (root / "groups.json").write_text(json.dumps({"colours": ["red", "blue", "green"], "animals": ["dog", "cat"]}))
    return root


def test_every_word_of_a_group_is_asked_and_wrong_answers_do_not_count(run, monkeypatch):
    table = Captions([run / "mine_caption_test.arrow"])
    model, groups = weights.load(run / "last.pt"), json.loads((run / "groups.json").read_text())
    expected = {name: sum(text.split().count(w) for text in table.texts() for w in words) for name, words in groups.items()}
    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: ids)
    result = evaluation.word_table(model, table, groups, torch.device("cpu"), batch=7)
    assert result["words"] == expected
    assert all(share == 1.0 for row in result["accuracy"].values() for share in row.values())
    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: torch.where(ids == ids.roll(1, 1), ids, 5))
    wrong = evaluation.word_table(model, table, groups, torch.device("cpu"))
    assert all(share == 0.0 for row in wrong["accuracy"].values() for share in row.values())


def test_each_column_of_the_table_sees_its_own_image(run, monkeypatch):
    table, seen = Captions([run / "mine_caption_test.arrow"]), []
    model = weights.load(run / "last.pt")
    monkeypatch.setattr(model, "encode_image", lambda images, which=0: seen.append(images) or images)
    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: ids)
    evaluation.word_table(model, table, {"a": ["red"]}, torch.device("cpu"), batch=50)
    right, other, none = seen
    assert right.shape == other.shape and not none.any()
    assert all(not torch.equal(a, b) for a, b in zip(right, other))


def test_the_words_command_writes_its_table_and_examples(run, capsys):
    evaluation.main(["words", str(run / "last.pt"), "--data", str(run), "--splits", "test", "--groups", str(run / "groups.json")])
    printed = capsys.readouterr().out
    assert "right image" in printed and "colours" in printed and "%" in printed
    written = json.loads((run / "words.json").read_text())["test"]
    assert set(written["accuracy"]["colours"]) == set(evaluation.IMAGES) and len(written["examples"]) == 12
    assert written["examples"][0]["file"].endswith("mine_caption_test.arrow")


def test_missing_files_are_named_in_a_sentence(run, tmp_path):
    with pytest.raises(SystemExit, match="no such checkpoint"):
        evaluation.main(["words", str(tmp_path / "x.pt"), "--data", str(run)])
    with pytest.raises(SystemExit, match="toy_words.json: a JSON file"):
        evaluation.main(["words", str(run / "last.pt"), "--data", str(run)])
