"""What tools/probe.py asks of a model, and how it counts the answers."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_VILT, WORDS, caption, tiny, vilt_model, write_captions

import flm
import weights
from data import Captions
from tokenizer import BPE
from tools import probe

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out


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
@pytest.mark.parametrize("objective, both", [("flm", True), ("mlm", True), ("ar", False)])
def test_guesses_come_from_both_sides_where_the_objective_allows(objective, both):
    """A later word moves the scores of an earlier guess for flm and mlm, never for ar."""
    model, ids = tiny(objective=objective), caption(9, 9)
    visual, guesses = model.encode_image(torch.randn(1, 3, 24, 24)), set()
    for word in range(10, 90, 4):
        changed = torch.cat([ids[:, :7], torch.tensor([[word, 2]])], dim=1)
        guesses.add(tuple(probe.reconstruct(model, visual, changed)[0, 2:6].tolist()))
    assert (len(guesses) > 1) == both


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of data, groups of words, an FLM and a ViLT that nobody trained."""
    root = tmp_path_factory.mktemp("run")
    write_captions(root / "mine_caption_train.arrow", 4)
    write_captions(root / "mine_caption_test.arrow", 20, seed=3)
    tok = BPE.train([" ".join(WORDS)] * 3, 300)     # too few: some words are several tokens
    config = replace(tiny().config, vocab_size=len(tok), mask_id=tok.mask_id, pooler=False)
    save(root / "last.pt", flm.FLM(config), tok)
    save(root / "vilt.pt", vilt_model(replace(TINY_VILT, vocab_size=len(tok))), tok)
    groups = {"colours": ["red", "blue", "green"], "animals": ["dog", "cat"]}
    (root / "groups.json").write_text(json.dumps(groups))
    return root


def save(path, model, tok):
    weights.save(path, model.state_dict(), model.config, "pretrain", weights.pack_tokenizer(tok))


def main(*arguments):
    probe.main([str(argument) for argument in arguments])


def test_every_word_of_a_group_is_asked_and_wrong_answers_do_not_count(run, monkeypatch):
    table, model = Captions([run / "mine_caption_test.arrow"]), weights.load(run / "last.pt")
    groups = json.loads((run / "groups.json").read_text())
    expected = {name: sum(text.split().count(word) for text in table.texts() for word in words)
                for name, words in groups.items()}
    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: ids)
    result = probe.word_table(model, table, groups, batch=7)
    assert result["words"] == expected
    assert all(share == 1.0 for row in result["accuracy"].values() for share in row.values())

    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: torch.full_like(ids, 5))
    wrong = probe.word_table(model, table, groups)
    assert all(share == 0.0 for row in wrong["accuracy"].values() for share in row.values())


def test_each_column_of_the_table_sees_its_own_image(run, monkeypatch):
    table, seen = Captions([run / "mine_caption_test.arrow"]), []
    model = weights.load(run / "last.pt")

    def encode_image(images, which=0):
        seen.append(images)
        return images

    monkeypatch.setattr(model, "encode_image", encode_image)
    monkeypatch.setattr(probe, "reconstruct", lambda model, visual, ids: ids)
    probe.word_table(model, table, {"a": ["red"]}, batch=50)
    right, other, none = seen
    assert right.shape == other.shape and not none.any()
    assert all(not torch.equal(a, b) for a, b in zip(right, other, strict=True))


def test_the_words_command_writes_its_table_and_examples(run, capsys, tmp_path):
    for precision in ("fp32", "bf16"):
        main("words", run / "last.pt", "--data", run, "--splits", "test", "--device", "cpu",
             "--groups", run / "groups.json", "--precision", precision,
             "--out", tmp_path / f"{precision}.json")
    printed = capsys.readouterr().out
    assert "right image" in printed and "colours" in printed and "%" in printed
    written = json.loads((tmp_path / "fp32.json").read_text())["test"]
    assert set(written["accuracy"]["colours"]) == set(probe.IMAGES)
    assert len(written["examples"]) == 12
    assert written["examples"][0]["file"].endswith("mine_caption_test.arrow")
    assert json.loads((tmp_path / "bf16.json").read_text())["test"]["words"] == written["words"]


def test_the_align_command_writes_a_plan_for_every_token(run, tmp_path, capsys):
    main("align", run / "vilt.pt", "--data", run, "--captions", 5, "--out", tmp_path / "align.json")
    found = json.loads((tmp_path / "align.json").read_text())
    assert len(found) == 5 and "nearer to their own" in capsys.readouterr().out
    for one in found:
        assert len(one["plan"]) == len(one["tokens"])
        assert all(len(line) == one["grid"][0] * one["grid"][1] for line in one["plan"])
        assert sum(one["plan"][0]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name, maps", [
    ("last", {"reconstructed, layer 1", "left_to_right, rolled out", "right_to_left, layer 2"}),
    ("vilt", {"reconstructed, layer 1", "reconstructed, rolled out", "transport"})])
def test_the_look_command_writes_every_map_of_every_token(run, tmp_path, capsys, name, maps):
    main("look", run / f"{name}.pt", "--data", run, "--captions", 3, "--out",
         tmp_path / "look.json")
    found = json.loads((tmp_path / "look.json").read_text())
    assert len(found) == 3 and "3 captions" in capsys.readouterr().out
    for one in found:
        assert maps <= one["maps"].keys()
        for of_tokens in one["maps"].values():
            assert len(of_tokens) == len(one["tokens"])
            assert all(len(line) == one["grid"][0] * one["grid"][1] for line in of_tokens)


def test_a_model_of_nan_scores_no_words(run, tmp_path):
    """Its guesses would all be token 0, which would look like an accuracy of nothing."""
    for name in ("last", "vilt"):
        model = weights.load(run / f"{name}.pt")
        with torch.no_grad():
            model.vocab_head.decoder.bias.fill_(float("nan"))
            model.embed.word.weight.fill_(float("nan"))
        save(tmp_path / f"{name}.pt", model, model.tokenizer)
    sentence = "^probe.py: .*(last|vilt).pt: .* holds NaN or infinite numbers"
    with pytest.raises(SystemExit, match=sentence):
        main("words", tmp_path / "last.pt", "--data", run, "--groups", run / "groups.json")
    with pytest.raises(SystemExit, match=sentence):
        main("align", tmp_path / "vilt.pt", "--data", run)
    assert not list(tmp_path.glob("*.json"))


def test_what_cannot_be_done_is_said_in_a_sentence(run, tmp_path):
    (tmp_path / "letter.txt").write_text("no JSON")
    vqa = tiny(head="vqa", answers=3, vocab_size=300)
    weights.save(run / "vqa.pt", vqa.state_dict(), vqa.config, "vqa", None, answers=list("abc"))
    groups = ("--groups", run / "groups.json")
    for sentence, *arguments in (
            ("no such checkpoint", "words", tmp_path / "x.pt", *groups),
            ("toy_words.json", "words", run / "last.pt"),
            ("letter.txt: not JSON", "words", run / "last.pt", "--groups", tmp_path / "letter.txt"),
            ("no caption files of split 'val': mine has test, train",
             "words", run / "last.pt", *groups, "--splits", "val"),
            ("--captions 0: at least 1", "words", run / "last.pt", "--captions", "0"),
            ("needed is what train.py --task pretrain", "words", run / "vqa.pt", *groups),
            ("last.pt: word-patch alignment is ViLT's", "align", run / "last.pt"),
            ("--precision int8: one of fp32", "align", run / "vilt.pt", "--precision", "int8")):
        with pytest.raises(SystemExit, match=f"^probe.py: .*{sentence}"):
            main(*arguments, "--data", run)
