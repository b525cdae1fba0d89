"""The command ``segment`` on a tiny network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from instanceformer import InstanceFormer
from instanceformer.inference.tracks import FrameInstances
from instanceformer.video.reading import open_video

SHOW_ALL = ["--birth=0", "--show=0", "--max_overlap=1", "--size=64", "--device=cpu"]


@pytest.fixture
def checkpoint(tiny: Callable[..., InstanceFormer], tmp_path: Path) -> Path:
    network = tiny(num_classes=2)
    with torch.no_grad():
        network.mask_head.controller[-1].bias[-1] += 1.0  # masks that are not empty
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path / "tiny.ckpt"
    torch.save(
        {
            "network_options": vars(network.options),
            "state_dict": weights,
            "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        },
        path,
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def segment(video: Path, checkpoint: Path, folder: Path, *options: str) -> None:
    from instanceformer.cli import main  # needs jsonargparse, which test_graphs.py does without on a GPU

    outputs = [f"--output={folder / 'film.mp4'}", f"--results={folder / 'results.json'}", f"--masks={folder / 'masks'}"]
    main(["segment", str(video), f"--checkpoint={checkpoint}", *outputs, *SHOW_ALL, *options])


def fail(*args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        segment(*args)  # type: ignore[arg-type]
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def shape_of(path: Path) -> list[tuple[int, ...]]:
    return [frame.image.shape for frame in open_video(path).frames]


def assert_same(found: Iterable[FrameInstances], expected: Iterable[FrameInstances], differing: float = 1e-3) -> None:
    """Up to rounding, and to so many pixels: those whose logit is next to zero."""
    for one, other in zip(found, expected, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if a.dtype == torch.bool:
                assert a.shape == b.shape
                assert (a != b).sum() <= differing * a.numel()
            else:
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
