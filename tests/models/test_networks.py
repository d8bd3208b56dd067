"""Networks: published parameter counts, shapes at every size, columns as groups, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from squall import models
from squall.models import AlexNet, LocalResponseNorm

NETWORKS = [
    "AlexNet",
    "AlexNetS",
    "AlexNetB",
    "VGG16",
    "VGGC",
    "VGGD",
    "VGGLike",
    "MobileNet",
    "WideResNet",
    "LeNet5",
    "LeNet300",
]


def count(net: nn.Module) -> tuple[int, int]:
    """Weights, and the rest (biases, batch normalisation)."""
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    num_weights = sum(layer.weight.numel() for layer in layers)
    return num_weights, sum(p.numel() for p in net.parameters()) - num_weights


@pytest.mark.parametrize(
    ("make", "weights", "rest"),
    [
        (lambda: AlexNet(), 60_954_656, 10_568),
        (lambda: models.AlexNetS(), 5_066_784, 2 * (1376 + 2048) + 10),
        (lambda: models.AlexNetB(), 8_484_896, 2 * (1376 + 4096) + 10),
        (lambda: models.VGG16(), 138_344_128, 13_416),
        (lambda: models.VGGC(), 10_521_280, None),
        (lambda: models.VGGD(), 15_239_872, None),
        (lambda: models.VGGLike(), 14_977_728, None),
        (lambda: models.MobileNet(), 4_231_976 - 22_888, 22_888),
        (lambda: models.WideResNet(16, 8), 10_961_370 - 7_210, 7_210),
        (lambda: models.WideResNet(28, 10), 36_479_194 - 17_962, 17_962),
        (lambda: models.LeNet5(), 430_500, 580),
        (lambda: models.LeNet300(), 266_200, 410),
    ],
)
def test_published_parameter_counts(make, weights, rest):
    with torch.device("meta"):
        num_weights, num_rest = count(make())
    assert num_weights == weights
    assert rest in (None, num_rest)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("image_size", "in_channels", "num_classes"), [(28, 1, 10), (32, 3, 7), (45, 3, 3)])
def test_shapes_at_small_sizes(name, image_size, in_channels, num_classes):
    arguments = dict(num_classes=num_classes, image_size=image_size, in_channels=in_channels)
    net = getattr(models, name)(**arguments, **({"widen_factor": 1, "depth": 10} if name == "WideResNet" else {}))
    assert {key: getattr(net, key) for key in arguments} == arguments
    logits = net.eval()(torch.randn(2, in_channels, image_size, image_size))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("WideResNet", "LeNet300")])
def test_shapes_at_large_sizes(name):
    for image_size in (64, 127, 128, 224):
        net = getattr(models, name)(num_classes=4, image_size=image_size, in_channels=3, width=0.05)
        assert net.eval()(torch.randn(1, 3, image_size, image_size)).shape == (1, 4)


@pytest.mark.parametrize(("name", "smallest"), [("AlexNet", 15), ("AlexNetS", 7), ("VGG16", 8), ("LeNet5", 16)])
def test_images_too_small_are_refused_by_name(name, smallest):
    cls = getattr(models, name)
    size = cls(image_size=smallest, width=0.1, num_classes=2, in_channels=3).image_size
    with pytest.raises(ValueError, match=f"image_size must be at least {smallest}, got {size - 1}"):
        cls(image_size=size - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlexNet(width=0), "width"),
        (lambda: AlexNet(num_columns=0), "num_columns"),
        (lambda: AlexNet(init="xavier"), 'init must be "paper", "he"'),
        (lambda: models.WideResNet(depth=17), "depth must be 6 n"),
        (lambda: models.WideResNet(widen_factor=0), "widen_factor"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        make()


def test_alexnet_has_the_papers_layers():
    with torch.device("meta"):
        net = AlexNet()
        maps = []
        for name in ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"):
            net.get_submodule(name).register_forward_hook(lambda m, a, out: maps.append(tuple(out.shape[1:])))
        net(torch.empty(1, 3, 224, 224))
    assert maps == [
        (96, 55, 55),
        (96, 27, 27),
        (256, 27, 27),
        (256, 13, 13),
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
        (256, 6, 6),
    ]
    groups = {name: m.groups for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, LocalResponseNorm))}
    assert groups == {"conv1": 1, "norm1": 2, "conv2": 2, "norm2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
    assert [net.get_submodule(f"fc{i}").out_features for i in (6, 7, 8)] == [4096, 4096, 1000]
    assert net.norm1.extra_repr() == "5, alpha=0.0001, beta=0.75, k=2.0, groups=2, relu=True"
    # Floats an image that cross between two columns, each way: before conv3, fc6, fc7 and fc8.
    assert sum(half // 2 for half in (256 * 13 * 13, 256 * 6 * 6, 4096, 4096)) == 30_336


@pytest.mark.parametrize("num_columns", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1.0, 0.25, 0.07])
def test_widths_are_multiples_of_the_columns(num_columns, width):
    with torch.device("meta"):
        net = AlexNet(num_columns=num_columns, width=width, image_size=32)
    for layer in (net.conv1, net.conv2, net.conv3, net.conv4, net.conv5):
        assert layer.out_channels % num_columns == 0
    assert net.conv1.out_channels == max(1, round(96 * width / num_columns)) * num_columns
    assert net.fc8.out_features == 1000


def test_normalisation_stays_within_a_column():
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    parts = [F.local_response_norm(part, 5, 1e-4, 0.75, 2.0) for part in x.chunk(3, 1)]
    torch.testing.assert_close(LocalResponseNorm(groups=3)(x), torch.cat(parts, 1))


def test_columns_meet_only_where_the_paper_says():
    net = AlexNet(num_classes=3, image_size=28, num_columns=2, width=0.1, in_channels=1).eval()
    seen = {"pool2": [], "conv3": []}
    for name in seen:
        net.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen[name].append(out))
    image = torch.randn(1, 1, 28, 28)
    net(image)
    half = net.conv1.out_channels // 2
    with torch.no_grad():
        net.conv1.weight[half:] += 1.0  # the second column's kernels
    net(image)
    before, after = seen["pool2"]
    middle = before.shape[1] // 2
    assert torch.equal(before[:, :middle], after[:, :middle])
    assert not torch.equal(before[:, middle:], after[:, middle:])
    before, after = seen["conv3"]
    assert (before != after).any(dim=(0, 2, 3)).all()  # every kernel of conv3 sees both


def test_the_papers_initialisation():
    net = AlexNet(num_classes=50, width=0.25, init="paper")
    for name, layer in net.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spread = 5 * 0.01 / (2 * layer.weight.numel()) ** 0.5
            assert abs(layer.weight.std().item() - 0.01) < spread, name
            assert abs(layer.weight.mean().item()) < 2 * spread
            expected = 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
            assert (layer.bias == expected).all(), name


def test_initialisation_follows_the_size():
    assert AlexNet(width=0.02).init == "paper"
    small = AlexNet(width=0.25, image_size=28)
    assert small.init == "he"
    fan_in = 5 * 5 * 12
    assert small.conv2.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert small.conv2.bias.abs().max() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    arguments = {"widen_factor": 1, "depth": 10} if name == "WideResNet" else {"width": 0.2}
    net = getattr(models, name)(num_classes=4, image_size=32, in_channels=3, **arguments)
    F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8) % 4).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
