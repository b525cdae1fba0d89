"""Beyond the paper: what an instance looks like, whether a query is still on it, and how a lost one is recovered.

The paper carries a query from frame to frame whatever it sees: when another instance covers its own, it carries on with
that one. Here the state also keeps the looks of the instance that a query holds, pooled from the frames themselves, and
in every frame the network asks whether what the query found is that instance. If not, the instance is hidden: the frame
does not change what is known about it, its query starts afresh, and the first free query that shows it takes its place.
docs/identity.md explains this in full, with figures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instanceformer.model.attention import xavier_
from instanceformer.model.heads import upsample_nearest
from instanceformer.model.pyramid import Pyramid
from instanceformer.model.state import Identities, gather_queries

IdentityRule = Literal["none", "hide", "recover"]

LOOKS = 64
"""Length E of the embedding of what an instance looks like: its looks."""

CHANNELS = 32
"""Channels to which C2 and the encoder's finest level are each projected before they are pooled."""

SIGHTINGS = 10
"""What is known about an instance is a plain mean over this many frames; each later frame moves it by a tenth."""

CANDIDATES = 64
"""Number of queries whose looks are pooled in each frame: those that hold an instance, then the most confident."""

MEASURES = 17
"""Number of inputs from which a claim is predicted, see ``Recognition.measure``."""

CUT = 0.15
"""``scene_change`` above which the film has been cut since an instance was last seen. From one frame to the next its
median is 0.04 and it is rarely above 0.1; between videos its median is 0.3."""


@dataclass(frozen=True)
class Sighting:
    """What the queries of a frame look like, and whose instances they show; M of the N queries are candidates.

    Attributes:
        queries: (B, M) int64, the candidates.
        masks: (B, M, h, w) logits of their masks at the stride of the mask features, without gradient.
        looks: (B, N, E) of unit length for the candidates, zero for all others.
        scene: (B, E) of unit length, looks of the whole frame.
        claims: (B, N, N) logits that query q shows the instance that query i holds, at [i, q].
        known: (B, N) bool, queries that hold an instance whose looks are known; only they make claims.
        cut: (B, N) bool, queries whose known instance was last seen in another scene.
        strange: in training on several clips, (B, M, M) logits that candidate q shows the instance that query i holds
            in another clip of the batch, which is never true; and (B, M) bool, whether that query holds one.
    """

    queries: Tensor
    masks: Tensor
    looks: Tensor
    scene: Tensor
    claims: Tensor
    known: Tensor
    cut: Tensor
    strange: tuple[Tensor, Tensor] | None = None

    @property
    def presence(self) -> Tensor:
        """(B, N) probability that a query is on the instance that it holds; 1 if no instance is known."""
        own = self.claims.diagonal(dim1=1, dim2=2)
        return torch.where(self.known, own.sigmoid(), 1.0)

    @property
    def hidden(self) -> Tensor:
        """(B, N) bool, queries that are not on the instance that they hold."""
        return self.presence < 0.5

    def permuted(self, order: Tensor) -> Sighting:
        """Swap queries: row i becomes what query order[i] showed. ``order``, (B, N) int64, is its own inverse."""
        return replace(
            self,
            queries=order.gather(1, self.queries),
            looks=self.looks.gather(1, order[..., None].expand_as(self.looks)),
            claims=self.claims.gather(2, order[:, None].expand_as(self.claims)),
        )


class Appearance(nn.Module):
    """Looks of instances: from means and deviations, under a mask, of pixels, C2 and the encoder's finest level.

    Args:
        dim: channels C of the encoder's output.
        finest: channels of C2.
        stride: of the mask features, 4 or 8.
    """

    def __init__(self, dim: int, finest: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.finest, self.encoded = nn.Conv2d(finest, CHANNELS, 1), nn.Conv2d(dim, CHANNELS, 1)
        self.hidden, self.output = nn.Linear(2 * (3 + 2 * CHANNELS), LOOKS), nn.Linear(LOOKS, LOOKS)
        for layer in (self.finest, self.encoded, self.hidden, self.output):
            xavier_(layer)

    def encode(self, frames: Tensor, finest: Tensor, encoded: Tensor, pyramid: Pyramid) -> Tensor:
        """The features that looks are pooled from.

        Args:
            frames: (X, 3, H, W) normalized; zero where padded, like the other inputs.
            finest: (X, channels, ceil(H / 4), ceil(W / 4)) C2.
            encoded: (X, C, ceil(H / 8), ceil(W / 8)) encoder output.
            pyramid: of the X frames.

        Returns:
            (X, 3 + 2 CHANNELS, h, w) at the stride of the mask features.
        """
        pixels = pooled(frames, self.stride, pyramid.sizes)
        finest, encoded = self.finest(finest), self.encoded(encoded)
        if self.stride == 4:
            encoded = upsample_nearest(encoded, finest.shape[-2:])
        else:
            finest = pooled(finest, 2, (pyramid.sizes / 4).ceil())
        return torch.cat((pixels.to(finest.dtype), finest, encoded), dim=1)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """(B, channels, h, w) features under (B, M, h, w) mask logits: (B, M, E) float32 of unit length."""
        with torch.autocast(features.device.type, enabled=False):
            weights = masks.float().sigmoid().flatten(2)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-4)
            values = features.float().flatten(2).transpose(1, 2)
            mean = weights @ values
            deviation = (weights @ values.square() - mean.square()).clamp(min=1e-5).sqrt()
            hidden = F.relu(self.hidden(torch.cat((mean, deviation), dim=-1)))
            return F.normalize(self.output(hidden), dim=-1)


class Recognition(nn.Module):
    """A small network that tells, from a few measures, whether a query shows the instance that it or another holds."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(MEASURES, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, 2.0)  # untrained, it takes every query to be on its instance

    def forward(self, measures: Tensor) -> Tensor:
        """(B, M, M, MEASURES), without gradient, to (B, M, M) float32 logits."""
        with torch.autocast(measures.device.type, enabled=False):
            claims: Tensor = self.output(F.relu(self.hidden(measures))).squeeze(-1)
            return claims

    @staticmethod
    @torch.no_grad()
    def measure(
        known: Identities,
        holds: Tensor,
        masks: Tensor,
        looks: Tensor,
        scene: Tensor,
        logits: Tensor,
        boxes: Tensor,
    ) -> Tensor:
        """Measure what indicates whether query q shows the instance of query i.

        Args:
            known: of the M queries, before the frame.
            holds: (B, M) bool, queries that hold an instance whose looks are known.
            masks: (B, M, h, w) logits.
            looks: (B, M, E).
            scene: (B, E).
            logits: (B, M, K) class logits of the frame.
            boxes: (B, M, 4) cxcywh.

        Returns:
            (B, M, M, MEASURES) float32, [i, q].
        """
        own = torch.eye(looks.shape[1], dtype=torch.bool, device=looks.device)
        holds = holds[..., None]
        shown = masks.float().sigmoid().flatten(2)
        area = shown.sum(dim=-1)
        shared = shown @ shown.transpose(1, 2)
        overlap = shared / (area[:, :, None] + area[:, None] - shared).clamp(min=1e-4)

        alike = known.looks @ looks.transpose(1, 2)
        fits = (alike.diagonal(dim1=1, dim2=2)[..., None].clamp(min=0) * holds).expand_as(alike)
        away = known.away[..., None]
        steps = (away + 1).clamp(max=5)
        length = known.boxes[..., 2:].prod(dim=-1).clamp(min=1e-4).sqrt()[..., None]
        moved = (known.boxes[..., :2] + known.motion * steps)[:, :, None] - boxes[:, None, :, :2]
        distance = (moved.norm(dim=-1) / (length * (steps + 1) / 2)).clamp(max=4)
        grown = (length.square() / boxes[..., 2:].prod(dim=-1).clamp(min=1e-4)[:, None]).log().clamp(-4, 4)
        classes = known.class_logits.softmax(dim=-1) @ logits.float().softmax(dim=-1).transpose(1, 2)

        # of all instances but i's, the one that looks most like what q shows; those seen elsewhere count less
        other, _ = greatest_of_others(torch.where(holds, alike * (1 - fits * (1 - overlap)), -1.0))
        # of all other queries that hold an instance, the one that overlaps q most, and the evidence for it
        rival, which = greatest_of_others(torch.where(holds & ~own, overlap, 0.0))
        rival_alike, rival_distance, rival_fits = (x.gather(1, which) for x in (alike, distance, fits))

        certainty = shown.square().sum(dim=-1) / area.clamp(min=1e-4)
        of_query = (logits.float().amax(dim=-1) / 4, certainty, area.clamp(min=1e-2).log() / 4)
        return torch.stack(
            (
                alike,
                other,
                alike - other,
                rival,
                rival_alike * rival,
                (alike - rival_alike) * rival,
                (distance - rival_distance) * rival,
                rival_fits * rival,
                classes,
                distance,
                grown,
                own.float().expand_as(alike),
                *(x[:, None].expand_as(alike) for x in of_query),
                (away.clamp(max=20) / 10).expand_as(alike),
                (4 * scene_change(known, scene))[..., None].expand_as(alike),
            ),
            dim=-1,
        )


class Identity(nn.Module):
    """Appearance and recognition of the candidates of a frame.

    Args:
        dim: channels C of the encoder's output.
        finest: channels of C2.
        stride: of the mask features, 4 or 8.
    """

    def __init__(self, dim: int, finest: int, stride: int) -> None:
        super().__init__()
        self.appearance = Appearance(dim, finest, stride)
        self.recognition = Recognition()

    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        within: Tensor,
        queries: Tensor,
        known: Identities,
        held: Tensor,
        logits: Tensor,
        boxes: Tensor,
    ) -> Sighting:
        """Recognize instances.

        Args:
            features: (B, channels, h, w) of ``Appearance.encode``.
            masks: (B, M, h, w) logits of the candidates, without gradient.
            within: (B, 1, h, w) bool, false where padded.
            queries: (B, M) int64, the candidates.
            known: of all N queries, before the frame.
            held: (B, N) bool, queries that hold an instance.
            logits: (B, N, K) class logits of the frame.
            boxes: (B, N, 4) cxcywh.
        """
        holds = held & (known.sightings > 0)
        looks = self.appearance(features, torch.cat((masks, torch.where(within, 20.0, -20.0)), dim=1))
        looks, scene = looks[:, :-1], looks[:, -1].detach()
        frame = (masks, looks.detach(), scene, *(gather_queries(x, queries) for x in (logits, boxes)))

        def claim(known: Identities, holds: Tensor) -> Tensor:
            result: Tensor = self.recognition(self.recognition.measure(known.of(queries), holds, *frame))
            return result

        claims = claim(known, holds.gather(1, queries))
        strange = None
        if self.training and len(masks) > 1:
            strangers = holds.roll(1, 0).gather(1, queries)
            strange = claim(known.rolled(), strangers), strangers
        batch, n = held.shape
        rows = queries[..., None]
        wide = claims.new_zeros(batch, claims.shape[1], n).scatter(2, queries[:, None].expand_as(claims), claims)
        return Sighting(
            queries=queries,
            masks=masks,
            looks=looks.new_zeros(batch, n, LOOKS).scatter(1, rows.expand_as(looks), looks),
            scene=scene,
            claims=claims.new_zeros(batch, n, n).scatter(1, rows.expand_as(wide), wide),
            known=holds & torch.zeros_like(holds).scatter(1, queries, True),
            cut=holds & (scene_change(known, scene) > CUT),
            strange=strange,
        )


def scene_change(known: Identities, scene: Tensor) -> Tensor:
    """How much a frame's looks, (B, E), differ from the frame that last showed each instance: (B, M) in [0, 1.5]."""
    return (1 - (known.scenes @ scene[..., None])[..., 0]).clamp(min=0).sqrt()


def inside(sizes: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """How much of each cell of a grid lies within (X, 2) sizes, (width, height) in pixels: (X, 1, h, w) in [0, 1]."""
    columns, rows = (
        (size[:, None] / stride - torch.arange(cells, device=sizes.device)).clamp(0, 1)
        for size, cells in zip(sizes.unbind(dim=1), reversed(grid), strict=True)
    )
    return (rows[:, :, None] * columns[:, None])[:, None]


def pooled(x: Tensor, stride: int, sizes: Tensor) -> Tensor:
    """Means over cells, counting only what lies within ``sizes``: (X, C, H, W), zero beyond, to (X, C, h, w)."""
    height, width = x.shape[-2:]
    cells = F.avg_pool2d(F.pad(x, (0, -width % stride, 0, -height % stride)), stride)
    shares = inside(sizes, (cells.shape[-2], cells.shape[-1]), stride)
    return cells / shares.clamp(min=1 / stride**2).to(cells.dtype)


def greatest_of_others(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each [i, q] of (B, M, M): the greatest value of column q outside row i, and its row."""
    values, rows = x.topk(2, dim=1)
    is_own = rows[:, :1] == torch.arange(x.shape[1], device=x.device)[:, None]
    return torch.where(is_own, values[:, 1:], values[:, :1]), torch.where(is_own, rows[:, 1:], rows[:, :1])


def recover(sighting: Sighting, held: Tensor) -> Tensor:
    """Pair queries that lost their instance with free queries that show it.

    A query that does not see its instance and a query that holds nothing are swapped if each is the other's best match
    and the claim is above zero.

    Args:
        sighting: of the frame.
        held: (B, N) bool, queries that held an instance before it.

    Returns:
        (B, N) int64 order for ``permuted``: paired queries are swapped, all others stay.
    """
    order = torch.arange(held.shape[1], device=held.device).expand_as(held)
    allowed = sighting.hidden[:, :, None] & ~held[:, None] & (sighting.claims > 0)
    claims = sighting.claims.masked_fill(~allowed, -torch.inf)
    query, instance = claims.argmax(dim=2), claims.argmax(dim=1)
    returns = allowed.any(dim=2) & (instance.gather(1, query) == order)
    is_taken = allowed.any(dim=1) & (query.gather(1, instance) == order)
    return torch.where(returns, query, torch.where(is_taken, instance, order))


def set_aside(sighting: Sighting, held: Tensor, confidence: Tensor, min_confidence: float) -> Tensor:
    """Give what hidden queries found after a cut to free queries, where it can begin new identities.

    Args:
        sighting: of the frame, after ``recover``.
        held: (B, N) bool, queries that held an instance before it.
        confidence: (B, N) in [0, 1].
        min_confidence: from which a query begins to hold an instance.

    Returns:
        (B, N) int64 order for ``permuted``: the most confident hidden query is swapped with the least confident free
        one, the second with the second, and so on.
    """
    count = held.shape[1]
    order = torch.arange(count, device=held.device).expand_as(held)
    confident = confidence >= min_confidence
    strange, idle = sighting.hidden & sighting.cut & confident, ~held & ~confident
    is_pair = order < torch.minimum(strange.sum(dim=1), idle.sum(dim=1))[:, None]
    first, second = (
        torch.where(is_pair, ranks.argsort(dim=1), count)
        for ranks in (torch.where(strange, -confidence, 1.0), torch.where(idle, confidence, 2.0))
    )
    return F.pad(order, (0, 1)).scatter(1, first, second).scatter(1, second, first)[:, :-1]


@torch.no_grad()
def observe(known: Identities, sighting: Sighting, held: Tensor, logits: Tensor, boxes: Tensor) -> Identities:
    """What is known after a frame: instances seen in it enter the means as ``SIGHTINGS`` says; others stay as before.

    Args:
        known: before the frame.
        sighting: of the frame.
        held: (B, N) bool, queries that hold an instance now.
        logits: (B, N, K) class logits of the frame.
        boxes: (B, N, 4) cxcywh.
    """
    seen = held & ~sighting.hidden & (sighting.looks != 0).any(dim=-1)
    before = (known.sightings > 0) & held
    sightings = (known.sightings * held + seen).clamp(max=SIGHTINGS)
    rate = torch.where(seen, 1 / sightings.clamp(min=1), 0.0)[..., None]
    moved = (boxes[..., :2] - known.boxes[..., :2]) / (known.away + 1)[..., None]
    motion = torch.where(seen[..., None], (known.motion + moved) / 2, known.motion)
    return Identities(
        hidden=sighting.hidden,
        looks=F.normalize(known.looks.lerp(sighting.looks, rate), dim=-1),
        class_logits=known.class_logits.lerp(logits.float(), rate),
        boxes=torch.where(seen[..., None], boxes.float(), known.boxes),
        scenes=torch.where(seen[..., None], sighting.scene[:, None], known.scenes),
        motion=torch.where(before[..., None], motion, 0.0),
        sightings=sightings,
        away=torch.where(seen, 0.0, known.away + 1),
    )
