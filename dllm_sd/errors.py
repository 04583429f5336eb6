"""Two exceptions that say all in one sentence: the user's input was wrong; the run cannot go on."""


class InputError(ValueError):
    """Bad input: a config key, a data line, a checkpoint, a prompt.

    The message is one sentence that names the key or the line and the remedy.
    The command line prints it without a traceback and exits with status 2.
    """


class Stopped(RuntimeError):
    """A run that cannot go on through no mistake in its input, such as a writer that fails too often.

    The message is one sentence with the cause and the remedy. What was learnt before is saved; exit status 1.
    """


def on_one_line(error: BaseException) -> str:
    """What an exception says, its line breaks folded, to stand inside an `InputError`'s sentence."""
    return " ".join(str(error).split())
