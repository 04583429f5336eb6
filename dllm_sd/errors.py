"""Exceptions whose message is one sentence for the user: wrong input, and runs that cannot go on."""

import re
from reprlib import Repr
from typing import Any

MOST_QUOTED = 200
"""The most characters of the user's input that a message repeats."""
_LONGEST = 2000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_QUOTED = re.compile(rf"(?P<quote>['\"])(?P<text>(?:(?!(?P=quote)).){{{MOST_QUOTED + 1},}})(?P=quote)")
_WORD = re.compile(rf"\S{{{MOST_QUOTED + 1},}}")


class InputError(ValueError):
    """Wrong input, such as a config key, a data line, a checkpoint or a prompt.

    The message is one sentence that names the key or the line and the remedy. The command line prints it without a
    traceback and exits with status 2. Input that the message repeats is shortened and kept on one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_short(message))


class Unavailable(InputError):
    """The input seems right, but names a checkpoint, a package or a file that is not on this machine."""


class EmptySplit(InputError):
    """A split of the task's data holds no problems."""


class Stopped(RuntimeError):
    """The run cannot go on although its input is right, for example because a writer fails too often.

    The message is one sentence with the cause and the remedy. The last update is saved; the exit status is 1.
    """

    elsewhere: bool = False
    """Whether another process failed without such a sentence. It is gone, so that nothing can be saved together."""


def sendable(error: BaseException) -> Exception:
    """An exception that any process can raise: it has the same sentence and leads to the same exit status."""
    for kind in (InputError, Stopped, FloatingPointError):
        if isinstance(error, kind):
            return kind(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or on_one_line(error), error.filename)
    told = Stopped(f"another process failed with {type(error).__name__}: {on_one_line(error):.200}")
    told.elsewhere = True
    return told


def on_one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, to be quoted in an `InputError`."""
    return " ".join(str(error).split())


def os_reason(error: OSError) -> str:
    """The system's description of an error, without the name of the file."""
    return error.strerror or type(error).__name__


def in_short(message: str) -> str:
    """``message`` on one line, with long quotations and words shortened, and the middle of a long message removed."""
    message = _CONTROL.sub(" ", message)
    message = _QUOTED.sub(lambda match: f"{match['quote']}{shortened(match['text'])}{match['quote']}", message)
    message = _WORD.sub(lambda match: shortened(match[0]), message)
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
    return message


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """``text`` if it has at most ``most`` characters, else its start and its end with dots between them."""
    return text if len(text) <= most else f"{text[: most - 53]}...{text[-50:]}"


def shown(value: Any) -> str:
    """The representation of a value in messages: one line of at most 120 characters."""
    return shortened(_SHORT.repr(value), 120)


class _Short(Repr):
    """Shows the first entries of large containers, and the number of digits of huge whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        if abs(x) < 10**30:
            return repr(x)
        return f"a whole number of about {round(x.bit_length() * 0.30103)} digits"


_SHORT = _Short()
