"""The order of the data: which captions are trained on at which step, and which share an image.

    sampler = GlobalBatches(token_lengths(table, tok), global_batch=64, seed=0)
    for keys in sampler.micro_batches(0, 10, micro_batch=32):       # [(epoch, caption), …]
        samples = dataset.samples(keys)

What is seen at a step is a pure function of (seed, epoch, step), so resuming is arithmetic.
"""

from collections.abc import Iterator, Sequence

import numpy as np


class GlobalBatches:
    """Shuffles, cuts into global batches, sorts each by caption length, deals micro-batches.

    Sorting leaves next to no padding, and the same global batch is trained on by any number of
    processes. Micro-batches are dealt forwards and backwards in turn (1 2 3 4, 4 3 2 1, …), so that
    with two or more for each process all have about the same work. With a single one each, the
    process with the longest captions sets the pace, as it would in any other order.
    The captions that do not fill the last batch of an epoch sit out; every epoch is shuffled again.

    A small batch has few lengths to sort. With `bucket` above 1, the captions of that many global
    batches are sorted together: one batch has short captions and another long ones, in random
    order.

    With `captions_per_image` above 1, groups of captions of one image are shuffled (draw_groups),
    so that the image passes the model once for all of them. A group is sorted by its longest
    caption. Batches still count captions: a group that would reach over the end of a global batch
    or micro-batch is cut there, and its parts are groups of their own.
    """

    def __init__(self, lengths: np.ndarray, global_batch: int, seed: int, bucket: int = 1,
                 row_of: np.ndarray | None = None, captions_per_image: int = 1):
        """lengths, row_of (captions,): of each caption its tokens, and the row of its image."""
        if global_batch > len(lengths):
            raise ValueError(f"global batch {global_batch}: there are only {len(lengths)} captions "
                             "to train on")
        if bucket < 1:
            raise ValueError(f"--bucket {bucket}: at least 1 global batch is sorted at a time")
        self.lengths, self.size, self.seed, self.bucket = lengths, global_batch, seed, bucket
        self.row_of, self.captions_per_image = row_of, captions_per_image
        self.steps_per_epoch = len(lengths) // global_batch
        # Of the epoch: the order of the captions; of each, its group and what it is sorted by.
        self.epoch, self.order = None, None
        self.group_of, self.keys = np.arange(len(lengths)), lengths

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step: caption numbers (size,), shortest first."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.shuffle(np.random.default_rng([self.seed, epoch]))
        numbers = self.order[k * self.size:(k + 1) * self.size]
        return numbers[np.argsort(self.keys[numbers], kind="stable")]

    def shuffle(self, rng: np.random.Generator) -> np.ndarray:
        """The order of an epoch: caption numbers, one global batch after the other."""
        order = self.shuffle_groups(rng)
        if self.bucket == 1:
            return order
        order = order[:self.steps_per_epoch * self.size]
        bucket = np.arange(len(order)) // (self.size * self.bucket)
        batches = order[np.lexsort((self.keys[order], bucket))].reshape(-1, self.size)
        return rng.permutation(batches).reshape(-1)

    def shuffle_groups(self, rng: np.random.Generator) -> np.ndarray:
        """All caption numbers in random order, but those of a group side by side.

        Sorting by `keys` keeps them so: it is stable, and a group has a single key.
        """
        if self.captions_per_image == 1:
            return rng.permutation(len(self.lengths))
        self.group_of = draw_groups(self.lengths, self.row_of, self.captions_per_image, rng)
        longest = np.zeros(self.group_of.max() + 1, self.lengths.dtype)             # (groups,)
        np.maximum.at(longest, self.group_of, self.lengths)
        self.keys = longest[self.group_of]                                          # (captions,)
        place = rng.permutation(len(longest))
        return np.argsort(place[self.group_of], kind="stable")

    def micro_batches(self, start: int, stop: int, micro_batch: int, rank: int = 0,
                      world: int = 1) -> Iterator[list[tuple[int, ...]]]:
        """This process's micro-batches of the steps start..stop-1, as CaptionDataset takes them.

        Each is a list of (epoch, caption), or (epoch, caption, caption, …) for a group.
        """
        for step in range(start, stop):
            numbers, epoch = self.batch(step), step // self.steps_per_epoch
            rounds = numbers.reshape(-1, world, micro_batch)    # (accumulation, world, micro_batch)
            for i, of_ranks in enumerate(rounds):
                column = rank if i % 2 == 0 else world - 1 - rank
                mine = of_ranks[column]                                             # (micro_batch,)
                ends = 1 + np.flatnonzero(np.diff(self.group_of[mine]))
                yield [(epoch, *group.tolist()) for group in np.split(mine, ends)]


def draw_groups(lengths: np.ndarray, row_of: np.ndarray, most: int,
                rng: np.random.Generator) -> np.ndarray:
    """The group of each caption, int64 (captions,): up to `most` captions of one image.

    Captions of like length share a group, or the shorter ones would be padding: an image's captions
    are sorted by their length plus up to two tokens, drawn, and cut into groups. There are as few
    groups as can be, so one may be smaller: the first or the last, by how much is drawn.
    With most = 2, five captions become groups of 2, 2, 1 or of 1, 2, 2.
    lengths, row_of (captions,): row_of must rise.
    """
    noisy = lengths + rng.uniform(0, 2, len(lengths))
    order = np.lexsort((noisy, row_of))         # image by image; row_of[order] is row_of
    counts = np.bincount(row_of)                                                    # (rows,)
    missing = -counts % most
    groups = (counts + missing) // most                                             # of each row
    first_caption, first_group = counts.cumsum() - counts, groups.cumsum() - groups
    # The places that the first group of an image leaves empty; its last one leaves the others.
    skipped = rng.integers(0, missing + 1)                                          # (rows,)
    place = np.arange(len(row_of)) - first_caption[row_of] + skipped[row_of]        # (captions,)
    group_of = np.empty(len(row_of), np.int64)
    group_of[order] = first_group[row_of] + place // most
    return group_of


def evaluation_batches(lengths: np.ndarray, numbers: Sequence[int] | np.ndarray,
                       size: int) -> list[list[tuple[int, int]]]:
    """Batches of captions of similar length, each of `numbers` exactly once: (epoch 0, number).

    lengths: the sorting key of each of `numbers`, in their order.
    """
    numbers = np.asarray(numbers)[np.argsort(lengths, kind="stable")]
    batches = []
    for first in range(0, len(numbers), size):
        batches.append([(0, int(i)) for i in numbers[first:first + size]])
    return batches
