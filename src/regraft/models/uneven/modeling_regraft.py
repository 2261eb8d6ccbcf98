"""Models whose layers differ, on the stock layers of transformers.

This file travels with every unevenly pruned model, so it needs nothing but torch, transformers and its neighbours
``configuration_regraft.py`` and ``factored_regraft.py``. A model is built as its family builds it; then each layer is built again from
its own config. The mathematics of a layer is therefore the stock class's own, whatever version of transformers is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_regraft import CHOSEN_FOR_ALL, UnevenConfig, config_named
from .factored_regraft import PLAIN, fit_factors


class NoAttn(nn.Module):
    """Stands where attention was removed: adds nothing to the residual, but counts the tokens that went by.

    transformers asks the first layer's KV cache how many tokens it has seen. One channel of one head is enough to answer.
    (The name avoids the word that transformers looks for in this file to tell whether the attention kernel can be changed.)

    Args:
        layer_idx: Index of the layer.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, *residual: Tensor, past_key_values: Any = None, layer_past: Any = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Returns zeros.

        Args:
            hidden_states: (batch, tokens, hidden).
            residual: What is returned instead of zeros, in families whose attention adds the residual itself.
            past_key_values: The KV cache, or None.
            layer_past: The same, as some families name it.
            unused: Whatever else a layer hands to its attention.
        """
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            heads, channels = self._cached_shape(cache)
            batch, tokens = hidden_states.shape[:2]
            nothing = hidden_states.new_zeros(batch, heads, tokens, channels)
            cache.update(nothing, nothing, self.layer_idx)
        return residual[0] if residual else torch.zeros_like(hidden_states), None

    def _cached_shape(self, cache: Any) -> tuple[int, int]:
        """Returns heads and channels: a cache that was allocated beforehand expects what the config says."""
        layers = getattr(cache, "layers", ())
        if self.layer_idx < len(layers):
            keys = getattr(layers[self.layer_idx], "keys", None)
            if keys is not None and keys.dim() == 4:
                return keys.shape[1], keys.shape[3]
        return 1, 1


class NoMlp(nn.Module):
    """Stands where the feed-forward network was removed: adds nothing to the residual."""

    def forward(self, hidden_states: Tensor, *residual: Tensor) -> Tensor:
        """Returns zeros of the shape of ``hidden_states``, (batch, tokens, hidden), or the residual where it is handed in."""
        return residual[0] if residual else torch.zeros_like(hidden_states)


class StreamNorm(nn.Module):
    """Layer norm over a stream of which channels were removed: they still count, as the zeros that they stand for.

    Args:
        norm: The layer norm that it takes the place of, over the channels that are left.
        channels: How many there were.
    """

    def __init__(self, norm: nn.LayerNorm, channels: int) -> None:
        super().__init__()
        self.channels, self.eps = channels, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last axis, in float32 at least."""
        x = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        mean = x.sum(-1, keepdim=True) / self.channels
        centred = x - mean
        gone = self.channels - x.shape[-1]
        variance = (centred.square().sum(-1, keepdim=True) + gone * mean.square()) / self.channels
        normal = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            normal = normal * self.weight
        if self.bias is not None:
            normal = normal + self.bias
        return normal.to(hidden_states.dtype)


def fit_layers(model: PreTrainedModel, config: UnevenConfig) -> None:
    """Gives a model that was built from an even config the layers of an uneven one.

    Args:
        model: Model whose base model has its layers where the layout says.
        config: What it is to become.
    """
    # Chosen while the even model was built, on its own copy of the config.
    config.__dict__.update((name, getattr(model.config, name)) for name in CHOSEN_FOR_ALL if hasattr(model.config, name))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config = config  # pyright: ignore[reportAttributeAccessIssue]
    base: Any = model.base_model
    layers: Any = base.get_submodule(config.laid_out("layers"))
    for index in range(len(layers)):
        layer_config: Any = config.layer(index)
        before = layers[index]
        layers[index] = layer = made_again(before, layer_config, index)
        _hand_on_buffers(before, layer)
        _size_mlp(layer, layer_config)
        if "attention" in layer_config.skip:
            _replace(layer, (config.laid_out("attention"),), lambda index=index: NoAttn(index))
            _replace(layer, config.laid_out("attention_norms"), nn.Identity)
        elif getattr(layer_config, "alibi_heads", None):
            _keep_slopes(layer.get_submodule(config.laid_out("attention")), layer_config.alibi_heads, config.alibi_of)
        if "mlp" in layer_config.skip:
            *inner, last = config.laid_out("mlp")
            _replace(layer, inner, nn.Identity)
            _replace(layer, (last,), NoMlp)
            _replace(layer, config.laid_out("mlp_norms"), nn.Identity)
    if getattr(config, "alibi_of", None):
        base.num_heads = config.alibi_of
    _set_width(model, config)
    fit_factors(base, getattr(config, "factored", None) or {}, getattr(config, "factor_layout", None) or PLAIN)
    model.post_init()


def made_again(layer: nn.Module, config: Any, index: int) -> nn.Module:
    """Returns a layer of the same class for another config; some families give the layer's type beside its number.

    Args:
        layer: The layer.
        config: What the new one is made from.
        index: Number of the layer.
    """
    kind: Any = type(layer)
    typed = "layer_type" in inspect.signature(kind.__init__).parameters
    return kind(config, index, config.layer_types[index]) if typed else kind(config, index)


def _hand_on_buffers(before: nn.Module, layer: nn.Module) -> None:
    """Gives a layer the buffers that the model puts into its layers after it made them."""
    for name, module in before.named_modules():
        new = layer.get_submodule(name)
        for key, buffer in module._buffers.items():
            if key not in new._buffers:
                new.register_buffer(key, buffer, persistent=key not in module._non_persistent_buffers_set)


def _replace(layer: nn.Module, names: Sequence[str], make: Any) -> None:
    for name in names:
        if name in layer._modules:
            setattr(layer, name, make())


def _size_mlp(layer: nn.Module, config: Any) -> None:
    """Sets the feed-forward width where the family computes it from the hidden size."""
    whole: UnevenConfig = config.whole_config
    if whole.laid_out("mlp_size") != "derived":
        return
    for name in whole.laid_out("mlp"):
        for inner, module in layer.get_submodule(name).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                _resize_matrix(module, config.intermediate_size, reads=inner.rpartition(".")[2] in whole.laid_out("writers"))


def _set_width(model: nn.Module, config: UnevenConfig) -> None:
    """Gives everything that reads or writes the residual stream its width, where that is not what the family computes.

    Args:
        model: Built with a hidden size that is that of all heads together.
        config: The model's config.
    """
    derived = config.laid_out("head_size") == "derived"
    total = getattr(config, "norm_width", None)
    within = tuple(f".{part}." for part in (config.laid_out("attention"), *config.laid_out("mlp")))
    width: int = config.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in config.laid_out("apart"):
            continue
        if derived and isinstance(module, nn.Linear | Conv1D):
            _resize_matrix(module, width, reads=last not in config.laid_out("writers"))
        elif derived and isinstance(module, nn.Embedding):
            module.embedding_dim = width
            module.weight = _empty(module.weight, (module.weight.shape[0], width))
        elif _is_norm(module) and not any(part in name for part in within):
            if derived:
                _resize_norm(module, width)
            if total and isinstance(module, nn.LayerNorm):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, last, StreamNorm(module, total))


def _resize_matrix(module: nn.Linear | Conv1D, size: int, *, reads: bool) -> None:
    """Changes the number of inputs (``reads``) or outputs of a matrix; its values are left to be loaded or initialised."""
    outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    outputs, inputs = (outputs, size) if reads else (size, inputs)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
        module.weight = _empty(module.weight, (outputs, inputs))
    else:
        module.nx, module.nf = inputs, outputs
        module.weight = _empty(module.weight, (inputs, outputs))
    if module.bias is not None:
        module.bias = _empty(module.bias, (outputs,))


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, nn.LayerNorm) or (weight is not None and weight.dim() == 1)


def _resize_norm(module: nn.Module, width: int) -> None:
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (width,)
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            setattr(module, name, _empty(parameter, (width,)))


def _empty(parameter: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.shape == shape:
        return parameter
    return nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))


def _keep_slopes(attention: nn.Module, heads: Sequence[int], total: int) -> None:
    """Hands an attention only the position slopes (ALiBi) of the heads that it still has.

    Args:
        attention: Whose heads were cut.
        heads: Which of the model's first heads they were.
        total: How many heads that model had.
    """
    kept = tuple(heads)

    def chosen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        index = torch.tensor(kept, device=value.device)
        if value.dim() == 4 and value.shape[1] == total:
            return value.index_select(1, index)
        if value.dim() == 3 and value.shape[0] % total == 0:
            return value.unflatten(0, (-1, total)).index_select(1, index).flatten(0, 1)
        return value

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {key: chosen(value) if key in ("alibi", "attention_mask") else value for key, value in kwargs.items()}

    attention.register_forward_pre_hook(before, with_kwargs=True)


class Uneven:
    """Builds a model of a family with the layers that an uneven config describes; mixed in before the family's own class."""

    def __init__(self, config: UnevenConfig) -> None:
        super().__init__(config.even())  # pyright: ignore[reportCallIssue]
        fit_layers(self, config)  # pyright: ignore[reportArgumentType]

    def initialize_weights(self) -> None:
        """Gives what a checkpoint does not hold its first value.

        transformers leaves out modules without tensors of their own where a class is not its own. Some families set buffers of their
        layers there.
        """
        super().initialize_weights()  # pyright: ignore[reportAttributeAccessIssue]
        for module in self.modules():  # pyright: ignore[reportAttributeAccessIssue]
            if not (module._parameters or module._buffers):
                self._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]


def model_named(name: str) -> Any:
    """Returns ``Regraft<Family>Model`` or ``Regraft<Family>ForCausalLM``, made when it is first asked for.

    Raises:
        AttributeError: transformers has no such family.
    """
    for ending, auto_class, mapping in (
        ("ForCausalLM", "AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING),
        ("Model", "AutoModel", MODEL_MAPPING),
    ):
        stem = name.removeprefix("Regraft").removesuffix(ending)
        stock: Any = getattr(transformers, f"{stem}Config", None)
        if name == f"Regraft{stem}{ending}" and stock is not None and stock in mapping:
            return _made(name, stem, auto_class, mapping[stock])
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


@cache
def _made(name: str, stem: str, auto_class: str, base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # `_auto_class` makes `save_pretrained` copy this file and its neighbour into the folder.
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "config_class": config_named(f"Regraft{stem}Config"),
        "_auto_class": auto_class,
        # transformers looks for experts in the file of a class; those of the layers are in the family's.
        "_can_set_experts_implementation": classmethod(lambda cls: base._can_set_experts_implementation()),
    }
    return type(name, (Uneven, base), body)


def model_classes(config: type[UnevenConfig]) -> tuple[Any, Any]:
    """Returns the base model and the causal language model of a config class."""
    stem = config.__name__.removesuffix("Config")
    return model_named(f"{stem}Model"), model_named(f"{stem}ForCausalLM")


__getattr__ = model_named
