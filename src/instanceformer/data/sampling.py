"""The order of a training's clips, as a function of the seed and of the number of batches begun."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sized
from itertools import groupby
from multiprocessing import Value
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from instanceformer.data.batch import ClipTargets
from instanceformer.data.images import ImageError, ImageSizeError

Clip = tuple[Tensor, ClipTargets]

MAX_REPLACEMENTS = 20
"""Attempts to read a clip, each with another clip after the first, before an unreadable image ends the training."""


class ClipKey(NamedTuple):
    """What a sampler requests of a dataset.

    Attributes:
        item: index of the clip.
        seed: of all random numbers that the clip is made with.
    """

    item: int
    seed: int


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on every one of the non-negative ``numbers`` and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ClipSampler(DistributedSampler[ClipKey]):
    """The order of a training's clips, from any batch on.

    Each epoch runs through all items in another order, drawn from the seed; each process takes its share. Iteration
    begins at batch ``begun()``, counted over all epochs, and gives as many batches as an epoch has: a training that is
    resumed goes on with the clips that it would have had.

    It is a DistributedSampler so that Lightning does not replace it.

    Args:
        items: number of items in an epoch.
        batch_size: items of a batch of one process. An incomplete last batch of an epoch is left out.
        seed: of the order and of every item's random numbers.
        begun: returns the number of batches that the training has begun.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, items: int, *, batch_size: int, seed: int, begun: Callable[[], int], rank: int, world_size: int
    ) -> None:
        super().__init__(cast("Dataset[ClipKey]", range(items)), world_size, rank, seed=seed)
        self.items, self.batch_size, self.begun = items, batch_size, begun
        self.batches = items // (batch_size * world_size)

    def __len__(self) -> int:
        """Number of this process's items in a whole epoch."""
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[ClipKey]:
        begun = self.begun()
        for epoch, batches in groupby(range(begun, begun + self.batches), lambda batch: batch // self.batches):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.items)[self.rank :: self.num_replicas]
            for batch in batches:
                first = batch % self.batches * self.batch_size
                for item in order[first : first + self.batch_size].tolist():
                    yield ClipKey(item, derive_seed(self.seed, epoch, item))


class SeededClips(Dataset[Clip]):
    """Clips that depend only on their key, whichever process makes them.

    Args:
        clips: a dataset with a length whose random numbers are torch's.
        skip_unreadable: replace a clip with an image that cannot be read by another one, drawn at random.

    Attributes:
        replaced: number of replaced clips in all worker processes.
    """

    def __init__(self, clips: Dataset[Clip], skip_unreadable: bool = False) -> None:
        self.clips, self.skip_unreadable = clips, skip_unreadable
        self.replaced: Any = Value("q", 0)

    def __len__(self) -> int:
        return len(cast("Sized", self.clips))

    def __getitem__(self, key: ClipKey | int) -> Clip:
        """Make a clip; an index alone, as with Lightning's ``overfit_batches``, always gives the same one.

        Raises:
            ImageError: an image cannot be read and is not to be skipped, or too many cannot.
        """
        if isinstance(key, int):
            key = ClipKey(key, derive_seed(key))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key.seed)  # torch.manual_seed would seed the GPU too
            item = key.item
            for attempt in range(MAX_REPLACEMENTS):
                try:
                    return self.clips[item]
                except ImageError as error:
                    wrong_size = isinstance(error, ImageSizeError)  # a fault of the annotations, not of one file
                    if not self.skip_unreadable or wrong_size or attempt == MAX_REPLACEMENTS - 1:
                        raise
                    warnings.warn(f"{error}; another clip takes its place", stacklevel=2)
                with self.replaced.get_lock():
                    self.replaced.value += 1
                item = int(torch.randint(len(self), ()))
        raise AssertionError("unreachable")


def leave_signals_to_the_trainer(worker: int) -> None:
    """Make a worker process ignore signals to its process group: the trainer finishes its step first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
