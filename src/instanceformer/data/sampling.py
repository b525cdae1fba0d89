"""The order of the training clips, as a function of the seed and the number of batches started."""

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
"""How many clips to try, the requested one and random replacements, before an unreadable image ends the training."""


class ClipKey(NamedTuple):
    """What a sampler requests from a dataset.

    Attributes:
        item: index of the clip.
        seed: seed of all random numbers used to make the clip.
    """

    item: int
    seed: int


def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from non-negative numbers; it depends on each of them and on their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class ClipSampler(DistributedSampler[ClipKey]):
    """The order of the training clips, starting from any batch.

    Each epoch visits all items in a different order, derived from the seed; each process takes its share. Iteration
    starts at batch ``begun()``, counted over all epochs, and yields one epoch's worth of batches. A resumed training
    run therefore sees the same clips as one that was never interrupted.

    It is a DistributedSampler so that Lightning does not replace it.

    Args:
        items: number of items in an epoch.
        batch_size: number of items in a batch of one process. An incomplete last batch of an epoch is dropped.
        seed: seed of the order and of every item's random numbers.
        begun: returns the number of batches that training has started.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(
        self, items: int, *, batch_size: int, seed: int, begun: Callable[[], int], rank: int, world_size: int
    ) -> None:
        super().__init__(cast("Dataset[ClipKey]", range(items)), world_size, rank, seed=seed)
        self.items, self.batch_size, self.begun = items, batch_size, begun
        self.batches = items // (batch_size * world_size)

    def __len__(self) -> int:
        """Number of items per epoch for this process."""
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
    """Clips that depend only on their key, no matter which process makes them.

    Args:
        clips: a dataset with a length that uses torch's random number generator.
        skip_unreadable: replace a clip that has an unreadable image by another one, chosen at random.

    Attributes:
        replaced: number of replaced clips, over all worker processes.
    """

    def __init__(self, clips: Dataset[Clip], skip_unreadable: bool = False) -> None:
        self.clips, self.skip_unreadable = clips, skip_unreadable
        self.replaced: Any = Value("q", 0)

    def __len__(self) -> int:
        return len(cast("Sized", self.clips))

    def __getitem__(self, key: ClipKey | int) -> Clip:
        """Make a clip. A plain index, as Lightning's ``overfit_batches`` passes it, always gives the same clip.

        Raises:
            ImageError: an image cannot be read and must not be skipped, or too many in a row cannot be read.
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
                    wrong_size = isinstance(error, ImageSizeError)  # an error in the annotations, not in one file
                    if not self.skip_unreadable or wrong_size or attempt == MAX_REPLACEMENTS - 1:
                        raise
                    warnings.warn(f"{error}; another clip takes its place", stacklevel=2)
                with self.replaced.get_lock():
                    self.replaced.value += 1
                item = int(torch.randint(len(self), ()))
        raise AssertionError("unreachable")


def leave_signals_to_the_trainer(worker: int) -> None:
    """Make a worker process ignore SIGTERM and SIGINT, so that the trainer can finish its step first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
