"""The whole recipe in one command: ``python -m reference``. Stopped anywhere, it goes on from there.

1. 250 demonstrations a task by the scripted experts, disturbed; 2. imitation up to step `HALFWAY`;
3. 50 episodes a task driven by that policy, labelled by the experts (DAgger); 4. imitation of both to the
end; 5. export into the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reference.collect import collect
from reference.export import export
from reference.settings import WORK
from reference.train import train

HALFWAY, TOTAL = 2000, 5000
DEMONSTRATIONS, ROLLOUTS = 250, 50  # episodes per task
PACKAGED = Path("src/sqap/assets/reference")


def main(workers: int, compile_model: bool) -> None:
    collect("demonstrations", DEMONSTRATIONS, workers)
    train(["demonstrations"], HALFWAY, TOTAL, compile_model)
    halfway = WORK / "halfway"
    if not halfway.exists():
        export(halfway)
    collect("rollouts", ROLLOUTS, workers, str(halfway))
    train(["demonstrations", "rollouts"], TOTAL, TOTAL, compile_model)
    print(f"step {export(PACKAGED)} is in {PACKAGED}; evaluate it: sqap eval reference --env metaworld")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reference", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="simulators at a time")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    args = parser.parse_args()
    main(args.workers, args.compile)
