"""What the reference policy is trained on. Every file of the recipe reads its constants here."""

from __future__ import annotations

from pathlib import Path

from sqap import environments

TASKS = environments.default_tasks("metaworld")
IMAGE_SIZE = 128
HORIZON = 8  # control steps (40 Hz) in one action chunk

# Seeds are disjoint on purpose: demonstrations, DAgger's rollouts, development checks, reported evaluation.
DEMO_SEEDS = 0
ROLLOUT_SEEDS = 100_000
DEVELOPMENT_SEEDS = 200_000
EVALUATION_SEEDS = 1_000_000  # `sqap eval`'s default; nothing was trained or chosen on these

BUILD = Path("build")
DATA = BUILD / "data"
