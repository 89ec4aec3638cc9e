"""What an evaluation leaves in a model card."""

import dataclasses

from sqap.recipe import Pruning
from sqap.report.evidence import paired_success, tuned
from sqap.tune import Cost, Setting, Standing

ONE = {
    "env": "metaworld",
    "seed": 1_000_000,
    "ensemble": None,
    "tasks": {"drawer-open": {"successes": 9, "episodes": 10}, "reach": {"successes": 5, "episodes": 10}},
    "success": 0.7,
    "success_ci95": [0.481, 0.855],
}
RIVAL = ONE | {"policy": "org/policy", "success": 0.75, "success_ci95": [0.531, 0.888]}
PAIRED = {"difference": -0.05, "difference_ci95": [-0.2, 0.1], "mcnemar_p": 1.0}


def test_a_paired_comparison_says_what_was_run_and_how_sure_it_is():
    title, text = paired_success(ONE | {"policy": "/home/me/small", "against": RIVAL | PAIRED})
    assert title == "Success in `metaworld`, beside `org/policy`"
    assert text == (
        "20 pairs of episodes with the same seeds and the same noise, 2 tasks (`drawer-open`, `reach`), each "
        "task from seed 1000000 on.\n\n| | success | 95 % interval |\n|---|---|---|\n"
        "| this policy | 70.0 % | 48.1 to 85.5 |\n| the other | 75.0 % | 53.1 to 88.8 |\n\n"
        "Paired difference -5.0 points (95 % interval -20.0 to +10.0), McNemar's exact p = 1.000."
    )


def test_where_the_rival_was_on_this_machine_is_not_told(tmp_path):
    (tmp_path / "a`b").mkdir()
    rival = RIVAL | PAIRED | {"policy": str(tmp_path / "a`b")}
    title, text = paired_success(ONE | {"ensemble": 4, "against": rival})
    assert title == "Success in `metaworld`, beside `` a`b ``"
    assert "the average of up to 4 chunks" in text
    assert str(tmp_path) not in title + text


def test_what_tuning_confirmed_is_beside_the_original():
    cost = Cost(12.0, 10.0, 1500.0, 2_500_000)
    standing = Standing(Setting("w4a8", Pruning(0.4, 3)), cost, 60, -0.01, -0.05, 0.03)
    title, text = tuned(standing, 3.0, "metaworld", ["reach"], 600_000)
    assert title == "Success in `metaworld`, beside the original"
    found = (
        "w4a8, keep 0.4 after layer 3: a step of 12.0 ms (10.0 ms to 1.50 s), 2.50 MB; on 60 pairs of other "
        "seeds -1.0 points (-5.0 to +3.0 at 95 %)"
    )
    ran = "Run were 1 task (`reach`), each from seed 600000 on."
    assert text == f"{found}, which bears that out; 3 points were allowed. {ran}"
    unlimited = tuned(
        dataclasses.replace(standing, setting=Setting("w8a8", None)), None, "m", ["reach"], 600_000
    )
    assert (
        unlimited[1]
        == f"{found.replace('w4a8, keep 0.4 after layer 3', 'w8a8, keep all visual tokens')}. {ran}"
    )
