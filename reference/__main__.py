"""The whole recipe in one command: ``python -m reference``. Stopped anywhere, it goes on from there.

Demonstrations by the disturbed experts, imitation; then episodes driven by that policy and labelled by the
experts (DAgger), imitation of both; export to where the policy is kept.
"""

from __future__ import annotations

import argparse

from reference.blueprint import Blueprint
from reference.collect import collect
from reference.export import export
from reference.nano import NANO
from reference.settings import DEMO_SEEDS, ROLLOUT_SEEDS
from reference.smollm import blueprint as smollm
from reference.smolvla import blueprint as smolvla
from reference.train import train

PLANS = {"nano": lambda: NANO, "smollm": smollm, "smolvla": smolvla}


def main(plan: Blueprint, workers: int, compile_model: bool) -> None:
    data = collect("demonstrations", plan.demonstrations, DEMO_SEEDS, workers)
    if plan.halfway:
        train(plan, data, plan.halfway, compile_model)
        driver = plan.work / "halfway"
        if not driver.exists():
            export(plan, driver)
        name = f"rollouts-{plan.name}"
        data += collect(name, plan.rollouts, ROLLOUT_SEEDS, workers, str(driver))
    train(plan, data, plan.steps, compile_model)
    step = export(plan, plan.packaged)
    print(f"step {step} is in {plan.packaged}; evaluate it: sqap eval {plan.packaged} --env metaworld")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    parser.add_argument("policy", nargs="?", default="nano", choices=PLANS)
    parser.add_argument("--workers", type=int, default=2, help="simulators at a time")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    args = parser.parse_args()
    main(PLANS[args.policy](), args.workers, args.compile)
