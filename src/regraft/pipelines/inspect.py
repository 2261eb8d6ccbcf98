"""Inspection of a model: layers, sizes, groups and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.groups.discover import discover
from regraft.models.live import ModelLike, resting, take
from regraft.models.load import Loaded
from regraft.models.view import ModelView, parameter_count
from regraft.settings import LoadSettings, takes_settings, with_keywords
from regraft.surgery.adapter_folder import bare_base, is_adapter


@takes_settings(LoadSettings)
def inspect_model(model: ModelLike, *, load: LoadSettings | None = None, **keywords: Any) -> dict[str, Any]:
    """Returns the facts of a model as plain JSON types.

    Args:
        model: A ``PreTrainedModel`` in memory, which is left as it is; or a folder, a hub id, ``seedling``, or the folder of an adapter.
        load: How a folder or hub id is loaded.
        **keywords: Single settings of loading by name, such as ``dtype="float32"``.

    Raises:
        RegraftError: Anything that the user can mend, in one line.

    The keys are ``source``, ``family``, ``class``, ``fingerprint``, ``dtype``, ``parameters``, ``prunable_parameters``, ``hidden_size``,
    ``vocabulary``, ``tied_embeddings``, ``uniform`` (whether all layers have the same sizes), ``layers`` (a row for each: query
    heads, key-value heads, head dimension, feed-forward channels, parameters) and ``groups`` (a row for each: name, kind, units,
    parameters of one unit). Of an adapter, these are the facts of its base, and ``adapter`` says what it is: ``folder``, ``method``,
    ``modules``, ``ranks`` (the smallest and the largest; none for methods without), ``parameters`` and ``base`` (where that was found).
    """
    (asked,) = with_keywords("regraft.inspect", keywords, load or LoadSettings())
    if isinstance(model, str | Path) and is_adapter(model):
        base, facts = bare_base(Path(model), asked)
        with resting(base.model):
            return _facts(base) | {"source": str(model), "adapter": facts}
    loaded = take(model, None, asked)
    with resting(loaded.model):
        return _facts(loaded)


def _facts(loaded: Loaded) -> dict[str, Any]:
    model, view = loaded.model, ModelView(loaded.model)
    groups = () if view.factored() else discover(view).groups  # nothing can be cut from what is factored
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    embedding_weight = dict(model.get_input_embeddings().named_parameters())["weight"]
    return {
        "source": loaded.source,
        "family": view.family.model_type,
        "class": type(model).__name__,
        "fingerprint": loaded.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": parameter_count(model),
        "prunable_parameters": sum(group.units * group.unit_parameters for group in groups),
        "hidden_size": int(model.config.hidden_size),
        "vocabulary": int(embedding_weight.shape[0]),
        "tied_embeddings": bool(model.config.tie_word_embeddings),
        "uniform": len(set(sizes)) == 1,
        "layers": [
            {
                "layer": index,
                "query_heads": size.query_heads,
                "kv_heads": size.kv_heads,
                "head_dim": size.head_dim,
                "ffn": size.ffn,
                "parameters": parameter_count(view.layers[index]),
            }
            for index, size in enumerate(sizes)
        ],
        "groups": [
            {"name": group.name, "kind": group.kind, "units": group.units, "unit_parameters": group.unit_parameters} for group in groups
        ],
    }
