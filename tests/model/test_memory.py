from __future__ import annotations

import torch

from instanceformer.model.attention import sine_position
from instanceformer.model.memory import Memory, MemoryAttention, MemoryTokens, remember
from instanceformer.model.state import TrackState

N, C, K, D, TOKENS = 7, 8, 3, 3, 2


def empty(batch: int = 2) -> TrackState:
    return TrackState.empty(batch, num_queries=N, dim=C, num_classes=K, memory_frames=D, memory_tokens=TOKENS)


def frame(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, N, C), torch.rand(batch, N, K), torch.rand(batch, N, 4)


def test_the_k_most_confident_of_the_admitted_enter() -> None:
    queries, scores, boxes = frame()
    admitted = torch.tensor([[True] * N, [False, True, True, False, True, False, False]])
    state = remember(empty(), queries, scores, boxes, admitted)
    for clip in range(2):
        order = scores[clip].amax(-1).argsort(descending=True).tolist()
        expected = [i for i in order if admitted[clip, i]][:TOKENS]
        assert state.memory_indices[clip, 0].tolist() == expected
        torch.testing.assert_close(state.memory_queries[clip, 0], queries[clip, expected])
        torch.testing.assert_close(state.memory_scores[clip, 0], scores[clip, expected])
        torch.testing.assert_close(state.memory_boxes[clip, 0], boxes[clip, expected])
    assert state.memory_filled[:, 0].all()
    assert not state.memory_filled[:, 1:].any()


def test_what_is_not_admitted_leaves_its_place_empty() -> None:
    admitted = torch.zeros(2, N, dtype=torch.bool)
    admitted[1, 4] = True
    state = remember(empty(), *frame(), admitted)
    assert state.memory_filled[0, 0].tolist() == [False, False]
    assert state.memory_filled[1, 0].tolist() == [True, False]


def test_the_queue_holds_d_frames_newest_first() -> None:
    state, seen = empty(1), []
    for _ in range(5):
        queries, scores, boxes = frame(1)
        state = remember(state, queries, scores, boxes, torch.ones(1, N, dtype=torch.bool))
        seen.append(queries[0, state.memory_indices[0, 0]])
    torch.testing.assert_close(state.memory_queries[0], torch.stack(seen[:-4:-1]))


def test_equation_3_and_the_temporal_index() -> None:
    memory, position = Memory(C, K), torch.randn(N, C)
    state = remember(empty(1), *frame(1), torch.ones(1, N, dtype=torch.bool))
    state = remember(state, *frame(1), torch.ones(1, N, dtype=torch.bool))
    tokens = memory(state, position)
    for f in range(D):
        for j in range(TOKENS):
            inputs = torch.cat(
                (state.memory_queries[0, f, j], state.memory_scores[0, f, j], state.memory_boxes[0, f, j])
            )
            value = memory.projection(inputs)
            torch.testing.assert_close(tokens.values[0, f * TOKENS + j], value)
            index = position[state.memory_indices[0, f, j]] + sine_position(torch.tensor(f + 1), C)
            torch.testing.assert_close(tokens.index[0, f * TOKENS + j], index)


def test_memory_carries_no_gradient_but_its_projection_learns() -> None:
    memory = Memory(C, K)
    queries, scores, boxes = (x.requires_grad_() for x in frame(1))
    state = remember(empty(1), queries, scores, boxes, torch.ones(1, N, dtype=torch.bool))
    memory(state, torch.randn(N, C)).values.sum().backward()
    assert queries.grad is None
    assert memory.projection.weight.grad.abs().sum() > 0


def test_an_empty_memory_changes_nothing_clip_by_clip() -> None:
    attention = MemoryAttention(C, 2, 0.0).eval()
    queries = torch.randn(2, N, C, requires_grad=True)
    filled = torch.zeros(2, 4, dtype=torch.bool)
    filled[1, :2] = True
    tokens = MemoryTokens(torch.randn(2, 4, C), torch.randn(2, 4, C), filled)
    out = attention(queries, torch.randn(N, C), tokens)
    assert torch.equal(out[0], queries[0])
    assert (out[1] - queries[1]).abs().max() > 0.01
    out.sum().backward()
    assert queries.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_empty_places_are_not_attended_to() -> None:
    attention = MemoryAttention(C, 2, 0.0).eval()
    queries, position = torch.randn(1, N, C), torch.randn(N, C)
    keys, values = torch.randn(1, 4, C), torch.randn(1, 4, C)
    filled = torch.tensor([[True, False, True, False]])
    masked = attention(queries, position, MemoryTokens(keys, values, filled))
    kept = [0, 2]
    alone = attention(queries, position, MemoryTokens(keys[:, kept], values[:, kept], filled[:, kept]))
    torch.testing.assert_close(masked, alone)
