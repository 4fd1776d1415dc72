"""What a training step holds in memory at its peak, counted without the memory.

    parts = step_memory(run, new_state, step, batch, on_gpu=True)
    parts["activations"], sum(parts.values())           # bytes

The loop's own step runs on tensors that have shapes and types but no contents (torch's fake
tensors). Every storage that an operation makes is noted, and noted off when it is freed, so the
largest sum is the peak. There is no formula that the code could outgrow: another layer, switch or
optimizer is counted as it is. On a CPU the sum is what torch's allocator hands out, within 3 %
(tests/test_plan.py).

Not in it: what a kernel takes for itself while it runs; what the allocator rounds up or cannot use
(on GPUs some 5 %); CUDA's own (0.5 to 1 GB); NCCL's buffers; Python, libraries and data loaders.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layers
from training import parallel
from training.machine import Machine
from training.optimizer import moments_of
from weights import outline_of

if TYPE_CHECKING:           # for the annotations alone: the file comes later
    from training.runs import Run

PARTS = ("weights", "gradients", "moments", "activations", "logits", "inputs")


class MemoryCount(TorchDispatchMode):
    """Adds up the storages that live while it is active, and remembers the sum at its peak.

    Storages are activations unless told otherwise; those of (rows, V) tensors are logits.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.now = dict.fromkeys(PARTS, 0)      # bytes
        self.peak = dict(self.now)
        self.part_of = {}                       # storage -> (its part, its bytes)

    def __enter__(self):
        # Sharded layers are freed and gathered again by resizing their storages (FSDP2), which is
        # no operation on a tensor.
        self.resize, count = torch.UntypedStorage.resize_, self

        def resize(storage, size):
            count.resized(storage, size)
            return count.resize(storage, size)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                is_logits = tensor.ndim == 2 and tensor.shape[1] == self.vocab_size
                self.note(tensor, "logits" if is_logits else "activations")
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)
        return result

    def note(self, tensor: Tensor, part: str) -> None:
        """Counts a tensor's storage, if it is not counted yet."""
        tensor = local(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.part_of:
            self.part_of[key] = part, storage.nbytes()
            self.now[part] += storage.nbytes()
            weakref.finalize(storage, self.freed, key)

    def freed(self, key: int) -> None:
        part, size = self.part_of.pop(key)
        self.now[part] -= size

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self.part_of:
            part, before = self.part_of[storage._cdata]
            self.now[part] += size - before
            self.part_of[storage._cdata] = part, size

    def move(self, tensor: Tensor, part: str) -> None:
        """Counts a tensor's storage with another part from now on."""
        self.note(tensor, part)
        key = local(tensor).untyped_storage()._cdata
        before, size = self.part_of[key]
        self.now[before] -= size
        self.now[part] += size
        self.part_of[key] = part, size


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Unlogged:
    """Stands for the loop's log; after each micro-batch it tells the gradients apart."""

    def __init__(self, count: MemoryCount, model: torch.nn.Module):
        self.count, self.model = count, model

    def micro_batch(self, *_: Any) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self.count.move(parameter.grad, "gradients")

    def step(self, *_: Any) -> None:
        pass


def step_memory(run: "Run", new_state: Callable, step: Callable, batch: tuple[dict, dict],
                on_gpu: bool) -> dict[str, int]:
    """The bytes of each of PARTS at the peak of an optimizer step of one process.

    new_state, step: train.build_state and train.train_step. batch: a micro-batch and its notes, as
    task.collate makes them. Where a step accumulates several, two of them are run: the second one
    has gradients beside it.
    on_gpu: attention as GPUs compute it. Nothing else depends on the device.
    With --shard, other processes are pretended: this process leaves its group. With
    --tensor-parallel, the step is that of an undivided model, and what is divided of its weights,
    gradients and moments is taken off afterwards; activations are an upper bound.
    """
    precision = "fp32" if run.machine.precision == "fp32" else "bf16"       # fp16 has as many bytes
    machine = replace(run.machine, rank=0, device=torch.device("cpu"), precision=precision)
    whole = parallel.parameters_of_one(outline_of(run.config), 1)
    held = parallel.parameters_of_one(outline_of(run.config), machine.tensor)
    machine = replace(machine, world=machine.data_world, tensor=1)
    machine = pretend_others(machine) if run.settings.shard else replace(machine, world=1)
    settings = replace(run.settings, load="", vit="", text="", compile=False)
    alone = replace(run, machine=machine, settings=settings, saved=None, source=None,
                    accumulation=min(2, run.accumulation))
    count = MemoryCount(run.config.vocab_size)
    with FakeTensorMode() as fake, attention_of_gpus() if on_gpu else contextlib.nullcontext():
        tensors = {name: fake.from_tensor(tensor) for name, tensor in batch[0].items()}
        state = new_state(alone)
        model, optimizer = state.bare, state.optimizer
        for module in model.modules():
            if isinstance(module, FSDPModule):      # it lays its shards out anew at its first use
                module.unshard()
                module.reshard()
        names = moments_of(model, settings)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: torch.empty_like(like)
                                          for key, like in names[name].items()}
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: count.move(parameter.grad, "gradients"))
        with count:
            for parameter in model.parameters():
                count.move(parameter, "weights")
                for moment in optimizer.state[parameter].values():
                    count.move(moment, "moments")
            for tensor in tensors.values():
                count.move(tensor, "inputs")
            model.train()
            step(alone, state, [(tensors, batch[1])] * alone.accumulation, Unlogged(count, model))
    for part in ("weights", "gradients", "moments"):
        count.peak[part] = round(count.peak[part] * sum(held.values()) / sum(whole.values()))
    return count.peak


def pretend_others(machine: Machine) -> Machine:
    """The machine in a process group whose messages go nowhere: all processes but this one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=machine.world, store=FakeStore())
    mesh = init_device_mesh("cpu", (machine.data_world, machine.tensor),
                            mesh_dim_names=("data", "tensor"))
    return replace(machine, mesh=mesh)


@contextlib.contextmanager
def attention_of_gpus() -> Iterator[None]:
    """Attention keeps what the memory-efficient kernel keeps, which GPUs use where there is a mask.

    It is the largest of their kernels: the mask becomes a bias of the queries' type.
    """
    def attend(q, k, v, mask, dropout):
        bias = None
        if mask is not None:
            heads = q.shape[1]
            bias = torch.where(mask, 0.0, float("-inf")).to(q.dtype).expand(-1, heads, -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True,
                                                                      dropout)[0]

    before, layers.attend = layers.attend, attend
    try:
        yield
    finally:
        layers.attend = before
