"""``regraft inspect``: show the structure and sizes of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
    from regraft.pipelines.inspect import inspect_model
else:
    inspect_model = later("regraft.pipelines.inspect", "inspect_model")


@with_settings
def inspect(
    model: ModelArgument,
    load: LoadSettings,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Show the layers of a model, their sizes, what can be pruned, and the parameters."""
    facts = inspect_model(model, load=load)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(Screen(), facts)


def _show(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"{facts['source']}: {facts['class']} ({facts['family']}, {facts['dtype']}), fingerprint {facts['fingerprint']}")
    console.print(
        f"{facts['parameters']:,} parameters, {facts['prunable_parameters']:,} of them in prunable groups; hidden size "
        f"{facts['hidden_size']}, vocabulary {facts['vocabulary']}, embeddings {'tied' if facts['tied_embeddings'] else 'not tied'}"
    )
    if "adapter" in facts:
        console.print(_adapter_line(facts["adapter"]), soft_wrap=True)
    table = Table(title=f"{len(facts['layers'])} layers, {'all alike' if facts['uniform'] else 'of different sizes'}")
    for heading in ("layers", "query heads", "KV heads", "head dim", "FFN", "parameters each"):
        table.add_column(heading, justify="right")
    for first, last, row in _runs(facts["layers"]):
        sizes = (row["query_heads"], row["kv_heads"], row["head_dim"], row["ffn"])
        table.add_row(str(first) if first == last else f"{first}-{last}", *(str(value) for value in sizes), f"{row['parameters']:,}")
    console.print(table)
    kinds = {group["kind"]: group for group in facts["groups"]}
    for kind, group in kinds.items():
        count = sum(other["kind"] == kind for other in facts["groups"])
        console.print(f"groups of kind '{kind}': {count}; one unit of {group['name']} holds {group['unit_parameters']:,} parameters")


def _adapter_line(facts: Mapping[str, Any]) -> str:
    ranks = " to ".join(str(rank) for rank in dict.fromkeys(facts["ranks"]))
    return (
        f"an adapter on the base {facts['base']}, whose layers these are: {facts['method']}{f' of rank {ranks}' if ranks else ''} on "
        f"{facts['modules']} modules, {facts['parameters']:,} parameters"
    )


def _runs(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Yields neighbouring layers of equal sizes together: the first, the last, and the sizes."""
    for _, run in groupby(layers, key=lambda row: {name: value for name, value in row.items() if name != "layer"}):
        rows = list(run)
        yield rows[0]["layer"], rows[-1]["layer"], rows[0]
