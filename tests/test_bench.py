"""The ways that are compared compute the same; how fast they are, no test asks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, write_captions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flm
from tasks import PretrainFLM
from tokenizer import BPE
from tools import bench, bench_padding

pytestmark = pytest.mark.slow       # a leaf: nothing else imports it, so `make quick` leaves it out

TOY = "--preset toy --device cpu --rounds 1 --batch 2 --captions 4".split()
VILT = "vilt --preset vilt-toy --device cpu --rounds 1 --batch 4".split()


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A caption file and a tokenizer."""
    root = tmp_path_factory.mktemp("captions")
    BPE.train([" ".join(WORDS)] * 3, 330).save(root / "tok")
    return write_captions(root / "mine_caption_train.arrow", 12), root / "tok"


@pytest.fixture
def run(tmp_path):
    """Runs a command with one batch size -> its results, read from its file."""
    def run(*arguments):
        path = tmp_path / "numbers.json"
        bench.main([*map(str, arguments), "--json", str(path)])
        [results] = json.loads(path.read_text())["results"].values()
        return results
    return run


@pytest.fixture
def ways(monkeypatch):
    """Runs a command up to its comparison -> {name: the way to be compared}."""
    def ways(*arguments):
        found = {}

        def compare(ways, amount, unit, args):
            found.update({way.name: way for way in ways})
            return [{"precision": "fp32", "way": way.name} for way in ways]

        monkeypatch.setattr(bench, "compare", compare)
        bench.main(list(arguments))
        return found
    return ways


def names(rows):
    return [(row["precision"], row["way"]) for row in rows]


def gradients(way):
    """What a step's backward pass gives to its model."""
    way.model.zero_grad()
    way.forward().sum().backward()
    found = {name: p.grad for name, p in way.model.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def counted_flops(function, *arguments):
    # Fused attention kernels of some processors are not counted; the plain one is, everywhere.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("command, outputs", [("step", 3), ("tune", 1)])
def test_the_original_has_the_same_losses_and_gradients_as_ours(command, outputs, ways):
    ours, original = ways(command, *TOY).values()
    assert ours.answer().shape == (outputs,)
    torch.testing.assert_close(original.answer(), ours.answer(), rtol=1e-5, atol=1e-6)
    expected, found = gradients(ours), gradients(original)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_step_is_that_of_the_training_loop(ways):
    """The sums of the losses over the numbers of targets, weighted."""
    ours = ways("step", *TOY)["ours"]
    batch, scales = ours.forward.args[1:]
    results = ours.model(batch)
    weights = ours.model.config.loss_weights
    expected = sum(weights[k] * loss / len(batch[f"{k}_rows"]) for k, (loss, _) in results.items())
    assert scales.keys() == weights.keys()
    assert ours.answer().sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_original_pads_to_50_and_ours_does_not(ways):
    ours, original = ways("step", *TOY).values()
    short, long = (way.forward.args[1]["ids"] for way in (ours, original))
    assert short.shape == (2, 13) and long.shape == (2, 50)
    assert long[:, :13].equal(short) and (long[:, 13:] == ours.model.config.pad_id).all()


def test_a_step_updates_as_the_loop_does_but_changes_nothing(ways):
    way = ways("step", *TOY)["ours"]
    before = {name: p.detach().clone() for name, p in way.model.named_parameters()}
    way.run("fp32", torch.device("cpu"))
    assert all(p.equal(before[name]) for name, p in way.model.named_parameters())
    assert all(p.grad is None for p in way.model.parameters())
    assert len(way.optimizer.state) == len(before) and way.model.training


def test_vilt_and_transformers_take_the_same_step(ways):
    pytest.importorskip("transformers")
    ours, theirs = ways(*VILT).values()
    batch, _ = ours.forward.args[1:]
    assert len(batch["sizes"].unique(dim=0)) == 4 and (batch["patches"] < 0).any()
    assert batch["ids"].shape == (4, 16)            # 13 tokens, so that padding is compared too
    torch.testing.assert_close(theirs.answer(), ours.answer())
    expected, found = gradients(ours), gradients(theirs)
    for name, theirs_name in (
            ("patch.weight", "vilt.embeddings.patch_embeddings.projection.weight"),
            ("embed.word.weight", "vilt.embeddings.text_embeddings.word_embeddings.weight"),
            ("vocab_head.decoder.weight", "mlm_score.decoder.weight")):
        torch.testing.assert_close(found[theirs_name], expected[name], rtol=1e-3, atol=1e-4)


def test_retrieval_and_captions_give_the_same_in_all_ways(ways):
    for command, shape in (("retrieval", (8, 1)), ("captions", (2, 13))):
        found = ways(command, *TOY)
        answers = [way.answer() for way in found.values()]
        assert all(answer.shape == shape for answer in answers)
        assert all(not way.model.training for way in found.values())
        for answer in answers[1:]:
            torch.testing.assert_close(answer, answers[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("command, function", [
    ("step", "original_pretraining"), ("tune", "original_tuning"), ("retrieval", "pair_by_pair")])
def test_ways_that_differ_are_not_compared(command, function, monkeypatch):
    original = getattr(bench, function)

    def disturbed(*arguments):
        result = original(*arguments)
        if isinstance(result, dict):
            return {name: (1.01 * loss, hits) for name, (loss, hits) in result.items()}
        return result + 0.01

    monkeypatch.setattr(bench, function, disturbed)
    with pytest.raises(SystemExit, match="bench.py: .* and original do not compute the same"):
        bench.main([command, *TOY])


def test_flops_are_those_of_the_published_code():
    args = SimpleNamespace(batch=1, captions=1, tokens=50, device=torch.device("cpu"))
    task, batch, _ = bench.make_batch(PretrainFLM, flm.PRESETS["base-b32"], args, pad_to=50)
    counted = bench.flops(task.config, batch, bench.original_pretraining)
    assert counted == pytest.approx(55.9e9, rel=0.02)       # measured on the published code
    saved = counted - bench.flops(task.config, batch)       # ours scores 145 rows, not 150
    assert saved == 2 * 5 * task.config.width * (task.config.width + task.config.vocab_size)


def test_ours_passes_each_image_once_and_the_original_once_for_each_caption(ways):
    found = ways("tune", *TOY, "--tokens", "50")            # padded alike
    ours, original = found.values()
    image = counted_flops(ours.model.encode_image, torch.zeros(1, 3, 64, 64))
    saved = counted_flops(original.forward) - counted_flops(ours.forward)
    assert saved > 2 * (4 - 1) * image                      # and the queries but the class query


def test_step_measures_both_ways_in_both_precisions(run, capsys):
    rows = run("step", *TOY, "--precision", "fp32", "bf16")
    assert names(rows) == [(p, way) for p in ("fp32", "bf16") for way in ("ours", "original")]
    for row in rows:
        assert row["pairs/s"] == pytest.approx(2 / row["seconds"])
    assert rows[1]["speed-up"] == rows[3]["speed-up"] == 1
    assert "original" in capsys.readouterr().out


@pytest.mark.parametrize("command, found", [
    ("tune", ["ours", "original"]), ("captions", ["kept", "computed again"]),
    ("retrieval", ["captions encoded before", "ours", "original"])])
def test_tasks_are_measured_in_all_ways(command, found, run):
    rows = run(command, *TOY)
    assert names(rows) == [("fp32", name) for name in found] and rows[-1]["speed-up"] == 1


def test_each_of_several_batch_sizes_is_measured(tmp_path):
    path = tmp_path / "numbers.json"
    bench.main(["retrieval", *TOY, "--batch", "1", "3", "--json", str(path)])
    assert list(json.loads(path.read_text())["results"]) == ["1", "3"]


def test_parts_are_all_found_and_their_shares_add_up(run):
    rows = {row["part"]: row for row in run("parts", *TOY)}
    assert sum(row["share %"] for row in rows.values()) == pytest.approx(100)
    assert list(rows) == [*bench.PARTS, bench.REST]
    assert all(rows[part]["forward s"] > 0 for part in bench.PARTS)
    assert all(rows[part]["backward s"] > 0 for part in bench.PARTS if part != "optimizer")


def test_backward_seconds_belong_to_the_part_that_has_gradients(run, monkeypatch):
    steps = bench.flm_steps

    def frozen(*arguments):
        ways = steps(*arguments)
        ways[0].model.vit.requires_grad_(False)
        ways[0].model.image_to_fusion.requires_grad_(False)
        return ways

    monkeypatch.setattr(bench, "flm_steps", frozen)
    rows = {row["part"]: row for row in run("parts", *TOY)}
    assert rows["ViT"]["forward s"] > 0 and rows["ViT"]["backward s"] == 0
    assert rows["text layers"]["backward s"] > 0


def test_loader_measures_given_files_and_else_drawn_pictures(captions, run, monkeypatch):
    drawn = bench.draw_photos
    monkeypatch.setattr(bench, "draw_photos", lambda path: drawn(path, 3))
    for files in ([captions[0]], []):
        rows = run("loader", *files, "--rounds", 1, "--batch", 2)
        assert len(rows) == 3 and all(row["pictures/s"] > 0 for row in rows)


def test_padding_is_the_share_of_pads():
    lengths = np.array([[3, 5], [2, 2]])
    assert bench_padding.share_of_pads(lengths, 1) == pytest.approx(100 * 2 / 14)
    assert bench_padding.share_of_pads(lengths, 4) == pytest.approx(100 * 12 / 24)
    assert bench_padding.share_of_pads(lengths, 50) == pytest.approx(100 * 188 / 200)


def test_sorted_captions_have_less_padding(captions, run):
    rows = run("padding", captions[0], "--tokenizer", captions[1])
    assert [row["order"] for row in rows] == ["sorted", "as drawn", "2 share", "3 share",
                                              "5 share"] * 4
    for row in rows:
        assert 0 <= row["to 1"] < row["to 8"] < row["to 50"] < 100
    assert rows[0]["to 1"] < rows[1]["to 1"]


def test_two_captions_that_share_an_image_pass_half_of_the_images_and_have_more_pads(captions, run):
    by_itself, _, pairs, threes, _ = run("padding", captions[0], "--tokenizer", captions[1])[:5]
    # each image has two captions
    assert by_itself["images"] == 1 and 0.5 <= pairs["images"] < 0.51
    assert threes["images"] == pairs["images"] and by_itself["to 1"] < pairs["to 1"]


def test_the_more_captions_share_an_image_the_less_of_it_falls_to_each(run):
    rows = run("share", *TOY)
    each = [row["GFLOP each"] for row in rows]
    assert [row["captions"] for row in rows] == [1, 2, 3, 5] and rows[0]["fewer %"] == 0
    # the work of an image, where each caption has its own
    image = 2 * (each[0] - each[1])
    assert each == pytest.approx([each[0] - image + image / count for count in (1, 2, 3, 5)])
    vit = 3 * counted_flops(flm.ViT(64, 16, 128, 2, 4), torch.zeros(1, 3, 64, 64)) / 1e9
    # the fusion layers' keys and values of it come on top
    assert vit < image < 2 * vit


@pytest.mark.parametrize("arguments, sentence", [
    (["loader", "absent.arrow"], "bench.py: absent.arrow: there is no such file"),
    (["captions", *TOY, "--tokens", "99"], "bench.py: .*the model has positions for"),
    (["step", *TOY, "--device", "abacus"], "bench.py: .*cpu or cuda is expected"),
    (["padding", "absent.arrow"], "bench.py: absent.arrow: there is no such file")])
def test_what_is_wrong_is_one_sentence(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        bench.main(arguments)


@pytest.mark.parametrize("flags, sentence", [
    (["--tokens", "2"], "--tokens: at least 3"), (["--batch", "4", "0"], "--batch: at least 1"),
    (["--rounds", "0"], "--rounds: at least 1"),
    (["--preset", "vilt"], "--preset vilt: step expects one of toy, small")])
def test_wrong_flags_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        bench.main(["step", *flags])
    assert sentence in capsys.readouterr().err


def test_vilt_without_transformers_is_one_sentence(monkeypatch):
    monkeypatch.setitem(bench.sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="bench.py: .*transformers"):
        bench.main(VILT)
