"""From an instruction to token ids."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sqap.errors import InputError
from sqap.processing import EndWith, Lower, PromptConfig, Spaces, Template, prompt_ids
from sqap.processing.text import state_text


def words(*known: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def test_tokens_behind_the_prompt_are_not_repeated() -> None:
    tokenizer = Tokenizer(models.WordLevel({"pick": 3, "x": 7, "?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def ids(instruction: str, template: str, append: tuple[int, ...]) -> list[int]:
        prompt = PromptConfig((Lower(), Template(template)), append=append)
        return prompt_ids(instruction, prompt, tokenizer)[0].tolist()

    for append, expected in [((), [3]), ((7,), [3, 7]), ((7, 2), [3, 7, 2])]:
        assert ids("PICK", "{instruction}", append) == expected
    for append, expected in [((7,), [3, 7]), ((7, 2), [3, 7, 2]), ((2,), [3, 7, 2])]:
        assert ids("pick", "{instruction} x", append) == expected
    for append, expected in [((7,), [8, 3, 7]), ((7, 2), [8, 3, 7, 2]), ((3, 7, 2), [8, 3, 7, 2])]:
        assert ids("pick", "to {instruction} x", append) == expected


def test_an_instruction_that_cannot_be_encoded_is_said() -> None:
    tokenizer = Tokenizer(models.WordLevel({"pick": 3}, unk_token="?"))
    with pytest.raises(InputError, match=r"the tokenizer cannot encode 'Put': .*UNK"):
        prompt_ids("Put", PromptConfig(), tokenizer)


def test_text_is_as_the_steps_make_it() -> None:
    """As SmolVLA and pi0 are asked: the case stays, a newline follows unless there is one."""
    tokenizer = words("?", "Open", "open", "it", "it\n")
    plain, ended = PromptConfig(()), PromptConfig((EndWith("\n"),))
    assert prompt_ids("Open it", plain, tokenizer).tolist() == [[1, 3]]
    assert prompt_ids("Open it", PromptConfig(), tokenizer).tolist() == [[2, 3]]
    for given in ("Open it", "Open it\n"):
        assert prompt_ids(given, ended, tokenizer).tolist() == [[1, 4]]


def test_steps_are_taken_in_their_order() -> None:
    tokenizer = words("?", "do", "Do", "it")
    for steps, first in (
        ((Lower(), Template("Do {instruction}")), 2),
        ((Template("Do {instruction}"), Lower()), 1),
    ):
        assert prompt_ids("IT", PromptConfig(steps), tokenizer).tolist() == [[first, 3]]


def test_braces_of_an_instruction_are_its_own() -> None:
    tokenizer = words("?", "do", "{it}")
    assert prompt_ids("{it}", PromptConfig((Template("do {instruction}"),)), tokenizer).tolist() == [[1, 2]]


def test_only_so_many_tokens_are_kept_and_special_ones_count() -> None:
    tokenizer = words("?", "a", "b", "c", "<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    assert prompt_ids("a b c", PromptConfig(longest=3), tokenizer).tolist() == [[4, 1, 2]]
    assert prompt_ids("a b c", PromptConfig(longest=9), tokenizer).tolist() == [[4, 1, 2, 3]]
    assert prompt_ids("a b c", PromptConfig(longest=3, append=(2, 9)), tokenizer).tolist() == [[4, 1, 2, 9]]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("do it", r"in it, once and nothing else in braces but one \{state\}, got 'do it'"),
        ("{state}", r"must have \{instruction\} in it, once"),
        ("{instruction} {state} {state}", r"must have \{instruction\} in it, once"),
        ("{instruction:>9}", r"must have \{instruction\} in it, once"),
        ("{instruction} {instruction}", r"must have \{instruction\} in it, once"),
        ("{instruction} {robot}", r"must have \{instruction\} in it, once"),
        ("{instruction!r}", r"must have \{instruction\} in it, once"),
        ("{instruction", "is not a template"),
    ],
)
def test_a_template_is_around_one_instruction(template: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Template(template)
    with pytest.raises(InputError, match="longest must be at least 1 or null, got 0"):
        PromptConfig(longest=0)


def test_a_state_is_told_in_bins() -> None:
    """pi0.5's: 256 bins of [-1, 1], the last one from 1 on, and -1 below; nothing is clipped."""
    state = np.array([-1.5, -1.0, -0.9921876, -0.9921875, 0.0, 0.5, 127 / 128, 0.99, 1.0, 7.0])
    assert state_text(state) == "-1 0 0 1 128 192 255 254 255 255"
    assert state_text(np.array([np.nextafter(-1, -2)])) == "0"  # rounded to 32 bits first


def test_a_prompt_tells_the_state() -> None:
    template = Template("Task: {instruction}, State: {state};\nAction: ")
    assert template.tells_state
    assert PromptConfig((Spaces(), template)).tells_state
    assert not PromptConfig((Template("do {instruction}"),)).tells_state
    assert template("open {it}", "1 2") == "Task: open {it}, State: 1 2;\nAction: "
    tokenizer = words("?", "fold", "the", "towel", "by", "128", "-1")
    prompt = PromptConfig((Spaces(), Template("{instruction} by {state}")))
    ids = prompt_ids(" fold the_towel\n", prompt, tokenizer, np.array([0.0, -2.0]))
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6]]


def test_underscores_and_line_breaks_become_spaces() -> None:
    assert Spaces()("  a_b\nc \n") == "a b c"
