from __future__ import annotations

import pytest
from tests.conftest import TINY

from count_compiled import PARTS, count_graphs
from instanceformer import InstanceFormer


@pytest.mark.slow
def test_every_part_is_one_program_a_pass() -> None:
    graphs = count_graphs(
        InstanceFormer(5, **{**TINY, "backbone": "resnet18", "backbone_norm": "frozen"}), 2, (64, 96), 5
    )
    assert {graph.name.partition(",")[0] for graph in graphs} == set(PARTS)
    assert all(graph.fused > 0 and graph.library > 0 for graph in graphs)
    by_name = {graph.name: graph for graph in graphs}
    assert by_name["backbone, forward"].library == 20  # convolutions
    assert [graph.calls for graph in graphs if graph.name.startswith("decoder")] == [2, 2]
