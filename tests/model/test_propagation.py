from __future__ import annotations

import pytest
import torch

from instanceformer.model.propagation import ClassPrior, LocationPropagation, logit

NO_POSITION = torch.full((1, 6), torch.nan)  # what must not be seen


def test_equation_1_to_the_letter() -> None:
    location = LocationPropagation(6, "paper")
    queries, previous = torch.randn(2, 3, 6), torch.rand(2, 3, 2)
    carried = torch.tensor([[True, True, False], [False, True, True]])
    found = location(queries, NO_POSITION, previous, carried)
    for b in range(2):
        for i in range(3):
            start = torch.sigmoid(location.reference.weight @ queries[b, i] + location.reference.bias)
            expected = torch.sigmoid(start * previous[b, i]) if carried[b, i] else start
            torch.testing.assert_close(found[b, i], expected)


def test_equation_1_squeezes_what_is_carried() -> None:
    found = LocationPropagation(6, "paper")(
        10 * torch.randn(1, 500, 6), NO_POSITION, torch.rand(1, 500, 2), torch.ones(1, 500, dtype=torch.bool)
    )
    assert found.min() >= 0.5
    assert found.max() <= 0.7311


def test_refined_starts_as_the_identity_and_learns_a_step() -> None:
    location = LocationPropagation(6, "refined")
    queries, previous = torch.randn(1, 4, 6), torch.rand(1, 4, 2)
    carried = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(location(queries, NO_POSITION, previous, carried), previous.clamp(1e-5, 1 - 1e-5))
    torch.nn.init.normal_(location.step.weight)
    expected = torch.sigmoid(queries @ location.step.weight.T + logit(previous))
    torch.testing.assert_close(location(queries, NO_POSITION, previous, carried), expected)


def test_none_ignores_the_previous_location() -> None:
    location = LocationPropagation(6, "none")
    queries, carried = torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)
    a = location(queries, NO_POSITION, torch.zeros(1, 4, 2), carried)
    assert torch.equal(a, location(queries, NO_POSITION, torch.ones(1, 4, 2), carried))


def test_equation_2_is_a_weighted_sum_over_the_frames_that_are_filled() -> None:
    prior = ClassPrior(3)
    logits, history = torch.randn(1, 2, 3), torch.randn(1, 4, 2, 3)
    filled = torch.tensor([[[True, True], [True, False], [False, False], [False, False]]])
    found = prior(logits, history, filled)
    for query, count in ((0, 2), (1, 1)):
        frames = torch.cat((logits[:, query], history[0, :count, query]))
        weights = torch.softmax(torch.sigmoid(prior.temporal(frames)), dim=0)
        torch.testing.assert_close(found[0, query], (weights * frames).sum(dim=0))


def test_equation_2_without_history_changes_nothing() -> None:
    prior = ClassPrior(3)
    logits = torch.randn(2, 5, 3)
    history = torch.full((2, 4, 5, 3), 1e4)
    torch.testing.assert_close(prior(logits, history, torch.zeros(2, 4, 5, dtype=torch.bool)), logits)


@pytest.mark.parametrize("rule", ["none", "paper", "refined"])
def test_every_parameter_gets_a_gradient_even_at_the_first_frame(rule) -> None:
    location = LocationPropagation(6, rule)
    location(
        torch.randn(1, 4, 6), NO_POSITION, torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.bool)
    ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in location.parameters())
