"""Folders of images and animated images are read."""

import re

import numpy as np
import pytest
from PIL import Image
from tests.inference.films import cut, difference, read, read_until_broken

from instanceformer.video.frames import BrokenVideo
from instanceformer.video.reading import open_video


def test_a_folder_of_images_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 100):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    video = open_video(tmp_path, fps=5)
    assert video.length == 3
    frames = list(video.frames)
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [9, 10, 100]
    assert [frame.seconds for frame in frames] == [0, 0.2, 0.4]
    assert frames[0].image.shape == (30, 20, 3)


def test_a_folder_of_mixed_sizes_is_refused_before_it_is_read(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "0.png")
    Image.new("RGB", (21, 30)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: found 21x30 pixels, expected 20x30 like 0\.png"):
        open_video(tmp_path)


def test_folders_without_images_and_images_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no images, expected files with names that end in \.jpg"):
        open_video(tmp_path)
    (tmp_path / "0.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"0\.jpg: cannot be read as an image"):
        open_video(tmp_path)


def test_images_of_16_bits_and_photographs_on_their_side_are_shown_as_they_are_meant(tmp_path):
    ramp = np.linspace(0, 65535, 48 * 64).reshape(48, 64)
    (tmp_path / "deep").mkdir()
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep" / "0.png")
    (frame,) = read(tmp_path / "deep")
    assert np.abs(frame - ramp[..., None] / 257).max() <= 1

    (tmp_path / "photos").mkdir()
    lying = np.zeros((48, 64, 3), dtype=np.uint8)
    lying[:, 32:] = 200
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: to be turned clockwise
    Image.fromarray(lying).save(tmp_path / "photos" / "0.jpg", exif=exif)
    Image.new("RGB", (48, 64)).save(tmp_path / "photos" / "1.jpg")
    first, _ = read(tmp_path / "photos")
    assert difference([first], [np.rot90(lying, -1)]) < 6

    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "deep" / "0.tif")
    (tmp_path / "deep" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.tif: .*mode F, expected 8 or 16 bits"):
        read(tmp_path / "deep")


def test_an_image_that_breaks_off_ends_the_video(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    cut(tmp_path / "1.png", 0.5)
    frames = open_video(tmp_path).frames
    next(frames)
    with pytest.raises(BrokenVideo, match=r"1\.png: cannot be read as an image"):
        next(frames)


def pictures():
    return [Image.fromarray(np.full((20, 30, 3), (40 * t, 80, 160), dtype=np.uint8)) for t in range(5)]


@pytest.mark.parametrize("name", ["film.gif", "film.png", "film.apng", "film.webp"])
@pytest.mark.parametrize(
    ("durations", "times"),
    [
        (None, [0, 0.1, 0.2, 0.3, 0.4]),
        ([40, 70, 0, 10, 40], [0, 0.04, 0.11, 0.21, 0.31]),  # as in browsers
    ],
)
def test_animated_images_are_films_timed_as_in_browsers(tmp_path, name, durations, times):
    first, *others = pictures()
    timing = {} if durations is None else {"duration": durations}
    first.save(tmp_path / name, None if name != "film.apng" else "PNG", save_all=True, append_images=others, **timing)
    video = open_video(tmp_path / name)
    assert (video.length, video.fps) == (5, pytest.approx(10 if durations is None else 25))
    frames = list(video.frames)
    assert difference([frame.image for frame in frames], [np.array(picture) for picture in pictures()]) < 3
    assert [frame.seconds for frame in frames] == pytest.approx(times)


def test_a_gif_that_says_nothing_of_its_frames_gives_all(tmp_path):
    """Without a graphic control extension before any of them."""
    first, *others = pictures()
    first.save(tmp_path / "film.gif", save_all=True, append_images=others)
    content = re.sub(rb"\x21\xf9\x04....\x00", b"", (tmp_path / "film.gif").read_bytes(), flags=re.DOTALL)
    (tmp_path / "film.gif").write_bytes(content)
    assert [frame.seconds for frame in open_video(tmp_path / "film.gif").frames] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


def test_the_picture_for_programs_that_show_no_animation_is_no_frame(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "film.png", save_all=True, append_images=others, default_image=True)
    assert difference(read(tmp_path / "film.png"), [np.array(picture) for picture in others]) < 3


def test_one_picture_is_a_video_of_one_frame(tmp_path):
    for name in ("0.png", "0.gif", "0.webp", "0.jpg"):
        pictures()[2].save(tmp_path / name)
        assert len(read(tmp_path / name)) == 1


@pytest.mark.parametrize("name", ["film.gif", "film.png"])
def test_an_animated_image_that_is_cut_off_says_so_after_what_is_there(tmp_path, name):
    rng = np.random.default_rng(0)
    first, *others = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(5)]
    first.save(tmp_path / name, save_all=True, append_images=others)
    count, message = read_until_broken(cut(tmp_path / name, 0.7))
    assert count == 3
    assert re.search(r"film\.\w+: cannot be read as an image .*; 3 frames could be decoded", message)


def test_a_gif_that_is_cut_off_between_two_pictures_says_so(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "film.gif", save_all=True, append_images=others)
    content = (tmp_path / "film.gif").read_bytes()
    (tmp_path / "film.gif").write_bytes(content[: content.rindex(b"\x21\xf9\x04")])
    count, message = read_until_broken(tmp_path / "film.gif")
    assert count == 4
    assert "the file is cut off" in message
