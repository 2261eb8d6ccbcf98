"""Private names of other packages that the house uses, in one place, each with a test that fails when the name goes.

Versions of these packages are pinned in ``constraints.txt``. Nothing is imported before it is used, so that ``import regraft`` stays
light. The classes in :mod:`regraft.models.uneven` that travel with a saved model cannot import this file and use three more names, which
are tested beside these.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.storages._heartbeat import BaseHeartbeat
    from optuna.trial import FrozenTrial
    from peft.tuners.adalora import RankAllocator
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

_RECOMPUTING = ("activation_checkpointing", "gradient_checkpointing")  # the new name and the old one

CONVERSIONS = "_weight_conversions"  # attribute of a model of transformers: how its tensors were renamed and stacked when it was loaded


def own_parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """Returns the parameters that a module itself holds, by name; writing into the mapping replaces them (PyTorch)."""
    return module._parameters


def own_buffers(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """Returns the buffers that a module itself holds, by name; writing into the mapping replaces them (PyTorch)."""
    return module._buffers


def fake_tensors() -> AbstractContextManager[Any]:
    """Returns a context in which new tensors have shapes and no values (PyTorch's ``FakeTensorMode``)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def train_on_one_gpu(arguments: TrainingArguments) -> None:
    """Keeps the Trainer of transformers from spreading each batch over all GPUs of a machine with DataParallel."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def recomputing() -> dict[str, Any]:
    """Returns the arguments of ``TrainingArguments`` that recompute activations in the backward pass (transformers renamed them)."""
    import dataclasses

    import transformers

    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    word = next(word for word in _RECOMPUTING if word in known)
    return {word: True, f"{word}_kwargs": {"use_reentrant": False}}


def stop_recomputing(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """Lets a model keep its activations again after a training that recomputed them."""
    for word in _RECOMPUTING:
        if getattr(arguments, word, False):
            return getattr(model, f"{word}_disable")()


def dequantized() -> dict[str, Any]:
    """Returns the argument of ``from_pretrained`` that gives the weights of a GGUF file as numbers; earlier transformers always do."""
    import transformers

    return {"quantization_config": transformers.GgufConfig(dequantize=True)} if "GgufConfig" in dir(transformers) else {}


def names_of_experts(model_type: str) -> frozenset[str]:
    """Returns the ends of names that PEFT takes for stacked experts in a family, also where such a module is a matrix of its own (PEFT)."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def attention_kernel(config: PreTrainedConfig) -> str | None:
    """Returns which implementation of attention a model of transformers runs, such as ``sdpa``."""
    return config._attn_implementation


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """Returns the channels (tokens, channels) that a stack of experts makes of gates and values, (tokens, 2 * channels) (transformers)."""
    return experts._apply_gate(gate_up)


def extra_configs(mapping: Any) -> dict[str, Any]:
    """Returns the config classes that were registered with ``AutoConfig`` beside transformers' own, by model type."""
    return mapping._extra_content


def put_extra_configs(mapping: Any, extra: dict[str, Any]) -> None:
    """Replaces the registered config classes of ``AutoConfig``."""
    mapping._extra_content = extra


def stock_configs(mapping: Any) -> dict[str, Any]:
    """Returns the names of transformers' own config classes by model type."""
    return mapping._mapping


def triplet_score(allocator: RankAllocator, name: str) -> Tensor:
    """Returns PEFT's importance of the entries of one AdaLoRA matrix: smoothed sensitivity times uncertainty, of the matrix's shape."""
    return allocator._element_score(name)


def storage_of(study: optuna.Study) -> BaseStorage:
    """Returns the storage that an Optuna study is kept in."""
    return study._storage


def trial_id(trial: FrozenTrial) -> int:
    """Returns the name of a trial in its Optuna storage, which is not its number in the study."""
    return trial._trial_id


def beat(storage: BaseStorage, trial: int) -> None:
    """Says in an Optuna storage that keeps heartbeats that a trial is being worked on."""
    cast("BaseHeartbeat", storage).record_heartbeat(trial)
