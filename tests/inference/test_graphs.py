"""What a GPU replays as a graph, and what it does kernel by kernel, are the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.inference.conftest import assert_same

from instanceformer import VideoInstanceSegmenter
from instanceformer.inference import segmenter as segmenter_module
from instanceformer.inference.tracks import SegmenterOptions


def noise(count, height=90, seed=0):
    return list(np.random.default_rng(seed).integers(0, 255, (count, height, 120, 3), dtype=np.uint8))


def pretended(function, written):
    """As ``graphs.captured``, but the function itself runs, where a GPU would replay what it did once."""
    before = [x.clone() for x in written]
    for _ in range(2):
        function()
    for tensor, value in zip(written, before, strict=True):
        tensor.copy_(value)

    def replay():
        queries = written[0].clone()
        seen = function()
        assert not torch.equal(queries, written[0])  # they are still written there
        return seen

    return replay


def everything_that_may_happen(segmenter):
    """Two videos of one size, one of another, and what may happen between two frames."""
    found = list(map(segmenter.step, noise(4)))
    segmenter.forget()
    found += map(segmenter.step, noise(2, seed=1))
    segmenter.reset()
    found += segmenter.segment(noise(3, seed=2))
    found += segmenter.segment(noise(3, height=70))
    segmenter.change_rules(birth=0.03, show=0.03, patience=0)
    return [*found, *map(segmenter.step, noise(3, height=70, seed=3))]


RULES = SegmenterOptions(birth=0.02, show=0.01, patience=1, max_overlap=1.0, size=64)
CHANGING = {"location": "refined", "free_queries": "renew", "min_confidence": 0.02, "identity": "recover"}


@pytest.mark.parametrize("options", [{}, CHANGING])
def test_a_captured_frame_gives_the_same(tiny, monkeypatch, options):
    network, captures = tiny(**options), []
    plain = everything_that_may_happen(VideoInstanceSegmenter(network, options=RULES))
    assert max(map(len, plain)) > 3 > min(map(len, plain))
    monkeypatch.setattr(segmenter_module, "SPARE", 3)
    monkeypatch.setattr(segmenter_module, "captured", lambda *args: captures.append(1) or pretended(*args))
    segmenter = VideoInstanceSegmenter(network, options=RULES)
    segmenter._captures = True
    assert_same(everything_that_may_happen(segmenter), plain, differing=0)
    assert 3 < len(captures) < len(plain)  # for two sizes, for new rules, and for more masks
    captures.clear()
    for frame in noise(3, height=70, seed=3):  # as the page does, also while nobody moves a slider
        segmenter.change_rules(birth=0.03, show=0.03, patience=0)
        segmenter.step(frame)
    assert not captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, CHANGING])
def test_a_cuda_graph_gives_what_its_kernels_give_one_by_one(tiny, options, precision):
    network, rules = tiny(**options).cuda(), replace(RULES, precision=precision)
    graphs, kernels = (VideoInstanceSegmenter(network, options=rules) for _ in range(2))
    kernels._captures = False
    found = everything_that_may_happen(graphs)
    assert graphs._captures
    assert_same(found, everything_that_may_happen(kernels))


@pytest.mark.parametrize("calls", [0, 2])
def test_what_cannot_be_captured_runs_without(tiny, monkeypatch, calls):
    def fails(function, written):
        for _ in range(calls):  # to warm up, which must not be seen
            pretended(function, written)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    network = tiny()
    plain = everything_that_may_happen(VideoInstanceSegmenter(network, options=RULES))
    monkeypatch.setattr(segmenter_module, "captured", fails)
    segmenter = VideoInstanceSegmenter(network, options=RULES)
    segmenter._captures = True
    with pytest.warns(UserWarning, match=r"take longer: operation not permitted when stream is capturing$") as warned:
        assert_same(everything_that_may_happen(segmenter), plain, differing=0)
    assert len(warned) == 1
