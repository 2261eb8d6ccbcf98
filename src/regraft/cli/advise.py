"""``regraft advise``: what to do with a model so that it fits."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.later import later
from regraft.cli.options import ModelArgument
from regraft.cli.screen import Screen
from regraft.cli.words import flag
from regraft.errors import InputError

if TYPE_CHECKING:
    from regraft.pipelines.advise import facts_of, for_bytes, for_speed, in_megabytes, least_minutes, times_in
    from regraft.settings.base import bytes_in
else:
    facts_of = later("regraft.pipelines.advise", "facts_of")
    for_bytes = later("regraft.pipelines.advise", "for_bytes")
    for_speed = later("regraft.pipelines.advise", "for_speed")
    in_megabytes = later("regraft.pipelines.advise", "in_megabytes")
    least_minutes = later("regraft.pipelines.advise", "least_minutes")
    times_in = later("regraft.pipelines.advise", "times_in")
    bytes_in = later("regraft.settings.base", "bytes_in")

TOKENS = 200 * 8 * 256  # of a recovery by its defaults
LARGE_VOCABULARY = 0.15  # share of the parameters from which on tokens are worth a thought


def advise(
    model: ModelArgument,
    memory: Annotated[str, typer.Option("--memory", metavar="AMOUNT", help="memory while it runs, such as 4GB")] = "",
    size: Annotated[str, typer.Option("--size", metavar="AMOUNT", help="size of its file, such as 500MB")] = "",
    speed: Annotated[str, typer.Option("--speed", metavar="TIMES", help="speed of decoding against today's, such as 1.3x")] = "",
) -> None:
    """Say in a second how a model gets under a size, into a memory, or to a speed, and print the command."""
    wanted = {name: value for name, value in (("--memory", memory), ("--size", size), ("--speed", speed)) if value}
    if len(wanted) != 1:
        raise InputError(f"{' and '.join(wanted) or 'nothing'} was asked for; give one of --memory 4GB, --size 500MB and --speed 1.3x")
    facts = facts_of(model)
    if speed:
        found = for_speed(facts, times_in(speed))
    else:
        try:
            limit = bytes_in(memory or size)
        except ValueError as error:
            raise InputError(f"{next(iter(wanted))} {memory or size}: {error}") from None
        found = for_bytes(facts, limit, running=bool(memory))
    console = Screen(highlight=False, soft_wrap=True)
    console.print(f"{model}: {facts.parameters:,} parameters, {in_megabytes(facts.stored_bytes)} of weights")
    console.print(found.words)
    if found.ratio:
        minutes = least_minutes(facts, TOKENS)
        if facts.outside >= LARGE_VOCABULARY:
            console.print(
                f"{facts.outside:.0%} of its parameters are rows of tokens, but for a few; --targets heads,ffn,vocabulary takes these into "
                "the budget, and may lose less with text of every kind."
            )
        console.print(f"A recovery of 200 steps takes at least {minutes:,.1f} minutes here, by its operations alone.")
    for step in found.steps:
        options = (part for name, value in step.settings.items() for part in ((flag(name),) if value is True else (flag(name), str(value))))
        console.print(f"  {shlex.join(['regraft', step.command, step.source, *options])}")
