"""Film of one video: its ground truth on the left, the predicted tracks of a result file on the right.

    python scripts/render_results.py ANNOTATIONS.json RESULTS.json --images DIR --output film.mp4 --sheet sheet.png

Tracks are numbered in the order of their scores, 1 the most confident; ground truth in the order of its file. The sheet
is a picture of a few frames, spread evenly over the film.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.results import read_results
from instanceformer.inference.render import contact_sheet, film_results, select_tracks, select_video

SHEET_COLUMNS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Render the film that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="in YouTube-VIS format")
    parser.add_argument("results", type=Path, help="predicted tracks, in the challenge's format")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder that the annotations' file names are relative to"
    )
    parser.add_argument("--output", type=Path, required=True, help="the film, an .mp4")
    parser.add_argument("--video-id", type=int, help="by default the first video of the annotations")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score shown (%(default)s)")
    parser.add_argument("--fps", type=float, default=10, help="frames per second (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="also write a picture of a few frames, a .png")
    options = parser.parse_args(arguments)
    try:
        dataset = read_annotations(options.annotations)
        video = select_video(dataset, options.video_id, options.annotations)
        tracks = select_tracks(read_results(options.results), dataset, video, options.threshold)
        sheet = film_results(dataset, video, tracks, options.images, options.output, options.fps, options.threshold)
    except (ValueError, OSError) as error:
        sys.exit(f"render_results: {error}")
    if options.sheet is not None:
        Image.fromarray(contact_sheet(sheet, SHEET_COLUMNS)).save(options.sheet)
    print(f"{options.output}: {video.length} frames of video {video.id}, {len(tracks)} tracks")


if __name__ == "__main__":
    main()
