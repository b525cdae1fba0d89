"""The report in Debian's Chromium: it opens, plays, jumps, and can be read by everyone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from tests.report.cases import FRAMES, MIDDLE, read_instances

from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.overlap import decode_tracks
from instanceformer.inference.render import instance_color
from instanceformer.report.page import ReportOptions, write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
CONTRASTS = """
() => {
  const parse = (color) => {
    const [red, green, blue, alpha = 1] = color.match(/[\\d.]+/g).map(Number);
    return { rgb: [red, green, blue], alpha };
  };
  const luminance = ({ rgb }) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = rgb.map((x) => linear(x / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.alpha === 1) return color;
      if (color.alpha > 0) throw new Error(`translucent background: ${at.className}`);
    }
    throw new Error("no background");
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || element.closest("script, style")) continue;
    const style = getComputedStyle(element);
    const color = parse(element instanceof SVGElement ? style.fill : style.color);
    const [low, high] = [luminance(color), luminance(behind(element))].sort((a, b) => a - b);
    const name = `${element.tagName} ${element.getAttribute("class")}: ${text.slice(0, 40)}`;
    found.push([(high + 0.05) / (low + 0.05), name]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report([run], path, ReportOptions(figures=1)) == 3
    return path


def open_page(browser: Browser, report: Path, width: int = 1280, scheme: str = "light") -> Page:
    """The page once its first frame is drawn; anything that it asks for or complains about fails the test."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(60_000)  # on a busy machine
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-video]", state="attached")
    page.said = said  # type: ignore[attr-defined]
    return page


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    page = open_page(browser, report)
    yield page
    assert page.said == [report.as_uri()]  # type: ignore[attr-defined]
    page.close()


def frame(page: Page) -> int:
    return int(page.get_attribute("html", "data-frame") or -1)


def choose(page: Page, video: str) -> None:
    page.get_by_role("button", name=video).click()
    page.wait_for_function("name => document.getElementById('film-title').textContent === name", arg=video)


def test_it_opens_without_a_complaint_or_a_request(page: Page, report: Path) -> None:
    assert page.title() == "Report: spoiled"
    assert page.locator("#position").inner_text() == f"frame 1 of {FRAMES}"
    assert not re.findall(r"(?:src|href|url)\W+https?:", report.read_text())


def test_it_plays_to_the_end_and_from_there_again(page: Page) -> None:
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.documentElement.dataset.frame > 2")
    page.get_by_role("button", name="Pause").click()
    stopped = frame(page)
    page.wait_for_timeout(400)
    assert frame(page) == stopped
    page.get_by_role("button", name="Play").click()
    page.wait_for_function(f"document.documentElement.dataset.frame == {FRAMES - 1}")
    page.get_by_role("button", name="Play").click()  # it has stopped by itself
    page.wait_for_function("document.documentElement.dataset.frame == 1")


def test_keys_step_jump_and_play(page: Page) -> None:
    page.locator("#screens").focus()
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 11), ("Home", 0)):
        page.keyboard.press(key)
        assert frame(page) == expected
    page.keyboard.press("Space")
    page.wait_for_function("document.documentElement.dataset.frame > 0")
    page.keyboard.press("Space")
    assert page.locator("#play").inner_text() == "Play"


def test_the_slider_and_the_buttons_move_the_frame(page: Page) -> None:
    page.locator("#slider").fill("5")
    assert frame(page) == 4
    for name, expected in (("Next frame", 5), ("Last frame", 11), ("Previous frame", 10), ("First frame", 0)):
        page.get_by_role("button", name=name).click()
        assert frame(page) == expected
    assert page.locator("#slider").get_attribute("aria-valuetext") == f"frame 1 of {FRAMES}"


def test_a_cell_of_the_timeline_jumps_by_click_and_by_key(page: Page) -> None:
    choose(page, "valid_0000")
    captured = page.locator(".timeline td.captured").first
    captured.click()
    assert frame(page) == int(captured.get_attribute("data-frame") or -1) >= MIDDLE
    page.keyboard.press("Home")  # moves the focus, not the frame
    assert frame(page) >= MIDDLE
    page.keyboard.press("Enter")
    assert frame(page) == 0
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("frame 1: right")
    assert page.locator('.timeline [tabindex="0"]').count() == 1  # one stop of the Tab key


@pytest.mark.parametrize(("video", "state"), [("valid_0000", "captured"), ("valid_0001", "lost")])
def test_a_mistake_is_listed_and_jumps_to_its_first_frame(page: Page, video: str, state: str) -> None:
    choose(page, video)
    listed = page.locator(".mistakes button").filter(has_text=f"is {state} in").first
    listed.click()
    assert frame(page) == int(listed.get_attribute("data-first") or -1) >= MIDDLE
    assert page.locator(f".timeline .now.{state}").count() >= 1


def test_the_script_decodes_masks_as_pycocotools_does(page: Page, annotations: Path) -> None:
    masks = [mask for each in read_instances(annotations) for mask in each["segmentations"] if mask]
    areas = page.evaluate("masks => masks.map((m) => readMask(m.counts, ...m.size).area)", masks)
    (track,) = decode_tracks([[mask["counts"].encode() for mask in masks]], (64, 96))
    assert areas == track.areas.tolist()


def test_masks_lie_on_the_instances_in_the_colors_of_their_numbers(page: Page, annotations: Path) -> None:
    choose(page, "valid_0000")
    (video,) = [video for video in read_annotations(annotations).videos if video.id == 1]
    masks = video.decode_masks(video.instances, [0])[0].bool().numpy()
    number = 1 + int(np.argmax(masks.sum(axis=(1, 2))))
    alone = masks[number - 1] & (masks.sum(axis=0) == 1)
    inner = alone[:-2, :-2] & alone[2:, 2:] & alone[:-2, 2:] & alone[2:, :-2]
    ys, xs = np.nonzero(inner[30:])  # below the labels
    x, y = int(xs[0]) + 1, int(ys[0]) + 31
    look = """([x, y]) => {
      const [canvas, frame] = [canvases[0], player.images[player.frame]];
      const scale = canvas.width / player.film.width;
      const plain = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
      plain.drawImage(frame, 0, 0, canvas.width, canvas.height);
      const at = [(x + 0.5) * scale, (y + 0.5) * scale, 1, 1].map(Math.round);
      return [canvas.getContext("2d"), plain].map((context) => [...context.getImageData(...at).data].slice(0, 3));
    }"""
    drawn, plain = np.array(page.evaluate(look, [x, y]))
    np.testing.assert_allclose(drawn, 0.55 * plain + 0.45 * np.array(instance_color(number)), atol=3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_both_themes(browser: Browser, report: Path, scheme: str) -> None:
    page = open_page(browser, report, scheme=scheme)
    for theme in (scheme, "dark" if scheme == "light" else "light"):
        found = page.evaluate(CONTRASTS)
        assert len(found) > 200
        assert [each for each in found if each[0] < 4.5] == [], theme
        page.locator("#theme").click()
    page.close()


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_the_page_never_scrolls_sideways(browser: Browser, report: Path, width: int) -> None:
    page = open_page(browser, report, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate("getComputedStyle(document.querySelector('.stage')).gridTemplateColumns.split(' ').length")
    assert columns == (2 if width == 1280 else 1)
    page.close()


def test_everything_has_a_name_and_a_place(page: Page) -> None:
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1, landmark  # type: ignore[arg-type]
    assert page.locator("img:not([alt]), canvas:not([aria-label]), [role=img]:not([aria-label])").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    for link in page.locator("nav a, a.skip").all():
        assert page.locator(link.get_attribute("href") or "none").count() == 1
    assert page.locator("#position").get_attribute("aria-live") == "polite"
    assert re.fullmatch(
        r"Ground truth, frame 1 of 12: number .+", page.locator("canvas").first.get_attribute("aria-label")
    )


def test_the_tab_key_shows_where_it_is(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the videos"
    visited = set()
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement !== document.body"):
        visited.add(page.evaluate("document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", page.evaluate("document.activeElement.outerHTML.slice(0, 80)")
        page.keyboard.press("Tab")
    assert {"theme", "screens", "play", "slider"} <= visited


def test_two_runs_are_side_by_side(browser: Browser, run: Path, other_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.html"
    write_report([run, other_run], path)
    page = open_page(browser, path)
    assert page.locator("#screens figcaption").all_inner_texts() == ["Ground truth", "spoiled", "perfect"]
    assert page.locator("table.numbers").first.locator("tbody tr").first.inner_text().split("\t")[2:3] == ["1.000"]
    choose(page, "valid_0000")
    assert page.locator(".timeline").count() == 2
    assert page.locator(".timeline").last.locator("td.captured, td.lost").count() == 0
    assert page.said == [path.as_uri()]  # type: ignore[attr-defined]
    page.close()
