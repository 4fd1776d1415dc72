"""What makes a step smaller or faster, and leaves its numbers as they are; each is a flag.

    lighten(model, settings)        # before it is sharded
    compile_model(model, settings)

`--chunk-loss`              The logits of a few rows are in memory at a time
                            (losses.losses_in_chunks).
`--checkpoint-activations`  A layer keeps its input alone, and is computed again when its gradient
                            is asked for: a third more work in it.
`--compile`                 torch.compile: one graph for all shapes; with the lengths of --pad-to,
                            one for each.
`--cuda-graphs`             A compiled graph's kernels are launched at once, as a CUDA graph. Helps
                            where a GPU waits for launches, as small models let it.

`--keep-casts` is in train.train_step, `--bucket-views` and `--static-graph` in train.build_state.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from layers import ViTBlock
from training.settings import Settings


def lighten(model: nn.Module, settings: Settings) -> None:
    """Switches on what saves memory and costs time."""
    if settings.chunk_loss:
        model.vocab_head.chunked = True
    if settings.checkpoint_activations:
        checkpoint_layers(model)


def checkpoint_layers(model: nn.Module) -> None:
    """Recomputes the blocks of the ViT (or ViLT), the fusion layers, and the reconstructor.

    The text layers are left: captions are short. Dropout draws the same numbers again.
    """
    for module in model.modules():
        if isinstance(module, ViTBlock) or hasattr(module, "cross_attention"):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def compile_model(model: nn.Module, settings: Settings) -> None:
    """Compiles a model's forward pass with torch.compile."""
    if settings.chunk_loss:         # the chunks would be unrolled, anew for each number of rows
        model.vocab_head.losses = torch.compiler.disable(model.vocab_head.losses)
    few_shapes = not isinstance(settings.pad_to, int)
    if few_shapes:
        torch._dynamo.config.recompile_limit = 64       # else some of them would run uncompiled
    how = {"mode": "reduce-overhead"} if settings.cuda_graphs else {}
    # Without them, lengths and numbers of targets differ between batches.
    model.compile(dynamic=not few_shapes, **how)


def hold_gradients(model: nn.Module) -> None:
    """Gives every parameter a gradient of 0, into which backward passes then add.

    Without it the first micro-batch's gradient would lie in a CUDA graph's own memory, where the
    second one's is written: torch then raises an error, or counts one of them for both
    (pytorch/pytorch#169545).
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
