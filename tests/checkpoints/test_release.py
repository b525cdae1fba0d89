"""What the authors' release computes from known weights, and what ours computes from the same."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instanceformer import InstanceFormer
from instanceformer.checkpoints import Checkpoint
from instanceformer.checkpoints.convert import SourceOptions, convert

FOLDER = (
    Path(os.environ.get("INSTANCEFORMER_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
    / "authors-release"
)
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no outputs of the authors' release in {FOLDER}")


def make_inputs(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """State dict and frames (1, T, 3, H, W) of a fixture."""
    specification = importlib.util.spec_from_file_location("fixture", FOLDER / "fixture.py")
    fixture = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fixture)
    content = json.loads((FOLDER / f"{name}.json").read_text())
    return fixture.state_dict(content["entries"], content["salt"]), fixture.video(**content["video"])[None]


def network_of(checkpoint: Checkpoint, **changes: Any) -> InstanceFormer:
    network = InstanceFormer(**{**checkpoint.options, **changes})
    network.load_state_dict(checkpoint.weights)
    return network.eval()


@pytest.mark.parametrize("name", ["ytvis", "ovis"])
@torch.no_grad()
def test_converted_weights_give_the_numbers_of_the_release(name: str) -> None:
    weights, video = make_inputs(name)
    network = network_of(convert(weights, SourceOptions(all_channels=True)).checkpoint)
    found, _ = network(video, segment="all")
    expected = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    for output in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(found, output)[0], expected[output], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.masks[0], expected["masks"].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_the_fixture_sees_every_option_that_conversion_sets() -> None:
    weights, video = make_inputs("ovis")
    expected = torch.load(FOLDER / "ovis.pt", weights_only=True)
    checkpoint = convert(weights, SourceOptions(all_channels=True)).checkpoint
    for change in (
        {"location_from": "content"},
        {"cross_position": True},
        {"temporal_index": "age"},
        {"memory_frames": 4},
        {"mask_upsampling": "centred"},
        {"location": "additive"},
    ):
        found, _ = network_of(checkpoint, **change)(video, segment="all")
        differences = [(getattr(found, x)[0] - expected[x]).abs().max() for x in ("logits", "boxes", "queries")]
        masks = (found.masks[0] - expected["masks"].float()).abs() > 1e-2 + 1e-2 * expected["masks"].abs()
        assert max(differences) > 1e-3 or masks.any(), change


@torch.no_grad()
def test_without_memory_the_datasets_classes_have_the_scores_of_their_channels() -> None:
    weights, video = make_inputs("ytvis")
    found, _ = network_of(convert(weights, SourceOptions(dataset="ytvis19")).checkpoint)(video[:, :2])
    expected = torch.load(FOLDER / "ytvis.pt", weights_only=True)
    torch.testing.assert_close(found.logits[0], expected["logits"][:2, :, 1:41], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes[0], expected["boxes"][:2], rtol=0, atol=1e-4)
