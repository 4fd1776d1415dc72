"""The optimizer: which parameter is stepped how, and how fast.

    optimizer = new_optimizer(model, settings)          # AdamW, or with --muon-lr AdamW and Muon
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate_at(step, settings)
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vilt
from training import parallel
from training.settings import Settings

# -------------------------------------------------------------------------------------------------
# Groups and schedule.

# Parameters whose names begin with these learn at head_lr_scale or fusion_lr_scale times the rate.
HEAD = ("vocab_head.", "itm_head.", "patch_head.", "head.")
FUSION = ("text_to_fusion.", "image_to_fusion.", "fusion_layers.", "text_reconstructor.",
          "fusion_reconstructor.", "pooler.")
# The image's positions have no weight decay: FLM's in its ViT and before its fusion, and ViLT's.
# Vectors have none either. (The originals decay these and the class token, and FLM also CLIP's
# ln_*: their lists of names come from another library.)
UNDECAYED = ("vit.position", "image_position", "position")


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """The optimizer's groups: {base, head, fusion} x {decayed, not} for AdamW, and Muon's.

    base     lr                      ViT, text embedding, text layers, type vectors; all of a ViLT
                                     but its heads
    head     lr x head_lr_scale      vocabulary head, matching, a task's head
    fusion   lr x fusion_lr_scale    FLM's fusion layers, reconstructor, pooler, what leads to them
    Muon     muon_lr                 where it is above 0, the matrices of base and fusion: weights
                                     of linear layers and convolutions

    Every parameter is in exactly one; `peak` is the group's largest rate. Decayed are all
    parameters of two or more dimensions but UNDECAYED: weights of linear layers and convolutions,
    embeddings with the text's positions, type vectors. Not decayed are biases, LayerNorms, the
    class token, and the image's positions. As published (recipe flm-b32): lr 8e-5, both scales 5,
    weight decay 0.01, betas 0.9 and 0.98, no Muon.
    """
    s = settings
    peaks = {"base": s.lr, "head": s.lr * s.head_lr_scale, "fusion": s.lr * s.fusion_lr_scale,
             "muon": s.muon_lr}
    matrices = {id(module.weight) for module in model.modules()
                if isinstance(module, (nn.Linear, nn.Conv2d))}
    groups = {(group, decayed): [] for group in peaks for decayed in (True, False)}
    fusion = () if isinstance(model.config, vilt.Config) else FUSION
    for name, parameter in model.named_parameters():
        group = "base"
        if name.startswith(HEAD):
            group = "head"
        elif s.muon_lr and id(parameter) in matrices:
            group = "muon"
        elif name.startswith(fusion):
            group = "fusion"
        decayed = parameter.ndim >= 2 and name not in UNDECAYED
        groups[group, decayed].append(parameter)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    return [{"params": parameters, "peak": peaks[group], "muon": group == "muon",
             "weight_decay": s.weight_decay if decayed else 0.0}
            for (group, decayed), parameters in groups.items() if parameters]


def rate_at(step: int, settings: Settings) -> float:
    """The share of the peak rate at a step: linear from 0, constant, linear to 0.

    The warm-up is a share of all steps, the fall (`decay`) a share of those after it. As published,
    the fall is all of them: the rate is never constant.
    """
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return step / warmup
    fall = max(1, round(settings.decay * (settings.steps - warmup)))
    return min(1.0, max(0.0, (settings.steps - step) / fall))


def new_optimizer(model: nn.Module, settings: Settings) -> "Muon":
    """Muon for the groups that it has, AdamW for the others."""
    return Muon(parameter_groups(model, settings), lr=settings.lr,
                betas=(settings.beta1, settings.beta2), eps=1e-8)


def moments_of(model: nn.Module, settings: Settings) -> dict[str, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter after its first step: shapes and types alone."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {}
    for group in parameter_groups(model, settings):
        for parameter in group["params"]:
            if group["muon"]:
                kept = {"mean": parameter}
            else:
                kept = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            moments[name_of[id(parameter)]] = kept
    return moments


# -------------------------------------------------------------------------------------------------
# Muon. A gradient has few strong directions (what all pictures have in common) and many weak ones
# (what tells a star from a ring). AdamW scales each number of a matrix by itself and leaves that as
# it is. Muon steps equally far in all directions.
#
# "Muon: an optimizer for hidden layers in neural networks", Jordan et al., 2024. torch.optim.Muon
# computes in bfloat16, which most CPUs lack: there it takes 20 times as long as this one.

class Muon(torch.optim.AdamW):
    """Muon for the groups with `muon`, fused AdamW for the others.

    With the mean gradient M <- m M + (1 - m) G and its look-ahead N = m M + (1 - m) G:

        W <- W - lr · max(1, rows / columns)^1/2 · orthogonal(N)

    lr and weight decay (W <- (1 - lr · decay) W, before the step) are each group's own. More than
    two dimensions count as two: a convolution's filters are rows. A matrix that stacks several (the
    keys' and the values', "kv") is stepped in its square parts. `found_inf` as fused AdamW has it:
    nothing changes where it is 1.
    """
    MOMENTUM = 0.9

    def __init__(self, groups: list[dict], **defaults: object):
        super().__init__(groups, **defaults, fused=True)

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)     # AdamW's asks every group for a step

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        groups = self.param_groups
        self.param_groups = []
        for group in groups:
            if not group["muon"]:
                self.param_groups += [group | {"params": some}
                                      for some in parallel.alike(group["params"])]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self.step_matrices(group)

    def step_matrices(self, group: dict) -> None:
        """Steps the matrices of a group, those of one shape together."""
        skipped = getattr(self, "found_inf", None)
        same_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            new = mean.lerp(parameter.grad, 1 - self.MOMENTUM)
            mean.copy_(new if skipped is None else torch.where(skipped > 0, mean, new))
            ahead = parameter.grad.lerp(mean, self.MOMENTUM)
            parts = zip(matrices(parameter), matrices(ahead), strict=True)
            for weight, direction in parts:
                same_shape[weight.shape].append((weight, direction))
        for (rows, columns), pairs in same_shape.items():
            weights, directions = zip(*pairs, strict=True)
            step = orthogonal(torch.stack(directions)) * max(1, rows / columns) ** 0.5
            if skipped is not None:
                step = torch.where(skipped > 0, 0, step)
            kept = 1 - group["lr"] * group["weight_decay"] * (1 if skipped is None else 1 - skipped)
            for weight, change in zip(weights, step, strict=True):
                weight.mul_(kept)
                weight.sub_(change, alpha=group["lr"])


def matrices(parameter: Tensor) -> tuple[Tensor, ...]:
    """A parameter as matrices: itself, flattened to rows, or the two square ones that it stacks."""
    rows = parameter.flatten(1)
    return rows.chunk(2) if len(rows) == 2 * rows.shape[1] else (rows,)


# The four steps x <- (a + b x x^T + c (x x^T)^2) x that bring singular values between 0.003 and 1
# nearest to 1: each is the best polynomial (Remez) for what the last one leaves. "The Polar
# Express", Amsel et al., 2025, arXiv 2505.16932. Three steps learn slower (docs/RECORDS.md).
POLAR_EXPRESS = ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695),
                 (3.5056, -2.6267, 0.5257), (2.4901, -1.8343, 0.4368))


def orthogonal(x: Tensor) -> Tensor:
    """Matrices with x's singular vectors, and singular values near 1 (from 0.8 to 1.2).

    Those below 0.003 of x's norm end lower. x (matrices, rows, columns) -> the same shape
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x         # the products are of the shorter side
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # Two long products in place of eight. Not on a GPU: its products may be rounded (TF32), and the
    # squares of small values would not survive that.
    short = x.device.type == "cpu" and wide.shape[-1] > 2 * wide.shape[-2]
    if not short:
        for step in POLAR_EXPRESS:
            wide = quadratic(wide @ wide.mT, *step) @ wide
    else:
        square, product = wide @ wide.mT, None
        for step in POLAR_EXPRESS:
            factor = quadratic(square, *step)
            square = factor @ square @ factor
            product = factor if product is None else factor @ product
        wide = product @ wide
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def quadratic(square: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b square + c square^2, of symmetric matrices"""
    result = torch.baddbmm(square, square, square, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result
