"""Retrieval: each score is what the model says of that pair alone; old scores are not reused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (SIZES, TOL, finetune, original, task_on, together, write_captions,
                      write_world)

import eval as evaluation
import retrieval
import weights
from layers import encode_batch_images
from predict import picture_batch
from tokenizer import BPE
from training.machine import Machine

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

ALONE = Machine(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("retrieval"))
    for kind in ("flm", "mlm", "vilt"):
        finetune(root, "retrieval", kind, root / kind, "--false-captions", 2)
    return root


# -- scores ----------------------------------------------------------------------------------------

def gallery_of(world, checkpoint, **sizes):
    """A Gallery of the images and captions of the test file."""
    model = weights.load(world / checkpoint)
    kind = "vilt" if "vilt" in checkpoint else "flm"
    task = task_on(world, "retrieval", kind, max_tokens=model.config.max_tokens)
    return retrieval.Gallery(model, task.dataset(task.table(task.settings, "test"), False), **sizes)


def empty(gallery):
    return np.full(gallery.shape, np.nan, dtype=np.float32)


@torch.no_grad()
def plain_scores(gallery):
    """One pair at a time, nothing shared, nothing padded, all rows computed."""
    model, scores = gallery.model, empty(gallery)
    for i, row in enumerate(gallery.rows):
        pictures, _ = gallery.dataset.pictures(int(row))
        for j, number in enumerate(gallery.numbers):
            visual = encode_batch_images(model, picture_batch(model.config, pictures, "cpu"))
            ids = torch.tensor([gallery.dataset.tokens(number)[0]])
            pooled = model.fuse(visual, model.encode_text(ids)).pooled
            if model.config.head == "retrieval":
                scores[i, j] = model.head(pooled).item()
            else:
                scores[i, j] = torch.log(torch.softmax(model.itm_head(pooled), -1)[0, 1]).item()
    return scores


@pytest.mark.parametrize("checkpoint", [
    "flm/last.pt", "mlm/last.pt", "vilt/last.pt", "flm.pt", "vilt.pt"])
def test_every_pair_has_the_score_of_that_pair_alone(world, checkpoint):
    """Fine-tuned or only pretrained with matching; with several captions an image."""
    gallery = gallery_of(world, checkpoint)
    expected = plain_scores(gallery)
    assert expected.shape == (7, 14)
    assert expected.std(0).min() > 1e-3 and expected.std(1).min() > 1e-3    # both sides matter
    for texts_at_once in (1, 4, 1000):
        scores = empty(gallery)
        retrieval.fill_scores(gallery, scores, range(7), texts_at_once, quiet=True)
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
    assert len(gallery.unreadable) == 3                                     # once in each pass
    assert "mine_caption_test.arrow row 4" in gallery.unreadable[0]


def test_images_are_encoded_once_captions_once_and_pairs_fused(world, monkeypatch):
    """N + M encodings, N M pairs: what the head of predict.py says."""
    gallery = gallery_of(world, "flm/last.pt")
    model, count = gallery.model, {"images": 0, "texts": 0, "pairs": 0}

    def counting(function, name, size):
        def counted(*arguments, **more):
            result = function(*arguments, **more)
            count[name] += size(result)
            return result
        return counted

    for name, what, size in (("encode_image", "images", len),
                             ("encode_text", "texts", len),
                             ("fuse", "pairs", lambda fused: len(fused.pooled))):
        monkeypatch.setattr(model, name, counting(getattr(model, name), what, size))
    retrieval.fill_scores(gallery, empty(gallery), range(7), texts_at_once=4, quiet=True)
    assert count == {"images": 7, "texts": 14, "pairs": 7 * 14}


def test_scores_of_all_pairs_are_the_originals(tmp_path):
    model, inputs, outputs = original("irtr", tmp_path)
    texts = outputs["recall_texts"]
    pairs = zip(texts["text_ids"], texts["text_masks"], strict=True)
    ids = [row[mask.bool()].tolist() for row, mask in pairs]

    class Recorded(retrieval.Gallery):
        rows, numbers = range(4), range(16)

        def __init__(self):
            self.model = model

        def encode_image(self, i):
            return self.model.encode_image(inputs["image"][0][i:i + 1])

        def tokens(self):
            return ids

    gallery = Recorded()
    scores = empty(gallery)
    retrieval.fill_scores(gallery, scores, range(4), texts_at_once=5, quiet=True)
    torch.testing.assert_close(torch.from_numpy(scores), outputs["recall_scores"], **TOL)


def test_only_missing_rows_are_computed_and_only_ones_own(world, monkeypatch):
    gallery = gallery_of(world, "flm/last.pt")
    whole, half, seen = empty(gallery), empty(gallery), []
    retrieval.fill_scores(gallery, whole, range(7), texts_at_once=4, quiet=True)
    half[[0, 2, 3]] = whole[[0, 2, 3]]
    half[5, 3:] = 1.0                                       # a row that was cut off
    encode_image = gallery.encode_image
    monkeypatch.setattr(gallery, "encode_image", lambda i: seen.append(i) or encode_image(i))
    retrieval.fill_scores(gallery, half, range(7), texts_at_once=4, quiet=True)
    assert seen == [1, 4, 5, 6] and np.array_equal(half, whole)
    scores = empty(gallery)
    retrieval.fill_scores(gallery, scores, range(1, 7, 2), quiet=True)
    assert np.isnan(scores[::2]).all() and not np.isnan(scores[1::2]).any()


def test_a_gallery_of_fewer_images_and_captions_has_the_first_ones(world):
    gallery = gallery_of(world, "flm.pt", images=5, captions=1)
    assert gallery.rows.tolist() == [0, 1, 2, 3, 4]
    assert gallery.numbers.tolist() == [0, 2, 4, 6, 8]
    assert gallery.image_of.tolist() == [0, 1, 2, 3, 4]
    assert gallery_of(world, "flm.pt").image_of.tolist() == [k // 2 for k in range(14)]


# -- the file of scores ----------------------------------------------------------------------------

def test_the_hash_changes_with_whatever_scores_depend_on(world, tmp_path, monkeypatch):
    base = gallery_of(world, "flm.pt").contents_hash("fp32")
    assert gallery_of(world, "flm.pt").contents_hash("fp32") == base
    changed = {"precision": gallery_of(world, "flm.pt").contents_hash("bf16"),
               "weights": gallery_of(world, "flm/last.pt").contents_hash("fp32"),
               "images": gallery_of(world, "flm.pt", images=6).contents_hash("fp32"),
               "captions": gallery_of(world, "flm.pt", captions=1).contents_hash("fp32")}
    gallery = gallery_of(world, "flm.pt")
    gallery.model.config = replace(gallery.model.config, heads=2)
    changed["heads"] = gallery.contents_hash("fp32")
    gallery = gallery_of(world, "flm.pt")
    with torch.no_grad():
        gallery.model.pooler.bias[3] += 1e-6
    changed["one weight"] = gallery.contents_hash("fp32")
    gallery = gallery_of(world, "flm.pt")
    gallery.dataset.tok = BPE.train(["red and blue and green"] * 3, 290)
    changed["tokenizer"] = gallery.contents_hash("fp32")
    for what, seed, broken in (("other pictures", 7, (4,)), ("a picture less", 2, (3, 4))):
        write_captions(tmp_path / "x.arrow", 7, seed=seed, broken=broken, batch_rows=3)
        gallery = gallery_of(world, "flm.pt")
        gallery.dataset.table = type(gallery.dataset.table)([tmp_path / "x.arrow"])
        changed[what] = gallery.contents_hash("fp32")
    edited = tmp_path / "layers.py"
    edited.write_text("# another version of the code\n")
    monkeypatch.setattr(retrieval.layers, "__file__", str(edited))
    changed["code"] = gallery_of(world, "flm.pt").contents_hash("fp32")
    assert len({base, *changed.values()}) == 1 + len(changed), changed


def test_a_scores_file_is_fresh_unless_resumed_and_the_only_one(world, tmp_path, capsys):
    gallery = gallery_of(world, "flm.pt")

    def rows_done(gallery, name="scores_test", resume=False):
        path = retrieval.scores_file(gallery, tmp_path, name, ALONE, resume)
        scores = np.lib.format.open_memmap(path, "r+")
        done = (~np.isnan(scores).any(1)).sum()
        scores[2] = 0.5
        return path, done

    first, done = rows_done(gallery)
    assert done == 0
    assert rows_done(gallery, resume=True) == (first, 1)
    assert "1 of 7 images are scored already" in capsys.readouterr().out
    assert rows_done(gallery) == (first, 0)
    dev, _ = rows_done(gallery, "scores_test_dev")
    other, done = rows_done(gallery_of(world, "flm/last.pt"), resume=True)
    assert done == 0 and other != first
    assert "no scores of this model, tokenizer, data and code" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted([dev, other])


# -- the command -----------------------------------------------------------------------------------

def main(*arguments):
    evaluation.main([str(argument) for argument in arguments])



def retrieve(world, kind, out, *more):
    """-> (scores (N, M), recall)"""
    main("retrieval", world / kind / "last.pt", "--data", world, "--out", out, "--device", "cpu",
         *more)
    newest = max(out.glob("scores_test*.npy"), key=lambda path: path.stat().st_mtime_ns)
    about = newest.name.split("x")[0].rpartition(".")[0].removeprefix("scores_")
    recall = json.loads((out / f"retrieval_{about}_scores.json").read_text())["recall"]
    return np.load(newest), recall


def recalls_by_sorting(scores, image_of):
    """Recall by its definition; no two of these scores are the same."""
    result = {}
    for k in (1, 5, 10):
        of_text = [image_of[j] in np.argsort(-scores[:, j])[:k] for j in range(scores.shape[1])]
        of_image = [i in image_of[np.argsort(-scores[i])[:k]] for i in range(scores.shape[0])]
        result |= {f"ir_r{k}": np.mean(of_text), f"tr_r{k}": np.mean(of_image)}
    return result


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_recall_is_that_of_the_scores_in_any_batch_size(world, tmp_path, capsys, kind):
    whole, _ = retrieve(world, kind, tmp_path / "64")
    for size in (1, 3):
        scores, recall = retrieve(world, kind, tmp_path / str(size), "--batch-size", size)
        np.testing.assert_allclose(scores, whole, atol=1e-5, rtol=0)
        assert recall == pytest.approx(recalls_by_sorting(scores, np.arange(14) // 2))
    printed = capsys.readouterr().out
    assert "7 images x 14 captions, every pair scored" in printed
    assert ("1 rows have pictures that cannot be decoded and were shown as black, the first: "
            in printed)
    assert "test.arrow row 4" in printed
    examples = json.loads((tmp_path / "64/examples.json").read_text())["examples"]
    assert [e["right"] for e in examples] == [whole[:, k].argmax() == k // 2 for k in range(14)]
    part, _ = retrieve(world, kind, tmp_path / "part", "--images", 5, "--captions", 1)
    np.testing.assert_allclose(part, whole[:5, :10:2], atol=1e-5, rtol=0)


def test_scores_of_another_tokenizer_are_not_reused(world, tmp_path):
    """The wrong tokenizer first, then the right one in the same folder."""
    saved = weights.read(world / "flm/last.pt")
    weights.save(tmp_path / "bare.pt", saved["model"], weights.config_of(saved), "retrieval", None)
    BPE.train(["sitting sleeping running white black"] * 3, 300).save(tmp_path / "wrong")

    def scores(out, folder, *more):
        main("retrieval", tmp_path / "bare.pt", "--data", world, "--out", tmp_path / out,
             "--tokenizer", folder, *more)
        return np.load(next((tmp_path / out).glob("scores*.npy")))

    wrong = scores("one", tmp_path / "wrong")
    right = scores("other", world / "tok")
    assert np.abs(right - wrong).max() > 1e-3
    assert np.array_equal(scores("one", world / "tok"), right)
    assert np.array_equal(scores("one", tmp_path / "wrong", "--resume"), wrong)


def interrupt(out, rows):
    """Makes a finished run look like one that stopped before these rows were scored."""
    path, = out.glob("scores*.npy")
    scores = np.load(path)
    scores[rows] = np.nan
    np.save(path, scores)


def test_an_interrupted_run_goes_on_on_request_with_the_same(world, tmp_path, monkeypatch, capsys):
    whole, recall = retrieve(world, "flm", tmp_path)
    seen, encode_image = [], retrieval.Gallery.encode_image
    monkeypatch.setattr(retrieval.Gallery, "encode_image",
                        lambda self, i: seen.append(i) or encode_image(self, i))
    interrupt(tmp_path, [1, 5, 6])
    (world / "flm/last.pt").touch()                       # the same contents, another date
    again, same_recall = retrieve(world, "flm", tmp_path, "--resume", "--batch-size", 3)
    assert seen == [1, 5, 6] and same_recall == recall
    np.testing.assert_allclose(again, whole, atol=1e-5, rtol=0)
    assert "4 of 7 images are scored already" in capsys.readouterr().out
    seen.clear()
    retrieve(world, "flm", tmp_path)                                # not asked to go on
    assert seen == list(range(7))

    other = tmp_path / "data"           # as many images and captions under the same names
    for name in ("train", "test"):
        write_captions(other / f"mine_caption_{name}.arrow", 7, seed=7, sizes=SIZES)
    seen.clear()
    retrieve(world, "flm", tmp_path, "--data", other, "--resume")
    assert seen == list(range(7)) and len(list(tmp_path.glob("scores*.npy"))) == 1
    other_scores, = tmp_path.glob("scores*.npy")
    seen.clear()
    retrieve(world, "flm", tmp_path, "--data", other, "--resume", "--precision", "bf16")
    assert seen == list(range(7)) and other_scores.exists()     # hours of work, under another name


def test_bfloat16_scores_are_near(world, tmp_path):
    exact, _ = retrieve(world, "flm", tmp_path / "fp32")
    near, _ = retrieve(world, "flm", tmp_path / "bf16", "--precision", "bf16")
    assert 0 < np.abs(near - exact).max() < 0.1


def test_a_pretrained_model_without_matching_cannot_retrieve(world, tmp_path):
    model = weights.load(world / "flm.pt")
    state = model.state_dict()
    for name in ("itm_head.weight", "itm_head.bias"):
        del state[name]
    weights.save(tmp_path / "bare.pt", state, replace(model.config, itm=False), "pretrain",
                 weights.pack_tokenizer(model.tokenizer))
    with pytest.raises(SystemExit, match="bare.pt: a model of task pretrain with head vocab; needed"
                                         " is what train.py --task retrieval .* makes .or one "
                                         "pretrained with image-text matching"):
        main("retrieval", tmp_path / "bare.pt", "--data", world)


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one_and_go_on_together(world, tmp_path):
    whole, recall = retrieve(world, "flm", tmp_path)
    interrupt(tmp_path, [0, 1, 2, 4, 5, 6])
    printed = together(2, ["retrieval", world / "flm/last.pt", "--data", world, "--device", "cpu",
                           "--out", tmp_path, "--resume"], "eval")
    assert printed.count("1 of 7 images are scored already") == 1
    assert printed.count("every pair scored") == 1
    scores, = tmp_path.glob("scores*.npy")
    np.testing.assert_allclose(np.load(scores), whole, atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "retrieval_test_scores.json").read_text())["recall"] == recall
