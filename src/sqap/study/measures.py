"""What is measured of a policy without running episodes: action errors and attention on replayed frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import sqap
from sqap.compress import model_inputs
from sqap.defaults import defaults
from sqap.errors import SqapError
from sqap.files import write_json
from sqap.models.storage import stored_bytes
from sqap.observation import Observation, hash_frames
from sqap.policy import Policy
from sqap.pruning.calibration import overlap_curve
from sqap.pruning.ranking import Ranker
from sqap.recipe.pruning import SHARED
from sqap.sensitivity import action_error
from sqap.serialization import read_object

RANKING = (
    *SHARED,
    "attention",
)  # methods that rank by attention, which can be compared with full precision's


class Measures:
    """Measures policies beside their original; what was measured before is read from disk.

    Args:
        original: in full precision.
        frames: that no policy was calibrated on.
        place: directory of the results.
    """

    def __init__(self, original: Policy, frames: Sequence[Observation], place: Path) -> None:
        self._original, self._frames, self._place = original, frames, place
        self._mark = hash_frames(frames)[:8]
        self._full: Ranker | None = None
        self._chunks: np.ndarray | None = None

    def path(self, fingerprint: str) -> Path:
        """Where the results of the policy with this fingerprint are."""
        return self._place / f"{fingerprint[:16]}-{self._mark}.json"

    def measure(self, directory: Path, fingerprint: str) -> dict[str, Any]:
        """``replay``, ``attention`` and ``weight_bytes`` of a compressed policy (``docs/ablate.md``).

        Raises:
            SqapError: the policy cannot be loaded, or the result not written.
        """
        path = self.path(fingerprint)
        found = read_object(path, SqapError)
        if not found:
            small = sqap.load(directory)
            found = {
                "replay": self._replay(small),
                "attention": self._attention(small),
                "weight_bytes": stored_bytes(small.model),
            }
            write_json(path, found)
        return found

    def _replay(self, small: Policy) -> dict[str, Any] | None:
        """The action error; None of a policy that gives no finite actions on these frames."""
        if self._chunks is None:
            self._chunks = self._act(self._original)
        try:
            return dataclasses.asdict(action_error(self._chunks, self._act(small), self._original.config))
        except SqapError:
            return None

    def _act(self, policy: Policy) -> np.ndarray:
        return np.stack([policy.act(frame, seed=seed) for seed, frame in enumerate(self._frames)])

    @defaults()
    def _attention(self, small: Policy) -> dict[str, Any] | None:
        pruning, calibration = small.recipe.pruning, small.calibration
        if pruning is None or pruning.method not in RANKING:
            return None
        layers = None if calibration is None else calibration.layers
        if self._full is None:
            self._full = self._ranker(self._original)
        full = self._full(pruning, layers)
        quantized = self._ranker(small)(pruning, full.layers)
        best = pruning.budget(full.scores.shape[1])
        return {
            "overlap": float(overlap_curve(full.scores, quantized.scores)[best - 1]),
            "entropy": entropy(quantized.scores),
            "entropy_full": entropy(full.scores),
            "top_k": calibration and calibration.top_k,
            "calibrated_overlap": calibration and calibration.overlap,
            "recall": calibration and calibration.recall,
            "layers": layers and list(layers),
        }

    def _ranker(self, policy: Policy) -> Ranker:
        inputs = [model_inputs(self._original, frame, seed) for seed, frame in enumerate(self._frames)]
        return Ranker(policy.model, inputs, policy.weights)


def entropy(scores: Tensor) -> float:
    """Mean entropy of maps ``(frames, N)``, as a share of an even map's."""
    shares = scores / scores.sum(1, keepdim=True)
    terms = -(shares * shares.clamp_min(1e-30).log()).sum(1)
    return float(terms.mean() / np.log(scores.shape[1]))
