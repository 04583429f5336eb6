"""Two exceptions that say all in one sentence: the user's input was wrong; the run cannot go on."""

import re
from reprlib import Repr
from typing import Any

MOST_QUOTED = 200
"""Characters of the user's input that a message repeats at most."""
_LONGEST = 2000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_QUOTED = re.compile(rf"(?P<quote>['\"])(?P<text>(?:(?!(?P=quote)).){{{MOST_QUOTED + 1},}})(?P=quote)")
_WORD = re.compile(rf"\S{{{MOST_QUOTED + 1},}}")


class InputError(ValueError):
    """Bad input: a config key, a data line, a checkpoint, a prompt.

    The message is one sentence that names the key or the line and the remedy.
    The command line prints it without a traceback and exits with status 2.
    Whatever of the input it repeats is kept to one line and cut short.
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_short(message))


class NotAtHand(InputError):
    """What the input names is right in itself, as far as one can see, but not here: a checkpoint, a package, a file."""


class Stopped(RuntimeError):
    """A run that cannot go on through no mistake in its input, such as a writer that fails too often.

    The message is one sentence with the cause and the remedy. What was learnt before is saved; exit status 1.
    """


def on_one_line(error: BaseException) -> str:
    """What an exception says, its line breaks folded, to stand inside an `InputError`'s sentence."""
    return " ".join(str(error).split())


def os_reason(error: OSError) -> str:
    """What the system says of an error, without the name of the file."""
    return error.strerror or type(error).__name__


def in_short(message: str) -> str:
    """``message`` on one line, with long quotations, long words and an endless middle cut out."""
    message = _CONTROL.sub(" ", message)
    message = _QUOTED.sub(lambda found: f"{found['quote']}{shortened(found['text'])}{found['quote']}", message)
    message = _WORD.sub(lambda found: shortened(found[0]), message)
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
    return message


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """``text``, or its start and its end with dots between them."""
    return text if len(text) <= most else f"{text[: most - 53]}...{text[-50:]}"


def shown(value: Any) -> str:
    """A value as a message repeats it: one line of few characters, however large it is."""
    return shortened(_SHORT.repr(value), 120)


class _Short(Repr):
    """Large containers by their first entries, whole numbers beyond all use by their number of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) < 10**30:
            return repr(x)
        return f"a whole number of about {round(x.bit_length() * 0.30103)} digits"


_SHORT = _Short()
