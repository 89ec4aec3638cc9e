"""Text steps: an instruction to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sqap.errors import InputError, panics_raise

# The interval [-1, 1] is cut into so many bins where a normalised state is told in words (pi0.5).
STATE_BINS = 256


@dataclass(frozen=True)
class Lower:
    """Lower case."""

    kind: Literal["lower"] = "lower"

    def __call__(self, text: str, state: str = "") -> str:
        return text.lower()


@dataclass(frozen=True)
class Spaces:
    """Spaces for underscores and line breaks, and no white space at the ends, as in pi0.5's prompt."""

    kind: Literal["spaces"] = "spaces"

    def __call__(self, text: str, state: str = "") -> str:
        return text.strip().replace("_", " ").replace("\n", " ")


@dataclass(frozen=True)
class Template:
    """A sentence around the instruction, in which ``{state}`` may stand for the robot's state (pi0.5).

    Raises:
        InputError: ``{instruction}`` is not in it once, or anything else but one ``{state}`` is in braces.
    """

    text: str
    kind: Literal["template"] = "template"

    def __post_init__(self) -> None:
        try:
            fields = self._fields()
        except ValueError as problem:
            raise InputError(f"{self.text!r} is not a template: {problem}") from problem
        if sorted(fields) not in (["instruction"], ["instruction", "state"]):
            raise InputError(
                "a template must have {instruction} in it, once and nothing else in braces but one {state}, "
                f"got {self.text!r}"
            )

    def __call__(self, text: str, state: str = "") -> str:
        return self.text.format(instruction=text, state=state)

    @property
    def tells_state(self) -> bool:
        """Whether the robot's state is in it."""
        return "state" in self._fields()

    def _fields(self) -> list[str]:
        """What stands in braces, as it is written."""
        parts = [field for _, *field in Formatter().parse(self.text) if field[0] is not None]
        return [f"{name}{f':{form}' if form else ''}{f'!{how}' if how else ''}" for name, form, how in parts]


@dataclass(frozen=True)
class EndWith:
    """A text behind, such as a newline, unless it is there already."""

    text: str
    kind: Literal["end_with"] = "end_with"

    def __call__(self, text: str, state: str = "") -> str:
        return text if text.endswith(self.text) else text + self.text


TextStep = Lower | Spaces | Template | EndWith


@dataclass(frozen=True)
class PromptConfig:
    """How an instruction becomes token ids.

    Args:
        steps: what is done to the text.
        longest: how many of the tokenizer's ids are kept, its special tokens counted; None keeps all.
        append: ids that follow, less what of them the others end with already.

    Raises:
        InputError: ``longest`` is not positive.
    """

    steps: tuple[TextStep, ...] = (Lower(),)
    longest: int | None = None
    append: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.longest is not None and self.longest < 1:
            raise InputError(f"longest must be at least 1 or null, got {self.longest}")

    @property
    def tells_state(self) -> bool:
        """Whether the robot's state is part of the text."""
        return any(isinstance(step, Template) and step.tells_state for step in self.steps)


def prompt_ids(
    instruction: str, prompt: PromptConfig, tokenizer: Tokenizer, state: np.ndarray | None = None
) -> Tensor:
    """The instruction as token ids ``(1, tokens)``.

    Args:
        instruction: what to do.
        prompt: what is made of it.
        tokenizer: the policy's.
        state: the robot's, normalised, ``(dimensions,)``, where the prompt tells it.

    Raises:
        InputError: the tokenizer cannot encode it.
    """
    text, told = instruction, "" if state is None else state_text(state)
    for step in prompt.steps:
        text = step(text, told)
    try:
        with panics_raise():
            ids: list[int] = tokenizer.encode(text).ids[: prompt.longest]
    except Exception as problem:  # the library raises nothing narrower
        raise InputError(f"the tokenizer cannot encode {instruction!r}: {problem}") from problem
    append = prompt.append
    repeated = next(n for n in range(len(append), -1, -1) if n == 0 or ids[-n:] == list(append[:n]))
    return torch.tensor([[*ids, *append[repeated:]]], dtype=torch.int64, device="cpu")


def state_text(state: np.ndarray) -> str:
    """A normalised state ``(dimensions,)`` as words: for each number the bin of [-1, 1] that it is in.

    Bins are counted from 0. Below -1 it is -1, and from 1 on the last bin, as openpi and LeRobot have it.
    """
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    return " ".join(str(i) for i in np.digitize(state.astype(np.float32), edges) - 1)
