"""Sparse matrices times vectors against dense ones in double precision, whatever path serves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from squall import kernels
from squall.kernels import native
from squall.kernels.sparse_linear import (
    op,
    pack_codes,
    pack_dense,
    pack_gaps,
    pack_live,
    pack_values,
    packing,
    sparse_linear,
    sparse_linear_live,
    sparse_weight_grad,
)

PATHS = [*native.isas(), "torch"]
# Outputs, inputs, batch, density: odd ones, edges of tiles (127), slices (64) and lanes (16 and 32), and empty ones.
SHAPES = [
    (1, 1, 1, 1.0),
    (3, 5, 7, 0.5),
    (64, 127, 16, 0.3),
    (65, 128, 17, 0.3),
    (130, 255, 33, 0.05),
    (63, 381, 3, 1.0),
    (257, 129, 65, 0.02),
    (5, 300, 4, 0.0),
    (0, 4, 3, 0.0),
    (4, 0, 3, 0.0),
    (70, 30, 0, 0.5),
]


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    """Each instruction set, and Torch operations."""
    with native.forced(request.param):
        yield request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(num_rows: int, num_columns: int, density: float, seed: int = 3) -> Tensor:
    """A matrix with an empty row and an empty column, where there is room."""
    weight = torch.randn(num_rows, num_columns, dtype=torch.float64, generator=seeded(seed))
    weight *= torch.rand(num_rows, num_columns, generator=seeded(seed + 1)) < density
    if density < 1:
        weight[num_rows // 2 : num_rows // 2 + 1] = 0
        weight[:, num_columns // 3 : num_columns // 3 + 1] = 0
    return weight


def positions_of(weight: Tensor) -> Tensor:
    return weight.flatten().nonzero().squeeze(1)


def tolerances(dtype: torch.dtype, num_columns: int) -> dict[str, float]:
    size = (num_columns + 1) ** 0.5
    return {"rtol": 1e-5, "atol": 1e-5 * size} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13 * size}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_columns", "batch", "density"), SHAPES)
def test_equals_the_dense_matrix(num_rows, num_columns, batch, density, dtype):
    weight = sparse(num_rows, num_columns, density)
    bias = torch.randn(num_rows, dtype=torch.float64, generator=seeded(7))
    x = torch.randn(batch, num_columns, dtype=torch.float64, generator=seeded(5))
    for row_block in (1024, 40):
        packed = pack_dense(weight.to(dtype), row_block)
        assert torch.equal(packed.to_dense(), weight.to(dtype))
        assert packed.num_live == len(positions_of(weight))
        for given_bias, relu in ((None, False), (bias, False), (bias, True), (None, True)):
            expected = F.linear(x, weight, given_bias)
            expected = expected.relu() if relu else expected
            ours = sparse_linear(x.to(dtype), packed, None if given_bias is None else given_bias.to(dtype), relu)
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), expected, **tolerances(dtype, num_columns))


@pytest.mark.parametrize("num_codes", [1, 2, 16, 31, 32, 33, 127, 128, 129, 256])
@pytest.mark.parametrize("batch", [1, 5, 18])
def test_codebooks(num_codes, batch):
    weight = sparse(100, 300, 0.2)
    positions = positions_of(weight)
    codes = torch.randint(0, num_codes, (len(positions),), dtype=torch.uint8, generator=seeded())
    codes[-1] = num_codes - 1
    for dtype in (torch.float32, torch.float64):
        codebook = torch.randn(num_codes, dtype=dtype, generator=seeded(1)) + 1.5
        packed = pack_codes(positions, codes, codebook, (100, 300))
        dense = torch.zeros(100 * 300, dtype=torch.float64)
        dense[positions] = codebook[codes.long()].double()
        assert torch.equal(packed.to_dense().double(), dense.view(100, 300))
        x = torch.randn(batch, 300, dtype=dtype, generator=seeded(5))
        expected = F.linear(x.double(), dense.view(100, 300))
        torch.testing.assert_close(sparse_linear(x, packed).double(), expected, **tolerances(dtype, 3000))
        grad = torch.randn(batch, 100, dtype=dtype, generator=seeded(6))
        x.requires_grad_()
        sparse_linear(x, packed).backward(grad)
        torch.testing.assert_close(x.grad.double(), grad.double() @ dense.view(100, 300), **tolerances(dtype, 3000))


def test_more_columns_than_16_bits_count():
    num_columns = 70001
    positions = torch.tensor([0, 65536, 70000, 70001 + 65535, 3 * 70001 - 1])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    packed = pack_values(positions, values, (3, num_columns))
    for batch in (1, 9):
        x = torch.randn(batch, num_columns, generator=seeded())
        expected = torch.stack([x[:, 0] + 2 * x[:, 65536] + 3 * x[:, 70000], 4 * x[:, 65535], 5 * x[:, 70000]], dim=1)
        torch.testing.assert_close(sparse_linear(x, packed), expected)


@pytest.mark.parametrize(("num_rows", "num_columns", "batch", "density"), SHAPES)
def test_gradients_equal_the_dense_matrixs(num_rows, num_columns, batch, density):
    weight = sparse(num_rows, num_columns, density)
    positions = positions_of(weight)
    for dtype in (torch.float32, torch.float64):
        x, bias, grad = (
            torch.randn(shape, dtype=dtype, generator=seeded(5))
            for shape in ((batch, num_columns), (num_rows,), (batch, num_rows))
        )
        live = weight.flatten()[positions].to(dtype)
        packed, where = pack_live(positions, torch.zeros_like(live), (num_rows, num_columns), 40)
        ours = [tensor.clone().requires_grad_() for tensor in (x, live, bias)]
        result = sparse_linear_live(ours[0], ours[1], packed, where, ours[2], relu=True)
        result.backward(grad)
        dense = [tensor.double().clone().requires_grad_() for tensor in (x, weight, bias)]
        expected = F.linear(*dense).relu()
        expected.backward(grad.double())
        close = tolerances(dtype, num_rows + num_columns + batch)
        torch.testing.assert_close(result.double(), expected, **close)
        torch.testing.assert_close(ours[0].grad.double(), dense[0].grad, **close)
        torch.testing.assert_close(ours[1].grad.double(), dense[1].grad.flatten()[positions], **close)
        torch.testing.assert_close(ours[2].grad.double(), dense[2].grad, **close)


def test_threads_change_nothing(two_threads):
    weight = sparse(130, 255, 0.2)
    packed, where = pack_live(positions_of(weight), weight.flatten()[positions_of(weight)], (130, 255), 40)
    for batch in (2, 33):
        x, grad = (torch.randn(batch, size, dtype=torch.float64, generator=seeded()) for size in (255, 130))
        results = []
        for num_threads in (2, 1):
            torch.set_num_threads(num_threads)
            given = x.clone().requires_grad_()
            result = sparse_linear(given, packed)
            result.backward(grad)
            results.append((result, given.grad, sparse_weight_grad(x, grad, where.row_starts, where.columns)))
        for two, one in zip(*results, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-13, atol=1e-13)


def test_finite_differences():
    weight = sparse(9, 7, 0.5)
    positions = positions_of(weight)
    packed, where = pack_live(positions, weight.flatten()[positions], (9, 7))
    x, live, bias = (
        tensor.requires_grad_()
        for tensor in (
            torch.randn(3, 7, dtype=torch.float64, generator=seeded()),
            weight.flatten()[positions],
            torch.randn(9, dtype=torch.float64, generator=seeded(4)),
        )
    )
    frozen = packed._replace(values=packed.values.detach())
    assert torch.autograd.gradcheck(lambda x, bias: sparse_linear(x, frozen, bias, True), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: sparse_linear(x, frozen, bias), (x, bias))
    assert torch.autograd.gradcheck(
        lambda *given: sparse_linear_live(*given[:2], packed, where, given[2]), (x, live, bias)
    )


def test_any_shape_and_stride_of_x():
    weight = sparse(66, 140, 0.3)
    packed = pack_dense(weight)
    whole = torch.randn(4, 3, 280, dtype=torch.float64, generator=seeded())
    for x in (whole[..., ::2], whole[0, 0, :140], whole.transpose(0, 1)[..., 140:], whole[:0, :, :140]):
        torch.testing.assert_close(sparse_linear(x, packed), F.linear(x, weight), rtol=1e-12, atol=1e-12)


def test_live_weights_meet_only_their_inputs():
    weight = torch.zeros(70, 130)
    weight[:35, 0] = 1.0  # a slice of rows with weights, and without
    weight[:3, 1:40] = 1.0
    packed = pack_dense(weight)
    for batch in (1, 6):
        x = torch.ones(batch, 130)
        x[:, 39] = float("nan")
        x[:, 129] = float("inf")
        result = sparse_linear(x, packed)
        assert result[:, :3].isnan().all()
        assert torch.equal(result[:, 3:35], torch.ones(batch, 32))
        assert torch.equal(result[:, 35:], torch.zeros(batch, 35))
        assert sparse_linear(x, packed, relu=True)[:, :3].isnan().all()


def test_gradient_at_chosen_places():
    x, grad = (torch.randn(2, 3, size, generator=seeded(size)) for size in (50, 40))
    expected = grad.flatten(0, 1).t() @ x.flatten(0, 1)
    live = torch.rand(40, 50, generator=seeded()) < 0.3
    live[7] = False
    row_starts = torch.cat([torch.zeros(1, dtype=torch.int64), live.sum(1).cumsum(0)])
    columns = live.nonzero()[:, 1].int()
    torch.testing.assert_close(sparse_weight_grad(x, grad, row_starts, columns), expected[live])


def test_the_ops_keep_torchs_rules(path):
    weight = sparse(70, 130, 0.2)
    positions = positions_of(weight)
    packed, where = pack_live(positions, weight.flatten()[positions], (70, 130))
    coded = pack_codes(positions, (positions % 5).byte(), torch.randn(5, dtype=torch.float64), (70, 130))
    bias = torch.randn(70, dtype=torch.float64, requires_grad=True)
    for batch in (1, 5):
        x = torch.randn(batch, 130, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(batch, 70, dtype=torch.float64, requires_grad=True)
        numbers = 70, 130, packed.row_block, packed.num_live
        for matrix in (packed, coded):
            torch.library.opcheck(op.sparse_linear, (x, *matrix[:6], *numbers, bias, True))
            torch.library.opcheck(op.sparse_linear_input_grad, (grad, *matrix[:6], *numbers))
        torch.library.opcheck(op.sparse_weight_grad, (x.detach(), grad.detach(), where.row_starts, where.columns))
        live = weight.flatten()[positions].requires_grad_()
        columns, _, _, rows, starts, tiles = packed[:6]
        torch.library.opcheck(
            op.sparse_linear_live,
            (x, live, columns, rows, starts, tiles, *numbers[:3], bias, True, *where),
        )


def test_packing_follows_new_values_and_devices():
    packed = pack_dense(torch.eye(3))
    assert packed.to(torch.float64).dtype == torch.float64
    assert packed.to(torch.float64).columns.dtype == torch.uint8
    assert packed.shape == (3, 3)
    assert packed.num_bytes > 0
    x = torch.randn(2, 3)
    torch.testing.assert_close(sparse_linear(x, packed), x)
    packed.values.mul_(2)
    torch.testing.assert_close(sparse_linear(x, packed), 2 * x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device():
    weight = sparse(300, 500, 0.1).float()
    positions = positions_of(weight)
    codes = (positions % 37).byte()
    for packed in (pack_dense(weight), pack_codes(positions, codes, torch.randn(37), (300, 500))):
        for batch in (1, 6):
            x, bias = torch.randn(batch, 500), torch.randn(300)
            expected = F.linear(x, packed.to_dense(), bias).relu()
            ours = sparse_linear(x.cuda(), packed.to("cuda"), bias.cuda(), relu=True)
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


ONE = torch.tensor([1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_dense(torch.ones(3)), r"weight must have two dimensions"),
        (lambda: pack_dense(torch.ones(2, 2).half()), "values must be float32 or float64, got torch.float16"),
        (lambda: pack_dense(torch.ones(2, 2), 0), "row_block must be from 1 to 32767"),
        (lambda: pack_values(torch.tensor([3, 1]), torch.ones(2), (2, 2)), "positions must ascend"),
        (lambda: pack_values(torch.tensor([1, 1]), torch.ones(2), (2, 2)), "positions must ascend"),
        (lambda: pack_values(torch.tensor([4]), ONE, (2, 2)), "positions must be in a matrix of 2 x 2, from 0 to 3"),
        (lambda: pack_values(torch.tensor([-1]), ONE, (2, 2)), "positions must be in a matrix"),
        (
            lambda: pack_values(torch.tensor([1.0]), ONE, (2, 2)),
            "positions must be one row of int32 or int64, got torch.float32",
        ),
        (lambda: pack_values(torch.tensor([1, 2]), ONE, (2, 2)), "values must be as many as positions, 2, got 1"),
        (lambda: pack_values(torch.tensor([1]), ONE, (2,)), r"shape must be \(outputs, inputs\)"),
        (lambda: pack_codes(torch.tensor([1]), torch.tensor([1]), ONE, (2, 2)), "codes must be uint8, got torch.int64"),
        (
            lambda: pack_codes(torch.tensor([1]), torch.tensor([1]).byte(), ONE, (2, 2)),
            "codes must be below .* 1 values",
        ),
        (
            lambda: pack_codes(torch.tensor([1]), torch.tensor([1]).byte(), torch.ones(257), (2, 2)),
            "at most 256 values",
        ),
        (lambda: pack_codes(torch.tensor([1]), torch.tensor([]).byte(), ONE, (2, 2)), "codes must be as many"),
        (lambda: sparse_linear(torch.ones(2, 4), pack_dense(torch.eye(3))), "x must have 3 inputs"),
        (lambda: sparse_linear(torch.tensor(1.0), pack_dense(torch.eye(3))), "x must have 3 inputs"),
        (lambda: sparse_linear(torch.ones(3).double(), pack_dense(torch.eye(3))), "x must be torch.float32 on cpu"),
        (lambda: sparse_linear(torch.ones(3, device="meta"), pack_dense(torch.eye(3))), "got torch.float32 on meta"),
        (lambda: sparse_linear(torch.ones(3), pack_dense(torch.eye(3)), torch.ones(2)), r"bias must have shape \(3,\)"),
        (
            lambda: sparse_linear_live(torch.ones(3), torch.ones(2), *pack_live(torch.arange(1), ONE, (2, 3))),
            "live must be 1 weights",
        ),
        (
            lambda: sparse_weight_grad(torch.ones(2, 3), torch.ones(3, 3), torch.zeros(4).long(), torch.ones(0).int()),
            "grad must have the batch of x",
        ),
        (
            lambda: sparse_weight_grad(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3).long(), torch.ones(0).int()),
            "row_starts must be 4 numbers of int64",
        ),
        (
            lambda: sparse_weight_grad(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(4).long(), torch.ones(0)),
            "columns must be one row of int32",
        ),
    ],
)
@pytest.mark.parametrize("path", [PATHS[-2]], indirect=True)
def test_refusals_name_the_argument(call, message, path):
    with pytest.raises(ValueError, match=message):
        call()


def test_trained_values_are_sent_elsewhere():
    packed = pack_dense(torch.eye(3))
    packed.values.requires_grad_()
    with pytest.raises(ValueError, match="use sparse_linear_live"):
        sparse_linear(torch.ones(3), packed)


def test_available_tells(path):
    assert kernels.available()["sparse_linear"] == path


@given(st.integers(0, 150), st.integers(0, 400), st.floats(0, 1), st.integers(1, 200), st.sampled_from([1, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_weights_are_packed_alike_by_loops_and_in_numpy(num_rows, num_columns, density, row_block, width):
    places = positions_of(sparse(num_rows, num_columns, density)).numpy()
    values = np.arange(1, len(places) + 1).astype({1: np.uint8, 4: np.float32, 8: np.float64}[width])
    row_block = max(1, min(row_block, num_rows))
    results = []
    for isa, of_dtype in (("torch", np.int64), (native.isa(), np.int64), (native.isa(), np.int32)):
        with native.forced(isa):
            arranged = packing.arrange(places.astype(of_dtype), num_rows, num_columns, row_block)
            results.append((*arranged.fill(values), arranged.slots(), *arranged[:6]))
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            assert ours.dtype == expected.dtype
            assert np.array_equal(ours, expected)


GAPS = st.sampled_from([(torch.uint8, 1), (torch.uint8, 7), (torch.uint8, 255), (torch.uint16, 300)])


def gaps_of(positions, longest, dtype):
    """To the next weight, with what goes on without one, as files have them."""
    gaps = []
    for distance in positions.diff(prepend=torch.tensor([-1])).tolist():
        gaps += [0] * ((distance - 1) // longest) + [(distance - 1) % longest + 1]
    return torch.tensor(gaps, dtype=torch.int32).to(dtype)


@pytest.mark.skipif(not native.serves(), reason="there are no compiled kernels")
@given(st.integers(0, 90), st.integers(0, 400), st.floats(0, 1), st.integers(1, 99), GAPS, st.sampled_from([1, 4, 8]))
@settings(max_examples=80, deadline=None)
def test_gaps_are_packed_as_their_sums(num_rows, num_columns, density, row_block, of_gap, width):
    positions, (dtype, longest) = positions_of(sparse(num_rows, num_columns, density)), of_gap
    shape, gaps = (num_rows, num_columns), gaps_of(positions, longest, dtype)
    values = torch.arange(1, len(positions) + 1)
    if width == 1:
        codes, codebook = (values % 200).to(torch.uint8), torch.randn(200)
        expected = pack_codes(positions, codes, codebook, shape, row_block)
        packed = pack_gaps(gaps, longest, codes, codebook, shape, row_block)
    else:
        values = values.to({4: torch.float32, 8: torch.float64}[width])
        expected = pack_values(positions, values, shape, row_block)
        packed = pack_gaps(gaps, longest, None, values, shape, row_block)
    for ours, theirs in zip(packed, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.skipif(not native.serves(), reason="there are no compiled kernels")
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.9])
@pytest.mark.parametrize("num_columns", [30, 127, 128, 5000, 200_000])
def test_rows_without_weights_and_long_ones(num_columns, density):
    """Rows end anywhere among the gaps that are counted at once, or where none is; more runs than are kept at once."""
    shape = (600_000 // num_columns, num_columns)
    weight = sparse(*shape, density)
    if len(weight) > 7:
        weight[::7] = 0
    positions = positions_of(weight)
    values = torch.arange(1.0, len(positions) + 1)
    for longest in (255, 20):
        packed = pack_gaps(gaps_of(positions, longest, torch.uint8), longest, None, values, shape)
        for ours, theirs in zip(packed, pack_values(positions, values, shape), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.skipif(not native.serves(), reason="there are no compiled kernels")
@pytest.mark.parametrize(
    ("gaps", "num", "message"),
    [
        ([1, 2], 3, "don't lead to 3 weights"),
        ([1, 2, 3], 2, "don't lead to 2 weights"),
        ([], 1, "don't lead to 1 weights"),
        ([1, 5], 2, "past the end, 4 weights"),
        ([1, 3, 0], 2, "past the end, 4 weights"),
        ([200, 200], 2, "past the end, 4 weights"),
        ([1] * 50, 50, "past the end, 4 weights"),
        ([200] * 50, 50, "past the end, 4 weights"),
        ([1] * 50, 49, "don't lead to 49 weights"),
    ],
)
def test_gaps_that_lead_elsewhere(gaps, num, message):
    with pytest.raises(ValueError, match=message):
        pack_gaps(torch.tensor(gaps, dtype=torch.uint8), 5, None, torch.ones(num), (2, 2))
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        pack_gaps(torch.tensor(gaps, dtype=torch.uint8), 0, None, torch.ones(num), (2, 2))
    with pytest.raises(ValueError, match="gaps must be one row of uint8 or uint16"):
        pack_gaps(torch.tensor(gaps), 5, None, torch.ones(num), (2, 2))


@pytest.mark.parametrize("num_codes", [None, 20, 100, 200])
def test_parts_of_a_matrix_add_up(num_codes, two_threads, monkeypatch):
    """However many, with no thread's sums but those of the task."""
    weight = sparse(130, 1300, 0.2)
    positions, bias = positions_of(weight), torch.randn(130, dtype=torch.float64, generator=seeded())
    codes = torch.arange(len(positions)) % (num_codes or 1)
    values = weight.flatten()[positions] if num_codes is None else torch.randn(num_codes, generator=seeded()).double()
    weight.view(-1)[positions] = values if num_codes is None else values[codes]
    for dtype in (torch.float32, torch.float64):
        if num_codes is None:
            packed = pack_values(positions, values.to(dtype), (130, 1300), 50)
        else:
            packed = pack_codes(positions, codes.to(torch.uint8), values.to(dtype), (130, 1300), 50)
        for batch in (1, 3):
            x = torch.randn(batch, 1300, dtype=torch.float64, generator=seeded())
            expected = F.linear(x, weight.double(), bias).relu()
            results = []
            for part_slots in (1, 1 << 10, 1 << 18):
                monkeypatch.setattr(op, "_PART_SLOTS", part_slots)
                for num_threads in (1, 2):
                    torch.set_num_threads(num_threads)
                    results.append(sparse_linear(x.to(dtype), packed, bias.to(dtype), relu=True))
                assert torch.equal(*results[-2:])
                torch.testing.assert_close(results[-1].double(), expected, **tolerances(dtype, 1300))
