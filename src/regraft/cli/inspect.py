"""``regraft inspect``: show the structure and sizes of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regraft.cli.later import later
from regraft.cli.options import ModelArgument, with_settings
from regraft.cli.screen import Screen
from regraft.settings import LoadSettings

if TYPE_CHECKING:
    from regraft.pipelines.inspect import InspectedLayer, InspectReport, inspect_model
else:
    inspect_model = later("regraft.pipelines.inspect", "inspect_model")


@with_settings
def inspect(
    model: ModelArgument,
    load: LoadSettings,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show the layers of a model, their sizes, what can be pruned, and the parameters."""
    found = inspect_model(model, load=load)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show(Screen(), found)


def _show(console: Console, found: InspectReport) -> None:
    console.print(f"{found.source}: {found.model_class} ({found.family}, {found.dtype}), fingerprint {found.fingerprint}")
    console.print(
        f"{found.parameters:,} parameters, {found.prunable_parameters:,} of them in prunable groups; hidden size "
        f"{found.hidden_size}, vocabulary {found.vocabulary}, embeddings {'tied' if found.tied_embeddings else 'not tied'}"
    )
    if found.adapter is not None:
        console.print(_adapter_line(found.adapter), soft_wrap=True)
    table = Table(title=f"{len(found.layers)} layers, {'all alike' if found.uniform else 'of different sizes'}")
    for heading in ("layers", "query heads", "KV heads", "head dim", "FFN", "parameters each"):
        table.add_column(heading, justify="right")
    for first, last, row in _runs(found.layers):
        sizes = (row.query_heads, row.kv_heads, row.head_dim, row.ffn)
        table.add_row(str(first) if first == last else f"{first}-{last}", *(str(value) for value in sizes), f"{row.parameters:,}")
    console.print(table)
    for kind, group in {group.kind: group for group in found.groups}.items():
        count = sum(other.kind == kind for other in found.groups)
        console.print(f"groups of kind '{kind}': {count}; one unit of {group.name} holds {group.unit_parameters:,} parameters")


def _adapter_line(facts: Mapping[str, Any]) -> str:
    ranks = " to ".join(str(rank) for rank in dict.fromkeys(facts["ranks"]))
    return (
        f"an adapter on the base {facts['base']}, whose layers these are: {facts['method']}{f' of rank {ranks}' if ranks else ''} on "
        f"{facts['modules']} modules, {facts['parameters']:,} parameters"
    )


def _runs(layers: Sequence[InspectedLayer]) -> Iterator[tuple[int, int, InspectedLayer]]:
    """Yields neighbouring layers of equal sizes together: the first, the last, and the sizes."""
    for _, run in groupby(layers, key=lambda row: replace(row, layer=0)):
        rows = list(run)
        yield rows[0].layer, rows[-1].layer, rows[0]
