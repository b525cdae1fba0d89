from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from instanceformer import InstanceFormer
from instanceformer.inference.export import export_encode, export_step

SIZE = (50, 70)


def assert_same(a: object, b: object) -> None:
    for field in fields(a):
        torch.testing.assert_close(
            getattr(a, field.name), getattr(b, field.name), rtol=0, atol=1e-5, msg=lambda m, f=field: f"{f.name}: {m}"
        )


def reload(program: torch.export.ExportedProgram) -> torch.nn.Module:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="paper"),
        pytest.param(
            {"location": "refined", "free_queries": "renew", "min_confidence": 0.02, "max_overlap": 0.5}, id="renewed"
        ),
    ],
)
@torch.no_grad()
def test_saved_and_loaded_step_equals_eager_over_ten_frames(tiny: Callable[..., InstanceFormer], options: dict) -> None:
    network = tiny(**options)
    encode, step = reload(export_encode(network, SIZE)), reload(export_step(network, SIZE))
    eager_state = state = network.initial_state(1)
    for t in range(10):
        frame = torch.randn(1, 1, 3, *SIZE)
        queries = torch.randint(network.num_queries, (1, 1 + t % 4))
        features = network.encode(frame)[0]
        expected = network.decode(features, eager_state)
        expected_masks = network.segment(features, expected, queries)
        eager_state = network.advance(eager_state, expected)

        prediction, masks, state = step(encode(frame)[0], state, queries)
        assert_same(prediction, expected)
        assert_same(state, eager_state)
        torch.testing.assert_close(masks, expected_masks, rtol=1e-5, atol=1e-5)
    assert state.memory_filled.any()
