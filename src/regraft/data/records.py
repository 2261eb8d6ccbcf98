"""Instructions and chats: one row of a data set, in any of its usual forms, becomes a text or a :class:`Record`.

Read are ``{"text": …}``, ``{"instruction": …, "input": …, "output": …}`` under these or other usual names, TRL's ``{"prompt": …,
"completion": …}`` as texts or as lists of messages, OpenAI's ``{"messages": [{"role": …, "content": …}, …]}``, such a list of messages
itself, and ShareGPT's ``{"conversations": [{"from": …, "value": …}, …]}``. A chat may have a system message, several turns, and contents in
parts. Other keys are allowed and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from regraft.errors import DataError, kind_of
from regraft.reading import text_in

Role = Literal["system", "user", "assistant"]

# What data sets call the parts of a record; the first name that a row has counts.
PARTS = {
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Record:
    """One instruction and its answer, with the turns of the chat before it.

    Attributes:
        instruction: The question, in a chat the user's last message.
        input: The text that the question is about; may be empty.
        output: The answer, never blank.
        system: The system message of a chat; may be empty.
        history: Earlier exchanges of a chat, (user, assistant) each, oldest first.
    """

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    @property
    def question(self) -> str:
        """The instruction with its input, as a user would write both in one message."""
        return "\n\n".join(part for part in (self.instruction, self.input) if part.strip())

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the record."""
        return (self.system, *(text for exchange in self.history for text in exchange), self.instruction, self.input, self.output)

    def messages(self) -> list[dict[str, str]]:
        """Returns the record as the messages of a chat, in the form that ``tokenizer.apply_chat_template`` takes."""
        turns: list[tuple[str, str]] = [("system", self.system)] if self.system.strip() else []
        for user, assistant in (*self.history, (self.question, self.output)):
            turns += [("user", user), ("assistant", assistant)]
        return [{"role": role, "content": content} for role, content in turns]


def entry_of(where: str, value: Any) -> str | Record:
    """Returns the text or the record of one row.

    Args:
        where: File and place, for messages.
        value: The row.

    Raises:
        DataError: The row has none of the known forms, or a field of another type than text.
    """
    match value:
        case {"messages": turns} if not _is_answered(value):
            return _chat(where, "messages", turns)
        case {"conversations": turns} if not _is_answered(value):
            return _chat(where, "conversations", turns)
        case {"prompt": [*_]} | {"completion": [*_]}:
            turns = [*_as_turns(value.get("prompt"), "user"), *_as_turns(value.get("completion"), "assistant")]
            return _chat(where, "prompt and completion", turns)
        case {"instruction": _} | {"output": _}:
            return _record(where, value)
        case {"text": _}:
            return _string(where, value, "text")
        case Mapping() if any(name in value for part in ("instruction", "output") for name in PARTS[part]):
            return _record(where, value)
        case [Mapping(), *_]:  # a chat, as ``tokenizer.apply_chat_template`` takes it
            return _chat(where, "messages", value)
        case {"role": _, "content": _}:
            raise DataError(f"{where} is one message of a chat; give chats, each a list of its messages: [MESSAGES]")
        case Mapping():
            found = ", ".join(map(repr, list(value)[:6])) or "none"
            raise DataError(f"{where} has neither 'text' nor instruction, input and output nor 'messages'; its keys: {found}")
        case _:
            raise DataError(f"{where} is {kind_of(value)}, not an object with 'text', with instruction and output, or with messages")


def _is_answered(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has a text or an answer beside its chat, which counts then."""
    return bool({"text", *PARTS["output"]} & row.keys())


def _record(where: str, value: Mapping[str, Any]) -> Record:
    instruction, context, output = (_string(where, value, part) for part in PARTS)
    if not output.strip():
        raise DataError(f"{where} has an empty 'output': there is nothing to learn or to measure; remove the record")
    if not instruction.strip() and not context.strip():
        raise DataError(f"{where} has an empty 'instruction'; remove the record or fill it in")
    return Record(instruction, context, output)


def _as_turns(value: Any, role: Role) -> list[Any]:
    """Returns the messages of one side of TRL's prompt and completion; a plain text is one message of its side."""
    match value:
        case [*turns]:
            return turns
        case _:
            return [{"role": role, "content": value}]


def _chat(where: str, key: str, turns: Any) -> Record:
    """Returns a chat as a record: the system message, the earlier exchanges, and the last one."""
    match turns:
        case [*_]:
            said = [_turn(f"{where}, message {number}", turn) for number, turn in enumerate(turns, 1)]
        case _:
            raise DataError(f"{where} has '{key}' of type {type(turns).__name__}; it must be a list of messages")
    system = "\n\n".join(text for role, text in said if role == "system" and text.strip())
    if any(role == "system" for role, _ in said[sum(role == "system" for role, _ in said) :]):
        raise DataError(f"{where} has a system message after the first turn; put it first or divide the chat")
    exchanges: list[tuple[str, str]] = []
    questions: list[str] = []
    for role, text in said:
        if role == "user":
            questions.append(text)
        elif role == "assistant" and questions:
            exchanges.append(("\n\n".join(questions), text))
            questions = []
        elif role == "assistant" and exchanges:  # two answers in a row are one
            exchanges[-1] = (exchanges[-1][0], f"{exchanges[-1][1]}\n\n{text}")
        elif role == "assistant":
            raise DataError(f"{where} begins with the assistant's message; remove that message or put the user's before it")
    if not exchanges:
        raise DataError(f"{where} has no answer of the assistant in '{key}': there is nothing to learn; remove the record")
    *history, (question, answer) = exchanges
    if not answer.strip():
        raise DataError(f"{where} ends with an empty answer of the assistant; remove the record")
    if not question.strip():
        raise DataError(f"{where} has an empty message of the user before the last answer; remove the record or fill it in")
    return Record(question, "", answer, system, tuple(history))


def _turn(where: str, turn: Any) -> tuple[Role, str]:
    """Returns role and text of one message, with ``role`` and ``content`` or ShareGPT's ``from`` and ``value``."""
    match turn:
        case Mapping():
            name, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        case _:
            raise DataError(f"{where} is {kind_of(turn)}, not an object with 'role' and 'content'")
    role = _ROLES.get(text_in(name) or "")
    if role is None:
        raise DataError(f"{where} has the role {name!r}; known: {', '.join(_ROLES)}: remove that message or rename its role")
    match content:
        case str():
            return role, _whole_text(where, "content", content)
        case [*parts]:
            return role, _whole_text(where, "content", "".join(_part(where, part) for part in parts))
        case _:
            raise DataError(f"{where} has 'content' of type {type(content).__name__}; it must be text, or a list of parts of text")


def _part(where: str, part: Any) -> str:
    match part:
        case str():
            return part
        case {"text": str(text)} if part.get("type", "text") == "text":
            return text
        case Mapping():
            kind = part.get("type")
        case _:
            kind = type(part).__name__
    raise DataError(f"{where} has a part of kind {kind!r}; only parts of text are read: remove it")


def _string(where: str, value: Mapping[str, Any], part: str) -> str:
    """Returns a text field by the first of its names; ``input`` alone may be absent or null."""
    key = next((name for name in PARTS.get(part, ()) if name in value), part)
    found = value.get(key, "" if part == "input" else None)
    if part == "input" and found is None:
        found = ""
    match found:
        case str():
            return _whole_text(where, key, found)
        case _:
            problem = f"has '{key}' of type {type(found).__name__}" if key in value else f"has no '{key}'"
            raise DataError(f"{where} {problem}; it must be a string")


def _whole_text(where: str, key: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half a surrogate pair in '{key}', which no text holds; repair the \\u escape") from None
    return text
