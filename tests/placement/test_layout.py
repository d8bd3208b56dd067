"""Layouts: derived, printed, overridden, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from squall import models
from squall.placement import Layout, derive_layout, plan_layout, read_layout

from .networks import ConcatNet


def alexnet_layout(num_columns: int = 2) -> Layout:
    return derive_layout(models.AlexNet(), torch.zeros(1, 3, 224, 224), num_columns)


def test_alexnet_in_two_columns_is_figure_2() -> None:
    layout = alexnet_layout()
    assert {layer.name: layer.floats_per_image for layer in layout if layer.crosses} == {
        "conv3": 21632, "fc6": 4608, "fc7": 2048, "fc8": 2048,
    }  # fmt: skip
    assert not layout.other_floats_per_image
    for layer in layout:
        if layer.name != "fc8":
            assert layer.split == "columns"
            assert layer.parameters_per_rank * 2 == layer.num_parameters
    assert layout["fc8"].split == "whole"


def test_deriving_leaves_the_network_alone() -> None:
    net = ConcatNet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    derive_layout(net, torch.randn(2, 3, 16, 16), 3)
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(type(parameter) is nn.Parameter for parameter in net.parameters())


def test_prints_as_a_table() -> None:
    lines = str(alexnet_layout()).splitlines()
    assert lines[0].split() == ["layer", "kind", "split", "parameters", "per", "rank", "crosses", "floats/image"]
    conv3 = next(line for line in lines if line.startswith("conv3"))
    assert conv3.split() == ["conv3", "Conv2d", "columns", "885,120", "442,560", "yes", "21,632"]


def test_survives_yaml(tmp_path: Path) -> None:
    layout = alexnet_layout()
    path = tmp_path / "layout.yaml"
    path.write_text(layout.to_yaml())
    assert read_layout(path) == read_layout(str(path)) == layout.to_dict() == read_layout(layout)


def test_last_layer_is_the_one_that_runs_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.body = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    layout = derive_layout(Backwards(), torch.zeros(1, 4), 2)
    assert (layout["head"].split, layout["body"].split) == ("whole", "columns")


def test_overrides_by_name_and_pattern() -> None:
    layout = plan_layout(models.AlexNet(width=0.1), 2, {"conv*": "whole", "fc8": "columns"})
    splits = layout.to_dict()
    assert {splits[f"conv{n}"] for n in range(1, 6)} == {"whole"}
    assert splits["fc8"] == splits["fc6"] == "columns"
    assert layout["conv1"].reason == "by layout"


def test_narrow_and_odd_layers_are_kept_whole_and_say_why() -> None:
    layout = plan_layout(
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(2, 4, 1, groups=2), nn.Embedding(3, 4), nn.Linear(4, 4)), 3
    )
    assert [layer.reason for layer in layout] == [
        "2 outputs are fewer than 3 columns",
        "2 groups are fewer than 3 columns",
        "no rule to split this kind of layer",
        "last layer: the loss needs all of it",
    ]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"fc9": "whole"}, r"layout names 'fc9', which is no layer .*conv1.*fc8"),
        ({"conv1": "rows"}, r"layout\['conv1'\]='rows'.*'columns'.*'whole'"),
    ],
)
def test_refuses_what_it_cannot_follow(layout: dict[str, str], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        plan_layout(models.AlexNet(width=0.1), 2, read_layout(layout))


def test_refuses_an_impossible_split_with_the_line_to_write() -> None:
    with pytest.raises(MisconfigurationException, match=r"not possible for Conv2d.*layout=\{'0': 'whole'\}"):
        plan_layout(nn.Sequential(nn.Conv2d(3, 2, 1)), 3, {"0": "columns"})


def test_refuses_a_file_that_is_not_there() -> None:
    with pytest.raises(MisconfigurationException, match=r"'layout.yml' is neither 'auto' nor a YAML file"):
        read_layout("layout.yml")


def test_refuses_lazy_layers() -> None:
    with pytest.raises(MisconfigurationException, match="uninitialized"):
        plan_layout(nn.Sequential(nn.LazyLinear(3)), 2)


def test_a_layout_is_derived_of_shapes_alone() -> None:
    with torch.device("meta"):
        net = models.AlexNet(num_classes=10, image_size=28, in_channels=1)
    layout = derive_layout(net, torch.zeros(1, 1, 28, 28, device="meta"), num_columns=2)
    assert layout["conv3"].crosses
