"""The one exception that means "the user's input was wrong"."""


class InputError(ValueError):
    """Bad input: a config key, a data line, a checkpoint, a prompt.

    The message is one sentence that names the key or the line and the remedy.
    The command line prints it without a traceback and exits with status 2.
    """


def on_one_line(error: BaseException) -> str:
    """What an exception says, its line breaks folded, to stand inside an `InputError`'s sentence."""
    return " ".join(str(error).split())
