"""Streams are read, and opened again when they drop."""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from tests.inference.films import difference, moving_square, read, read_until_broken, serve, write_film

from instanceformer.video import films
from instanceformer.video.frames import BrokenVideo
from instanceformer.video.reading import open_video


@pytest.fixture
def stopwatch(monkeypatch):
    """A clock on which time passes only where something waits."""
    watch = SimpleNamespace(now=100.0, rests=[])

    def sleep(seconds):
        watch.now += seconds
        watch.rests.append(seconds)

    monkeypatch.setattr(films, "time", SimpleNamespace(monotonic=lambda: watch.now, sleep=sleep))
    return watch


def test_a_stream_ends_when_it_is_closed_and_breaks_off_when_it_falls_silent(tmp_path, monkeypatch):
    content = write_film(tmp_path / "film.ts", moving_square(30)).read_bytes()
    assert len(read(serve(content))) == 30

    monkeypatch.setattr(films, "STREAM_TIMEOUT", 1.0)
    silent = threading.Event()
    count, message = read_until_broken(serve(content, stall=silent))
    silent.set()
    assert count > 10
    assert re.search(r"tcp://.*: reading failed", message)


def test_a_camera_or_stream_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="video99: cannot be opened as a video"):
        open_video("99")
    with pytest.raises(ValueError, match=r"tcp://127\.0\.0\.1:1: cannot be opened as a video"):
        open_video("tcp://127.0.0.1:1")


def test_a_stream_that_drops_is_opened_again_and_its_clock_goes_on(tmp_path, stopwatch, capsys):
    parts = [write_film(tmp_path / f"{t}.ts", moving_square(5), seconds=[t + i / 10 for i in range(5)]) for t in (7, 2)]
    address = serve(*(part.read_bytes() for part in parts))
    video, found = open_video(address, reconnect=10), []
    with pytest.raises(BrokenVideo, match="the stream ended, and did not come back within 10 seconds; 10 frames"):
        found.extend(video.frames)
    first, again = [0, 0.1, 0.2, 0.3, 0.4], [0.9, 1.0, 1.1, 1.2, 1.3]  # half a second passed
    assert [frame.seconds for frame in found] == pytest.approx(first + again, abs=5e-3)
    assert difference([frame.image for frame in found], 2 * moving_square(5)) < 6
    assert stopwatch.rests == [0.5, 0.5, 1, 2, 4, 2.5]  # growing, and 10 seconds in all
    said = capsys.readouterr().err.splitlines()
    assert said == 2 * [f"{address}: the stream ended; trying for 10 seconds to open it again"]


def test_a_connection_without_a_frame_is_no_return(tmp_path, stopwatch):
    content = write_film(tmp_path / "film.ts", moving_square(5)).read_bytes()
    video, found = open_video(serve(content, b"", content[:188], content), reconnect=10), []
    with pytest.raises(BrokenVideo, match="10 frames could be decoded"):
        found.extend(video.frames)
    assert stopwatch.rests[:4] == [0.5, 1, 2, 0.5]
    assert [found[i].seconds for i in (4, 5)] == pytest.approx([0.4, 0.4 + 3.5], abs=5e-3)


def test_a_stream_that_comes_back_with_another_size_is_refused(tmp_path, stopwatch):
    parts = [write_film(tmp_path / f"{h}.ts", moving_square(5, h, 2 * h)) for h in (48, 64)]
    frames = open_video(serve(*(part.read_bytes() for part in parts)), reconnect=10).frames
    assert [next(frames).image.shape for _ in range(5)] == [(48, 96, 3)] * 5
    with pytest.raises(BrokenVideo, match="frame 5 has 128x64 pixels, expected 96x48"):
        next(frames)


def test_what_has_an_end_is_not_opened_again_after_it(tmp_path, stopwatch):
    write_film(tmp_path / "film.ts", moving_square(5))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert len(read(f"http://127.0.0.1:{server.server_port}/film.ts", reconnect=10)) == 5
        server.shutdown()
    assert len(read(tmp_path / "film.ts", reconnect=10)) == 5
    assert stopwatch.rests == []


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match="reconnect: found -1, expected 0 or more seconds"):
        open_video("tcp://127.0.0.1:1", reconnect=-1)
