import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import decode_image, write_jpeg

from instanceformer.evaluation.results import Track, encode_mask, write_results
from instanceformer.inference.render import instance_color
from instanceformer.video.reading import open_video

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "render_results.py"
HEIGHT, WIDTH, FRAMES, SCALE = 48, 80, 3, 8  # 48 rows are enlarged to about 360


def square(left: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[20:40, left : left + 20] = True
    return mask


@pytest.fixture
def dataset(tmp_path):
    """Two videos; in the second an instance moves, is hidden in the middle, and has two predictions."""
    videos = []
    for video_id in (4, 9):
        names = [f"{video_id}/{t}.jpg" for t in range(FRAMES)]
        (tmp_path / "images" / str(video_id)).mkdir(parents=True)
        for name in names:
            write_jpeg(torch.full((3, HEIGHT, WIDTH), 100, dtype=torch.uint8), str(tmp_path / "images" / name))
        videos.append({"id": video_id, "height": HEIGHT, "width": WIDTH, "length": FRAMES, "file_names": names})
    masks = [encode_mask(square(4)), None, encode_mask(square(12))]
    annotation = {"id": 1, "video_id": 9, "category_id": 3, "iscrowd": 0, "segmentations": masks}
    annotation |= {"areas": [400, None, 400], "bboxes": [[4, 20, 20, 20], None, [12, 20, 20, 20]]}
    categories = [{"id": 3, "name": "dog"}, {"id": 8, "name": "car"}]
    (tmp_path / "gt.json").write_text(
        json.dumps({"videos": videos, "categories": categories, "annotations": [annotation]})
    )
    write_results(
        tmp_path / "results.json",
        [
            Track(9, 8, 0.4, [encode_mask(square(56))] * FRAMES),
            Track(9, 3, 0.8, masks),
            Track(9, 3, 0.1, [encode_mask(square(30))] * FRAMES),
            Track(4, 3, 0.9, [None] * FRAMES),
        ],
    )
    return tmp_path


def run(monkeypatch, folder: Path, *options: str) -> None:
    arguments = [str(folder / "gt.json"), str(folder / "results.json"), "--images", str(folder / "images")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--output", str(folder / "film.mp4"), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def is_near(pixel: np.ndarray, color: tuple[int, ...]) -> bool:
    return bool(np.abs(pixel.astype(int) - np.array(color)).max() < 30)


def blend(color: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(round(0.55 * 100 + 0.45 * value) for value in color)


def test_the_film_shows_truth_beside_predictions(monkeypatch, dataset, capsys):
    run(monkeypatch, dataset, "--video-id", "9", "--sheet", str(dataset / "sheet.png"))
    assert "3 frames of video 9, 2 tracks" in capsys.readouterr().out
    film = [frame.image for frame in open_video(dataset / "film.mp4").frames]
    assert len(film) == FRAMES
    bar, right = film[0].shape[0] - HEIGHT * SCALE, film[0].shape[1] - WIDTH * SCALE

    def pixel(frame: int, y: int, x: int, offset: int = 0) -> np.ndarray:
        return film[frame][bar + y * SCALE, offset + x * SCALE]

    gray, first, second = (100, 100, 100), blend(instance_color(1)), blend(instance_color(2))
    assert is_near(pixel(0, 35, 10), first)  # ground truth
    assert is_near(pixel(1, 35, 10), gray)
    assert is_near(pixel(2, 35, 28), first)
    assert is_near(pixel(0, 35, 66), gray)
    assert is_near(pixel(0, 35, 10, right), first)  # the most confident track is number 1
    assert is_near(pixel(1, 35, 10, right), gray)
    assert is_near(pixel(1, 35, 66, right), second)
    assert is_near(pixel(1, 35, 40, right), gray)  # below the threshold
    sheet = decode_image(str(dataset / "sheet.png"))
    assert sheet.shape[1] >= 2 * film[0].shape[0] - 1
    assert sheet.shape[2] >= 2 * film[0].shape[1] - 1


def test_the_first_video_is_the_default_and_may_have_no_instances(monkeypatch, dataset, capsys):
    run(monkeypatch, dataset, "--threshold", "0.95")
    assert "3 frames of video 4, 0 tracks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--video-id", "5"], r"no video has the id 5, there are \[4, 9\]"),
        (["--images", "nowhere"], r"nowhere.4.0\.jpg"),
        (["--fps", "0"], "fps: found 0"),
    ],
)
def test_wrong_input_ends_with_one_message(monkeypatch, dataset, change, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, dataset, *change)
    assert not (dataset / "film.mp4").exists()


def test_a_track_of_another_length_is_refused(monkeypatch, dataset):
    write_results(dataset / "results.json", [Track(4, 3, 0.9, [None])])
    with pytest.raises(SystemExit, match="a track of video 4 has 1 frames, the video has 3"):
        run(monkeypatch, dataset)
