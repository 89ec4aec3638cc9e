"""A published policy's tokenizer, from its own directory or from a place the user names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sqap.errors import CheckpointError, panics_raise

FILE = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """A language model's tokens.

    Args:
        name: whose they are, for messages.
        first: the id that every prompt begins with; None if nothing is put before a prompt.
        spare: rows of the embedding table that may be without a token; None for any number.
    """

    name: str
    first: int | None
    spare: int | None = None


def read_tokenizer(
    directory: Path, given: Path | None, vocabulary: Vocabulary, *, rows: int, needed: Iterable[int]
) -> Tokenizer:
    """The tokenizer of ``directory``, or the one at ``given`` (a file or a directory), checked.

    Args:
        directory: the checkpoint.
        given: where to look instead.
        vocabulary: what its tokens must be.
        rows: of the embedding table.
        needed: ids that the policy appends to prompts.

    Raises:
        CheckpointError: there is none, or it does not belong to the model.
    """
    path = _find(directory, given, vocabulary.name)
    try:
        with panics_raise():
            tokenizer: Tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except OSError as problem:
        raise CheckpointError(f"cannot read {path}: {problem.strerror}") from problem
    except Exception as problem:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is not a tokenizer: {problem}") from problem
    # Prompts are encoded one by one and are far shorter than any context.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check(tokenizer, path, vocabulary, rows, needed)
    return tokenizer


def _find(directory: Path, given: Path | None, like: str) -> Path:
    if given is not None:
        path = given / FILE if given.is_dir() else given
        if not path.is_file():
            raise CheckpointError(f"no tokenizer at {path}: give {like}'s {FILE}, or a directory that has it")
        return path
    if not (directory / FILE).is_file():
        raise CheckpointError(f"{directory} has no tokenizer: put {like}'s {FILE} there, or say where it is")
    return directory / FILE


def _check(
    tokenizer: Tokenizer, path: Path, vocabulary: Vocabulary, rows: int, needed: Iterable[int]
) -> None:
    like, first = vocabulary.name, vocabulary.first
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= rows:
        raise CheckpointError(
            f"{path} has token {highest}, but the model embeds tokens up to {rows - 1}: it is not {like}'s"
        )
    if vocabulary.spare is not None and highest < rows - 1 - vocabulary.spare:
        raise CheckpointError(
            f"{path} has tokens up to {highest}, but the model embeds {rows}: it is not {like}'s"
        )
    always = needed if first is None else (first, *needed)
    lacking = [str(i) for i in always if tokenizer.id_to_token(i) is None]
    if lacking:
        raise CheckpointError(f"{path} lacks token {' and '.join(lacking)}, which {like}'s has")
    try:
        with panics_raise():
            bare, ids = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    except Exception as problem:  # the library raises nothing narrower
        raise CheckpointError(f"{path} cannot encode a prompt: {problem}") from problem
    if first is None and ids != bare:
        raise CheckpointError(f"{path} puts tokens around a prompt, which {like}'s does not")
    if first is not None and ids[:1] != [first]:
        raise CheckpointError(
            f"{path} does not begin a prompt with token {first}, behind which the model expects its image"
        )
