"""ViLT: its optimal transport and picture sizes against the original's recordings.

Then its batches, and what is hidden and asked. (The model itself is compared with transformers'
where its weights are opened, in test_weights.py.)
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VILT, free_port, WORDS, vilt_model, write_captions

import data
import pictures
import tasks
import train
import vilt
import weights
from tokenizer import BPE, WordPiece
from tools import plot, probe
from training.optimizer import rate_at
from training.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
@pytest.fixture(scope="module")
def recorded():
    return torch.load(ROOT / "tests/fixtures/vilt_ot_and_resize.pt", weights_only=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vilt")
    for split, rows in (("train", 40), ("val", 9)):
        write_captions(root / f"mine_caption_{split}.arrow", rows,
                       sizes=((64, 48), (40, 90), (50, 50), (200, 20)))
    BPE.train([" ".join(WORDS)] * 3, 300).save(root / "tok")
    return root


def collated(world, tmp_path, config, train_mode=True, count=8, **settings):
    tok = BPE.load(world / "tok/vocab.json", world / "tok/merges.txt")
    config = tasks.PretrainViLT.adapt(replace(config, vocab_size=len(tok)))
    settings = Settings(data=str(world), out=str(tmp_path), max_tokens=24, pad_to=1, **settings)
    task = tasks.PretrainViLT(settings, config, tok)
    dataset = task.dataset(task.table(settings, "train"), train=train_mode)
    return config, dataset, *task.collate([dataset[0, 2 * i] for i in range(count)])


# -- optimal transport and sizes -------------------------------------------------------------------

def test_plans_distances_and_gradients_of_the_transport_are_the_originals(recorded):
    assert len(recorded["optimal_transport"]) == 3
    for case in recorded["optimal_transport"]:
        text, image = (case[name].clone().requires_grad_() for name in ("text", "image"))
        distance, plan = vilt.transport_distance(text, image, ~case["text_pad"], ~case["image_pad"],
                                                 case["beta"],
                                                 case["iterations"], case["k"])
        distance.sum().backward()
        torch.testing.assert_close(plan, case["plan"], atol=1e-6, rtol=0)
        torch.testing.assert_close(distance, case["distance"], atol=1e-6, rtol=0)
        torch.testing.assert_close(text.grad, case["grad_text"], atol=1e-6, rtol=0)
        torch.testing.assert_close(image.grad, case["grad_image"], atol=1e-6, rtol=0)


def test_the_plan_carries_every_words_mass_and_fills_every_patch():
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(2, 5, 8,
                              generator=generator), torch.randn(2, 9, 8, generator=generator)
    words, patches = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    words[1, 3:], patches[1, 4:] = False, False
    _, plan = vilt.transport_distance(text, image, words, patches, iterations=2000)
    # (B, M): 1/m each
    torch.testing.assert_close(plan.sum(1), words / words.sum(1, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum(2), patches / patches.sum(1, keepdim=True), atol=1e-4,
                               rtol=0)
    # with as many words as patches, an exact optimum carries each word to one patch: better than
    # any other assignment
    cost = vilt.cosine_cost(text[:, :4], image[:, :4])
    distance, _ = vilt.transport_distance(text[:, :4], image[:, :4], words[:, :4].fill_(True),
                                          patches[:, :4].fill_(True),
                                          iterations=5000)
    from itertools import permutations
    best = [min(sum(c[i, p] for i, p in enumerate(order)) / 4 for order in permutations(range(4)))
            for c in cost]
    torch.testing.assert_close(distance, torch.stack(best), atol=2e-3, rtol=0)


def test_a_caption_without_words_has_distance_0_and_a_finite_gradient():
    text, image = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 6, 8)
    distance, _ = vilt.transport_distance(text, image, torch.zeros(1, 4, dtype=torch.bool),
                                          torch.ones(1, 6, dtype=torch.bool))
    distance.sum().backward()
    assert distance.item() == 0 and torch.isfinite(text.grad).all()


def test_picture_sizes_are_the_originals(recorded):
    shape = pictures.Whole(384, 32)
    for before, after in recorded["resize_384_639"]:
        assert shape(*before) == (tuple(after), tuple(after))
    assert max(shape(w, h)[0][0] for w in range(50, 2000, 13) for h in range(50, 900, 11)) == 608
    assert shape(1200, 10)[0] == (608, 32)      # where the original divides by zero patches


# -- pictures of different shapes ------------------------------------------------------------------

def test_positions_are_the_grid_stretched_as_interpolate_does():
    model = vilt_model(TINY_VILT)
    grid = model.position[1:].T.reshape(1, -1, 3, 3)
    for h, w in [(3, 3), (1, 5), (7, 2), (4, 6), (1, 1), (12, 19)]:
        # (h w, D)
        expected = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True).flatten(2)[0].T
        place = torch.arange(h * w)[None]
        ours = model.positions_of(place // w, place % w, torch.tensor([[h, w]]))[0]
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def batch_of_shapes(sizes, side=16, seed=0):
    """Random pictures of these rows and columns of patches -> each alone, and all together.

    Together they are padded, with noise around them.
    """
    generator = torch.Generator().manual_seed(seed)
    alone = [torch.randn(3, side * h, side * w, generator=generator) for h, w in sizes]
    together = torch.randn(len(sizes), 3, side * max(h for h, _ in sizes),
                           side * max(w for _, w in sizes), generator=generator)
    for place, picture in zip(together, alone):
        place[:, :picture.shape[1], :picture.shape[2]] = picture
    return alone, together


def test_a_picture_alone_and_in_a_batch_of_other_shapes_gives_the_same_answer():
    model, sizes = vilt_model(TINY_VILT), [(2, 5), (4, 1), (3, 3), (1, 1)]
    alone, together = batch_of_shapes(sizes)
    ids = torch.tensor([[0, 9, 8, 7, 6, 2], [0, 5, 2, 1, 1, 1], [0, 11, 12, 2, 1, 1],
                        [0, 2, 1, 1, 1, 1]])
    fused = model.fuse(model.encode_image(together, torch.tensor(sizes)), model.encode_text(ids))
    for b, picture in enumerate(alone):
        n, k = int((ids[b] != 1).sum()), sizes[b][0] * sizes[b][1]
        one = model.fuse(model.encode_image(picture[None]), model.encode_text(ids[b:b + 1, :n]))
        torch.testing.assert_close(fused.pooled[b], one.pooled[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(fused.reconstructed[b, :n], one.reconstructed[0], atol=5e-6,
                                   rtol=0)
        torch.testing.assert_close(fused.image[b, :1 + k], one.image[0], atol=5e-6, rtol=0)


def test_one_picture_with_many_captions_equals_as_many_copies_of_it():
    model = vilt_model(TINY_VILT)
    picture, ids = torch.randn(1, 3, 32, 48), torch.randint(5, 300, (4, 6))
    once = model.fuse(model.encode_image(picture), model.encode_text(ids))
    copies = model.fuse(model.encode_image(picture.expand(4, -1, -1, -1)), model.encode_text(ids))
    torch.testing.assert_close(once.pooled, copies.pooled, atol=1e-6, rtol=0)


def test_the_loaders_patches_are_those_that_the_model_would_choose_itself():
    model, sizes = vilt_model(TINY_VILT), [(2, 5), (4, 1), (3, 3)]
    alone, together = batch_of_shapes(sizes)
    placed = tasks.patch_layout(TINY_VILT, alone)
    assert torch.equal(placed["sizes"], torch.tensor(sizes))
    assert torch.equal(placed["patches"], vilt.all_patches(torch.tensor(sizes), 4, 5))
    a, b = model.encode_image(together, torch.tensor(sizes)), model.encode_image(together, **placed)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)


def test_training_shows_a_seeded_choice_of_at_most_max_patches_and_evaluation_all(world, tmp_path):
    config, _, batch, _ = collated(world, tmp_path, TINY_VILT, train_mode=True)
    counts = (batch["patches"] >= 0).sum(1)
    areas = batch["sizes"].prod(1)
    assert areas.max() > 7 and torch.equal(counts, areas.clamp(max=7))
    again = collated(world, tmp_path, TINY_VILT, train_mode=True)[2]["patches"]
    other = collated(world, tmp_path, TINY_VILT, train_mode=True, seed=1)[2]["patches"]
    assert torch.equal(batch["patches"], again) and not torch.equal(batch["patches"], other)
    columns = batch["image"].shape[3] // 16
    for places, (h, w) in zip(batch["patches"], batch["sizes"].tolist()):
        places = places[places >= 0]
        assert len(places.unique()) == len(places)
        assert (places // columns < h).all() and (places % columns < w).all()
    evaluated = collated(world, tmp_path, TINY_VILT, train_mode=False)[2]
    assert torch.equal((evaluated["patches"] >= 0).sum(1), areas)


def test_every_patch_is_as_likely_to_be_shown():
    shown = np.zeros(12)
    for seed in range(2000):
        row, column = vilt.some_patches(3, 4, 5, np.random.default_rng(seed))
        shown[row * 4 + column] += 1
    assert abs(shown / 2000 - 5 / 12).max() < 0.04


# -- what is hidden, what is asked -----------------------------------------------------------------

@pytest.mark.slow
def test_whole_words_are_masked_at_the_asked_rate():
    """Over 10,000 captions: 15 % of the words, all pieces of a word or none of them."""
    tokens = ("[PAD] [UNK] [CLS] [SEP] [MASK] a red dog ##house ##boat sky ##scrap ##er "
              "runs near the old").split()
    tok = WordPiece({token: i for i, token in enumerate(tokens)})
    rng, rate = np.random.default_rng(0), 0.15
    words, masked = 0, 0
    for _ in range(10_000):
        text = " ".join(rng.choice(["a", "red", "doghouse", "dogboat", "skyscraper", "runs", "near",
                                    "the", "old"],
                                   rng.integers(6, 20)))
        ids = tok.encode(text)
        starts = tok.word_starts(ids)
        _, picked = data.mask_words([2, *ids, 3], starts, rate, 4, np.arange(5, len(tok)), rng)
        word_of = np.cumsum(starts)
        hit = set(word_of[picked - 1])
        # whole words
        assert set(np.flatnonzero(np.isin(word_of, list(hit))) + 1) == set(picked)
        words, masked = words + word_of[-1], masked + len(hit)
    assert masked / words == pytest.approx(rate, abs=0.003)


def test_half_of_the_captions_are_shown_another_picture_and_its_label_says_so(world, tmp_path):
    _, dataset, batch, notes = collated(world, tmp_path, TINY_VILT, count=10)
    own = torch.arange(10)
    assert (batch["shown_image"] != own).sum() == 5
    assert notes["counts"]["itm"] == notes["counts"]["wpa"] == 10
    rows = torch.tensor([dataset[0, 2 * i]["row"] for i in range(10)])
    assert torch.equal(batch["same_image"], rows == rows[batch["shown_image"]])


def test_the_losses_are_what_the_formulas_say(world, tmp_path):
    """Each loss computed anew, one caption at a time, without any padding or packing."""
    config, _, batch, notes = collated(world, tmp_path, replace(TINY_VILT, mpp=True), count=6)
    model = vilt_model(config)
    batch = train.to_device(batch, torch.device("cpu"), config)
    results = model(batch)
    side, expected = config.patch_size, dict.fromkeys(config.loss_weights, 0.0)
    L, K = batch["ids"].shape[1], batch["patches"].shape[1]
    columns = batch["image"].shape[3] // side
    for b in range(6):
        n = int((batch["ids"][b] != config.pad_id).sum())
        ids, masked = batch["ids"][b:b + 1, :n], batch["masked_ids"][b:b + 1, :n]

        def show(i, **more):
            h, w = batch["sizes"][i].tolist()
            places = batch["patches"][i][batch["patches"][i] >= 0]
            places = (places // columns * w + places % columns)[None]
            return model.encode_image(batch["image"][i:i + 1, :, :h * side, :w * side],
                                      patches=places, **more), places

        rows = [r % L for r in batch["mlm_rows"].tolist() if r // L == b]
        logits = model.vocab_logits(model.fuse(show(b)[0],
                                               model.encode_text(masked)).reconstructed[0, rows])
        expected["mlm"] += F.cross_entropy(logits, ids[0, rows], reduction="sum").item()
        visual, _ = show(int(batch["shown_image"][b]))
        fused = model.fuse(visual, model.encode_text(ids))
        same = batch["same_image"][b]
        expected["itm"] -= torch.log_softmax(model.itm_head(fused.pooled), -1)[0, int(same)].item()
        distance, _ = vilt.transport_distance(fused.reconstructed[:, 1:-1], fused.image[:, 1:],
                                              ids[:, 1:-1] > -1,
                                              torch.ones(1, fused.image.shape[1] - 1,
                                                         dtype=torch.bool))
        expected["wpa"] += distance.item() * (1 if same else -1)
        asked = [r % K for r in batch["mpp_rows"].tolist() if r // K == b]
        hidden = batch["hidden_patches"][b:b + 1, :visual_length(batch, b)]
        visual, places = show(b, hidden=hidden)
        h, w = batch["sizes"][b].tolist()
        pixels = batch["image"][b, :, :h * side, :w * side] * 0.5 + 0.5
        for k, x in zip(asked, model.fuse(visual, model.encode_text(ids)).image[0, 1:][asked]):
            row, column = divmod(int(places[0, k]), w)
            colour = pixels[:, row * side:(row + 1) * side,
                            column * side:(column + 1) * side].mean((1, 2)) * 255
            expected["mpp"] += F.cross_entropy(model.patch_head(x).view(3, 256), colour.long(),
                                               reduction="sum").item()
    assert notes["counts"]["mpp"] == 3 * len(batch["mpp_rows"]) > 0
    assert set(results) == set(expected)
    for name, value in expected.items():
        assert results[name][0].item() == pytest.approx(value, rel=2e-5), name


def visual_length(batch, b):
    return int((batch["patches"][b] >= 0).sum())


@pytest.mark.parametrize("changes", [{}, {"itm": False}, {"wpa_weight": 0.0}, {"mpp": True}])
def test_every_parameter_of_every_combination_of_objectives_is_trained(world, tmp_path, changes):
    config, _, batch, notes = collated(world, tmp_path, replace(TINY_VILT, **changes))
    model = vilt_model(config).train()
    results = model(train.to_device(batch, torch.device("cpu"), config))
    assert set(results) == set(config.loss_weights) == set(notes["counts"])
    sum(weight * results[name][0] for name, weight in config.loss_weights.items()).backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


def test_bfloat16_gives_the_same_losses_roughly(world, tmp_path):
    config, _, batch, _ = collated(world, tmp_path, replace(TINY_VILT, mpp=True))
    model, batch = vilt_model(config), train.to_device(batch, torch.device("cpu"), config)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    for name in exact:
        assert rough[name][0].item() == pytest.approx(exact[name][0].item(), rel=0.1, abs=0.5), name


@pytest.mark.parametrize("changes, sentence", [
    (dict(width=25), "width 25"), (dict(image_size=50), "image_size 50"),
                                               (dict(mask_rate=2), "mask_rate 2"),
    (dict(head="vqa"), "0 answers"), (dict(head="speech"), "head 'speech'"),
                                               (dict(pooler=False), "pooler")])
def test_a_config_that_cannot_be_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TINY_VILT, **changes)


def test_captions_longer_than_the_position_table_are_refused():
    with pytest.raises(ValueError, match="captions of 30 tokens"):
        vilt_model(TINY_VILT).encode_text(torch.zeros(1, 30, dtype=torch.int64))


# -- the loop and what comes after it --------------------------------------------------------------

SMALL = ("--model vilt-toy --image-size 48 --patch-size 16 --width 16 --layers 1 --heads 2 "
         "--mlp-width 32 --max-positions 40 --device cpu --precision fp32 --workers 0 "
         "--global-batch 8 --steps 3 --log-every 1 --eval-every 3 --lr 1e-2").split()


def command(world, out, *more):
    return [*SMALL, "--data", str(world), "--tokenizer", str(world / "tok"), "--out", str(out),
            *map(str, more)]


@pytest.mark.slow
def test_a_run_trains_saves_evaluates_and_shows_its_alignments(world, tmp_path, capsys):
    train.main(command(world, tmp_path / "run"))
    assert "mlm + itm + wpa" in capsys.readouterr().out
    model = weights.load(tmp_path / "run/last.pt")
    assert isinstance(model, vilt.ViLT) and model.task == "pretrain" and model.step == 3
    probe.main(["align", str(tmp_path / "run/last.pt"), "--data", str(world), "--split", "val",
                "--captions", "5"])
    table = data.Captions([world / "mine_caption_val.arrow"])
    for found in probe.alignments(model, table, captions=5):
        plan = np.array(found["plan"])
        assert plan.shape == (len(found["tokens"]), found["grid"][0] * found["grid"][1])
        assert plan.sum(1) == pytest.approx(1, abs=0.01)

    plot.main(["align", str(tmp_path / "run/align.json"), "--out", str(tmp_path / "align.png")])
    assert (tmp_path / "align.png").stat().st_size > 5000


def test_a_flag_of_the_other_model_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(command(world, tmp_path / "x", "--fusion-layers", 2))
    assert "--fusion-layers: model vilt-toy has no such setting" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [25_000, 50_000, 100_000, 200_000])
def test_published_recipes_warm_up_for_2500_steps(steps):
    settings = train.parse(["--recipe", f"vilt-{steps // 1000}k", "--data", "d", "--out", "o"])[0]
    assert settings.steps == steps and settings.global_batch == 4096 and settings.lr == 1e-4
    rates = [rate_at(step, settings) for step in (0, 1250, 2500, steps)]
    assert rates == pytest.approx([0, 0.5, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "slurm"])
def test_two_processes_started_by_other_launchers_equal_one(world, tmp_path, launcher):
    """mpirun for real; for SLURM, its variables as srun sets them."""
    import json
    import os
    arguments = [sys.executable, str(ROOT / "train.py"),
                 *command(world, tmp_path / "two", "--micro-batch", 4)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    if launcher == "mpirun":
        if not shutil.which("mpirun"):
            pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
        runs = [subprocess.Popen(["mpirun", "--allow-run-as-root", "--oversubscribe", "-x",
                                  "MASTER_PORT", "-np", "2", *arguments],
                                 env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True)]
    else:
        runs = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, env=env | {
"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank)})
                for rank in range(2)]
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output
    config = json.loads((tmp_path / "two/config.json").read_text())
    assert (config["processes"], config["micro_batch"], config["accumulation"]) == (2, 4, 1)
    train.main(command(world, tmp_path / "one", "--micro-batch", 4))
    one, two = (weights.read(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    for name in one:
        # a softmax ignores the keys' bias: its gradient is pure rounding
        if not name.endswith("kv.bias"):
            torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_the_loss_falls_on_real_photographs(shared, tmp_path):
    import json

    import prepare
    prepare.main(["karpathy", str(shared / "data/coco_small"), "--out", str(tmp_path / "data"),
                  "--name", "photos"])
    bert = shared / "tokenizers/bert-base-uncased"
    arguments = (f"--recipe vilt-small --image-size 96 --data {tmp_path / 'data'} "
                 f"--tokenizer {bert} --out {tmp_path / 'run'} --steps 12 --global-batch 16 "
                 "--micro-batch 16 --width 64 --layers 3 --heads 4 --mlp-width 256 --log-every 3 "
                 "--eval-every 0 --lr 2e-3 --precision fp32 --device cpu --workers 0").split()
    train.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["mlm_loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5 and all(line["skipped"] == 0 for line in lines)
