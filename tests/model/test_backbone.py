from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from instanceformer.model.backbone import Backbone, FrozenBatchNorm


def make_norms() -> tuple[FrozenBatchNorm2d, FrozenBatchNorm]:
    theirs, ours = FrozenBatchNorm2d(6), FrozenBatchNorm(6)
    for name, buffer in theirs.named_buffers():
        buffer.uniform_(0.5, 2) if name in ("weight", "running_var") else buffer.normal_()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_frozen_norm_is_torchvisions_with_its_entries() -> None:
    theirs, ours = make_norms()
    x = torch.randn(2, 6, 4, 5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))


def test_frozen_norm_keeps_the_precision_and_has_the_same_gradient() -> None:
    theirs, ours = make_norms()
    assert ours(torch.randn(2, 6, 4, 5).bfloat16()).dtype == torch.bfloat16
    gradients: list[Tensor] = []
    for norm in (theirs, ours):
        x = torch.linspace(-1, 1, 240).view(2, 6, 4, 5).requires_grad_()
        norm(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_features_are_in_the_precision_of_autocast(norm: str) -> None:
    backbone = Backbone("resnet18", norm)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert {feature.dtype for feature in backbone(torch.randn(1, 3, 64, 64))} == {torch.bfloat16}
    assert backbone.is_frozen == (norm == "frozen")
