"""The loop: equal however it is split, resumed exactly, refusing what makes no sense."""

import json
import os
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import (TRAIN as RUN, TRAIN_FLM as SIZES, TRAIN_VILT as VILT, WORDS, assert_same,
                      together, train_command as command,
                      train_outcome as outcome, write_caption_world, write_captions)

import flm
import layers
import recipes
import tasks
import train
import vilt
import weights
from tokenizer import BPE
from training import machine, optimizer as optimizers
from training.optimizer import Muon, moments_of, orthogonal, parameter_groups, rate_at
from training.settings import Settings, split_batch, documented_fields

ROOT = Path(__file__).resolve().parents[1]
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes, more", [
    (SIZES, ()), (SIZES, ("--shard",)), (SIZES, ("--captions-per-image", 2)),
                                         (SIZES, ("--objective", "mlm", "--itm")),
    (VILT, ()), (VILT, ("--no-itm",))],
    ids=["flm", "flm sharded", "flm with shared images", "mlm with itm", "vilt",
         "vilt without itm"])
def test_any_split_of_the_global_batch_gives_the_same_losses_and_weights(
        world, tmp_path, sizes, more):
    together(2, command(world, tmp_path / "2x2", *RUN, *more, "--micro-batch", 4, sizes=sizes))
    common = [m for m in more if m != "--shard"]
    train.main(command(world, tmp_path / "1x4", *RUN, *common, "--micro-batch", 4, sizes=sizes))
    assert_same(outcome(tmp_path / "1x4"), outcome(tmp_path / "2x2"), 2e-5)
    # its negatives come from the micro-batch
    if "--itm" not in more and (sizes is SIZES or "--no-itm" in more):
        train.main(command(world, tmp_path / "1x1", *RUN, *common, sizes=sizes))
        assert_same(outcome(tmp_path / "1x4"), outcome(tmp_path / "1x1"), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, more", [(SIZES, ("--itm", "--bucket", 3)), (VILT, ())],
                         ids=["flm", "vilt"])
def test_captions_that_share_an_image_resume_in_the_middle_of_an_epoch_as_if_never_stopped(
        world, tmp_path, sizes, more, capsys):
    """An epoch has 7 steps: the run stops in its first epoch, and ends in its second."""
    more = [*RUN, "--steps", 9, "--eval-every", 0, "--captions-per-image", 2, "--augment",
            "--dropout", 0.1, "--save-every", 5, *more]
    train.main(command(world, tmp_path / "whole", *more, "--keep", 5, sizes=sizes))
    (tmp_path / "again").mkdir()
    (tmp_path / "again/last.pt").write_bytes((tmp_path / "whole/step_5.pt").read_bytes())
    with pytest.raises(SystemExit, match="captions_per_image 2 -> 3"):
        train.main(command(world, tmp_path / "again", *more, "--captions-per-image", 3, "--resume",
                           sizes=sizes))
    train.main(command(world, tmp_path / "again", *more, "--resume", sizes=sizes))
    (lines, whole), (lines_again, again) = outcome(tmp_path / "whole"), outcome(tmp_path / "again")
    assert lines[-4:] == lines_again and lines[-1]["step"] == 9
    assert "up to 2 captions share an image" in capsys.readouterr().out
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, VILT], ids=["flm", "vilt"])
def test_muon_resumes_as_if_never_stopped_and_leaves_no_parameter_unchanged(world, tmp_path, sizes):
    more = [*RUN, "--eval-every", 0, "--muon-lr", 0.02, "--save-every", 3, "--keep", 3]
    train.main(command(world, tmp_path / "whole", *more, sizes=sizes))
    (tmp_path / "again").mkdir()
    (tmp_path / "again/last.pt").write_bytes((tmp_path / "whole/step_3.pt").read_bytes())
    with pytest.raises(SystemExit, match="muon_lr 0.02 -> 0.03"):
        train.main(command(world, tmp_path / "again", *more, "--muon-lr", 0.03, "--resume",
                           sizes=sizes))
    train.main(command(world, tmp_path / "again", *more, "--resume", sizes=sizes))
    whole, again = (outcome(tmp_path / name)[1] for name in ("whole", "again"))
    half = weights.read(tmp_path / "whole/step_3.pt")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert all(not torch.equal(half["model"][name], tensor) for name, tensor in whole.items())
    name = "fusion_layers.0.mlp.0.weight" if sizes is SIZES else "patch.weight"
    assert set(half["optimizer"]["state"][name]) == {"mean"}


@pytest.mark.slow
def test_data_loading_processes_change_nothing(world, tmp_path):
    for workers in (0, 2):
        train.main(command(world, tmp_path / str(workers), *RUN, "--corruption-rate", 0.3,
                           "--augment", "--workers", workers))
    assert_same(outcome(tmp_path / "0"), outcome(tmp_path / "2"), 0)


@pytest.mark.slow
def test_the_compiled_model_is_the_one_that_is_trained(world, tmp_path, monkeypatch):
    """With the backend that runs the captured graphs as they are.

    That needs no compiler, and gives the same numbers.
    """
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compiled.append(how)
                        or compile_module(self, backend="eager", **how))
    short = [*RUN, "--steps", 2, "--eval-every", 0]
    train.main(command(world, tmp_path / "plain", *short))
    train.main(command(world, tmp_path / "compiled", *short, "--compile"))
    assert compiled == [{"dynamic": True}]
    assert_same(outcome(tmp_path / "plain"), outcome(tmp_path / "compiled"), 1e-6)


@pytest.mark.slow
def test_float16_trains_with_a_gradient_scaler_and_resumes_its_scale(world, tmp_path):
    long = [*RUN, "--precision", "fp16", "--save-every", 3]
    train.main(command(world, tmp_path / "fp16", *long, "--keep", 3))
    saved = weights.read(tmp_path / "fp16/last.pt")
    assert saved["scaler"]["scale"] > 1 and saved["settings"]["precision"] == "fp16"
    exact = command(world, tmp_path / "fp32", *RUN)
    train.main(exact)
    half, whole = ([line["loss"] for line in outcome(tmp_path / name)[0] if "loss" in line]
                   for name in ("fp16", "fp32"))
    assert half[0] == pytest.approx(whole[0], rel=0.01) and half[-1] < 0.95 * half[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "again/last.pt").write_bytes((tmp_path / "fp16/step_3.pt").read_bytes())
    train.main(command(world, tmp_path / "again", *long, "--keep", 3, "--resume"))
    again = weights.read(tmp_path / "again/last.pt")
    assert again["scaler"] == saved["scaler"]
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in saved["model"].items())


def test_a_torn_file_of_token_lengths_stops_no_later_start_and_another_tokenizer_counts_again(
        world, tmp_path, monkeypatch):
    save = train.np.save
    monkeypatch.setattr(train.np, "save",
                        lambda file, lengths: (file.write(b"half"),
                                               (_ for _ in ()).throw(OSError("no space"))))
    with pytest.raises(SystemExit, match="no space"):
        train.main(command(world, tmp_path / "run", *RUN))
    monkeypatch.setattr(train.np, "save", save)
    train.main(command(world, tmp_path / "run", *RUN, "--steps", 1))
    assert len(list((tmp_path / "run").glob("token_lengths_*.npy"))) == 1
    BPE.train([" ".join(WORDS)] * 3, 300).save(tmp_path / "tok")
    (tmp_path / "run/last.pt").unlink()
    train.main(command(world, tmp_path / "run", *RUN, "--steps", 1, "--tokenizer",
                       tmp_path / "tok"))
    assert len(list((tmp_path / "run").glob("token_lengths_*.npy"))) == 2


def test_dropouts_seed_is_a_fixed_function_of_seed_step_and_rank(world, tmp_path):
    """hash() of a tuple, from which the seed came once, may differ between versions of Python.

    This number may not.
    """
    seeds = []
    original = torch.manual_seed
    try:
        torch.manual_seed = lambda seed: seeds.append(seed) or original(seed)
        train.main(command(world, tmp_path / "run", *RUN, "--steps", 2, "--eval-every", 0, "--seed",
                           3))
    finally:
        torch.manual_seed = original
    states = [train.np.random.SeedSequence([3, step, 0]).generate_state(1, train.np.uint64)
              for step in (0, 1)]
    assert seeds[-2:] == [int(state[0]) for state in states]


@pytest.mark.slow
def test_a_dry_run_says_what_would_run_and_trains_nothing(world, tmp_path, capsys):
    train.main(command(world, tmp_path / "run", *RUN, "--dry-run"))
    printed = capsys.readouterr().out
    assert "global batch 16 = 1 processes x 1 x 16" in printed and "lr 0.01" in printed
    assert "memory of a process at the peak of a step, fp32 on a CPU, micro-batch of 16" in printed
    assert "activations" in printed
    assert not (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/metrics.jsonl").exists()


def test_every_flag_explains_itself(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    printed = capsys.readouterr().out
    flags = [line.split(",")[0].split()[0] for line in printed.splitlines()
             if line.startswith("  --")]
    flowing = " ".join(printed.split())
    assert len(flags) > 75 and "peak learning rate" in flowing and "default: 0.98" in flowing
    for cls in (Settings, flm.Config, vilt.Config):
        documented = documented_fields(cls)
        assert [field.name for field in fields(cls)
                if not documented.get(field.name, ("", ""))[1]] == []


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--list-recipes"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in printed for recipes in recipes.RECIPES.values()
                                        for name in recipes)


def test_the_head_that_ranks_learns_at_the_base_rate_as_in_the_original():
    for name, row in recipes.RECIPES["retrieval"].items():
        if name != "toy":
            assert row["head_lr_scale"] == 1.0, name


@pytest.mark.parametrize("objective", flm.OBJECTIVES)
@pytest.mark.parametrize("itm", [False, True])
def test_every_objective_trains_every_parameter_it_has(world, tmp_path, objective, itm):
    settings, flags = train.parse(command(world, tmp_path, "--objective", objective,
                                          *(["--itm"] if itm else [])))
    tok = BPE.load(world / "tok/vocab.json", world / "tok/merges.txt")
    config = tasks.PretrainFLM.adapt(replace(flm.PRESETS["toy"], **flags, vocab_size=len(tok),
                                             mask_id=tok.mask_id))
    task = tasks.PretrainFLM(replace(settings, pad_to=8), config, tok)
    dataset = task.dataset(task.table(settings, "train"), train=True)
    batch, notes = task.collate([dataset[0, i] for i in range(6)])
    model = flm.FLM(config)
    results = model(train.to_device(batch, torch.device("cpu"), config))
    assert set(results) == set(config.loss_weights) == set(notes["counts"])
    sum(loss for loss, _ in results.values()).backward()
    untrained = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


def test_silent_attention_says_nothing_at_first_and_learns_to_speak(world, tmp_path):
    command_line = [*command(world, tmp_path), "--silent-attention"]
    settings, flags = train.parse(command_line)
    model = flm.FLM(replace(flm.PRESETS["toy"], **flags))
    attentions = [module for module in model.modules() if isinstance(module, layers.Attention)]
    assert len(attentions) == 1 + 1 + 1 + 4 + 2     # ViT, text twice, fusion twice each, fusion's
    for attention in attentions:
        assert not attention.out.weight.any() and attention.q.weight.any()
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    images = torch.rand(2, 1, 3, 16, 16)
    words = [model.fuse(model.encode_image(image), model.encode_text(ids)).reconstructed
             for image in images]
    assert torch.equal(*words)                      # no row hears of the image
    train.main([*command_line, *RUN])
    trained = weights.load(tmp_path / "last.pt")
    for module in trained.modules():
        if isinstance(module, layers.Attention):
            assert module.out.weight.any()


def test_spans_and_prediction_rate_are_for_training_only(world, tmp_path):
    settings, flags = train.parse(command(world, tmp_path, "--corruption-rate", 0.5,
                                          "--prediction-rate", 0.5))
    tok = BPE.load(world / "tok/vocab.json", world / "tok/merges.txt")
    task = tasks.PretrainFLM(replace(settings, pad_to=8),
                             replace(flm.PRESETS["toy"], **flags, vocab_size=len(tok)), tok)
    table = task.table(settings, "train")
    (training, _), (evaluation, notes) = (
        task.collate([task.dataset(table, train)[0, i] for i in range(40)])
        for train in (True, False))
    assert "first" in training and (training["last"] > training["first"]).any()
    assert "first" not in evaluation
    words = notes["tokens"] - 40
    assert len(evaluation["reconstructed_rows"]) == words
    assert 0.35 * words < len(training["reconstructed_rows"]) < 0.65 * words


@pytest.mark.slow
def test_loss_falls_and_every_reported_number_is_there(world, tmp_path, capsys):
    train.main(command(world, tmp_path / "run", *RUN, "--steps", 40, "--log-every", 5,
                       "--eval-every", 20))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    training, validation = [x for x in lines if "lr" in x], [x for x in lines if "val_loss" in x]
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    assert validation[-1]["val_loss"] < validation[0]["val_loss"]
    assert [x["step"] for x in validation] == [10, 20, 40]
    assert [x["step"] for x in training][:3] == [1, 5, 10]
    assert {"loss", "reconstructed_loss", "reconstructed_accuracy", "samples_per_second",
            "data_wait", "memory_gb", "padding",
            "skipped", "unreadable", "cut", "seconds", "cpu_seconds",
            "gradient_norm"} <= training[-1].keys()
    described = json.loads((tmp_path / "run/config.json").read_text())
    assert described["settings"]["global_batch"] == 16 and described["config"]["width"] == 16
    printed = capsys.readouterr().out
    assert "ETA" in printed and "samples/s" in printed and "data wait" in printed
    model = weights.load(tmp_path / "run/last.pt")
    assert model.task == "pretrain" and model.step == 40 and not model.training
    tok = BPE.load(world / "tok/vocab.json", world / "tok/merges.txt")
    assert model.tokenizer.encode("a red cat") == tok.encode("a red cat")


@pytest.mark.slow
def test_bfloat16_follows_float32_and_keeps_float32_weights(world, tmp_path):
    for precision in ("fp32", "bf16"):
        train.main(command(world, tmp_path / precision, *RUN, "--precision", precision))
    (exact, _), (rounded, model) = (outcome(tmp_path / p) for p in ("fp32", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in model.values())
    exact, rounded = ([line["loss"] for line in lines if "loss" in line]
                      for lines in (exact, rounded))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("more", [(), ("--muon-lr", 0.02)], ids=["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(world, tmp_path, monkeypatch,
                                                                      more):
    calls, forward = [], flm.FLM.forward

    def poisoned(self, *given):
        results = forward(self, *given)
        if self.training:
            calls.append({n: p.detach().clone() for n, p in self.named_parameters()})
            if len(calls) == 3:
                results = {k: (loss * float("nan"), hits) for k, (loss, hits) in results.items()}
        return results

    monkeypatch.setattr(flm.FLM, "forward", poisoned)
    train.main(command(world, tmp_path / "run", *RUN, *more))
    # step 3 was skipped …
    assert all(torch.equal(calls[2][n], calls[3][n]) for n in calls[2])
    # … and step 4 was not
    assert any(not torch.equal(calls[3][n], calls[4][n]) for n in calls[3])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["skipped"] for x in lines if "lr" in x] == [0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(v).all()
               for v in weights.read(tmp_path / "run/last.pt")["model"].values())


def test_the_run_stops_when_gradients_stay_not_finite(world, tmp_path, monkeypatch):
    forward = flm.FLM.forward

    def overflowing(self, *given):
        return {k: (loss * float("inf"), hits) for k, (loss, hits) in forward(self, *given).items()}

    monkeypatch.setattr(flm.FLM, "forward", overflowing)
    with pytest.raises(SystemExit, match="4 gradients in a row were not finite"):
        train.main(command(world, tmp_path / "run", *RUN, "--max-skipped", 4))


@pytest.mark.slow
def test_undecodable_images_are_logged_and_stop_the_run_when_many(tmp_path, world):
    write_captions(tmp_path / "few_caption_train.arrow", 60, broken={5})
    write_captions(tmp_path / "many_caption_train.arrow", 60, broken=set(range(0, 60, 2)))
    common = ["--data", tmp_path, "--steps", 12, "--eval-every", 0]
    train.main(command(world, tmp_path / "few", *RUN, *common, "--datasets", "few"))
    named = (tmp_path / "few/unreadable_0.txt").read_text().splitlines()
    last = json.loads((tmp_path / "few/metrics.jsonl").read_text().splitlines()[-1])
    assert last["unreadable"] == len(named) > 0 and all("few_caption_train.arrow row 5: " in line
                                                        for line in named)
    with pytest.raises(SystemExit, match="images cannot be decoded"):
        train.main(command(world, tmp_path / "many", *RUN, *common, "--datasets", "many"))


@pytest.mark.parametrize("arguments, message", [
    (["--global-batch", 500], "global batch 500: there are only 120 captions"),
    (["--captions-per-image", 0], "--captions-per-image 0: at least 1 is expected"),
    (["--captions-per-image", 2, "--itm", "--micro-batch", 2],
     "from the micro-batch: it must hold at least 3 pairs"),
    (["--precision", "fp8"], "--precision fp8"), (["--seed", -1], "--seed -1"),
    (["--data", "/nowhere"], "/nowhere: there is no such directory"),
                                                (["--datasets", "coco"],
                                                 "no caption files of dataset 'coco'"),
    (["--shard"], "--shard needs several processes"),
                                                (["--width", 31],
                                                 "width 31 does not divide by heads"),
    (["--image-size", 20], "image_size 20"), (["--tokenizer", "/nowhere"], "/nowhere"),
    (["--tokenizer", "", "--vocab-size", 50265], "--tokenizer DIR must name")])
def test_impossible_settings_are_refused_in_one_sentence(world, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as error:
        train.main(command(world, tmp_path / "run", *RUN, *arguments))
    assert message in str(error.value) and "\n" not in str(error.value).strip()
    assert not (tmp_path / "run/last.pt").exists()


def test_another_global_batch_takes_the_largest_micro_batch_dividing_it_and_a_cpu_no_large_one():
    def split(world=1, device="cpu", **how):
        return split_batch(Settings(**how), machine.Machine(0, world, torch.device(device), "fp32"))
    assert split(global_batch=24, micro_batch=64) == (24, 1)
    assert split(global_batch=100, micro_batch=64) == (50, 2)
    assert split(2, global_batch=90, micro_batch=32) == (15, 3)
    assert split(global_batch=256) == (32, 8) and split(global_batch=256, device="cuda") == (256, 1)
    with pytest.raises(ValueError, match="2 processes cannot share it"):
        split(2, global_batch=15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(world, tmp_path):
    with pytest.raises(SystemExit, match="--device cuda: there is no GPU"):
        train.main(command(world, tmp_path, *RUN, "--device", "cuda"))


@pytest.mark.parametrize("arguments",
                         [["--recipe", "flm-b31"], ["--no-such-flag", "1"], ["--model", "huge"],
                          ["--task", "vqa3"]])
def test_unknown_names_are_refused(world, tmp_path, arguments):
    with pytest.raises(SystemExit) as error:
        train.main(command(world, tmp_path, *arguments))
    assert error.value.code == 2


@pytest.mark.parametrize("make, message", [
    (lambda p: p.write_bytes(b"hello"), "neither a torch nor a safetensors file"),
    (lambda p: p.write_bytes(b""), "an empty file"),
    (lambda p: torch.save({"a": 1}, p), "not a checkpoint of this project"),
                                           (lambda p: None, "no such checkpoint")])
def test_files_that_are_no_checkpoint_are_refused_in_a_sentence(tmp_path, make, message):
    make(tmp_path / "x.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        weights.load(tmp_path / "x.pt")


def test_parameter_groups_follow_the_rule():
    model = flm.FLM(replace(flm.PRESETS["toy"], itm=True))
    settings = Settings(head_lr_scale=7.0, fusion_lr_scale=5.0, weight_decay=0.1)
    group_of = {id(p): g for g in parameter_groups(model, settings) for p in g["params"]}
    rule = {"vit.patch.weight": (1, 0.1), "vit.position": (1, 0), "vit.cls": (1, 0),
            "vit.norm_pre.weight": (1, 0),
            "embed.word.weight": (1, 0.1), "embed.norm.bias": (1, 0),
            "text_layers.0.mlp.0.bias": (1, 0), "token_type": (1, 0.1),
            "fusion_layers.1.cross_attention.kv.weight": (5, 0.1),
            "fusion_layers.1.cross_norm.weight": (5, 0),
            "text_to_fusion.weight": (5, 0.1), "text_reconstructor.0.mlp.2.weight": (5, 0.1),
            "pooler.weight": (5, 0.1),
            "vocab_head.decoder.weight": (7, 0.1), "vocab_head.decoder.bias": (7, 0),
            "itm_head.weight": (7, 0.1)}
    parameters = dict(model.named_parameters())
    for name, (scale, decay) in rule.items():
        group = group_of[id(parameters[name])]
        assert (group["peak"], group["weight_decay"]) == (pytest.approx(scale * settings.lr),
                                                          decay), name
    muon = replace(settings, muon_lr=0.02)
    stepped = {name for name, kept in moments_of(model, muon).items() if "mean" in kept}
    assert {"vit.patch.weight", "text_layers.0.mlp.2.weight", "pooler.weight",
            "text_to_fusion.weight",
            "fusion_reconstructor.0.cross_attention.kv.weight"} <= stepped
    assert not [name for name in stepped if "head." in name or "embed" in name or "position" in name
                or "norm" in name or "bias" in name]
    assert [group["peak"] for group in parameter_groups(model, muon) if group["muon"]] == [0.02]


def test_muon_steps_as_torch_does(monkeypatch):
    # torch iterates Keller Jordan's polynomial five times.
    monkeypatch.setattr(optimizers, "POLAR_EXPRESS", [(3.4445, -4.7750, 2.0315)] * 5)
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False),
                               torch.nn.Linear(40, 16, bias=False))
    theirs = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False),
                                 torch.nn.Linear(40, 16, bias=False))
    theirs.load_state_dict(ours.state_dict())
    before = [weight.detach().clone() for weight in ours.parameters()]
    optimizer = Muon([{"params": list(ours.parameters()), "muon": True, "weight_decay": 0.1}],
                     lr=0.02)
    oracle = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9)
    for k in range(5):
        x = torch.randn(100, 24)
        for model, stepped in ((ours, optimizer), (theirs, oracle)):
            stepped.zero_grad()
            model(x).square().sum().backward()
            stepped.step()
        if k == 0:              # both had the same gradients so far
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(optimizer.state[a]["mean"],
                                           oracle.state[b]["momentum_buffer"])
    for start, a, b in zip(before, ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() < 0.1 * (b - start).norm()        # torch iterates in bfloat16


@pytest.mark.parametrize("shape", [(3, 40, 16), (2, 24, 24), (2, 16, 64), (1, 8, 8)])
def test_the_step_of_muon_is_as_long_in_weak_directions_as_in_strong_ones(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2.3, min(shape[1:]))        # 0.005 of the first, 0.003 of the norm
    x = left * values @ right
    stepped = orthogonal(x)
    singular = torch.linalg.svdvals(stepped)
    assert 0.79 < singular.min() and singular.max() < 1.21
    assert (stepped - left @ right).norm() < 0.2 * (left @ right).norm()    # x's own directions


def test_a_gradient_of_zeros_or_of_one_direction_is_stepped_too():
    one = torch.zeros(1, 8, 8)
    one[0, 2, 5] = 7.0
    torch.testing.assert_close(orthogonal(one) / 1.2, one / 7, rtol=0.01, atol=1e-6)
    assert not orthogonal(torch.zeros(1, 4, 20)).any()


def test_without_muon_the_optimizer_is_adamw_to_the_last_bit():
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 16))
    theirs = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 16))
    theirs.load_state_dict(ours.state_dict())
    how = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-8}
    optimizer = Muon([{"params": list(ours.parameters()), "muon": False, "weight_decay": 0.1}],
                     **how)
    oracle = torch.optim.AdamW(theirs.parameters(), weight_decay=0.1, fused=True, **how)
    for _ in range(3):
        x = torch.randn(100, 24)
        for model, stepped in ((ours, optimizer), (theirs, oracle)):
            stepped.zero_grad()
            model(x).square().sum().backward()
            stepped.step()
    assert all(torch.equal(a, b)
               for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_muon_treats_stacked_matrices_apart_and_skips_what_is_not_finite():
    torch.manual_seed(0)
    stacked, first, second = (torch.nn.Parameter(torch.randn(n, 8)) for n in (16, 8, 8))
    with torch.no_grad():
        stacked.copy_(torch.cat([first, second]))
    optimizer = Muon([{"params": [stacked, first, second], "muon": True, "weight_decay": 0.0}],
                     lr=0.1)
    stacked.grad = torch.randn(16, 8)
    first.grad, second.grad = stacked.grad.chunk(2)
    optimizer.step()
    torch.testing.assert_close(stacked, torch.cat([first, second]))
    before, stacked.grad = stacked.detach().clone(), torch.full((16, 8), torch.nan)
    kept = optimizer.state[stacked]["mean"].clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(stacked, before) and torch.equal(optimizer.state[stacked]["mean"], kept)


def test_the_rate_rises_linearly_and_falls_to_zero():
    settings = Settings(steps=20, warmup=0.1)
    assert [rate_at(s, settings) for s in (0, 1, 2, 11, 20)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert rate_at(0, replace(settings, warmup=0.0)) == 1
    settings = replace(settings, decay=0.5)     # 2 steps of warm-up, 9 at the peak, 9 of the fall
    assert [rate_at(s, settings)
            for s in (1, 2, 11, 14, 20)] == pytest.approx([0.5, 1, 1, 2 / 3, 0])


def test_launchers_of_all_kinds_are_understood():
    assert machine.find_ranks({}) == (0, 1, 0)
    assert machine.find_ranks({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (3, 8, 1)
    assert machine.find_ranks({f"OMPI_COMM_WORLD_{k}": v
                               for k, v in (("RANK", "5"), ("SIZE", "6"),
                                            ("LOCAL_RANK", "2"))}) == (5, 6, 2)
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    assert machine.find_ranks(slurm | {"SLURM_STEP_ID": "0"}) == (9, 16, 1)


def test_inside_a_slurm_allocation_without_srun_a_process_runs_alone_and_says_so(capsys):
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77"}
    assert machine.find_ranks(shell) == (0, 1, 0)
    assert "srun did not start this process" in capsys.readouterr().err


def test_a_launcher_that_sets_half_of_its_variables_is_named():
    sentence = "LOCAL_RANK is not set: torchrun sets RANK, WORLD_SIZE and LOCAL_RANK"
    with pytest.raises(ValueError, match=sentence):
        machine.find_ranks({"RANK": "0", "WORLD_SIZE": "2"})


def test_several_nodes_without_an_address_are_refused(monkeypatch):
    for name in [name for name in os.environ
                 if name.startswith(("MASTER_", "SLURM_", "RANK", "WORLD"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_STEP_ID": 0, "SLURM_PROCID": 3, "SLURM_NTASKS": 4,
                        "SLURM_LOCALID": 1, "SLURM_NNODES": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="MASTER_ADDR is not set: with several nodes"):
        machine.set_up("cpu")


def test_the_gpu_that_was_asked_for_is_the_one_that_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.find_device("cuda:1", world=1, local_rank=0) == torch.device("cuda:1")
    assert machine.find_device("cuda", world=2, local_rank=1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:1: 2 processes have a GPU each"):
        machine.find_device("cuda:1", world=2, local_rank=0)
    with pytest.raises(ValueError, match="--device cuda:7: there are 2 GPUs here"):
        machine.find_device("cuda:7", world=1, local_rank=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_wait_for_each_other_longer_than_nccl_does_and_know_their_gpu(
        monkeypatch, device):
    joined = {}
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1,
                        "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(machine.dist, "init_process_group",
                        lambda backend, **how: joined.update(how, backend=backend))
    monkeypatch.setattr(machine.dist, "rendezvous", lambda *_, timeout: iter([("store", 1, 2)]))
    monkeypatch.setattr(machine.dist, "new_group", lambda backend, timeout: (backend, timeout))
    assert machine.set_up(device, "bf16").messages == ("gloo", machine.TIMEOUT)
    assert joined["timeout"] >= timedelta(hours=1)
    assert (joined["rank"], joined["world_size"]) == (1, 2)
    expected = ("nccl", torch.device("cuda:1")) if device == "cuda" else ("gloo", None)
    assert (joined["backend"], joined["device_id"]) == expected


def test_shards_travel_in_the_precision_in_which_they_are_used(monkeypatch):
    policies = []
    monkeypatch.setattr(train, "fully_shard", lambda module, mp_policy: policies.append(mp_policy))
    model = flm.FLM(flm.PRESETS["toy"])
    train.shard(model, "bf16")
    assert {(policy.param_dtype, policy.reduce_dtype)
            for policy in policies} == {(torch.bfloat16, torch.float32)}
    assert len(policies) == 1 + sum(len(m) for m in model.modules()
                                    if isinstance(m, torch.nn.ModuleList))


def test_float32_is_float32_also_where_a_gpu_would_round_it():
    for precision, expected in (("bf16", "high"), ("fp32", "highest")):
        machine.set_up("cpu", precision)
        assert torch.get_float32_matmul_precision() == expected
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")     # of convolutions


def test_attention_whose_gradients_can_be_nan_is_left_out():
    torch.backends.cuda.enable_cudnn_sdp(True)
    machine.set_up("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_published_recipes_parse_and_resolve():
    for task, rows in recipes.RECIPES.items():
        for name in rows:
            settings, flags = train.parse(["--task", task, "--recipe", name, "--data", "d", "--out",
                                           "o"])
            replace(recipes.MODELS[settings.model], **flags)
    settings, flags = train.parse(["--recipe", "flm-b32", "--data", "d", "--out", "o", "--steps",
                                   "5"])
    assert (settings.steps, settings.global_batch, settings.lr,
            settings.warmup) == (5, 4096, 8e-5, 0.05)
    assert flags == {"image_size": 288, "objective": "flm"}


@pytest.mark.slow
def test_real_photographs_and_captions_train(shared, tmp_path):
    """The whole path on real input: prepare.py, the RoBERTa tables, train.py, weights.load."""
    import prepare
    prepare.main(["karpathy", str(shared / "data/coco_small"), "--out", str(tmp_path)])
    train.main([*SIZES, "--data", str(tmp_path), "--tokenizer",
                str(shared / "tokenizers/roberta-base"), "--out",
                str(tmp_path / "run"), "--steps", "12", "--global-batch", "16", "--micro-batch",
                "8", "--lr", "1e-2",
                "--log-every", "4", "--eval-every", "12", "--eval-samples", "16", "--image-size",
                "32"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    training = [x for x in lines if "lr" in x]
    assert training[-1]["loss"] < training[0]["loss"] - 1 and training[-1]["unreadable"] == 0
    assert weights.load(tmp_path / "run/last.pt").config.vocab_size == 50265
