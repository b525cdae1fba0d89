"""The command line: the stock LightningCLI for what a Trainer does, a parser each for the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from instanceformer.data.catalog import CATALOG, CatalogSplit, DatasetName, locate
from instanceformer.data.check import check_dataset
from instanceformer.data.datamodule import VideoDataModule
from instanceformer.data.importers import import_binary_masks, import_cocovid, import_davis, import_mots
from instanceformer.data.synthetic import SyntheticOptions, synthesize
from instanceformer.data.writing import write_youtube_vis
from instanceformer.evaluation.video_ap import evaluate_files
from instanceformer.inference.options import SegmenterOptions
from instanceformer.inference.segment import SegmentOutputs, segment_video
from instanceformer.inference.segmenter import VideoInstanceSegmenter
from instanceformer.inference.video_io import BrokenVideo, open_video
from instanceformer.training.callbacks import ResultsWriter
from instanceformer.training.module import InstanceFormerModule


class SaveTrainingConfig(SaveConfigCallback):
    """Keeps the configuration of a training beside it; a later test does not replace it with its own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save at the start of ``fit``."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class InstanceFormerCLI(LightningCLI):
    """LightningCLI with the option ``--results.path`` of ``test`` and ``predict``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the writer of result files to every run."""
        parser.add_lightning_class_args(ResultsWriter, "results")


def run_synthesize(args: Sequence[str]) -> None:
    """Make a dataset of moving, occluding shapes in YouTube-VIS format."""
    parser = ArgumentParser(prog="instanceformer synthesize", description=run_synthesize.__doc__)
    parser.add_argument("directory", type=Path, help="where train.json, valid.json and JPEGImages/ go")
    parser.add_argument("--overwrite", action="store_true", help="replace what the directory holds")
    parser.add_class_arguments(SyntheticOptions)
    found = parser.parse_args(list(args))
    options = SyntheticOptions(**{field.name: found[field.name] for field in fields(SyntheticOptions)})
    print(synthesize(found.directory, options, overwrite=found.overwrite))


def run_evaluate(args: Sequence[str]) -> None:
    """Compare a results file with ground truth: the official AP and AR."""
    parser = ArgumentParser(prog="instanceformer evaluate", description=run_evaluate.__doc__)
    parser.add_argument("ground_truth", type=Path, help="annotations in YouTube-VIS format")
    parser.add_argument("results", type=Path, help="results.json in the challenge's format")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = parser.parse_args(list(args))
    evaluation = evaluate_files(found.ground_truth, found.results)
    if found.json:
        print(json.dumps({**evaluation.summary, "per_category": evaluation.per_category}))
    else:
        print("\n".join(f"{name:6} {value:7.4f}" for name, value in evaluation.summary.items()))


def run_import(args: Sequence[str]) -> None:
    """Turn a video export of a labelling tool, or label images, into an annotation file in YouTube-VIS format."""
    parser = ArgumentParser(prog="instanceformer import", description=run_import.__doc__)
    parser.add_argument(
        "format",
        type=Literal["cocovid", "davis", "mots", "masks"],
        help="cocovid: COCO-style JSON of images that belong to videos; davis: label images whose values are "
        "instances; mots: of values class * 1000 + instance; masks: a folder of binary masks for each instance",
    )
    parser.add_argument("source", type=Path, help="the JSON file, or the folder of the videos' label images")
    parser.add_argument("output", type=Path, help="annotation file to write")
    parser.add_argument("--images", type=Path, help="folder of the videos' frames; not of a cocovid, which names them")
    parser.add_argument("--names", type=Path, help="JSON file {video: {instance: category}} for davis and masks")
    found = parser.parse_args(list(args))
    if (found.format == "cocovid") == (found.images is not None):
        parser.error(f"--images: expected {'none' if found.images else 'a folder'} for {found.format}")
    if found.names is not None and found.format not in ("davis", "masks"):
        parser.error(f"--names: expected none, since {found.format} has categories of its own")
    match found.format:
        case "cocovid":
            dataset = import_cocovid(found.source)
        case "davis":
            dataset = import_davis(found.source, found.images, found.names)
        case "mots":
            dataset = import_mots(found.source, found.images)
        case _:
            dataset = import_binary_masks(found.source, found.images, found.names)
    write_youtube_vis(found.output, dataset)
    instances = sum(len(video.instances) for video in dataset.videos)
    print(f"{len(dataset.videos)} videos with {instances} instances written to {found.output}")


def run_check(args: Sequence[str]) -> None:
    """Look for what is wrong with a dataset, before a long run finds out."""
    parser = ArgumentParser(prog="instanceformer check", description=run_check.__doc__)
    parser.add_argument("annotations", type=Path, nargs="?", help="JSON file; may be left out with --root and --name")
    parser.add_argument("--images", type=Path, help="folder of the frames; without it they are not looked for")
    parser.add_argument("--decode", action="store_true", help="read every frame")
    parser.add_argument("--root", type=Path, help="folder of all datasets, such as ROOT/ovis")
    parser.add_argument("--name", type=DatasetName, help="dataset of the catalogue that is expected")
    parser.add_argument("--split", type=CatalogSplit, default="train", help="split of that dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = parser.parse_args(list(args))
    annotations, images = found.annotations, found.images
    if annotations is None:
        if found.root is None or found.name is None:
            parser.error("expected an annotation file, or --root and --name")
        annotations, located = locate(found.root, found.name, found.split)
        images = images or located
    entry = None if found.name is None else CATALOG[found.name]
    split = None if entry is None else entry.splits.get(found.split)
    report = check_dataset(annotations, images, decode=found.decode, entry=entry, split=split)
    print(json.dumps(report.to_json()) if found.json else report)
    if not report.is_sound:
        sys.exit(1)


def run_segment(args: Sequence[str]) -> None:
    """Find and follow the objects of a video: the video with masks and ids, a results file, label images."""
    parser = ArgumentParser(prog="instanceformer segment", description=run_segment.__doc__)
    parser.add_argument("video", help="video file, folder of images, stream address or number of a camera")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the network")
    parser.add_class_arguments(SegmentOutputs)
    parser.add_argument("--start", type=int, default=0, help="number of the first frame, from 0")
    parser.add_argument("--end", type=int, help="number of the first frame not to look at any more")
    parser.add_argument("--stride", type=int, default=1, help="every how many frames to look at one")
    parser.add_argument("--fps", type=float, default=25.0, help="frames per second of a folder of images")
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU if there is one when left out")
    parser.add_class_arguments(SegmenterOptions, skip={"compile"})
    parser.add_argument("--compile", action="store_true", help="compile the network: slow to begin with, faster later")
    found = parser.parse_args(list(args))
    outputs = SegmentOutputs(**{field.name: found[field.name] for field in fields(SegmentOutputs)})
    options = SegmenterOptions(**{field.name: found[field.name] for field in fields(SegmenterOptions)})
    if outputs.output is not None and outputs.output.resolve() == Path(found.video).resolve():
        parser.error(f"--output: found {outputs.output}, the video itself, expected another name")
    video = open_video(found.video, found.fps)
    segmenter = VideoInstanceSegmenter.from_checkpoint(found.checkpoint, found.device, options)
    try:
        count = segment_video(
            video, segmenter, outputs, start=found.start, end=found.end, stride=found.stride, progress=True
        )
    except BrokenVideo as error:
        raise ValueError(f"{error}; what was seen is written") from error
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{count} frames; written: {', '.join(str(path) for path in vars(outputs).values() if path is not None)}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "synthesize": run_synthesize,
    "import": run_import,
    "check": run_check,
    "evaluate": run_evaluate,
    "segment": run_segment,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``instanceformer ARGS``.

    Args:
        args: without the program's name; None takes the process's own.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given and given[0] in COMMANDS:
        try:
            COMMANDS[given[0]](given[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"instanceformer {given[0]}: {error}")
        return
    others = "; ".join(f"{name}: {run.__doc__}" for name, run in COMMANDS.items())
    InstanceFormerCLI(
        InstanceFormerModule,
        VideoDataModule,
        args=None if args is None else given,
        parser_kwargs={"epilog": f"Besides these: {others}"},
        save_config_callback=SaveTrainingConfig,
        save_config_kwargs={"overwrite": True},
    )
