"""Weights in folders and on a stand-in for the Hub: saved, pushed, loaded, and used by commands."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from tests.inference.films import moving_square, write_film

from instanceformer import InstanceFormer, VideoInstanceSegmenter, checkpoints
from instanceformer.checkpoints.checkpoint import FrameSize
from instanceformer.cli import main
from instanceformer.data.annotations import Category

KINDS = ("bash", "python")
CATEGORIES = tuple(Category(k, name) for k, name in enumerate("abcde", start=1))


@pytest.fixture
def file(tiny, tmp_path) -> Path:
    """A checkpoint that a training left in its folder."""
    network = tiny()
    path = tmp_path / "run" / "last.ckpt"
    segmenter = {"birth": 0.25, "show": 0.125, "precision": "fp32"}
    checkpoint = checkpoints.Checkpoint(
        vars(network.options), network.state_dict(), CATEGORIES, FrameSize(64, 128), segmenter=segmenter
    )
    checkpoints.write(checkpoint, path)
    (path.parent / "config.yaml").write_text("data: {name: null, train: {annotations: /private/mine/train.json}}")
    return path


def add_metrics(file: Path) -> None:
    run = {"weights": hashlib.sha256(file.read_bytes()).hexdigest()}
    files = {"annotations": "/private/mine/valid.json"}
    content = {"metrics": {"test/AP": 0.5, "test/HOTA": 0.625, "test/lost": 0.1}, "run": run, "files": files}
    (file.parent / "results.metrics.json").write_text(json.dumps(content))


def outputs(network: InstanceFormer) -> list[torch.Tensor]:
    frames = torch.randn(1, 2, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        prediction, _ = network(frames, segment="all")
    return [prediction.logits, prediction.boxes, prediction.masks]


def assert_equal(network: InstanceFormer, other: InstanceFormer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(outputs(network), outputs(other), strict=True))


def fail(*words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as uploading and downloading small files takes."""

    files: dict[str, bytes] = {}  # noqa: RUF012, emptied by the fixture

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/owner/name"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/owner/name/commit/1", "commitOid": "1"})
        else:  # validate-yaml
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        name = self.path.removeprefix("/owner/name/resolve/main/")
        if name in self.files:
            self.answer(self.files[name])
        elif self.path.startswith("/api/models/owner/name"):
            self.answer({"id": "owner/name", "sha": "1", "siblings": []})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", 40 * "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The files of the only repository, ``owner/name``, of a Hub on this machine."""
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_folder_keeps_outputs_and_all_that_is_known(file, tmp_path):
    network = InstanceFormer.from_pretrained(file)
    network.save_pretrained(tmp_path / "shared", license="cc-by-4.0")
    assert_equal(network, InstanceFormer.from_pretrained(tmp_path / "shared"))
    before, after = checkpoints.read(file), checkpoints.read(tmp_path / "shared")
    assert before.description() == after.description()
    segmenter = VideoInstanceSegmenter.from_checkpoint(tmp_path / "shared", "cpu", show=0.0625)
    assert [category.name for category in segmenter.categories] == list("abcde")
    assert (segmenter.options.birth, segmenter.options.show, segmenter.frame_size.size) == (0.25, 0.0625, 64)


def test_the_folder_of_a_run_is_its_last_checkpoint(file, tmp_path, monkeypatch):
    run, street = file.parent, write_film(tmp_path / "street.mp4", moving_square(2))
    assert_equal(InstanceFormer.from_pretrained(run), InstanceFormer.from_pretrained(file))
    main(["segment", str(street), f"--checkpoint={run}", "--device=cpu"])
    main(["convert", str(run), str(tmp_path / "shared")])
    assert "Trained on mine/train.json." in (tmp_path / "shared" / "README.md").read_text()
    main(["convert", str(tmp_path / "shared"), str(run / "model.safetensors")])  # older than what goes on beside it
    assert checkpoints.find(run) == file
    damaged = file.read_bytes()[:-100]
    file.write_bytes(damaged)
    with pytest.raises(checkpoints.DamagedError, match=r"run/last\.ckpt: found a damaged file"):
        checkpoints.load_for_trainer(run)


def test_a_network_that_was_never_in_a_file_can_be_shared(tiny, tmp_path):
    network = tiny()
    network.save_pretrained(tmp_path / "new")
    assert_equal(network, InstanceFormer.from_pretrained(tmp_path / "new"))
    assert "data that is not stated.\nClasses: not named." in (tmp_path / "new" / "README.md").read_text()


def test_a_card_has_license_data_and_the_metrics_of_these_weights_alone(file, tmp_path):
    network = InstanceFormer.from_pretrained(file)
    add_metrics(file)
    network.save_pretrained(tmp_path / "a", license="cc-by-4.0")
    card = (tmp_path / "a" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert "Trained on mine/train.json.\nClasses: a, b, c, d, e." in card
    assert "Of a test on mine/valid.json:" in card
    assert "private" not in card
    assert "| AP | 0.500 |\n| HOTA | 0.625 |\n\n" in card

    with torch.no_grad():
        network.query_content.add_(1)
    network.save_pretrained(tmp_path / "b", trained_on="my streets")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "Trained on my streets." in card
    assert "None are stated." in card
    assert "license" not in yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("name", "title", "source"), [(None, "a b", "out/a b"), ("Five shapes", "Five shapes", "out/a b")]
)
def test_what_a_card_says_to_use_runs(file, tmp_path, monkeypatch, capsys, name, title, source):
    monkeypatch.chdir(tmp_path)
    write_film(Path("street.mp4"), moving_square(2))
    main(["convert", str(file), "out/a b", *([] if name is None else [f"--name={name}"])])
    card = Path("out/a b/README.md").read_text()
    assert f"\n# {title}\n" in card
    (command,), (program,) = (re.findall(rf"^```{language}\n(.*?)^```$", card, re.S | re.M) for language in KINDS)
    assert shlex.split(command)[:5] == ["instanceformer", "segment", "street.mp4", "--checkpoint", source]
    main([*shlex.split(command)[1:], "--device=cpu"])
    assert Path("film.mp4").is_file()
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out.count("(") >= 2


def test_a_card_for_the_hub_loads_from_there(file, tmp_path):
    main(["convert", str(file), str(tmp_path / "x"), "--name=owner/name"])
    card = (tmp_path / "x" / "README.md").read_text()
    assert "\n# owner/name\n" in card
    assert card.count("--checkpoint owner/name ") == card.count('from_checkpoint("owner/name")') == 1
    main(["convert", str(file), str(tmp_path / "y")])
    assert str(tmp_path) not in (tmp_path / "y" / "README.md").read_text()


def test_convert_writes_a_folder_and_leaves_a_card_that_was_edited(file, tmp_path, capsys):
    folder = tmp_path / "shared"
    main(["convert", str(file), str(folder), "--license=mit"])
    assert f"written to {folder}" in capsys.readouterr().out
    assert "\nmit\n" in (folder / "README.md").read_text()
    assert f"{folder / 'model.safetensors'} exists; give another output" in fail("convert", file, folder)
    (folder / "README.md").write_text("edited")
    main(["convert", str(file), str(folder), "--overwrite"])
    assert (folder / "README.md").read_text() == "edited"
    assert "expected a folder, since options of a model card" in fail(
        "convert", file, tmp_path / "x.ckpt", "--license=mit"
    )


def test_what_is_pushed_is_what_a_name_loads(file, tmp_path, hub, monkeypatch):
    network = InstanceFormer.from_pretrained(file)
    assert network.push_to_hub("owner/name", license="mit").endswith("/owner/name/commit/1")
    assert sorted(hub) == ["README.md", "model.safetensors"]
    assert 'from_checkpoint("owner/name")' in hub["README.md"].decode()
    assert_equal(network, InstanceFormer.from_pretrained("owner/name"))

    monkeypatch.chdir(tmp_path)
    write_film(Path("street.mp4"), moving_square(2))
    main(["segment", "street.mp4", "--checkpoint=owner/name", "--device=cpu"])
    assert Path("street_instances.mp4").is_file()


def test_a_name_that_is_nowhere_is_said_in_one_line(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "best"):
        (tmp_path / name).mkdir()
    for name in ("config.yaml", "best.ckpt"):
        (tmp_path / "best" / name).touch()
    write_film(Path("street.mp4"), moving_square(2))
    for name, said in {
        "owner/nothing": "owner/nothing: no such file or folder, and no model.safetensors in a repository of this name",
        "runs/last.ckpt": "runs/last.ckpt: no such file",
        "empty": "empty: found an empty folder; expected last.ckpt of a training or model.safetensors",
        "best": "best: found best.ckpt, config.yaml; expected last.ckpt of a training or model.safetensors",
    }.items():
        assert said in fail("segment", "street.mp4", f"--checkpoint={name}")
    assert not Path("street_instances.mp4").exists()


def test_without_the_hub_package_everything_else_works(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    InstanceFormer.from_pretrained(file).save_pretrained(tmp_path / "shared")
    assert_equal(InstanceFormer.from_pretrained(file), InstanceFormer.from_pretrained(tmp_path / "shared"))
    with pytest.raises(FileNotFoundError, match=r"pip install 'instanceformer\[hub\]'"):
        InstanceFormer.from_pretrained("owner/name")
