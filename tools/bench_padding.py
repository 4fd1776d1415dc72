"""The command `padding` of bench: how much of a batch of captions is padding.

    python -m tools.bench padding FILES --tokenizer DIR

Letters: B captions of a micro-batch.
"""

import numpy as np

import data
import tokenizer
from batches import GlobalBatches


def share_of_pads(lengths, multiple):
    """Pads in % of all tokens of micro-batches padded to a multiple: lengths (micro-batches, B)"""
    padded = np.ceil(lengths.max(axis=1) / multiple) * multiple
    return float(100 * (1 - lengths.sum() / (padded.sum() * lengths.shape[1])))


def padding(args):
    """the share of pads in micro-batches of 64 real captions: sorted, as drawn, sharing images"""
    table, rng, rows = data.Captions(args.files), np.random.default_rng(0), []
    lengths = data.token_lengths(table, tokenizer.load(args.tokenizer)).clip(max=50)
    print(f"{len(lengths):,} captions of {lengths.mean():.2f} tokens; pads in % of all tokens")
    # A large batch would repeat a small file: captions are drawn as from a larger one. So are
    # images, each with all of its captions.
    drawn = rng.choice(lengths, 16 * 4096)
    of_images = np.split(lengths, 1 + np.flatnonzero(np.diff(table.row_of)))
    of_images = [of_images[k] for k in rng.choice(len(of_images), 16 * 4096)]
    row_of = np.repeat(np.arange(len(of_images)), [len(one) for one in of_images])
    of_images = np.concatenate(of_images)

    def add_row(order, size, batches, images=1.0):
        """batches: lengths (global batches, size). images: those of a caption."""
        row = {"order": order, "global batch": size, "images": images}
        for multiple in (1, 2, 4, 8, 50):               # no caption is longer than 50
            row[f"to {multiple}"] = share_of_pads(batches.reshape(-1, 64), multiple)
        rows.append(row)

    for size in (4096, 1024, 256, 64):
        sampler = GlobalBatches(drawn, size, seed=0)
        ordered = np.stack([drawn[sampler.batch(k)] for k in range(sampler.steps_per_epoch)])
        add_row("sorted", size, ordered)
        add_row("as drawn", size, rng.permuted(ordered, axis=1))
        for most in (2, 3, 5):
            sampler = GlobalBatches(of_images, size, 0, 1, row_of, most)
            numbers = np.stack([sampler.batch(k) for k in range(16 * 4096 // size)])
            of_group = sampler.group_of[numbers].reshape(-1, 64)                # micro-batches
            images = (1 + np.count_nonzero(np.diff(of_group), axis=1)).mean() / 64
            add_row(f"{most} share", size, of_images[numbers], images)
    return rows
