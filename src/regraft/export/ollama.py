"""The export format ``ollama``: a GGUF file and a Modelfile with chat template, stop tokens and context.

Ollama's templates are Go's, a model's is Jinja. The template is therefore not translated but observed: rendered with marked messages, it
shows what stands before and after each role's text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from regraft.export.contract import EXPORTERS, Holding, ModelFormat, Parity, Written
from regraft.export.gguf import format as gguf_format
from regraft.models.load import Loaded
from regraft.settings import ExportSettings
from regraft.streaming.once import OnePass
from regraft.streaming.skeleton import Skeleton

MODELFILE = "Modelfile"
SYSTEM, USER, ANSWER, AGAIN = "\ue000system\ue000", "\ue000user\ue000", "\ue000answer\ue000", "\ue000again\ue000"
PLAIN = "{{ .Prompt }}"


@dataclass(frozen=True)
class Turns:
    """The texts that a chat template writes around the messages of a conversation.

    Attributes:
        system: Texts before and after a system message; None where the template has none.
        user: Texts before and after a user's message.
        assistant: Texts before and after an answer.
    """

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: list[dict[str, str]]) -> str:
        """Returns a conversation that ends with a user's message, ready for an answer."""
        found = ""
        for message in messages:
            before, after = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}[message["role"]]
            found += before + message["content"] + after
        return found + self.assistant[0]

    def template(self) -> str:
        """Returns the template in Go's language."""
        system = (
            f"{{{{ if .System }}}}{_plain(self.system[0])}{{{{ .System }}}}{_plain(self.system[1])}{{{{ end }}}}" if self.system else ""
        )
        user = f"{{{{ if .Prompt }}}}{_plain(self.user[0])}{{{{ .Prompt }}}}{_plain(self.user[1])}{{{{ end }}}}"
        return f"{system}{user}{_plain(self.assistant[0])}{{{{ .Response }}}}{_plain(self.assistant[1])}"


def observed(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Returns what the chat template of a tokenizer writes; None where it has none, or one that is not made of turns."""
    if not tokenizer.chat_template:
        return None
    turns = [("user", USER), ("assistant", ANSWER), ("user", AGAIN)]
    plain = _rendered(tokenizer, turns)
    if plain is None or [plain.count(mark) for mark in (USER, ANSWER, AGAIN)] != [1, 1, 1]:
        return None
    start, rest = plain.removeprefix(str(tokenizer.bos_token or "")).split(USER)
    between, end = rest.split(ANSWER)[1].split(AGAIN)
    opening = _generation_prompt(tokenizer, turns)
    before_user = _common_suffix(start, between)
    system = _system(tokenizer, before_user)
    # What opens an answer is what opens the one to be generated; within the conversation some templates add a space there.
    found = Turns(system, (before_user, end.removesuffix(opening)), (opening, between.removesuffix(before_user)))
    shown = found.render([{"role": role, "content": text} for role, text in turns])
    wanted = (before_user if system is not None else start) + plain.removeprefix(str(tokenizer.bos_token or "")).removeprefix(start)
    return found if "".join(shown.split()) == "".join(wanted.split()) else None


def _system(tokenizer: PreTrainedTokenizerBase, before_user: str) -> tuple[str, str] | None:
    whole = _rendered(tokenizer, [("system", SYSTEM), ("user", USER)])
    if whole is None or whole.count(SYSTEM) != 1 or whole.index(SYSTEM) > whole.index(USER):
        return None
    first, rest = whole.removeprefix(str(tokenizer.bos_token or "")).split(SYSTEM)
    last = rest.split(USER)[0]
    return (first, last.removesuffix(before_user)) if last.endswith(before_user) else None


def _generation_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    with_prompt, without = _rendered(tokenizer, turns), _rendered(tokenizer, turns, prompt=False)
    return with_prompt.removeprefix(without) if with_prompt and without and with_prompt.startswith(without) else ""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], *, prompt: bool = True) -> str | None:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # templates raise what they like, such as "no system messages"
        return None


def _common_suffix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[-length - 1] == second[-length - 1]:
        length += 1
    return first[len(first) - length :]


def _plain(text: str) -> str:
    """Returns a text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(loaded: Loaded, context: int) -> tuple[str, tuple[str, ...]]:
    """Returns the Modelfile, and what the user should know of it."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    turns, notes = observed(tokenizer), tuple[str, ...]()
    template = turns.template() if turns is not None else PLAIN
    if turns is None and tokenizer.chat_template:
        notes = ("the chat template is not made of turns, so that the Modelfile has none: ollama takes the one in the GGUF file",)
    ends = loaded.model.generation_config.eos_token_id if loaded.model.generation_config is not None else None
    numbers = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    stops = dict.fromkeys(tokenizer.convert_ids_to_tokens(number) for number in numbers if number is not None)
    lines = [f"FROM ./{gguf_format.FILE}"]
    if not notes:
        lines.append(f'TEMPLATE """{template}"""')
    lines.append(f"PARAMETER num_ctx {context}")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", notes


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Written:
    """Writes ``model.gguf`` and ``Modelfile``."""
    return _with_modelfile(loaded, folder, gguf_format.write(loaded, folder, settings))


def stream(skeleton: Skeleton, once: OnePass, folder: Path, settings: ExportSettings) -> Written:
    """Writes ``model.gguf`` and ``Modelfile`` from a checkpoint."""
    return _with_modelfile(skeleton.loaded, folder, gguf_format.stream(skeleton, once, folder, settings))


def _with_modelfile(loaded: Loaded, folder: Path, written: Written) -> Written:
    text, notes = modelfile(loaded, written.facts["context"])
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    words = f"{written.words}, with a Modelfile (ollama create NAME -f Modelfile),"
    return dataclasses.replace(written, words=words, notes=(*written.notes, *notes, "ollama itself was not run"))


def check(loaded: Loaded, folder: Path, written: Written, text: str, settings: ExportSettings) -> Parity:
    """Compares the GGUF file in llama.cpp, on which ollama runs."""
    return gguf_format.check(loaded, folder, written, text, settings)


_HOLDS = (
    Holding(
        "Ollama",
        "those of `gguf`",
        "as `gguf`",
        "as `gguf`",
        "as `gguf`; a chat template that is not made of turns stays in Jinja",
        "run in llama.cpp; the Modelfile by rules",
    ),
)
EXPORTERS.add("ollama", ModelFormat("a GGUF file and a Modelfile", _HOLDS, gguf_format.refuse, write, check, stream=stream))
