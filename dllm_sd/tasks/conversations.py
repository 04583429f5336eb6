"""Conversations: lists of messages, in the format of chat templates and chat datasets."""

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_sd.errors import InputError, shown


def content_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message: its ``content``, or the concatenated texts of a content in parts.

    Raises:
        InputError: if it is anything else, such as an image, or missing.
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


def is_conversation(value: Any) -> bool:
    """Return whether a field can only be a conversation: a non-empty list of objects with roles."""
    listed = isinstance(value, list | tuple) and len(value) > 0
    return listed and all(isinstance(message, Mapping) and {"role", "from"} & message.keys() for message in value)


def read_conversation(value: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, str]]:
    """Return the messages of a field, each with its role and its text.

    Args:
        value: the value of the field, for which `is_conversation` is true.
        where: names the field in error messages.

    Raises:
        InputError: if a message has no role that chat templates support, no text, or content that would be lost.
    """
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value):
        if "role" not in message:
            raise InputError(f"{where}, message {number} has no 'role'; rename from and value to role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise InputError(
                f"{where}, message {number} has the role {shown(message['role'])}; give it system, user or assistant"
            )
        if message["role"] == "system" and number:
            raise InputError(f"{where}, message {number} is a system message; put it first")
        unread = {key for key, entry in message.items() if entry not in (None, "", [], {})} - {"role", "content"}
        if unread:
            raise InputError(
                f"{where}, message {number} has {shown(min(map(str, unread)))}, which is not read; leave it out"
            )
        try:
            content = content_of(message)
        except InputError as error:
            raise InputError(f"{where}, message {number}: {error}") from None
        if not content.strip():
            raise InputError(f"{where}, message {number} is empty; fill it, or leave it out")
        messages.append({"role": message["role"], "content": content})
    return messages


def _part(part: Any) -> str | None:
    fits = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    return part["text"] if fits else None
