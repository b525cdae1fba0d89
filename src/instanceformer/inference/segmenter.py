"""Online use: frames in, one at a time, tracked instances out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from instanceformer import checkpoints
from instanceformer.data.annotations import Category
from instanceformer.data.augment import fit_size, normalize, resize
from instanceformer.evaluation.protocol import resize_masks
from instanceformer.inference.graphs import captured
from instanceformer.inference.optimize import optimize, packs
from instanceformer.inference.tracks import MIN_SIDE, FrameInstances, SegmenterOptions, Tracks
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.network import InstanceFormer
from instanceformer.video.frames import Frame
from instanceformer.video.reading import Source, open_video

SPARE = 8
"""On a GPU the number of masks computed for a frame is a multiple of this, and never zero."""


@dataclass(frozen=True)
class Seen:
    """What is seen in a frame of H x W pixels, on the network's device.

    Attributes:
        table: (N, 9) float64, a row for each query, those of visible tracks first: whether it is visible, its id (0
            without a track), label, score, box (cxcywh).
        order: (N,) int64, the query of each row.
        masks: (n, H, W) bool of the first rows; the number n is guessed before the visible tracks are known.
        features, prediction: from which the masks of further rows can be made.
    """

    table: Tensor
    order: Tensor
    masks: Tensor
    features: FrameFeatures
    prediction: FramePrediction


@final
class VideoInstanceSegmenter:
    """Finds, segments, classifies and follows the instances of a video, frame by frame.

    The instances of a frame depend on this and earlier frames of the video only. Time and memory per frame do not
    depend on the number of earlier frames.

    On a GPU everything between the frame and its masks is one CUDA graph, with an ``options.chunk`` of 1: the host
    launches it as a whole. The graph is made anew for frames of another size, and where more masks are needed than in
    any frame before; that takes a few frames' time. A backbone that waits for the GPU cannot be captured, which a
    warning says; then kernels are launched one by one, as they are in longer chunks.

    A track begins when a query becomes confident, keeps its id while it is hidden, and ends when it has been hidden for
    too long (``SegmenterOptions`` has the rules). A network with ``identity`` also notices when an instance is hidden
    behind another, and finds it again elsewhere. Ids count from 1, and none is used twice in a video. A track's label
    and score in a frame come from its mean class probabilities over the frames in which it was visible so far.

    Args:
        network: an optimized copy of it is used (see ``optimize``), or the network itself with ``options.compile``.
        categories: of the classes, in class order; None numbers them from 1 and calls them ``class 1`` and so on.
        options: rules of the tracks, sizes, speed. Sizes that are None are the paper's.

    Attributes:
        categories: of the classes, in class order.
        frame_size: of the frames that the network sees.

    Raises:
        ValueError: there are not as many categories as classes, or ``options.classes`` names one that is not there.
    """

    def __init__(
        self,
        network: InstanceFormer,
        categories: Sequence[Category] | None = None,
        options: SegmenterOptions = SegmenterOptions(),
    ) -> None:
        if categories is None:
            categories = [Category(k, f"class {k}") for k in range(1, network.num_classes + 1)]
        if len(categories) != network.num_classes:
            raise ValueError(f"found {len(categories)} categories, expected the network's {network.num_classes}")
        self.categories, self.options, self._device = tuple(categories), options, network.query_content.device
        names = [category.name for category in categories]
        for name in options.classes or ():
            if name not in names:
                raise ValueError(f"classes: found {name}, expected names of the network's: {', '.join(names)}")
        self._wanted = torch.tensor([options.classes is None or name in options.classes for name in names]).to(
            self._device
        )
        self.frame_size = options.frame_size(checkpoints.PAPER_SIZE)
        packed = packs(self._device) and not options.compile
        self._autocasts = options.precision == "bf16" and not packed
        if options.compile:
            self.network = network.eval()
            network.compile_parts()
        else:
            narrow = options.precision == "bf16" and packed
            self.network = optimize(network, torch.bfloat16 if narrow else torch.float32)
        confident = network.options.min_confidence > 0
        self._tracks = Tracks(network.num_queries, network.num_classes, options, self._device, confident)
        self._state = self.network.initial_state(1)
        self._frame = torch.empty(0, dtype=torch.uint8)
        self._captures = self._device.type == "cuda"
        self._graphs: dict[int, Callable[[], Seen]] = {}  # by the number of masks
        self.reset()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        options: SegmenterOptions | None = None,
        **changes: Any,
    ) -> VideoInstanceSegmenter:
        """A segmenter with the network and the categories of a checkpoint.

        Args:
            path: anything that ``InstanceFormer.from_checkpoint`` reads.
            device: to run on; None takes a GPU if there is one.
            options: rules of the tracks, sizes, speed. None: those that the checkpoint records (``model.segmenter`` of
                its training), else the defaults. Sizes that are None are the checkpoint's; an old checkpoint without
                sizes gets the paper's, with a warning.
            **changes: single options by name, in place of those in ``options``.

        Raises:
            ValueError: the file holds no network of this package, there is no such device, or an option is wrong.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            expected = " or ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device: found {device}, expected {expected}, which are here ({reason})") from error
        checkpoint = checkpoints.read(path)
        if options is None:
            try:
                options = SegmenterOptions(**checkpoint.segmenter or {})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{checkpoint.name}: options of a segmenter that no version has; {error}") from error
        options = replace(options, **changes)
        network = InstanceFormer.from_checkpoint(checkpoint).to(device)
        size = checkpoint.frame_size or checkpoints.PAPER_SIZE
        if checkpoint.frame_size is None and options.size is None:
            warnings.warn(
                f"{path}: does not say at which size its training evaluated it; frames are seen at {size.size} pixels "
                "on the shorter side; if that was another, give it by --size (data.eval_size of the training)",
                stacklevel=2,
            )
        return cls(network, checkpoint.categories or None, replace(options, **vars(options.frame_size(size))))

    def reset(self) -> None:
        """Forget the video: the next frame is the first of another one."""
        self._state.overwrite(self.network.initial_state(1))
        self._tracks.clear(reuse_ids=True)
        self._num_masks = SPARE  # to compute in the next frame on a GPU
        self._size = self._input_size = (0, 0)  # (height, width) of the frames, and of the network's input
        self._video = object()  # identifies the current video

    def forget(self) -> None:
        """End all tracks and empty the memory, but stay in the video: what the next frame shows gets new ids."""
        self._state.overwrite(self.network.initial_state(1))
        self._tracks.clear()

    def change_rules(self, *, birth: float, show: float, patience: int) -> None:
        """Apply other rules to the tracks from the next frame on; see ``SegmenterOptions``, also for the errors."""
        options = replace(self.options, birth=birth, show=show, patience=patience)
        if options != self.options:  # the page calls this after every frame
            self.options = self._tracks.options = options
            self._graphs.clear()

    def step(self, frame: Frame) -> FrameInstances:
        """Process the next frame of the video.

        Args:
            frame: (H, W, 3) uint8 RGB, of the same size as the frames before it.

        Returns:
            The instances visible in it, on the CPU, with masks and boxes in the frame's pixels.

        Raises:
            ValueError: the frame has another shape, type or size, or is too small.
        """
        return self._on_host(self._see(self._checked(frame)))

    def segment(self, source: Source) -> Iterator[FrameInstances]:
        """Reset, then process a whole video.

        Args:
            source: anything that ``open_video`` takes.

        Returns:
            The instances of each frame, in order, computed lazily. If the source breaks off, the instances of all
            frames up to there come before its error.

        Raises:
            ValueError: at the call: the source cannot be opened; during the iteration: as in ``step`` and
                ``open_video``, or another video was begun before the end of this one.
        """
        frames = (frame.image for frame in open_video(source).frames)
        self.reset()
        return self._segment(frames, self._video)

    def _segment(self, frames: Iterable[Frame], video: object) -> Iterator[FrameInstances]:
        def current(frame: Frame) -> Frame:
            if self._video is not video:
                raise ValueError("found another video begun in the middle of this one; expected one at a time")
            return frame

        for chunk in chunks((self._checked(current(frame)) for frame in frames), self.options.chunk):
            if len(chunk) == 1:
                yield self._on_host(self._see(chunk[0]))
                continue
            features = self._encode(torch.from_numpy(np.stack(chunk)).to(self._device))
            for t, frame in enumerate(chunk):
                current(frame)
                yield self._on_host(self._track(features[t], self._num_masks))

    def _see(self, frame: Frame) -> Seen:
        """Process one frame; on a GPU as a graph, whose tensors the next frame overwrites."""
        image, count = torch.from_numpy(np.ascontiguousarray(frame))[None], self._num_masks
        if self._frame.shape != image.shape:
            self._frame = torch.empty_like(image, device=self._device)
            self._graphs.clear()
        self._frame.copy_(image, non_blocking=self._device.type == "cuda")
        if self._captures and count not in self._graphs:
            self._capture(count)
        return self._graphs[count]() if self._captures else self._track(self._encode(self._frame)[0], count)

    def _capture(self, num_masks: int) -> None:
        """Make the graph of a frame, or find out that it cannot be made."""
        written = (*self._state.tensors().values(), *self._tracks.tensors)
        try:
            self._graphs[num_masks] = captured(lambda: self._track(self._encode(self._frame)[0], num_masks), written)
        except RuntimeError as error:
            self._captures = False
            reason = str(error).partition("\n")[0]
            warnings.warn(f"frames are not captured as a CUDA graph and take longer: {reason}", stacklevel=2)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> FrameFeatures:
        """The stateless part, for (T, H, W, 3) uint8 frames at once."""
        pixels = normalize(resize(images.permute(0, 3, 1, 2), self.frame_size.size, self.frame_size.max_size))
        with self._autocast():
            return self.network.encode(pixels[None])

    @torch.no_grad()
    def _track(self, features: FrameFeatures, num_masks: int) -> Seen:
        """The rest, for one frame: overwrites the state and the tracks. On a CPU there are as many masks as needed."""
        with self._autocast():
            prediction = self.network.decode(features, self._state)
            state = self.network.advance(self._state, prediction)
            boxes = prediction.boxes[-1, 0].float()
            visible, ended = self._tracks.update(prediction.scores[0], boxes, state.held[0], state.hidden[0])
            self._state.overwrite(state.free(ended[None]))
            scores, labels = self._tracks.probabilities.max(dim=-1)
            wanted = self._wanted[labels]
            visible, ids = visible & wanted, self._tracks.ids * wanted
            columns = (visible[:, None], ids[:, None], labels[:, None], scores[:, None], boxes)
            table = torch.cat([column.double() for column in columns], dim=-1)
            order = visible.byte().argsort(descending=True, stable=True)
            # Asking for the number of masks would make the host wait for the GPU.
            count = int(visible.sum()) if self._device.type == "cpu" else num_masks
            masks = self._masks(features, prediction, order[:count])
        return Seen(table[order], order, masks, features, prediction)

    @torch.no_grad()
    def _on_host(self, seen: Seen) -> FrameInstances:
        """The instances, on the CPU."""
        rows, masks = to_host(seen.table, seen.masks)
        count = int(rows[:, 0].sum())
        if count > len(masks):
            with self._autocast():
                (masks,) = to_host(self._masks(seen.features, seen.prediction, seen.order[:count]))
        self._num_masks = max(1, -(-count // SPARE)) * SPARE
        masks = masks[:count]
        shown = masks.view(torch.uint8).amax(dim=(1, 2)) > 0  # ten times as fast as any() of bool
        unseen = torch.cat((rows[:count][~shown], rows[count:]))
        rows = rows[:count][shown]
        height, width = self._size
        corners = box_convert(rows[:, 4:].float(), "cxcywh", "xyxy").clamp(0, 1)
        return FrameInstances(
            ids=rows[:, 1].long(),
            labels=rows[:, 2].long(),
            scores=rows[:, 3].float(),
            boxes=corners * torch.tensor((width, height, width, height)),
            masks=masks[shown],
            hidden=unseen[unseen[:, 1] > 0, 1].long(),
        )

    @torch.no_grad()
    def _masks(self, features: FrameFeatures, prediction: FramePrediction, queries: Tensor) -> Tensor:
        """(n, H, W) bool masks of (n,) queries, in pixels of the original frame."""
        masks = torch.zeros(len(queries), *self._size, dtype=torch.bool, device=self._device)
        if len(queries):
            logits = self.network.segment(features, prediction, queries[None])[0]
            for index, mask in enumerate(logits):  # one at a time: all of them in float32 would take much memory
                masks[index] = resize_masks(mask[None], self._input_size, self._size)[0] > 0
        return masks

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocasts, cache_enabled=False)

    def _checked(self, frame: Frame) -> Frame:
        """The frame, after a check that it has the right shape, type and the size of the video's first frame."""
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = (
                f"shape {frame.shape}, type {frame.dtype}" if isinstance(frame, np.ndarray) else type(frame).__name__
            )
            raise ValueError(f"frame: found {found}, expected an array (height, width, 3) of uint8, RGB")
        height, width = frame.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"frame: found {width}x{height} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}")
        if self._size not in ((0, 0), (height, width)):
            raise ValueError(
                f"frame: found {width}x{height} pixels, expected {self._size[1]}x{self._size[0]} like the first frame; "
                "reset() begins another video"
            )
        self._size = height, width
        self._input_size = fit_size(height, width, self.frame_size.size, self.frame_size.max_size)
        return frame


def chunks(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of ``size`` frames; an error of the source is raised after the frames before it."""
    frames, stopped = iter(frames), None
    while stopped is None:
        chunk: list[Frame] = []
        try:
            while len(chunk) < size:
                chunk.append(next(frames))
        except (Exception, KeyboardInterrupt) as reason:
            stopped = reason
        if chunk:
            yield chunk
    if not isinstance(stopped, StopIteration):
        raise stopped


def to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on the CPU, with one wait for the device."""
    copies = tuple(x.to("cpu", non_blocking=True) for x in tensors)
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies
