"""Training clips: a few frames of a video and the instances visible in them, and the order in which clips come."""

from __future__ import annotations

import atexit
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import groupby
from multiprocessing import Value, active_children
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate

from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.augment import Augmentation, Geometry, normalize
from instanceformer.data.batch import ClipBatch, ClipTargets, DenseTargets
from instanceformer.data.images import ImageError, ImageSizeError, read_image
from instanceformer.data.packed import pack

MAX_DRAWS = 10
"""How often to draw a clip's frames before accepting a clip without instances."""
UNCHANGED = Augmentation(flip=0.0, sizes=(), crop=0.0)
"""Leaves frames unchanged, except that those larger than ``max_size`` are scaled down."""
MAX_REPLACEMENTS = 20
"""How many clips to try, the requested one and random replacements, before an unreadable image ends the training."""

Clip = tuple[Tensor, ClipTargets]


class ClipDataset(Dataset[tuple[Tensor, ClipTargets]]):
    """Clips of randomly drawn frames of one video, in temporal order (appendix A.2 of the paper).

    Uses torch's random number generator: each epoch draws new clips, and a seed makes them repeatable, also in worker
    processes.

    Args:
        dataset: the annotated videos.
        images: folder that the videos' file names are relative to.
        clip_frames: number of frames in a clip, T. Videos with fewer frames repeat some.
        clip_step: maximum distance between neighboring frames of a clip; None: no limit. See ``draw_frames``.
        far_frames: how many of a clip's frames are drawn from anywhere in the video despite ``clip_step``.
        cuts: fraction of clips that cut to another clip and, usually, back again; see ``with_cut``.
        clips_per_video: number of clips per video and epoch, redrawn up to MAX_DRAWS times in all until an instance is
            visible. None: one clip for each frame in which an instance is visible; the clip includes that frame.
        augmentation: random augmentation; None: ``UNCHANGED``.
        max_size: maximum length of a frame's longer side in pixels.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        images: Path | str,
        *,
        clip_frames: int = 4,
        clip_step: int | None = None,
        far_frames: int = 0,
        cuts: float = 0.0,
        clips_per_video: int | None = None,
        augmentation: Augmentation | None = None,
        max_size: int = 768,
    ) -> None:
        if clip_frames < 1:
            raise ValueError(f"clip_frames: expected 1 or more, found {clip_frames}")
        if clip_step is not None and clip_step < 1:
            raise ValueError(f"clip_step: expected 1 or more (or none), found {clip_step}")
        if not 0 <= far_frames < clip_frames:
            raise ValueError(
                f"far_frames: expected 0 or more, fewer than clip_frames = {clip_frames}, found {far_frames}"
            )
        if not 0 <= cuts <= 1 or (cuts > 0 and clip_frames < 2):
            raise ValueError(f"cuts: expected a fraction in [0, 1], and 0 in clips of one frame, found {cuts}")
        if clips_per_video is not None and clips_per_video < 1:
            raise ValueError(f"clips_per_video: expected 1 or more (or none), found {clips_per_video}")
        self.dataset = dataset
        self.images = Path(images)
        self.clip_frames = clip_frames
        self.clip_step = clip_step
        self.far_frames = far_frames
        self.cuts = cuts
        self.augmentation = UNCHANGED if augmentation is None else augmentation
        self.max_size = max_size
        if clips_per_video is None:  # (N, 2), indices of the video and of a frame that must be in the clip; -1: any
            self.items = pack(dataset.videos).populated_frames()
        else:
            self.items = np.repeat([(index, -1) for index in range(len(dataset.videos))], clips_per_video, axis=0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, ClipTargets]:
        """Draw a clip.

        Returns:
            (T, 3, H, W) float32 normalized frames, and their targets with n instances; n may be 0.

        Raises:
            ValueError: a frame is missing, unreadable, or not the size of its video.
        """
        clip = self._draw(index)
        if self.cuts > 0 and torch.rand(()) < self.cuts:
            clip = with_cut(clip, self._draw(int(torch.randint(len(self), ()))))
        return normalize(clip[0]), clip_targets(*clip[1:])

    def _draw(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a clip of one video: pixels, labels and masks as in ``read_clip``, but with bool masks."""
        video_index, frame = self.items[index].tolist()
        reference = None if frame < 0 else frame
        video = self.dataset.videos[video_index]
        for _ in range(MAX_DRAWS):
            chosen = draw_frames(video.length, self.clip_frames, self.clip_step, self.far_frames, reference)
            if shown_instances(video, chosen):
                break
        frames, masks, labels = read_clip(self.dataset, video, chosen, self.images, self.augmentation, self.max_size)
        return frames, labels, masks.view(torch.bool)


def draw_frames(
    length: int, count: int, step: int | None = None, far: int = 0, reference: int | None = None
) -> list[int]:
    """Draw ``count`` random frames of a video, in temporal order.

    The clip grows from the reference frame: each further frame is drawn from the ``step`` frames before the earliest
    and the ``step`` frames after the latest drawn so far. Once the clip spans the whole video, the remaining frames are
    drawn from the gaps.

    Args:
        length: number of frames in the video.
        count: number of frames to draw. No frame is drawn twice before all have been drawn once.
        step: maximum distance between neighboring frames (1 makes them consecutive); None: no limit.
        far: how many frames are drawn last, and from anywhere in the video.
        reference: index of a frame that must be drawn; None: no such frame.
    """
    frames = [int(torch.randint(length, ())) if reference is None else reference]
    while len(frames) < min(count, length):
        first, last = min(frames), max(frames)
        unused = [frame for frame in range(length) if frame not in frames]
        near = [frame for frame in unused if 0 < max(first - frame, frame - last) <= (step or 0)]
        candidates = near if near and len(frames) < count - far else unused
        frames.append(candidates[int(torch.randint(len(candidates), ()))])
    return sorted(frames[i % len(frames)] for i in range(count))


def with_cut(
    clip: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Imitate a film cut: replace a random run of frames, never the first frame, with those of another clip.

    At the cut all instances disappear and new ones appear. If the clip does not end with the replaced frames, it cuts
    back and its own instances return.

    Args:
        clip: (T, 3, H, W) pixels, (m,) labels and (T, m, H, W) bool masks.
        other: the other clip, in the same form; if its frames have a different shape, nothing is replaced.

    Returns:
        A clip in the same form, with the instances of both.
    """
    frames, labels, masks = clip
    other_frames, other_labels, other_masks = other
    if frames.shape != other_frames.shape:
        return clip
    first = int(torch.randint(1, len(frames), ()))
    end = int(torch.randint(first + 1, len(frames) + 1, ()))
    is_other = torch.zeros(len(frames), dtype=torch.bool)
    is_other[first:end] = True
    is_other = is_other[:, None, None, None]
    masks = torch.cat((masks & ~is_other, other_masks & is_other), dim=1)
    return torch.where(is_other, other_frames, frames), torch.cat((labels, other_labels)), masks


def shown_instances(video: Video, frames: Sequence[int]) -> list[Instance]:
    """The instances visible in at least one of the frames, without crowds."""
    return [
        instance
        for instance in video.instances
        if not instance.is_crowd and any(instance.segmentations[frame] is not None for frame in frames)
    ]


def read_clip(
    dataset: VideoDataset,
    video: Video,
    frames: Sequence[int],
    images: Path,
    augmentation: Augmentation,
    max_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read and augment T frames of a video, with the instances visible in them, at most ``max_instances``.

    If the crop would remove every instance, the frames are not cropped.

    Returns:
        (T, 3, H, W) uint8 RGB frames, (T, n, H, W) uint8 masks of zeros and ones, and (n,) int64 class indices.

    Raises:
        ValueError: a file is missing, is not an image, or is not the size of the video.
    """
    instances = shown_instances(video, frames)
    if augmentation.max_instances is not None:
        chosen = torch.randperm(len(instances))[: augmentation.max_instances].sort().values
        instances = [instances[i] for i in chosen.tolist()]
    geometry = augmentation.draw_geometry(video.height, video.width, max_size)
    masks = video.decode_masks(instances, frames, geometry.rows, geometry.columns)
    if instances and not masks.any():
        geometry = replace(augmentation, crop=0.0).draw_geometry(video.height, video.width, max_size)
        masks = video.decode_masks(instances, frames, geometry.rows, geometry.columns)
    pixels = augmentation.change_colors(read_frames(video, images, frames, geometry))
    labels = torch.tensor([dataset.class_of(instance.category_id) for instance in instances], dtype=torch.int64)
    return pixels, masks, labels


def read_frames(video: Video, images: Path, frames: Sequence[int], geometry: Geometry | None = None) -> Tensor:
    """Read T frames of a video as (T, 3, height, width) uint8 RGB, transformed by ``geometry`` if given.

    Raises:
        ValueError: a file is missing, is not an image, or is not the size of the video.
    """
    read: dict[int, Tensor] = {}
    for frame in frames:
        if frame in read:
            continue
        path = images / video.file_names[frame]
        image = read_image(path, video.height, video.width, f"frame {frame} of video {video.id}")
        read[frame] = image if geometry is None else geometry.apply(image)  # faster one at a time than as a stack
    return torch.stack([read[frame] for frame in frames])


def clip_targets(labels: Tensor, masks: Tensor) -> ClipTargets:
    """Targets of a clip from (m,) labels and (T, m, H, W) bool masks, without instances that are never visible."""
    boxes = mask_boxes(masks)
    visible = boxes[..., 2] > 0
    kept = visible.any(0)
    if not kept.all():
        labels, boxes, masks, visible = labels[kept], boxes[:, kept], masks[:, kept], visible[:, kept]
    return ClipTargets(labels=labels, boxes=boxes, masks=masks, visible=visible)


def mask_boxes(masks: Tensor) -> Tensor:
    """Bounding boxes of (..., H, W) bool masks.

    Returns:
        (..., 4) float32, (center x, center y, width, height) as fractions of W and H; zeros for an empty mask.
    """
    pixels = masks.view(torch.uint8)  # uint8 amax is ten times as fast as bool any
    centers, lengths = [], []
    for occupied in (pixels.amax(-2), pixels.amax(-1)):  # columns (..., W), rows (..., H)
        size = occupied.shape[-1]
        first = occupied.argmax(-1)
        end = size - occupied.flip(-1).argmax(-1)
        filled = occupied.amax(-1)
        centers.append((first + end) * filled / (2 * size))
        lengths.append((end - first) * filled / size)
    return torch.stack([*centers, *lengths], dim=-1)


def collate_clips(clips: Sequence[tuple[Tensor, ClipTargets]]) -> ClipBatch:
    """Combine clips into a batch, padded to the largest height and the largest width among them."""
    frames = [clip[0] for clip in clips]
    height, width = (max(f.shape[dim] for f in frames) for dim in (-2, -1))
    targets = DenseTargets.from_clips([clip[1] for clip in clips], (height, width))
    if all(f.shape[-2:] == (height, width) for f in frames):
        return ClipBatch(frames=default_collate(frames), padding=None, targets=targets)
    padded = frames[0].new_zeros(len(frames), *frames[0].shape[:2], height, width)
    padding = torch.ones(len(frames), height, width, dtype=torch.bool)
    for i, f in enumerate(frames):
        padded[i, ..., : f.shape[-2], : f.shape[-1]] = f
        padding[i, : f.shape[-2], : f.shape[-1]] = False
    return ClipBatch(frames=padded, padding=padding, targets=targets)


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


@atexit.register
def end_workers() -> None:
    """End worker processes that are left when the program ends, which else would wait for them forever.

    multiprocessing would end them by SIGTERM, which they ignore.
    """
    for process in active_children():
        if process.daemon:
            process.kill()
