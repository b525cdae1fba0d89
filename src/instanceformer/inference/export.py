"""The network as exported programs: for torch.export, which need this package for their types, or ONNX, which do not.

Two programs take turns on a video. ``encode`` computes a frame's features from the frame alone; ``step`` takes them and
the state after the previous frame, and returns the frame's outputs and the next state. Before the first frame the
whole state is zero. ``run.py``, written beside the programs, runs them on a video.

In ONNX the state is a number of tensors, inputs under their names and outputs as ``next_...``. Deformable attention
becomes grid sampling there, since ONNX has no operator for it. Not every runtime samples as the standard says. TensorRT
takes the nearest value where operator set 20 asks for linear interpolation (NVIDIA/TensorRT#4646), so the programs use
set 18. ONNX Runtime's WebGPU provider gives different values than its CPU provider (microsoft/onnxruntime#32275). The
tests run ONNX Runtime on a CPU; compare other runtimes with that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, register_dataclass

from instanceformer import checkpoints
from instanceformer.data.annotations import Category
from instanceformer.data.augment import normalize
from instanceformer.files import replacing
from instanceformer.inference.tracks import MIN_SIDE
from instanceformer.model.attention import DeformableAttention
from instanceformer.model.network import InstanceFormer
from instanceformer.model.state import Identities, TrackState

register_dataclass(Identities, serialized_type_name="instanceformer.Identities")
register_dataclass(TrackState, serialized_type_name="instanceformer.TrackState")
torch.serialization.add_safe_globals([TrackState, Identities])  # a saved program holds an example of its arguments

OPERATORS = 18
"""ONNX's operator set; later ones rename the modes of GridSample, and not all runtimes know the new names."""

FEATURES = ("tokens", "mask_features", "looks")
"""Outputs of ``encode``; the last one only from a network with ``identity``."""

OUTPUTS = ("scores", "boxes", "shown", "masks")


class Encode(nn.Module):
    """The stateless part of a frame, ``InstanceFormer.encode``."""

    def __init__(self, network: InstanceFormer) -> None:
        super().__init__()
        self.network = _without(network, "decoder")

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(1, 3, H, W) uint8 RGB to the fields of FrameFeatures that depend on the pixels."""
        features = self.network.encode(normalize(frame)[:, None])[0]
        return features.tokens, features.mask_features, features.looks


class Step(nn.Module):
    """The rest of a frame, after ``Encode``: decode, segment, advance, as in inference.

    Args:
        network: in evaluation mode.
        size: (height, width) of the frames in pixels.
        shown: n, number of masks to compute.
    """

    def __init__(self, network: InstanceFormer, size: tuple[int, int], shown: int) -> None:
        super().__init__()
        self.network, self.shown = _without(network, "backbone", "projection", "encoder"), shown
        blank = torch.zeros(1, 1, 3, *size, device=network.query_content.device)
        self.features = network.encode(blank)[0]  # the fields that Encode does not return are the same for every frame

    def forward(
        self, tokens: Tensor, mask_features: Tensor, looks: Tensor | None, state: TrackState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, TrackState]:
        """One frame.

        Args:
            tokens: from Encode, like the next two.
            mask_features: see ``FrameFeatures``.
            looks: see ``FrameFeatures``.
            state: after the previous frame.

        Returns:
            (1, N, K) class probabilities; (1, N, 4) boxes, cxcywh in [0, 1]; (1, n) int64, the n most confident
            queries, best first; their (1, n, ceil(H / 4), ceil(W / 4)) mask logits; the state for the next frame.
        """
        features = replace(self.features, tokens=tokens, mask_features=mask_features, looks=looks)
        prediction = self.network.decode(features, state)
        shown = prediction.scores.amax(dim=-1).topk(self.shown, dim=1).indices
        masks = self.network.segment(features, prediction, shown)
        state = self.network.advance(state, prediction)
        return prediction.scores, prediction.boxes[-1], shown, masks, state


def _without(network: InstanceFormer, *parts: str) -> InstanceFormer:
    """A copy without the modules that a program does not need."""
    network = copy.deepcopy(network)
    for part in parts:
        delattr(network, part)
    return network


@dataclass(frozen=True)
class ExportOptions:
    """Which programs to make from a network.

    Attributes:
        height: of the frames in pixels; the programs accept no other.
        width: of the frames in pixels; the programs accept no other.
        shown: number of masks that a step computes, those of the most confident queries.
        format: ``pt2``, from torch.export; ``onnx``, which needs the packages onnx and onnxscript.

    Raises:
        ValueError: frames are too small, or ``shown`` is below 1.
    """

    height: int = 360
    width: int = 640
    shown: int = 10
    format: Literal["pt2", "onnx"] = "pt2"

    def __post_init__(self) -> None:
        if min(self.height, self.width) < MIN_SIDE:
            raise ValueError(
                f"found frames of {self.width}x{self.height} pixels, expected {MIN_SIDE}x{MIN_SIDE} or more"
            )
        if self.shown < 1:
            raise ValueError(f"shown: found {self.shown}, expected at least 1")


@torch.no_grad()
def export_programs(network: InstanceFormer, options: ExportOptions) -> tuple[ExportedProgram, ExportedProgram]:
    """Export Encode and Step.

    Args:
        network: in evaluation mode, not optimized: packed weights cannot be saved.
        options: sizes; with the format ``onnx``, no operator of this package is left in the programs.

    Raises:
        ValueError: ``shown`` exceeds the number of queries.
    """
    if options.shown > network.num_queries:
        raise ValueError(f"shown: found {options.shown}, expected at most the network's {network.num_queries} queries")
    encode, step = Encode(network), Step(network, (options.height, options.width), options.shown)
    if options.format == "onnx":
        for module in (*encode.modules(), *step.modules()):
            if isinstance(module, DeformableAttention):
                module.backend = "reference"
    frame = torch.zeros(1, 3, options.height, options.width, dtype=torch.uint8, device=network.query_content.device)
    arguments = (*encode(frame), network.initial_state(1))
    return torch.export.export(encode, (frame,)), torch.export.export(step, arguments)


def export_files(checkpoint: str | Path, folder: Path, options: ExportOptions) -> list[Path]:
    """Write the programs ``encode`` and ``step`` of a checkpoint, ``about.json`` and ``run.py``.

    ``about.json`` holds the frame's size, the state's shapes and types, and the categories.

    Args:
        checkpoint: any file that ``InstanceFormer.from_checkpoint`` reads.
        folder: to write to, created if missing.
        options: sizes and format.

    Returns:
        Paths of the files.

    Raises:
        ValueError: the checkpoint holds no network, or the packages that ONNX needs are missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if options.format == "onnx" and find_spec(name) is None]
    if missing:
        raise ValueError(f"format: onnx needs {' and '.join(missing)}, not installed here; pip install onnx onnxscript")
    source = checkpoints.read(checkpoint)
    network = InstanceFormer.from_checkpoint(source)
    exported = export_programs(network, options)
    state = network.initial_state(1).tensors()
    contents: dict[str, bytes] = {}
    for name, program in zip(("encode", "step"), exported, strict=True):
        if options.format == "pt2":
            torch.export.save(program, buffer := BytesIO())
            contents[f"{name}.pt2"] = buffer.getvalue()
        else:
            contents[f"{name}.onnx"] = to_onnx(program, tuple(state))
    categories = source.categories or [Category(k, f"class {k}") for k in range(1, network.num_classes + 1)]
    about = {
        "frame": {"height": options.height, "width": options.width, "type": "uint8", "channels": "RGB"},
        "state": {
            name: {"shape": list(value.shape), "type": str(value.dtype).removeprefix("torch.")}
            for name, value in state.items()
        },
        "categories": [vars(category) for category in categories],
    }
    contents["about.json"] = (json.dumps(about, indent=2) + "\n").encode()
    contents["run.py"] = (Path(__file__).parent / "programs" / f"run_{options.format}.py").read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)
    return [folder / name for name in contents]


def to_onnx(program: ExportedProgram, state: Sequence[str]) -> bytes:
    """A program as the content of an ONNX file; inputs and outputs have the names of FEATURES, OUTPUTS and the state.

    Args:
        program: ``encode`` or ``step``, from ``export_programs``.
        state: names of the state's tensors.
    """
    encodes = len(program.graph_signature.user_inputs) == 1
    recognizes = any(name.startswith("identities_") for name in state)
    features = FEATURES if recognizes else FEATURES[:-1]
    inputs = ("frame",) if encodes else (*features, *state)
    outputs = features if encodes else (*OUTPUTS, *(f"next_{name}" for name in state))
    converted = torch.onnx.export(
        program, input_names=inputs, output_names=outputs, opset_version=OPERATORS, dynamo=True, verbose=False
    )
    assert converted is not None
    content: bytes = converted.model_proto.SerializeToString()
    return content
