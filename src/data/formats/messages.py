"""A chat as a list of messages, OpenAI's form ({"role", "content"}) or ShareGPT's ({"from", "value"})."""

from __future__ import annotations

from typing import Any

from src.config.schema import DataConfig
from src.data.formats import BadRow, Chat, field, type_name

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
FORMS = (("role", "content"), ("from", "value"))


def read(fields: dict[str, Any], data: DataConfig) -> Chat:
    """Take the messages, with `data.system_prompt` in front where they have no system message of their own.

    Raises:
        BadRow: where they are no chat that begins with a user, goes on in turn and ends with the assistant.
    """
    column = data.columns["messages"]
    given = field(fields, column, "messages")
    if not isinstance(given, list):
        raise BadRow(f"{column!r} is {type_name(given)}, not a list of messages")
    if not given:
        raise BadRow(f"{column!r} is empty: nothing to learn")
    messages: list[dict[str, str]] = []
    learned: list[bool] = []
    for number, one in enumerate(given, start=1):
        role, content, is_learned = _message(one, f"{column!r}, message {number}")
        _check_turn(role, [m["role"] for m in messages], f"{column!r}, message {number}")
        messages.append({"role": role, "content": content})
        if role == "assistant":
            learned.append(is_learned)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{column!r} ends with the {messages[-1]['role']}: there is no answer to learn")
    if data.system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return Chat(messages, learned)


def _message(one: Any, where: str) -> tuple[str, str, bool]:
    if not isinstance(one, dict):
        raise BadRow(f"{where} is {type_name(one)}, not an object with role and content")
    role_key, content_key = next((form for form in FORMS if any(key in one for key in form)), FORMS[0])
    for key in (role_key, content_key):
        if key not in one:
            raise BadRow(f"{where} has no {key!r}; there are {', '.join(map(repr, one)) or 'none'}")
    for key in ("tool_calls", "function_call"):
        if one.get(key):
            raise BadRow(f"{where} has {key}, which is not supported")
    role, content, weight = one[role_key], one[content_key], one.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where} has the role {role!r}; one of {', '.join(ROLES)} is needed")
    if not isinstance(content, str):
        raise BadRow(f"{where}: {content_key!r} is {type_name(content)}, not a text")
    if not content.strip():
        raise BadRow(f"{where}: {content_key!r} is empty")
    if weight not in (None, 0, 1):
        raise BadRow(f"{where} has the weight {weight!r}; 0 (not learned) or 1 is needed")
    return ROLES[role], content, weight != 0


def _check_turn(role: str, before: list[str], where: str) -> None:
    if role == "system":
        if "system" in before:
            raise BadRow(f"{where} is a second system message")
        if before:
            raise BadRow(f"{where} is a system message behind the first turn")
        return
    last = before[-1] if before else "system"
    if role == "assistant" and last == "system":
        raise BadRow(f"{where}: the assistant can't speak first")
    if role == last:
        raise BadRow(f"{where} is a second {role}'s message in a row")
