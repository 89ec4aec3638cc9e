"""What a user's mistake raises: the message is a sentence that says what would be right."""


class SqapError(ValueError):
    """Something a user can mend. The command line prints the message alone, without a trace."""


class InputError(SqapError):
    """An observation, a setting or an argument is not what it must be."""


class CheckpointError(SqapError):
    """A directory on disk cannot be loaded or written as asked."""


class NonFiniteActionError(SqapError):
    """A policy computes what no robot may be given."""
