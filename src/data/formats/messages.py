"""A chat as a list of messages, OpenAI's form ({"role", "content"}) or ShareGPT's ({"from", "value"}).

Tables hold every key in every message, so a key that is null, an empty text or an empty list counts as absent, and a
message may have the keys of both forms. A key that holds something and that nothing here reads is named in the chat.
"""

from collections.abc import Mapping
from typing import Any

from src.config.schema import DataConfig
from src.data.formats import FORMATS, BadRow, Chat, field, is_blank, type_name, unread_fields

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMS = (("role", "content"), ("from", "value"))
SUPERVISION_KEYS = ("weight", "train", "loss")  # each sets whether an assistant's message is supervised
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # each holds the assistant's thought before its answer
THOUGHT = THOUGHT_KEYS[0]  # the key of a thought in the messages of a Chat
SYSTEM = "system"  # the field of a row that is its system message

UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id")
UNSUPPORTED_FIELDS = ("tools", "functions")
WITHOUT = "leave these rows out, or write the calls into the texts and remove the key"


@FORMATS.register("messages")
def read(fields: dict[str, Any], data: DataConfig) -> Chat:
    """Return the messages, after the row's own system message or `data.system_prompt` where they have none.

    BadRow where they don't alternate from a user's to the assistant's last, or the row needs what is not supported.
    """
    column = data.columns["messages"]
    items = field(fields, column, "data.columns.messages")
    if not isinstance(items, list):
        raise BadRow(f"{column!r} is {type_name(items)}, not a list of messages")
    if not items:
        raise BadRow(f"{column!r} is empty: nothing to train on")
    for key in UNSUPPORTED_FIELDS:
        if not is_blank(fields.get(key)):
            raise BadRow(f"the row has {key}, which is not supported: {WITHOUT}")
    messages: list[dict[str, str]] = []
    is_supervised: list[bool] = []
    unread: dict[str, None] = {}
    for number, item in enumerate(items, start=1):
        message, may_supervise, not_read = _message(item, f"{column!r}, message {number}")
        _check_turn(message["role"], [m["role"] for m in messages], f"{column!r}, message {number}")
        messages.append(message)
        unread |= dict.fromkeys(f"{column}[].{key}" for key in not_read)
        if message["role"] == "assistant":
            is_supervised.append(may_supervise)
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{column!r} ends with the {messages[-1]['role']}: there is no answer to train on")
    own = _own_system(fields, messages)
    if (system := own or data.system_prompt) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Chat(messages, is_supervised, (*unread_fields(fields, [column, SYSTEM, data.group_column or ""]), *unread))


def form_of(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return the keys of a message's role and content, by the form that has values, or else keys, in the message."""
    filled = [form for form in FORMS if any(not is_blank(message.get(key)) for key in form)]
    named = [form for form in FORMS if any(key in message for key in form)]
    return next(iter([*filled, *named]), FORMS[0])


def _own_system(fields: Mapping[str, Any], messages: list[dict[str, str]]) -> str | None:
    """Return the row's own system message, None where there is none."""
    own = fields.get(SYSTEM)
    if is_blank(own):
        return None
    if not isinstance(own, str):
        raise BadRow(f"{SYSTEM!r} is {type_name(own)}, not a text")
    if messages[0]["role"] == "system" and messages[0]["content"] != own:
        raise BadRow(f"{SYSTEM!r} and the first message are two system messages that differ; keep one of them")
    return own


def _message(item: Any, where: str) -> tuple[dict[str, str], bool, list[str]]:
    """Return a message, whether it is supervised, and its keys that nothing reads."""
    if not isinstance(item, dict):
        raise BadRow(f"{where} is {type_name(item)}, not an object with role and content")
    role_key, content_key = form_of(item)
    for key in (role_key, content_key):
        if key not in item:
            raise BadRow(f"{where} has no {key!r}; there are {', '.join(map(repr, item)) or 'none'}")
    for key in UNSUPPORTED_KEYS:
        if not is_blank(item.get(key)):
            raise BadRow(f"{where} has {key}, which is not supported: {WITHOUT}")
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{where} has the role {role!r}; one of {', '.join(ROLES)} is needed")
    if not isinstance(content, str):
        raise BadRow(f"{where}: {content_key!r} is {type_name(content)}, not a text")
    if not content.strip():
        raise BadRow(f"{where}: {content_key!r} is empty")
    message = {"role": ROLES[role], "content": content}
    _check_other_form(item, message, (role_key, content_key), where)
    read_keys = {key for form in FORMS for key in form} | set(SUPERVISION_KEYS)
    if message["role"] == "assistant":
        read_keys |= set(THOUGHT_KEYS)
        if thought := _thought(item, where):
            message[THOUGHT] = thought
    return message, _is_supervised(item, where), unread_fields(item, read_keys)


def _check_other_form(item: Mapping[str, Any], message: Mapping[str, str], form: tuple[str, str], where: str) -> None:
    """Raise BadRow where a message's keys of the other form have other values."""
    role_key, content_key = next(one for one in FORMS if one != form)
    stated = {role_key: ROLES.get(str(item.get(role_key))), content_key: item.get(content_key)}
    meant = {role_key: message["role"], content_key: message["content"]}
    if wrong := [key for key in stated if not is_blank(item.get(key)) and stated[key] != meant[key]]:
        raise BadRow(f"{where}: {wrong[0]!r} contradicts {form[wrong[0] == content_key]!r}; keep one of them")


def _thought(item: Mapping[str, Any], where: str) -> str | None:
    """Return the thought of an assistant's message, None where it has none."""
    found = {key: item[key] for key in THOUGHT_KEYS if not is_blank(item.get(key))}
    for key, value in found.items():
        if not isinstance(value, str):
            raise BadRow(f"{where}: {key!r} is {type_name(value)}, not a text")
    if len(set(found.values())) > 1:
        raise BadRow(f"{where}: {' and '.join(map(repr, found))} are two different thoughts; keep one of them")
    return next(iter(found.values()), None)


def _is_supervised(item: Mapping[str, Any], where: str) -> bool:
    """Return whether a message is supervised: `weight`, `train` and `loss` mean the same; absent means yes."""
    stated = {}
    for key in SUPERVISION_KEYS:
        value = item.get(key)
        if value not in (None, 0, 1):
            wanted = "0 (not supervised) or 1" if key == "weight" else "false (not supervised) or true"
            raise BadRow(f"{where} has the {key} {value!r}; {wanted} is needed")
        if value is not None:
            stated[key] = bool(value)
    if len(set(stated.values())) > 1:
        raise BadRow(f"{where}: {' and '.join(stated)} contradict each other about whether it is supervised")
    return next(iter(stated.values()), True)


def _check_turn(role: str, before: list[str], where: str) -> None:
    if role == "system":
        if "system" in before:
            raise BadRow(f"{where} is a second system message")
        if before:
            raise BadRow(f"{where} is a system message after the first turn")
        return
    last = before[-1] if before else "system"
    if role == "assistant" and last == "system":
        raise BadRow(f"{where}: the assistant can't speak first")
    if role == last:
        raise BadRow(f"{where} is a second {role}'s message in a row")
