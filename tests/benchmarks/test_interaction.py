"""The interaction of quantization and pruning, by hand."""

import pytest
from interaction import interaction

TASKS = ("open", "close")


def successes(*rates: int) -> dict[tuple[str, int], bool]:
    """Ten episodes of each task, of which the first so many succeed."""
    return {(task, seed): seed < rate for task, rate in zip(TASKS, rates, strict=True) for seed in range(10)}


def test_losses_that_add_up_have_no_interaction():
    full = {"unpruned": successes(10, 10), "pruned": successes(8, 7)}
    quantized = {"unpruned": successes(9, 8), "pruned": successes(7, 5)}
    assert interaction(full, quantized, ["pruned"]) == {"difference": 0.0, "ci95": [0.0, 0.0]}


def test_what_is_lost_beyond_the_sum_is_negative_and_its_interval_spans_the_tasks():
    full = {"unpruned": successes(10, 10), "few": successes(8, 7), "fewer": successes(6, 6)}
    quantized = {"unpruned": successes(9, 8), "few": successes(4, 5), "fewer": successes(2, 2)}
    few = interaction(full, quantized, ["few"])  # -0.3 and 0
    assert few["difference"] == pytest.approx(-0.15)
    assert few["ci95"] == pytest.approx([-0.3, 0])
    both = interaction(full, quantized, ["few", "fewer"])  # "fewer": -0.3 and -0.2
    assert both["difference"] == pytest.approx((-0.15 - 0.25) / 2)
