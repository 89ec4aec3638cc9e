"""CogACT's adaptive action ensemble: the latest chunks agree on the one action that is executed."""

from __future__ import annotations

from collections import deque

import numpy as np

from sqap.errors import InputError

ALPHA = 0.1  # the authors' value for both robots they simulate

# As large as the authors', so that the numbers are theirs too: keeps a zero action's cosine from being 0 / 0.
_TINY = 1e-7


class AdaptiveEnsemble:
    """Averages what the current chunk and the ones before it predict for the current control step.

    Predictions that point where the newest one does weigh more, so that an outdated plan, say of the other
    way around an obstacle, is not averaged into the new one. From CogACT (Li et al., 2024), section
    "Adaptive action ensemble"; its authors use a window of 7 chunks for the WidowX robot and of 2 for the
    Google robot. Every entry of the action is averaged, the gripper's too: an environment that wants it
    open or closed has to threshold it.

    Holds the chunks of one episode; make a new one for the next.

    Args:
        window: chunks that take part, the current one included. The oldest is ``window - 1`` control steps
            old, so a chunk needs at least ``window`` actions.
        alpha: how much the direction counts; 0 is the plain mean.

    Raises:
        InputError: ``window`` is smaller than 1.
    """

    def __init__(self, window: int, alpha: float = ALPHA) -> None:
        if window < 1:
            raise InputError(f"an ensemble must be of at least 1 chunk, got {window}")
        self._window = window
        self._alpha = alpha
        self._chunks: deque[np.ndarray] = deque(maxlen=window)  # newest first

    def add(self, chunk: np.ndarray) -> np.ndarray:
        """The action for this control step. To be called at every one of them.

        Args:
            chunk: ``(horizon, action_dim)`` floats in the robot's units, what the policy predicts for this
                step and those after it.

        Returns:
            ``(action_dim,)`` in the same units and dtype.

        Raises:
            InputError: the chunk is too short for the window.
        """
        if len(chunk) < self._window:
            raise InputError(
                f"an ensemble must be of 1 to {len(chunk)} chunks, as the policy's chunks hold {len(chunk)} "
                f"actions, got {self._window}"
            )
        self._chunks.appendleft(np.array(chunk, dtype=np.float64))
        # A chunk that is `age` steps old has its prediction for this step in row `age`.
        predictions = np.stack([chunk[age] for age, chunk in enumerate(self._chunks)])
        action: np.ndarray = similarity_weights(predictions, self._alpha) @ predictions
        return action.astype(chunk.dtype)


def similarity_weights(predictions: np.ndarray, alpha: float) -> np.ndarray:
    """Weights ``(n,)`` of ``predictions`` ``(n, action_dim)``, newest first. They sum to one.

    Proportional to exp(``alpha`` * cosine between a prediction and the newest).
    """
    norms = np.linalg.norm(predictions, axis=1)
    cosines = predictions @ predictions[0] / (norms * norms[0] + _TINY)
    weights = np.exp(alpha * cosines)
    shares: np.ndarray = weights / weights.sum()
    return shares
