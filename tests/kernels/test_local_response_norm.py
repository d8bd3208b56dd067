"""Local response normalisation against Torch's, group by group, and its gradients against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import squall.kernels.local_response_norm as folder  # noqa: F401  (must not shadow the function)
from squall import kernels
from squall.kernels import local_response_norm, native
from squall.kernels.local_response_norm import op, torch_path

SHAPES = [(3, 7, 5), (2, 12, 5, 3), (2, 6, 3, 2, 4)]
PATHS = [*native.isas(), "torch"]


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    """Each instruction set, and Torch operations."""
    with native.forced(request.param):
        yield request.param


def reference(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    return torch.cat([F.local_response_norm(part, size, alpha, beta, k) for part in x.chunk(groups, 1)], 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6])
def test_equals_torch_in_each_group(shape, size, beta):
    for groups in (1, shape[1], 3 if shape[1] % 3 == 0 else 7):
        x, expected_x = (torch.randn(shape, dtype=torch.float64, generator=seeded()).requires_grad_() for _ in range(2))
        grad = torch.randn(shape, dtype=torch.float64)
        result = local_response_norm(x, size, 0.7, beta, 1.5, groups=groups)
        expected = reference(expected_x, size, 0.7, beta, 1.5, groups)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        result.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-12, atol=1e-12)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_channels_without_space():
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = reference(x.unsqueeze(-1), 3, 0.5, 0.75, 1.0, 2).squeeze(-1)
    torch.testing.assert_close(local_response_norm(x, 3, 0.5, 0.75, 1.0, 2), expected)


@pytest.mark.parametrize("path", {PATHS[-2], "torch"}, indirect=True)
@pytest.mark.parametrize(
    ("shape", "size", "beta"), zip(SHAPES + SHAPES, [2, 5] * 3, [0.75, 0.5, 1.0, 0.6, 0.75, 0.5], strict=False)
)
def test_gradients_of_both_orders(shape, size, beta, path):
    x = torch.randn(shape, dtype=torch.float64, generator=seeded())[:1].requires_grad_()
    groups = 1 if shape[1] % 2 else 2

    def function(x):
        return local_response_norm(x, size, 0.8, beta, 1.2, groups)

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_batches_larger_than_the_cache_are_worked_on_in_parts(monkeypatch, path):
    if path != "torch":
        pytest.skip("the compiled kernel always works in parts")
    x = torch.randn(7, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    whole = local_response_norm(x, 3, 0.5, 0.75, 1.0, 2)
    whole_grad = torch.autograd.grad(whole, x, grad)[0]
    for chunk in (1, 2 * 36, 3 * 36 + 5):
        monkeypatch.setattr(torch_path, "CHUNK", chunk)
        parts = local_response_norm(x, 3, 0.5, 0.75, 1.0, 2)
        assert torch.equal(parts, whole)
        assert torch.equal(torch.autograd.grad(parts, x, grad)[0], whole_grad)


def test_strided_inputs_and_gradients():
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    result = local_response_norm(x, 3, 0.5, 0.75, 1.0, 2)
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = reference(x, 3, 0.5, 0.75, 1.0, 2)
    torch.testing.assert_close(result, expected)
    expanded = torch.ones(1, dtype=torch.float64).expand_as(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, expanded)[0] for y in (result, expected)))
    part = x[:, ::2]
    torch.testing.assert_close(local_response_norm(part, 3, 0.5), F.local_response_norm(part, 3, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_single(dtype):
    x = torch.full((2, 5, 3), 300.0).to(dtype).requires_grad_()  # its square is past float16's largest
    result = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    assert result.dtype == dtype
    expected = local_response_norm(x.detach().float(), 5, 1e-4, 0.75, 2.0)
    torch.testing.assert_close(result.float(), expected, rtol=1e-2, atol=0)
    result.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def test_keeps_only_its_input():
    x = torch.randn(3, 4, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        local_response_norm(x, 3)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_subclasses_see_the_public_function():
    class Recorder(Tensor):
        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append((func, args[1:]))
            return "handled"

    assert local_response_norm(torch.ones(1, 4).as_subclass(Recorder), 3, 0.1, 0.75, 2.0, groups=2) == "handled"
    assert Recorder.seen == [(kernels.local_response_norm, (3, 0.1, 0.75, 2.0, 2, False))]


def test_empty_batches():
    x = torch.empty(0, 4, 3, requires_grad=True)
    assert local_response_norm(x, 3).shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("shape", "size", "groups", "message"),
    [((2, 6, 3), 3, 4, "groups=4"), ((2, 6), 0, 1, "size"), ((6,), 3, 1, "channel"), ((2, 6), 3, 0, "groups=0")],
)
def test_refusals_name_the_argument(shape, size, groups, message):
    with pytest.raises(ValueError, match=message):
        local_response_norm(torch.ones(shape), size, groups=groups)


def test_available_names_every_public_kernel():
    assert callable(kernels.local_response_norm)
    assert set(kernels.available()) == set(kernels.__all__) - {"available"}
    assert kernels.available()["local_response_norm"] == native.isa()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 6, 17, 31), (1, 1, 1, 1), (3, 48, 1, 5), (2, 96, 16, 16), (1, 4, 33, 1)], ids=str
)
def test_agrees_with_double_precision_in_both_layouts(shape, dtype, memory_format):
    x, grad = (torch.randn(shape, generator=seeded(), dtype=torch.float64) for _ in range(2))
    exact = x.clone().requires_grad_()
    reference(exact, 5, 0.3, 0.75, 2.0, 1).backward(grad)
    ours = x.to(dtype).to(memory_format=memory_format).requires_grad_()
    result = local_response_norm(ours, 5, 0.3, 0.75, 2.0)
    result.backward(grad.to(dtype))
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(result.double(), reference(x, 5, 0.3, 0.75, 2.0, 1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_relu_before_it(memory_format):
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=seeded()).to(memory_format=memory_format)
    apart, fused = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn_like(x)
    results = (
        local_response_norm(apart.relu(), 5, 0.3, groups=2),
        local_response_norm(fused, 5, 0.3, groups=2, relu=True),
    )
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)
    for result in results:
        result.backward(grad, retain_graph=True)
    torch.testing.assert_close(apart.grad, fused.grad, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda x: local_response_norm(x, 5, 0.3, relu=True), (fused,))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_change_nothing(num_threads):
    x = torch.randn(3, 5, 40, 41, requires_grad=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        result = local_response_norm(x, 5, 0.3)
        result.backward(torch.ones_like(x))
    finally:
        torch.set_num_threads(before)
    expected = local_response_norm(x, 5, 0.3)
    assert torch.equal(result, expected)
    assert torch.equal(x.grad, torch.autograd.grad(expected, x, torch.ones_like(x))[0])


def test_the_ops_keep_torchs_rules():
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    for given in (x, x.to(memory_format=torch.channels_last), x[:, ::2], x[:0]):
        given = given.detach().requires_grad_()
        torch.library.opcheck(op.local_response_norm, (given, 5, 0.1, 0.75, 2.0, 1, True))
        grad = torch.randn_like(given).requires_grad_()
        torch.library.opcheck(op.local_response_norm_backward, (grad, given, 5, 0.1, 0.75, 2.0, 1, False))


def test_not_a_number_stays_one():
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0]]).view(1, 4, 1, 1)
    for relu in (False, True):
        assert local_response_norm(x, 3, relu=relu).isnan().flatten().tolist() == [True, True, True, False]


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch.int64"):
        local_response_norm(torch.ones(2, 3, dtype=torch.int64), 3)
