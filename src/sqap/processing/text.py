"""Text steps: an instruction to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sqap.errors import InputError, panics_raise


@dataclass(frozen=True)
class Lower:
    """Lower case."""

    kind: Literal["lower"] = "lower"

    def __call__(self, text: str) -> str:
        return text.lower()


@dataclass(frozen=True)
class Template:
    """A sentence around the instruction.

    Raises:
        InputError: ``{instruction}`` is not in it, or something else is in braces.
    """

    text: str
    kind: Literal["template"] = "template"

    def __post_init__(self) -> None:
        try:
            fields = [field for _, *field in Formatter().parse(self.text) if field[0] is not None]
        except ValueError as problem:
            raise InputError(f"{self.text!r} is not a template: {problem}") from problem
        if fields != [["instruction", "", None]]:
            raise InputError(
                "a template must have {instruction} in it, once and nothing else in braces, got "
                f"{self.text!r}"
            )

    def __call__(self, text: str) -> str:
        return self.text.format(instruction=text)


@dataclass(frozen=True)
class EndWith:
    """A text behind, such as a newline, unless it is there already."""

    text: str
    kind: Literal["end_with"] = "end_with"

    def __call__(self, text: str) -> str:
        return text if text.endswith(self.text) else text + self.text


TextStep = Lower | Template | EndWith


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


def prompt_ids(instruction: str, prompt: PromptConfig, tokenizer: Tokenizer) -> Tensor:
    """The instruction as token ids ``(1, tokens)``.

    Raises:
        InputError: the tokenizer cannot encode it.
    """
    text = instruction
    for step in prompt.steps:
        text = step(text)
    try:
        with panics_raise():
            ids: list[int] = tokenizer.encode(text).ids[: prompt.longest]
    except Exception as problem:  # the library raises nothing narrower
        raise InputError(f"the tokenizer cannot encode {instruction!r}: {problem}") from problem
    append = prompt.append
    repeated = next(n for n in range(len(append), -1, -1) if n == 0 or ids[-n:] == list(append[:n]))
    return torch.tensor([[*ids, *append[repeated:]]], dtype=torch.int64, device="cpu")
