"""Position tables and their grids."""

from __future__ import annotations

import math

import pytest
import torch

from kernelpose.models.position import guess_grid, resize_position_table


def table_of(grid: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, grid[0] * grid[1] + 1, 5, generator=generator)


def cubic_weights(old: int, new: int) -> torch.Tensor:
    """(new, old) weights of cubic convolution (a = -0.75), pixel centres, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        first = math.floor(place) - 1
        for tap in range(first, first + 4):
            x = abs(place - tap)
            if x <= 1:
                value = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                value = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), old - 1)] += value
    return weights


@pytest.mark.parametrize("new_grid", [(24, 18), (8, 6), (12, 16), (16, 16)])
def test_rows_and_columns_are_resized_bicubically(new_grid: tuple[int, int]) -> None:
    grid = (16, 12)
    table = table_of(grid)
    resized = resize_position_table(table, grid, new_grid)
    rows, columns = (cubic_weights(old, new) for old, new in zip(grid, new_grid, strict=True))
    tokens = table[0, 1:].double().reshape(*grid, 5)
    expected = torch.einsum("rh,cw,hwk->rck", rows, columns, tokens).reshape(1, -1, 5)
    assert torch.equal(resized[:, 0], table[:, 0])
    torch.testing.assert_close(resized[:, 1:], expected.float(), rtol=1e-4, atol=1e-5)


def test_the_same_grid_is_the_same_table() -> None:
    table = table_of((4, 3))
    assert resize_position_table(table, (4, 3), (4, 3)) is table


def test_a_table_that_does_not_hold_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"; expected \(1, 13, C\) for a grid of 4x3"):
        resize_position_table(table_of((4, 4)), (4, 3), (8, 6))


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (192, (16, 12)),
        (432, (24, 18)),
        (768, (32, 24)),
        (256, (16, 16)),
        (196, (14, 14)),
        (200, None),
        (0, None),
    ],
)
def test_guess(tokens: int, grid: tuple[int, int] | None) -> None:
    assert guess_grid(tokens) == grid
