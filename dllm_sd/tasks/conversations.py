"""Conversations: lists of messages, as chat templates and chat data sets write them."""

from collections.abc import Mapping
from typing import Any

from dllm_sd.errors import InputError, shown


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message: its ``content``, or the texts of a content in parts, one behind the other.

    Raises:
        InputError: if it is anything else, such as an image or nothing.
    """
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and content:
        parts = [_part(part) for part in content]
        if None not in parts:
            return "".join(filter(None, parts))
    raise InputError(
        f"the content of a message ({shown(message.get('role'))}) must be text, or a list of parts of the type text, "
        f"not {shown(content)}"
    )


def _part(part: Any) -> str | None:
    fits = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    return part["text"] if fits else None
