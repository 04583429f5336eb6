"""Where a model's thinking ends and its text begins."""

_OPEN, _CLOSE = "<think>", "</think>"


def behind_thinking(text: str) -> tuple[int, int]:
    """Where the text behind the thinking begins and ends; in the same place where all is thinking.

    Thinking is all up to the last closing tag, whose opening tag may be missing, as it is where the chat template has
    written it; and from an opening tag behind it, which begins thinking that breaks off, to the end.
    """
    closed = text.rfind(_CLOSE)
    start = 0 if closed < 0 else closed + len(_CLOSE)
    end = text.find(_OPEN, start)
    return start, len(text) if end < 0 else end


def without_thinking(text: str) -> str:
    """What stands behind the thinking, without the white space around it; nothing where all is thinking."""
    start, end = behind_thinking(text)
    return text[start:end].strip()


def breaks_off(text: str) -> bool:
    """Whether a text is thinking that breaks off and nothing else."""
    return _CLOSE not in text and text.lstrip().startswith(_OPEN)
