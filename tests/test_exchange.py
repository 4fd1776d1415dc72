"""Captions with one word exchanged as the wrong pairs of image-text matching."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, tiny, train_command as command, write_caption_world

import train
from data import Captions
from exchange import Exchange, ExchangedWords
from sources.shards import Writer
from storage.files import CAPTIONS
from tasks import PretrainFLM, to_device
from tokenizer import load
from tools import toy
from training.settings import parse


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("exchange"))


@pytest.fixture
def exchange(tmp_path):
    path = tmp_path / "exchange.json"
    path.write_text(json.dumps({"sides": ["left", "right"], "numbers": ["two", "three", "four"]}))
    return Exchange(path)


def test_one_word_is_exchanged_for_another_of_its_group_that_is_not_said_of_the_picture(exchange):
    rng = np.random.default_rng(0)
    found = {exchange("two stars, left of a ring", {"four"}, rng) for _ in range(50)}
    assert found == {"three stars, left of a ring", "two stars, right of a ring"}
    assert exchange("a leftover", set(), rng) is None
    assert exchange("two left", {"right", "three", "four"}, rng) is None


def test_the_groups_for_photographs_and_for_the_toy_world_open():
    photographs = Exchange(ROOT / "tools/exchange_en.json")
    assert photographs("a man", {"woman", "boy", "girl"}, np.random.default_rng(0)) == "a child"
    # one word stands for another in the same sentence, and no colour is exchanged
    for words in toy.EXCHANGE.values():
        assert len(words) > 1 and not set(words) & {*toy.COLOURS, *toy.KINDS}


@pytest.mark.parametrize("contents, message",
                         [({"sides": ["left"]}, "group 'sides'"),
                          ({"sides": "left right"}, "group 'sides'"),
                         (["left", "right"], "exchange.json"),
                          ({"sides": ["left", 3]}, "group 'sides'")])
def test_a_file_of_another_form_is_refused(tmp_path, contents, message):
    path = tmp_path / "exchange.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=message):
        Exchange(path)


def test_a_word_that_another_caption_of_the_image_says_is_not_put_in(tmp_path, exchange):
    picture = b"any bytes"
    with Writer(tmp_path / "x_caption_train.arrow", CAPTIONS) as out:
        for texts in (["two stars, left of a ring", "a ring right, four crosses"], ["two rings"]):
            out.write({"image": picture, "caption": texts, "image_id": texts[0], "split": "train"})
    dataset = ExchangedWords.__new__(ExchangedWords)
    dataset.table = Captions([tmp_path / "x_caption_train.arrow"])
    said = dataset.said(0)
    # commas belong to no word
    assert {"left", "right", "two", "four"} <= said and "rings" not in said
    found = {exchange("two stars, left of a ring", said, np.random.default_rng(k))
             for k in range(9)}
    assert found == {"three stars, left of a ring"}


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"all": WORDS}))
    return path


@pytest.mark.parametrize("objective", ["flm", "mlm", "ar"])
def test_matching_sees_the_own_image_with_the_exchanged_caption_and_another_image_with_the_own(
        world, tmp_path, words, objective):
    settings, _ = parse(command(world, tmp_path, "--itm", "--exchange", words))
    tok = load(world / "tok")
    model = tiny(objective=objective, itm=True, vocab_size=len(tok), mask_id=tok.mask_id)
    config = model.config
    task = PretrainFLM(replace(settings, pad_to=1), config, tok)
    dataset = task.dataset(task.table(settings, "train"), True)
    samples = dataset.samples([(0, i) for i in range(0, 40, 2)])
    batch, notes = task.collate(samples)
    own = torch.arange(len(samples))
    hard = batch["other_image"] == own
    assert 4 < hard.sum() < 16 and not batch["same_image"].any()
    assert notes["counts"]["itm"] == 2 * len(samples)
    for b, sample in enumerate(samples):
        shown = batch["wrong_ids"][b][batch["wrong_ids"][b] != config.pad_id].tolist()
        assert shown == (sample["wrong_ids"] if hard[b] else sample["ids"])
        right, wrong = (tok.decode(ids).split()
                        for ids in (sample["ids"][1:-1], sample["wrong_ids"][1:-1]))
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
    # The loss is that of the 2B pairs, each scored alone.
    batch = to_device(batch, torch.device("cpu"), config)
    loss, hits = model(batch)["itm"]
    with torch.no_grad():
        visual = model.encode_image(batch["image"])
        pairs = [(ids, b) for b, ids in enumerate(batch["ids"])]
        pairs += [(ids, int(m))
                  for ids, m in zip(batch["wrong_ids"], batch["other_image"], strict=True)]
        scores = []
        for ids, m in pairs:
            text = model.encode_text(ids[ids != config.pad_id][None])
            fused = model.fuse(visual[m:m + 1], text)
            scores.append(model.itm_head(fused.pooled))
        scores = torch.cat(scores)
    targets = torch.tensor([1] * len(samples) + [0] * len(samples))
    expected = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert hits.item() == (scores.argmax(1) == targets).sum()


@pytest.mark.parametrize("more, message",
                         [((), "is for FLM's image-text matching"),
                          (("--itm", "--exchange", "/nowhere"), "--exchange /nowhere")])
def test_exchange_without_matching_or_file_is_refused(world, tmp_path, words, more, message):
    with pytest.raises(SystemExit, match=message):
        train.main(command(world, tmp_path / "run", "--steps", 1, "--exchange", words, *more))
