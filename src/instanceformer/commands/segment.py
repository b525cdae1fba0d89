"""``instanceformer segment``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import current_thread, main_thread

from instanceformer.commands.parsing import Parser, pick
from instanceformer.inference.optimize import keep_memory
from instanceformer.inference.outputs import SegmentOutputs, refuse_same, segment_video
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.tracks import SegmenterOptions
from instanceformer.video.frames import open_video


def run(args: Sequence[str]) -> None:
    """Find and follow the objects in a video; write a film with masks and ids, a results file, label images."""
    parser = Parser(prog="instanceformer segment", description=run.__doc__)
    parser.add_argument("video", help="video file, folder of images, stream address or number of a camera")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the network")
    parser.add_class_arguments(SegmentOutputs, skip={"overwrite"})
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
    parser.add_class_arguments(SegmenterOptions, skip={"compile"})
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to begin with, faster later")
    given = parser.parse_args(list(args))
    outputs = pick(SegmentOutputs, given)
    options = pick(SegmenterOptions, given)
    refuse_same({"video": given.video, "checkpoint": given.checkpoint, **outputs.paths})
    outputs.refuse_existing()  # before the network is loaded
    keep_memory()
    for name in ("SIGTERM", "SIGHUP"):  # complete the outputs, as after Ctrl-C
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL and current_thread() is main_thread():
            signal.signal(number, signal.default_int_handler)
    video = open_video(given.video, given.fps, given.reconnect)
    segmenter = VideoInstanceSegmenter.from_checkpoint(given.checkpoint, given.device, options)
    part = {"start": given.start, "end": given.end, "stride": given.stride}
    try:
        count = segment_video(video, segmenter, outputs, **part, progress=True)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{count} frames; written: {', '.join(map(str, outputs.paths.values()))}")
