"""The whole recipe in one command: ``python -m reference``. Stopped anywhere, it goes on from there.

Demonstrations by the disturbed experts, imitation; then episodes driven by that policy and labelled by the
experts (DAgger), imitation of both; export into the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reference.collect import collect
from reference.export import export
from reference.settings import DEMO_SEEDS, ROLLOUT_SEEDS, WORK
from reference.train import train

PACKAGED = Path("src/sqap/assets/reference")
HALFWAY, TOTAL = 2000, 5000
DEMONSTRATIONS, ROLLOUTS = 250, 50  # episodes a task


def main(workers: int, compile_model: bool) -> None:
    collect("demonstrations", DEMONSTRATIONS, DEMO_SEEDS, workers)
    train(["demonstrations"], HALFWAY, TOTAL, compile_model)
    driver = WORK / "halfway"
    if not driver.exists():
        export(driver)
    collect("rollouts", ROLLOUTS, ROLLOUT_SEEDS, workers, str(driver))
    train(["demonstrations", "rollouts"], TOTAL, TOTAL, compile_model)
    print(f"step {export(PACKAGED)} is in {PACKAGED}; evaluate it: sqap eval reference --env metaworld")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="simulators at a time")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    args = parser.parse_args()
    main(args.workers, args.compile)
