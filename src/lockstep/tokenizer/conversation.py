"""What every chat template may count on: messages of known roles, with something said in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.core.errors import InvalidRequest, nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
"""Roles that templates do not know, and the one that means the same to them."""


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a template takes them. Raises InvalidRequest where the HTTP interface would refuse them."""
    if isinstance(messages, (str, Mapping)):
        raise InvalidRequest(
            "messages is a list of them, such as [{'role': 'user', 'content': 'Hello!'}]", param="messages"
        )
    if not messages:
        raise InvalidRequest("messages is empty; it needs at least one", param="messages")
    return [_checked(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _checked(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} is {message!r:.40}, not a mapping with role and content", param=where)
    role = message.get("role")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise InvalidRequest(
            f"{where}.role is one of {', '.join(ROLES)}, not {role!r}{hint}", param=f"{where}.role"
        )
    if message.get("content") is None and role != "assistant":
        raise InvalidRequest(f"{where}: a message of role {role!r} needs content", param=f"{where}.content")
    return {**message, "role": TEMPLATE_ROLES.get(role, role), "content": message.get("content") or ""}
