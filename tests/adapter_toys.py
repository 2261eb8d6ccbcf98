"""A model with one module of each kind that adapters know, and every adapter in every form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from regraft.adapters import ADAPTERS, Evidence, Method
from regraft.settings import RecoverSettings
from regraft.surgery.adapters import Injected, inject

VOCABULARY, TOKENS = 40, 12


class ToyConfig(PreTrainedConfig):
    model_type = "toy"


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(24, 32)
        self.c_proj = Conv1D(20, 32)


class Toy(PreTrainedModel):
    """Embedding 40 x 24, Linear 24 to 32, Conv1D 32 to 20, head 20 to 40."""

    config_class = ToyConfig
    _no_split_modules = ()

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList([ToyLayer()])
        self.lm_head = nn.Linear(20, VOCABULARY, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: object) -> CausalLMOutput:
        layer = self.layers[0]
        hidden = layer.c_proj(torch.nn.functional.silu(layer.up_proj(self.embed_tokens(input_ids))))
        logits = self.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) if labels is not None else None
        return CausalLMOutput(loss=loss, logits=logits)


def toy(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Toy(ToyConfig())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.to(device=device, dtype=dtype).eval()


def batch(device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids.flip(1)}


def evidence(device: str = "cpu") -> Evidence:
    return Evidence(lambda count: [batch(device, seed) for seed in range(count)])


LAYERS = {"linear": "up_proj", "conv1d": "c_proj", "embedding": "embed_tokens"}


@dataclass(frozen=True)
class Form:
    """One adapter with options.

    Attributes:
        adapter: Its name.
        options: As the settings have them.
        layers: Kinds of modules that it can be put on.
        start: Largest entry of its change at first.
        exports: Whether it is a plain LoRA.
    """

    adapter: str
    options: tuple[str, ...] = ()
    layers: Sequence[str] = tuple(LAYERS)
    start: float = 0.0
    exports: bool = True

    @property
    def own(self) -> bool:
        return isinstance(ADAPTERS.get(self.adapter), Method)

    def settings(self, **more: object) -> RecoverSettings:
        values = {"adapter": self.adapter, "adapter_options": self.options, "rank": 4, "dropout": 0.0, "steps": 20}
        return RecoverSettings.model_validate(values | more)

    def put_on(self, model: Toy, *layers: str, seed: int = 3, device: str = "cpu", **more: object) -> Injected:
        targets = tuple(LAYERS[layer] for layer in layers)
        return inject(model, self.settings(targets=targets, **more), None, seed, evidence(device))


FORMS: dict[str, Form] = {
    "deep_lora": Form("deep_lora", start=1e-9),
    "deep_lora-frozen": Form("deep_lora", ("gamma=0", "depth=2", "epsilon=0.01"), start=1e-4),
    "deep_lora-narrow": Form("deep_lora", ("form=narrow",), start=1e-9),
    "deep_lora-full": Form("deep_lora", ("form=full",), start=1e-9, exports=False),
    "nola": Form("nola", ("bases=16",)),
    "nola-4bit": Form("nola", ("bases=70", "bits=4")),
    "lora_xs": Form("lora_xs", start=1e-3),
    "mora-sharing": Form("mora", ("form=sharing",)),
    "mora-rotation": Form("mora", exports=False),
    "lora": Form("lora"),
    "rslora": Form("rslora"),
    "dora": Form("dora", exports=False),
    "olora": Form("olora"),
    "pissa": Form("pissa"),
    "eva": Form("eva", ("batches=2",), layers=("linear", "conv1d")),
    "adalora": Form("adalora", layers=("linear", "conv1d")),
}


def scramble(injected: Injected, size: float = 0.4, seed: int = 7) -> None:
    """Adds random numbers to all that is trained, so that the change is no longer small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injected.module.parameters():
            if parameter.requires_grad:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter))


def logits(model: nn.Module, device: str = "cpu") -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(device)["input_ids"]).logits.float()
