"""Films are written."""

from fractions import Fraction

import av
import numpy as np
import pytest
from tests.inference.films import difference, moving_square, read

from instanceformer.video.reading import open_video
from instanceformer.video.writing import VideoWriter


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 64), (48, 63), (47, 63)])
def test_written_frames_are_read_back(tmp_path, height, width):
    path, frames = tmp_path / "film.mp4", moving_square(6, height, width)
    with VideoWriter(path, fps=10) as writer:
        for frame in frames:
            writer.write(frame)
    found = read(path)
    assert all(frame.dtype == np.uint8 and frame.shape == (48, 64, 3) for frame in found)
    # lossy, so on the average: order of colours and frames, and where things are
    assert difference([frame[:height, :width] for frame in found], frames) < 6


@pytest.mark.parametrize(
    ("fps", "rate"), [(10, Fraction(10)), (30000 / 1001, Fraction(30000, 1001)), (6.25, Fraction(25, 4))]
)
def test_films_are_h264_at_the_given_rate(tmp_path, fps, rate):
    with VideoWriter(tmp_path / "film.mp4", fps) as writer:
        for frame in moving_square(5):
            writer.write(frame)
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == rate


def test_frames_are_shown_when_asked_and_never_two_at_a_time(tmp_path):
    path = tmp_path / "film.mp4"
    with VideoWriter(path, fps=10) as writer:
        for frame, seconds in zip(moving_square(5), (0, 0.04, 1.5, 1.5, 2.0), strict=True):
            writer.write(frame, seconds)
    times = [frame.seconds for frame in open_video(path).frames]
    assert times == pytest.approx([0, 0.04, 1.5, 1.5, 2.0], abs=1e-4)
    assert len(set(times)) == 5


def test_an_exception_leaves_the_old_film_and_nothing_else(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_text("the old film")

    def interrupted():
        with VideoWriter(path, fps=10) as writer:
            writer.write(moving_square(1)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "the old film"
    assert list(tmp_path.iterdir()) == [path]


def test_a_film_that_cannot_be_written_is_refused_before_its_first_frame(tmp_path):
    with pytest.raises(OSError, match=r"nowhere.*film\.mp4"), VideoWriter(tmp_path / "nowhere" / "film.mp4", fps=10):
        pytest.fail("the block was entered")


def test_a_film_without_frames_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"film\.mp4: no frame was written"),
        VideoWriter(tmp_path / "film.mp4", fps=10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((32, 32, 3), dtype=np.float32), r"type float32, expected \(H, W, 3\) uint8"),
        (np.zeros((3, 32, 32), dtype=np.uint8), r"shape \(3, 32, 32\).*expected \(H, W, 3\)"),
        (np.zeros((32, 30, 3), dtype=np.uint8), r"shape \(32, 30, 3\) in a film whose first has shape \(32, 32, 3\)"),
    ],
)
def test_a_wrong_frame_is_refused(tmp_path, frame, message):
    with VideoWriter(tmp_path / "film.mp4", fps=10) as writer:
        writer.write(np.zeros((32, 32, 3), dtype=np.uint8))
        with pytest.raises(ValueError, match=message):
            writer.write(frame)


def test_a_wrong_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps = 0, expected a positive number"):
        VideoWriter(tmp_path / "film.mp4", fps=0)
    with pytest.raises(ValueError, match="fps: found 0, expected a positive number"):
        open_video(tmp_path, fps=0)
