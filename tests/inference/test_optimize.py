from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.conftest import TINY, needs_bfloat16
from torch import nn

from instanceformer import InstanceFormer
from instanceformer.inference.optimize import PackedConv2d, PackedLinear, optimize
from instanceformer.model.backbone import FrozenBatchNorm
from instanceformer.model.network import ClipPrediction

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def randomise_norms(network: InstanceFormer) -> None:
    """Batch norms that do something: those of a new network are the identity."""
    for name, buffer in network.backbone.named_buffers():
        if name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(0, 0.2)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm):
            module.fold()


@torch.no_grad()
def stream(network: InstanceFormer, frames: torch.Tensor) -> ClipPrediction:
    """Frame by frame, each with the state of the one before."""
    state, parts = None, []
    for frame in frames.split(1, dim=1):
        part, state = network(frame, state=state, segment="all")
        parts.append(part)
    return ClipPrediction(
        *(torch.cat([getattr(p, n) for p in parts], 1) for n in ("logits", "boxes", "queries", "masks"))
    )


def assert_equal_outputs(a: ClipPrediction, b: ClipPrediction, tolerance: float) -> None:
    for name in ("logits", "boxes", "queries", "masks"):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="small"),
        pytest.param({"backbone_norm": "batch", "mask_stride": 4, "num_levels": 3}, id="batch norm, fine masks"),
        pytest.param({"backbone": "resnet18", "location": "refined"}, id="resnet18"),
        pytest.param({"backbone": "resnet50", "memory": False}, id="resnet50"),
        pytest.param({"backbone": "swin_t"}, id="swin"),
        pytest.param({"identity": "recover", "min_confidence": 0.1, "mask_stride": 4}, id="identity"),
    ],
)
def test_same_outputs_over_several_frames(tiny: Callable[..., InstanceFormer], options: dict) -> None:
    network = tiny(**options)
    randomise_norms(network)
    frames = torch.randn(1, 5, 3, 70, 101)
    expected = stream(network, frames)
    assert_equal_outputs(stream(optimize(network), frames), expected, 1e-4)


def test_clips_with_padding_and_other_sizes_give_the_same(tiny: Callable[..., InstanceFormer]) -> None:
    """The layout of packed weights depends on the size of the frames: it follows them."""
    network = tiny()
    randomise_norms(network)
    optimized = optimize(network)
    padding = torch.zeros(2, 128, 192, dtype=torch.bool)  # large enough that no level is a single cell, whose group
    padding[0, 100:] = True  # norm would divide by next to nothing
    for frames, where in ((torch.randn(2, 3, 3, 128, 192), padding), (torch.randn(1, 2, 3, 100, 140), None)):
        with torch.no_grad():
            expected, _ = network(frames, where, segment="all")
            found, _ = optimized(frames, where, segment="all")
        assert_equal_outputs(found, expected, 1e-4)


@needs_onednn
def test_no_batch_norm_is_left_and_every_large_layer_is_packed(tiny: Callable[..., InstanceFormer]) -> None:
    optimized = optimize(tiny(backbone="resnet18", backbone_norm="batch"))
    kinds = [type(module) for module in optimized.backbone.modules()]
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.ReLU} & set(kinds)
    assert kinds.count(PackedConv2d) == 20
    assert all(isinstance(layer[0], PackedConv2d) for layer in optimized.projection.levels)
    for layer in (*optimized.encoder.layers, *optimized.decoder.layers):
        assert isinstance(layer.feedforward[0], PackedLinear)
        assert isinstance(layer.feedforward[1], nn.Identity)  # the ReLU is in the layer before


def test_the_network_is_left_as_it_is(tiny: Callable[..., InstanceFormer]) -> None:
    network = tiny().train()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    optimized = optimize(network)
    assert network.training
    assert not optimized.training
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in optimized.parameters())
    assert optimized.options == network.options


@needs_bfloat16
@pytest.mark.parametrize("identity", ["none", "hide", "recover"])
def test_bfloat16_is_close_and_keeps_state_and_locations_in_float32(
    tiny: Callable[..., InstanceFormer], identity: str
) -> None:
    network = tiny(identity=identity, min_confidence=0.0 if identity == "none" else 0.1)
    frames = torch.randn(1, 4, 3, 64, 96)
    expected, found = stream(network, frames), stream(optimize(network, torch.bfloat16), frames)
    assert_equal_outputs(found, expected, 0.2)
    assert not torch.equal(found.logits, expected.logits)
    assert found.boxes.dtype == found.masks.dtype == found.queries.dtype == torch.float32
    a, b = (masks > masks.median() for masks in (expected.masks, found.masks))
    assert (a & b).sum() / (a | b).sum() > 0.95


@needs_bfloat16
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tf_efficientnet_lite0", torch.bfloat16),
        ("test_convnext", torch.float32),  # layer norm and linear layers stay as they are
        ("test_vit", torch.float32),
    ],
)
@torch.no_grad()
def test_in_bfloat16_a_body_of_timm_is_narrowed_if_all_of_it_can_be(name: str, dtype: torch.dtype) -> None:
    network, images = InstanceFormer(**{**TINY, "backbone": f"timm/{name}"}).eval(), torch.randn(1, 3, 64, 96)
    found = optimize(network, torch.bfloat16).backbone(images)
    for a, b in zip(found, network.backbone(images), strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() < 0.1 * b.norm()


def test_what_cannot_be_optimized_is_refused(
    tiny: Callable[..., InstanceFormer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"float16.*bfloat16"):
        optimize(tiny(), torch.float16)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(ValueError, match="found one that is optimized already"):
            optimize(optimize(tiny()))
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(ValueError, match="found bfloat16 on cpu, where oneDNN has no products of it"):
        optimize(tiny(), torch.bfloat16)


def test_without_onednn_batch_norm_is_folded_and_nothing_packed(
    tiny: Callable[..., InstanceFormer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    network, frames = tiny(backbone_norm="batch"), torch.randn(1, 2, 3, 70, 101)
    optimized = optimize(network)
    assert not any(isinstance(module, nn.BatchNorm2d | PackedConv2d) for module in optimized.modules())
    assert_equal_outputs(stream(optimized, frames), stream(network, frames), 1e-4)


PROGRAM = """
import resource, sys
from instanceformer.inference.optimize import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
import torch
for round in range(6):
    if round == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_000_000)  # 48 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **settings: str) -> int:
    """Pages that a process faults in with its last three large tensors."""
    told = ("GLIBC_TUNABLES", "MALLOC_", "THP_MEM_ALLOC_ENABLE")
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, env={**quiet, **settings}
    )
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    kept, returned = faults("keep"), faults("do not")
    assert 20 * kept < returned  # 48 MB are 12,000 pages
    assert 2 * faults("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=4") > returned  # who sets it himself is left alone
