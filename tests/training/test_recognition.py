from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.conftest import make_batch
from torch import Tensor

from instanceformer.data.batch import DenseTargets
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.state import TrackState
from instanceformer.training.recognition import (
    FREE_RIGHT,
    FREE_WRONG,
    STRANGE,
    covers,
    identity_losses,
    recognize_frame,
)

KNOWN = {"identity": "recover", "free_queries": "renew", "min_confidence": 0.3}
ASSIGNED = torch.tensor([[4, 7, 2]])  # queries of three instances
N = 12


class Frame:
    """The third frame of a clip with three instances that hold their queries; the second of them is hidden in it."""

    def __init__(self, tiny, **options) -> None:
        self.network = tiny(**{**KNOWN, **options})
        batch = make_batch([3])
        self.targets: DenseTargets = batch.targets
        features = self.network.encode(batch.frames)
        held = torch.zeros(1, N, dtype=torch.bool)
        held[0, ASSIGNED[0]] = True
        self.state: TrackState = self.network.initial_state(1)
        for t in range(2):
            self.state = self.network.advance(self.state, self.network.decode(features[t], self.state), held)
        self.features: FrameFeatures = features[2]
        self.prediction: FramePrediction = self.network.decode(self.features, self.state)

    def compare(self, masks: Tensor, claims: Tensor):
        """With masks and claims that are rigged: (N, h, w), (N, N)."""
        sighting = self.prediction.sighting
        object.__setattr__(sighting, "masks", masks[sighting.queries[0]][None])
        object.__setattr__(sighting, "claims", claims[None])
        appearance = self.network.identity.appearance
        return recognize_frame(appearance, self.features, sighting, self.state.held, ASSIGNED, self.targets, 2)

    def true_masks(self) -> Tensor:
        """(n, h, w) logits."""
        return self.targets.masks[2, 0].float() * 4 - 32


def test_covers() -> None:
    masks, truth = torch.randn(2, 4, 6, 8), torch.rand(2, 3, 6, 8)
    found = covers(masks, truth)
    for b in range(2):
        for m in range(4):
            for n in range(3):
                a, c = masks[b, m] > 0, truth[b, n] > 0.5
                assert found[b, m, n] == ((a & c).sum() > 0.5 * (a | c).sum())
    assert not covers(torch.full((1, 1, 4, 4), -9.0), torch.zeros(1, 1, 4, 4)).any()  # nothing does not cover nothing


def test_claims_are_asked_for_of_the_instances_own_query_and_of_free_ones(tiny) -> None:
    """Query 4 is on its instance; query 7's is hidden; 2 has been captured by 4's, and query 9 shows its own."""
    frame = Frame(tiny, mask_stride=4)
    true = frame.true_masks()
    assert frame.targets.visible[2, 0].tolist() == [True, False, True]
    masks = torch.full((N, *true.shape[1:]), -20.0)
    masks[4] = masks[2] = true[0]
    masks[9] = true[2]
    claims = torch.randn(N, N)
    found = frame.compare(masks, claims)
    expected = torch.zeros(())
    for instance, query in enumerate(ASSIGNED[0].tolist()):
        for q in range(N):
            right = (instance, q) in ((0, 4), (2, 9))
            of_free = FREE_RIGHT if right else FREE_WRONG
            weight = float(q == query) if q in (4, 7, 2) else of_free
            bce = torch.nn.functional.softplus(-claims[query, q] if right else claims[query, q])
            expected = expected + weight * bce
    torch.testing.assert_close(found.loss, expected)
    assert found.shown[0].tolist() == [[True, False, False]]  # by their own queries
    assert found.shown[1].tolist() == [[True, False, True]]


def test_right_claims_cost_less_than_wrong_ones(tiny) -> None:
    frame = Frame(tiny, mask_stride=4)
    true = frame.true_masks()
    masks = torch.full((N, *true.shape[1:]), -20.0)
    masks[4], masks[2] = true[0], true[2]
    claims = torch.full((N, N), -9.0)
    claims[4, 4] = claims[2, 2] = 9.0
    assert frame.compare(masks, claims).loss < 0.01
    claims[7, 7] = 9.0  # whose instance is out of sight
    assert frame.compare(masks, claims).loss > 8


def test_instances_without_a_query_claim_nothing(tiny) -> None:
    frame = Frame(tiny)
    sighting = frame.prediction.sighting
    nobody = torch.full_like(ASSIGNED, -1)
    appearance = frame.network.identity.appearance
    found = recognize_frame(appearance, frame.features, sighting, frame.state.held, nobody, frame.targets, 2)
    assert found.loss == 0
    assert not found.shown[0].any()


@pytest.mark.parametrize("stride", [4, 8])
def test_gradients_reach_the_looks_and_the_claims_and_no_mask(tiny, stride) -> None:
    frame = Frame(tiny, mask_stride=stride)
    appearance, sighting = frame.network.identity.appearance, frame.prediction.sighting
    found = recognize_frame(appearance, frame.features, sighting, frame.state.held, ASSIGNED, frame.targets, 2)
    looks, claims = identity_losses([found, found])
    (looks + claims).backward()
    reached = {name for name, p in frame.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name for name in reached if name.startswith("identity.")} == {
        name for name, _ in frame.network.named_parameters() if name.startswith("identity.")
    }
    assert not {name for name in reached if name.startswith(("mask_head.", "decoder."))}


def test_alike_looks_cost_less(tiny) -> None:
    frame = Frame(tiny)
    appearance, sighting = frame.network.identity.appearance, frame.prediction.sighting
    found = recognize_frame(appearance, frame.features, sighting, frame.state.held, ASSIGNED, frame.targets, 2)
    everywhere = torch.ones_like(found.shown)
    basis = torch.eye(found.looks.shape[-1])[:3].expand(2, 1, 3, -1)
    costs = []
    for looks in (basis, basis[:, :, [0, 0, 0]], torch.stack((basis[0], basis[0].roll(1, dims=1)))):
        frames = [type(found)(looks, everywhere, found.loss) for _ in range(3)]
        costs.append(float(identity_losses(frames)[0]))
    assert costs[0] + 1 < costs[1] < costs[2] - 1  # told apart, all alike, mistaken for one another


def test_claims_on_instances_of_another_clip_cost_what_they_weigh(tiny) -> None:
    network = tiny(**KNOWN).train()
    batch = make_batch([3, 2])
    features, state = network.encode(batch.frames, batch.padding), network.initial_state(2)
    assigned = torch.tensor([[4, 7, 2], [1, 5, -1]])
    held = torch.zeros(2, N, dtype=torch.bool)
    held[0, [4, 7, 2]] = held[1, [1, 5]] = True
    state = network.advance(state, network.decode(features[0], state), held)
    sighting = network.decode(features[1], state).sighting
    appearance = network.identity.appearance

    def loss(sighting) -> Tensor:
        return recognize_frame(appearance, features[1], sighting, state.held, assigned, batch.targets, 1).loss

    claims, holds = sighting.strange
    expected = torch.zeros(())
    for clip, others in ((0, (1, 5)), (1, (4, 7, 2))):
        queries = sighting.queries[clip].tolist()
        for i, query in enumerate(queries):
            assert holds[clip, i] == (query in others)
            if query in others:
                for q in range(len(queries)):
                    expected = expected + STRANGE * (1 if q == i else FREE_WRONG) * torch.nn.functional.softplus(
                        claims[clip, i, q]
                    )
    torch.testing.assert_close(loss(sighting) - loss(replace(sighting, strange=None)), expected)
