from __future__ import annotations

from dataclasses import replace

import torch
from tests.conftest import make_targets
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from instanceformer.data.batch import DenseTargets
from instanceformer.model.decoder import FramePrediction
from instanceformer.training.matching import MatchCosts, match_cost, match_entering

N, K = 6, 5


def predict(targets: DenseTargets, t: int, placed: dict[tuple[int, int], int]) -> FramePrediction:
    """Queries that are sure of nothing, but those in ``placed`` (clip, instance) -> query, which are exactly right."""
    batch = targets.labels.shape[0]
    logits, boxes = torch.full((1, batch, N, K), -5.0), torch.full((1, batch, N, 4), 0.9)
    for (clip, instance), query in placed.items():
        logits[0, clip, query, targets.labels[clip, instance]] = 5
        boxes[0, clip, query] = targets.boxes[t, clip, instance]
    empty = torch.zeros(0)
    return FramePrediction(logits, boxes, empty, empty, empty, empty)


def dense(*instances: int) -> DenseTargets:
    return DenseTargets.from_clips([make_targets(4, n, 64, 96) for n in instances], (64, 96))


def match(prediction: FramePrediction, targets: DenseTargets, t: int, assigned: Tensor) -> Tensor:
    return match_entering(prediction.logits, prediction.boxes, targets, t, assigned, MatchCosts())


def test_instances_are_matched_where_they_enter_and_keep_their_query() -> None:
    targets = dense(3, 2)
    assigned = torch.full((1, 2, 3), -1)
    assigned = match(predict(targets, 0, {(0, 0): 4, (0, 2): 1, (1, 0): 2}), targets, 0, assigned)
    assert assigned[0].tolist() == [[4, -1, 1], [2, -1, -1]]
    # in frame 1 instance 1 enters; what another query would now fit better does not matter to the others
    assigned = match(predict(targets, 1, {(0, 1): 0, (0, 0): 5, (1, 1): 3}), targets, 1, assigned)
    assert assigned[0].tolist() == [[4, 0, 1], [2, 3, -1]]
    assert match(predict(targets, 2, {}), targets, 2, assigned) is assigned


def test_a_held_query_is_not_given_away() -> None:
    targets = dense(2)
    assigned = match(predict(targets, 1, {(0, 1): 4}), targets, 1, torch.tensor([[[4, -1]]]))
    assert assigned[0, 0, 0] == 4
    assert assigned[0, 0, 1] not in (-1, 4)


def test_more_instances_than_free_queries_leaves_some_unmatched() -> None:
    targets = dense(8)
    assigned = match(predict(targets, 0, {}), targets, 0, torch.full((1, 1, 8), -1))
    found = assigned[assigned >= 0].tolist()
    assert sorted(found) == list(range(N))


def test_a_prediction_that_is_not_a_number_does_not_stop_the_run() -> None:
    targets = dense(3)
    broken = predict(targets, 0, {})
    broken = replace(
        broken, logits=torch.full_like(broken.logits, torch.nan), boxes=torch.full_like(broken.boxes, torch.nan)
    )
    assigned = match(broken, targets, 0, torch.full((1, 1, 3), -1))
    assert (assigned >= 0).tolist() == [[[True, False, True]]]


def test_cost_prefers_the_right_class_and_the_nearer_box() -> None:
    labels, box = torch.tensor([[1]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    logits = torch.tensor([[-3.0, 3.0], [3.0, -3.0], [-3.0, 3.0]])[None, None]
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.7, 0.5, 0.2, 0.2]])[None, None]
    cost = match_cost(logits, boxes, labels, box, MatchCosts()).flatten()
    assert cost.argmin() == 0
    shifted = match_cost(logits, boxes, labels, box, MatchCosts(classification=0.0)).flatten()
    assert shifted[0] == shifted[1] < shifted[2]
    torch.testing.assert_close(shifted[2] - shifted[0], torch.tensor(5 * 0.2 + 2 * 1.0))  # touching boxes: giou 0


def test_cost_is_torchvisions_pair_by_pair() -> None:
    logits, labels = torch.randn(2, 3, N, K), torch.randint(K, (3, 4))
    boxes, targets = torch.rand(2, 3, N, 4) * 0.4 + 0.1, torch.rand(3, 4, 4) * 0.4 + 0.1
    overlap = MatchCosts(classification=0.0, box_l1=0.0, box_giou=1.0)
    distance = MatchCosts(classification=0.0, box_l1=1.0, box_giou=0.0)
    for d, b in ((0, 1), (1, 2)):
        corners = [box_convert(x, "cxcywh", "xyxy") for x in (boxes[d, b], targets[b])]
        found = match_cost(logits, boxes, labels, targets, overlap)[d, b]
        torch.testing.assert_close(found, -generalized_box_iou(*corners), atol=1e-5, rtol=1e-5)
        found = match_cost(logits, boxes, labels, targets, distance)[d, b]
        torch.testing.assert_close(found, torch.cdist(boxes[d, b], targets[b], p=1))


def test_layers_are_matched_by_themselves() -> None:
    targets = DenseTargets.from_clips([make_targets(1, 3, 64, 96)], (64, 96))
    first, last = (predict(targets, 0, placed) for placed in ({(0, 0): 4, (0, 2): 1}, {(0, 0): 2, (0, 2): 4}))
    both = replace(last, logits=torch.cat((first.logits, last.logits)), boxes=torch.cat((first.boxes, last.boxes)))
    # instance 1 is not visible in frame 0
    assert match(both, targets, 0, torch.full((2, 1, 3), -1)).tolist() == [[[4, -1, 1]], [[2, -1, 4]]]
