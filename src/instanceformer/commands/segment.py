"""``instanceformer segment``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from threading import current_thread, main_thread
from typing import TypeVar

from instanceformer.checkpoints.checkpoint import few
from instanceformer.commands.parsing import Parser, one_line
from instanceformer.inference.batch import find_sources, is_path, place_outputs
from instanceformer.inference.optimize import keep_memory
from instanceformer.inference.outputs import SegmentOutputs, refuse_same, segment_video
from instanceformer.inference.results_files import STANDARD_OUTPUT
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.video.reading import open_video

T = TypeVar("T")
OUTPUTS = ("output", "results", "masks", "jsonl")
DEFAULTS = (
    "If it is not said where to write, the film of street.mp4 is street_instances.mp4 beside it. With several videos "
    "--output, --results and --masks are folders, finished videos are left as they are, and one that cannot be "
    "read does not end the others. What is left out of the tracks' rules is as the checkpoint says, or else "
    + ", ".join(f"{name} {value}" for name, value in vars(SegmenterOptions()).items() if value not in (None, False))
    + "."
)


def run(args: Sequence[str]) -> None:
    """Find and follow the objects in videos; write films with masks and ids, results files, label images."""
    parser = Parser(prog="instanceformer segment", description=f"{run.__doc__} {DEFAULTS}")
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="video",
        help="video file, folder of images, stream address or number of a camera; several, or a folder of videos",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="of the network: a file, the folder of a run or of shared weights, or OWNER/NAME on the Hub",
    )
    parser.add_class_arguments(SegmentOutputs, skip={"overwrite", "view"})
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
    parser.add_argument("--start", type=int, default=0, help="number of the first frame, from 0")
    parser.add_argument("--end", type=int, help="number of the frame before which to stop")
    parser.add_argument("--stride", type=int, default=1, help="look at one frame in so many")
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of a folder of images")
    parser.add_argument(
        "--reconnect",
        type=float,
        default=0.0,
        help="seconds for which to try to open a camera or live stream again that dropped; 0: its end is the video's",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU if there is one when left out")
    parser.add_class_arguments(SegmenterOptions, skip={"classes", "compile"})
    parser.add_argument("--classes", help="names of the classes to show, such as person,car; all when left out")
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to begin with, faster later")
    parser.add_argument(
        "--view",
        action="store_true",
        help="show the videos on a page as they are segmented, once a browser has opened it; nothing is written then "
        "unless it is said where",
    )
    parser.add_argument(
        "--view_host", default="127.0.0.1", help="address of the page; 0.0.0.0: other machines reach it too"
    )
    parser.add_argument("--view_port", type=int, default=8000, help="port of the page; 0: any that is free")
    rules = [option.name for option in fields(SegmenterOptions) if option.name != "compile"]
    parser.set_defaults(dict.fromkeys(rules))
    given = parser.parse_args(list(args))
    options = {name: given[name] for name in rules if given[name] is not None} | {"compile": given.compile}
    if given.classes is not None:
        options["classes"] = tuple(given.classes.split(","))

    sources = find_sources(given.videos)
    several = len(given.videos) > 1 or sources != given.videos
    paths = {name: given[name] for name in OUTPUTS}
    places = place_outputs(sources, several, paths, given.format, given.overwrite, given.view)
    for source, outputs in zip(sources, places, strict=True):
        refuse_same({"video": source, "checkpoint": given.checkpoint, **outputs.paths})
        if not several:
            outputs.refuse_existing()  # before the network is loaded
    if not given.view and any(given[name] != parser.get_default(name) for name in ("view_host", "view_port")):
        raise ValueError("view_host, view_port: found an address for a page, expected --view with it")
    if given.view:
        from instanceformer.inference import live  # here, since importing its server takes a while

    listener = live.listen(given.view_host, given.view_port) if given.view else None
    keep_memory()
    for name in ("SIGTERM", "SIGHUP"):  # complete the outputs, as after Ctrl-C
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL and current_thread() is main_thread():
            signal.signal(number, signal.default_int_handler)
    part = {"start": given.start, "end": given.end, "stride": given.stride}
    log = sys.stderr if given.jsonl == STANDARD_OUTPUT else sys.stdout
    failed: list[str] = []

    def attempt(source: str, work: Callable[[], T]) -> T | None:
        """Do something for a video; with several of them, report what is wrong and go on."""
        try:
            return work()
        except (OSError, ValueError) as error:
            if not several:
                raise
            failed.append(source)
            line = one_line(error)
            print(f"instanceformer segment: {line if source in line else f'{source}: {line}'}", file=sys.stderr)
            return None

    segmenter: VideoInstanceSegmenter | None = None
    skipped, on_frame = 0, None
    with ExitStack() as stack:
        for source, outputs in zip(sources, places, strict=True):
            if several and not given.overwrite and outputs.are_there():
                skipped += 1
                continue
            video = attempt(source, partial(open_video, source, given.fps, given.reconnect))
            if video is None:
                continue
            if segmenter is None:
                segmenter = VideoInstanceSegmenter.from_checkpoint(given.checkpoint, given.device, **options)
                if listener is not None:
                    view = stack.enter_context(live.LiveView(listener, segmenter))
                    on_frame = view.show
                    print(f"open {live.address(listener)} in a browser; the video waits for it", file=sys.stderr)
                    view.wait()
                    if not is_path(source):  # a stream may have given up on us, and what it has sent is late
                        del video
                        video = attempt(source, partial(open_video, source, given.fps, given.reconnect))
                        if video is None:
                            continue
            if several:
                outputs = replace(outputs, overwrite=True)  # where only some of them are there
            segment = partial(segment_video, **part, whole=several, on_frame=on_frame, progress=True)
            done = attempt(source, partial(segment, video, segmenter, outputs))
            if done is not None:
                written = ", ".join(map(str, outputs.paths.values())) or "nothing"
                print(f"{done}; written: {written}", file=log, flush=True)
                if done.tracks == 0:
                    print(say_nothing_was_found(segmenter), file=sys.stderr)
    if several:
        now = len(sources) - skipped - len(failed)
        print(f"{len(sources)} videos: {now} segmented, {skipped} finished before, {len(failed)} failed", file=log)
    if failed:
        sys.exit(1)


def say_nothing_was_found(segmenter: VideoInstanceSegmenter) -> str:
    """What to do about a video without any track."""
    options = segmenter.options
    names = options.classes or [category.name for category in segmenter.categories]
    lower = f"--birth {options.birth / 2:g}" + (f" --show {options.birth / 2:g}" * (options.show > options.birth / 2))
    return (
        f"no track was ever shown: nothing reached a confidence of {options.birth:g} as one of the classes "
        f"{few(names)}; if the video shows one of these, try {lower}, else another checkpoint"
    )
