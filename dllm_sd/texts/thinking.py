"""The end of a model's thinking, and the text after it."""

_OPEN, _CLOSE = "<think>", "</think>"


def behind_thinking(text: str) -> tuple[int, int]:
    """Return start and end of the text after the thinking; they are equal if the whole text is thinking.

    Thinking is everything up to the last closing tag; its opening tag may be missing, since the chat template may have
    written it. An opening tag after that begins truncated thinking, which extends to the end of the text.
    """
    closed = text.rfind(_CLOSE)
    start = 0 if closed < 0 else closed + len(_CLOSE)
    end = text.find(_OPEN, start)
    return start, len(text) if end < 0 else end


def without_thinking(text: str) -> str:
    """Return the text after the thinking, without surrounding white space; empty if all of it is thinking."""
    start, end = behind_thinking(text)
    return text[start:end].strip()


def breaks_off(text: str) -> bool:
    """Return whether a text consists of truncated thinking only."""
    return _CLOSE not in text and text.lstrip().startswith(_OPEN)
