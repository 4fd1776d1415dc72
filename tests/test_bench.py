"""The measurements run and compare like with like; how fast anything is, no test asks."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, write_captions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools import bench
import flm
from tools import measure
from tokenizer import BPE

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

TOY = "--preset toy --device cpu --rounds 1".split()


@pytest.fixture(scope="module")
def rig():
    rig = bench.FLMRig(SimpleNamespace(device="cpu", preset="toy", tokens=9, pad=50), 3)
    rig.model.eval()
    return rig


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A caption file and a tokenizer."""
    root = tmp_path_factory.mktemp("captions")
    BPE.train([" ".join(WORDS)] * 3, 330).save(root / "tok")
    return write_captions(root / "mine_caption_train.arrow", 12), root / "tok"


def run(arguments, tmp_path):
    """Runs bench.py -> the results that it kept."""
    bench.main([*map(str, arguments), "--json", str(tmp_path / "numbers.json")])
    return json.loads((tmp_path / "numbers.json").read_text())["results"]


def test_the_originals_way_computes_the_same_losses_as_ours(rig):
    losses = []
    with torch.no_grad():
        for name, way in rig.ways.items():
            losses.append(way.forward(way.model, bench.train.to_device(way.batch, rig.device, rig.config)))
            assert way.batch["ids"].shape == (3, {"ours": 9, "original": 50}[name])
            assert way.batch["ids"][:, :9].equal(rig.ways["ours"].batch["ids"])
    assert losses[0].keys() == losses[1].keys() == {"reconstructed", "left_to_right", "right_to_left"}
    for name, (loss, hits) in losses[0].items():
        torch.testing.assert_close(losses[1][name][0], loss, rtol=1e-5, atol=1e-4)
        assert losses[1][name][1] == hits


@pytest.mark.parametrize("n", [3, 13])
@pytest.mark.parametrize("sizes", [{}, dict(text_width=64, vit_width=96, width=32, fusion_layers=2, patch_size=16,
                                            reconstructor_text_layers=1, reconstructor_fusion_layers=1)])
def test_flops_are_those_that_torch_counts(n, sizes):
    config = flm.replace(flm.PRESETS["toy"], pooler=False, **sizes)
    batch = bench.make_batch(config, 2, n, n)
    # Fused attention kernels of some processors are not counted; the plain one's products are, everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flm.FLM(config)(batch | {"image": batch["image"].float()})
    assert counter.get_total_flops() == pytest.approx(2 * bench.flops(config, n), rel=0.02)


def test_flops_of_the_originals_way_count_the_head_everywhere():
    assert bench.flops(flm.PRESETS["base-b32"], 50, 150) == pytest.approx(55.9e9, rel=0.02)     # measured on the original


def test_the_stopwatch_leaves_a_step_as_it_is_and_every_part_has_its_time(rig):
    def gradients(**k):
        kept = {}
        optimizer = rig.ways["ours"].optimizer
        optimizer.step = lambda: kept.update({n: p.grad.clone() for n, p in rig.model.named_parameters()})
        seconds = rig.step("ours", "fp32", **k)[1]
        del optimizer.step
        return kept, seconds

    plain, _ = gradients()
    watch = measure.Stopwatch(rig.model, rig.device, bench.PARTS)
    clocked, seconds = gradients(mark=watch.mark)
    watch.remove()
    assert all(clocked[name].equal(plain[name]) for name in plain)
    for part in bench.PARTS:
        assert watch.seconds[part, "forward"] > 0 and watch.seconds[part, "backward"] > 0
    assert sum(watch.seconds.values()) == pytest.approx(seconds, rel=0.1)       # no moment is lost or counted twice
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rig.model.modules())


def test_step_prints_both_variants_in_both_precisions(tmp_path, capsys):
    rows = run(["step", *TOY, "--batch", 2, "--precision", "fp32", "bf16"], tmp_path)
    assert [(r["precision"], r["variant"]) for r in rows] == [(p, v) for p in ("fp32", "bf16") for v in ("ours", "original")]
    assert all(r["step s"] > r["fwd+bwd s"] > 0 for r in rows) and rows[1]["speed-up step"] == 1
    assert "load average" in capsys.readouterr().out


def test_parts_shares_add_up(tmp_path, capsys):
    for table in run(["parts", *TOY, "--variant", "ours", "original"], tmp_path):
        assert sum(row["share %"] for row in table["rows"]) == pytest.approx(100)
    assert "reconstructor, fusion side" in capsys.readouterr().out


def test_loader_measures_pictures_drawn_here_and_given_files(tmp_path, captions, capsys):
    small = "--photos 6 --rounds 1 --batch 2 --passes 1 --size 32".split()
    for arguments in (small, [captions[0], "--tokenizer", captions[1], *small], [captions[0].parent, *small]):
        results = run(["loader", *arguments], tmp_path)
        assert all(row["per second"] > 0 for row in results["rows"]) and len(results["rows"]) == 7
    assert "data.decode, fast" in capsys.readouterr().out


def test_padding_is_the_share_of_pads(tmp_path, captions, capsys):
    rows = run(["padding", captions[0], "--tokenizer", captions[1], "--global-batch", 16, "--micro-batch", 1], tmp_path)
    assert [row["order"] for row in rows] == ["sorted", "as drawn"]
    assert all(row["to 1"] == "0.0" and 0 < float(row["to 8"]) < float(row["all to 50"]) for row in rows)


def test_gpu_measures_on_any_device_and_says_so_where_there_is_none(tmp_path, capsys, monkeypatch):
    small = "--batch 1 2 --steps 1 --matmul 64 --no-compile".split()
    results = run(["gpu", *TOY, *small], tmp_path)
    assert [(r["batch"], r["variant"]) for r in results["rows"]] == [(b, v) for b in (1, 2) for v in ("ours", "original")]
    assert all(r["pairs/s"] > 0 and r["peak GB"] > 0 and r["MFU %"] > 0 for r in results["rows"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["gpu"], tmp_path) is None
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("shapes", ["mixed", "square"])
def test_vilt_and_transformers_take_the_same_step(shapes):
    """The same batch, loss and gradients, so what is compared is how fast the same is computed."""
    pytest.importorskip("transformers")
    rig = bench.ViLTRig(bench.parse(["vilt", "--preset", "vilt-toy", "--device", "cpu", "--shapes", shapes]))
    rig.check("mlm", "ours", "transformers")
    ours, theirs = rig.ways["ours"], rig.ways["transformers"]
    assert len(ours.batch["sizes"].unique(dim=0)) == (4 if shapes == "mixed" else 1)
    lengths = (ours.batch["ids"] != rig.config.pad_id).sum(1).tolist()
    assert lengths == [13, 13, 12, 10] and theirs.batch["input_ids"].equal(ours.batch["masked_ids"])
    for way in (ours, theirs):
        way.forward(way.model, bench.train.to_device(way.batch, rig.device, rig.config))["mlm"][0].backward()
    for mine, yours in ((ours.model.patch.weight, theirs.model.vilt.embeddings.patch_embeddings.projection.weight),
                        (ours.model.embed.word.weight, theirs.model.vilt.embeddings.text_embeddings.word_embeddings.weight),
                        (ours.model.vocab_head.decoder.weight, theirs.model.mlm_score.decoder.weight)):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-3, atol=1e-4)


def test_vilt_stops_where_the_two_models_differ(monkeypatch):
    """A comparison of two different computations would be worth nothing."""
    transformers = pytest.importorskip("transformers")
    opened = transformers.ViltForMaskedLM.from_pretrained

    def disturbed(folder):
        model = opened(folder)
        torch.nn.init.normal_(model.mlm_score.decoder.weight)
        return model

    monkeypatch.setattr(transformers.ViltForMaskedLM, "from_pretrained", disturbed)
    with pytest.raises(SystemExit, match="bench.py: ours and transformers do not compute the same"):
        bench.main("vilt --preset vilt-toy --device cpu --rounds 1".split())


def test_vilt_prints_both_and_the_share_of_the_optimal_transport(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(bench.vilt.PRESETS, "vilt-toy", flm.replace(bench.vilt.PRESETS["vilt-toy"], max_patches=10))
    results = run("vilt --preset vilt-toy --device cpu --rounds 1 --batch-size 2".split(), tmp_path)
    limit = ", at most 10 patches"
    assert [(r["precision"], r["variant"]) for r in results["steps"]] == [
        (p, name) for p in ("fp32", "bf16")
        for name in ("ours", "transformers", bench.ALL_LOSSES, "ours" + limit, "transformers" + limit)]
    assert all(r["step s"] > r["fwd+bwd s"] > 0 for r in results["steps"])
    assert [r["speed-up step"] for r in results["steps"][1:5:3]] == [1, 1] and results["steps"][2]["speed-up step"] == ""
    for table in results["parts"]:
        seconds = {row["part"]: row["both s"] for row in table["rows"]}
        assert all(seconds.values()) and sum(row["share %"] for row in table["rows"]) == pytest.approx(100)
        assert ("optimal transport" in seconds) == (table["variant"] == bench.ALL_LOSSES)
    assert "the loss of masked words in float32" in capsys.readouterr().out


def test_vilt_without_transformers_is_one_sentence(monkeypatch):
    monkeypatch.setitem(bench.sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="bench.py: vilt measures ours beside the package transformers, .* not installed"):
        bench.main("vilt --preset vilt-toy --device cpu".split())


def test_what_is_wrong_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="bench.py: .*there is no such file"):
        bench.main(["loader", str(tmp_path / "absent.arrow")])
