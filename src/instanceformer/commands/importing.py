"""``instanceformer import``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from instanceformer.commands.parsing import Parser
from instanceformer.data.formats.cocovid import import_cocovid
from instanceformer.data.formats.label_images import import_binary_masks, import_davis, import_mots
from instanceformer.data.formats.youtube_vis import write_youtube_vis


def run(args: Sequence[str]) -> None:
    """Turn a video export of a labeling tool, or label images, into an annotation file in YouTube-VIS format."""
    parser = Parser(prog="instanceformer import", description=run.__doc__)
    parser.add_argument(
        "format",
        type=Literal["cocovid", "davis", "mots", "masks"],
        help="cocovid: COCO-style JSON of images that belong to videos; davis: label images whose values are "
        "instances, or RGB images whose colors are; mots: of values class * 1000 + instance; masks: a folder of binary "
        "masks for each instance",
    )
    parser.add_argument("source", type=Path, help="the JSON file, or the folder of the videos' label images")
    parser.add_argument("output", type=Path, help="annotation file to write")
    parser.add_argument("--images", type=Path, help="folder of the videos' frames; not of a cocovid, which names them")
    parser.add_argument(
        "--names",
        type=Path,
        help="JSON file of the instances' categories, for davis and masks, such as "
        '{"street": {"1": "car", "2": "person"}} for the folder street with the instances 1 and 2; instances that are '
        'colors go by them: {"street": {"#ff0000": "car"}}',
    )
    parser.add_argument(
        "--other_videos",
        action="store_true",
        help="the names may be of other videos too, so that the splits of a dataset have the same categories",
    )
    parser.add_argument(
        "--merge_parts",
        action="store_true",
        help="where a cocovid has several annotations of one track in a frame, take the union of their masks",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    given = parser.parse_args(list(args))
    if given.output.exists() and (not given.overwrite or given.output.samefile(given.source)):
        raise FileExistsError(
            f"{given.output} exists; give another output, or --overwrite to replace one of an earlier run"
        )
    if (given.format == "cocovid") == (given.images is not None):
        parser.error(f"--images: expected {'none' if given.images else 'a folder'} for {given.format}")
    if given.names is not None and given.format not in ("davis", "masks"):
        parser.error(f"--names: expected none, since {given.format} has categories of its own")
    if given.other_videos and given.names is None:
        parser.error("--other_videos: expected --names, the file with the names of other videos too")
    if given.merge_parts and given.format != "cocovid":
        parser.error(f"--merge_parts: expected none for {given.format}, which has one mask of an instance in a frame")
    match given.format:
        case "cocovid":
            dataset = import_cocovid(given.source, merge_parts=given.merge_parts)
        case "davis":
            dataset = import_davis(given.source, given.images, given.names, other_videos=given.other_videos)
        case "mots":
            dataset = import_mots(given.source, given.images)
        case "masks":
            dataset = import_binary_masks(given.source, given.images, given.names, other_videos=given.other_videos)
    write_youtube_vis(given.output, dataset)
    instances = sum(len(video.instances) for video in dataset.videos)
    print(f"{len(dataset.videos)} videos with {instances} instances written to {given.output}")
