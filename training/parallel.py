"""Tensor parallelism: every layer of one model is divided over N processes (--tensor-parallel N).

    divide(model, machine)              # in place; torch's DTensors hold the divided weights
    average_gradients(model, machine)   # once per step, in DDP's place

With 4 processes and N = 2, the mesh has two groups. The processes of a group hold one model
together, and see the same data; groups see different data, as DDP's processes do:

    group (data_rank)          0        1
    processes (rank)         0   1    2   3
    part of each layer       0   1    0   1

A pair of layers needs no message between them: the first is divided by columns of W^T (each process
computes some of the outputs), the second by rows (each process reads those and computes a part of
every sum). Then the parts are added, over all processes of the group, and the bias once. So an
attention has heads / N heads in each process, and a feed-forward hidden / N units.

    x ---- columns ---- heads or GELU ---- rows ---- add up ---- + bias ---- y
    whole               divided                                              whole

All else is whole in every process, and computed N times: embeddings, LayerNorms, the residual
stream, poolers, task heads. Dropout draws the same there in every process of a group (the seed is
the group's: train.train_step). Inside the divided parts it does so too, for different heads or
units; so units with the same place in their part are dropped together.

"Megatron-LM", Shoeybi et al., 2019, arXiv 1909.08053, section 3.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput, RowwiseParallel,
                                               loss_parallel, parallelize_module)

import flm
import vilt
from training.machine import Machine

# -------------------------------------------------------------------------------------------------
# The plan.

# Linear layers, by their names in the model, and how each is divided. What it does not name stays
# whole.
PLAN = {
    "*attention.q": "columns",
    "*attention.kv": "columns of keys and of values",
    "*attention.out": "rows",
    "*.mlp.0": "columns",
    "*.mlp.2": "rows",
    "vocab_head.decoder": "words",          # its loss is computed from the divided logits
}


def how_divided(name: str) -> str | None:
    """How the plan divides a layer; None: it stays whole.

    >>> how_divided("blocks.3.attention.out")
    'rows'
    """
    for pattern, how in PLAN.items():
        if fnmatch(name, pattern):
            return how
    return None


def check(config: flm.Config | vilt.Config, processes: int, groups: int = 1) -> None:
    """ValueError unless a model of this Config can be divided over so many processes.

    groups: number of groups over which --shard cuts the parts again; 1: it does not.
    """
    if processes == 1:
        return
    sizes, widths = ["heads", "vit_heads", "text_heads"], ["width", "vit_width", "text_width"]
    if isinstance(config, vilt.Config):
        sizes, widths = ["heads", "mlp_width"], ["width", "mlp_width"]
    for name in sizes:
        if getattr(config, name) % processes:
            raise ValueError(f"--tensor-parallel {processes} does not divide "
                             f"--{name.replace('_', '-')} {getattr(config, name)}")
    for name in widths:
        if getattr(config, name) % (processes * groups):
            raise ValueError(f"--tensor-parallel {processes} --shard: {groups} groups of "
                             f"{processes} processes do not divide --{name.replace('_', '-')} "
                             f"{getattr(config, name)}")
    if getattr(config, "label_smoothing", 0):
        raise ValueError(f"--label-smoothing {config.label_smoothing}: torch has no such loss for "
                         "the divided logits of --tensor-parallel")


class KeysAndValues(nn.Module):
    """Attention.kv as two layers: by columns, keys and values are divided each for itself.

    Files keep them as one, "kv": see whole_names and own_names.
    """

    def __init__(self, kv: nn.Linear):
        super().__init__()
        width, device = kv.in_features, kv.weight.device
        self.k = nn.Linear(width, width, device=device)
        self.v = nn.Linear(width, width, device=device)
        weights, biases = kv.weight.detach().chunk(2), kv.bias.detach().chunk(2)
        for layer, weight, bias in zip((self.k, self.v), weights, biases, strict=True):
            layer.weight = nn.Parameter(weight.clone())
            layer.bias = nn.Parameter(bias.clone())

    def forward(self, memory: Tensor) -> Tensor:
        """memory (M, K, D) -> (M, K, 2D / N)"""
        return torch.cat([self.k(memory), self.v(memory)], dim=-1)


def divide(model: nn.Module, machine: Machine) -> None:
    """Divides the layers of the plan over the processes of each group, in place.

    Every process must hold the same weights; each keeps its part.
    """
    mesh = machine.mesh["tensor"]
    for name, module in list(model.named_modules()):
        how = how_divided(name)
        if how == "columns":
            parallelize_module(module, mesh, ColwiseParallel())
        elif how == "rows":
            parallelize_module(module, mesh, RowwiseParallel())
        elif how == "words":
            parallelize_module(module, mesh, ColwiseParallel(use_local_output=False))
        elif how:
            attention = model.get_submodule(name.rpartition(".")[0])
            attention.heads //= machine.tensor
            attention.kv = KeysAndValues(module)
            # The memory becomes a DTensor once for both: its gradient travels once.
            parallelize_module(attention.kv, mesh, PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Replicate()))
            parallelize_module(attention.kv, mesh, {"k": ColwiseParallel(), "v": ColwiseParallel()})


def shards(model: nn.Module, machine: Machine) -> dict:
    """What FSDP2 must know of a divided model: it shards over the groups, the words' head apart.

    torch cannot load shards of a divided tensor where they differ in size, and a vocabulary divides
    by nothing. So every group has the whole head, divided over its processes.
    """
    if machine.tensor == 1:         # all processes; a plan (training/memory.py) pretends some
        return {"mesh": machine.mesh["data"]} if machine.mesh else {}
    head = set()
    for name, parameter in model.named_parameters():
        if how_divided(name.rpartition(".")[0]) == "words":
            head.add(parameter)
    return {"mesh": machine.mesh["data"], "ignored_params": head}


def divided_loss(machine: Machine) -> contextlib.AbstractContextManager:
    """The context in which a divided vocabulary head has its loss, and the gradient of it."""
    return loss_parallel() if machine.tensor > 1 else contextlib.nullcontext()


def parameters_of_one(model: nn.Module, processes: int) -> dict[str, float]:
    """Name -> the numbers that one process holds of each parameter of a model yet undivided."""
    held = {}
    for name, parameter in model.named_parameters():
        parts = processes if how_divided(name.rpartition(".")[0]) else 1
        held[name] = parameter.numel() / parts
    return held


# -------------------------------------------------------------------------------------------------
# Gradients. The optimizer, the norm and the clipping take lists of tensors, and torch's fast ways
# through such lists take either plain tensors, or DTensors of one mesh.

def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in lists that torch takes at once: plain ones, and DTensors of each mesh."""
    lists = defaultdict(list)
    for tensor in tensors:
        lists[getattr(tensor, "device_mesh", None)].append(tensor)
    return list(lists.values())


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together: a plain scalar, the same on every process."""
    norms = []
    for some in alike(gradients):
        norm = torch.nn.utils.get_total_norm(some)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def clip(parameters: Iterable[Tensor], most: float, norm: Tensor) -> None:
    """Scales the gradients down to the norm `most`, where theirs is larger."""
    for some in alike(parameters):
        torch.nn.utils.clip_grads_with_norm_(some, most, norm)


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 cuts a parameter over the groups, and averages its gradient."""
    return isinstance(parameter, DTensor) and "data" in parameter.device_mesh.mesh_dim_names


def is_divided(parameter: Tensor) -> bool:
    """Whether the processes of a group hold different parts of a parameter."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names
    return "tensor" in names and parameter.placements[names.index("tensor")].is_shard()


@torch.no_grad()
def average_gradients(model: nn.Module, machine: Machine) -> None:
    """Replaces each gradient by the mean over the processes that hold the same numbers:

        parameter      not sharded                              sharded by FSDP2
        whole          all processes                            those of a group
        divided        those with the same part, of all groups  none: FSDP2 has averaged

    DDP does not hold DTensors. So this comes in its place, once, after a step's last backward pass.
    The processes of a group compute the same gradient of a whole parameter, but for rounding: some
    sums on a GPU have another order each time. The mean keeps their weights equal for good.
    """
    if machine.tensor == 1:
        return
    group, groups = machine.mesh["tensor"].get_group(), machine.mesh["data"].get_group()
    pending = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        divided, sharded = is_divided(parameter), is_sharded(parameter)
        if divided and sharded:
            continue
        among = dist.group.WORLD
        if divided:
            among = groups
        elif sharded:
            among = group
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.to_local()          # the same memory
        work = dist.all_reduce(gradient, group=among, async_op=True)
        pending.append((work, gradient, dist.get_world_size(among)))
    for work, gradient, count in pending:
        work.wait()
        gradient.div_(count)


# -------------------------------------------------------------------------------------------------
# Checkpoints hold whole tensors under the names of an undivided model, whatever the layout.

def whole_names(state: dict) -> dict:
    """{parameter: tensor, or the optimizer's dict of tensors}, the keys joined with the values."""
    whole = {}
    for name, keys in state.items():
        if ".kv.k." in name:
            values = state[name.replace(".kv.k.", ".kv.v.")]
            whole[joined_name(name)] = join(keys, values)
        elif ".kv.v." not in name:
            whole[name] = keys
    return whole


def whole_optimizer(state: dict) -> dict:
    """An optimizer's state dict, likewise: its moments, and the names in its groups."""
    groups = []
    for group in state.get("param_groups", []):
        names = [joined_name(name) for name in group["params"] if ".kv.v." not in name]
        groups.append(group | {"params": names})
    return {"state": whole_names(state.get("state", {})), "param_groups": groups}


def joined_name(name: str) -> str:
    """The name in files of a divided model's parameter."""
    return name.replace(".kv.k.", ".kv.").replace(".kv.v.", ".kv.")


def join(keys: Tensor | dict, values: Tensor | dict) -> Tensor | dict:
    """The rows of two tensors, one below the other; of dicts, those of each of their tensors."""
    if isinstance(keys, dict):
        return {name: join(keys[name], values[name]) for name in keys}
    return torch.cat([keys, values]) if keys.ndim else keys         # AdamW counts steps in a scalar


def own_names(state: dict, model: nn.Module) -> dict:
    """What whole_names made, under the names of the model, divided or not."""
    names = {name for name, _ in model.named_parameters()}
    own = {}
    for name, value in state.items():
        keys = name.replace(".kv.", ".kv.k.")
        if name in names or keys not in names:
            own[name] = value
        else:
            own[keys], own[name.replace(".kv.", ".kv.v.")] = cut(value)
    return own


def cut(value: Tensor | dict) -> tuple:
    """The upper and the lower half of a tensor's rows; of a dict, those of each of its tensors."""
    if isinstance(value, dict):
        halves = {name: cut(tensor) for name, tensor in value.items()}
        return tuple({name: pair[k] for name, pair in halves.items()} for k in range(2))
    return value.chunk(2) if value.ndim else (value, value.clone())     # two counts of steps
