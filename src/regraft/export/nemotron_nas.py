"""The export format ``nemotron-nas``: layers of different sizes as NVIDIA's Nemotron models have them (``DeciLMForCausalLM``).

A reader takes the number of query heads from the whole model, and for each layer the query heads of a key-value head
(``n_heads_in_group``), ``no_op`` for what was removed, and the feed-forward width as a multiple: the next multiple of 256 from
int(2 · ffn_mult · hidden / 3). Heads and widths are filled up with zeros to what this can say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from regraft.errors import InputError, OutputError
from regraft.export.contract import EXPORTERS, Holding, ModelFormat, Parity, Written
from regraft.export.gguf.catalogue import architectures_for
from regraft.export.hf import bits_of, refuse_gguf_settings, write_folder
from regraft.export.padding import padded
from regraft.export.parity import compare, our_log_probabilities, refuse_difference, sampled
from regraft.models.build import build, conform
from regraft.models.load import Loaded
from regraft.models.uneven import code_paths
from regraft.models.view import LayerSizes, ModelView
from regraft.models.weights import stored_tensors, weight_files
from regraft.settings import ExportSettings

CODE = "configuration_decilm.py"
MULTIPLE = 256  # of feed-forward channels
FAMILIES = ("llama", "mistral")
_KEPT = (
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def ffn_mult(width: int, hidden: int) -> float:
    """Returns the multiple from which every reader computes a width, a multiple of 256: it aims at the middle of the rounding.

    >>> round_up(int(2 * ffn_mult(14336, 4096) * 4096 / 3))
    14336
    """
    return round(3 * (width - MULTIPLE // 2) / (2 * hidden), 6)


def round_up(width: int) -> int:
    """Returns the next multiple of 256."""
    return -(-width // MULTIPLE) * MULTIPLE


def targets(sizes: Sequence[LayerSizes]) -> list[LayerSizes]:
    """Returns the sizes to which layers are filled up, with the fewest channels in all.

    All layers get the same number of query heads; the number of key-value heads of each layer divides it.
    """
    present = [size if size.query_heads else LayerSizes(1, 1, size.head_dim, size.ffn) for size in sizes]
    asked = [size for index, size in enumerate(present) if index == 0 or sizes[index].query_heads]
    most = max(size.query_heads for size in asked)

    def kv_heads(size: LayerSizes, heads: int) -> int:
        group = size.query_heads // size.kv_heads
        return next((kv for kv in range(size.kv_heads, heads + 1) if heads % kv == 0 and heads // kv >= group), 0)

    def cost(heads: int) -> int:
        counts = [kv_heads(size, heads) for size in asked]
        return sum(heads + count for count in counts) if all(counts) else 1 << 60

    heads = min(range(most, 4 * most + 1), key=cost)
    found: list[LayerSizes] = []
    for index, size in enumerate(sizes):
        gone = index > 0 and not size.query_heads
        kv = 0 if gone else kv_heads(present[index], heads)
        found.append(LayerSizes(0 if gone else heads, kv, size.head_dim, round_up(size.ffn)))
    return found


def config_of(model: PreTrainedModel, sizes: Sequence[LayerSizes]) -> dict[str, Any]:
    """Returns the contents of ``config.json``."""
    config: Any = model.config
    heads = next(size.query_heads for size in sizes if size.query_heads)
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    width = ModelView(model).width
    blocks = [
        {
            "attention": {
                "no_op": not size.query_heads,
                "n_heads_in_group": size.query_heads // size.kv_heads if size.kv_heads else None,
                "replace_with_linear": False,
            },
            "ffn": {
                "no_op": not size.ffn,
                "ffn_mult": ffn_mult(size.ffn, width) if size.ffn else None,
                "hidden_act": config.hidden_act,
                "replace_with_linear": False,
            },
        }
        for size in sizes
    ]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        **{key: value for key, value in config.to_dict().items() if key in _KEPT},
        "hidden_size": width,
        "num_hidden_layers": len(sizes),
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "head_dim": sizes[0].head_dim,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "block_configs": blocks,
    }


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that a reader of ``config.json`` gives the matrices of each layer, by its published rules.

    Raises:
        OutputError: A rule does not hold.
    """
    hidden, heads, head_dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    found: dict[str, tuple[int, ...]] = {}
    for index, block in enumerate(config["block_configs"]):
        place, attention, ffn = f"model.layers.{index}", block["attention"], block["ffn"]
        if attention["no_op"] and index == 0:
            raise OutputError(
                "readers of nemotron-nas take the cache's shape from layer 0, which has no attention here; export with `to=gguf`"
            )
        if not attention["no_op"]:
            if heads % attention["n_heads_in_group"]:
                raise OutputError(
                    f"layer {index}: groups of {attention['n_heads_in_group']} do not divide {heads} query heads; export with `to=hf`"
                )
            kv = heads // attention["n_heads_in_group"] * head_dim
            shapes = {"q": (heads * head_dim, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, heads * head_dim)}
            found |= {f"{place}.self_attn.{name}_proj.weight": shape for name, shape in shapes.items()}
            found[f"{place}.input_layernorm.weight"] = (hidden,)
        if not ffn["no_op"]:
            width = round_up(int(2 * ffn["ffn_mult"] * hidden / 3))
            shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
            found |= {f"{place}.mlp.{name}_proj.weight": shape for name, shape in shapes.items()}
            found[f"{place}.post_attention_layernorm.weight"] = (hidden,)
    return found


def refuse(loaded: Loaded, settings: ExportSettings) -> None:
    """Refuses families that the format's readers do not compute.

    Raises:
        InputError: The family is not Llama or Mistral, or has a sliding window.
    """
    refuse_gguf_settings(settings)
    family = ModelView(loaded.model).family.model_type
    if family not in FAMILIES:
        others = "`to=hf` or `to=gguf`" if architectures_for(family) else "`to=hf`"
        raise InputError(f"nemotron-nas computes a Llama ({', '.join(FAMILIES)}), not family '{family}'; export with {others}")
    window = getattr(loaded.model.config, "sliding_window", None)
    if window:
        raise InputError(f"nemotron-nas has no sliding window, this model one of {window} tokens; export with `to=hf`, or with `to=gguf`")


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Written:
    """Writes the folder."""
    model = conform(loaded.model)
    view = ModelView(model)
    sizes = [view.sizes(index) for index in range(len(view.layers))]
    wanted = targets(sizes)
    whole = padded(model, wanted)
    write_folder(whole, loaded, folder, settings)
    for path in code_paths():
        (folder / path.name).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(whole, wanted), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("nemotron_nas_config.py"), folder / CODE)
    filled = sum(before != after for before, after in zip(sizes, wanted, strict=True))
    notes = ("validated against the reader's published rules; vLLM, SGLang and TensorRT-LLM were not run",)
    if filled:
        notes = (f"{filled} of {len(sizes)} layers were filled up with zeros to sizes that the format can say", *notes)
    return Written("a nemotron-nas folder (DeciLMForCausalLM), for vLLM, SGLang and TensorRT-LLM", folder, notes)


def check(loaded: Loaded, folder: Path, written: Written, text: str, settings: ExportSettings) -> Parity:
    """Compares the stored shapes with the reader's rules, and a model that is made by these rules from the file with ours.

    Raises:
        OutputError: A shape is not what a reader expects, or the model computes something else.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = stored_tensors(folder)
    for name, shape in expected_shapes(config).items():
        if name not in stored or stored[name].shape != shape:
            there = list(stored[name].shape) if name in stored else "missing"
            raise OutputError(f"'{name}' is {there}, a reader of nemotron-nas expects {list(shape)}; export with `to=hf`")
    state = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    again = build(conform(loaded.model), read_sizes(config), state if "lm_head.weight" in state else _tied(state))
    ids, lengths = sampled(loaded.model, _ids(loaded, text), settings.check_positions)
    parity = compare(
        our_log_probabilities(loaded.model, ids, lengths),
        our_log_probabilities(again, ids, lengths),
        [ids[length] for length in lengths],
        "the reader's published rules (not run in vLLM)",
    )
    return refuse_difference(parity, bits_of(loaded.model.dtype))


def read_sizes(config: dict[str, Any]) -> list[LayerSizes]:
    """Returns the sizes of each layer, as a reader takes them from ``config.json``."""
    heads, found = config["num_attention_heads"], list[LayerSizes]()
    for block in config["block_configs"]:
        attention, ffn = block["attention"], block["ffn"]
        query = 0 if attention["no_op"] else heads
        width = 0 if ffn["no_op"] else round_up(int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3))
        found.append(LayerSizes(query, query // attention["n_heads_in_group"] if query else 0, config["head_dim"], width))
    return found


def _tied(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


def _ids(loaded: Loaded, text: str) -> list[int]:
    if loaded.tokenizer is None:
        embedding: Any = loaded.model.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        return [index * 7 % rows for index in range(256)]
    return list(loaded.tokenizer(text, verbose=False).input_ids)


FORMAT = ModelFormat(
    "layers of different sizes for the servers that load NVIDIA's Nemotron models",
    (
        Holding(
            "vLLM, SGLang, TensorRT-LLM, MLX, exllamav3: `DeciLMForCausalLM`",
            ", ".join(FAMILIES),
            "key-value heads (divisors of the query heads), feed-forward width (multiples of 256); attention, but of layer 0, or "
            "feed-forward network removed",
            "float32, bfloat16, float16",
            "speed where layers are filled up with zeros; trust_remote_code",
            "rules",
        ),
    ),
    refuse,
    write,
    check,
)
EXPORTERS.add("nemotron-nas", FORMAT)
