"""The ways to do a downstream task that bench.py compares say the same; how fast they are, no test asks."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from test_bench import TOY, run

from tools import bench
from tools import bench_tasks

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out


def rows_of(results):
    return [(row["precision"], row["variant"]) for row in results]


def test_captions_are_the_same_in_all_ways(tmp_path, capsys):
    rows = run(["captions", *TOY, "--images", 3, "--tokens", 9, "--precision", "fp32", "bf16"], tmp_path)
    names = ["all kept", "picture kept", "everything again", "original"]
    assert rows_of(rows) == [(p, name) for p in ("fp32", "bf16") for name in names]
    assert all(row["same captions"] for row in rows if row["precision"] == "fp32")
    assert all(row["captions/s"] == pytest.approx(3 / row["seconds"]) for row in rows)
    assert rows[3]["against original"] == rows[2]["against everything again"] == 1
    assert "fp32: all ways write the same captions" in capsys.readouterr().out


def test_captions_says_which_way_writes_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_tasks, "everything_again", lambda *_: [])
    rows = run(["captions", *TOY, "--tokens", 3], tmp_path)
    assert [row["same captions"] for row in rows] == [True, True, False, True]
    assert "fp32: not the original's captions: everything again" in capsys.readouterr().out


def test_retrieval_scores_are_the_same_in_all_ways(tmp_path):
    rows = run(["retrieval", *TOY, "--captions", 5, "--precision", "fp32", "bf16"], tmp_path)
    assert rows_of(rows) == [(p, name) for p in ("fp32", "bf16") for name in (
        "ours, captions encoded before", "ours", "original")]
    assert all(row["difference"] < 1e-5 for row in rows[:3]) and all(row["pairs/s"] > 0 for row in rows)


def test_retrieval_stops_where_the_scores_differ(monkeypatch):
    """A comparison of two different computations would be worth nothing."""
    scores = bench_tasks.original_scores
    monkeypatch.setattr(bench_tasks, "original_scores", lambda *args: scores(*args) + torch.tensor([0, 0, 2e-4]))
    with pytest.raises(SystemExit, match="bench.py: ours, captions encoded before and original do not compute"):
        bench.main(["retrieval", *TOY, "--captions", "3"])


@pytest.fixture(scope="module")
def rig():
    return bench_tasks.TuneRig(bench.parse(["tune", *TOY, "--batch", "2", "--false-captions", "3"]))


def test_all_ways_to_tune_have_the_same_loss_and_gradients(rig):
    gradients = {}
    assert rig.ways["original"].batch["ids"].shape == (8, 50) and rig.ways["ours"].batch["ids"].shape == (8, 13)
    for name, way in rig.ways.items():
        batch = bench.train.to_device(way.batch, rig.device, rig.config)
        way.model.zero_grad()
        way.forward(way.model, batch)["retrieval"][0].backward()
        gradients[name] = {n: p.grad.clone() for n, p in way.model.named_parameters() if p.grad is not None}
    losses = rig.check("retrieval", *rig.ways)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    for name in ("image for each caption", "original"):
        assert gradients[name].keys() == gradients["ours"].keys()
        for parameter, gradient in gradients["ours"].items():
            torch.testing.assert_close(gradients[name][parameter], gradient, rtol=1e-3, atol=1e-6)


def test_each_way_to_tune_costs_what_its_name_says(rig):
    """Forward FLOPs: the image once, or once for each of its four captions; in the original's way all queries."""
    def flops(function, *args, **more):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function(*args, **more)
        return counter.get_total_flops()

    def look(model, image):
        visual = model.encode_image(image)
        for layer in model.fusion_layers:
            layer.cross_attention.keys_and_values(visual)

    model = rig.ways["ours"].model
    batches = {name: bench.train.to_device(way.batch, rig.device, rig.config) for name, way in rig.ways.items()}
    cost = {name: flops(way.forward, model, batches[name]) for name, way in rig.ways.items()}
    image = flops(look, model, batches["ours"]["image"][:1])
    assert cost["image for each caption"] - cost["ours"] == pytest.approx(2 * (4 - 1) * image, rel=1e-3)
    class_query = flops(bench_tasks.pair_by_pair, model, batches["original"], class_only=True)
    assert cost["original"] > 1.1 * class_query > 1.1 * cost["image for each caption"]


def test_tune_prints_all_ways_and_trains_with_dropout(tmp_path, capsys, monkeypatch):
    trained = []
    step = bench_tasks.TuneRig.step
    monkeypatch.setattr(bench_tasks.TuneRig, "step", lambda rig, name, precision: (
        trained.append(rig.ways[name].model.training), step(rig, name, precision))[1])
    rows = run(["tune", *TOY, "--false-captions", 3, "--precision", "fp32", "bf16"], tmp_path)
    assert rows_of(rows) == [(p, name) for p in ("fp32", "bf16") for name in (
        "ours", "image for each caption", "original")]
    assert all(r["step s"] > r["fwd+bwd s"] > 0 for r in rows) and rows[2]["speed-up step"] == 1
    assert len(trained) == 12 and all(trained)
    assert "1 x 4 captions, padded to 13, for the original to 50" in capsys.readouterr().out


def test_too_many_tokens_is_one_sentence():
    with pytest.raises(SystemExit, match="bench.py: max_tokens 99 after a prompt of 1: at least 1 and at most"):
        bench.main(["captions", *TOY, "--tokens", "99"])
