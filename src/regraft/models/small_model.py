"""A small random model of any family, with sizes that differ from each other, and the experiments that are made on it.

transformers builds a model of any family from a config. Different numbers of heads, channels and of the stream show the positions of the
matrices and the meaning of their axes; a silent part and a changed norm show which norms serve only that part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from regraft.errors import ModelError
from regraft.models.quiet import quiet

HEADS, KV_HEADS, WIDTH, LAYERS, VOCABULARY = 8, 2, 128, 3, 97
OTHER_HEADS, OTHER_KV_HEADS = 6, 3  # head counts of a second model, to test whether single heads can be removed
HEAD_DIM = WIDTH // HEADS  # head size of families that compute it
OWN_HEAD_DIM = 2 * HEAD_DIM  # requested head size, to test whether a family accepts one
FFN, USUAL_FFN = 88, 4 * WIDTH
# Other names of Llama's num_key_value_heads and intermediate_size in configs.
KV_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "inner_dim")
FIRST_LAYERS_KEYS = ("max_window_layers",)  # numbers of layers, counted from the first, that something holds for
TOKENS = 12
# A decoder of these sizes has a few hundred thousand parameters; a far larger model has parts with other sizes.
MOST_PARAMETERS = 20_000_000


@dataclass(frozen=True)
class SmallModel:
    """A small model of a family, with what was asked of it.

    Attributes:
        model_type: Model type in the Hugging Face config.
        known: Keys of the config.
        head_dim: Requested head size; None if it was left to the family.
        model: A model of the sizes above, in evaluation mode.
        layers_name: Name of the list of layers.
        layers: The layers.
    """

    model_type: str
    known: frozenset[str]
    head_dim: int | None
    model: PreTrainedModel
    layers_name: str
    layers: nn.ModuleList

    @property
    def layer(self) -> nn.Module:
        """The first layer, which stands for all."""
        return self.layers[0]


def small_model(
    model_type: str, known: frozenset[str], head_dim: int | None, heads: tuple[int, int] = (HEADS, KV_HEADS), width: int = WIDTH
) -> SmallModel | None:
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
    return SmallModel(model_type, known, head_dim, model, *_layers(model))


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


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS}
    if not lists:
        raise ModelError("it has no list of layers")
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return name, lists[name]


def _tokens() -> Tensor:
    return torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)


@torch.no_grad()
def logits_of(small: SmallModel) -> Tensor:
    """Returns the logits of the same tokens every time, float32 (2, 12, vocabulary)."""
    return small.model(input_ids=_tokens(), use_cache=False).logits


@torch.no_grad()
def is_causal(small: SmallModel) -> bool:
    """Returns whether another last token changes the predictions at that token, and at no token before it."""
    changed = _tokens()
    changed[:, -1] = 90
    first, second = logits_of(small), small.model(input_ids=changed, use_cache=False).logits
    return torch.allclose(first[:, :-1], second[:, :-1], atol=1e-5) and not torch.equal(first, second)


def seen_at(small: SmallModel, name: str) -> tuple[tuple[Any, ...], Any]:
    """Returns the positional inputs and the output of a module of the first layer; an empty name is the layer itself."""
    notes: list[tuple[tuple[Any, ...], Any]] = []
    note: Callable[..., None] = lambda _module, inputs, output: notes.append((inputs, output))  # noqa: E731
    handle = small.layer.get_submodule(name).register_forward_hook(note)
    try:
        logits_of(small)
    finally:
        handle.remove()
    return notes[-1]


def called_last(small: SmallModel, names: Collection[str]) -> str:
    """Returns the module of the model, out of some, that is called last; empty if none is called."""
    called: list[str] = []
    handles = [small.model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name)) for name in names]
    try:
        logits_of(small)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else ""


@contextmanager
def silent(small: SmallModel, matrix: str) -> Iterator[None]:
    """Sets the output of a matrix of the first layer to zero inside the block."""
    parameters = list(small.layer.get_submodule(matrix).parameters(recurse=False))
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
def part_served(small: SmallModel, norm: str, writers: Mapping[str, str]) -> str:
    """Returns the only part that a norm serves: changing the norm has no effect while that part is silent.

    Args:
        small: The model.
        norm: Name of the norm within a layer.
        writers: Part to the matrix with which it writes the stream.

    Returns:
        A key of ``writers``, or an empty string if the norm serves none or several.
    """
    weight: Any = small.layer.get_submodule(norm).weight
    found: list[str] = []
    for part, matrix in writers.items():
        with silent(small, matrix):
            before, kept = logits_of(small), weight.clone()
            weight.add_(torch.linspace(-1.0, 1.0, WIDTH))
            same = torch.equal(before, logits_of(small))
            weight.copy_(kept)
        if same:
            found.append(part)
    return found[0] if len(found) == 1 else ""


@torch.no_grad()
def subtracts_mean(small: SmallModel, norm: str) -> bool:
    """Returns whether a norm subtracts the mean of the channels, as layer norms do."""
    rows = torch.linspace(-1.0, 2.0, WIDTH).square()[None]
    module = small.layer.get_submodule(norm)
    return torch.allclose(module(rows), module(rows + 1.0), atol=1e-4)
