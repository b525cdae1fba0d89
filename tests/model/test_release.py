from __future__ import annotations

import pytest
import torch
from tests.model.test_memory import TOKENS, C, D, K, N, empty, frame

from instanceformer.model.attention import pixel_position
from instanceformer.model.memory import remember
from instanceformer.model.release import ReleaseLocation, ReleaseMaskHead, ReleaseMemory


@pytest.mark.parametrize(
    ("rule", "move"),
    [("paper", lambda start, last: start * last), ("additive", lambda start, last: start + last)],
)
def test_the_authors_release_places_queries_by_their_position_embedding(rule, move) -> None:
    location = ReleaseLocation(6, rule, "position")
    position, previous = torch.randn(3, 6), torch.rand(2, 3, 2)
    carried = torch.tensor([[True, True, False], [False, True, True]])
    found = location(torch.full((2, 3, 6), torch.nan), position, previous, carried)
    start = torch.sigmoid(position @ location.reference.weight.T + location.reference.bias)
    for b in range(2):
        for i in range(3):
            expected = torch.sigmoid(move(start[i], previous[b, i])) if carried[b, i] else start[i]
            torch.testing.assert_close(found[b, i], expected)


def test_the_additive_rule_learns_even_at_the_first_frame() -> None:
    location = ReleaseLocation(6, "additive", "content")
    location(
        torch.randn(1, 4, 6), torch.randn(1, 6), torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool)
    ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in location.parameters())


def test_places_in_the_queue_count_from_the_oldest_frame_that_left_a_token() -> None:
    """The same frame keeps its code until the queue is full and its place moves."""
    memory, position = ReleaseMemory(C, K), torch.randn(N, C)
    column = pixel_position(torch.ones(1, D, 1, dtype=torch.bool), C)[0, :, 0]
    state = empty(2)
    for seen in range(1, D + 2):
        admitted = torch.ones(2, N, dtype=torch.bool)
        admitted[1] = seen > 1  # the second video's first frame leaves nothing
        state = remember(state, *frame(), admitted)
        tokens = memory(state, position)
        codes = tokens.index.unflatten(1, (D, TOKENS)) - position[state.memory_indices]
        for clip, count in ((0, min(seen, D)), (1, min(seen - 1, D))):
            for place in range(count):
                torch.testing.assert_close(codes[clip, count - 1 - place], column[place].expand(TOKENS, C))


def test_aligned_masks_lie_two_pixels_further_right_and_down() -> None:
    """A plane over the pixels' centers, 8 apart: cell j of the result has its value at pixel 4j + 2, less 2."""
    y, x = (8 * torch.arange(n) + 4.0 for n in (5, 7))
    plane = (3 * y[:, None] + x)[None, None]
    found = ReleaseMaskHead(8, 8, 1).upsample(plane)
    y, x = (4 * torch.arange(2 * n) + 2.0 for n in (5, 7))
    expected = 3 * (y[:, None] - 2) + (x - 2)
    torch.testing.assert_close(found[0, 0, 1:, 1:], expected[1:, 1:])
    torch.testing.assert_close(found[0, 0, 0], found[0, 0, 1])
