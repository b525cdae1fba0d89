"""The documents: every command and every Python example runs on miniatures, every link and every name exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from scripts.miniatures import write_miniatures
from scripts.rehearse import read_rehearsals, small_flags
from tests import processes
from tests.checkpoints.test_convert import build, theirs
from tests.conftest import TINY
from tests.inference.films import moving_square, write_film

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints.sources import RELEASE
from instanceformer.data.annotations import Category
from instanceformer.files import hash_file

PROJECT = Path(__file__).parents[1]
README = PROJECT / "README.md"
DOCUMENTS = [README, *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "kernels" / "README.md"]
ROOTS = [PROJECT, PROJECT / "src" / "instanceformer", PROJECT / "kernels" / "deform_attn"]
"""Folders to which the documents' file names are relative."""
SHAPES = tuple(Category(id_, name) for id_, name in enumerate(("circle", "square", "triangle", "star"), start=1))


@dataclass(frozen=True)
class Row:
    """How commands that begin in one way are run.

    Attributes:
        begins: regular expression for the beginning of the command, its words parted by single spaces.
        flags: what makes it small, appended.
        left_out: why it is not run at all.
    """

    begins: str
    flags: tuple[str, ...] = ()
    left_out: str | None = None


def run_flags(name: str, stage: str) -> tuple[str, ...]:
    return tuple(small_flags(read_rehearsals()[name], real_size=False)[stage])


SMALL_CLIP = ("--size=64", "--end=4")
ROWS = [
    Row("python scripts/rehearse.py", left_out="it has a test of its own"),
    Row("make ", left_out="they take minutes; their parts are run by this test, by others and by the rehearsal"),
    Row("python scripts/davis_mini.py", left_out="it needs DAVIS; tests/scripts runs it"),
    Row("pip install", left_out="it changes the environment"),
    Row(r"instanceformer segment rtsp:", left_out="no camera"),
    Row("instanceformer sweep", ("--dry_run",)),
    Row("instanceformer compare", left_out="it needs studies; tests/studies runs it"),
    Row("hf upload", left_out="it needs an account"),
    Row("mkdir frames && ffmpeg", left_out="it is for FiftyOne, which is not among the dependencies"),
    Row("(srun|torchrun) ", left_out="their launchers are not everywhere; DDP has tests of its own"),
    Row("instanceformer import"),
    Row("instanceformer check"),
    Row("instanceformer evaluate"),
    Row("instanceformer report"),
    Row("instanceformer synthesize", ("--train_videos=2", "--valid_videos=1", "--length=8", "--workers=1")),
    Row("instanceformer segment .*--view", (*SMALL_CLIP, "--view_port=0")),
    Row("instanceformer segment", SMALL_CLIP),
    Row("instanceformer export", ("--height=64", "--width=96")),
    Row("instanceformer convert r50_", ("--heads=4", "--tokens=4", "--support=4")),
    Row("instanceformer convert"),
    Row("python street/run.py"),
    Row("instanceformer (fit|validate|test|predict) "),
]
"""The first that fits counts. Trainings and evaluations take what makes them small from the rehearsal as well."""


def read_blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def read_commands(document: Path) -> list[list[str]]:
    """The words of every command of the ``bash`` blocks, without comments, with continued lines joined."""
    text = "\n".join(read_blocks(document, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def row_of(words: list[str]) -> Row:
    row = next((row for row in ROWS if re.match(row.begins, " ".join(words))), None)
    assert row is not None, f"no row says how to run: {' '.join(words)}"
    return row


def run_command(words: list[str], log: Path) -> int:
    """Its exit code."""
    if words[0] == "instanceformer":
        process = processes.start(words[1:], log)
        if "--view" in words:  # it waits for a browser
            opened = r"open (http://\S+) in a browser"
            processes.wait_until(lambda: log.exists() and bool(re.search(opened, log.read_text())), process)
            urlopen(f"{re.findall(opened, log.read_text())[0]}next").close()
        process.join(300)
        assert process.exitcode is not None, log.read_text()
        return process.exitcode
    assert words[0] == "python", words
    with log.open("w") as file:
        return subprocess.run([sys.executable, *words[1:]], stdout=file, stderr=file).returncode


def small(words: list[str]) -> list[str]:
    """The command with what makes it small."""
    flags = list(row_of(words).flags)
    stage = words[1] if len(words) > 1 else ""
    configs = re.findall(r"configs/(\w+)\.yaml", " ".join(words))
    if stage in ("fit", "validate", "test", "predict") and configs:
        flags = [*run_flags(configs[-1], stage), "--data.num_workers=0", "--trainer.devices=1", *flags]
    return [*words, *flags]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with everything that a document takes for granted."""
    root = tmp_path
    for name in ("configs", "scripts"):
        (root / name).symlink_to(PROJECT / name)
    write_miniatures(root / "data")
    mine = root / "mine"
    mine.mkdir()
    (mine / "JPEGImages").symlink_to(root / "data" / "mine" / "JPEGImages")
    write_export(root / "data" / "mine" / "train.json", root / "export.json")
    write_perfect_results(root / "data" / "demo" / "valid.json", root / "runs" / "demo" / "results.json")
    write_metrics(root / "data" / "demo" / "valid.json", root / "runs" / "demo" / "results.metrics.json")
    names: dict[str, dict[str, str]] = {}
    for split in ("train", "valid"):
        names |= write_labels(root / "data" / "mine" / f"{split}.json", root / "labels" / split)
    (root / "names.json").write_text(json.dumps(names))
    (root / "new_videos").mkdir()
    for name in ("street.mp4", "a.mp4", "b.mp4", "new_videos/street.mp4"):
        write_film(root / name, moving_square(6, 64, 96))
    torch.manual_seed(0)
    network = InstanceFormer(4, **TINY).eval()
    for path in ("model.safetensors", "runs/demo/last.ckpt"):
        checkpoints.write(checkpoints.Checkpoint(vars(network.options), network.state_dict(), SHAPES), root / path)
    for name, channels in (("r50_ovis", 27), ("r50_ytvis", 42)):
        weights = theirs(build(RELEASE, channels, location="paper"), RELEASE)
        torch.save({"model": weights}, root / f"{name}.pth")
    return root


def write_export(annotations: Path, output: Path) -> None:
    """The same in COCO's format, as CVAT exports it: tracks are attributes of what images show."""
    content = json.loads(annotations.read_text())
    images, objects = [], []
    for video in content["videos"]:
        first = len(images) + 1
        images += [
            {"id": first + t, "file_name": name, "height": video["height"], "width": video["width"]}
            for t, name in enumerate(video["file_names"])
        ]
        for track in (a for a in content["annotations"] if a["video_id"] == video["id"]):
            for t, segmentation in enumerate(track["segmentations"]):
                if segmentation is not None:
                    about = {"category_id": track["category_id"], "iscrowd": track["iscrowd"]}
                    about |= {"attributes": {"track_id": track["id"]}, "segmentation": segmentation}
                    objects.append({"id": len(objects) + 1, "image_id": first + t, **about})
    output.write_text(json.dumps({"images": images, "annotations": objects, "categories": content["categories"]}))


def write_perfect_results(annotations: Path, output: Path) -> None:
    """The annotated instances as tracks."""
    tracks = json.loads(annotations.read_text())["annotations"]
    keys = ("video_id", "category_id", "segmentations")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([{key: track[key] for key in keys} | {"score": 1.0} for track in tracks]))


def write_metrics(annotations: Path, output: Path) -> None:
    """What `instanceformer test` writes beside its results."""
    files = {"annotations": str(annotations), "images": str(annotations.parent / "JPEGImages")}
    measured = {"metrics": {}, "run": {"annotations": hash_file(annotations), "weights": "?"}, "files": files}
    output.write_text(json.dumps(measured))


def write_labels(annotations: Path, folder: Path) -> dict[str, dict[str, str]]:
    """The same as palette images, as DAVIS has them; by video the names of its instances."""
    content, names = json.loads(annotations.read_text()), {}
    for video in content["videos"]:
        tracks = [a for a in content["annotations"] if a["video_id"] == video["id"]]
        for t, name in enumerate(video["file_names"]):
            labels = np.zeros((video["height"], video["width"]), dtype=np.uint8)
            for i, track in enumerate(tracks, start=1):
                if track["segmentations"][t] is not None:
                    labels[mask_utils.decode(track["segmentations"][t]) > 0] = i
            path = (folder / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(labels, mode="P")
            image.putpalette([(37 * i) % 256 for i in range(768)])
            image.save(path)
        if tracks:
            instances = {str(i): ("car", "person")[i % 2] for i in range(1, len(tracks) + 1)}
            names[Path(video["file_names"][0]).parent.name] = instances
    return names


def read_spans(document: Path) -> list[str]:
    """The code within sentences and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE))


def read_links(document: Path) -> list[str]:
    """What links and pictures point to, without web addresses."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", document.read_text()) if not link.startswith("http")]


def find_named(name: str) -> list[Path]:
    """The files that a name such as ``model/state.py`` or ``configs/{a,b}.yaml`` in a document means."""
    stem, _, rest = name.partition("{")
    choices, _, end = rest.partition("}")
    names = [f"{stem}{choice}{end}" for choice in choices.split(",")]
    return [next((root / each for root in ROOTS if (root / each).is_file()), PROJECT / each) for each in names]


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


def test_readme_is_a_page() -> None:
    text = README.read_text()
    assert len(text.split()) <= 1200
    assert "```python" in text.splitlines()[:40]
    assert all(len(block.splitlines()) <= 8 for block in read_blocks(README, "python"))


def test_readme_links_every_page_once() -> None:
    links = read_links(README)
    for document in DOCUMENTS[1:]:
        assert links.count(str(document.relative_to(PROJECT))) == 1, document


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in read_links(document):
        assert (document.parent / link).is_file(), link


@each_document
def test_every_file_that_is_named_exists(document: Path) -> None:
    words = [word.rstrip(",;") for span in read_spans(document) for word in span.split()]
    for word in (word for word in words if re.fullmatch(r"[\w/-]+(\{.+\})?\.(py|yaml|md)", word)):
        if "/" in word or (word.endswith(".py") and word != "run.py"):  # not those that commands write
            for path in find_named(word):
                assert path.is_file(), word


def test_design_names_what_is_in_its_files() -> None:
    rows = re.findall(
        r"^\|[^|]+\| `([\w/]+\.py)` \| (.+) \|$", (PROJECT / "docs" / "design.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    for file, names in rows:
        source = find_named(file)[0].read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(class |def |){name}\b *[:(=]", source, re.MULTILINE), f"{file}: {name}"


@each_document
def test_what_ends_in_a_colon_introduces_something(document: Path) -> None:
    paragraphs = re.sub(r"```.*?```", "    code", document.read_text(), flags=re.DOTALL).split("\n\n")
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        if paragraph.rstrip().endswith(":"):
            assert re.match(r"[-|>!]|\d+\.|    ", following), f"nothing follows: {paragraph[-80:]}"


@each_document
def test_every_command_that_is_shown_has_a_row(document: Path) -> None:
    for words in read_commands(document):
        row_of(words)


def test_commands_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    text = "```bash\ninstanceformer fit --a '{b: c}' \\\n    --d   # e\n\n# f\nmake demo\n```\n```python\nx = 1\n```\n"
    (tmp_path / "a.md").write_text(text)
    assert read_commands(tmp_path / "a.md") == [["instanceformer", "fit", "--a", "{b: c}", "--d"], ["make", "demo"]]
    assert read_blocks(tmp_path / "a.md", "python") == ["x = 1\n"]
    with pytest.raises(AssertionError, match="no row says how to run: instanceformer destroy"):
        row_of(["instanceformer", "destroy", "all"])


@pytest.mark.slow
@each_document
def test_every_command_that_is_shown_runs(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, each in a process of its own: later ones take what earlier ones leave."""
    monkeypatch.chdir(folder)
    failed = []
    for place, words in enumerate(read_commands(document)):
        row = row_of(words)
        if row.left_out is not None:
            continue
        log = folder / f"{document.stem}_{place}.txt"
        code = run_command(small(words), log)
        if code != 0:
            failed.append(f"{' '.join(small(words))}\n    exit code {code}: {log.read_text()[-1500:]}")
    assert not failed, "\n".join(failed)


def stand_ins(document: Path) -> dict[str, Any]:
    """What the examples of a document take for granted."""
    if document.parent.name == "kernels":
        cells = sum(h * w for h, w in ((45, 80), (23, 40), (12, 20), (6, 10)))
        return {
            "value": torch.randn(1, cells, 2, 8),
            "locations": torch.rand(1, 3, 2, 4, 4, 2),
            "weights": torch.rand(1, 3, 2, 4, 4),
            "reference": torch.rand(1, 3, 4, 2),
            "offsets": torch.randn(1, 3, 2, 4, 4, 2),
            "logits": torch.randn(1, 3, 2, 4, 4),
        }
    return {"streams": [moving_square(3, 64, 96)] * 2, "chunks": [torch.randn(1, 2, 3, 64, 96) for _ in range(2)]}


@pytest.mark.slow
@each_document
def test_every_example_in_python_runs(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = stand_ins(document)
    for block in read_blocks(document, "python"):
        if block.startswith("import fiftyone"):  # it is not among the dependencies
            continue
        exec(compile(block, str(document), "exec"), names)
