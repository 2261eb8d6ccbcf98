"""``regraft generate``: continue or answer a prompt, as it is written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.later import later
from regraft.cli.options import ModelArgument, SeedOption, with_settings
from regraft.errors import InputError, harmless
from regraft.settings import LoadSettings

if TYPE_CHECKING:
    from regraft.pipelines.generate import generate as written
    from regraft.pipelines.generate import opened, prompt_ids
else:
    opened = later("regraft.pipelines.generate", "opened")
    written = later("regraft.pipelines.generate", "generate")
    prompt_ids = later("regraft.pipelines.generate", "prompt_ids")

LONGEST_PROMPT = 10**7
TokensOption = Annotated[int, typer.Option("--tokens", "--max-new-tokens", metavar="N", min=1, help="largest number of tokens to write")]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", metavar="X", min=0.0, help="temperature of drawing; 0: the likeliest token each time")
]


@with_settings
def generate(
    model: ModelArgument,
    load: LoadSettings,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="text to continue or to answer; -: read from the standard input")],
    tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    plain: Annotated[bool, typer.Option("--plain", help="continue the text as it stands, without the chat template")] = False,
    seed: SeedOption = 0,
) -> None:
    """Continue a prompt, or answer it if the model has a chat template; the text is shown as it is written."""
    loaded = opened(model, load)
    ids = prompt_ids(loaded, _from_standard_input() if prompt == "-" else prompt, plain=plain)
    written(loaded, ids, tokens=tokens, temperature=temperature, seed=seed, show=show_piece)
    typer.echo()


def show_piece(piece: str) -> None:
    """Prints what a model has written, with escapes in place of what would command the terminal."""
    typer.echo(harmless(piece), nl=False)


def _from_standard_input() -> str:
    """Reads a prompt from the standard input, which may be a device that never ends.

    Raises:
        InputError: It is too long, or no text.
    """
    try:
        text = sys.stdin.read(LONGEST_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on the standard input is no text ({error.reason}); give UTF-8") from None
    if len(text) > LONGEST_PROMPT:
        raise InputError(f"the prompt on the standard input is longer than {LONGEST_PROMPT:,} characters; give a shorter one")
    return text
