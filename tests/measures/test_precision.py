from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from entropy_monitor.measures import row_statistics
from entropy_monitor.measures._precision import _parts, exact, matmul, products_round, working_dtype


@pytest.fixture(params=["high", "medium"])
def rounding_products(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_float32_matmul_precision(request.param)
    yield
    assert torch.get_float32_matmul_precision() == request.param  # left as the run has it
    torch.set_float32_matmul_precision("highest")


def test_float64_when_an_input_is() -> None:
    single, half, double = torch.zeros(1), torch.zeros(1).bfloat16(), torch.zeros(1).double()
    assert working_dtype(single, half) == torch.float32
    assert working_dtype(half) == torch.float32
    assert working_dtype(half, double) == torch.float64


def test_parts_fit_eight_bits_and_add_up() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    parts = _parts(x)
    for part in parts:
        assert torch.equal(part.bfloat16().float(), part)
    assert torch.equal(parts[2] + parts[1] + parts[0], x)


@pytest.mark.usefixtures("rounding_products")
def test_a_product_keeps_its_digits_where_the_run_lets_products_round() -> None:
    assert products_round()
    a, b = torch.randn(3, 40, 200), torch.randn(3, 200, 30)
    want = a.double() @ b.double()
    assert ((matmul(a, b).double() - want).abs().max() / want.abs().max()).item() < 1e-6
    assert torch.equal(matmul(a.double(), b.double()), want)


@pytest.mark.usefixtures("rounding_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_their_digits_where_the_run_lets_products_round(dtype: torch.dtype) -> None:
    q, k = (4 * torch.randn(1, 2, 5, 16)).to(dtype), torch.randn(1, 2, 30, 16).to(dtype)
    want = row_statistics(q.double(), k.double())
    for a, b in zip(row_statistics(q, k), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_products_are_plain_where_nothing_rounds() -> None:
    assert not products_round()
    a = torch.randn(5, 5)
    assert torch.equal(matmul(a, a), a @ a)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_off_inside(device: str) -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact(torch.device(device)):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
