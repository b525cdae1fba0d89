"""Films of all kinds are read and written."""

import gc
from fractions import Fraction

import av
import numpy as np
import pytest
from av.sidedata.sidedata import SideDataContainer
from tests.inference.films import cut, difference, moving_square, read, read_until_broken, turn, write_film, write_sound

from instanceformer.video import films
from instanceformer.video.films import VideoWriter
from instanceformer.video.frames import BrokenVideo
from instanceformer.video.reading import open_video


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "height", "width"),
    [
        ("film.mp4", "libx264", "yuv420p10le", 48, 64),
        ("film.mp4", "libx265", "yuv420p10le", 48, 64),
        ("film.mkv", "ffv1", "yuv444p", 47, 63),
        ("film.mov", "mjpeg", "yuvj420p", 47, 63),
        ("film.ts", "libx264", "yuv420p", 48, 64),
    ],
)
def test_ten_bits_odd_sizes_and_other_containers_are_read(tmp_path, name, codec, pix_fmt, height, width):
    frames = moving_square(6, height, width)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else None
    video = open_video(write_film(tmp_path / name, frames, codec, pix_fmt, options=options))
    assert video.fps == 10
    found = list(video.frames)
    assert found[0].image.shape == (height, width, 3)
    assert difference([frame.image for frame in found], frames) < 6
    assert [frame.seconds for frame in found] == pytest.approx([t / 10 for t in range(6)], abs=2e-3)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_a_film_is_turned_as_its_display_matrix_asks(tmp_path, matrix, turns):
    frames = moving_square(3)
    path = write_film(tmp_path / "film.mp4", frames)
    turn(path, matrix)
    assert difference(read(path), [np.rot90(frame, turns) for frame in frames]) < 6


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("across", "down"), [(-1, 1), (1, -1)])
def test_a_mirrored_film_is_shown_mirrored(tmp_path, transpose, across, down):
    """As selfies are; where the axes change places, a turn comes with it."""
    frames = moving_square(3)
    path = write_film(tmp_path / "film.mp4", frames)
    turn(path, (0, down, across, 0) if transpose else (across, 0, 0, down))
    shown = [frame.transpose(1, 0, 2) if transpose else frame for frame in frames]
    assert difference(read(path), [frame[::down, ::across] for frame in shown]) < 6


def test_a_clock_that_is_set_does_not_stop_the_film(tmp_path):
    """One jumps by hours; one begins anew, as a camera's does when it starts again."""
    jumps = write_film(tmp_path / "jumps.mkv", moving_square(5), "ffv1", "yuv420p", [0, 0.1, 0.3, 25000, 25000.1])
    assert [frame.seconds for frame in open_video(jumps).frames] == pytest.approx([0, 0.1, 0.3, 0.4, 0.5], abs=5e-3)
    parts = [write_film(tmp_path / f"{t}.ts", moving_square(3), seconds=[t, t + 0.1, t + 0.2]) for t in (5000, 0)]
    again = tmp_path / "again.ts"
    again.write_bytes(b"".join(part.read_bytes() for part in parts))
    video, found = open_video(again), []
    with pytest.raises(BrokenVideo, match="1 packets of data were damaged; 6 frames"):  # where one ends
        found.extend(frame.seconds for frame in video.frames)
    anew = 0.2 + 1 / video.fps
    assert found == pytest.approx([0, 0.1, 0.2, anew, anew + 0.1, anew + 0.2], abs=5e-3)


@pytest.mark.parametrize("height", [480, 720])
def test_colors_survive_a_film_of_any_size(tmp_path, height):
    """Also for players, which go by what the film says of them."""
    path, frame = tmp_path / "film.mp4", np.full((height, 64, 3), (250, 10, 20), dtype=np.uint8)
    with VideoWriter(path, fps=10) as writer:
        writer.write(frame)
    with av.open(str(path)) as film:
        picture = next(film.decode(video=0))
        assert (int(picture.colorspace), int(picture.color_range)) == (5, 1)
    assert difference(read(path), [frame]) < 6
    untagged = write_film(tmp_path / "untagged.mkv", [frame], "libx264", "yuv444p")
    with av.open(str(untagged)) as film:
        picture = next(film.decode(video=0))
        assert picture.colorspace == 2
        standard = "ITU709" if height == 720 else "ITU601"
        expected = picture.to_ndarray(format="rgb24", src_colorspace=standard)
    np.testing.assert_array_equal(read(untagged)[0], expected)


def test_frames_of_a_variable_rate_keep_their_times(tmp_path):
    times = [0.5, 0.54, 1.3, 1.33, 2.5]
    path = write_film(tmp_path / "film.mkv", moving_square(5), seconds=times)
    found = [frame.seconds for frame in open_video(path).frames]
    assert found == pytest.approx([time - 0.5 for time in times], abs=2e-3)


def test_frames_themselves_are_a_video():
    frames = moving_square(3)
    video = open_video(iter(frames), fps=10)
    assert [frame.seconds for frame in video.frames] == [0, 0.1, 0.2]
    assert video.length is None


def test_a_clock_that_jitters_does_not_drift():
    clock = films._Clock(fps=10)
    times = [5.0, 5.1, 5.099, None, 5.199, 5.3, 4.0, 4.1, 4.5, 700.0, 700.1]
    expected = [0.0, 0.1, 0.1, 0.199, 0.199, 0.3, 0.4, 0.5, 0.9, 1.0, 1.1]
    assert [clock.read(time) for time in times] == pytest.approx(expected)


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VideoWriter("12:30:05.mp4", fps=10) as writer:
        writer.write(moving_square(1)[0])
    assert len(read("12:30:05.mp4")) == 1


def test_a_missing_file_is_refused_at_the_call(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such video file"):
        open_video(tmp_path / "none.mp4")


def test_files_that_are_no_video_are_refused_at_the_call(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4: cannot be opened as a video"):
        open_video(tmp_path / "text.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4: cannot be opened as a video"):
        open_video(tmp_path / "empty.mp4")
    (tmp_path / "text.txt").write_text("no video\n" * 100)
    with pytest.raises(ValueError, match=r"text\.txt: the file has no video stream"):
        open_video(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"sound\.wav: the file has no video stream"):
        open_video(write_sound(tmp_path / "sound.wav"))
    path = cut(write_film(tmp_path / "film.mp4", moving_square(3)), 0.02)  # not even its index
    with pytest.raises(ValueError, match=r"film\.mp4: cannot be opened as a video"):
        open_video(path)


def test_a_damaged_packet_is_passed_over_and_reported(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
    path = write_film(tmp_path / "film.mp4", frames, options={"bf": "0", "g": "1"})
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[6]
    content = bytearray(path.read_bytes())
    content[entry.pos : entry.pos + entry.size] = bytes(entry.size)
    path.write_bytes(content)
    count, message = read_until_broken(path)
    assert count == 11
    assert "1 packets of data were damaged; 11 frames could be decoded" in message


def test_a_change_of_size_ends_the_video(tmp_path):
    path = write_film(tmp_path / "a.ts", moving_square(4))
    path.write_bytes(path.read_bytes() + write_film(tmp_path / "b.ts", moving_square(4, 64, 96)).read_bytes())
    found = open_video(path).frames
    assert [next(found).image.shape for _ in range(4)] == [(48, 64, 3)] * 4
    with pytest.raises(BrokenVideo, match="frame 4 has 96x64 pixels, expected 64x48"):
        next(found)


def test_a_film_with_dropped_frames_is_whole(tmp_path):
    """AVI has an entry of no bytes for each."""
    times = [0.0, 0.1, 0.2, 0.5, 0.9]
    path = write_film(tmp_path / "film.avi", moving_square(5), "mjpeg", "yuvj420p", seconds=times)
    found = open_video(path)
    assert found.length is None or found.length > 5
    assert [frame.seconds for frame in found.frames] == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize("count", [2, 5])
def test_nothing_of_a_film_is_left_when_it_has_been_read(tmp_path, count):
    """A process that is forked off would wait for the threads of a decoder that it inherits."""
    path = write_film(tmp_path / "film.mkv", moving_square(5), "ffv1", "yuv444p")
    gc.collect()
    gc.disable()
    try:
        frames = open_video(path).frames
        assert len([next(frames) for _ in range(count)]) == count
        frames.close()
        assert not [thing for thing in gc.get_objects() if type(thing) is SideDataContainer]
    finally:
        gc.enable()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 64), (48, 63), (47, 63)])
def test_written_frames_are_read_back(tmp_path, height, width):
    path, frames = tmp_path / "film.mp4", moving_square(6, height, width)
    with VideoWriter(path, fps=10) as writer:
        for frame in frames:
            writer.write(frame)
    found = read(path)
    assert all(frame.dtype == np.uint8 and frame.shape == (48, 64, 3) for frame in found)
    # lossy, so on the average: order of colors and frames, and where things are
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
        (np.zeros((32, 30, 3), dtype=np.uint8), r"shape \(32, 30, 3\), expected \(32, 32, 3\) like the film's first"),
    ],
)
def test_a_wrong_frame_is_refused(tmp_path, frame, message):
    with VideoWriter(tmp_path / "film.mp4", fps=10) as writer:
        writer.write(np.zeros((32, 32, 3), dtype=np.uint8))
        with pytest.raises(ValueError, match=message):
            writer.write(frame)


def test_a_wrong_rate_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fps: found 0, expected a positive number"):
        VideoWriter(tmp_path / "film.mp4", fps=0)
    with pytest.raises(ValueError, match="fps: found 0, expected a positive number"):
        open_video(tmp_path, fps=0)
