from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_targets

from instanceformer.data.batch import DenseTargets, coverage
from instanceformer.training.contrastive import temporal_contrastive_loss
from instanceformer.training.losses import ClipOutputs, LossTerms, LossWeights, class_targets, clip_losses, mask_losses

T, D, B, N, K = 4, 2, 2, 6, 5


def make_outputs(targets: DenseTargets) -> ClipOutputs:
    n = targets.labels.shape[1]
    held = targets.entering.cumsum(0).bool()
    return ClipOutputs(
        logits=torch.randn(T, D, B, N, K),
        boxes=torch.rand(T, D, B, n, 4) * 0.4 + 0.3,
        masks=torch.randn(T, D, B, n, 16, 24),
        queries=torch.randn(T, B, n, 8),
        assigned=torch.tensor([[3, 1, 4], [0, 5, -1]]).expand(D, -1, -1),
        has_query=held[:, None].expand(-1, D, -1, -1),
    )


@pytest.fixture
def targets() -> DenseTargets:
    return DenseTargets.from_clips([make_targets(T, 3, 64, 96), make_targets(T, 2, 64, 96)], (64, 96))


def test_targets_say_when_instances_enter(targets) -> None:
    assert targets.visible.shape == (T, B, 3)
    assert targets.entering.nonzero().tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 0], [1, 0, 1], [1, 1, 1]]
    assert not targets.visible[:, 1, 2].any()


def test_coverage_is_the_fraction_of_each_cell() -> None:
    mask = torch.zeros(1, 1, 6, 8, dtype=torch.bool)
    mask[0, 0, 1:6, 2:8] = True
    assert coverage(mask, (2, 2))[0, 0].tolist() == [[6, 12], [4, 8]]


def test_classes_are_asked_for_from_the_first_appearance_on_also_while_hidden(targets) -> None:
    outputs = make_outputs(targets)
    found = class_targets(outputs, targets.labels)
    assert found.shape == (T, D, B, N, K)
    expected = {(t, 0, 3, 0) for t in range(4)} | {(t, 0, 1, 1) for t in range(1, 4)} | {(t, 0, 4, 2) for t in range(4)}
    expected |= {(t, 1, 0, 0) for t in range(4)} | {(t, 1, 5, 1) for t in range(1, 4)}
    for layer in range(D):
        assert {tuple(i) for i in found[:, layer].nonzero().tolist()} == expected


def test_each_layer_has_classes_of_its_own_where_it_was_matched_by_itself(targets) -> None:
    outputs = make_outputs(targets)
    assigned = torch.tensor([[[3, 1, 4], [0, 5, -1]], [[2, 1, 0], [5, 0, -1]]])
    outputs = ClipOutputs(**{**vars(outputs), "assigned": assigned, "has_query": (assigned >= 0).expand(T, -1, -1, -1)})
    found = class_targets(outputs, targets.labels)[0]  # (D, B, N, K)
    assert found[:, 0].nonzero().tolist() == [
        [0, 1, 1],
        [0, 3, 0],
        [0, 4, 2],
        [1, 0, 2],
        [1, 1, 1],
        [1, 2, 0],
    ]  # layer, query, class


def test_boxes_count_where_visible_and_masks_where_held(targets) -> None:
    outputs = make_outputs(targets)
    outputs.boxes.requires_grad_()
    outputs.masks.requires_grad_()
    clip_losses(outputs, targets, torch.tensor(7.0), window=3).total(LossWeights()).backward()
    counted = outputs.boxes.grad.abs().sum(-1).gt(0)
    assert torch.equal(counted, targets.visible[:, None] & outputs.has_query)
    counted = outputs.masks.grad.abs().sum((-2, -1)).gt(0)
    assert torch.equal(counted, outputs.has_query)


def test_perfect_boxes_and_masks_cost_almost_nothing(targets) -> None:
    outputs = make_outputs(targets)
    perfect = ClipOutputs(
        logits=class_targets(outputs, targets.labels) * 40 - 20,
        boxes=targets.boxes[:, None].expand(-1, D, -1, -1, -1),
        masks=outputs.masks,
        queries=outputs.queries,
        assigned=outputs.assigned,
        has_query=outputs.has_query,
    )
    sharp = DenseTargets(**{**vars(targets), "masks": targets.masks.gt(8).byte() * 16})
    perfect = ClipOutputs(**{**vars(perfect), "masks": (sharp.masks * 2.5 - 20)[:, None].expand(-1, D, -1, -1, -1, -1)})
    terms = clip_losses(perfect, sharp, torch.tensor(1.0), window=3)
    for name in ("classification", "box_l1", "box_giou", "mask_focal"):
        assert getattr(terms, name) < 1e-4, name
    assert terms.mask_dice < 1e-2


def test_total_is_equation_6() -> None:
    values = torch.arange(1.0, 9.0)
    paper, identity = 2 * 1 + 5 * 2 + 2 * 3 + 2 * 4 + 5 * 5 + 2 * 6, 1 * 7 + 2 * 8
    assert LossTerms(*values).total(LossWeights()) == pytest.approx(paper + identity)


def test_mask_losses_against_their_definition() -> None:
    logits, target = torch.randn(1, 1, 4, 5), torch.rand(1, 1, 4, 5).round()
    pixels = torch.ones(1, 4, 5)
    pixels[:, 3:] = 0
    focal, dice = mask_losses(logits, target * pixels, pixels)
    p, y = logits[0, 0, :3].sigmoid(), target[0, 0, :3]
    pt = torch.where(y == 1, p, 1 - p)
    alpha = torch.where(y == 1, 0.25, 0.75)
    torch.testing.assert_close(focal[0, 0], (-alpha * (1 - pt) ** 2 * pt.log()).mean())
    torch.testing.assert_close(dice[0, 0], 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))


def test_equation_5_against_a_plain_loop() -> None:
    frames, batch, n, window, temperature = 5, 2, 3, 2, 0.07
    queries = torch.randn(frames, batch, n, 6)
    held = torch.rand(frames, batch, n) > 0.3
    unit = F.normalize(queries, dim=-1)
    expected = 0.0
    for b in range(batch):
        for t in range(frames):
            for i in range(n):
                past = [(f, j) for f in range(t) for j in range(n) if held[t, b, i] and held[f, b, j]]
                positive = [(f, j) for f, j in past if j == i and t - f <= window]
                negative = [(f, j) for f, j in past if j != i]
                if not positive or not negative:
                    continue
                score = {(f, j): float(unit[t, b, i] @ unit[f, b, j]) / temperature for f, j in positive + negative}
                total = sum(math.exp(s) for s in score.values())
                expected += -sum(math.log(math.exp(score[p]) / total) for p in positive) / len(positive)
    assert expected > 0
    assert temporal_contrastive_loss(queries, held, window, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "held",
    [torch.ones(1, 2, 3), torch.ones(4, 2, 1), torch.zeros(4, 2, 3), torch.eye(3)[:, None]],
    ids=["one frame", "one instance", "nothing", "never twice"],
)
def test_equation_5_is_zero_where_there_is_nothing_to_compare(held) -> None:
    queries = torch.randn(*held.shape, 6, requires_grad=True)
    loss = temporal_contrastive_loss(queries, held.bool(), window=4)
    loss.backward()
    assert loss.item() == 0
    assert queries.grad.abs().max() == 0
