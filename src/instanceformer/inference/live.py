"""A page on which browsers watch a segmenter at work and change the rules of its tracks."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web
from PIL import Image

from instanceformer.inference.render import css_color, data_uri, draw_instances, readable_scale
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import FrameInstances
from instanceformer.video.frames import Frame

PAGE = Path(__file__).with_name("page")
WAIT = 10.0  # seconds after which a request for the next frame is answered without one
MOST_ROWS = 720  # of a picture; a frame with more is drawn at a half, a third, ...
SPAN = 2.0  # seconds over which the frame rate is measured
RULES = ("birth", "show", "patience")
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def listen(host: str, port: int) -> socket.socket:
    """Take the address at which a page is to be served.

    Args:
        host: name or number of one of this machine's addresses; 127.0.0.1 is reached from this machine alone.
        port: of the page; 0 takes any that is free.

    Raises:
        OSError: another program has the port, or the host is not this machine.
        ValueError: there is no such port.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"view_port: found {port}, expected 1 to 65535, or 0 for any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise OSError(
            f"view_port: found {port} on {host}, expected a free port on an address of this machine; give another "
            f"--view_port, or 0 for any ({reason})"
        ) from error


def address(listener: socket.socket) -> str:
    """Where browsers find the page."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:  # all addresses
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@dataclass(frozen=True)
class Shown:
    """What the page shows: a frame and its instances.

    Attributes:
        count: number of frames up to this one.
        image: (H, W, 3) uint8 RGB.
        instances: of the frame.
        rate: frames per second.
    """

    count: int
    image: Frame
    instances: FrameInstances
    rate: float


@final
class LiveView:
    """Serves the page while a ``with`` block runs.

    The thread that segments calls ``show`` with each frame. Another thread answers the browsers. Each of them asks for
    the newest frame when it has displayed the one before, and only then is it drawn: browsers that are slow, gone or
    many do not hold up the segmenter. What a browser changes takes effect within ``show``.

    Other pages in the same browser can neither read nor change anything: a request is refused if its ``Host`` is a
    name that is not this machine's, or its ``Origin`` another page.

    Args:
        listener: see ``listen``; closed at the end.
        segmenter: to show.
    """

    def __init__(self, listener: socket.socket, segmenter: VideoInstanceSegmenter) -> None:
        self._listener, self._segmenter = listener, segmenter
        self._names = [category.name for category in segmenter.categories]
        self._times: deque[float] = deque()
        self._count = 0
        # written by the thread that answers, read by the one that segments
        self._options = segmenter.options
        self._watched, self._running, self._forgets = (threading.Event() for _ in range(3))
        self._running.set()
        # known to the thread that answers alone
        self._loop = asyncio.new_event_loop()
        self._version, self._ended = 1, False
        self._shown: Shown | None = None
        self._drawn: tuple[Shown, asyncio.Future[str]] | None = None
        self._news = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()], daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._loop.close()

    def wait(self) -> None:
        """Wait until a browser shows the page: a short video would be over before somebody has opened it."""
        _wait_for(self._watched)

    def show(self, image: Frame, instances: FrameInstances) -> None:
        """Show a frame; wait while the page pauses; then do to the segmenter what the page asks for.

        Args:
            image: (H, W, 3) uint8 RGB.
            instances: of the frame.
        """
        self._count += 1
        self._times.append(time.monotonic())
        while self._times[-1] - self._times[0] > SPAN and len(self._times) > 2:
            self._times.popleft()
        rate = (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-3)
        self._loop.call_soon_threadsafe(self._publish, Shown(self._count, image, instances, rate))
        if not self._running.is_set():
            _wait_for(self._running)
            self._times.clear()
        self._segmenter.change_rules(**{name: getattr(self._options, name) for name in RULES})
        if self._forgets.is_set():
            self._forgets.clear()
            self._segmenter.forget()

    def _publish(self, shown: Shown | None = None) -> None:
        """Wake those who wait for news."""
        self._shown = shown or self._shown
        self._version += 1
        self._news.set()
        self._news = asyncio.Event()

    def _end(self) -> None:
        self._ended = True
        self._publish()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[refuse_strangers])
        app.on_response_prepare.append(add_headers)
        app.router.add_get("/", index)
        app.router.add_get("/next", self._next)
        for name in ("rules", "pause", "resume", "reset"):
            app.router.add_post(f"/{name}", self._change)
        app.router.add_static("/", PAGE)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        while not self._ended:
            await self._news.wait()
        if self._drawn is not None:
            await asyncio.sleep(1.0)  # browsers that are displaying a frame ask for the next, and hear of the end
        await runner.cleanup()

    async def _next(self, request: web.Request) -> web.Response:
        """The newest frame and state, once there is news after the version ``after``."""
        self._watched.set()
        after = request.query.get("after", "0")
        try:
            async with asyncio.timeout(WAIT):
                while after == str(self._version) and not self._ended:
                    await self._news.wait()
        except TimeoutError:
            pass
        state: dict[str, Any] = {
            "version": self._version,
            "ended": self._ended,
            "paused": not self._running.is_set(),
            "rules": {name: getattr(self._options, name) for name in RULES},
        }
        if (shown := self._shown) is not None:
            state |= {"count": shown.count, "rate": shown.rate, "hidden": sorted(shown.instances.hidden.tolist())}
            state |= {"instances": self._list(shown.instances), "image": await self._draw(shown)}
        return web.json_response(state)

    async def _change(self, request: web.Request) -> web.Response:
        """Set the rules, pause, resume or reset; the answer is the first version with the change."""
        match request.path:
            case "/rules":
                try:
                    given = await request.json()
                    birth, show, patience = float(given["birth"]), float(given["show"]), int(given["patience"])
                    self._options = replace(self._options, birth=birth, show=show, patience=patience)
                except (KeyError, OverflowError, TypeError, ValueError) as error:
                    raise web.HTTPBadRequest(text=f"expected birth, show and patience ({error})") from error
            case "/pause":
                self._running.clear()
            case "/resume":
                self._running.set()
            case "/reset":
                self._forgets.set()
        self._publish()
        return web.json_response({"version": self._version})

    def _list(self, instances: FrameInstances) -> list[dict[str, Any]]:
        """What the page lists, in the order of ids."""
        columns = zip(*(x.tolist() for x in (instances.ids, instances.labels, instances.scores)), strict=True)
        return [
            {"id": id_, "name": self._names[label], "score": score, "color": css_color(id_)}
            for id_, label, score in sorted(columns)
        ]

    async def _draw(self, shown: Shown) -> str:
        """The picture as a data address, drawn once for all browsers."""
        if self._drawn is None or self._drawn[0] is not shown:
            self._drawn = shown, asyncio.ensure_future(asyncio.to_thread(draw, shown, self._names))
        return await asyncio.shield(self._drawn[1])  # one that goes does not take the others' picture with it


def _wait_for(event: threading.Event) -> None:
    while not event.wait(0.2):  # on Windows, Ctrl-C comes between waits
        pass


def draw(shown: Shown, names: list[str]) -> str:
    """A frame with its instances as the address of a JPEG that holds the JPEG itself."""
    image, instances = shown.image, shown.instances
    factor = -(-image.shape[0] // MOST_ROWS)
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
        masks = instances.masks[:, ::factor, ::factor]
        instances = replace(instances, masks=masks, boxes=instances.boxes / factor)
    picture = draw_instances(image, instances, names, boxes=True, scale=readable_scale(image.shape[0]))
    return data_uri(picture, "jpeg", quality=85)


async def index(request: web.Request) -> web.FileResponse:
    """The page itself."""
    return web.FileResponse(PAGE / "index.html")


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Have no old page displayed, none but this page's own files loaded, and the page in no other's frame."""
    response.headers.update(HEADERS)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def refuse_strangers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests of another page: from its origin, or through a name that it has given to this machine."""
    origin = request.headers.get("Origin")
    if not is_own(request.host) or origin not in (None, f"http://{request.host}"):
        found = f"Host {request.host}" + (f", Origin {origin}" if origin else "")
        raise web.HTTPForbidden(text=f"found {found}, expected the address that `instanceformer segment` printed")
    return await handler(request)


def is_own(host: str) -> bool:
    """Whether a ``Host``, with or without a port, is this machine's name or an address in numbers.

    No page can have numbers of its choice for its name, so that these are safe from DNS rebinding.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name not in ("localhost", socket.gethostname().lower()):
            ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
