from fractions import Fraction

import av
import numpy as np
import pytest

from instanceformer.inference.video_io import VideoWriter, read_frames


def make_frames(count: int, height: int, width: int) -> list[np.ndarray]:
    """A bright square that moves to the right over a smooth ground, in colours that 4:2:0 keeps."""
    frames = []
    for t in range(count):
        frame = np.full((height, width, 3), (40, 80, 160), dtype=np.uint8)
        frame[8:24, 4 + 4 * t : 20 + 4 * t] = (220, 180, 60)
        frames.append(frame)
    return frames


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 64), (48, 63), (47, 63)])
def test_written_frames_are_read_back(tmp_path, height, width):
    path, frames = tmp_path / "film.mp4", make_frames(6, height, width)
    with VideoWriter(path, fps=10) as writer:
        for frame in frames:
            writer.write(frame)
    found = list(read_frames(path))
    assert len(found) == 6
    for frame, original in zip(found, frames, strict=True):
        assert frame.dtype == np.uint8
        assert frame.shape == (48, 64, 3)
        # lossy, so on the average: order of colours and frames, and where things are
        assert np.abs(frame[:height, :width].astype(int) - original).mean() < 6


@pytest.mark.parametrize(
    ("fps", "rate"), [(10, Fraction(10)), (30000 / 1001, Fraction(30000, 1001)), (6.25, Fraction(25, 4))]
)
def test_films_are_h264_at_the_given_rate(tmp_path, fps, rate):
    with VideoWriter(tmp_path / "film.mp4", fps) as writer:
        for frame in make_frames(5, 32, 64):
            writer.write(frame)
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == rate


def test_an_exception_leaves_the_old_film_and_nothing_else(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_text("the old film")

    def interrupted():
        with VideoWriter(path, fps=10) as writer:
            writer.write(make_frames(1, 32, 32)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "the old film"
    assert list(tmp_path.iterdir()) == [path]


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
        writer.write(make_frames(1, 32, 32)[0])
        with pytest.raises(ValueError, match=message):
            writer.write(frame)


def test_a_wrong_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps = 0, expected a positive number"):
        VideoWriter(tmp_path / "film.mp4", fps=0)


def test_a_missing_file_is_refused_at_the_call(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such video file"):
        read_frames(tmp_path / "none.mp4")


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4: cannot be decoded as a video after 0 frames"):
        next(read_frames(tmp_path / "text.mp4"))


def test_a_sound_file_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.wav: the file has no video stream"):
        next(read_frames(tmp_path / "sound.wav"))
