"""Switches that make a step smaller or faster.

What each computes is what the plain way computes.
"""

from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flm
import losses
import train
import vilt
from training import machine, switches
from conftest import (TRAIN, TRAIN_FLM, TRAIN_VILT, assert_same, together, train_command,
                      train_outcome, write_caption_world)
from training.loading import batches_of
from training.runs import open_run

# -- The loss of words in chunks of rows -----------------------------------------------------------

def head_gradients(function, rows=150, width=24, words=211):
    """(losses, hits) of some rows by a function, then the gradients of rows, weights and bias."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=draw).requires_grad_()
    weight = (torch.randn(words, width, generator=draw) * 0.3).requires_grad_()
    bias = torch.randn(words, generator=draw).requires_grad_()
    targets = torch.randint(0, words, (rows,), generator=draw)
    found, hits = function(x, weight, bias, targets)
    # losses have weights of their own
    shares = torch.linspace(0.5, 2.0, rows) / rows
    (found * shares).sum().backward()
    return found.detach(), hits, x.grad, weight.grad, bias.grad


@pytest.fixture(params=["torch's", "in a loop"])
def way(request, monkeypatch):
    """Both ways in which chunks are computed, with chunks that do not divide the rows."""
    monkeypatch.setattr(losses, "ROWS", 64)
    if request.param == "in a loop":
        monkeypatch.setattr(losses, "LinearCrossEntropyOptions", None)
    elif losses.LinearCrossEntropyOptions is None:
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count_hits", [True, False])
def test_the_loss_in_chunks_is_the_plain_one_and_so_are_its_gradients(way, smoothing, count_hits):
    def plain(x, weight, bias, targets):
        return losses.row_losses(F.linear(x, weight, bias), targets, smoothing)

    def chunked(x, weight, bias, targets):
        return losses.losses_in_chunks(x, weight, bias, targets, smoothing, count_hits)

    expected, hits, *gradients = head_gradients(plain)
    found, counted, *ours = head_gradients(chunked)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for theirs, mine in zip(gradients, ours, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    assert torch.equal(counted, hits) if count_hits else counted.isnan().all()


def test_no_more_rows_than_a_chunk_have_logits_at_a_time(way, monkeypatch):
    shapes = []
    linear, torchs = F.linear, getattr(F, "linear_cross_entropy", None)
    monkeypatch.setattr(F, "linear", lambda x, *more: shapes.append(len(x)) or linear(x, *more))
    if torchs:
        monkeypatch.setattr(F, "linear_cross_entropy",
                            lambda *given, options, **more: shapes.append(options.batch_chunk_size)
                            or torchs(*given, options=options, **more))
    head_gradients(lambda *given: losses.losses_in_chunks(*given, count_hits=False))
    assert max(shapes) == losses.ROWS


def test_the_loss_in_chunks_is_as_exact_in_bfloat16_as_the_plain_one(way):
    exact = head_gradients(lambda x, w, b, t: losses.row_losses(F.linear(x, w, b), t))
    with torch.autocast("cpu", torch.bfloat16):
        plain = head_gradients(lambda x, w, b, t: losses.row_losses(F.linear(x, w, b), t))
        chunked = head_gradients(lambda *given: losses.losses_in_chunks(*given, count_hits=False))
    for k in (0, 2, 3, 4):
        error, ours = ((some[k] - exact[k]).norm() / exact[k].norm() for some in (plain, chunked))
        # half a digit of bfloat16
        assert chunked[k].dtype == torch.float32 and ours < 2 * error + 2 ** -9


def test_the_switch_of_one_model_leaves_another_alone():
    one, other = (flm.FLM(flm.PRESETS["toy"]) for _ in range(2))
    one.vocab_head.chunked = True
    assert not other.vocab_head.chunked


# -- Runs with a switch, beside the plain run ------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_caption_world(tmp_path_factory.mktemp("world"))


def outcome(world, out, *flags, sizes=TRAIN_FLM):
    """What a run of six steps with dropout comes to."""
    train.main(train_command(world, out, *TRAIN, "--micro-batch", 8, "--dropout", 0.1, *flags,
                             sizes=sizes))
    return train_outcome(out)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return outcome(world, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [TRAIN_FLM, TRAIN_VILT], ids=["flm", "vilt"])
def test_a_run_with_chunks_learns_the_same_and_counts_hits_where_it_reports(world, tmp_path, sizes):
    flags = ("--log-every", 2, *(() if sizes is TRAIN_VILT else ("--itm",)))
    (lines, model), (ours, same) = (outcome(world, tmp_path / name, *flags, *more, sizes=sizes)
                                    for name, more in (("plain", ()), ("chunks", ["--chunk-loss"])))
    name = "mlm" if sizes is TRAIN_VILT else "left_to_right"
    for line, mine in zip(lines, ours, strict=True):
        assert line.keys() == mine.keys() and (f"{name}_accuracy" in line
                                               or f"val_{name}_accuracy" in line)
        words = {key: value for key, value in line.items()
                 if not (key.endswith("accuracy") and "val" not in key)}
        assert {key: mine[key] for key in words} == pytest.approx(words, abs=2e-5)
        assert mine.get("itm_accuracy") == line.get("itm_accuracy")             # always counted
    assert lines[0] == pytest.approx(ours[0], abs=2e-5)                         # of step 1 alone
    assert_same(([], model), ([], same), 2e-5)


# -- Layers that are computed again, weights that are cast once ------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("sizes", [TRAIN_FLM, TRAIN_VILT], ids=["flm", "vilt"])
def test_layers_computed_again_draw_the_same_dropout_and_learn_the_same(
        world, tmp_path, plain, sizes):
    expected = plain if sizes is TRAIN_FLM else outcome(world, tmp_path / "plain", sizes=sizes)
    assert_same(expected,
                outcome(world, tmp_path / "again", "--checkpoint-activations", sizes=sizes), 0)


@pytest.mark.parametrize("preset", ["toy", "vilt-toy"])
def test_layers_computed_again_keep_less_for_the_backward_pass(preset):
    config = {**flm.PRESETS, **vilt.PRESETS}[preset]
    model = vilt.ViLT(config) if preset == "vilt-toy" else flm.FLM(config)
    images, ids = torch.rand(2, 3, 64, 64), torch.arange(5, 25).view(2, 10)

    def kept_bytes():
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.fuse(model.encode_image(images), model.encode_text(ids)).reconstructed.sum()
        return sum(kept.values()) - sum(4 * p.numel() for p in model.parameters()
                                        if p.data_ptr() in kept)

    before = kept_bytes()
    layers = [m for m in model.modules()
              if type(m).__name__ in ("ViTBlock", "StreamLayer", "ReconstructorLayer")]
    switches.checkpoint_layers(model)
    recomputed = [layer for layer in layers if "forward" in vars(layer)]
    if preset == "vilt-toy":
        assert recomputed == layers
    else:
        assert set(layers) - set(recomputed) == set(model.text_layers)
    assert kept_bytes() < 0.6 * before


@pytest.mark.slow
def test_weights_cast_once_a_step_give_the_same_gradients_with_fewer_casts(
        world, tmp_path, monkeypatch):
    bf16 = ("--precision", "bf16", "--micro-batch", 4, "--steps", 2, "--itm")

    class Casts(TorchDispatchMode):
        """Counts the copies of weights of two dimensions in bfloat16."""
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            half = (kwargs or {}).get("dtype") == torch.bfloat16
            Casts.count += half and isinstance(args[0], torch.nn.Parameter) and args[0].ndim == 2
            return function(*args, **(kwargs or {}))

    found, casts = [], []
    train_step = train.train_step

    def counted(*given):
        with Casts():
            train_step(*given)

    monkeypatch.setattr(train, "train_step", counted)
    for name, more in (("plain", ()), ("once", ["--keep-casts"])):
        Casts.count = 0
        found.append(outcome(world, tmp_path / name, *bf16, *more))
        casts.append(Casts.count)
    assert_same(*found, 0)
    assert casts[1] > 0 and casts[0] == 4 * casts[1]            # four micro-batches


@pytest.mark.slow
def test_two_processes_learn_the_same_with_bucket_views_and_a_static_graph(world, tmp_path):
    def of_two(name, *flags):
        together(2, train_command(world, tmp_path / name, *TRAIN, *flags))
        return train_outcome(tmp_path / name)

    plain = of_two("plain")
    assert_same(plain, of_two("both", "--bucket-views", "--static-graph"), 0)
    assert_same(plain, of_two("views", "--bucket-views", "--micro-batch", 4), 2e-5)


def test_a_static_graph_with_several_micro_batches_is_refused(world, tmp_path):
    settings, _ = train.parse(train_command(world, tmp_path, *TRAIN, "--micro-batch", 8,
                                            "--static-graph"))
    with pytest.raises(ValueError,
                       match="--static-graph: DDP sends the gradients of each micro-batch"):
        train.check(settings, machine.set_up("cpu"))


def test_a_task_without_words_refuses_the_loss_of_words_in_chunks(world, tmp_path):
    from training.settings import check_task
    settings, _ = train.parse(train_command(world, tmp_path, "--task", "retrieval", "--chunk-loss"))
    with pytest.raises(ValueError,
                       match="--chunk-loss: is for words, which head retrieval does not predict"):
        check_task(settings, {}, replace(flm.PRESETS["toy"], head="retrieval"), 4)


def test_sums_of_an_older_checkpoint_count_all_hits():
    from training.report import Sums, with_counted
    sums = Sums({"reconstructed": 1.0, "wpa": 0.1}, torch.device("cpu"))
    sums.values += with_counted(torch.tensor([[6.0, 2.0], [3.0, torch.nan], [4.0, 2.0]],
                                             dtype=torch.float64))
    assert sums.read() == {"loss": 1.6, "reconstructed_loss": 1.5, "reconstructed_accuracy": 0.75,
                           "wpa_loss": 1.0}


# -- A small set of shapes -------------------------------------------------------------------------

LENGTHS = ("--pad-to", 8, 12, 16)


def opened(world, out, *flags, sizes=TRAIN_FLM):
    """A run before its first step, and its model."""
    settings, config_flags = train.parse(train_command(world, out, *TRAIN, "--steps", 14,
                                                       "--micro-batch", 8, *flags, sizes=sizes))
    run = open_run(settings, config_flags, machine.set_up("cpu"))
    torch.manual_seed(0)
    model = train.weights.model_of(run.config)
    switches.lighten(model, settings)
    return run, model


@pytest.mark.parametrize("flags",
                         [(), ("--objective", "mlm"), ("--label-smoothing", 0.1), ("--chunk-loss",),
                          TRAIN_VILT],
                         ids=["flm", "mlm", "smoothing", "chunks", "vilt"])
def test_rows_that_fill_up_a_shape_change_no_loss_and_no_gradient(world, tmp_path, flags):
    sizes, flags = (TRAIN_VILT, ()) if flags is TRAIN_VILT else (TRAIN_FLM, flags)
    found = []
    for pad_to in ((), LENGTHS):
        # dropout draws by shape
        run, model = opened(world, tmp_path, "--dropout", 0, *flags, *pad_to, sizes=sizes)
        batch, notes = next(batches_of(run, 0))
        filled = sum(int((batch[name] < 0).sum()) for name in batch if name.endswith("_rows"))
        assert (filled > 0) == bool(pad_to)
        results = model(train.to_device(batch, torch.device("cpu"), run.config),
                        "--chunk-loss" not in flags)
        sum(loss for loss, _ in results.values()).backward()
        found.append((notes["counts"], results,
                      {name: p.grad for name, p in model.named_parameters()}))
    (counts, results, gradients), (same_counts, same, ours) = found
    assert counts == same_counts
    # sums of 70 terms
    torch.testing.assert_close(same, results, atol=1e-4, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours, gradients, atol=1e-4, rtol=1e-5)


def shape_of(batch):
    """The lengths that differ between batches: of captions, and of the rows that predict."""
    return batch["ids"].shape[1], *(len(batch[name]) for name in batch if name.endswith("_rows"))


def test_a_small_set_of_lengths_makes_a_handful_of_shapes(world, tmp_path):
    shapes = []
    for pad_to in ((), LENGTHS):
        run, _ = opened(world, tmp_path, *pad_to)
        # of 28 micro-batches
        shapes.append({shape_of(batch) for batch, _ in batches_of(run, 0)})
    many, few = shapes
    assert len(few) <= 9 and len(many) > 2 * len(few)


@pytest.fixture
def few_graphs():
    """Eight graphs at most, as torch has it, whatever the test sets."""
    # monkeypatch would remove the setting
    with torch._dynamo.config.patch(recompile_limit=8):
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_each_shape_is_compiled_once(world, tmp_path, monkeypatch, few_graphs):
    run, model = opened(world, tmp_path, *LENGTHS)
    graphs, compile_with, batches = [], model.compile, {}
    # a backend that counts
    count = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(model, "compile", lambda **how: compile_with(backend=count, **how))
    switches.compile_model(model, run.settings)
    assert torch._dynamo.config.recompile_limit == 64
    for batch, _ in batches_of(run, 0):
        batches.setdefault(shape_of(batch), []).append(batch)
    twice = [some[:2] for some in batches.values() if len(some) > 1][:2]
    for batch in [batch for some in zip(*twice, strict=True) for batch in some]:     # a b a b
        model(train.to_device(batch, torch.device("cpu"), run.config))
    assert len(graphs) == len(twice) == 2


@pytest.mark.slow
def test_cuda_graphs_add_into_gradients_that_stay_where_they_are(world, tmp_path, monkeypatch):
    """Else the gradients of several micro-batches would lie in one and the same graph's memory."""
    how, places, step = [], [], train.train_step
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: how.append(given))

    def watched(run, state, *more):
        for do in (lambda *_: None, step):              # before the step, and after it
            do(run, state, *more)
            places.append([p.grad.data_ptr() for p in state.bare.parameters()])

    flags = ("--compile", *LENGTHS)
    expected = outcome(world, tmp_path / "compiled", *flags)
    monkeypatch.setattr(train, "train_step", watched)
    found = outcome(world, tmp_path / "graphs", *flags, "--cuda-graphs")
    assert_same(expected, found, 0)
    assert len(places) == 12 and all(some == places[0] for some in places)
    assert how == [{"dynamic": False}, {"dynamic": False, "mode": "reduce-overhead"}]


@pytest.mark.slow
def test_a_run_with_cuda_graphs_goes_on_as_if_it_had_not_been_stopped(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: None)
    flags = ("--compile", *LENGTHS, "--cuda-graphs")
    expected = outcome(world, tmp_path / "whole", *flags)
    out = tmp_path / "stopped"
    step = train.train_step

    def stopped(run, state, *more):
        if state.step == 4:
            raise KeyboardInterrupt
        step(run, state, *more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            outcome(world, out, *flags)
    assert_same(expected, outcome(world, out, *flags, "--resume"), 0)


@pytest.mark.parametrize("flags", [(), ("--compile",), LENGTHS,
                                   ("--compile", "--micro-batch", "auto", *LENGTHS)])
def test_cuda_graphs_of_endless_shapes_are_refused(world, tmp_path, flags):
    settings, _ = train.parse(train_command(world, tmp_path, "--cuda-graphs", *flags))
    with pytest.raises(ValueError, match="--cuda-graphs needs --compile, several lengths"):
        train.check(settings, machine.set_up("cpu"))


def test_a_length_below_one_is_refused(world, tmp_path):
    settings, _ = train.parse(train_command(world, tmp_path, "--pad-to", 8, 0))
    with pytest.raises(ValueError, match="--pad-to 8 0: lengths in tokens are expected"):
        train.check(settings, machine.set_up("cpu"))
