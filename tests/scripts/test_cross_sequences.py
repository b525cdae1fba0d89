from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instanceformer.cli import main
from instanceformer.data.annotations import Instance, Video, VideoDataset
from instanceformer.data.formats.youtube_vis import read_annotations, write_youtube_vis

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "cross_sequences.py"


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """Four videos of ten frames; in ``single.json`` each has one instance."""
    main(
        [
            "synthesize",
            str(tmp_path / "shapes"),
            *("--train_videos=1", "--valid_videos=4", "--length=10", "--height=48", "--width=80", "--workers=1"),
        ]
    )
    dataset = read_annotations(tmp_path / "shapes" / "valid.json")
    videos = tuple(Video(v.id, v.height, v.width, v.file_names, v.length, (fully_visible(v),)) for v in dataset.videos)
    write_youtube_vis(tmp_path / "shapes" / "single.json", VideoDataset(dataset.categories, videos))
    return tmp_path / "shapes"


def fully_visible(video: Video) -> Instance:
    return max(video.instances, key=lambda instance: sum(s is not None for s in instance.segmentations))


def run(monkeypatch: pytest.MonkeyPatch, shapes: Path, *arguments: str) -> Path:
    output = shapes.parent / "crossing"
    flags = [str(shapes / "single.json"), "--images", str(shapes / "JPEGImages"), "--output", str(output), *arguments]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return output


def test_one_instance_passes_in_front_of_the_other(sequences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted({Path(v.file_names[0]).parent.name for v in read_annotations(sequences / "single.json").videos})
    output = run(monkeypatch, sequences, "--behind", names[0], "--front", names[1], "--frames", "24")
    main(["check", str(output / "crossing.json"), "--images", str(output / "JPEGImages"), "--decode"])
    (video,) = read_annotations(output / "crossing.json").videos
    assert video.length == 24  # the sequences have 10 frames
    behind, front = video.decode_masks(video.instances, range(24)).numpy().astype(bool).swapaxes(0, 1)
    assert not (behind & front).any()
    centers = [np.nonzero(mask)[1].mean() for mask in front if mask.any()]
    assert len(centers) > 12
    assert all(np.diff(centers) > 0)  # from left to right
    assert centers[0] < 0.25 * video.width
    assert centers[-1] > 0.75 * video.width
    frames = [np.asarray(Image.open(output / "JPEGImages" / name)) for name in video.file_names]
    original = [
        np.asarray(Image.open(path)).astype(int) for path in sorted((sequences / "JPEGImages" / names[0]).iterdir())[:3]
    ]
    for frame, before, mask in zip(frames, original, front, strict=False):
        assert np.abs(frame - before)[~mask].max() <= 2  # decoders may differ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--behind", "nowhere", "--front", "nowhere"), "found no sequence nowhere, expected one of"),
        (("--behind", "a", "--front", "b", "--frames", "1"), "--frames: found 1, expected 2 or more"),
    ],
)
def test_what_cannot_be_crossed_is_named(
    sequences: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, sequences, *arguments)


def test_a_sequence_with_several_instances_is_refused(sequences: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_annotations(sequences / "valid.json")
    crowded = next(video for video in dataset.videos if len(video.instances) > 1)
    write_youtube_vis(sequences / "single.json", dataset)
    name = Path(crowded.file_names[0]).parent.name
    with pytest.raises(SystemExit, match=rf"{name}: found {len(crowded.instances)} instances, expected 1"):
        run(monkeypatch, sequences, "--behind", name, "--front", name)
