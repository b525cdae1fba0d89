"""From a tiny DAVIS: ten frames a sequence, in which a square moves."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scripts.davis_mini import HEIGHT, SEQUENCES, WIDTH, main
from tests.data.formats.conftest import save, save_palette

from instanceformer.cli import main as instanceformer
from instanceformer.data.formats.youtube_vis import read_annotations

SIZE = (12, 21)
FRAMES = 10


def square(t: int) -> NDArray[np.uint8]:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[3:9, 2 + t : 10 + t] = 1
    return mask


def write_davis(root: Path, release: int) -> Path:
    """DAVIS 2016 marks the square by 255; here DAVIS 2017 numbers its upper and lower half, and has one more video."""
    for name in [*SEQUENCES, *(["bear"] if release == 2017 else [])]:
        for t in range(FRAMES):
            mask = square(t)
            save(root / f"JPEGImages/480p/{name}/{t:05}.jpg", np.stack([80 * mask + 90] * 3, axis=2))
            label = root / f"Annotations/480p/{name}/{t:05}.png"
            if release == 2016:
                save(label, 255 * mask)
            else:
                mask[6:] *= 2
                save_palette(label, mask)
    return root


@pytest.fixture(params=[2016, 2017])
def davis(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_davis(tmp_path / "DAVIS", request.param)


def test_every_sequence_is_resized_and_cut_in_two(davis: Path, tmp_path: Path) -> None:
    output = tmp_path / "mini"
    main([str(davis), str(output)])
    seen: dict[str, int] = {}
    for split, length in (("train", 7), ("valid", 3)):
        instanceformer(["check", str(output / f"{split}.json"), "--images", str(output / "JPEGImages"), "--decode"])
        dataset = read_annotations(output / f"{split}.json")
        names = {category.id: category.name for category in dataset.categories}
        assert list(names.values()) == ["bird", "camel", "car", "cow", "dog", "goat", "person"]
        assert [Path(video.file_names[0]).parent.name for video in dataset.videos] == list(SEQUENCES)
        for video, (folder, category) in zip(dataset.videos, SEQUENCES.items(), strict=True):
            assert (video.length, video.height, video.width) == (length, HEIGHT, WIDTH)
            (instance,) = video.instances
            assert (video.id, names[instance.category_id]) == (instance.id, category)
            masks = video.decode_masks(video.instances, range(length))[:, 0].numpy()
            for name, mask in zip(video.file_names, masks, strict=True):
                t = seen[folder] = seen.get(folder, -1) + 1
                assert name == f"{folder}/{t:05}.jpg"
                expected = Image.fromarray(square(t)).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
                np.testing.assert_array_equal(mask, np.asarray(expected))
    with Image.open(output / "JPEGImages/dog/00004.jpg") as image:
        frame = np.asarray(image.convert("L"))
    assert frame.shape == (HEIGHT, WIDTH)
    assert frame[120, 160] > frame[20, 20] + 60  # the square, brighter


def test_frames_of_the_right_size_are_not_compressed_again(tmp_path: Path) -> None:
    davis = write_davis(tmp_path / "DAVIS", 2016)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for t in range(FRAMES):
        save(davis / f"JPEGImages/480p/libby/{t:05}.jpg", noise)
        save(davis / f"Annotations/480p/libby/{t:05}.png", np.where(noise[..., 0] > 127, 255, 0).astype(np.uint8))
    main([str(davis), str(tmp_path / "mini")])
    (original, copy) = (
        folder / "libby/00000.jpg" for folder in (davis / "JPEGImages/480p", tmp_path / "mini/JPEGImages")
    )
    assert original.read_bytes() == copy.read_bytes()


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("JPEGImages", "DAVIS: found no folder JPEGImages/480p, expected DAVIS 2016 or 2017"),
        ("Annotations/480p", "DAVIS: found no folder Annotations/480p"),
        ("JPEGImages/480p/goat", "JPEGImages/480p: found no goat, expected a folder for each of 13 sequences"),
        ("Annotations/480p/camel/00003.png", "camel: found no 00003.png, expected a label image for each of 10 frames"),
        ("JPEGImages/480p/dog/00002.jpg", "00002.png: expected a frame of the name 00002"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path: Path, lost: str, message: str) -> None:
    davis = write_davis(tmp_path / "DAVIS", 2017)
    lose(davis / lost)
    with pytest.raises(SystemExit) as stop:
        main([str(davis), str(tmp_path / "mini")])
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not list((tmp_path / "mini").glob("*.json"))


def test_damaged_frames_are_named(tmp_path: Path) -> None:
    davis = write_davis(tmp_path / "DAVIS", 2016)
    path = davis / "JPEGImages/480p/blackswan/00001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SystemExit, match=r"davis_mini: .*blackswan/00001.jpg: .*cannot be read as an image"):
        main([str(davis), str(tmp_path / "mini")])


def test_a_dataset_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "valid.json").write_text("{}")
    with pytest.raises(SystemExit, match="found a dataset, expected none; remove it or give another folder"):
        main([str(tmp_path), str(tmp_path)])


def test_davis_mini_again_from_its_own_frames(shared: Path, tmp_path: Path) -> None:
    """The real set, laid out as DAVIS 2016: the same videos, frames and masks."""
    root = shared / "real" / "davis-mini"
    davis, output = tmp_path / "DAVIS", tmp_path / "mini"
    (davis / "JPEGImages").mkdir(parents=True)
    (davis / "JPEGImages/480p").symlink_to(root / "JPEGImages")
    for split in ("train", "valid"):
        for video in read_annotations(root / f"{split}.json").videos:
            masks = video.decode_masks(video.instances, range(video.length))[:, 0].numpy()
            for name, mask in zip(video.file_names, masks, strict=True):
                save(davis / "Annotations/480p" / Path(name).with_suffix(".png"), 255 * mask)
    main([str(davis), str(output)])
    for split in ("train", "valid"):
        made, original = (json.loads((folder / f"{split}.json").read_text()) for folder in (output, root))
        assert made["videos"] == original["videos"]
        assert made["annotations"] == original["annotations"]
        for video in made["videos"]:
            assert not filecmp.cmpfiles(output / "JPEGImages", root / "JPEGImages", video["file_names"], shallow=False)[
                1
            ]
