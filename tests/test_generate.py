"""Cached decoding against uncached, the original's recorded captions, transformers, brute force."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import flm
import layers
import vilt
import weights
from generate import (Cached, Uncached, beam_search, forbid_repeats, generate, nucleus_sample,
                      uncached_logits)

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

TOL = dict(atol=1e-5, rtol=0)
FIXTURE = Path(__file__).parent / "fixtures" / "seed3_downstream.pt"
BOS, STOP = 5, [2, 6]
SMALL = flm.Config(objective="ar", image_size=24, patch_size=8, vit_width=32, vit_layers=1,
                   vit_heads=2, vocab_size=23, text_width=32, text_layers=2, text_heads=4,
                   max_positions=22, mask_id=4, width=32, heads=4, fusion_layers=2, dropout=0.1,
                   pooler=False)
NARROW = dict(text_width=12, text_heads=3, width=20, heads=5, text_layers=1, fusion_layers=3)
SHALLOW = dict(text_layers=0, fusion_layers=1, heads=1, vit_layers=0, pooler=True)
# Odd ones: other widths for text and fusion, layers and heads of all numbers, oblong pictures. And
# seeds with which captions are of many lengths.
SHAPES = {
    "small": (SMALL, (24, 24), 3),
    "narrow": (replace(SMALL, **NARROW), (16, 40), 0),
    "shallow": (replace(SMALL, **SHALLOW), (8, 8), 3),
}


@torch.no_grad()
def make(shape="small", images=5, seed=None):
    """A model with weights so large, and stop tokens so likely, that captions differ and end.

    -> (model, encoded pictures)
    """
    config, size, good_seed = SHAPES[shape]
    torch.manual_seed(good_seed if seed is None else seed)
    model = flm.FLM(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    model.embed.position.weight.mul_(5)
    model.embed.word.weight.mul_(5)
    model.vocab_head.decoder.bias[STOP] += 1.5
    return model, model.encode_image(torch.randn(images, 3, *size)) * 2


WAYS = {
    "greedy": {}, "no word twice": dict(no_repeat=1), "no pair twice": dict(no_repeat=2),
    "a prefix": dict(prompt=[BOS, 9, 7, 9]),
    "beams": dict(beams=3),
    "long beams": dict(beams=4, length_penalty=2.0, no_repeat=2, prompt=[BOS, 8]),
    "sampling": dict(top_p=0.8, seeds=[3, 1, [4, 1], 5, 9]),
    "hot": dict(top_p=1.0, temperature=2.0, seeds=range(5)),
}


def write(model, visual, prompt=(BOS,), stop=STOP, max_tokens=12, **more):
    return generate(model, visual, list(prompt), stop, max_tokens, **more)


# -- the cache -------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_uncached_ones_whatever_rows_are_kept(shape):
    model, visual = make(shape, images=3)
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 23, (3, 4), generator=chance)        # a prompt of four tokens each
    decoders = Cached(model, visual), Uncached(model, visual)
    # two captions of each image, then four; the first image leaves; the same rows in another order
    steps = ([0, 0, 1, 1, 2, 2], [0, 1, 2]), ([4, 5, 4, 4], [2]), ([3, 1, 1, 0], [0]), ([2], [0])
    for rows, images in steps:
        logits, expected = (decoder.next_logits(ids) for decoder in decoders)
        torch.testing.assert_close(logits, expected, **TOL)
        for decoder in decoders:
            decoder.select(torch.tensor(rows), torch.tensor(images))
        ids = torch.cat([ids[rows], torch.randint(2, 23, (len(rows), 1), generator=chance)], dim=1)
    expected = uncached_logits(model, visual[2:], ids)
    torch.testing.assert_close(decoders[0].next_logits(ids), expected, **TOL)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_captions_with_and_without_cache_are_the_same(shape, way):
    model, visual = make(shape)
    captions, scores = write(model, visual, **WAYS[way])
    expected, expected_scores = write(model, visual, **WAYS[way], cache=False)
    assert captions == expected
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=0)
    assert len(set(map(tuple, captions))) > 1                           # the pictures matter


def test_every_word_is_computed_once_and_the_image_too(monkeypatch):
    model, visual = make()
    rows, images = [], []
    model.embed.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:2]))
    original_function = layers.Attention.keys_and_values

    def keys_and_values(self, memory):
        if memory is visual:
            images.append(len(memory))
        return original_function(self, memory)

    monkeypatch.setattr(layers.Attention, "keys_and_values", keys_and_values)
    write(model, visual, [BOS, 7, 8], stop=[], max_tokens=6, beams=3)
    assert rows == [(5, 3)] + [(15, 1)] * 5         # the prompt once, then one word a step
    assert images == [5, 5]                         # once in each of the two fusion layers


def test_captions_that_ended_leave_the_batch():
    model, visual = make()
    sizes = []
    model.embed.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    captions, _ = write(model, visual)
    lengths = [len(caption) for caption in captions]
    assert len(set(lengths)) > 2
    # A caption of 12 words has no stop token: it was cut.
    assert sizes == [sum(length >= step for length in lengths) for step in range(12)]


@torch.no_grad()
def test_bfloat16_writes_captions_and_stays_near():
    model, visual = make()
    with torch.autocast("cpu", torch.bfloat16):
        for way in WAYS.values():
            assert len(write(model, visual, **way)[0]) == 5
        cached, ids = Cached(model, visual), torch.full((5, 1), BOS)
        for word in range(7, 12):
            logits, expected = cached.next_logits(ids), uncached_logits(model, visual, ids)
            assert (logits - expected).abs().max() < 0.03 * expected.abs().max()
            ids = torch.cat([ids, torch.full((5, 1), word)], dim=1)


# -- against others --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The original's captioning model, what it saw, and what was recorded of it."""
    recorded = torch.load(FIXTURE, weights_only=True)["tasks"]["caption"]
    path = tmp_path_factory.mktemp("generate") / "caption.ckpt"
    torch.save({"state_dict": recorded["state_dict"],
                "hyper_parameters": {"config": recorded["config"]},
                "pytorch-lightning_version": "1.3.2"}, path)
    model = weights.load(path, vit_heads=2)
    with torch.no_grad():
        return model, model.encode_image(recorded["inputs"]["image"][0]), recorded


def test_captions_equal_the_original(original):
    model, visual, recorded = original
    for max_tokens, name in ((recorded["max_text_len"], "captions"), (30, "captions_max30")):
        captions, _ = generate(model, visual, recorded["prompt_ids"], recorded["stop_ids"],
                               max_tokens)
        assert captions == recorded["outputs"][name]
    assert [len(caption) for caption in captions][0] == recorded["outputs"]["ava_len"][0]


@torch.no_grad()
def test_logits_equal_the_original(original):
    model, visual, recorded = original
    ids, logits = recorded["outputs"]["pred_ids"], recorded["outputs"]["step_logits"]
    cached = Cached(model, visual)
    for n in range(1, 13):
        going = n - 1 <= recorded["outputs"]["ava_len"]     # past the end, nothing has a meaning
        found = cached.next_logits(ids[:, :n])[going]
        torch.testing.assert_close(found, logits[going, n - 1], **TOL)


@pytest.mark.parametrize("way", [way for way in WAYS if "top_p" not in WAYS[way]])
def test_captions_of_the_original_with_and_without_cache(original, way):
    model, visual, recorded = original
    settings = WAYS[way] | dict(prompt=recorded["prompt_ids"], stop=recorded["stop_ids"],
                                max_tokens=30)
    assert write(model, visual, **settings)[0] == write(model, visual, **settings, cache=False)[0]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("settings", [
    {}, dict(no_repeat=2), dict(beams=2), dict(beams=3, length_penalty=0.0),
    dict(beams=3, length_penalty=2.0, no_repeat=2),
    dict(beams=5, length_penalty=0.6), dict(beams=5, no_repeat=1)])
def test_captions_equal_those_of_generate_in_transformers(transformers, settings):
    class Theirs(transformers.PreTrainedModel, transformers.GenerationMixin):
        def __init__(self, model, visual):
            super().__init__(transformers.PretrainedConfig(vocab_size=23))
            self.model, self.visual = model, visual

        def forward(self, input_ids, **_):
            return transformers.modeling_outputs.CausalLMOutput(
                logits=uncached_logits(self.model, self.visual, input_ids)[:, None])

    lengths = set()
    for seed in range(4):
        model, visual = make(seed=seed, images=6)
        ids = Theirs(model, visual).generate(
            torch.full((6, 1), BOS), max_new_tokens=9, num_beams=settings.get("beams", 1),
            do_sample=False, use_cache=False,
            length_penalty=settings.get("length_penalty", 1.0),
            no_repeat_ngram_size=settings.get("no_repeat", 0),
            eos_token_id=STOP, pad_token_id=1, bos_token_id=BOS, suppress_tokens=[1])
        expected = [[t for t in row[1:] if t not in (1, *STOP)] for row in ids.tolist()]
        assert write(model, visual, max_tokens=9, **settings)[0] == expected
        lengths |= set(map(len, expected))
    assert len(lengths) >= 3                        # beams ended early, late, and were cut


def test_repeats_are_forbidden_as_in_transformers(transformers):
    chance = torch.Generator().manual_seed(0)
    for size, n in product((1, 2, 3), (1, 2, 3, 12)):
        ids = torch.randint(0, 4, (50, n), generator=chance)
        logits = torch.randn(50, 4, generator=chance)
        theirs = transformers.NoRepeatNGramLogitsProcessor(size)(ids, logits)
        assert torch.equal(forbid_repeats(logits, ids, size), theirs)


@pytest.mark.parametrize("top_p, temperature", [(0.3, 1.0), (0.9, 0.5), (1.0, 1.0), (0.75, 3.0)])
def test_samples_have_the_probabilities_of_transformers(transformers, top_p, temperature):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = -torch.inf
    warmed = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    theirs = transformers.TopPLogitsWarper(top_p)(None, warmed)
    draws = (torch.arange(20_000).double() + 0.5) / 20_000      # chance itself, evenly spread
    tokens = nucleus_sample(logits.expand(len(draws), -1), draws, top_p, temperature)
    shares = tokens.bincount(minlength=40) / len(draws)
    torch.testing.assert_close(shares, theirs.softmax(-1)[0], atol=2 / len(draws), rtol=0)
    edge = nucleus_sample(logits, torch.tensor([np.nextafter(1.0, 0.0)]), top_p, temperature)
    assert theirs[0, edge] > -torch.inf


# -- against what they mean ------------------------------------------------------------------------

def log_probability(model, visual, tokens):
    """Of `<bos>` and these tokens, `<bos>` not counted: read in one piece, as in training."""
    ids = torch.tensor([[0, BOS, *tokens]])
    with torch.no_grad():
        fused = model.fuse(visual, model.encode_text(ids))
        log_probs = model.vocab_logits(fused.left_to_right).log_softmax(-1)
    return sum(log_probs[0, i + 1, token].item() for i, token in enumerate(tokens))


def test_a_search_that_is_wide_enough_finds_the_best_of_all_captions():
    torch.manual_seed(3)
    model = flm.FLM(replace(SMALL, vocab_size=7, text_layers=1, fusion_layers=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        visual = model.encode_image(torch.randn(3, 3, 24, 24)) * 2
    words = [0, 3, 4, 5]                            # all but padding and the two that stop
    captions = [[*body, end] for n in range(3) for body in product(words, repeat=n) for end in STOP]
    captions += [list(body) for body in product(words, repeat=3)]       # these are cut
    sums = [[log_probability(model, visual[image:image + 1], caption) for caption in captions]
            for image in range(3)]
    chosen = set()
    for penalty in (-1.0, 0.0, 0.5, 1.0, 3.0):
        found, scores = write(model, visual, max_tokens=3, beams=100, length_penalty=penalty)
        for image in range(3):
            scored = [total / len(caption) ** penalty
                      for total, caption in zip(sums[image], captions, strict=True)]
            best = scored.index(max(scored))
            assert found[image] == [t for t in captions[best] if t not in STOP]
            assert scores[image] == pytest.approx(sums[image][best], abs=1e-5)
            chosen.add(best)
    assert len({len(captions[i]) for i in chosen}) > 1                  # the penalty matters


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_the_log_probabilities_of_the_captions(way):
    model, visual = make()
    more = WAYS[way] | dict(prompt=[BOS])
    captions, scores = write(model, visual, **more, max_tokens=6)
    for image, (caption, score) in enumerate(zip(captions, scores, strict=True)):
        ends = [[]] if len(caption) == 6 else [[stop] for stop in STOP]     # cut, or one of them
        sums = [log_probability(model, visual[image:image + 1], caption + end) for end in ends]
        assert any(score == pytest.approx(total, abs=1e-4) for total in sums)


def test_one_beam_is_greedy():
    model, visual = make(images=8)
    for no_repeat in (0, 2):
        ids, stop = torch.full((8, 1), BOS), torch.tensor(STOP)
        with torch.inference_mode():
            captions, scores = beam_search(Cached(model, visual), ids, stop, 12, no_repeat, 1, 1.0)
        expected, expected_scores = write(model, visual, no_repeat=no_repeat)
        assert captions == expected
        torch.testing.assert_close(scores, expected_scores, **TOL)


@pytest.mark.parametrize("way", WAYS)
def test_a_caption_does_not_depend_on_the_batch(way):
    model, visual = make()
    captions, _ = write(model, visual, **WAYS[way])
    for image in range(5):
        more = dict(WAYS[way])
        if "seeds" in more:
            more["seeds"] = more["seeds"][image:image + 1]
        assert write(model, visual[image:image + 1], **more)[0] == captions[image:image + 1]


def test_other_seeds_say_other_things():
    model, visual = make()
    first, again, other = (write(model, visual, top_p=0.9, seeds=seeds)[0]
                           for seeds in (range(5), range(5), range(5, 10)))
    assert first == again and sum(a != b for a, b in zip(first, other, strict=True)) >= 3


def test_beams_find_likelier_captions():
    model, visual = make(images=20)
    greedy, beams = (sum(write(model, visual, beams=n, length_penalty=0.0)[1]) for n in (1, 6))
    assert beams > greedy + 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_repeat_means_no_repeat(size, beams):
    model, visual = make()

    def has_repeat(row):
        grams = [tuple(row[i:i + size]) for i in range(len(row) - size + 1)]
        return len(grams) > len(set(grams))

    settings = dict(stop=[], max_tokens=15, beams=beams)
    assert any(map(has_repeat, write(model, visual, **settings)[0]))
    assert not any(map(has_repeat, write(model, visual, **settings, no_repeat=size)[0]))


def test_a_prompt_of_words_is_continued():
    model, visual = make()
    captions, _ = write(model, visual)
    for image, caption in enumerate(captions):
        for n in range(1, len(caption)):
            rest, _ = write(model, visual[image:image + 1], [BOS, *caption[:n]], max_tokens=12 - n)
            assert rest == [caption[n:]]
    assert max(map(len, captions)) > 4


@pytest.mark.parametrize("way", WAYS)
def test_padding_is_never_said(way):
    model, visual = make()
    with torch.no_grad():
        model.vocab_head.decoder.bias[1] = 50.0
    captions, _ = write(model, visual, **WAYS[way])
    assert not any(1 in caption for caption in captions) and any(captions)


# -- what cannot be --------------------------------------------------------------------------------

def test_the_last_position_is_used_and_no_further_one_asked_for():
    model, visual = make()
    for prompt in ([BOS], [BOS, 7, 8]):
        most = 20 - len(prompt)
        (first, *_), _ = write(model, visual, prompt, stop=[], max_tokens=most)
        assert len(first) == most and 1 + len(prompt) + most - 1 == model.config.max_tokens
        with pytest.raises(ValueError, match=f"max_tokens {most + 1} after a prompt of "
                                             f"{len(prompt)}.* at most {most} "):
            write(model, visual, prompt, max_tokens=most + 1)


@pytest.mark.parametrize("more, sentence", [
    (dict(prompt=[]), "at least one id"), (dict(prompt=[BOS, 1]), "no padding"),
    (dict(prompt=[23]), r"0\.\.22"), (dict(prompt=[-1]), r"0\.\.22"),
    (dict(max_tokens=0), "max_tokens 0"), (dict(beams=0), "beams 0"),
    (dict(no_repeat=-1), "no_repeat -1"),
    (dict(top_p=0.9), "one for each of the 5 images"),
    (dict(top_p=0.9, seeds=[1]), "one for each of the 5 images"),
    (dict(top_p=0.0, seeds=range(5)), "top_p 0.0"),
    (dict(top_p=0.9, seeds=range(5), temperature=0.0), "temperature 0.0"),
    (dict(top_p=0.9, seeds=range(5), beams=2), "beams 2")])
def test_settings_that_make_no_sense_are_one_sentence(more, sentence):
    model, visual = make()
    with pytest.raises(ValueError, match=sentence):
        write(model, visual, **more)


def test_models_that_write_no_captions_are_told_how_to_make_one():
    _, visual = make()
    tiny_vilt = vilt.Config(image_size=32, patch_size=16, width=32, layers=1, heads=2,
                            vocab_size=110)
    reconstructs = replace(SMALL, objective="flm", reconstructor_text_layers=1,
                           reconstructor_fusion_layers=1)
    for model, words in ((vilt.ViLT(tiny_vilt), "a ViLT"), (flm.FLM(reconstructs), "objective flm"),
                         (flm.FLM(replace(SMALL, head="none")), "head none")):
        with pytest.raises(ValueError, match=f"train.py --task caption.*{words}"):
            write(model.eval(), visual)
    model, visual = make()
    with pytest.raises(ValueError, match="eval mode"):
        write(model.train(), visual)


def test_no_images_no_captions():
    model, visual = make()
    assert write(model, visual[:0]) == ([], [])
