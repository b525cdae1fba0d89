"""InstanceFormer: four verbs, encode, decode, segment and advance, and the loop over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from instanceformer import checkpoints
from instanceformer.model.attention import narrowed
from instanceformer.model.backbone import Backbone, Norm
from instanceformer.model.boxes import box_iou
from instanceformer.model.decoder import Decoder, FramePrediction, of_queries
from instanceformer.model.encoder import Encoder, FrameFeatures, Projection
from instanceformer.model.heads import MaskHead, Upsampling
from instanceformer.model.identity import CANDIDATES, LOOKS, Identity, IdentityRule, inside, observe, recover
from instanceformer.model.memory import Memory, TemporalIndex, remember
from instanceformer.model.options import ClassHistory, FreeQueries, MaskStride, check_options
from instanceformer.model.propagation import ClassPrior, LocationPropagation, LocationRule, LocationSource
from instanceformer.model.pyramid import Pyramid, Sizes, build_pyramid, valid_sizes
from instanceformer.model.state import TrackState, of, push


@dataclass(frozen=True)
class ClipPrediction:
    """The last layer's output for B clips of T frames.

    Attributes:
        logits: (B, T, N, K) class logits.
        boxes: (B, T, N, 4) cxcywh in [0, 1], as fractions of the clip's own size.
        queries: (B, T, N, C) final content.
        masks: (B, T, n, ceil(H / 4), ceil(W / 4)) logits of the n queries asked for, or None.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor
    masks: Tensor | None


@final
class InstanceFormer(nn.Module):
    """Online video instance segmentation with a query for an identity (Koner, Hannan et al., InstanceFormer).

    With no argument but the number of classes it is the paper's network. Each mechanism of the paper can be switched
    off, which makes the rows of its tables 4 and 5.

    Args:
        num_classes: classes K; every class has a sigmoid of its own, there is no background class.
        backbone: a torchvision ResNet or Swin by name, or ``small``, a narrow ResNet.
        backbone_norm: of a ResNet: ``frozen`` for pretrained weights, ``batch`` for random ones.
        num_queries: queries N, the most instances a video can have.
        dim: channels C.
        num_heads: attention heads.
        num_levels: feature levels, 3 to 5, the finest at stride 8.
        num_points: sampling points for each head and level.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        feedforward_dim: hidden channels of the feed-forward networks.
        dropout: probability.
        cross_position: whether the decoder's deformable attention sees a query's position embedding beside its content;
            it does in Deformable-DETR, not in the authors' release.
        mask_stride: of the mask features: 8 as the paper, or 4 with the backbone's finest level.
        mask_upsampling: from stride 8 to 4, ``centred`` or ``aligned`` as in the authors' release, see MaskHead.
        propagate_queries: whether a query's final content is its content at the next frame (representation
            propagation); off, every frame starts from the learned content.
        location: rule by which reference points are propagated, see LocationPropagation.
        location_from: what places a query: its ``content``, the paper, or its ``position`` embedding, as in
            Deformable-DETR and the authors' release.
        class_prior: whether class logits are smoothed over the last ``memory_frames`` frames (equation 2).
        class_history: which earlier frames of a query the class prior sees: ``all``, the paper, those before it held an
            instance included, whose low logits outvote the present when one enters; ``held``, those since it has held
            one (training: matched; inference: reached ``min_confidence`` and was no duplicate), the first of them
            included. The same under ``free_queries: renew``, where nothing older is carried.
        memory: whether the decoder attends to tokens of earlier frames (equations 3 and 4).
        memory_frames: d, how many earlier frames memory and class prior reach back.
        memory_tokens: k, the most instances remembered of each frame.
        temporal_index: what tells the frames in memory apart: their ``age``, the paper, or their ``place`` in the
            queue, as in the authors' release, see Memory.
        min_confidence: score in [0, 1] below which inference does not take a query for an instance: it does not
            enter the memory. 0, the paper: the k best do, whatever their score.
        max_overlap: box IoU in (0, 1] above which inference takes a query that has held no instance for a duplicate of
            a more confident one, or of one that holds an instance, and does not admit it; training matches one query
            to an instance, too. 1, the paper: duplicates are admitted.
        free_queries: what happens at the next frame to a query that has held no instance so far in the video
            (training: unmatched; inference: never reached ``min_confidence``): ``propagate``, the paper, treats it as
            any other; ``renew`` starts it again from its learned content and reference, for what may enter late.
        identity: past the paper, see ``model.identity``: ``hide`` asks in every frame whether a query is on the
            instance that it holds, and lets one that is not start afresh, without a trace of that frame in what is
            known of the instance; ``recover`` also lets a free query that shows such an instance take its place.

    Attributes:
        options: every argument by name; ``InstanceFormer(**net.options)`` has the same architecture.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        num_classes: int = 40,
        *,
        backbone: str = "resnet50",
        backbone_norm: Norm = "frozen",
        num_queries: int = 300,
        dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        cross_position: bool = True,
        mask_stride: MaskStride = 8,
        mask_upsampling: Upsampling = "centred",
        propagate_queries: bool = True,
        location: LocationRule = "paper",
        location_from: LocationSource = "content",
        class_prior: bool = True,
        class_history: ClassHistory = "all",
        memory: bool = True,
        memory_frames: int = 4,
        memory_tokens: int = 10,
        temporal_index: TemporalIndex = "age",
        min_confidence: float = 0.0,
        max_overlap: float = 1.0,
        free_queries: FreeQueries = "propagate",
        identity: IdentityRule = "none",
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_options(options)
        self.options: dict[str, Any] = options

        self.num_classes, self.num_queries, self.dim = num_classes, num_queries, dim
        self.memory_frames, self.memory_tokens = memory_frames, memory_tokens
        self.min_confidence, self.max_overlap, self.free_queries = min_confidence, max_overlap, free_queries
        self.propagate_queries, self.class_history = propagate_queries, class_history
        self.recovers = identity == "recover"

        self.backbone = Backbone(backbone, backbone_norm)
        self.projection = Projection(self.backbone.channels[1:], dim, num_levels)
        self.encoder = Encoder(dim, encoder_layers, num_heads, num_levels, num_points, feedforward_dim, dropout)
        self.query_content = nn.Parameter(torch.randn(num_queries, dim))
        self.query_position = nn.Parameter(torch.randn(num_queries, dim))
        self.location = LocationPropagation(dim, location, location_from)
        self.memory = Memory(dim, num_classes, temporal_index) if memory else None
        self.decoder = Decoder(
            dim,
            decoder_layers,
            num_heads,
            num_levels,
            num_points,
            feedforward_dim,
            dropout,
            memory,
            num_classes,
            cross_position,
        )
        self.class_prior = ClassPrior(num_classes) if class_prior else None
        self.mask_head = MaskHead(dim, mask_stride, self.backbone.channels[0], mask_upsampling)
        self.identity = Identity(dim, self.backbone.channels[0], mask_stride) if identity != "none" else None

    @classmethod
    def from_checkpoint(cls, source: str | Path | checkpoints.Checkpoint) -> InstanceFormer:
        """The network of a checkpoint, with its weights, in evaluation mode, on the CPU.

        Args:
            source: path of what ``fit`` or ``instanceformer convert`` wrote, a Lightning checkpoint or safetensors; or
                what ``checkpoints.read`` made of one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds no network of this package.
        """
        checkpoint = source if isinstance(source, checkpoints.Checkpoint) else checkpoints.read(source)
        try:
            with torch.device("meta"):  # nothing is allocated before the weights are known to be those of the options
                network = cls(**checkpoint.options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.name}: options that no network of this version has; {error}") from error
        checkpoint.check_weights(network.state_dict())
        network.to_empty(device="cpu").load_state_dict(checkpoint.weights)
        return network.eval()

    def compile_parts(self, **options: Any) -> None:
        """Put the parts that see every frame through ``torch.compile``, in place; the names of weights stay.

        Args:
            options: of ``torch.compile``.
        """
        for part in (self.backbone, self.projection, self.encoder, self.decoder):
            part.compile(**options)

    def forward(
        self,
        frames: Tensor,
        padding: Tensor | None = None,
        state: TrackState | None = None,
        segment: Tensor | Literal["all"] | None = None,
    ) -> tuple[ClipPrediction, TrackState]:
        """Run over the frames of clips, each frame seeing what the ones before it left in the state.

        A clip at once, frame by frame or in chunks gives the same numbers in evaluation mode, if each call gets the
        state that the one before returned. As in inference, the most confident queries are remembered.

        Args:
            frames: (B, T, 3, H, W) RGB, normalised with the ImageNet mean and deviation.
            padding: (B, H, W) bool, true where padded (on the right and at the bottom only); None when nothing is.
            state: where an earlier call ended; None starts afresh.
            segment: (n,) or (B, n) int64 indices of the queries whose masks are wanted, or "all".

        Returns:
            The prediction and the state after the last frame.
        """
        batch = frames.shape[0]
        features = self.encode(frames, padding)
        if state is None:
            state = self.initial_state(batch, frames.device)
        if isinstance(segment, str):
            if segment != "all":
                raise ValueError(f'segment: found {segment!r}, expected indices of queries, "all" or None')
            segment = torch.arange(self.num_queries, device=frames.device)
        predictions, masks = [], []
        for t in range(frames.shape[1]):
            prediction = self.decode(features[t], state)
            state = self.advance(state, prediction)
            predictions.append(prediction)
            if segment is not None:
                masks.append(self.segment(features[t], prediction, segment.expand(batch, -1)))
        return ClipPrediction(
            logits=torch.stack([p.logits[-1] for p in predictions], dim=1),
            boxes=torch.stack([p.boxes[-1] for p in predictions], dim=1),
            queries=torch.stack([p.queries[-1] for p in predictions], dim=1),
            masks=torch.stack(masks, dim=1) if masks else None,
        ), state

    def initial_state(self, batch: int, device: torch.device | None = None) -> TrackState:
        """The state before the first frame of ``batch`` videos: calling this is the reset."""
        return TrackState.empty(
            batch,
            num_queries=self.num_queries,
            dim=self.dim,
            num_classes=self.num_classes,
            memory_frames=self.memory_frames,
            memory_tokens=self.memory_tokens,
            looks=0 if self.identity is None else LOOKS,
            device=self.query_content.device if device is None else device,
        )

    def encode(self, frames: Tensor, padding: Tensor | None = None) -> FrameFeatures:
        """Backbone, projection, deformable encoder and the pixels' side of the mask head; no frame sees another.

        Clips of different sizes go through backbone and projection without their padding, so that it cannot leak in
        through convolutions, windows or normalisation statistics.

        Args:
            frames: (B, T, 3, H, W), as in ``forward``.
            padding: (B, H, W) bool or None.

        Returns:
            Features of all frames.
        """
        batch, count, _, height, width = frames.shape
        sizes = ((height, width),) * batch if padding is None else valid_sizes(padding)
        pyramid = build_pyramid(sizes, (height, width), len(self.projection.levels), self.dim, frames.device)
        shapes, padded = pyramid.levels.shapes, pyramid.levels.padded is not None
        levels = self._extract_apart(frames, sizes, pyramid) if padded else self._extract(frames.flatten(0, 1))
        tokens = self.encoder(levels[1:], pyramid)
        encoded = [
            x.transpose(1, 2).unflatten(2, shape)
            for x, shape in zip(tokens.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
        masks = [v[:, None].repeat_interleave(count, dim=0).to(tokens.dtype) for v in pyramid.valid[:4]]
        mask_features = self.mask_head.encode(encoded[:3], levels[0], masks if padded else None)
        looks = None
        if self.identity is not None:
            every_size = pyramid.sizes.repeat_interleave(count, dim=0)
            looks = self.identity.appearance.encode(frames.flatten(0, 1), levels[0], encoded[0], every_size)
            looks = looks.unflatten(0, (batch, count))
        return FrameFeatures(
            tokens=narrowed(tokens).unflatten(0, (batch, count)),
            mask_features=mask_features.unflatten(0, (batch, count)),
            levels=pyramid.levels,
            valid_ratios=pyramid.valid_ratios,
            sizes=pyramid.sizes,
            grid=pyramid.grid,
            looks=looks,
        )

    def _extract_apart(self, frames: Tensor, sizes: Sizes, pyramid: Pyramid) -> list[Tensor]:
        """As ``_extract`` for (B, T, 3, H, W) frames of different sizes, those of one size together; zero where padded.

        Single images of a training with frozen norms are extracted all at once, padding and all, as in DETR: every
        image has another size.
        """
        batch, count = frames.shape[:2]
        if self.training and count == 1 and self.backbone.is_frozen:
            return self._extract(frames.flatten(0, 1))
        channels = (self.backbone.channels[0], *[self.dim] * len(pyramid.levels.shapes))
        levels = [
            frames.new_zeros(batch, count, c, h, w)
            for c, (h, w) in zip(channels, (pyramid.grid, *pyramid.levels.shapes), strict=True)
        ]
        for h, w in dict.fromkeys(sizes):
            clips = [clip for clip, size in enumerate(sizes) if size == (h, w)]
            found = self._extract(frames[clips, :, :, :h, :w].flatten(0, 1))
            for level, extracted in zip(levels, found, strict=True):
                fh, fw = extracted.shape[-2:]
                level[clips, :, :, :fh, :fw] = extracted.unflatten(0, (len(clips), count)).to(level.dtype)
        return [level.flatten(0, 1) for level in levels]

    def _extract(self, images: Tensor) -> list[Tensor]:
        """(X, 3, H, W) give C2 and every projected level."""
        finest, *features = self.backbone(images)
        return [finest, *self.projection(features)]

    def decode(self, features: FrameFeatures, state: TrackState) -> FramePrediction:
        """Equations 1, 2 and 4: all queries at one frame, after every decoder layer.

        With ``identity``, each query that holds an instance is asked whether this is what it shows, and where another
        one speaks for it, by ``recover``, the two have changed places in what is returned.

        Args:
            features: of one frame, ``encode(...)[t]``.
            state: after the frame before.

        Returns:
            The prediction, with the class prior in the last layer's logits.
        """
        queries = self.query_content.expand(state.carried.shape[0], -1, -1)
        if self.propagate_queries:
            queries = torch.where(state.carried[..., None], state.queries, queries)
        references = self.location(queries, self.query_position, state.references, state.carried)
        memory = None if self.memory is None else self.memory(state, self.query_position)
        prediction: FramePrediction = self.decoder(queries, self.query_position, references, features, memory)
        if self.identity is not None:
            prediction = self._recognize(features, prediction, state)
        if self.class_prior is None:
            return prediction
        smoothed = self.class_prior(prediction.class_logits, state.class_logits, state.class_filled)
        return replace(prediction, logits=torch.cat((prediction.logits[:-1], smoothed[None])))

    def _recognize(self, features: FrameFeatures, prediction: FramePrediction, state: TrackState) -> FramePrediction:
        """The prediction with its sighting, and what a free query found where it speaks for a lost instance."""
        assert self.identity is not None
        assert state.identities is not None
        assert features.looks is not None
        logits, boxes = prediction.class_logits.detach(), prediction.boxes[-1].detach()
        priority = logits.amax(dim=-1).sigmoid() + state.held
        candidates = priority.topk(min(CANDIDATES, self.num_queries), dim=1).indices
        with torch.no_grad():
            masks = self.mask_head.coarse(
                features, of(prediction.queries[-1], candidates), of(prediction.centres[-1], candidates)
            )
            if features.levels.padded is not None:
                within = inside(features.sizes, (masks.shape[-2], masks.shape[-1]), self.mask_head.stride)
                masks = masks.masked_fill(within == 0, -30.0)
        sighting = self.identity(features.looks, masks, candidates, state.identities, state.held, logits, boxes)
        prediction = replace(prediction, sighting=sighting)
        return prediction.permuted(recover(sighting, state.held)) if self.recovers else prediction

    def segment(
        self, features: FrameFeatures, prediction: FramePrediction, queries: Tensor, all_layers: bool = False
    ) -> Tensor:
        """Masks of the queries that are asked for.

        Args:
            features: of the frame.
            prediction: of the same frame.
            queries: (B, n) int64 indices; with ``all_layers`` also (D, B, n), others for each layer.
            all_layers: masks after each of the D decoder layers, as training asks.

        Returns:
            (B, n, ceil(H / 4), ceil(W / 4)) float32 logits; with ``all_layers`` (D, B, n, ...).
        """
        contents, centres = (prediction.queries, prediction.centres)
        if not all_layers:
            contents, centres = contents[-1:], centres[-1:]
        layers, batch, n = contents.shape[0], *queries.shape[-2:]

        def chosen(x: Tensor) -> Tensor:
            """(D, B, N, C) to (B, D n, C)."""
            return of_queries(x, queries).transpose(0, 1).flatten(1, 2)

        masks: Tensor = self.mask_head(features, chosen(contents), chosen(centres))
        masks = masks.view(batch, layers, n, *masks.shape[-2:]).transpose(0, 1)
        return masks if all_layers else masks[0]

    def advance(self, state: TrackState, prediction: FramePrediction, held: Tensor | None = None) -> TrackState:
        """The state for the next frame.

        Args:
            state: that the prediction was decoded with.
            prediction: of the current frame.
            held: (B, N) bool, queries that hold an instance, as training knows them; None as in inference: those that
                did, and those whose score reaches ``min_confidence`` and that are no duplicates. In training all of
                them can enter the memory, in inference those of them of which the latter is true now; at most k do,
                the most confident. Hidden ones never do.
        """
        scores, boxes, queries = prediction.scores, prediction.boxes[-1], prediction.queries[-1]
        remembered = held
        if remembered is None:
            confidence = scores.amax(dim=-1)
            remembered = confidence >= self.min_confidence
            if self.max_overlap < 1:
                remembered &= ~duplicates(boxes, confidence, remembered, state.held, self.max_overlap)
        held = remembered | state.held
        carried = held if self.free_queries == "renew" else torch.ones_like(held)
        filled = held if self.class_history == "held" else carried
        class_logits = push(state.class_logits, prediction.class_logits)
        class_filled = push(state.class_filled, filled)
        identities = state.identities
        if prediction.sighting is not None:
            hidden = prediction.sighting.hidden
            carried, remembered = carried & ~hidden, remembered & ~hidden
            class_logits = torch.where(hidden[:, None, :, None], state.class_logits, class_logits)
            class_filled = (state.class_filled & hidden[:, None]) | (class_filled & ~hidden[:, None])
            assert identities is not None
            identities = observe(identities, prediction.sighting, held, prediction.class_logits, boxes)
        state = replace(
            state,
            queries=queries.float(),
            references=boxes[..., :2].detach() if self.location.rule == "refined" else prediction.references,
            carried=carried,
            held=held,
            class_logits=class_logits,
            class_filled=class_filled,
            identities=identities,
        )
        return state if self.memory is None else remember(state, queries, scores, boxes, remembered)


def duplicates(boxes: Tensor, confidence: Tensor, candidates: Tensor, held: Tensor, max_overlap: float) -> Tensor:
    """Candidates that would be a second query for an instance that has one.

    Args:
        boxes: (B, N, 4) cxcywh.
        confidence: (B, N) in [0, 1].
        candidates: (B, N) bool, confident queries.
        held: (B, N) bool, queries that hold an instance already: they come first, and are never duplicates.
        max_overlap: box IoU.

    Returns:
        (B, N) bool, queries that overlap by more with a candidate that comes before them.
    """
    overlap = box_iou(boxes[:, :, None], boxes[:, None])
    priority = confidence + held
    before = candidates[:, None, :] & (priority[:, None, :] > priority[:, :, None])
    return (before & (overlap > max_overlap)).any(dim=-1) & ~held
