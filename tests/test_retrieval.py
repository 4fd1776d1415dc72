"""Retrieval: every pair's score is what the model says of that pair alone, however it was computed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, TOL, finetune, original, task_on, write_captions, write_world

import eval as evaluation
import predict
import weights
from data import Captions
from layers import encode_batch_images
from predict import picture_batch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("retrieval"))
    for kind in ("flm", "mlm", "vilt"):
        finetune(root, "retrieval", kind, root / kind, "--false-captions", 2)
    return root


def gallery_of(world, checkpoint, table=None):
    """-> a Gallery of all images and captions of the test file, and the images of the captions."""
    model = weights.load(world / checkpoint)
    task = task_on(world, "retrieval", "vilt" if "vilt" in checkpoint else "flm", max_tokens=model.config.max_tokens)
    table = table or task.table(task.settings, "test")
    count = len(table.row_of)
    return predict.Gallery(model, task.dataset(table, False), np.arange(len(table)), list(range(count)),
                             torch.device("cpu")), table.row_of


def empty(gallery):
    return np.full((len(gallery.rows), len(gallery.numbers)), np.nan, dtype=np.float32)


@torch.no_grad()
def plain_scores(gallery):
    """One pair at a time, nothing shared, nothing padded, all rows computed."""
    model, scores = gallery.model, empty(gallery)
    for i, row in enumerate(gallery.rows):
        pictures, _ = gallery.dataset.pictures(int(row))
        for j, number in enumerate(gallery.numbers):
            visual = encode_batch_images(model, picture_batch(model.config, pictures, "cpu"))
            pooled = model.fuse(visual, model.encode_text(torch.tensor([gallery.dataset.tokens(number)[0]]))).pooled
            if model.config.head == "retrieval":
                scores[i, j] = model.head(pooled).item()
            else:
                scores[i, j] = torch.log(torch.softmax(model.itm_head(pooled), -1)[0, 1]).item()
    return scores


@pytest.mark.parametrize("checkpoint", ["flm/last.pt", "mlm/last.pt", "vilt/last.pt", "flm.pt", "vilt.pt"])
def test_every_pair_has_the_score_of_that_pair_alone(world, checkpoint):
    """Fine-tuned or only pretrained with matching; several captions an image, chunks, padding, an unreadable picture."""
    gallery, _ = gallery_of(world, checkpoint)
    expected = plain_scores(gallery)
    assert expected.std(0).min() > 1e-3 and expected.std(1).min() > 1e-3        # pictures and captions both matter
    for chunk in (1, 4, 1000):
        scores = empty(gallery)
        predict.fill_scores(gallery, scores, range(len(gallery.rows)), texts_at_once=chunk, quiet=True)
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
    assert len(gallery.unreadable) == 3 and "mine_caption_test.arrow row 4" in gallery.unreadable[0]     # once in each pass


def test_scores_of_all_pairs_are_the_originals(tmp_path):
    model, inputs, outputs = original("irtr", tmp_path)
    texts = outputs["recall_texts"]
    ids = [row[mask.bool()].tolist() for row, mask in zip(texts["text_ids"], texts["text_masks"])]

    class Recorded(predict.Gallery):
        def image(self, i):
            return self.model.encode_image(inputs["image"][0][i:i + 1])

        def tokens(self):
            return ids

    gallery = Recorded(model, None, range(4), range(16), torch.device("cpu"))
    scores = empty(gallery)
    predict.fill_scores(gallery, scores, range(4), texts_at_once=5, quiet=True)
    torch.testing.assert_close(torch.from_numpy(scores), outputs["recall_scores"], **TOL)


def test_an_interrupted_run_computes_only_the_rows_that_are_missing(world, monkeypatch):
    gallery, _ = gallery_of(world, "flm/last.pt")
    whole, half = empty(gallery), empty(gallery)
    predict.fill_scores(gallery, whole, range(7), texts_at_once=4, quiet=True)
    half[[0, 2, 3]] = whole[[0, 2, 3]]
    seen = []
    monkeypatch.setattr(gallery, "image", lambda i, image=gallery.image: seen.append(i) or image(i))
    predict.fill_scores(gallery, half, range(7), texts_at_once=4, quiet=True)
    assert seen == [1, 4, 5, 6] and np.array_equal(half, whole)


def test_the_images_of_other_processes_are_left_alone(world):
    gallery, _ = gallery_of(world, "flm/last.pt")
    scores = empty(gallery)
    predict.fill_scores(gallery, scores, range(1, 7, 2), quiet=True)
    assert np.isnan(scores[::2]).all() and not np.isnan(scores[1::2]).any()


# -- the approximate mode --------------------------------------------------------------------------------------------------

def test_only_the_candidates_are_scored_and_they_as_ever(world):
    gallery, _ = gallery_of(world, "vilt/last.pt")
    exact, some = empty(gallery), empty(gallery)
    candidates = np.random.default_rng(0).random(exact.shape) < 0.3
    predict.fill_scores(gallery, exact, range(7), texts_at_once=6, quiet=True)
    predict.fill_scores(gallery, some, range(7), candidates, texts_at_once=6, quiet=True)
    np.testing.assert_allclose(some[candidates], exact[candidates], atol=1e-5, rtol=0)
    assert (some[~candidates] == -np.inf).all()


@pytest.mark.parametrize("checkpoint", ["flm/last.pt", "vilt/last.pt"])
def test_a_shortlist_of_all_is_all_and_of_k_holds_k_of_each(world, checkpoint):
    (gallery, _), (known, image_of) = gallery_of(world, checkpoint), gallery_of(
        world, checkpoint, Captions([world / "mine_caption_train.arrow"]))
    assert predict.shortlist(gallery, known, image_of, 1000, quiet=True).all()
    chosen = predict.shortlist(gallery, known, image_of, 2, quiet=True)
    assert chosen.shape == (7, 14) and chosen.sum(0).min() >= 2 and chosen.sum(1).min() >= 2 and not chosen.all()


def test_canonical_directions_bring_pairs_together_that_were_not_in_the_fit():
    """Two views of the same hidden numbers, each under much noise of its own."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    to_x, to_y, noise_x, noise_y = draw(5, 30), draw(5, 20), draw(15, 30), draw(10, 20)

    def pairs(count):
        hidden = draw(count, 5)
        return hidden @ to_x + 2 * draw(count, 15) @ noise_x + 3, hidden @ to_y + 2 * draw(count, 10) @ noise_y - 1

    of_x, of_y = predict.canonical_directions(*pairs(1500), dimensions=5)
    x, y = pairs(200)
    cosine = of_x(x) @ of_y(y).T
    assert cosine.abs().max() <= 1 + 1e-9
    rank = (cosine > cosine.diagonal()[:, None]).sum(1)                    # how many strangers are nearer
    assert rank.double().median() <= 5 and cosine.diagonal().mean() > 0.6 > 5 * abs(cosine.mean())


# -- the command -----------------------------------------------------------------------------------------------------------

def evaluated(world, kind, out, *more):
    evaluation.main(["retrieval", str(world / kind / "last.pt"), "--data", str(world), "--out", str(out), "--device", "cpu",
                     *map(str, more)])
    return np.load(next(Path(out).glob("scores*.npy"))), json.loads((out / "retrieval_test_scores.json").read_text())["recall"]


def recalls_by_sorting(scores, image_of):
    """Recall by its definition; these scores have no two alike."""
    result = {}
    for k in (1, 5, 10):
        of_text = [image_of[j] in np.argsort(-scores[:, j])[:k] for j in range(scores.shape[1])]
        of_image = [i in image_of[np.argsort(-scores[i])[:k]] for i in range(scores.shape[0])]
        result |= {f"ir_r{k}": np.mean(of_text), f"tr_r{k}": np.mean(of_image)}
    return result


@pytest.mark.parametrize("kind", ["flm", "vilt"])
def test_recall_is_that_of_the_plain_scores_in_any_batch_size(world, tmp_path, capsys, kind):
    gallery, image_of = gallery_of(world, f"{kind}/last.pt")
    expected = plain_scores(gallery)
    for size in (1, 3, 64):
        scores, recall = evaluated(world, kind, tmp_path / str(size), "--batch-size", size)
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0)
        assert recall == pytest.approx(recalls_by_sorting(scores, image_of))
    printed = capsys.readouterr().out
    assert "7 images x 14 captions; every pair was scored" in printed and "APPROXIMATE" not in printed
    assert "1 rows have pictures that cannot be decoded and were shown as black, the first: " in printed
    assert "test.arrow row 4" in printed
    examples = json.loads((tmp_path / "64/examples.json").read_text())["examples"]
    assert len(examples) == 14 and all(e["right"] in (True, False) for e in examples)


def test_the_approximate_mode_says_so_and_with_all_pairs_is_exact(world, tmp_path, capsys):
    exact, recall = evaluated(world, "flm", tmp_path / "exact")
    capsys.readouterr()
    scores, approximate = evaluated(world, "flm", tmp_path / "top", "--top", 14)
    assert "APPROXIMATE" in capsys.readouterr().out
    np.testing.assert_allclose(scores, exact, atol=1e-5, rtol=0)
    assert approximate == recall
    few, _ = evaluated(world, "flm", tmp_path / "few", "--top", 1)
    scored = few > -np.inf
    assert 14 <= scored.sum() < 7 * 14
    np.testing.assert_allclose(few[scored], exact[scored], atol=1e-5, rtol=0)
    kept = scored[np.arange(14) // 2, np.arange(14)].mean()         # two captions to an image
    assert (f"only {100 * scored.mean():.1f} % of the pairs were scored, among them {100 * kept:.1f} % of the true ones"
            in capsys.readouterr().out)


def test_an_interrupted_command_goes_on_and_other_data_or_weights_begin_anew(world, tmp_path, monkeypatch):
    whole, recall = evaluated(world, "flm", tmp_path)
    path = next(tmp_path.glob("scores*.npy"))
    half = np.load(path)
    half[[1, 5, 6]] = np.nan
    np.save(path, half)
    seen, image = [], predict.Gallery.image
    monkeypatch.setattr(predict.Gallery, "image", lambda self, i: seen.append(i) or image(self, i))
    again, same_recall = evaluated(world, "flm", tmp_path)
    assert seen == [1, 5, 6] and np.array_equal(again, whole) and same_recall == recall

    other = tmp_path / "other"          # as many images and captions, but others, under the same names
    for name in ("train", "test"):
        write_captions(other / f"mine_caption_{name}.arrow", 7, seed=7, sizes=SIZES)
    seen.clear()
    evaluation.main(["retrieval", str(world / "flm/last.pt"), "--data", str(other), "--out", str(tmp_path)])
    assert seen == list(range(7)) and len(list(tmp_path.glob("scores*.npy"))) == 1     # the old are gone
    os.utime(world / "flm/last.pt", (time.time() + 5, time.time() + 5))         # trained on
    seen.clear()
    evaluated(world, "flm", tmp_path)
    assert seen == list(range(7))


def test_bfloat16_scores_are_near_and_in_a_file_of_their_own(world, tmp_path):
    exact, _ = evaluated(world, "flm", tmp_path / "fp32")
    near, _ = evaluated(world, "flm", tmp_path / "bf16", "--precision", "bf16")
    assert 0 < np.abs(near - exact).max() < 0.1
    names = [next((tmp_path / name).glob("scores*.npy")).name for name in ("fp32", "bf16")]
    assert names[0] != names[1]


def test_fewer_images_and_captions_are_the_first_ones(world, tmp_path):
    whole, _ = evaluated(world, "flm", tmp_path / "whole")
    part, _ = evaluated(world, "flm", tmp_path / "part", "--images", 5, "--captions", 1)
    np.testing.assert_allclose(part, whole[:5, :10:2], atol=1e-5, rtol=0)


def test_a_model_that_cannot_match_is_refused_in_a_sentence(world, tmp_path):
    model = weights.load(world / "flm.pt")
    bare = replace(model.config, itm=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("itm_head")}
    weights.save(tmp_path / "bare.pt", state, bare, "pretrain", weights.pack_tokenizer(model.tokenizer))
    with pytest.raises(SystemExit, match="bare.pt: a model of task pretrain with head vocab; needed is what train.py --task "
                                         "retrieval .* makes .or one pretrained with image-text matching"):
        evaluation.main(["retrieval", str(tmp_path / "bare.pt"), "--data", str(world)])
    with pytest.raises(SystemExit, match="no caption files of split 'tset'"):
        evaluation.main(["retrieval", str(world / "flm/last.pt"), "--data", str(world), "--split", "tset"])
    with pytest.raises(SystemExit, match="--batch-size 0: at least 1"):
        evaluation.main(["retrieval", str(world / "flm/last.pt"), "--data", str(world), "--batch-size", "0"])


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(world, tmp_path):
    whole, recall = evaluated(world, "flm", tmp_path / "one")
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                          str(29950 + os.getpid() % 40), str(ROOT / "eval.py"), "retrieval", str(world / "flm/last.pt"),
                          "--data", str(world), "--out", str(tmp_path / "two"), "--device", "cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True, timeout=240)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("7 images x 14 captions") == 1 and "test.arrow row 4" in two.stdout
    np.testing.assert_allclose(np.load(next((tmp_path / "two").glob("scores*.npy"))), whole, atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "two/retrieval_test_scores.json").read_text())["recall"] == recall
