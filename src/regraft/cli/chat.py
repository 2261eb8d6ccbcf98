"""``regraft chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.generate import LONGEST_PROMPT, TemperatureOption, TokensOption, show_piece
from regraft.cli.later import later
from regraft.cli.options import ModelArgument, SeedOption, with_settings
from regraft.settings import LoadSettings

if TYPE_CHECKING:
    from regraft.pipelines.generate import generate, opened, prompt_ids
else:
    opened = later("regraft.pipelines.generate", "opened")
    generate = later("regraft.pipelines.generate", "generate")
    prompt_ids = later("regraft.pipelines.generate", "prompt_ids")


@with_settings
def chat(
    model: ModelArgument,
    load: LoadSettings,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="a message that goes before the conversation")] = "",
    tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = 0,
) -> None:
    """Talk to a model in the terminal; its chat template is applied.

    An empty line, or the end of the input, ends the conversation.
    """
    loaded = opened(model, load)
    messages = [{"role": "system", "content": system}] if system else []
    prompt_ids(loaded, [*messages, {"role": "user", "content": "Hello"}])  # refuses a model that cannot converse before anybody types
    while True:
        typer.echo("> ", nl=False)
        line = sys.stdin.readline(LONGEST_PROMPT).strip()
        if not line:
            typer.echo()
            return
        messages.append({"role": "user", "content": line})
        ids = prompt_ids(loaded, messages)
        answer = generate(
            loaded,
            ids,
            tokens=tokens,
            temperature=temperature,
            seed=seed + len(messages),
            show=show_piece,
        )
        typer.echo()
        messages.append({"role": "assistant", "content": answer})
