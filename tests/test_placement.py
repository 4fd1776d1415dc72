"""What a GPU would refuse or wait for, told without one.

Fake tensors have a shape, a type and a device, and no numbers. An operation refuses those of two
devices, and whatever needs a number (`.item()`, a boolean mask, `nonzero`), for which a real GPU
would have to be waited for. Backward passes are left out: they need a real device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from predict import match_score
from tasks import to_device
from tools.drawn import drawn_run, drawn_samples
from training.machine import Machine
from training.report import Sums

pytestmark = pytest.mark.slow

GPU = torch.device("cuda", 0)
TO_DEVICE = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    """Autocast works as on a GPU that has bfloat16."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)


class Watch(TorchDispatchMode):
    """Notes copies between the devices for which the loop would wait, and the types of products."""

    def __init__(self):
        super().__init__()
        self.waits, self.products = [], set()

    def __torch_dispatch__(self, function, types, given=(), more=None):
        more = more or {}
        out = function(*given, **more)
        if function in TO_DEVICE:
            source = given[0] if function == TO_DEVICE[0] else given[1]
            blocking = not (more.get("non_blocking") or True in given[2:])
            if source.device != out.device and blocking:
                self.waits.append(f"{tuple(out.shape)} {source.device} -> {out.device}")
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.products.add(out.dtype)
        return out


def opened(mode, flags, precision="bf16", share=1):
    """(run, state on the GPU, a batch as the loader gives it)"""
    run = drawn_run(["--steps", "10", "--global-batch", "4", *flags], Machine(0, 1, GPU, precision))
    captions = 1 + (run.settings.false_captions if run.task.HEAD == "retrieval" else 0)
    batch, notes = run.task.collate(drawn_samples(run.task, 4, 9, captions, share))
    with mode:
        with GPU:
            state = train.build_state(run)
        batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
    return run, state, batch, notes


FLM = ("--model", "toy", "--vocab-size", "400")
VILT = ("--model", "vilt-toy", "--vocab-size", "400")
WAYS = {
    "flm": FLM, "mlm": (*FLM, "--objective", "mlm"), "ar": (*FLM, "--objective", "ar"),
    "prefix": (*FLM, "--objective", "prefix"), "matching": (*FLM, "--itm"),
    "spans": (*FLM, "--corruption-rate", "0.3"), "chunks": (*FLM, "--chunk-loss"),
    "recomputed": (*FLM, "--checkpoint-activations"),
    "smoothing": (*FLM, "--label-smoothing", "0.1"), "lengths": (*FLM, "--pad-to", "16", "24"),
    "vilt": VILT, "patches": (*VILT, "--mpp"),
    "vqa": ("--task", "vqa", "--model", "toy"), "nlvr2": ("--task", "nlvr2", "--model", "toy"),
    "caption": ("--task", "caption", "--model", "toy"),
    "retrieval": ("--task", "retrieval", "--model", "toy"),
    "vilt vqa": ("--task", "vqa", "--model", "vilt-toy"),
    "vilt nlvr2": ("--task", "nlvr2", "--model", "vilt-toy"),
    "vilt retrieval": ("--task", "retrieval", "--model", "vilt-toy")}


@pytest.mark.parametrize("way, precision", [*((way, "bf16") for way in WAYS), ("flm", "fp32"),
                                            ("vilt", "fp32")])
def test_a_forward_pass_stays_on_its_gpu_and_never_waits_for_it(way, precision):
    mode = FakeTensorMode()
    share = 2 if way in ("flm", "mlm", "vilt") else 1           # captions that share an image
    run, state, batch, _ = opened(mode, WAYS[way], precision, share)
    for training in (True, False):
        state.bare.train(training)
        with mode, Watch() as watch, run.machine.autocast():
            results = state.bare(to_device(batch, GPU, run.config), "chunks" != way)
        assert not watch.waits
        assert {tensor.device for result in results.values() for tensor in result} == {GPU}
        assert {loss.dtype for loss, _ in results.values()} == {torch.float32}
        # (ViLT's transport is computed in float32.)
        products = watch.products - ({torch.float32} if run.settings.model == "vilt-toy" else set())
        assert products <= {torch.bfloat16 if precision == "bf16" else torch.float32}


class Log:
    """The loop's log, as far as it touches the device."""

    def __init__(self, run):
        self.sums = Sums(run.config.loss_weights, GPU)

    def micro_batch(self, results, counts, notes):
        self.sums.add(results, counts)

    def step(self, rate, norm):
        assert norm.device == GPU


@pytest.mark.parametrize("more", [(), ("--clip", "1"), ("--muon-lr", "0.01"), ("--keep-casts",),
                                  ("--cuda-graphs", "--compile", "--pad-to", "16", "24")],
                         ids=["adamw", "clipped", "muon", "casts", "graphs"])
def test_the_loop_never_waits_for_its_gpu(more, monkeypatch):
    """Two steps of two micro-batches, but for what autograd does."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    mode = FakeTensorMode()
    run, state, batch, notes = opened(mode, ("--global-batch", "8", "--micro-batch", "4", *FLM,
                                             *more))

    def backward(loss):
        assert loss.device == GPU and loss.requires_grad
        for parameter in state.bare.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with mode, Watch() as watch:
        log = Log(run)
        for _ in range(2):
            train.train_step(run, state, [(batch, notes)] * 2, log)
    assert state.step == 2 and not watch.waits
    assert state.skipped.device == log.sums.values.device == GPU
    assert {tensor.device for kept in state.optimizer.state.values() for tensor in kept.values()
            if tensor.dim()} == {GPU}


@pytest.mark.parametrize("model", ["toy", "vilt-toy"])
def test_scores_of_captions_stay_on_their_gpu(model, monkeypatch):
    monkeypatch.setattr("predict.finite", lambda logits: logits)        # it looks at the numbers
    mode = FakeTensorMode()
    run, state, batch, _ = opened(mode, ("--task", "retrieval", "--model", model))
    bare = state.bare.eval()
    with mode, torch.no_grad(), Watch() as watch, run.machine.autocast():
        batch = to_device(batch, GPU, run.config)
        layout = {name: batch[name][:1] for name in ("sizes", "patches") if name in batch}
        visual = bare.encode_image(batch["image"][:1], **layout)
        scores = match_score(bare, visual, bare.encode_text(batch["ids"], class_only=True))
    assert not watch.waits and scores.device == GPU


def test_the_watch_sees_a_wait():
    with FakeTensorMode(), Watch() as watch:
        (torch.ones(2).to(GPU), torch.tensor([1.0], device=GPU), torch.ones(3, device=GPU).cpu())
        assert len(watch.waits) == 3
        torch.ones(2).to(GPU, non_blocking=True)
    assert len(watch.waits) == 3
