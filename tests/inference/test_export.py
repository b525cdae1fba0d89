from __future__ import annotations

import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from tests.inference.films import write_film
from torch import Tensor

from instanceformer import InstanceFormer, checkpoints
from instanceformer.cli import main
from instanceformer.data.annotations import Category
from instanceformer.data.augment import normalize
from instanceformer.inference.export import (
    FEATURES,
    OUTPUTS,
    ExportOptions,
    export_files,
    export_programs,
    to_onnx,
)
from instanceformer.model.state import TrackState

HEIGHT, WIDTH, SHOWN = 100, 140, 3  # no level is a single cell, whose group norm would divide by next to nothing
RENEWED = {"location": "refined", "free_queries": "renew", "min_confidence": 0.02, "max_overlap": 0.5}
KNOWN = {**RENEWED, "identity": "recover"}
variants = pytest.mark.parametrize(
    "options", [pytest.param(o, id=name) for name, o in (("paper", {}), ("renewed", RENEWED), ("known", KNOWN))]
)


@torch.no_grad()
def eager(network: InstanceFormer, frames: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """What the network itself gives frame by frame, by the names of the programs' outputs."""
    state = network.initial_state(1)
    for frame in frames:
        features = network.encode(normalize(frame)[:, None])[0]
        prediction = network.decode(features, state)
        shown = prediction.scores.amax(-1).topk(SHOWN, dim=1).indices
        state = network.advance(state, prediction)
        yield {
            "scores": prediction.scores,
            "boxes": prediction.boxes[-1],
            "shown": shown,
            "masks": network.segment(features, prediction, shown),
            **following(state),
        }


def following(state: TrackState) -> dict[str, Tensor]:
    return {f"next_{name}": value for name, value in state.tensors().items()}


def make_frames(count: int) -> list[Tensor]:
    return [torch.randint(256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(count)]


def assert_same(found: dict[str, Any], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name]), value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def reload(program: torch.export.ExportedProgram) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.slow
@variants
@torch.no_grad()
def test_saved_and_loaded_programs_equal_the_network_over_ten_frames(
    tiny: Callable[..., InstanceFormer], options: dict[str, Any]
) -> None:
    network = tiny(**options)
    encode, step = map(reload, export_programs(network, ExportOptions(HEIGHT, WIDTH, SHOWN)))
    state, frames = network.initial_state(1), make_frames(10)
    for frame, expected in zip(frames, eager(network, frames), strict=True):
        *outputs, state = step(*encode(frame), state)
        assert_same({**dict(zip(OUTPUTS, outputs, strict=True)), **following(state)}, expected)
    assert state.memory_filled.any()


@pytest.mark.slow
@variants
def test_onnx_equals_the_network_over_ten_frames_beginning_with_zeros(
    tiny: Callable[..., InstanceFormer], options: dict[str, Any]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    network = tiny(**options)
    programs = export_programs(network, ExportOptions(HEIGHT, WIDTH, SHOWN, "onnx"))
    encode, step = (
        runtime.InferenceSession(to_onnx(program, tuple(network.initial_state(1).tensors()))) for program in programs
    )
    types = {"tensor(float)": np.float32, "tensor(bool)": np.bool_, "tensor(int64)": np.int64}
    state = {i.name: np.zeros(i.shape, types[i.type]) for i in step.get_inputs() if i.name not in FEATURES}
    frames = make_frames(10)
    for frame, expected in zip(frames, eager(network, frames), strict=True):
        given = [output.name for output in encode.get_outputs()]
        features = dict(zip(given, encode.run(None, {"frame": frame.numpy()}), strict=True))
        names = [output.name for output in step.get_outputs()]
        outputs = dict(zip(names, step.run(None, {**features, **state}), strict=True))
        assert_same(outputs, expected, tolerance=1e-4)  # the runtime rounds in its own order
        state = {name: outputs[f"next_{name}"] for name in state}
    assert state["memory_filled"].any()


@pytest.mark.slow
@torch.no_grad()
def test_the_command_writes_programs_and_what_one_has_to_know_of_them(
    tiny: Callable[..., InstanceFormer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tiny(num_classes=1)
    source, folder = tmp_path / "tiny.safetensors", tmp_path / "street"
    category = Category(4, "cat")
    checkpoints.write(checkpoints.Checkpoint(vars(network.options), network.state_dict(), (category,)), source)
    main(["export", str(source), str(folder), f"--height={HEIGHT}", f"--width={WIDTH}", f"--shown={SHOWN}"])
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "encode.pt2", "run.py", "step.pt2"]
    assert "step.pt2" in capsys.readouterr().out

    about = json.loads((folder / "about.json").read_text())
    assert about["frame"] == {"height": HEIGHT, "width": WIDTH, "type": "uint8", "channels": "RGB"}
    assert about["categories"] == [{"id": 4, "name": "cat"}]
    assert about["state"]["queries"] == {"shape": [1, network.num_queries, network.dim], "type": "float32"}
    encode, step = (torch.export.load(folder / f"{name}.pt2") for name in ("encode", "step"))
    (frame,) = make_frames(1)
    outputs = step.module()(*encode.module()(frame), network.initial_state(1))
    (expected,) = eager(network, [frame])
    torch.testing.assert_close(outputs[3], expected["masks"], rtol=1e-5, atol=1e-5)
    assert not {name for name in step.state_dict if "backbone" in name}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_what_is_written_to_run_the_programs_runs_them(
    tiny: Callable[..., InstanceFormer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: Literal["pt2", "onnx"],
) -> None:
    """From the file, on a folder of images and on a film, state and all."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    network = tiny(num_classes=1)
    with torch.no_grad():
        for head in network.decoder.class_heads:
            head.bias.fill_(3.0)  # something to print
    source, folder = tmp_path / "tiny.safetensors", tmp_path / "street"
    checkpoints.write(
        checkpoints.Checkpoint(vars(network.options), network.state_dict(), (Category(4, "cat"),)), source
    )
    export_files(source, folder, ExportOptions(HEIGHT, WIDTH, SHOWN, form))
    frames = make_frames(3)
    images = tmp_path / "images"
    images.mkdir()
    arrays = [frame[0].permute(1, 2, 0).numpy() for frame in frames]
    for t, array in enumerate(arrays):
        Image.fromarray(array).save(images / f"{t}.png")
    film = write_film(tmp_path / "film.mkv", arrays, "ffv1", "bgr0")
    *_, expected = eager(network, frames)
    for video in (images, film):
        monkeypatch.setattr(sys, "argv", ["run.py", str(video)])
        found = runpy.run_path(str(folder / "run.py"))
        state = found["state"] if form == "onnx" else found["state"].tensors()
        outputs = found["outputs"] if form == "onnx" else {name: found[name] for name in OUTPUTS}
        results = {**{name: outputs[name] for name in OUTPUTS}, **{f"next_{name}": state[name] for name in state}}
        assert_same(results, expected, tolerance=1e-4)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 3 * SHOWN
        assert re.match(r"frame 0: query \d+, cat [01]\.\d\d, box \[0\.\d+, .*\], mask of \d+ cells", printed[0])


@pytest.mark.slow
def test_onnx_programs_sample_by_the_names_that_every_runtime_knows(tiny: Callable[..., InstanceFormer]) -> None:
    onnx = pytest.importorskip("onnx")
    network = tiny()
    _, step = export_programs(network, ExportOptions(HEIGHT, WIDTH, SHOWN, "onnx"))
    model = onnx.load_from_string(to_onnx(step, tuple(network.initial_state(1).tensors())))
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    nodes = [node for graph in (model.graph, *model.functions) for node in graph.node if node.op_type == "GridSample"]
    assert nodes
    modes = {attribute.s for node in nodes for attribute in node.attribute if attribute.name == "mode"}
    assert modes <= {b"bilinear"}


def test_what_cannot_be_exported_is_refused(tiny: Callable[..., InstanceFormer]) -> None:
    with pytest.raises(ValueError, match="found frames of 70x8 pixels, expected 16x16 or more"):
        ExportOptions(8, 70)
    with pytest.raises(ValueError, match="shown: found 0, expected at least 1"):
        ExportOptions(shown=0)
    network = tiny()
    with pytest.raises(ValueError, match=f"shown: found 13, expected at most the network's {network.num_queries}"):
        export_programs(network, ExportOptions(HEIGHT, WIDTH, 13))
