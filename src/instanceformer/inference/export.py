"""The network as programs of torch.export: saved with their weights, and run without the code of the network.

    torch.export.save(export_step(network, (360, 640)), "step.pt2")
    step = torch.export.load("step.pt2").module()       # after `import instanceformer.inference.export`
    prediction, masks, state = step(features, state, queries)

What they need beside PyTorch is the operator of ``deform_attn`` and the types of their arguments, both known after
this module is imported. There is no ONNX export: ONNX has no such operator, and spelt out as grid sampling it takes
about ten times as long (``kernels/README.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, register_dataclass

from instanceformer.model.attention import Levels
from instanceformer.model.decoder import FramePrediction
from instanceformer.model.encoder import FrameFeatures
from instanceformer.model.network import InstanceFormer
from instanceformer.model.state import TrackState

TYPES = (Levels, FrameFeatures, FramePrediction, TrackState)
for kind in TYPES:
    register_dataclass(kind, serialized_type_name=f"instanceformer.{kind.__name__}")
torch.serialization.add_safe_globals([*TYPES])  # a saved program holds an example of its arguments


class Encode(nn.Module):
    """``InstanceFormer.encode`` of unpadded frames."""

    def __init__(self, network: InstanceFormer) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> FrameFeatures:
        """(B, T, 3, H, W) normalised frames give their features."""
        return self.network.encode(frames)


class Step(nn.Module):
    """All that happens to a frame after ``encode``: decode, segment, advance, as in inference."""

    def __init__(self, network: InstanceFormer) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, features: FrameFeatures, state: TrackState, queries: Tensor
    ) -> tuple[FramePrediction, Tensor, TrackState]:
        """One frame.

        Args:
            features: of one frame.
            state: after the frame before.
            queries: (B, n) int64, whose masks are wanted.

        Returns:
            The prediction, (B, n, ceil(H / 4), ceil(W / 4)) mask logits, and the state for the next frame.
        """
        prediction = self.network.decode(features, state)
        masks = self.network.segment(features, prediction, queries)
        return prediction, masks, self.network.advance(state, prediction)


@torch.no_grad()
def export_encode(network: InstanceFormer, size: tuple[int, int]) -> ExportedProgram:
    """A program from one frame to its features.

    Args:
        network: in evaluation mode, not optimised: packed weights cannot be saved.
        size: (height, width) of the frame in pixels, which the program is bound to.

    Returns:
        Called with (1, 1, 3, height, width), it gives ``network.encode`` of it.
    """
    return torch.export.export(Encode(network), (_blank(network, size),))


@torch.no_grad()
def export_step(network: InstanceFormer, size: tuple[int, int]) -> ExportedProgram:
    """A program from the features of a frame and the state to outputs and the next state; see Step.

    Args:
        network: in evaluation mode, not optimised: packed weights cannot be saved.
        size: (height, width) of the frame in pixels, which the program is bound to.

    Returns:
        Called with ``features[0]``, a state and (1, n) queries of any number n >= 1, it gives what Step gives.
    """
    features = network.encode(_blank(network, size))[0]
    shown = torch.zeros(1, min(2, network.num_queries), dtype=torch.int64, device=features.tokens.device)
    shapes = ShapesCollection()
    shapes[shown] = {1: Dim("shown", min=1, max=network.num_queries)}
    return torch.export.export(Step(network), (features, network.initial_state(1), shown), dynamic_shapes=shapes)


def _blank(network: InstanceFormer, size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 1, 3, *size, device=network.query_content.device)
