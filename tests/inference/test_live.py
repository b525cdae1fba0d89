"""The page of ``segment --view``: in Chromium, as other pages would abuse it, and with the command itself."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from tests import processes
from tests.inference.conftest import SHOW_ALL, fail, shape_of
from tests.inference.films import moving_square, write_film

from instanceformer import InstanceFormer, VideoInstanceSegmenter
from instanceformer.cli import main
from instanceformer.inference.batch import place_outputs
from instanceformer.inference.live import LiveView, Shown, address, draw, is_own, listen
from instanceformer.inference.outputs import SegmentOutputs
from instanceformer.inference.render import instance_color
from instanceformer.inference.tracks import FrameInstances, SegmenterOptions
from instanceformer.video.frames import OpenVideo
from instanceformer.video.reading import open_video

CHROMIUM = shutil.which("chromium")
RULES = {"birth": 0.4, "show": 0.2, "patience": 5}


@pytest.fixture
def segmenter(tiny: Callable[..., InstanceFormer]) -> VideoInstanceSegmenter:
    network = tiny(num_classes=2)
    with torch.no_grad():
        network.mask_head.controller[-1].bias[-1] += 1.0  # masks that are not empty
    return VideoInstanceSegmenter(network, options=SegmenterOptions(birth=0, show=0, max_overlap=1, size=64))


@contextmanager
def streaming(segmenter: VideoInstanceSegmenter) -> Iterator[str]:
    """The address of a page that shows an endless video."""
    listener, stop = listen("127.0.0.1", 0), threading.Event()

    def segment() -> None:
        with LiveView(listener, segmenter) as view:
            for frame in cycle(moving_square(20)):
                view.show(frame, segmenter.step(frame))
                if stop.wait(0.02):
                    return

    thread = threading.Thread(target=segment)
    thread.start()
    where = address(listener)
    try:
        yield where
    finally:
        request(where, "/resume", b"")
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def request(where: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and text of the answer to a GET, or to a POST of a body."""
    connection = http.client.HTTPConnection(urlsplit(where).netloc, timeout=20)
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_stopped(where: str) -> bool:
    """Whether no frame comes any more but the one that may have been on its way."""
    count = read_state(where)["count"]
    time.sleep(0.5)
    return bool(read_state(where)["count"] <= count + 1)


def watch(log: Path, process: BaseProcess) -> str:
    """The address that the command prints, opened."""
    processes.wait_until(lambda: log.exists() and "in a browser" in log.read_text(), process)
    (where,) = re.findall(r"open (http://127\.0\.0\.1:\d+/) in a browser; the video waits for it", log.read_text())
    read_state(where)
    return str(where)


def read_state(where: str) -> dict[str, Any]:
    status, text = request(where, "/next")
    assert status == 200, text
    state: dict[str, Any] = json.loads(text)
    return state


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page; anything that it loads from elsewhere or complains about fails the test."""
    page = browser.new_page()
    page.set_default_timeout(15_000)
    said: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.add(urlsplit(request.url).hostname or ""))
    yield page
    page.close()
    assert said == []
    assert asked == {"127.0.0.1"}


def ids(page: Page) -> list[int]:
    return [int(text.removeprefix("#")) for text in page.locator("#instances td:first-child").all_inner_texts()]


def test_a_browser_sees_the_video_and_controls_the_tracks(page: Page, segmenter: VideoInstanceSegmenter) -> None:
    with streaming(segmenter) as where:
        page.goto(where)
        picture, rows = page.locator("#picture"), page.locator("#instances tr")
        rows.first.wait_for()
        assert page.inner_text("#status") == "running"
        assert picture.evaluate("image => image.naturalWidth") == 64 * 8  # small frames are enlarged
        before = picture.get_attribute("src")
        page.wait_for_function("before => document.getElementById('picture').src !== before", arg=before)
        first = ids(page)
        assert first == sorted(first)
        color = page.evaluate("getComputedStyle(document.querySelector('#instances .color')).backgroundColor")
        assert color == "rgb({}, {}, {})".format(*instance_color(first[0]))  # every query keeps its track

        page.get_by_label("Show").press("End")  # to 1.00
        rows.first.wait_for(state="detached")
        assert rows.count() == 0
        assert page.inner_text("output[for=birth]") == "1.00"  # it never is below Show
        assert page.inner_text("#hidden") == f"Hidden: {', '.join(f'#{id_}' for id_ in first)}"
        page.get_by_label("Show").press("Home")
        rows.first.wait_for()
        assert set(ids(page)) <= set(first)
        page.get_by_label("Birth").press("Home")
        page.get_by_label("Patience").press("ArrowRight")
        wait_until(lambda: read_state(where)["rules"] == {"birth": 0, "show": 0, "patience": 31})
        wait_until(lambda: (segmenter.options.birth, segmenter.options.patience) == (0, 31))

        page.get_by_role("button", name="Pause").press("Enter")
        page.get_by_role("button", name="Resume").wait_for()
        page.wait_for_function("() => document.getElementById('status').textContent === 'paused'")
        assert has_stopped(where)
        page.get_by_role("button", name="Reset").press("Enter")
        page.get_by_role("button", name="Resume").press("Enter")
        page.wait_for_function(
            "last => parseInt(document.querySelector('#instances td')?.textContent.slice(1)) > last", arg=max(first)
        )
    page.wait_for_function("() => document.getElementById('status').textContent === 'ended'")
    assert page.get_by_role("button", name="Pause").is_disabled()


def test_a_page_is_read_on_a_phone_and_connects_again(page: Page, segmenter: VideoInstanceSegmenter) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    with streaming(segmenter) as where:
        page.goto(where)
        page.locator("#instances tr").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        unlabeled = "[...document.querySelectorAll('input')].filter(input => !input.labels.length).length"
        assert page.evaluate(unlabeled) == 0
        page.route("**/next*", lambda route: route.fulfill(status=200, body="no JSON"))
        page.get_by_text("not connected").wait_for()
        page.unroute("**/next*")
        page.get_by_text("running").wait_for()


OWN = [{}, {"Host": "localhost:9000"}, {"Host": "localhost:9000", "Origin": "http://localhost:9000"}]  # a tunnel's end
FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
    {"Host": "localhost:8000", "Origin": "http://evil.example"},
    {"Host": "localhost:8000", "Origin": "http://localhost:3000"},  # another program's page
    {"Host": "localhost:8000", "Origin": "null"},
]


def test_other_pages_are_refused(segmenter: VideoInstanceSegmenter) -> None:
    with streaming(segmenter) as where:
        for headers in FOREIGN:
            for path in ("/", "/page.js", "/next"):
                assert request(where, path, **headers)[0] == 403, headers
            status, text = request(where, "/rules", json.dumps(RULES).encode(), **headers)
            assert (status, text.partition(" ")[0]) == (403, "found"), headers
        assert segmenter.options.patience == 30
        for headers in OWN:
            for path in ("/", "/page.js", "/next"):
                assert request(where, path, **headers)[0] == 200, headers
            assert request(where, "/rules", json.dumps(RULES).encode(), **headers)[0] == 200, headers
        wait_until(lambda: segmenter.options.patience == 5)


def test_numbers_and_names_of_this_machine_are_its_own() -> None:
    assert all(map(is_own, ("127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "localhost", socket.gethostname())))
    assert not any(map(is_own, ("", "[", "evil.example:8000", "localhost.evil.example")))


def test_no_page_may_hold_this_one_in_a_frame(segmenter: VideoInstanceSegmenter) -> None:
    with streaming(segmenter) as where:
        connection = http.client.HTTPConnection(urlsplit(where).netloc)
        connection.request("GET", "/")
        assert "frame-ancestors 'none'" in str(connection.getresponse().getheader("Content-Security-Policy"))


def test_wrong_rules_are_refused(segmenter: VideoInstanceSegmenter) -> None:
    wrong = [
        {**RULES, name: value} for name, value in (("birth", 2), ("birth", 0.1), ("patience", 1e999), ("show", []))
    ]
    bodies = [b"", b"\xff", b"[]", b"{}", b'{"birth": NaN, "show": 0, "patience": 3}']
    with streaming(segmenter) as where:
        for body in bodies + [json.dumps(rules).encode() for rules in wrong]:
            status, text = request(where, "/rules", body)
            assert (status, text.partition(" (")[0]) == (400, "expected birth, show and patience"), body
        assert read_state(where)["rules"] == {"birth": 0, "show": 0, "patience": 30}


def test_viewers_that_are_slow_or_gone_do_not_hold_up_the_segmenter(segmenter: VideoInstanceSegmenter) -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (700, 900, 3), dtype=np.uint8) for _ in range(3)]  # large pictures
    nothing = FrameInstances(*(torch.zeros(0, dtype=torch.int64),) * 3, torch.zeros(0, 4), torch.zeros(0, 700, 900) > 0)
    listener = listen("127.0.0.1", 0)
    where = urlsplit(address(listener))
    with LiveView(listener, segmenter) as view:
        view.show(frames[0], nothing)
        viewers = [socket.create_connection((where.hostname, where.port)) for _ in range(8)]
        for number, viewer in enumerate(viewers):
            viewer.sendall(f"GET /next HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode() * 20)  # and reads nothing
            if number % 2:
                viewer.close()
        begin = time.monotonic()
        for _ in range(20):
            for frame in frames:
                view.show(frame, nothing)
        assert time.monotonic() - begin < 5
        assert read_state(where.geturl())["count"] == 61
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    for viewer in viewers:
        viewer.close()


def test_large_frames_are_drawn_smaller() -> None:
    mask = torch.zeros(1, 1441, 2001, dtype=torch.bool)
    mask[0, 600:900, 900:1200] = True
    one = torch.ones(1, dtype=torch.int64)
    instances = FrameInstances(one, one * 0, one.float(), torch.tensor([[900.0, 600, 1200, 900]]), mask)
    picture = draw(Shown(1, np.zeros((1441, 2001, 3), dtype=np.uint8), instances, 1.0), ["dog"])
    assert picture.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--view", "--view_port=70000"], "view_port: found 70000, expected 1 to 65535, or 0 for any that is free"),
        (
            ["--view", "--view_host=no.such.host.invalid"],
            "found 8000 on no.such.host.invalid, expected a free port on an address",
        ),
        (
            ["--view", "--view_host=192.0.2.1"],
            "view_port: found 8000 on 192.0.2.1, expected a free port on an address of this",
        ),
        (["--view_port=8001"], "view_host, view_port: found an address for a page, expected --view with it"),
    ],
)
def test_wrong_addresses_are_refused(checkpoint: Path, folder: Path, options: list[str], message: str) -> None:
    video = write_film(folder.parent / "video.mp4", moving_square())
    assert message in fail(video, checkpoint, folder, *options)
    assert not list(folder.iterdir())


def test_a_port_in_use_is_refused_in_one_line(checkpoint: Path, folder: Path) -> None:
    video = write_film(folder.parent / "video.mp4", moving_square())
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = fail(video, checkpoint, folder, "--view", f"--view_port={port}")
    assert f"view_port: found {port} on 127.0.0.1, expected a free port" in message
    assert len(message.splitlines()) == 1


def test_the_video_waits_for_a_browser_and_nothing_need_be_written(checkpoint: Path, folder: Path) -> None:
    video, log = write_film(folder / "video.mp4", moving_square(4)), folder.parent / "log"
    process = processes.start(
        ["segment", str(video), f"--checkpoint={checkpoint}", "--view", "--view_port=0", *SHOW_ALL], log
    )
    processes.wait_until(lambda: log.exists() and "in a browser" in log.read_text(), process)
    time.sleep(1.0)  # far longer than four frames take
    assert process.is_alive()
    assert "frame" not in log.read_text()
    where = watch(log, process)
    processes.wait_until(lambda: read_state(where).get("count") == 4, process)
    process.join(30)
    assert process.exitcode == 0
    assert re.search(r"^4 frames, \d+ tracks?; .* frames a second; written: nothing$", log.read_text(), re.MULTILINE)
    assert list(folder.iterdir()) == [video]
    assert place_outputs(["0"], False, {"output": None}, view=True) == [SegmentOutputs(view=True)]  # nor of a camera


def test_the_command_shows_the_video_and_ends_cleanly_when_interrupted(checkpoint: Path, folder: Path) -> None:
    video, log = write_film(folder.parent / "video.mkv", moving_square(600)), folder.parent / "log"
    arguments = ["segment", str(video), f"--checkpoint={checkpoint}", f"--output={folder / 'film.mp4'}"]
    process = processes.start([*arguments, "--view", "--view_port=0", *SHOW_ALL], log)
    where = watch(log, process)
    processes.wait_until(lambda: "image" in read_state(where), process)
    assert request(where, "/pause", b"")[0] == 200
    assert "<title>InstanceFormer" in request(where, "/")[1]
    assert has_stopped(where)
    count = read_state(where)["count"]
    assert processes.kill(process, signal.SIGINT) == 130
    assert log.read_text().rstrip().endswith("segment: interrupted; what was seen until then is written")
    assert "Traceback" not in log.read_text()
    assert len(shape_of(folder / "film.mp4")) in (count, count + 1)


@pytest.mark.parametrize(("source", "times"), [("rtsp://camera/1", 2), ("video.mkv", 1)])
def test_a_stream_is_opened_anew_after_the_wait(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, times: int
) -> None:
    monkeypatch.chdir(folder)
    write_film(Path("video.mkv"), moving_square(4))
    opened: list[str] = []

    def open_one(source: str, fps: float, reconnect: float) -> OpenVideo:
        opened.append(source)
        return open_video(moving_square(2))

    monkeypatch.setattr("instanceformer.commands.segment.open_video", open_one)
    monkeypatch.setattr(LiveView, "wait", lambda _: None)
    main(["segment", source, f"--checkpoint={checkpoint}", "--view", "--view_port=0", *SHOW_ALL])
    assert opened == [source] * times


def test_ctrl_c_ends_the_wait_for_a_browser(checkpoint: Path, folder: Path) -> None:
    video, log = write_film(folder.parent / "video.mkv", moving_square(4)), folder.parent / "log"
    process = processes.start(
        ["segment", str(video), f"--checkpoint={checkpoint}", "--view", "--view_port=0", *SHOW_ALL], log
    )
    processes.wait_until(lambda: log.exists() and "in a browser" in log.read_text(), process)
    assert processes.kill(process, signal.SIGINT) == 130
    assert log.read_text().rstrip().splitlines()[1:] == ["instanceformer segment: interrupted"]
