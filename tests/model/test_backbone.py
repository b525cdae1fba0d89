from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import make_batch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from instanceformer import InstanceFormer
from instanceformer.checkpoints import Checkpoint, write
from instanceformer.data.augment import normalize
from instanceformer.inference.optimize import optimize
from instanceformer.model.backbone import Backbone, FrozenBatchNorm, create_timm
from instanceformer.training.losses import LossWeights
from instanceformer.training.module import InstanceFormerModule


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


FAMILIES = {
    "ResNet": "timm/test_resnet",
    "ConvNeXt": "timm/test_convnext",
    "EfficientNet": "timm/test_efficientnet",
    "EfficientNet of TensorFlow": "timm/tf_efficientnet_lite0",
    "Swin": "timm/swin_tiny_patch4_window7_224",
    "plain ViT": "timm/test_vit",
    "ViT with a pyramid": "timm/mvitv2_tiny",
}
families = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=family, marks=pytest.mark.slow if "mvit" in name else ())
        for family, name in FAMILIES.items()
    ],
)


@families
def test_a_model_of_timm_gives_features_of_any_size(name: str) -> None:
    backbone = Backbone(name)
    features = backbone(torch.randn(2, 3, 70, 101))
    assert [x.shape[2:] for x in features] == [(18, 26), (9, 13), (5, 7), (3, 4)]
    assert tuple(x.shape[1] for x in features) == backbone.channels
    assert backbone.is_frozen == ("resnet" in name or "efficientnet" in name)


@families
def test_every_parameter_of_a_model_of_timm_learns(tiny: Callable[..., InstanceFormer], name: str) -> None:
    network = tiny(backbone=name, backbone_norm="batch").train()
    InstanceFormerModule(network).compute_losses(make_batch([2], frames=2)).total(LossWeights()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@families
@torch.no_grad()
def test_a_model_of_timm_gives_the_same_for_clip_stream_checkpoint_and_optimized(
    tiny: Callable[..., InstanceFormer], name: str, tmp_path: Path
) -> None:
    network, frames = tiny(backbone=name), torch.randn(1, 3, 3, 70, 101)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_var.uniform_(0.5, 1.5)
            module.fold()
    clip, _ = network(frames, segment="all")
    write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "a.safetensors")
    loaded = InstanceFormer.from_checkpoint(tmp_path / "a.safetensors")
    for other in (network, loaded, optimize(loaded)):
        state = None
        for t in range(3):
            frame, state = other(frames[:, t : t + 1], state=state, segment="all")
            torch.testing.assert_close(frame.masks[:, 0], clip.masks[:, t], rtol=1e-4, atol=1e-4)


@families
@torch.no_grad()
def test_a_model_of_timm_is_exported(name: str) -> None:
    backbone, images = Backbone(name).eval(), torch.randn(1, 3, 70, 101)
    found = torch.export.export(backbone, (images,)).module()(images)
    for a, b in zip(found, backbone(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_frozen_norms_of_timm_are_ours_with_their_activation() -> None:
    frozen, plain = Backbone("timm/test_efficientnet"), Backbone("timm/test_efficientnet", "batch").eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    frozen.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 96)
    for a, b in zip(frozen(images), plain(images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    trained = {name.split(".")[2] for name, p in frozen.body.named_parameters() if p.requires_grad}
    assert trained == {"2", "3", "4"}  # all up to C2, that is stage 1, is fixed
    assert all(p.requires_grad for p in plain.parameters())


def test_images_are_normalized_as_the_models_weights_expect() -> None:
    body = Backbone("timm/tf_efficientnet_lite0").body
    seen: list[Tensor] = []
    body.get_submodule("model.conv_stem").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frame = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    body(normalize(frame))
    torch.testing.assert_close(seen[0], frame / 127.5 - 1, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/convnxt_tiny", "expected a model of timm .*, such as timm/convnext_tiny"),
        ("timm/convnext_tiny.fb", "such as timm/convnext_tiny.fb_in1k"),
        ("timm/hf-hub:someone/something", "expected a model of timm"),
        ("timm/levit_128", r"features at strides \[16, 32, 64\], expected 4, 8, 16 and 32"),
        ("timm/hiera_tiny_224", "which takes images of one size only"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"backbone: found {re.escape(name)}.*{message}"):
        Backbone(name)


def test_a_missing_timm_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instanceformer.model.backbone.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="found timm/test_vit, which needs timm, not installed here; pip install timm"):
        Backbone("timm/test_vit")


def test_pretrained_weights_of_timm_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone("timm/test_resnet")
    pretrained = create_timm("test_resnet", pretrained=False)  # stands for the ones to be downloaded
    monkeypatch.setattr("instanceformer.model.backbone.create_timm", lambda name, pretrained: pretrained_of[name])
    pretrained_of = {"test_resnet": pretrained}
    backbone.load_imagenet_weights()
    assert torch.equal(backbone.body.get_parameter("model.conv1.0.weight"), pretrained.conv1[0].weight)

    def refuse(name: str, pretrained: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("instanceformer.model.backbone.create_timm", refuse)
    with pytest.raises(RuntimeError, match=r"pretrained weights of timm/test_resnet could not be loaded.*no route"):
        backbone.load_imagenet_weights()
