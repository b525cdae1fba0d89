from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from instanceformer.data.batch import VideoChunk
from instanceformer.evaluation.protocol import InferenceOptions, VideoInference, resize_masks
from instanceformer.evaluation.results import Track, decode_mask

SIZE, IDS = (50, 70), [3, 5, 8, 13, 21]


def run(network, frames: torch.Tensor, chunk: int, **options) -> list[Track]:
    video = VideoInference(network, InferenceOptions(**options), SIZE)
    for start in range(0, frames.shape[1], chunk):
        video.add(VideoChunk(frames[:, start : start + chunk], 7, start, frames.shape[1], SIZE))
    return video.tracks(7, IDS)


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randn(1, 8, 3, 64, 96)


@pytest.mark.parametrize("candidates", ["first_frames", "any_frame"])
def test_chunks_do_not_matter(tiny, frames, candidates) -> None:
    network = tiny(min_confidence=0.02)
    whole = run(network, frames, 8, candidates=candidates, max_tracks=9)
    assert len(whole) == 9
    for chunk in (1, 3):
        parts = run(network, frames, chunk, candidates=candidates, max_tracks=9)
        assert [t.category_id for t in parts] == [t.category_id for t in whole]
        assert [t.score for t in parts] == pytest.approx([t.score for t in whole], abs=1e-5)
        for one, other in zip(parts, whole, strict=True):  # other sums round otherwise, at a logit of zero
            for mask, same in zip(one.segmentations, other.segmentations, strict=True):
                assert (mask is None) == (same is None)
                assert mask is None or (decode_mask(mask) != decode_mask(same)).sum() <= 2


def test_first_frames_is_the_papers_protocol(tiny, frames) -> None:
    network = tiny()
    with torch.no_grad():
        prediction, _ = network(frames, segment="all")
    probability = prediction.logits[0].sigmoid()
    best = probability[:3].mean(0).flatten().topk(4).indices
    expected = {(int(i) // 5, int(i) % 5): float(probability.mean(0).flatten()[i]) for i in best}
    tracks = run(network, frames, 4, candidates="first_frames", max_tracks=4)
    assert sorted((t.category_id, round(t.score, 5)) for t in tracks) == sorted(
        (IDS[label], round(score, 5)) for (_, label), score in expected.items()
    )
    assert [t.score for t in tracks] == sorted((t.score for t in tracks), reverse=True)
    query = next(
        q
        for (q, label), s in expected.items()
        if IDS[label] == tracks[0].category_id and abs(s - tracks[0].score) < 1e-5
    )
    masks = resize_masks(prediction.masks[0, :, query], (64, 96), SIZE) > 0
    for mask, rle in zip(masks, tracks[0].segmentations, strict=True):
        assert (rle is None) == (not mask.any())
        if rle is not None:
            assert torch.equal(torch.from_numpy(decode_mask(rle)), mask)


def best_quarter(probability: torch.Tensor) -> tuple[int, float]:
    """The class of one query's (T, K) probabilities, and its score, as the authors' release has them."""
    pairs = sorted(((float(p), label) for frame in probability for label, p in enumerate(frame)), reverse=True)
    best = pairs[: max(1, len(probability) // 4)]
    labels = [label for _, label in best]
    label = min(set(labels), key=lambda c: (-labels.count(c), c))
    own = [p for p, c in best if c == label]
    return label, sum(own) / len(own)


@pytest.mark.parametrize("length", [1, 3, 8, 13, 26])
@pytest.mark.parametrize("candidates", ["first_frames", "any_frame"])
def test_the_best_quarter_scores_a_query_with_one_class(tiny, candidates, length) -> None:
    network = tiny()
    frames = torch.randn(1, length, 3, 64, 96)
    with torch.no_grad():
        probability = network(frames)[0].logits[0].sigmoid()
    options = {"candidates": candidates, "max_tracks": 12, "score": "best_quarter"}
    if candidates == "first_frames":
        pairs = probability[:3].mean(0).flatten().topk(12).indices
        queries = sorted({int(pair) // 5 for pair in pairs})
    else:
        queries = list(range(12))
    expected = sorted((best_quarter(probability[:, query]) for query in queries), key=lambda x: -x[1])
    for chunk in (length, 2):
        tracks = run(network, frames, chunk, **options)
        assert len(tracks) == len(queries)
        assert [IDS.index(t.category_id) for t in tracks] == [label for label, _ in expected]
        assert [t.score for t in tracks] == pytest.approx([score for _, score in expected], abs=1e-6)


@pytest.mark.parametrize("history", [{"free_queries": "renew"}, {"class_history": "held"}])
def test_the_best_quarter_is_of_the_frames_since_the_query_is_held(tiny, monkeypatch, history) -> None:
    """A query that holds an instance from frame 4 of 12 on has 8: the two best of them count, whatever came before."""
    video = VideoInference(
        tiny(min_confidence=0.5, **history), InferenceOptions("any_frame", score="best_quarter"), SIZE
    )
    before, since = [[0.4, 0.45, 0, 0, 0]] * 4, [[0.6, 0, 0, 0, 0], [0, 0, 0.9, 0, 0], [0, 0, 0.7, 0, 0]]
    for t, row in enumerate([*before, *since, *[[0.1] * 5] * 5]):
        probabilities = torch.zeros(12, 5)
        probabilities[7] = torch.tensor(row)
        video.frames = t + 1
        held = video.state.held | (probabilities.amax(-1) >= 0.5)
        video._count(probabilities, (held & ~video.state.held)[0], 3)
        video.state = replace(video.state, held=held)
        video._hidden.append(video.state.hidden[0])
    video.masks = [{}] * 12
    best = video.tracks(7, IDS)[0]
    assert (best.category_id, best.score) == (IDS[2], pytest.approx(0.8))
    best = video.tracks(7, IDS, "mean")[0]
    assert (best.category_id, best.score) == (IDS[2], pytest.approx((0.9 + 0.7 + 0.5) / 8))


@torch.no_grad()
def test_tracks_begin_where_queries_are_held_though_all_propagate(tiny, frames) -> None:
    network = tiny(class_history="held", min_confidence=0.05)
    scores = network(frames)[0].logits[0].sigmoid().amax(-1)
    network.options = replace(network.options, min_confidence=float(scores.max(0).values.median()))
    state, begins = network.initial_state(1), {}
    for t in range(8):
        features = network.encode(frames[:, t : t + 1])[0]
        state = network.advance(state, network.decode(features, state))
        begins.update({int(q): t for q in state.held[0].nonzero() if int(q) not in begins})
    video = VideoInference(network, InferenceOptions("any_frame", max_tracks=60), SIZE)
    video.add(VideoChunk(frames, 7, 0, 8, SIZE))
    assert len(set(begins.values())) > 1
    assert {q: 8 - int(video._counted[q]) for q in begins} == begins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "best"}, r"inference\.score: found 'best', expected mean or best_quarter"),
        ({"candidates": "all"}, r"inference\.candidates: found 'all', expected first_frames or any_frame"),
        ({"max_tracks": 0}, r"inference\.max_tracks: found 0, expected at least 1"),
    ],
)
def test_impossible_protocols_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceOptions(**options)


def test_a_track_begins_where_its_query_is_first_confident(tiny, frames) -> None:
    network = tiny(free_queries="renew", min_confidence=0.05)
    with torch.no_grad():
        # queries become confident one after the other as this threshold lies within the range of their scores
        scores = network(frames)[0].logits[0].sigmoid().amax(-1)
        network.options = replace(network.options, min_confidence=float(scores.max(0).values.median()))
        scores = network(frames)[0].logits[0].sigmoid().amax(-1)
    confident = scores >= network.options.min_confidence
    late = [int(q) for q in range(12) if confident[:, q].any() and not confident[0, q]]
    assert late, "the example should have a query that becomes confident late"
    tracks = run(network, frames, 8, candidates="any_frame", max_tracks=60)
    begins = {next((t for t, s in enumerate(track.segmentations) if s is not None), None) for track in tracks}
    held_from = {int(confident[:, q].int().argmax()) for q in range(12)}
    assert begins - {None} <= {t for first in held_from for t in range(first, 8)}
    assert min(b for b in begins if b is not None) == min(held_from)
    assert len(begins - {None}) > 1


@pytest.mark.parametrize("candidates", ["first_frames", "any_frame"])
def test_fewer_tracks_than_queries_are_the_best_of_them(tiny, frames, candidates) -> None:
    network = tiny()
    many = run(network, frames, 3, candidates=candidates, max_tracks=60)
    few = run(network, frames, 3, candidates=candidates, max_tracks=2)
    assert len(many) == 60
    assert len(few) == 2
    assert few[0].score <= many[0].score + 1e-6
    assert [t.score for t in few] == sorted((t.score for t in few), reverse=True)


def test_a_steady_query_that_was_never_among_the_best_makes_no_track(tiny, frames, monkeypatch) -> None:
    """Query 0 has the best mean, but the only place belongs to query 1, which spiked once."""
    network = tiny()
    video = VideoInference(network, InferenceOptions(candidates="any_frame", max_tracks=1), SIZE)
    spike = iter([True] + [False] * 7)
    count = video._count

    def scripted(probabilities: torch.Tensor, held: torch.Tensor, quarter: int) -> None:
        scores = torch.zeros_like(probabilities)
        scores[0, 0], scores[1, 1] = 0.4, 0.9 if next(spike) else 0.01
        count(scores, held, quarter)

    monkeypatch.setattr(video, "_count", scripted)
    video.add(VideoChunk(frames, 7, 0, 8, SIZE))
    (track,) = video.tracks(7, IDS)
    assert track.category_id == IDS[1]
    assert track.score == pytest.approx((0.9 + 7 * 0.01) / 8)


def test_a_video_shorter_than_the_first_frames(tiny) -> None:
    tracks = run(tiny(), torch.randn(1, 2, 3, 64, 96), 2, candidates="first_frames")
    assert all(len(track.segmentations) == 2 for track in tracks)


def test_a_gap_between_chunks_is_refused(tiny, frames) -> None:
    video = VideoInference(tiny(), InferenceOptions(), SIZE)
    with pytest.raises(ValueError, match="expected frame 0"):
        video.add(VideoChunk(frames[:, 2:4], 7, 2, 8, SIZE))


def test_masks_keep_their_place_when_resized() -> None:
    logits = torch.full((1, 16, 24), -1.0)
    logits[0, 4:8, 6:12] = 1.0
    found = resize_masks(logits, (64, 96), (128, 192)) > 0
    rows, columns = found[0].any(1).nonzero().flatten(), found[0].any(0).nonzero().flatten()
    assert (rows.min(), rows.max() + 1) == (32, 64)
    assert (columns.min(), columns.max() + 1) == (48, 96)
