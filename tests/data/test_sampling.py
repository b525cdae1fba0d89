"""Which clips a training sees, and what becomes of those that cannot be read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.data.test_datamodule import split_of
from torch.utils.data import Dataset

from instanceformer.data.batch import DenseTargets
from instanceformer.data.clips import MAX_REPLACEMENTS, ClipKey, ClipSampler, SeededClips
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.data.images import ImageError, ImageSizeError


def sampler(begun: int = 0, rank: int = 0, seed: int = 0) -> ClipSampler:
    """Of 11 items, in batches of 2 on each of 2 ranks: 2 batches an epoch."""
    return ClipSampler(11, batch_size=2, seed=seed, begun=lambda: begun, rank=rank, world_size=2)


def test_an_epoch_is_shared_by_the_ranks_and_has_whole_batches() -> None:
    shares = [[key.item for key in sampler(rank=rank)] for rank in range(2)]
    assert [len(share) for share in shares] == [len(sampler())] * 2 == [4, 4]
    assert len({*shares[0], *shares[1]}) == 8


def test_the_place_in_the_order_is_the_number_of_batches_begun() -> None:
    """From there on it goes on over the end of the epoch, until it has given as many as an epoch has."""
    epochs = [list(sampler(begun=2 * epoch)) for epoch in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    stream = [key for epoch in epochs for key in epoch]
    for begun in range(6):
        assert list(sampler(begun)) == stream[2 * begun : 2 * begun + 4]
    assert list(sampler(seed=1)) != epochs[0]


class Numbers(Dataset[Any]):
    """Items that are their index and a random number; some cannot be read."""

    def __init__(self, damaged: set[int], error: type[ImageError] = ImageError) -> None:
        self.damaged, self.error = damaged, error

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[int, float]:
        if index in self.damaged:
            raise self.error(f"{index}.jpg: cut off")
        return index, float(torch.rand(()))


def test_an_item_follows_from_its_key_alone() -> None:
    clips = SeededClips(Numbers(set()))
    before = torch.get_rng_state()
    first, again, other = (clips[ClipKey(3, seed)] for seed in (7, 7, 8))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_clip_is_replaced_and_counted_if_asked_for() -> None:
    with pytest.raises(ImageError, match=r"3\.jpg: cut off"):
        SeededClips(Numbers({3}))[ClipKey(3, 0)]
    clips = SeededClips(Numbers({3}), skip_unreadable=True)
    with pytest.warns(UserWarning, match=r"3\.jpg: cut off; another clip takes its place"):
        found = clips[ClipKey(3, 0)]
    assert found[0] != 3
    assert clips.replaced.value >= 1
    assert clips[ClipKey(2, 0)][0] == 2


@pytest.mark.filterwarnings("ignore:.*another clip takes its place")
def test_what_is_wrong_everywhere_is_not_replaced() -> None:
    clips = SeededClips(Numbers(set(range(5))), skip_unreadable=True)
    with pytest.raises(ImageError):
        clips[ClipKey(0, 0)]
    assert clips.replaced.value == MAX_REPLACEMENTS - 1
    with pytest.raises(ImageSizeError):  # a fault of the annotations
        SeededClips(Numbers({3}, ImageSizeError), skip_unreadable=True)[ClipKey(3, 0)]


def test_a_truncated_image_is_named_or_skipped_by_workers(tiny_dataset: Callable[..., Any]) -> None:
    videos = split_of(tiny_dataset(lengths=(4, 4)))
    file = videos.images / "v1" / "00002.jpg"
    file.write_bytes(file.read_bytes()[:200])
    options: dict[str, Any] = {"train": videos, "clip_frames": 2, "num_workers": 1}
    data = VideoDataModule(**options)
    data.setup("fit")
    with pytest.raises(ImageError, match=r"v1/00002\.jpg: frame 2 of video 2 cannot be read as an image"):
        list(data.train_dataloader())
    data = VideoDataModule(**options, skip_unreadable=True)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 8
    assert all(isinstance(batch.targets, DenseTargets) for batch in batches)
    assert data.training_clips is not None
    assert data.training_clips.replaced.value > 0


def test_frames_outside_the_folder_are_refused_unless_allowed(tiny_dataset: Callable[..., Any], tmp_path: Any) -> None:
    videos = split_of(tiny_dataset(lengths=(4,)))
    file = videos.images / "v0" / "00003.jpg"
    file.rename(tmp_path / "elsewhere.jpg")
    file.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ValueError, match=r"00003\.jpg.*leads out of this folder, to .*elsewhere\.jpg"):
        VideoDataModule(videos, clip_frames=2, num_workers=0).setup("fit")
    VideoDataModule(videos, clip_frames=2, num_workers=0, outside_images=True).setup("fit")


ENDS_EARLY = """
from torch.utils.data import DataLoader
from instanceformer.data.clips import leave_signals_to_the_trainer
loader = DataLoader(range(8), num_workers=2, worker_init_fn=leave_signals_to_the_trainer)
iterator = iter(loader)
next(iterator)
raise RuntimeError("while workers are running")
"""


def test_a_program_that_ends_early_does_not_wait_for_its_workers() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDS_EARLY], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "while workers are running" in ended.stderr
