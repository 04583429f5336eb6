"""Where a model's thinking ends and its text begins."""

_OPEN, _CLOSE = "<think>", "</think>"


def behind_thinking(text: str) -> int:
    """The place of the first character behind the thinking; the end of a text whose thinking breaks off.

    The opening tag may be missing, as it is where the chat template has written it.
    """
    end = text.rfind(_CLOSE)
    if end >= 0:
        return end + len(_CLOSE)
    return len(text) if text.lstrip().startswith(_OPEN) else 0


def without_thinking(text: str) -> str:
    """What stands behind the thinking, without the white space around it; nothing if the thinking breaks off."""
    return text[behind_thinking(text) :].strip()
