"""Inference of a family's table from a small random model, for families without a table in ``architectures/``.

transformers builds a model of any family from a config. A small model, with different sizes for heads, channels and the stream, shows the
positions of the matrices and the meaning of their axes. Silencing a part and changing a norm shows which norms serve only that part. That
is enough to build and save models of other sizes. Couplings are not inferred: they come from tracing the computation of the model
(:mod:`regraft.groups.traced`), which refuses operators that it does not know.

The width of the residual stream is not cut, because that needs knowledge that this inspection cannot give, such as other uses of the norms'
epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regraft.compat import own_parameters
from regraft.errors import ModelError
from regraft.models.quiet import in_one_line, quiet

HEADS, KV_HEADS, WIDTH, LAYERS, VOCABULARY = 8, 2, 128, 3, 97
OTHER_HEADS, OTHER_KV_HEADS = 6, 3  # head counts of a second model, to test whether single heads can be removed
HEAD_DIM = WIDTH // HEADS  # head size of families that compute it
OWN_HEAD_DIM = 2 * HEAD_DIM  # requested head size, to test whether a family accepts one
FFN, USUAL_FFN = 88, 4 * WIDTH
# Other names of Llama's num_key_value_heads and intermediate_size in configs.
KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim")
TOKENS = 12
# A decoder of these sizes has a few hundred thousand parameters; a far larger model has parts with other sizes.
MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class _Matrix:
    """A matrix within a layer, with its name and the lengths of its sides."""

    name: str
    inputs: int
    outputs: int


def describe(model_type: str) -> dict[str, Any]:
    """Returns the entries of a family's table.

    Args:
        model_type: Model type in the Hugging Face config, known to transformers.

    Raises:
        ModelError: It is no causal language model of equal layers with attention and feed-forward network; the message gives the obstacle.
    """
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"transformers has no causal language model of type '{model_type}'")
    config_class = CONFIG_MAPPING[model_type]
    try:
        known = {*config_class().to_dict(), *config_class.attribute_map}
    except Exception as error:  # a config without defaults may raise anything
        raise ModelError(f"its config has no defaults ({in_one_line(error)})") from None
    # Some families have a configurable head size, some compute it, and some have one that must equal the computed value.
    for head_dim in (OWN_HEAD_DIM, None, HEAD_DIM):
        model = _small(model_type, known, head_dim)
        if model is not None:
            return _Probe(model_type, model, known, head_dim).table()
    raise ModelError("no small model of it can be built to see how it is made")


def _small(
    model_type: str, known: set[str], head_dim: int | None, heads: tuple[int, int] = (HEADS, KV_HEADS), width: int = WIDTH
) -> PreTrainedModel | None:
    """Returns a small random model that runs, or None if the family refuses the sizes.

    Args:
        model_type: Model type in the Hugging Face config.
        known: Keys of the config.
        head_dim: Requested head size; None to leave it to the family.
        heads: Numbers of query heads and key-value heads.
        width: Width of the residual stream.

    Raises:
        ModelError: The model has parts other than those of a decoder, or would not be small.
    """
    wanted: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads[0],
        **dict.fromkeys(KV_KEYS, heads[1]),
        **dict.fromkeys(FFN_KEYS, FFN),
        "max_position_embeddings": 64,
        "rotary_dim": HEAD_DIM,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    values = {key: value for key, value in wanted.items() if key in known} | ({"head_dim": head_dim} if head_dim else {})
    try:
        with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
            torch.manual_seed(0)
            config_class: Any = CONFIG_MAPPING[model_type]
            config: PreTrainedConfig = config_class(**values)
            _refuse_what_is_no_decoder(config)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))  # so that no value is exactly zero or one
            model(input_ids=_tokens(), use_cache=False)
    except ModelError:
        raise
    except Exception:  # a family may refuse these sizes with any error
        return None
    return model


def _refuse_what_is_no_decoder(config: PreTrainedConfig) -> None:
    """Inspects the modules of a model before it takes memory, for experts, convolutions or a second model inside.

    Raises:
        ModelError: The message names the first such module, or the largest parameter.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception:  # its constructor computes with values; the model is inspected after it is built
        return
    list_name, layers = _layers(model)
    for name, module in layers.named_modules():
        if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            raise ModelError(f"'{list_name}.{name}' ({type(module).__name__}) is no matrix")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    if total > MOST_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ModelError(f"even a small model of it has {total / 1e6:,.0f} million parameters, such as '{largest}'")


def _tokens() -> Tensor:
    return torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)


class _Probe:
    """Inspection of a small model of a family.

    Args:
        model_type: Model type of the family.
        model: A model of the sizes above.
        known: Keys of the model's config.
        head_dim: The requested head size, or None.
    """

    def __init__(self, model_type: str, model: PreTrainedModel, known: set[str], head_dim: int | None) -> None:
        self._type = model_type
        self._asked_head_dim = head_dim
        self._model = model
        self._known = known
        self._layers_name, self._layers = _layers(model)
        self._layer: nn.Module = self._layers[0]
        if not self._is_causal():
            raise ModelError("its predictions depend on later tokens: it is no causal language model")
        self._refuse_odd_layers()
        matrices = self._matrices()
        widths = {side for matrix in matrices for side in (matrix.inputs, matrix.outputs)}
        self._ffn = FFN if FFN in widths else USUAL_FFN
        self._head_dim = OWN_HEAD_DIM if HEADS * OWN_HEAD_DIM in widths else HEAD_DIM
        self._down, self._up = self._feed_forward(matrices)
        self._out, self._qkv = self._attention([matrix for matrix in matrices if matrix not in (self._down, *self._up)])

    def table(self) -> dict[str, Any]:
        """Returns all findings, by the fields of :class:`regraft.models.family.Family`."""
        model: Any = self._model
        attention = self._enclosing((self._out, *self._qkv))
        mlp = self._enclosing((self._down, *self._up))
        if not attention:
            raise ModelError("the matrices of its attention are not in one module")
        parts = self._mlp_parts() if not mlp else []
        fixed = [_fixed("residual", "the norms of a family without a table cannot be rescaled with certainty")]
        fixed += self._unreplaceable(attention, mlp or self._down.name)
        fixed += self._unscalable()
        serving = {name: self._serves(name) for name in self._stream_norms(attention, mlp)}
        return {
            "model_type": self._type,
            "model_class": type(model).__name__,
            "layers": self._layers_name,
            "embedding": _name_of(model, model.get_input_embeddings(), "token embedding"),
            "head": _name_of(model, model.get_output_embeddings(), "output projection"),
            "final_norm": self._final_norm(),
            "attention": attention,
            "mlp": mlp or self._down.name,
            "mlp_parts": tuple(parts),
            "attention_norms": tuple(name for name, part in serving.items() if part == "attention"),
            "mlp_norms": tuple(name for name, part in serving.items() if part == "mlp"),
            "discovery": "traced",
            "transposed": isinstance(self._layer.get_submodule(self._out.name), Conv1D),
            "head_size": "explicit" if self._head_dim == OWN_HEAD_DIM else "derived",
            "writers": tuple(dict.fromkeys(matrix.name.rpartition(".")[2] for matrix in (self._out, self._down))),
            "norm": self._norm_kind(serving),
            "layer_output": "tuple" if isinstance(self._seen("", self._layer)[1], tuple) else "tensor",
            "keys": {"kv_heads": self._kv_key(), "ffn": self._ffn_key()},
            "fixed": tuple(fixed),
            "couplings": self._couplings(),
        }

    def _couplings(self) -> tuple[dict[str, Any], ...]:
        blocks = {HEADS * self._head_dim: "query_group", KV_HEADS * self._head_dim: "head"}
        heads = [{"module": m.name, "side": "out", "block": blocks.get(m.outputs, "fused")} for m in self._qkv]
        channels = [{"module": m.name, "side": "out", "block": "one" if m.outputs == self._ffn else "fused"} for m in self._up]
        return (
            {"kind": "heads", "axes": (*heads, {"module": self._out.name, "side": "in", "block": "query_group"})},
            {"kind": "ffn", "axes": (*channels, {"module": self._down.name, "side": "in", "block": "one"})},
        )

    def _refuse_odd_layers(self) -> None:
        """Refuses layers that cannot be built singly, or that do not return hidden states (alone or first in a tuple)."""
        kind: Any = type(self._layer)
        try:
            with init_empty_weights(include_buffers=False):
                kind(self._model.config, 0)
        except Exception:  # the constructor needs other arguments
            raise ModelError(f"a layer ({kind.__name__}) is not made from a config and its number") from None
        output = self._seen("", self._layer)[1]
        if not isinstance(output[0] if isinstance(output, tuple) else output, Tensor):
            raise ModelError(f"a layer ({kind.__name__}) does not return hidden states")

    # What is where.

    def _matrices(self) -> list[_Matrix]:
        """Returns the matrices of a layer; refuses layers of different kinds."""
        found: list[_Matrix] = []
        for name, module in self._layer.named_modules():
            if isinstance(module, nn.Linear):
                found.append(_Matrix(name, module.weight.shape[1], module.weight.shape[0]))
            elif isinstance(module, Conv1D):
                found.append(_Matrix(name, *module.weight.shape))
        shapes = [{name: parameter.shape for name, parameter in layer.named_parameters()} for layer in self._layers]
        different = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
        if different is not None:
            raise ModelError(f"its layers 0 and {different} are of different kinds")
        return found

    def _feed_forward(self, matrices: Sequence[_Matrix]) -> tuple[_Matrix, list[_Matrix]]:
        down = [matrix for matrix in matrices if matrix.inputs == self._ffn and matrix.outputs == WIDTH]
        up = [matrix for matrix in matrices if matrix.inputs == WIDTH and matrix.outputs in (self._ffn, 2 * self._ffn)]
        if len(down) != 1 or not up:
            raise ModelError("it has not one feed-forward network in every layer")
        return down[0], up

    def _attention(self, matrices: Sequence[_Matrix]) -> tuple[_Matrix, list[_Matrix]]:
        queries, keys = HEADS * self._head_dim, KV_HEADS * self._head_dim
        grouped, each = (queries, queries + 2 * keys, keys), (queries, 3 * queries)
        writing = [matrix for matrix in matrices if matrix.inputs == queries and matrix.outputs == WIDTH]
        if not writing:
            raise ModelError("it has no attention that writes the stream through one matrix")
        out = writing[-1]  # if all are square, the last one
        rest = [matrix for matrix in matrices if matrix is not out]
        allowed = grouped if self._kv_key() else each
        odd = next((matrix for matrix in rest if matrix.inputs != WIDTH or matrix.outputs not in allowed), None)
        if odd is not None:
            name = f"{self._layers_name}.0.{odd.name}"
            raise ModelError(f"'{name}' is {odd.inputs} by {odd.outputs}, neither queries, keys, values nor a feed-forward network")
        if not rest:
            raise ModelError("it has no attention")
        return out, rest

    def _enclosing(self, matrices: Sequence[_Matrix]) -> str:
        """Returns the innermost module of a layer that contains all of the matrices; empty if that is the layer itself."""
        paths = [matrix.name.split(".")[:-1] for matrix in matrices]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared)

    def _mlp_parts(self) -> list[str]:
        """Returns the modules of a feed-forward network that is not a single module."""
        return [*(matrix.name for matrix in self._up), self._down.name]

    def _stream_norms(self, attention: str, mlp: str) -> list[str]:
        inner = tuple(f"{part}." for part in (attention, mlp) if part)
        return [
            name
            for name, module in self._layer.named_modules()
            if (weight := own_parameters(module).get("weight")) is not None and weight.shape == (WIDTH,) and not name.startswith(inner)
        ]

    def _final_norm(self) -> str:
        """Returns the last norm outside the layers, or an empty string without one."""
        called: list[str] = []
        inside = (f"{self._layers_name}.",)
        outer = {
            name: module
            for name, module in self._model.named_modules()
            if (weight := own_parameters(module).get("weight")) is not None and weight.shape == (WIDTH,) and not name.startswith(inside)
        }
        handles = [module.register_forward_hook(lambda *_, name=name: called.append(name)) for name, module in outer.items()]
        try:
            self._logits()
        finally:
            for handle in handles:
                handle.remove()
        return called[-1] if called else ""

    def _kv_key(self) -> str:
        return next((key for key in KV_KEYS if key in self._known), "")

    def _ffn_key(self) -> str:
        """Returns the config key of the feed-forward width; empty if the width is computed from the hidden size."""
        if self._ffn != FFN:
            return ""
        return next(key for key in FFN_KEYS if key in self._known)

    # What does what.

    @torch.no_grad()
    def _logits(self) -> Tensor:
        return self._model(input_ids=_tokens(), use_cache=False).logits

    @torch.no_grad()
    def _is_causal(self) -> bool:
        changed = _tokens()
        changed[:, -1] = 90
        first, second = self._logits(), self._model(input_ids=changed, use_cache=False).logits
        return torch.allclose(first[:, :-1], second[:, :-1], atol=1e-5) and not torch.equal(first, second)

    @contextmanager
    def _silent(self, matrix: _Matrix) -> Iterator[None]:
        """Sets the output of a matrix of the first layer to zero inside the block."""
        parameters = list(self._layer.get_submodule(matrix.name).parameters(recurse=False))
        before = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.zero_()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()
    def _serves(self, norm: str) -> str:
        """Returns the only part that a norm serves (changing the norm has no effect while that part is silent), or an empty string."""
        weight: Any = self._layer.get_submodule(norm).weight
        found: list[str] = []
        for part, matrix in (("attention", self._out), ("mlp", self._down)):
            with self._silent(matrix):
                before, kept = self._logits(), weight.clone()
                weight.add_(torch.linspace(-1.0, 1.0, WIDTH))
                same = torch.equal(before, self._logits())
                weight.copy_(kept)
            if same:
                found.append(part)
        return found[0] if len(found) == 1 else ""

    def _norm_kind(self, norms: Mapping[str, str]) -> str:
        """Returns ``layer`` for norms that subtract the mean of the channels, else ``rms``."""
        rows = torch.linspace(-1.0, 2.0, WIDTH).square()[None]
        for name in norms:
            module = self._layer.get_submodule(name)
            with torch.no_grad():
                return "layer" if torch.allclose(module(rows), module(rows + 1.0), atol=1e-4) else "rms"
        return "layer"  # norms without weights are layer norms

    def _unreplaceable(self, attention: str, mlp: str) -> list[dict[str, Any]]:
        """Returns the parts that our stand-ins cannot replace, because a silent part returns something else than its stand-in."""
        found: list[dict[str, Any]] = []
        for part, name, matrix in (("attention", attention, self._out), ("mlp", mlp, self._down)):
            with self._silent(matrix):
                inputs, output = self._seen(name, self._layer)
            written = _written(part, inputs, output)
            if written is None or bool(written.any()):
                found.append(_fixed(part, f"what its {name} returns is not what can stand in its place"))
        return found

    def _seen(self, name: str, layer: nn.Module) -> tuple[tuple[Any, ...], Any]:
        """Returns the positional inputs and the output of a module of a layer."""
        notes: list[tuple[tuple[Any, ...], Any]] = []
        note: Callable[..., None] = lambda _module, inputs, output: notes.append((inputs, output))  # noqa: E731
        handle = (layer.get_submodule(name) if name else layer).register_forward_hook(note)
        try:
            self._logits()
        finally:
            handle.remove()
        return notes[-1]

    def _unscalable(self) -> list[dict[str, Any]]:
        """Returns refusals for heads, if the family's classes do not accept other numbers of heads."""
        width = WIDTH if self._head_dim == OWN_HEAD_DIM else OTHER_HEADS * HEAD_DIM
        if _small(self._type, self._known, self._asked_head_dim, (OTHER_HEADS, OTHER_KV_HEADS), width) is None:
            return [_fixed(kind, "its classes do not take every number of heads") for kind in ("heads", "query_heads")]
        if self._head_dim == OWN_HEAD_DIM:
            return []
        writers = {matrix.name.rpartition(".")[2] for matrix in (self._out, self._down)}
        readers = [name for name, module in self._model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        own = {f"{self._layers_name}.{index}.{m.name}" for index in range(LAYERS) for m in (self._out, self._down)}
        clash = next((name for name in readers if name not in own and name.rpartition(".")[2] in writers), None)
        if clash is None:
            return []
        return [_fixed(kind, f"'{clash}' has the name of a matrix that writes the stream") for kind in ("heads", "query_heads")]


def _written(part: str, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
    """Returns the tensor that a part writes, if the part returns it in the form of our stand-in, else None."""
    if part == "attention":
        found = output[0] if isinstance(output, tuple) and len(output) == 2 else None
    else:
        found = output if len(inputs) == 1 else None
    return found if isinstance(found, Tensor) else None


def _fixed(kind: str, why: str) -> dict[str, Any]:
    return {"kind": kind, "when": {}, "why": why}


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS}
    if not lists:
        raise ModelError("it has no list of layers")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return name, lists[name]


def _name_of(model: PreTrainedModel, wanted: nn.Module | None, what: str) -> str:
    name = next((name for name, module in model.named_modules() if module is wanted), None)
    if wanted is None or name is None:
        raise ModelError(f"it has no {what}")
    return name
