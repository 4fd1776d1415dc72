"""Tensor parallelism: the same losses, weights and files as one process, whatever the layout."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (TINY, TINY_VILT, TRAIN_VILT, assert_same, tiny, together,
                      train_command as command, train_outcome as outcome, vilt_model,
                      write_caption_world)

import flm
import train
import vilt
import weights
from layers import Attention
from recipes import MODELS
from training import checkpoints, parallel, settings
from training.machine import Machine

ROOT = Path(__file__).resolve().parents[1]
# The rate is constant, so that a run may end at any step and be extended.
RUN = shlex.split("--global-batch 8 --micro-batch 4 --pad-to 24 --lr 1e-2 --head-lr-scale 1 "
                  "--warmup 0 --decay 0.01 --clip 1.0 --log-every 1 --eval-every 2 "
                  "--eval-samples 8 --save-every 2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


def contents(out):
    """What a checkpoint says of the model and the optimizer besides their numbers."""
    saved = weights.read(out / "last.pt")
    moments = {name: {key: checkpoints.kind_of(kept) for key, kept in state.items()}
               for name, state in saved["optimizer"]["state"].items()}
    shapes = {name: tensor.shape for name, tensor in saved["model"].items()}
    groups = [group["params"] for group in saved["optimizer"]["param_groups"]]
    steps = {float(state["step"]) for state in saved["optimizer"]["state"].values()}
    return shapes, moments, groups, steps, len(saved["sums"])


# -- as one ----------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_groups_of_two_processes_train_as_one_process(world, tmp_path):
    # Without a warm-up AdamW's first steps are as long for a gradient that is nothing but rounding.
    more = [*RUN, "--steps", 6, "--warmup", 0.2, "--decay", 1, "--fusion-layers", 1,
            "--reconstructor-fusion-layers", 1]
    printed = together(4, command(world, tmp_path / "2x2", *more, "--tensor-parallel", 2))
    train.main(command(world, tmp_path / "1", *more))
    assert "global batch 8 = 2 groups of 2 processes x 1 x 4" in printed
    assert_same(outcome(tmp_path / "1"), outcome(tmp_path / "2x2"), 2e-5)
    assert contents(tmp_path / "1")[:4] == contents(tmp_path / "2x2")[:4]
    assert contents(tmp_path / "2x2")[4] == 2           # the sums of each group, once


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_as_if_it_had_never_changed(world, tmp_path):
    more = [*RUN, "--no-itm", "--resume"]
    out = tmp_path / "run"
    train.main(command(world, out, *more, "--steps", 2, sizes=TRAIN_VILT))
    together(2, command(world, out, *more, "--steps", 4, "--tensor-parallel", 2, sizes=TRAIN_VILT))
    assert weights.load(out / "last.pt").step == 4      # as eval.py opens it
    together(4, command(world, out, *more, "--steps", 6, "--tensor-parallel", 2, "--shard",
                      sizes=TRAIN_VILT))
    assert contents(out)[4] == 2
    train.main(command(world, out, *more, "--steps", 8, sizes=TRAIN_VILT))
    train.main(command(world, tmp_path / "whole", *more, "--steps", 8, sizes=TRAIN_VILT))
    assert_same(outcome(tmp_path / "whole"), outcome(out), 2e-5)
    assert contents(out) == contents(tmp_path / "whole")


# -- the plan --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_the_plan_divides_every_attention_and_feed_forward_and_the_vocabulary(name):
    model = weights.outline_of(MODELS[name])
    linear = {path for path, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}
    whole = {path for path in linear if not parallel.how_divided(path)}
    heads = {"vocab_head.dense", "pooler", "itm_head", "text_to_fusion", "image_to_fusion"}
    assert whole <= heads
    attentions = [path for path, module in model.named_modules() if isinstance(module, Attention)]
    for path in attentions:
        assert parallel.how_divided(f"{path}.q") == "columns", path
        assert parallel.how_divided(f"{path}.kv") == "columns of keys and of values", path
        assert parallel.how_divided(f"{path}.out") == "rows", path


def test_colours_of_patches_stay_whole():
    model = weights.outline_of(replace(TINY_VILT, mpp=True))
    names = [name for name, _ in model.named_modules() if name.startswith("patch_head.")]
    assert names and not any(map(parallel.how_divided, names))


@pytest.mark.parametrize("make, config", [(tiny, {}), (vilt_model, TINY_VILT)], ids=["flm", "vilt"])
def test_a_divided_models_names_become_those_of_files_and_back(make, config):
    whole = make(**config) if make is tiny else make(config)
    divided = make(**config) if make is tiny else make(config)
    for module in list(divided.modules()):
        if isinstance(module, Attention):
            module.kv = parallel.KeysAndValues(module.kv)
    state = whole.state_dict()
    own = parallel.own_names(state, divided)
    assert own.keys() == divided.state_dict().keys() != state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in divided.state_dict().items())
    again = parallel.whole_names(own)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert parallel.own_names(state, whole).keys() == state.keys()


def test_a_process_is_said_to_hold_its_part_of_divided_layers_and_the_whole_of_others():
    model = weights.outline_of(TINY_VILT)
    whole, half = (parallel.parameters_of_one(model, processes) for processes in (1, 2))
    assert sum(whole.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert half["blocks.0.attention.kv.weight"] == whole["blocks.0.attention.kv.weight"] / 2
    assert half["vocab_head.decoder.weight"] == whole["vocab_head.decoder.weight"] / 2
    assert half["embed.word.weight"] == whole["embed.word.weight"]


def test_keys_and_values_count_their_steps_apart():
    divided = torch.nn.ModuleDict({"kv": parallel.KeysAndValues(torch.nn.Linear(2, 4))})
    moments = {"a.kv.bias": {"step": torch.tensor(2.0), "exp_avg": torch.arange(4)}}
    own = parallel.own_names(moments, torch.nn.ModuleDict({"a": divided}))
    own["a.kv.k.bias"]["step"] += 1
    assert float(own["a.kv.v.bias"]["step"]) == 2
    assert own["a.kv.v.bias"]["exp_avg"].tolist() == [2, 3]


def test_keys_and_values_as_two_layers_are_those_of_one():
    attention = Attention(24, 3)
    memory = torch.randn(2, 5, 24)
    expected = attention.kv(memory)
    torch.testing.assert_close(parallel.KeysAndValues(attention.kv)(memory), expected)


def test_the_norm_and_the_clipping_take_gradients_of_all_kinds_together():
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.full((3,), value)
    kinds = [[parameters[0]], [parameters[1]]]          # as of two meshes
    norm = parallel.total_norm([parameter.grad for parameter in parameters])
    assert float(norm) == pytest.approx(math.sqrt(75))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "alike", lambda tensors: [[tensor] for tensor in tensors])
        apart = parallel.total_norm([parameter.grad for parameter in parameters])
        assert float(apart) == pytest.approx(math.sqrt(75))
        parallel.clip([p for some in kinds for p in some], 1.0, norm)
    clipped = torch.cat([parameter.grad for parameter in parameters])
    assert float(clipped.norm()) == pytest.approx(1.0, abs=1e-5)


def test_processes_of_a_group_see_the_same_data_and_groups_share_it():
    places = [Machine(rank, 4, torch.device("cpu"), "fp32", tensor=2) for rank in range(4)]
    assert [place.data_rank for place in places] == [0, 0, 1, 1]
    assert {place.data_world for place in places} == {2}
    assert settings.split_batch(settings.Settings(global_batch=12), places[3]) == (6, 1)


# -- what does not divide --------------------------------------------------------------------------

@pytest.mark.parametrize("config, processes, words", [
    (flm.Config(), 8, "--tensor-parallel 8 does not divide --heads 12"),
    (MODELS["base-l14"], 8, "--tensor-parallel 8 does not divide --heads 12"),
    (replace(TINY, vit_heads=2), 4, "--tensor-parallel 4 does not divide --vit-heads 2"),
    (replace(TINY, vit_heads=4, text_heads=2), 4,
     "--tensor-parallel 4 does not divide --text-heads 2"),
    (replace(TINY_VILT, mlp_width=40), 3, "--tensor-parallel 3 does not divide --mlp-width 40"),
    (vilt.Config(), 5, "--tensor-parallel 5 does not divide --heads 12"),
    (flm.Config(label_smoothing=0.1), 2, "--label-smoothing 0.1: torch has no such loss")])
def test_models_that_cannot_be_divided_are_refused(config, processes, words):
    with pytest.raises(ValueError, match=words):
        parallel.check(config, processes)
    parallel.check(config, 1)


@pytest.mark.parametrize("flags, words", [
    (["--tensor-parallel", 2], "--tensor-parallel 2: 1 processes do not divide into groups of 2"),
    (["--tensor-parallel", 0], "--tensor-parallel 0: 1 processes do not divide")])
def test_processes_that_do_not_divide_into_groups_are_refused(world, tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words):
        train.main(command(world, tmp_path / "run", *RUN, *flags))


def test_what_needs_whole_matrices_is_refused():
    place = Machine(0, 2, torch.device("cpu"), "fp32", tensor=2)
    for changes, words in ((dict(muon_lr=0.01), "--muon-lr needs whole matrices"),
                           (dict(compile=True), "--compile does not go with --tensor-parallel"),
                           (dict(chunk_loss=True), "--chunk-loss does not go with"),
                           (dict(static_graph=True), "--static-graph does not go with"),
                           (dict(micro_batch=settings.AUTO), "--micro-batch auto needs whole"),
                           (dict(precision="fp16"), "--precision fp16 does not go with"),
                           (dict(shard=True), "--shard needs more than 2 processes")):
        with pytest.raises(ValueError, match=words):
            settings.check(settings.Settings(tensor_parallel=2, out="nowhere", **changes), place)


def test_colossalais_vilt_on_four_processes_is_a_command_that_fits():
    """The README's: mpirun -np 4 python train.py --model vilt --recipe vilt-coco …"""
    line = "--model vilt --recipe vilt-coco --tensor-parallel 2 --data d --out nowhere"
    flags = shlex.split(line)
    chosen, config_flags = train.parse(flags)
    place = Machine(3, 4, torch.device("cuda"), "bf16", tensor=chosen.tensor_parallel)
    settings.check(chosen, place)
    parallel.check(replace(MODELS[chosen.model], **config_flags), chosen.tensor_parallel)
    assert settings.split_batch(chosen, place) == (256, 8)
