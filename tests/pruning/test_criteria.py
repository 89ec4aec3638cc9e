from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqap.pruning import criteria

grids = st.integers(1, 9)
coordinates = st.floats(-1.5, 2.5)


def patch_centre(index: int, grid: int) -> tuple[float, float]:
    return (index % grid + 0.5) / grid, (index // grid + 0.5) / grid


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_top_k_is_a_sort_with_ties_to_the_lower_index(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert criteria.top_k(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40), st.integers(0, 41))
def test_the_first_of_the_marked_tokens_are_chosen(tokens: list[tuple[int, bool]], count: int) -> None:
    scores, free = (torch.tensor(values) for values in zip(*tokens, strict=True))
    best = sorted((i for i, (_, marked) in enumerate(tokens) if marked), key=lambda i: (-tokens[i][0], i))
    for number in (count, torch.tensor(count)):
        chosen = criteria.first(criteria.ranked(scores), free, number)
        assert chosen.nonzero().flatten().tolist() == sorted(best[:count])
    assert torch.equal(criteria.places(chosen, len(best[:count])), chosen.nonzero().flatten())


@given(grids, st.tuples(coordinates, coordinates), st.floats(0, 1), st.floats(0, 1))
def test_ring_holds_the_patches_between_its_radii(
    grid: int, centre: tuple[float, float], inner: float, width: float
) -> None:
    mask = criteria.ring(grid, centre, inner, inner + width)
    assert mask.shape == (grid * grid,)
    for i, inside in enumerate(mask.tolist()):
        distance = math.dist(patch_centre(i, grid), centre)
        if min(abs(distance - inner), abs(distance - inner - width)) > 1e-9:
            assert inside == (inner < distance < inner + width)


def test_ring_counts_u_from_the_left_and_v_from_the_top() -> None:
    # The top right patch of four by four: column 3, row 0.
    assert criteria.ring(4, (0.875, 0.125), 0.0, 0.01).nonzero().tolist() == [[3]]


def test_ring_leaves_out_the_middle_and_includes_both_radii() -> None:
    mask = criteria.ring(4, (0.375, 0.375), 0.25, 0.5).view(4, 4)
    expected = [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]]
    assert mask.int().tolist() == expected


@st.composite
def partly_kept(draw: st.DrawFn) -> tuple[int, torch.Tensor, int]:
    grid = draw(st.integers(1, 6))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=grid**2, max_size=grid**2)))
    return grid, kept, draw(st.integers(0, int((~kept).sum())))


def greedy(grid: int, kept: torch.Tensor, count: int) -> list[int]:
    """Farthest-point sampling by the definition, in whole numbers."""
    chosen = kept.nonzero().flatten().tolist()
    picked: list[int] = []

    def squared(i: int, j: int) -> int:
        return (i // grid - j // grid) ** 2 + (i % grid - j % grid) ** 2

    def from_middle(i: int) -> int:
        return (2 * (i // grid) - grid + 1) ** 2 + (2 * (i % grid) - grid + 1) ** 2

    while len(picked) < count:
        best, best_gap = -1, -math.inf
        for i in range(grid * grid):
            gap = min((squared(i, j) for j in chosen), default=-from_middle(i))
            if i not in chosen and gap > best_gap:
                best, best_gap = i, gap
        picked.append(best)
        chosen.append(best)
    return picked


@given(partly_kept())
def test_farthest_points_equal_the_greedy_definition(case: tuple[int, torch.Tensor, int]) -> None:
    grid, kept, count = case
    assert criteria.farthest_points(grid, kept, count).tolist() == greedy(grid, kept, count)


@pytest.mark.parametrize("grid", range(1, 8))
def test_farthest_points_without_a_start_begin_in_the_middle(grid: int) -> None:
    none = torch.zeros(grid**2, dtype=torch.bool)
    count = min(4, grid**2)
    assert criteria.farthest_points(grid, none, count).tolist() == greedy(grid, none, count)


@pytest.mark.parametrize("kept", [[], [5]])
def test_ties_of_farthest_points_follow_the_generator_alone(kept: list[int]) -> None:
    mask = torch.zeros(16, dtype=torch.bool)
    mask[kept] = True

    def draw(seed: int) -> list[int]:
        return criteria.farthest_points(4, mask, 6, torch.Generator().manual_seed(seed)).tolist()

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(8)}) > 1


def test_farthest_points_leave_what_they_are_given_alone() -> None:
    kept = torch.zeros(16, dtype=torch.bool)
    kept[5] = True
    first = criteria.farthest_points(4, kept, 6)
    assert kept.nonzero().tolist() == [[5]]
    assert torch.equal(first, criteria.farthest_points(4, kept, 6))


@given(partly_kept(), st.integers(0, 2**31), st.booleans())
def test_farthest_points_are_chosen_of_what_is_left(
    case: tuple[int, torch.Tensor, int], seed: int, chance: bool
) -> None:
    grid, kept, count = case
    left = torch.rand(len(kept), generator=torch.Generator().manual_seed(seed)) < 0.5
    left |= kept
    count = min(count, int((left & ~kept).sum()))
    generator = torch.Generator().manual_seed(seed) if chance else None
    found = criteria.farthest_points(grid, kept, count, generator, left).tolist()
    assert len(set(found)) == count
    assert all(left[i] and not kept[i] for i in found)


def test_the_first_farthest_point_is_left_where_the_middle_is_gone() -> None:
    none, left = torch.zeros(2, 16, dtype=torch.bool)
    left[15] = True  # whose rank is lowest
    assert criteria.farthest_points(4, none, 1, left=left).tolist() == [15]
    left[3] = True
    assert criteria.farthest_points(4, none, 2, left=left).tolist() == [3, 15]


def test_random_orders_follow_their_generator() -> None:
    def draw(seed: int) -> list[int]:
        return criteria.permutation(64, torch.Generator().manual_seed(seed)).tolist()[:20]

    assert draw(3) == draw(3) != draw(4)
    assert len(set(draw(3))) == 20


@given(st.integers(1, 20).flatmap(lambda g: st.tuples(st.just(g), st.integers(1, g * g))))
def test_uniform_grid_is_exact_and_shares_rows_evenly(case: tuple[int, int]) -> None:
    grid, count = case
    indices = criteria.uniform_grid(grid, count)
    assert len(indices) == count
    assert (indices.diff() > 0).all()
    per_row = torch.bincount(indices // grid, minlength=grid)
    assert per_row.max() - per_row.min() <= 1
    assert len(per_row) == grid


@pytest.mark.parametrize(
    ("grid", "count", "expected"),
    [(3, 4, [1, 2, 1]), (4, 6, [2, 1, 2, 1]), (5, 7, [1, 2, 1, 2, 1])],
)
def test_the_rows_of_a_uniform_grid_round_half_up(grid: int, count: int, expected: list[int]) -> None:
    rows = torch.bincount(criteria.uniform_grid(grid, count) // grid, minlength=grid)
    assert rows.tolist() == expected


@pytest.mark.parametrize("count", [16, 37, 64, 102, 154])
def test_uniform_grid_leaves_no_large_hole(count: int) -> None:
    kept = criteria.uniform_grid(16, count).tolist()
    hole = max(min(math.dist(divmod(i, 16), divmod(j, 16)) for j in kept) for i in range(256))
    # A perfect lattice leaves 0.71 of the spacing sqrt(256 / count), random tokens more than 1.4.
    assert hole < 1.3 * math.sqrt(256 / count)


@given(grids, st.data())
def test_farthest_points_as_tensor_operations_are_the_same(grid: int, data: st.DataObject) -> None:
    tokens, seed = grid * grid, data.draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    left = torch.rand(tokens) < data.draw(st.sampled_from([0.5, 1.1]))
    kept = left & (torch.rand(tokens) < data.draw(st.sampled_from([0, 0.1, 0.6])))
    free = int((left & ~kept).sum())
    count = data.draw(st.integers(0, free))
    most = data.draw(st.integers(count, tokens))
    rank = criteria.permutation(tokens)
    picked = criteria.farthest_points(grid, kept, count, left=left, rank=rank)
    expected = torch.zeros(tokens, dtype=torch.bool)
    expected[picked] = True
    found = criteria.farthest_mask(grid, kept, torch.tensor(count), most, rank, left)
    assert torch.equal(found, expected)
