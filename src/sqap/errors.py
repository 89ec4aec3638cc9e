"""What a user's mistake raises: the message is a sentence that says what would be right."""

from collections.abc import Iterator
from contextlib import contextmanager

# Characters of a message that are kept before and behind what is left out of a longer one.
HEAD, TAIL = 1000, 500


class SqapError(ValueError):
    """Something a user can mend. The command line prints the message alone, without a trace.

    A message quotes what is in files, which may be anything: it is one line of readable length all the same.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shorten(one_line(message)))


def one_line(text: str) -> str:
    """``text`` with line breaks and whatever else cannot be printed as their escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shorten(text: str) -> str:
    """Its beginning, which says where, and its end, which says what would be right."""
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} [...] {text[-TAIL:]}"


class InputError(SqapError):
    """An observation, a setting or an argument is not what it must be."""


class CheckpointError(SqapError):
    """A directory on disk cannot be loaded or written as asked."""


class NonFiniteActionError(SqapError):
    """A policy computes what no robot may be given."""


@contextmanager
def panics_raise() -> Iterator[None]:
    """Panics of a library written in Rust, which are no `Exception`, are raised as RuntimeError."""
    try:
        yield
    except BaseException as problem:
        if isinstance(problem, Exception) or type(problem).__name__ != "PanicException":
            raise
        raise RuntimeError(str(problem)) from problem
