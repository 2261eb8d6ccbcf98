"""What works for which family, measured: the tests assert it, and ``docs/families.md`` is written from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedModel

from conftest import FAMILIES, MORE_FAMILIES, random_model
from families_grid import table
from regraft.groups.discover import discover, refusals
from regraft.models.view import ModelView, parameter_count
from regraft.plans import Cut, GroupKind, Groups, PrunePlan
from regraft.surgery.cut import cut, parameters_after
from zeroing import Gone, zeroed

ALL = sorted(FAMILIES | MORE_FAMILIES)
KINDS: tuple[GroupKind, ...] = ("heads", "query_heads", "ffn", "residual", "attention", "mlp", "layer")
WIDTH = 48
# The removed channels of each of three layers.
GONE_CHANNELS = {0: range(1, 64, 2), 2: (5, 17, 40)}
GONE_STREAM = (0, 3, 7, 20, 31, 32, 40, 47)
GROUPED = ("llama", "mistral", "qwen", "gemma", "phi3", "olmo2", "stablelm", "starcoder2", "falcon-grouped")


def shape_of(family: str) -> tuple[int, int]:
    """Returns key-value heads and query heads of each, as the configs in conftest have them."""
    if family in ("falcon", "gpt_bigcode"):
        return 1, 6
    return (3, 2) if family.startswith(GROUPED) else (6, 1)


def gone_for(family: str, mode: str) -> Gone:
    groups, repeats = shape_of(family)
    heads = {0: (1,), 1: (0, 2)} if groups == 3 else {0: (1, 4), 1: (0,), 2: (2, 3, 5)} if groups == 6 else {}
    queries = {0: (1,), 2: (0,)} if repeats == 2 else {0: (1, 4), 2: (0, 5)}
    return {
        "heads": Gone(heads=heads),
        "query_heads": Gone(query_heads=queries),
        "ffn": Gone(ffn=GONE_CHANNELS),
        "residual": Gone(residual=GONE_STREAM),
        "attention": Gone(attention=(0, 2)),
        "mlp": Gone(mlp=(1,)),
        "layer": Gone(layers=(1,)),
        "together": Gone(
            heads={k: v for k, v in heads.items() if k == 0},
            query_heads={0: queries[0]} if repeats > 1 else {},
            ffn={2: GONE_CHANNELS[2]},
            residual=GONE_STREAM,
            attention=(2,),
            layers=(1,),
        ),
    }[mode]


def cuts_for(groups: Groups, family: str, mode: str) -> tuple[Cut, ...]:
    """The plan that says the same as :func:`gone_for`, in the words of groups."""
    gone, named = gone_for(family, mode), groups.named()
    found: list[Cut] = []
    for kind, lost in (("heads", gone.heads), ("query_heads", gone.query_heads), ("ffn", gone.ffn)):
        for layer, units in lost.items():
            group = named[f"layers.{layer}.{kind}"]
            found.append(Cut(group.name, tuple(unit for unit in range(group.units) if unit not in units)))
    if gone.residual:
        found.append(Cut("residual", tuple(channel for channel in range(WIDTH) if channel not in gone.residual)))
    for kind, layers in (("attention", gone.attention), ("mlp", gone.mlp), ("layer", gone.layers)):
        found += [Cut(f"layers.{layer}.{kind}", ()) for layer in layers]
    return tuple(found)


@cache
def subject(family: str) -> tuple[PreTrainedModel, Groups]:
    """A model, never changed, and its groups of every kind."""
    torch.manual_seed(0)
    model = random_model(family)
    return model, discover(model, KINDS)


def plan_for(groups: Groups, cuts: tuple[Cut, ...]) -> PrunePlan:
    return PrunePlan(groups.fingerprint, "planted", "planted", "per-layer", 0.1, 1, groups.parameters, groups.parameters, cuts)


MODES = ("heads", "query_heads", "ffn", "residual", "attention", "mlp", "layer", "together")


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


@dataclass(frozen=True)
class Verdict:
    """What came of cutting a family in one mode.

    Attributes:
        missing: Why it was not cut; empty where it was.
        error: Largest difference of the logits to those of the zeroed model.
        effect: Largest difference that zeroing makes at all.
        miscounted: Parameters of the pruned model beyond what was announced.
        stock: Whether the result is of the family's own class.
    """

    missing: str
    error: float = 0.0
    effect: float = 0.0
    miscounted: int = 0
    stock: bool = False


@cache
def verdict(family: str, mode: str) -> Verdict:
    """Cuts a random model of a family in one mode, and compares it with the same channels silenced."""
    model, groups = subject(family)
    kinds: tuple[GroupKind, ...] = tuple(kind for kind in KINDS if kind == mode)
    if mode == "together":
        kinds = ("heads", "ffn", "residual", "attention", "layer")
    for kind in kinds:
        if kind == "query_heads" and not groups.of(kind):
            return Verdict("every query head has keys and values of its own: see heads")
        if not groups.of(kind):
            return Verdict("; ".join(dict.fromkeys(refusal.reason for refusal in refusals(model) if refusal.kind == kind)))
        if mode == kind == "heads" and groups.of(kind)[0].units == 1:
            return Verdict("all query heads share one key-value head: see query heads")
    cuts = cuts_for(groups, family, mode)
    pruned = cut(model, groups, plan_for(groups, cuts))
    number, repeats = shape_of(family)
    with zeroed(model, family, gone_for(family, mode), groups=number, repeats=repeats, dim=8):
        want = logits(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    announced = parameters_after(shapes, groups, cuts)
    if mode != "together":
        units = groups.named()
        assert announced == groups.parameters - sum((units[c.group].units - len(c.kept)) * units[c.group].unit_parameters for c in cuts)
    return Verdict(
        missing="",
        error=float((logits(pruned) - want).abs().max()),
        effect=float((logits(model) - want).abs().max()),
        miscounted=parameter_count(pruned) - announced,
        stock=type(pruned) is type(model),
    )


def even_cut(family: str, kind: GroupKind) -> PreTrainedModel:
    """Cuts a quarter of one kind everywhere, or one whole layer."""
    model, groups = subject(family)
    chosen = [group for group in groups.of(kind) if kind != "layer" or group.layer == 1]
    cuts = tuple(Cut(group.name, tuple(range(group.units - max(1, group.units // 4)))) for group in chosen)
    return cut(model, groups, plan_for(groups, cuts))


COLUMNS: dict[str, str] = {
    "heads": "heads (with their key-value group)",
    "query_heads": "query heads (evenly from each group)",
    "ffn": "FFN channels",
    "residual": "residual width",
    "attention": "attention alone",
    "mlp": "FFN alone",
    "layer": "whole layers",
}
TITLES = {
    "llama": "Llama", "llama-bias": "Llama with biases", "mistral": "Mistral", "mistral-window": "Mistral, sliding window",
    "qwen2": "Qwen 2", "qwen3": "Qwen 3", "gemma2": "Gemma 2", "gemma3": "Gemma 3 (text)", "phi3": "Phi-3", "olmo2": "OLMo 2",
    "gpt2": "GPT-2", "gpt_neo": "GPT-Neo", "gpt_bigcode": "GPT-BigCode (StarCoder)", "gpt_bigcode-heads": "GPT-BigCode, not multi-query",
    "gpt_neox": "GPT-NeoX (Pythia)", "gpt_neox-sequential": "GPT-NeoX, not parallel", "opt": "OPT",
    "opt-350m": "OPT, as 350m", "bloom": "BLOOM", "falcon": "Falcon, as 7B", "falcon-grouped": "Falcon, as 40B",
    "falcon-alibi": "Falcon, as RW", "starcoder2": "StarCoder2", "stablelm": "StableLM", "stablelm-parallel": "StableLM, parallel",
}  # fmt: skip


def page() -> str:
    """Returns ``docs/families.md``."""
    notes: dict[str, int] = {}
    rows: list[str] = []
    for family in TITLES:
        cells: list[str] = []
        for mode in COLUMNS:
            found = verdict(family, mode)
            if found.missing:
                cells.append(f"no [{notes.setdefault(_note(found.missing), len(notes) + 1)}]")
            elif mode in ("attention", "mlp"):
                cells.append("own")
            else:
                cells.append("stock" if type(even_cut(family, mode)) is type(subject(family)[0]) else "own")
        way = ModelView(subject(family)[0]).family.discovery
        rows.append(f"| {TITLES[family]} | {way} | " + " | ".join(cells) + " |")
    return (
        TEXT.format(
            head=" | ".join(COLUMNS.values()),
            line="---|" * (len(COLUMNS) + 2),
            rows="\n".join(rows),
            notes="\n".join(f"{number}. {note[0].upper()}{note[1:]}." for note, number in notes.items()),
            grid=table(),
        )
        + "\n"
    )


def _note(reason: str) -> str:
    """Leaves out the names of nodes, which are no reader's concern."""
    return reason.partition(" (node")[0] + reason.partition(" (node")[2].partition(")")[2] if " (node" in reason else reason


TEXT = """# Families

Written by `scripts/make_families.py` from what `tests/conformance/test_families.py` measures on random models; do not edit by hand.

**stock**: cut by the same amount in every layer, the model stays of its family's own class, which every library loads. **own**: it
becomes regraft's class, on the stock layers; its code travels in the folder (`trust_remote_code=True`, or `import regraft`). Uneven
widths give regraft's class in every family. In every cell with either word, the pruned model gives the logits of the dense one with the
removed channels silenced, to 1e-5 in float32, is saved, loaded and pruned again, and all modes hold together.

| family | groups are | {head} |
|{line}
{rows}

{notes}

## What is cut

- **Heads**: a key-value head with all query heads that share it; or one query head from each group, so that groups stay alike.
- **FFN channels**: a row of what writes them (gate and up) and the column that reads them.
- **Residual width**: a channel of the stream, in the embedding, every norm, every matrix that reads or writes it, and the head. RMS
  norms are rescaled so that the result is exact: weights by sqrt(N/n), epsilon by N/n, for n of N channels. Layer norms subtract the
  mean of all channels; regraft's class goes on counting those that are gone, so that this is exact too, and never a stock class.
- **Attention or FFN alone**: with the norms that serve it alone. **Whole layers**: the rest is renumbered, and every list in the config
  that has an entry for each layer is shortened.

## How groups are found

**declared**: `models/architectures/*.toml` says which modules belong together. **traced**: the computation is followed. `regraft`
exports the model with fake weights and one layer of each kind, gives each channel of each parameter a name, and carries the names
through every operator; what is added, multiplied or attended together lives or dies together. Both agree wherever a table exists. An
operator that mixes channels, or one that is not known, stops the walk with its name.

```python
from regraft.groups.traced import follow_channels

found = follow_channels(model)  # any causal language model, known or not
found.groups  # what can be cut exactly
found.refusals  # what cannot, and why
```

## Families without a table

A table says the names of a family's modules and of the sizes in its config, and whether it computes its head size from the hidden size.
Where there is none, `regraft` looks at a small random model of the family, which transformers builds from the config: the lengths of a
matrix's sides say what it reads and writes, and silencing a part says which norms serve it alone. Groups are traced as ever. Everything
but the residual width is cut in this way, in memory and layer by layer; `tests/conformance/test_inferred.py` shows it for Gemma, Granite,
Cohere, OLMo, OLMo 3, Phi, GLM 4, SmolLM 3, GPT-J, CodeGen, Persimmon, Nemotron, Helium, XGLM, Apertus and BitNet. Heads stay where a family
cannot have any number of them (CodeGen), and what a norm inside runs over stays too (the heads of OLMo 3, heads and channels of BitNet).
A target that cannot be cut beside others that can is left out, and the command says so. What is not causal, and what has neither a
feed-forward network nor experts beside its attention, is refused with what is in the way.

## Layers of several kinds

Hybrids have attention in some layers and a *mixer* in the others: linear attention, a short convolution, a state space model. A group of a
kind exists in the layers that have it. Mixers, with experts among them, stay as they are unless they are named, and everything beside them
is cut: the channels of feed-forward networks, heads of the layers with attention, whole layers. The config's lists and numbers of layers
(`layer_types`, `layers_block_type`, `no_rope_layers`, `mlp_only_layers`) follow the layers that are left, an interval that does not hold
any more (`full_attention_interval`) is dropped, indices (`attn_layer_indices`) are counted anew, and a width means what it says
(`block_auto_adjust_ff_dim` is false).

`tests/conformance/test_mixed_layers.py` shows, for each of these on a random model, that removing equals silencing to 1e-5, that text is
generated alike with and without cache, and that a fresh process loads what was saved:

| family | heads, query heads | FFN channels | attention alone, FFN alone | whole layers |
|---|---|---|---|---|
| Qwen 3.5 (`qwen3_5_text`), Qwen3-Next without experts | in layers with attention | yes | yes | yes |
| LFM2, LFM3; LFM2-MoE (its first, dense layers) | in layers with attention | yes | yes | yes |
| Granite 4 (`granitemoehybrid`), without experts | in layers with attention | of the shared MLP | yes | yes |
| Bamba | in layers with attention | yes | yes | yes |
| OLMo-Hybrid | no [4] | yes | no [5] | yes |
| Nemotron-H | in layers with attention | in layers with an MLP | no [6] | yes |
| Gemma 4 (`gemma4_text`) | query heads, alike in all layers [7] | yes, alike in all layers | no [7] | yes [8] |
| Gemma 3n (`gemma3n_text`) | query heads [7] | yes [9] | no [7] | yes [8] |
| Falcon-H1 (attention and Mamba-2 beside each other) | yes | yes | yes | yes |
| DeepSeek-V3, and other latent attention (MiniCPM3, GLM 4 MoE lite, Youtu) | no [10] | in dense layers | no [10] | yes |
| Granite SWA (a sink goes with its head), SmolLM3, Ministral 3, Arcee, Hunyuan dense, ERNIE 4.5 | yes | yes | yes | yes |

4. Its norms of queries and keys run over all heads.
5. A norm of one name serves the attention in some layers and the feed-forward network in others.
6. Its attention and its feed-forward network are layers of their own.
7. Its last layers use the keys and values of others, and heads of Gemma 4 have several sizes: `--targets query_heads` takes query heads
   evenly from each key-value head, which stays. Where layers have key-value heads of several numbers, these stay too. With
   `use_double_wide_mlp` channels stay.
8. With their slices of the per-layer embeddings. Layers whose keys and values others use stay, and so does the last one of Gemma 4.
9. Its config has a width for each layer, so that the class stays stock. Layers that keep few channels by mean and deviation of all
   (`activation_sparsity_pattern` above 0) stay.

10. What is latent serves all heads: the attention stays as it is.

`--targets mixer_heads` removes heads of Gated DeltaNet (Qwen 3.5, Qwen3-Next, OLMo-Hybrid) and of Mamba-2 where each group has a norm of
its own (Nemotron-H): a key head, or group, with all value heads that read its state. Scores, re-fit, selection and `--memory` are those of
other heads: scores look at what the heads write after their state has seen the text. `tests/conformance/test_mixer_heads.py` shows the same
three things as above. The same number in every layer keeps the stock class. Falcon-H1 without a norm in its mixers, as published, loses
value heads, evenly from each group, and the same number in every layer. Its mixers with a norm, and the Mamba-2 of Granite 4 and Bamba,
whose heads share one norm and whose number follows from the width, are refused by name.

Layers of Gemma 4 and Gemma 3n read embeddings of the tokens and shared keys and values beside the hidden states. In memory every batch
keeps its own; `--memory` takes these families with a criterion that reads weights alone (`l2`), and refuses a calibration text.

Looking at a family and tracing a model of real size take no weights: 2 to 9 s of processor time and less than 0.6 GB in all for Qwen3.5-4B,
LFM2-2.6B, Granite 4 tiny, Nemotron-H-4B, Ministral 3 8B and Gemma 4 E4B (`benchmarks/results/discovery_real_sizes.md`).

`benchmarks/all_families.py` tries every causal language model that transformers knows: heads and channels of a small random model are cut
and compared with zeros, or the line of the refusal is written down (`benchmarks/results/all_families.md`).

## Every command over these

`tests/conformance/test_families_grid.py` runs every command on a small model of each of these and asserts the mark: **yes**, or the words
of a refusal in one line, which leaves nothing behind. The first eight columns say what is cut, the others what runs on the uncut model.

{grid}

`--to hf-uniform` of a model whose layers were cut unevenly is refused for all of these: zeros do not fill up layers of several kinds, or
experts. By default LoRA leaves out the last matrix of a Mamba mixer, which a kernel reads by itself.

## Experts

`--targets experts` removes whole experts of a mixture, the same number in every layer, with their rows of the router. Those with the
lowest mean product of router weight and norm of the output go (REAP). `tests/unit/pipelines/prune/test_experts.py` shows for Qwen3-MoE,
Mixtral, OLMoE, gpt-oss and Granite MoE that what is left computes as the whole does when its router never chooses the others. Fewer experts
than each token is sent to are refused. Heads, attention and layers are cut as elsewhere; OLMoE's heads, whose norms run over all of them,
stay; sinks of gpt-oss go with their heads.

`--targets expert_ffn` removes channels of experts: the same number in every expert of a layer, and in each its own. The channels go that
write least for the tokens sent to their expert: the sum over tokens of (router weight x activation)^2, times the squared norm of the column
that reads the channel. Widths are multiples of 8, as torch multiplies all experts of a layer in one call, which takes no others.
The same test shows for the five families that removing equals silencing to 1e-5.

Both keep one number in all layers by default, so that the class stays stock. `--shape per-layer` keeps more where more is lost: the shares
of the layers' scores that are removed have the least sum. The result is of regraft's class, with the numbers in `per_layer_config`.
`--memory` holds the experts of one layer at a time and gives the same folder, byte for byte. Files that hold one expert a tensor are read
and written so.

## Towers

The language model of a multimodal checkpoint (`mistral3`, `gemma3`, `gemma4`, `qwen3_5`) is pruned by `regraft prune DIR --tower text`,
and saved as a model of its own or, with `--keep-rest`, inside the checkpoint. `tests/unit/models/test_towers.py` shows that both agree in
logits, and that no other tensor of the checkpoint changes. Layers that predict several tokens ahead (`mtp.`) are left out,
and a line says so.
"""
