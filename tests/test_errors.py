"""A message is one line of readable length, whatever it quotes."""

import pytest

from sqap.errors import CheckpointError, InputError, SqapError


@pytest.mark.parametrize("kind", [SqapError, InputError, CheckpointError])
def test_a_message_is_one_line_whatever_it_quotes(kind):
    assert str(kind("config.json: no setting 'a\nb\x1b[31m\u2028'; say 'größe'")) == (
        r"config.json: no setting 'a\nb\x1b[31m\u2028'; say 'größe'"
    )


def test_of_a_long_message_the_beginning_and_the_end_are_kept():
    message = str(SqapError(f"config.json: size is {[0] * 5000}; supported is 3"))
    assert message.startswith("config.json: size is [0, 0")
    assert message.endswith("0]; supported is 3")
    assert len(message) < 1600
