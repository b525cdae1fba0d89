"""InstanceFormer: its four verbs (encode, decode, segment and advance) and the loop over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn

from instanceformer.model import release
from instanceformer.model.attention import narrowed
from instanceformer.model.backbone import TIMM, Backbone
from instanceformer.model.boxes import duplicates
from instanceformer.model.decoder import Decoder, FramePrediction, gather_layers
from instanceformer.model.encoder import Encoder, FrameFeatures, Projection
from instanceformer.model.identity import CANDIDATES, LOOKS, Identity, observe, recover, set_aside
from instanceformer.model.memory import remember
from instanceformer.model.options import NetworkOptions
from instanceformer.model.propagation import ClassPrior
from instanceformer.model.pyramid import build_pyramid, extract_unpadded, valid_sizes
from instanceformer.model.state import TrackState, gather_queries, push

if TYPE_CHECKING:
    from instanceformer.checkpoints import Checkpoint


@dataclass(frozen=True)
class ClipPrediction:
    """The last layer's output for B clips of T frames.

    Attributes:
        logits: (B, T, N, K) class logits.
        boxes: (B, T, N, 4) cxcywh in [0, 1], as fractions of the clip's own size.
        queries: (B, T, N, C) final content.
        masks: (B, T, n, ceil(H / 4), ceil(W / 4)) logits of the n requested queries, or None.
    """

    logits: Tensor
    boxes: Tensor
    queries: Tensor
    masks: Tensor | None


@final
class InstanceFormer(nn.Module):
    """Online video instance segmentation in which a query is an identity (Koner, Hannan et al., InstanceFormer).

    Given only the number of classes, it is the paper's network. Each mechanism of the paper can be switched off, which
    gives the rows of its tables 4 and 5.

    Args:
        num_classes: classes K.
        **options: the other fields of NetworkOptions.

    Attributes:
        options: the NetworkOptions; ``InstanceFormer(**vars(net.options))`` has the same architecture.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, num_classes: int = 40, **options: Any) -> None:
        super().__init__()
        self.options = o = NetworkOptions(num_classes=num_classes, **options)
        self.num_classes, self.num_queries, self.dim = o.num_classes, o.num_queries, o.dim
        self.memory_frames = o.memory_frames

        parts = release.parts(o)
        layer: dict[str, Any] = {
            "dim": o.dim,
            "heads": o.num_heads,
            "levels": o.num_levels,
            "points": o.num_points,
            "feedforward_dim": o.feedforward_dim,
            "dropout": o.dropout,
        }
        self.backbone = Backbone(o.backbone, o.backbone_norm)
        self.projection = Projection(self.backbone.channels[1:], o.dim, o.num_levels)
        self.encoder = Encoder(layers=o.encoder_layers, **layer)
        self.query_content = nn.Parameter(torch.randn(o.num_queries, o.dim))
        self.query_position = nn.Parameter(torch.randn(o.num_queries, o.dim))
        self.location = release.location_propagation(o)
        self.memory = parts.memory(o.dim, o.num_classes) if o.memory else None
        layers = [parts.decoder_layer(memory=o.memory, **layer) for _ in range(o.decoder_layers)]
        self.decoder = Decoder(layers, o.dim, o.num_classes)
        self.class_prior = ClassPrior(o.num_classes) if o.class_prior else None
        self.mask_head = parts.mask_head(o.dim, o.mask_stride, self.backbone.channels[0])
        self.identity = Identity(o.dim, self.backbone.channels[0], o.mask_stride) if o.identity != "none" else None
        self.origin: Checkpoint | None = None  # that it was loaded from, without weights

    @classmethod
    def from_checkpoint(cls, source: str | Path | Checkpoint) -> InstanceFormer:
        """Load a checkpoint's network and weights onto the CPU, in evaluation mode.

        Args:
            source: path of a Lightning checkpoint or safetensors file that ``fit`` or ``instanceformer convert`` wrote;
                a folder that ``save_pretrained`` wrote, or its repository ``OWNER/NAME`` on the Hub; or the result of
                ``checkpoints.read``.

        Raises:
            FileNotFoundError: there is no such file or repository.
            ValueError: it is damaged, or holds no network of this package.
        """
        from instanceformer import checkpoints

        checkpoint = source if isinstance(source, checkpoints.Checkpoint) else checkpoints.read(source)
        try:
            with torch.device("meta"):  # allocate nothing until the weights are known to match the options
                network = cls(**checkpoint.options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.name}: options that no network of this version has; {error}") from error
        checkpoint.check_weights(network.state_dict())
        if checkpoint.options.get("backbone", "").startswith(TIMM):
            network = cls(**checkpoint.options)  # timm computes buffers that no state dict has
        else:
            network.to_empty(device="cpu")
        network.load_state_dict(checkpoint.weights)
        network.origin = replace(checkpoint, weights={})
        return network.eval()

    from_pretrained = from_checkpoint

    def save_pretrained(self, folder: str | Path, **card: Any) -> None:
        """Write the weights, with all that is known of them, and a model card; ``from_pretrained`` reads the folder.

        Args:
            folder: created if missing.
            card: of CardOptions: ``name``, ``license``, ``trained_on``, ``run``.
        """
        from instanceformer.checkpoints import hub

        hub.save(self._checkpoint(), Path(folder), hub.CardOptions(**card))

    def push_to_hub(self, repository: str, *, private: bool | None = None, **card: Any) -> str:
        """Upload what ``save_pretrained`` writes to the repository ``OWNER/NAME``: the address of the commit."""
        from instanceformer.checkpoints import hub

        return hub.push(self._checkpoint(), repository, hub.CardOptions(**card), private)

    def _checkpoint(self) -> Checkpoint:
        from instanceformer.checkpoints import Checkpoint

        origin = self.origin or Checkpoint(vars(self.options), {}, name="")
        return replace(origin, weights=self.state_dict())

    def compile_parts(self, **options: Any) -> None:
        """Compile the parts that see every frame, in place; names of weights do not change.

        Args:
            options: passed to ``torch.compile``.
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
        """Run over clips frame by frame; each frame sees what earlier ones left in the state.

        In evaluation mode, a whole clip, single frames and chunks give the same numbers, provided that each call gets
        the state that the previous one returned. Queries come to hold instances as in inference.

        Args:
            frames: (B, T, 3, H, W) RGB, normalized with the ImageNet mean and standard deviation.
            padding: (B, H, W) bool, true where padded (on the right and at the bottom only); None if nothing is.
            state: returned by an earlier call; None starts afresh.
            segment: (n,) or (B, n) int64 indices of the queries to segment, "all", or None for no masks.

        Returns:
            The prediction and the state after the last frame.

        Raises:
            ValueError: ``segment`` is another string, or ``padding`` is not only on the right and at the bottom.
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
            memory_tokens=self.options.memory_tokens,
            looks=0 if self.identity is None else LOOKS,
            device=self.query_content.device if device is None else device,
        )

    def encode(self, frames: Tensor, padding: Tensor | None = None) -> FrameFeatures:
        """Run backbone, projection, deformable encoder and the pixel side of the mask head; no frame sees another.

        Clips of different sizes pass through backbone and projection without their padding, so that it cannot leak in
        through convolutions, windows or normalization statistics.

        Args:
            frames: (B, T, 3, H, W), as in ``forward``.
            padding: (B, H, W) bool or None.

        Returns:
            Features of all frames.
        """
        batch, count, _, height, width = frames.shape
        clips = ((height, width),) * batch if padding is None else valid_sizes(padding)
        pyramid = build_pyramid(clips, (height, width), self.options.num_levels, self.dim, frames.device)
        every_frame, images = pyramid.repeated(count), frames.flatten(0, 1)

        if pyramid.is_padded and not (self.training and count == 1 and self.backbone.is_frozen):
            finest, *levels = extract_unpadded(frames, pyramid, self._extract)
        else:  # as in DETR, this includes training on single images with frozen norms, since each has another size
            finest, *levels = self._extract(images)
        tokens = self.encoder(levels, every_frame)
        encoded = every_frame.unflatten(tokens)
        mask_features = self.mask_head.encode(encoded, finest, every_frame)
        looks = None
        if self.identity is not None:
            looks = self.identity.appearance.encode(images, finest, encoded[0], every_frame)
            looks = looks.unflatten(0, (batch, count))
        return FrameFeatures(
            tokens=narrowed(tokens).unflatten(0, (batch, count)),
            mask_features=mask_features.unflatten(0, (batch, count)),
            looks=looks,
            pyramid=pyramid,
        )

    def _extract(self, images: Tensor) -> list[Tensor]:
        """(X, 3, H, W) to C2 and every projected level."""
        finest, *features = self.backbone(images)
        return [finest, *self.projection(features)]

    def decode(self, features: FrameFeatures, state: TrackState) -> FramePrediction:
        """Decode all queries at one frame, by equations 1, 2 and 4.

        With ``identity``, the prediction also says whether each query that holds an instance still shows it. With
        ``recover``, a query that lost its instance and the free one that found it are swapped in the prediction.

        Args:
            features: of one frame, ``encode(...)[t]``.
            state: after the previous frame.

        Returns:
            The prediction after every decoder layer, with the class prior applied to the last layer's logits.
        """
        queries = self.query_content.expand(state.carried.shape[0], -1, -1)
        if self.options.propagate_queries:
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
        """Add the sighting to a prediction and, with ``recover``, swap queries as ``recover`` and ``set_aside`` say."""
        assert self.identity is not None
        assert state.identities is not None
        assert features.looks is not None
        logits, boxes = prediction.class_logits.detach(), prediction.boxes[-1].detach()
        priority = logits.amax(dim=-1).sigmoid() + state.held
        candidates = priority.topk(min(CANDIDATES, self.num_queries), dim=1).indices
        with torch.no_grad():
            masks = self.mask_head.coarse(
                features,
                gather_queries(prediction.queries[-1], candidates),
                gather_queries(prediction.centers[-1], candidates),
            )
            within = features.pyramid.valid[0 if self.mask_head.stride == 4 else 1][:, None]
            if features.pyramid.is_padded:
                masks = masks.masked_fill(~within, -30.0)
        sighting = self.identity(features.looks, masks, within, candidates, state.identities, state.held, logits, boxes)
        prediction = replace(prediction, sighting=sighting)
        if self.options.identity == "hide":
            return prediction
        prediction = prediction.permuted(recover(sighting, state.held))
        confidence = prediction.class_logits.detach().amax(dim=-1).sigmoid()
        assert prediction.sighting is not None
        return prediction.permuted(set_aside(prediction.sighting, state.held, confidence, self.options.min_confidence))

    def segment(
        self, features: FrameFeatures, prediction: FramePrediction, queries: Tensor, all_layers: bool = False
    ) -> Tensor:
        """Masks of the requested queries.

        Args:
            features: of the frame.
            prediction: of the same frame.
            queries: (B, n) int64 indices; with ``all_layers`` also (D, B, n), different ones for each layer.
            all_layers: return masks after each of the D decoder layers, as training needs.

        Returns:
            (B, n, ceil(H / 4), ceil(W / 4)) float32 logits; with ``all_layers`` (D, B, n, ...).
        """
        contents, centers = (prediction.queries, prediction.centers)
        if not all_layers:
            contents, centers = contents[-1:], centers[-1:]
        layers, batch, n = contents.shape[0], *queries.shape[-2:]

        def chosen(x: Tensor) -> Tensor:
            """(D, B, N, C) to (B, D n, C)."""
            return gather_layers(x, queries).transpose(0, 1).flatten(1, 2)

        masks: Tensor = self.mask_head(features, chosen(contents), chosen(centers))
        masks = masks.view(batch, layers, n, *masks.shape[-2:]).transpose(0, 1)
        return masks if all_layers else masks[0]

    def advance(self, state: TrackState, prediction: FramePrediction, matched: Tensor | None = None) -> TrackState:
        """The state for the next frame; decides which queries hold an instance and which enter the memory.

        A query that holds an instance keeps it. At inference a query begins to hold one when its score reaches
        ``min_confidence`` and it is neither a duplicate nor hidden; only queries that meet these conditions in this
        very frame can enter the memory. In training, all of ``matched`` can. Of these, the k most confident do; hidden
        ones never do.

        Args:
            state: the one that the prediction was decoded with.
            prediction: of the current frame.
            matched: (B, N) bool, in training the queries that are matched to an instance; None: decide as at inference.
        """
        scores, boxes, queries = prediction.scores, prediction.boxes[-1], prediction.queries[-1]
        sighting, remembered = prediction.sighting, matched
        if remembered is None:
            confidence = scores.amax(dim=-1)
            remembered = confidence >= self.options.min_confidence
            if sighting is not None:
                remembered &= ~sighting.hidden
            if self.options.max_overlap < 1:
                remembered &= ~duplicates(boxes, confidence, remembered, state.held, self.options.max_overlap)
        held = remembered | state.held
        carried = held if self.options.free_queries == "renew" else torch.ones_like(held)
        filled = held if self.options.class_history == "held" else carried
        class_logits = push(state.class_logits, prediction.class_logits)
        class_filled = push(state.class_filled, filled)
        identities = state.identities
        if sighting is not None:
            hidden = sighting.hidden
            carried, remembered = carried & ~hidden, remembered & ~hidden
            class_logits = torch.where(hidden[:, None, :, None], state.class_logits, class_logits)
            class_filled = (state.class_filled & hidden[:, None]) | (class_filled & ~hidden[:, None])
            assert identities is not None
            identities = observe(identities, sighting, held, prediction.class_logits, boxes)
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
