from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from instanceformer import InstanceFormer, checkpoints
from instanceformer.model.identity import (
    LOOKS,
    SIGHTINGS,
    Appearance,
    Sighting,
    greatest_of_others,
    inside,
    observe,
    pooled,
    recover,
    scene_change,
    set_aside,
)
from instanceformer.model.pyramid import build_pyramid
from instanceformer.model.state import Identities, TrackState, gather_queries

KNOWN: dict[str, Any] = {"identity": "recover", "free_queries": "renew", "min_confidence": 0.02}
N, K = 12, 5


def sighting(claims: Tensor, known: Tensor, looks: Tensor | None = None) -> Sighting:
    batch, n = known.shape
    queries = torch.arange(n).expand(batch, -1)
    masks = torch.randn(batch, n, 4, 6)
    looks = torch.randn(batch, n, LOOKS) if looks is None else looks
    scene = torch.nn.functional.normalize(torch.randn(batch, LOOKS), dim=-1)
    return Sighting(queries, masks, looks, scene, claims, known, cut=torch.zeros_like(known))


def claiming(*pairs: tuple[int, int, float], n: int = 6) -> Tensor:
    claims = torch.full((1, n, n), -5.0)
    for instance, query, claim in pairs:
        claims[0, instance, query] = claim
    return claims


HELD = torch.tensor([[True, True, True, False, False, False]])


@pytest.mark.parametrize(
    ("claims", "order"),
    [
        (claiming((0, 0, 3.0), (1, 1, 3.0), (2, 2, 3.0), (0, 3, 9.0)), [0, 1, 2, 3, 4, 5]),  # nobody is lost
        (claiming((0, 0, 3.0), (1, 1, 3.0), (2, 4, 1.0)), [0, 1, 4, 3, 2, 5]),
        (claiming((0, 0, 3.0), (1, 1, 3.0), (2, 4, -0.1)), [0, 1, 2, 3, 4, 5]),  # shown by nobody
        (claiming((0, 0, 3.0), (1, 1, 3.0), (2, 1, 9.0)), [0, 1, 2, 3, 4, 5]),  # only by one that is held
        (claiming((0, 0, 3.0), (1, 4, 2.0), (2, 4, 1.0)), [0, 4, 2, 3, 1, 5]),  # two claim one: the stronger has it
        (claiming((0, 0, 3.0), (1, 4, 2.0), (2, 4, 1.0), (2, 5, 0.5)), [0, 4, 2, 3, 1, 5]),  # the other has to wait
        (claiming((0, 5, 1.0), (1, 3, 2.0), (2, 4, 3.0)), [5, 3, 4, 1, 2, 0]),
    ],
)
def test_a_lost_instance_and_the_free_query_that_shows_it_change_places(claims: Tensor, order: list[int]) -> None:
    assert recover(sighting(claims, HELD), HELD).tolist() == [order]


def test_recovery_is_pairs_that_change_places_and_touches_nothing_that_is_seen() -> None:
    for _ in range(50):
        claims, held = torch.randn(3, 8, 8) * 3, torch.rand(3, 8) < 0.5
        found = sighting(claims, held & (torch.rand(3, 8) < 0.8))
        order = recover(found, held)
        assert torch.equal(order.gather(1, order), torch.arange(8).expand(3, -1))
        moved = order != torch.arange(8)
        assert not (moved & held & ~found.hidden).any()
        assert (claims.gather(2, order[..., None])[..., 0] > 0)[moved & held].all()
        assert not held.gather(1, order)[moved & held].any()


def test_after_a_cut_what_hidden_queries_found_goes_to_free_ones() -> None:
    seen = sighting(claiming((0, 0, 3.0)), HELD)  # 1 and 2 are hidden
    confidence = torch.tensor([[0.9, 0.6, 0.8, 0.4, 0.1, 0.2]])
    assert set_aside(seen, HELD, confidence, 0.3).tolist() == [[0, 1, 2, 3, 4, 5]]  # in the same scene
    seen = replace(seen, cut=HELD)
    assert set_aside(seen, HELD, confidence, 0.3).tolist() == [[0, 5, 4, 3, 2, 1]]  # 3 may show something itself
    assert set_aside(seen, HELD, confidence, 0.7).tolist() == [[0, 1, 4, 3, 2, 5]]
    assert set_aside(seen, HELD, confidence, 0.95).tolist() == [[0, 1, 2, 3, 4, 5]]
    only = torch.tensor([[0.9, 0.6, 0.8, 0.4, 0.1, 0.5]])
    assert set_aside(seen, HELD, only, 0.3).tolist() == [[0, 1, 4, 3, 2, 5]]  # one place for two


@torch.no_grad()
def test_a_scene_is_known_by_its_looks(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**KNOWN)
    scene, other = torch.randn(2, 1, 3, 64, 96)
    frames = torch.stack((scene, scene + 0.05 * torch.randn_like(scene), 2 * other + 3), dim=1)
    features, state = network.encode(frames), network.initial_state(1)
    for t in range(2):
        prediction = network.decode(features[t], state)
        assert not prediction.sighting.cut.any()
        state = network.advance(state, prediction)
    before, held = state.identities.scenes, state.held & (state.identities.sightings > 0)
    assert held.any()
    change = scene_change(state.identities, network.decode(features[2], state).sighting.scene)
    same = scene_change(state.identities, prediction.sighting.scene)
    assert same[held].max() < 0.5 * change[held].min()
    away = replace(prediction.sighting, claims=torch.full_like(prediction.sighting.claims, -9.0), known=held)
    after = observe(state.identities, away, held, prediction.class_logits, prediction.boxes[-1])
    assert torch.equal(after.scenes[held], before[held])  # where it was last seen


@torch.no_grad()
def test_padding_is_no_part_of_the_scene(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**KNOWN)
    frame = torch.randn(1, 1, 3, 64, 96)
    alone = network.decode(network.encode(frame)[0], network.initial_state(1)).sighting.scene
    padded = torch.zeros(1, 1, 3, 96, 128)
    padded[..., :64, :96] = frame
    padding = torch.ones(1, 96, 128, dtype=torch.bool)
    padding[:, :64, :96] = False
    seen = network.decode(network.encode(padded, padding)[0], network.initial_state(1)).sighting.scene
    torch.testing.assert_close(seen, alone, rtol=0, atol=1e-4)


def test_in_training_each_clip_is_asked_for_the_instances_of_another(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**KNOWN).train()
    features, state = network.encode(torch.randn(2, 2, 3, 64, 96)), network.initial_state(2)
    held = torch.zeros(2, N, dtype=torch.bool)
    held[0, 3] = held[1, [5, 6]] = True
    first = network.decode(features[0], state)
    prediction = network.decode(features[1], network.advance(state, first, held))
    claims, holds = prediction.sighting.strange
    order = network.decode(features[1], network.advance(state, first, held)).sighting
    assert claims.shape == (2, N, N)
    assert holds.sum(dim=1).tolist() == [2, 1]  # those of the other
    assert order.known.sum(dim=1).tolist() == [1, 2]
    network.eval()
    assert network.decode(features[1], network.advance(state, first, held)).sighting.strange is None


def test_rows_of_a_sighting_change_places_together() -> None:
    found = sighting(torch.randn(1, 6, 6), HELD)
    order = torch.tensor([[4, 1, 2, 3, 0, 5]])
    moved = found.permuted(order)
    assert torch.equal(moved.looks[0, 0], found.looks[0, 4])
    assert torch.equal(moved.claims[0, :, 0], found.claims[0, :, 4])
    assert moved.queries[0].tolist() == [4, 1, 2, 3, 0, 5]  # whose masks they now are


def test_greatest_of_others() -> None:
    x = torch.randn(2, 5, 5)
    values, rows = greatest_of_others(x)
    for clip in range(2):
        for i in range(5):
            for q in range(5):
                expected = max((float(x[clip, j, q]), j) for j in range(5) if j != i)
                assert (float(values[clip, i, q]), int(rows[clip, i, q])) == expected


@pytest.mark.parametrize("stride", [4, 8])
def test_looks_are_of_what_lies_under_the_mask(stride: int) -> None:
    appearance = Appearance(16, 8, stride)
    frames, finest, encoded = torch.randn(1, 3, 64, 96), torch.randn(1, 8, 16, 24), torch.randn(1, 16, 8, 12)
    pyramid = build_pyramid(((64, 96),), (64, 96), 3, 16, torch.device("cpu"))
    masks = torch.full((1, 2, 64 // stride, 96 // stride), -50.0)
    masks[:, 0, :, : 48 // stride] = 50.0
    masks[:, 1, :, 48 // stride :] = 50.0
    before = appearance(appearance.encode(frames, finest, encoded, pyramid), masks)
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(1, 2))
    frames[..., 48:] += 2
    finest[..., 12:] += 2
    encoded[..., 6:] += 2
    after = appearance(appearance.encode(frames, finest, encoded, pyramid), masks)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert (after[:, 1] - before[:, 1]).abs().max() > 0.05


def test_pooling_sees_no_padding() -> None:
    x = torch.randn(1, 2, 13, 22)
    padded = torch.zeros(1, 2, 24, 40)
    padded[..., :13, :22] = x
    alone = pooled(x, 8, torch.tensor([[22.0, 13.0]]))
    assert alone.shape == (1, 2, 2, 3)
    torch.testing.assert_close(alone[0, 0, 1, 2], x[0, 0, 8:, 16:].mean())
    torch.testing.assert_close(pooled(padded, 8, torch.tensor([[22.0, 13.0]]))[..., :2, :3], alone)
    assert inside(torch.tensor([[22.0, 13.0]]), (3, 5), 8)[0, 0].tolist() == [
        [1, 1, 0.75, 0, 0],
        [0.625, 0.625, 0.46875, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_what_is_known_is_a_mean_over_the_frames_that_showed_the_instance() -> None:
    known = Identities.empty(1, 3, K, LOOKS, None)
    held = torch.tensor([[True, True, False]])
    looks = torch.nn.functional.normalize(torch.randn(4, 1, 3, LOOKS), dim=-1)
    logits, boxes = torch.randn(4, 1, 3, K), torch.rand(4, 1, 3, 4)
    sees = [(True, True), (True, False), (True, False), (True, True)]  # instance 1 is hidden in two frames
    for t, (first, second) in enumerate(sees):
        claims = torch.full((1, 3, 3), -5.0)
        claims[0, 0, 0], claims[0, 1, 1] = (5.0 if seen else -5.0 for seen in (first, second))
        known = observe(known, sighting(claims, held & (known.sightings > 0), looks[t]), held, logits[t], boxes[t])
        assert known.hidden.tolist() == [[not first, not second, False]]
    assert known.sightings.tolist() == [[4, 2, 0]]
    torch.testing.assert_close(known.class_logits[0, 0], logits[:, 0, 0].mean(0))
    torch.testing.assert_close(known.class_logits[0, 1], (logits[0, 0, 1] + logits[3, 0, 1]) / 2)
    torch.testing.assert_close(known.boxes[0, 1], boxes[3, 0, 1])
    torch.testing.assert_close(known.motion[0, 1], (boxes[3, 0, 1] - boxes[0, 0, 1])[:2] / 3 / 2)  # three frames
    torch.testing.assert_close(known.looks[0, :2].norm(dim=-1), torch.ones(2))
    assert torch.nn.functional.cosine_similarity(known.looks[0, 1], looks[0, 0, 1] + looks[3, 0, 1], dim=0) > 0.999


def test_means_forget_slowly() -> None:
    known, held = Identities.empty(1, 1, 1, LOOKS, None), torch.ones(1, 1, dtype=torch.bool)
    for t in range(40):
        found = sighting(torch.full((1, 1, 1), 5.0), held & (known.sightings > 0))
        known = observe(known, found, held, torch.tensor([[[float(t >= 20)]]]), torch.rand(1, 1, 4))
    assert known.sightings.item() == SIGHTINGS
    assert known.class_logits.item() == pytest.approx(1 - 0.9**20, abs=1e-5)


@torch.no_grad()
def test_before_it_has_learned_everything_is_on_its_instance(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**KNOWN)
    torch.nn.init.zeros_(network.identity.recognition.output.weight)
    torch.nn.init.constant_(network.identity.recognition.output.bias, 2.0)
    plain = tiny(**{**KNOWN, "identity": "none"})
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("identity.")})
    for net in (network, plain):
        net.options = replace(net.options, min_confidence=1e-9)  # all are held from the first frame on
    frames = torch.randn(1, 4, 3, 64, 96)
    found, state = network(frames)
    torch.testing.assert_close(found.logits, plain(frames)[0].logits, rtol=0, atol=1e-3)  # tokens hold scores
    assert not state.hidden.any()
    assert state.held.all()


@torch.no_grad()
def test_a_hidden_instance_leaves_no_trace_and_its_query_starts_afresh(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**{**KNOWN, "identity": "hide", "min_confidence": 1e-4})
    frames = torch.randn(1, 2, 3, 64, 96)
    features = network.encode(frames)
    state = network.advance(network.initial_state(1), network.decode(features[0], network.initial_state(1)))
    assert state.held.all()
    assert state.memory_filled[0, 0].all()

    def recognize(measures: Tensor) -> Tensor:
        claims = torch.full(measures.shape[:3], 4.0)
        claims[0, 3, 3] = -4.0
        return claims

    network.identity.recognition.forward = recognize  # type: ignore[method-assign]
    prediction = network.decode(features[1], state)
    lost = prediction.sighting.queries[0, 3]  # rows are candidates
    presence = prediction.sighting.presence
    assert presence[0, lost] < 0.02
    assert (presence[0] > 0.98).sum() == N - 1
    torch.testing.assert_close(prediction.scores, prediction.logits[-1].sigmoid() * presence[..., None])
    after = network.advance(state, prediction)
    assert after.hidden.sum() == 1
    assert after.hidden[0, lost]
    assert after.held[0, lost]
    assert not after.carried[0, lost]
    assert after.carried.sum() == N - 1
    assert torch.equal(after.class_logits[0, :, lost], state.class_logits[0, :, lost])
    assert lost not in after.memory_indices[0, 0][after.memory_filled[0, 0]]
    for name in ("looks", "class_logits", "boxes", "scenes", "motion", "sightings"):
        assert torch.equal(getattr(after.identities, name)[0, lost], getattr(state.identities, name)[0, lost])
    assert after.identities.away[0, lost] == 1


@torch.no_grad()
def test_what_the_free_query_found_is_told_of_the_instance(tiny: Callable[..., InstanceFormer]) -> None:
    """All of it, in every layer: class, box, mask, content; the id stays."""
    network = tiny(**KNOWN)
    frames = torch.randn(1, 2, 3, 64, 96)
    features = network.encode(frames)
    first = network.decode(features[0], network.initial_state(1))
    held = torch.arange(N)[None] < 4
    state = network.advance(network.initial_state(1), first, held)
    plain = tiny(**{**KNOWN, "identity": "hide"})
    plain.load_state_dict(network.state_dict())

    def recognize(measures: Tensor) -> Tensor:
        claims = torch.full(measures.shape[:3], -4.0)
        place = {int(q): row for row, q in enumerate(plain_prediction.sighting.queries[0])}
        for query in range(4):
            claims[0, place[query], place[query]] = 4.0
        claims[0, place[2], place[2]] = -4.0
        claims[0, place[2], place[9]] = 4.0
        return claims

    plain_prediction = plain.decode(features[1], state)
    plain.identity.recognition.forward = network.identity.recognition.forward = recognize  # type: ignore[method-assign]
    plain_prediction, prediction = plain.decode(features[1], state), network.decode(features[1], state)
    order = torch.arange(N)
    order[2], order[9] = 9, 2
    for name in ("logits", "boxes", "queries", "centers"):
        ours, theirs = getattr(prediction, name), getattr(plain_prediction, name)
        layers = slice(None, -1) if name == "logits" else slice(None)  # the last one's logits know the past
        torch.testing.assert_close(ours[layers], theirs[layers][:, :, order])
    torch.testing.assert_close(prediction.class_logits, plain_prediction.class_logits[:, order])
    masks = [network.segment(features[1], p, torch.tensor([[q]])) for p, q in ((prediction, 2), (plain_prediction, 9))]
    torch.testing.assert_close(*masks)
    after = network.advance(state, prediction, held)
    assert not after.hidden[0, :4].any()
    torch.testing.assert_close(after.queries[0, 2], plain_prediction.queries[-1, 0, 9])


@torch.no_grad()
def test_few_candidates_of_many_queries(tiny: Callable[..., InstanceFormer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hold an instance come first, however little they are sure of it; of others nothing is known."""
    monkeypatch.setattr("instanceformer.model.network.CANDIDATES", 5)
    network = tiny(**KNOWN)
    features = network.encode(torch.randn(1, 3, 3, 64, 96))
    held = torch.zeros(1, N, dtype=torch.bool)
    held[0, [1, 7, 8]] = True
    state, seen = network.initial_state(1), []
    for t in range(3):
        prediction = network.decode(features[t], state)
        assert prediction.sighting.known[0].nonzero().flatten().tolist() == seen
        if t:
            assert {1, 7, 8} <= set(prediction.sighting.queries[0].tolist())
        assert prediction.sighting.queries.shape == (1, 5)
        assert (prediction.sighting.looks[0] != 0).any(-1).sum() == 5
        state = network.advance(state, prediction, held)
        seen = [q for q in (1, 7, 8) if t or q in prediction.sighting.queries[0]]
        assert (state.identities.sightings[0] > 0).nonzero().flatten().tolist() == seen


def test_a_state_is_its_tensors(tiny: Callable[..., InstanceFormer]) -> None:
    for options in ({}, KNOWN):
        state = tiny(**options).initial_state(2)
        again = TrackState.from_tensors(state.tensors())
        assert again.tensors().keys() == state.tensors().keys()
        assert (again.identities is None) == (state.identities is None) == (not options)
    assert "identities_looks" in state.tensors()


def test_released_queries_know_nothing(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny(**KNOWN)
    state = network.initial_state(1)
    ones = torch.ones(1, N)
    state = replace(
        state,
        held=ones.bool(),
        identities=replace(state.identities, sightings=ones, hidden=ones.bool()),
    )
    released = state.free(torch.arange(N)[None] < 2)
    for found in (released.held, released.hidden, released.identities.sightings > 0):
        assert found[0].tolist() == [False] * 2 + [True] * (N - 2)


def test_a_checkpoint_of_before_recognizes_nobody(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny()
    options = {name: value for name, value in vars(network.options).items() if name != "identity"}
    loaded = InstanceFormer.from_checkpoint(checkpoints.Checkpoint(options, network.state_dict()))
    assert loaded.identity is None
    assert loaded.initial_state(1).identities is None


@pytest.mark.parametrize("rule", ["hide", "recover"])
def test_identity_where_every_query_holds_an_instance_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=f"identity: found {rule} with min_confidence=0, .* expected a min_confidence"):
        InstanceFormer(5, backbone="small", identity=rule)  # type: ignore[arg-type]


def test_rows() -> None:
    x, rows = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather_queries(x, rows), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))
