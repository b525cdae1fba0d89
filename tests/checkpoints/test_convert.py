"""Conversions of small state dicts made here, under the names that the sources have."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import pytest
import torch
from tests.conftest import TINY
from torch import Tensor

from instanceformer import InstanceFormer, checkpoints
from instanceformer.checkpoints import Checkpoint, FrameSize
from instanceformer.checkpoints.convert import SourceOptions, convert, convert_file
from instanceformer.checkpoints.sources import DEFORMABLE_DETR, RELEASE, SEQFORMER, Source
from instanceformer.cli import main
from instanceformer.data.catalog import CATALOG
from instanceformer.files import locking

HEADS = SourceOptions(heads=TINY["num_heads"])


@functools.cache
def build(source: Source, channels: int, **options: object) -> InstanceFormer:
    torch.manual_seed(1)
    network = InstanceFormer(channels, **{**TINY, "backbone": "resnet18", **source.options, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def theirs(network: InstanceFormer, source: Source) -> dict[str, Tensor]:
    """The network's weights as the source has them, as far as it has them."""
    names = {ours: name for name, ours in source.mapped(1, 2).items()}
    weights = {}
    for name, x in network.state_dict().items():
        module = next((ours for ours in sorted(names, reverse=True) if f"{name}.".startswith(f"{ours}.")), None)
        if module is None:
            continue
        if "controller.4" in name:  # from input by output to output by input, from units of 64 pixels to pixels
            x = x.clone()
            x[:16] /= 64
            x[:80] = x[:80].view(10, 8, -1).transpose(0, 1).reshape(x[:80].shape)
            x[80:144] = x[80:144].view(8, 8, -1).transpose(0, 1).reshape(x[80:144].shape)
        weights[names[module] + name[len(module) :]] = x
    prefix = source.prefix
    weights[f"{prefix}query_embed.weight"] = torch.cat((network.query_position, network.query_content), dim=1).detach()
    boxes = {name: x for name, x in weights.items() if name.startswith(f"{prefix}bbox_embed")}
    weights |= {f"{prefix}transformer.decoder.{name.removeprefix(prefix)}": x for name, x in boxes.items()}
    dim = network.dim
    for part, layers in (("encoder", 1), ("decoder", 2)):
        for i in range(layers):
            for module in source.dropped_of_layer:
                if module.startswith(part):
                    weights[f"{prefix}transformer.{part}.layers.{i}.{module.removeprefix(f'{part}.')}.weight"] = (
                        torch.zeros(dim, dim)
                    )
    return weights


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("location", "rule"), [("multiplicative", "paper"), ("additive", "additive"), ("none", "none")]
)
def test_the_release_round_trip(memory: bool, location: str, rule: str) -> None:
    network = build(RELEASE, 27, memory=memory, location=rule)
    weights = theirs(network, RELEASE)
    weights["detr.temporal_class_embed.0.weight"] = torch.zeros(27, 27)
    weights["detr.backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(0)
    options = SourceOptions(location, tokens=4, support=4, heads=TINY["num_heads"], all_channels=True)
    found = convert(weights, options)
    assert found.checkpoint.options == vars(network.options)
    assert not found.left_new
    assert set(found.mapped) | set(found.dropped) == set(weights)
    assert {name.split(".")[1] for name in found.dropped} == {"transformer", "temporal_class_embed", "backbone"}
    for name, x in network.state_dict().items():
        assert torch.equal(found.checkpoint.weights[name], x), name


@pytest.mark.parametrize(
    ("source", "new"),
    [
        (DEFORMABLE_DETR, {"memory", "memory_attention", "class_prior", "mask_head"}),
        (SEQFORMER, {"memory", "memory_attention", "class_prior"}),
    ],
)
def test_what_a_source_lacks_is_left_new_and_named(source: Source, new: set[str]) -> None:
    network = build(source, 91)
    found = convert(theirs(network, source), SourceOptions(heads=4, all_channels=True))
    for name, x in network.state_dict().items():
        assert (name in found.left_new) == bool(new & set(name.split("."))), name
        assert name in found.left_new or torch.equal(found.checkpoint.weights[name], x), name
    for module in new:
        assert module in str(found)
    again = convert(theirs(network, source), SourceOptions(heads=4, all_channels=True)).checkpoint.weights
    assert all(torch.equal(again[name], x) for name, x in found.checkpoint.weights.items())


def test_names_of_deformable_detr_and_seqformer() -> None:
    """Written out, since the round trip would not notice a name that is wrong in both directions."""
    layer = "transformer.decoder.layers.1"
    detector = theirs(build(DEFORMABLE_DETR, 91), DEFORMABLE_DETR)
    found = convert(detector, HEADS).checkpoint.weights
    for name, ours in {
        f"{layer}.self_attn.in_proj_weight": "decoder.layers.1.self_attention.in_proj_weight",
        f"{layer}.norm2.weight": "decoder.layers.1.norm_self.weight",
        f"{layer}.cross_attn.sampling_offsets.bias": "decoder.layers.1.cross_attention.sampling_offsets.bias",
        f"{layer}.norm1.weight": "decoder.layers.1.norm_cross.weight",
        f"{layer}.linear1.weight": "decoder.layers.1.feedforward.0.weight",
        f"{layer}.linear2.bias": "decoder.layers.1.feedforward.3.bias",
        f"{layer}.norm3.bias": "decoder.layers.1.norm_feedforward.bias",
        "transformer.encoder.layers.0.norm2.bias": "encoder.layers.0.norm_feedforward.bias",
        "backbone.0.body.layer4.1.bn2.running_var": "backbone.body.layer4.1.bn2.running_var",
        "input_proj.3.0.weight": "projection.levels.3.0.weight",
        "transformer.level_embed": "encoder.level_embedding",
        "transformer.reference_points.weight": "location.reference.weight",
        "bbox_embed.1.layers.2.weight": "decoder.box_heads.1.4.weight",
    }.items():
        assert torch.equal(detector[name], found[ours]), name
    assert torch.equal(detector["query_embed.weight"][:, : TINY["dim"]], found["query_position"])

    clip = theirs(build(SEQFORMER, 42), SEQFORMER)
    found = convert(clip, HEADS).checkpoint.weights
    for name, ours in {
        f"detr.{layer}.self_attn_box.out_proj.weight": "decoder.layers.1.self_attention.out_proj.weight",
        f"detr.{layer}.norm2_box.weight": "decoder.layers.1.norm_self.weight",
        f"detr.{layer}.cross_attn.value_proj.weight": "decoder.layers.1.cross_attention.value_proj.weight",
        f"detr.{layer}.cross_attn.output_proj_box.weight": "decoder.layers.1.cross_attention.output_proj.weight",
        f"detr.{layer}.norm1_box.weight": "decoder.layers.1.norm_cross.weight",
        f"detr.{layer}.linear2_box.weight": "decoder.layers.1.feedforward.3.weight",
        f"detr.{layer}.norm3_box.weight": "decoder.layers.1.norm_feedforward.weight",
        "mask_head.lay3.weight": "mask_head.merge.0.weight",
        "mask_head.dcn.weight": "mask_head.merge.2.weight",
        "mask_head.lay2.weight": "mask_head.output.weight",
        "controller.layers.1.weight": "mask_head.controller.2.weight",
    }.items():
        assert torch.equal(clip[name], found[ours]), name


@pytest.mark.parametrize(
    ("channels", "dataset", "expected"),
    [(27, None, "ovis"), (91, None, "coco"), (42, "ytvis19", "ytvis19"), (42, "ytvis21", "ytvis21")],
)
def test_classes_are_the_categories_of_the_dataset(channels: int, dataset, expected) -> None:
    network = build(RELEASE, channels)
    found = convert(theirs(network, RELEASE), SourceOptions(heads=4, dataset=dataset)).checkpoint
    categories = CATALOG[expected].categories
    ids = [category.id for category in categories]
    assert found.categories == categories
    assert found.options["num_classes"] == len(ids)
    heads = network.decoder.class_heads[1]
    assert torch.equal(found.weights["decoder.class_heads.1.weight"], heads.weight[ids])
    assert torch.equal(found.weights["decoder.class_heads.1.bias"], heads.bias[ids])
    dim, scores = network.dim, channels
    ours, w = found.weights["memory.projection.weight"], network.memory.projection.weight
    assert torch.equal(ours[:, :dim], w[:, :dim])
    assert torch.equal(ours[:, dim:-4], w[:, [dim + i for i in ids]])
    assert torch.equal(ours[:, -4:], w[:, dim + scores :])


def test_youtube_vis_without_its_year_has_classes_but_no_names() -> None:
    found = convert(theirs(build(RELEASE, 42), RELEASE), HEADS)
    assert found.checkpoint.options["num_classes"] == 40
    assert found.checkpoint.categories == ()
    assert "ytvis19 or ytvis21" in str(found)


def test_files_of_every_format(tmp_path: Path) -> None:
    network = build(DEFORMABLE_DETR, 91)
    weights = theirs(network, DEFORMABLE_DETR)
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "coco.pth")
    torch.save(weights, tmp_path / "plain.pth")
    report = convert_file(tmp_path / "coco.pth", tmp_path / "coco.ckpt", HEADS)
    assert report.splitlines()[0] == "Deformable-DETR"
    assert "resnet18" in report
    convert_file(tmp_path / "plain.pth", tmp_path / "plain.ckpt", HEADS)
    convert_file(tmp_path / "plain.ckpt", tmp_path / "exported.safetensors")
    names = ("coco.ckpt", "plain.ckpt", "exported.safetensors")
    first, *others = (checkpoints.read(tmp_path / name) for name in names)
    assert first.categories == CATALOG["coco"].categories
    for other in others:
        for field in ("options", "categories", "frame_size", "inference"):
            assert getattr(other, field) == getattr(first, field)
        assert all(torch.equal(other.weights[name], x) for name, x in first.weights.items())
    InstanceFormer.from_checkpoint(tmp_path / "exported.safetensors")
    assert first.frame_size == FrameSize(360, 768)
    with pytest.raises(ValueError, match=r"found suffix '\.pth', expected"):
        convert_file(tmp_path / "no such file", tmp_path / "b.pth")
    with pytest.raises(ValueError, match="which says its own options"):
        convert_file(tmp_path / "plain.ckpt", tmp_path / "b.safetensors", HEADS)


def test_sizes_and_protocol_survive_another_format(tiny, tmp_path: Path) -> None:
    network = tiny()
    told = {"frame_size": FrameSize(96, 160), "inference": {"candidates": "any_frame"}}
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict(), **told), tmp_path / "a.ckpt")
    main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "b.safetensors")])
    found = checkpoints.read(tmp_path / "b.safetensors")
    assert {key: getattr(found, key) for key in told} == told


def test_an_output_that_exists_is_replaced_only_if_told(tiny, tmp_path: Path) -> None:
    network = tiny()
    source, output, link = (tmp_path / name for name in ("a.ckpt", "b.safetensors", "link.ckpt"))
    checkpoints.write(Checkpoint(vars(network.options), network.state_dict()), source)
    link.symlink_to(source)
    output.write_text("of an earlier run")
    command = ["convert", str(source), str(output)]
    with pytest.raises(SystemExit, match=r"b\.safetensors exists; give another output, or --overwrite"):
        main(command)
    assert output.read_text() == "of an earlier run"
    with locking(output), pytest.raises(SystemExit, match=r"b\.safetensors: another process is writing to it"):
        main([*command, "--overwrite"])
    assert output.read_text() == "of an earlier run"
    main([*command, "--overwrite"])
    assert checkpoints.read(output).options == vars(network.options)
    before = source.read_bytes()
    for same in (source, link):
        with pytest.raises(SystemExit, match=rf"{same.name} exists"):
            main(["convert", str(source), str(same), "--overwrite"])
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.safetensors", "link.ckpt"]


def change(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """With entries replaced or, for None, removed; a double underscore stands for a dot."""
    changed = weights | {name.replace("__", "."): x for name, x in changes.items()}
    return {name: x for name, x in changed.items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed__0__weight": None}, "found no class_embed.0.weight in Deformable-DETR"),
        ({"input_proj__2__0__bias": None}, "for 1 of our parameters, such as projection.levels.2.0.bias"),
        (
            {"transformer__enc_output__weight": torch.ones(1)},
            "no place for here, such as transformer.enc_output.weight",
        ),
        ({"class_embed__9__weight": torch.ones(91, 32)}, "class_embed.9.weight: .*expected no such entry"),
        (
            {"input_proj__2__0__bias": torch.ones(31)},
            r"input_proj.2.0.bias: found shape \(31,\).*expected shape \(32,\)",
        ),
        ({"class_embed__1__bias": torch.ones(40)}, r"class_embed.1.bias: found shape \(40,\), expected the 91 class"),
        ({"class_embed__0__bias": torch.full((91,), torch.nan)}, "found NaN or infinity in class_embed.0.bias"),
        (
            {"class_embed__0__bias": torch.ones(91, dtype=torch.complex64)},
            "found class_embed.0.bias of torch.complex64",
        ),
        ({"transformer__level_embed": torch.tensor(1.0)}, r"level_embed: found shape \(\), expected 2 dimensions"),
        ({"transformer__level_embed": torch.ones(0, 32)}, r"level_embed: found shape \(0, 32\), expected 2 dim"),
        ({"class_embed__0__weight": torch.ones(7, 32)}, "found 7 class channels, expected 27"),
        ({"transformer__decoder__bbox_embed__0__layers__0__weight": None}, "expected a model trained with --with_box_"),
        ({"backbone__0__body__layer3__1__conv1__weight": None}, r"found stages of \[2, 2, 1, 2\] blocks"),
        ({"backbone__0__body__layer1__0__conv1__weight": torch.tensor(1.0)}, r"2\] blocks, \[64\] channels wide"),
        ({"query_embed__weight": torch.ones(12, 1)}, "dim: found 0, expected at least 1"),
        ({"epoch": 3}, "epoch: found int, expected a tensor"),
        ({"transformer__decoder__layers__0__norm1__weight": None}, "expected a state dict, plain or under 'model'"),
    ],
)
def test_what_fits_nothing_is_refused(changes, message: str, tmp_path: Path) -> None:
    weights = change(theirs(build(DEFORMABLE_DETR, 91), DEFORMABLE_DETR), **changes)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        convert_file(tmp_path / "a.pth", tmp_path / "b.ckpt", HEADS)
    assert not (tmp_path / "b.ckpt").exists()


@pytest.mark.parametrize("content", [{"model": None}, {"model": torch.ones(2)}, {3: torch.ones(2)}])
def test_files_without_a_state_dict_are_refused(content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: found \w+, expected a state dict, plain"):
        convert_file(tmp_path / "a.pth", tmp_path / "b.ckpt")


def test_memory_of_another_number_of_classes_is_refused() -> None:
    weights = theirs(build(RELEASE, 27), RELEASE)
    other = theirs(build(RELEASE, 42), RELEASE)["detr.transformer.mem_token_proj.weight"]
    with pytest.raises(ValueError, match=r"found 78 columns, expected 32 \+ 27 classes \+ 4 of a box"):
        convert(weights | {"detr.transformer.mem_token_proj.weight": other}, HEADS)


def test_a_resnext_is_told_by_its_groups() -> None:
    options = {**TINY, **DEFORMABLE_DETR.options, "backbone": "resnext101_64x4d"}
    network = InstanceFormer(91, **options)
    found = convert(theirs(network, DEFORMABLE_DETR), HEADS).checkpoint
    assert found.options["backbone"] == "resnext101_64x4d"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads: found 0, expected at least 1"),
        ({"support": 1}, "support: found 1, expected at least 2"),
        ({"dataset": "coco"}, "found 27 class channels, but coco has category ids up to 90"),
        ({"tokens": 13}, "memory_tokens: found 13, expected at most num_queries=12"),
        ({"heads": 3}, "expected a multiple of 8 and of num_heads=3"),
    ],
)
def test_options_that_no_source_can_have_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(theirs(build(RELEASE, 27), RELEASE), SourceOptions(**{"heads": 4, "tokens": 4, **options}))
