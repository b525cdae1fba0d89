from __future__ import annotations

import pytest

from instanceformer import InstanceFormer, checkpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet51"}, "resnet50"),
        ({"memory_tokens": 301}, "num_queries=300"),
        ({"num_levels": 2}, "3 to 5"),
        ({"dim": 100}, "num_heads=8"),
        ({"min_confidence": 1.5}, "min_confidence"),
        ({"memory_frames": 0}, "at least 1"),
        ({"mask_stride": 16}, "mask_stride: found 16, expected 4 or 8"),
        (
            {"location": "multiplicative"},
            "location: found 'multiplicative', expected none or paper or additive or refined",
        ),
        ({"location_from": "query"}, "location_from: found 'query', expected content or position"),
        ({"temporal_index": "sine"}, "temporal_index: found 'sine'"),
        ({"mask_upsampling": "nearest"}, "mask_upsampling: found 'nearest'"),
        ({"backbone_norm": "group"}, "backbone_norm: found 'group'"),
        ({"free_queries": "fresh"}, "free_queries: found 'fresh'"),
        ({"free_queries": "renew"}, "free_queries: found renew with min_confidence=0"),
        ({"class_history": "matched"}, "class_history: found 'matched', expected all or held"),
        ({"class_history": "held"}, "class_history: found held with min_confidence=0"),
    ],
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        InstanceFormer(4, **options)


def test_a_checkpoint_of_before_has_the_papers_class_history(tiny) -> None:
    network = tiny()
    options = {name: value for name, value in vars(network.options).items() if name != "class_history"}
    loaded = InstanceFormer.from_checkpoint(checkpoints.Checkpoint(options, network.state_dict()))
    assert loaded.options.class_history == "all"
