from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from instanceformer import VideoInstanceSegmenter
from instanceformer.cli import main
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.inference.tracks import FrameInstances

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_cuts.py"


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Four videos of ten frames: two pairs."""
    sizes = ("--train_videos=1", "--valid_videos=4", "--length=10", "--height=48", "--width=80", "--workers=1")
    main(["synthesize", str(tmp_path), *sizes])
    return tmp_path


class Oracle:
    """Finds what the annotations say; ``identify`` gives the id of (video in its pair, index of the instance)."""

    def __init__(self, annotations: Path, count: int, identify: Callable[[int, int], int]) -> None:
        videos = read_annotations(annotations).videos
        self.identify = identify
        parts = [
            ((pair, 0, 0), (pair + 1, 1, 0), (pair, 0, count)) for pair in range(0, len(videos), 2)
        ]  # index of the video, which of its pair, first frame
        self.frames = iter(
            [
                (videos[index], member, start + t)
                for pair in parts
                for index, member, start in pair
                for t in range(count)
            ]
        )

    def reset(self) -> None:
        pass

    def step(self, frame: np.ndarray) -> FrameInstances:
        video, member, t = next(self.frames)
        masks: Tensor = video.decode_masks(video.instances, [t])[0].bool()
        shown = masks.flatten(1).any(dim=1)
        ids = torch.tensor([self.identify(member, i) for i in range(len(masks))])[shown]
        n = len(ids)
        return FrameInstances(ids, torch.zeros(n).long(), torch.ones(n), torch.zeros(n, 4), masks[shown])


@pytest.mark.parametrize(
    ("identify", "shares"),
    [
        (lambda member, instance: 10 * member + instance, ("1.00", "1.00", "1.00")),
        (lambda member, instance: 0, ("0.00", "0.00", "1.00")),  # what the first had goes on
    ],
)
def test_shares_of_known_identities(
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    identify: Callable[[int, int], int],
    shares: tuple[str, ...],
) -> None:
    oracle = Oracle(shapes / "valid.json", 5, identify)
    monkeypatch.setattr(VideoInstanceSegmenter, "from_checkpoint", lambda path: oracle)
    run = runpy.run_path(str(SCRIPT))["main"]
    run([str(shapes / "valid.json"), "--images", str(shapes / "JPEGImages"), "--checkpoint", "x", "--frames", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["hidden", "new", "old again"]
    for line, share in zip(lines, shares, strict=True):
        assert line.split(": ")[1].startswith(share)


def test_videos_that_are_too_short_are_refused(shapes: Path) -> None:
    run = runpy.run_path(str(SCRIPT))["main"]
    with pytest.raises(SystemExit, match="found 6 frames and 0 pairs of videos that have them"):
        run([str(shapes / "valid.json"), "--images", "x", "--checkpoint", "x", "--frames", "6"])
