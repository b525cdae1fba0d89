"""Checkpoints to share: a folder of weights and a model card, and its repository on the Hub of Hugging Face."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml

from instanceformer.checkpoints.checkpoint import Checkpoint, write
from instanceformer.checkpoints.loading import WEIGHTS, is_repository, read
from instanceformer.files import hash_file

CARD = "README.md"
METRICS = ("AP", "AP50", "AP75", "AR1", "AR10", "HOTA", "IDF1", "IDSW")
"""Those of a test's metrics that a model card shows."""


@dataclass(frozen=True)
class CardOptions:
    """What the model card of shared weights says beside what the checkpoint knows.

    Attributes:
        name: title of the card; null: the name of the folder. By ``OWNER/NAME`` the card loads the weights from the
            Hub; with any other name from the folder.
        license: of the weights, such as cc-by-4.0, by the Hub's name for it; null: the card says that none is stated.
        trained_on: what the weights were trained on; null: the data in the configuration of ``run``.
        run: folder of the training and test; null: that of the checkpoint. Metrics are taken from it if its test was of
            these very weights.
    """

    name: str | None = None
    license: str | None = None
    trained_on: str | None = None
    run: Path | None = None


def save(checkpoint: Checkpoint, folder: Path, options: CardOptions = CardOptions()) -> None:
    """Write ``model.safetensors`` and a model card, ``README.md``, unless one is there that somebody may have edited.

    Args:
        checkpoint: to share.
        folder: created if missing.
        options: of the card.

    Raises:
        OSError: a file cannot be written.
        ValueError: the run's files are damaged.
    """
    title = options.name or folder.resolve().name
    place = folder.name if folder.is_absolute() else folder.as_posix()  # the rest of its path is nobody's business
    card = write_card(checkpoint, options, title, title if is_repository(title) else place)
    write(checkpoint, folder / WEIGHTS)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(card)


def push(
    checkpoint: Checkpoint, repository: str, options: CardOptions = CardOptions(), private: bool | None = None
) -> str:
    """Upload what ``save`` writes to the Hub, in one commit.

    Args:
        checkpoint: to share.
        repository: ``OWNER/NAME``, created if missing.
        options: of the card.
        private: whether a new repository is; None: as its owner's settings say.

    Returns:
        The address of the commit.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: the Hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with TemporaryDirectory() as folder:
        write(checkpoint, Path(folder) / WEIGHTS)
        (Path(folder) / CARD).write_text(write_card(checkpoint, options, options.name or repository, repository))
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights and model card"))


def write_card(checkpoint: Checkpoint, options: CardOptions, title: str, source: str) -> str:
    """The text of a model card: how to use the weights, data, metrics and license.

    Args:
        checkpoint: to share.
        options: of the card.
        title: of the card.
        source: by which the card loads the weights: a folder or a repository.
    """
    head = {"library_name": "instanceformer", "tags": ["video-instance-segmentation", "instanceformer"]}
    if options.license is not None:
        head["license"] = options.license
    file = Path(checkpoint.name)
    run = options.run or (file.parent if file.is_file() else None)
    classes = ", ".join(category.name for category in checkpoint.categories) or "not named"
    size = "" if checkpoint.frame_size is None else f"Frames are seen at {checkpoint.frame_size.size} pixels.\n"
    return f"""---
{yaml.safe_dump(head, sort_keys=True).strip()}
---

# {title}

Weights of [InstanceFormer](https://arxiv.org/abs/2208.10547) for online video instance segmentation: to find, segment,
classify and follow the objects in a video, frame by frame. They need the Python package `instanceformer`.

## Use

A film with masks, classes and ids, from a video of yours:

```bash
instanceformer segment street.mp4 --checkpoint {shlex.quote(source)} --output film.mp4
```

The same in Python, frame by frame:

```python
from instanceformer import VideoInstanceSegmenter

segmenter = VideoInstanceSegmenter.from_checkpoint({json.dumps(source)})
for instances in segmenter.segment("street.mp4"):  # a file, a folder of images, a stream or a camera
    for identity, label, score in zip(instances.ids, instances.labels, instances.scores, strict=True):
        print(int(identity), segmenter.categories[int(label)].name, float(score))
    print(instances.boxes, instances.masks.shape)  # pixels; (n, height, width)
```

## Data

Trained on {options.trained_on or (run and _find_data(run)) or "data that is not stated"}.
Classes: {classes}.
{size}
## Metrics

{(run and _find_metrics(run, checkpoint)) or "None are stated."}

## License

{options.license or "None is stated: ask the authors before you use the weights."}
"""


def _find_data(run: Path) -> str | None:
    """The training data in a run's configuration: the dataset's name, or the end of the annotations' path."""
    path = run / "config.yaml"
    try:
        data = yaml.safe_load(path.read_text())["data"] if path.is_file() else {}
        if data.get("name"):
            return str(data["name"])
        annotations = (data.get("train") or {}).get("annotations")
        return None if annotations is None else _end(annotations)
    except (yaml.YAMLError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: found no configuration of a training; give --trained_on and another --run"
        ) from error


def _find_metrics(run: Path, checkpoint: Checkpoint) -> str | None:
    """A table of the metrics of a run's test if it was of the checkpoint's file, and this has its weights still."""
    path, file = run / "results.metrics.json", Path(checkpoint.name)
    if not path.is_file() or not file.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        metrics, tested = content["metrics"], content["run"]["weights"]
        on = content.get("files", {}).get("annotations")
        rows = [f"| {name} | {metrics[f'test/{name}']:.3f} |" for name in METRICS if f"test/{name}" in metrics]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: found no metrics of a test; run `instanceformer test` again") from error
    if hash_file(file) != tested:
        return None
    weights = read(file).weights
    if not all(torch.equal(weight.cpu(), weights[name]) for name, weight in checkpoint.weights.items()):
        return None
    return "\n".join(
        [f"Of a test on {_end(on)}:" if on else "Of a test:", "", "| metric | figure |", "| --- | --- |", *rows]
    )


def _end(path: str) -> str:
    """The last folder and the name of a file: what of its path may be told."""
    return "/".join(Path(path).parts[-2:])
