"""What makes a step smaller or faster, and leaves its numbers as they are; each is a flag.

    lighten(model, settings)        # before it is sharded
    compile_model(model, settings)

`--chunk-loss`  The logits of a few rows are in memory at a time: losses.losses_in_chunks.
`--compile`     torch.compile.
"""

import torch


def lighten(model, settings):
    """Switches on what saves memory and costs time."""
    if settings.chunk_loss:
        model.vocab_head.chunked = True


def compile_model(model, settings):
    """Compiles a model's forward pass with torch.compile."""
    if settings.chunk_loss:         # the chunks would be unrolled, anew for each number of rows
        model.vocab_head.losses = torch.compiler.disable(model.vocab_head.losses)
    model.compile(dynamic=True)     # lengths and numbers of targets differ between batches
