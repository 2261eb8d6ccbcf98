"""Models of given sizes: equal to the whole model with the rest zeroed, and of the class that a fresh process would load."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from regraft.errors import PlanError
from regraft.models.build import build, config_for, conform, declared_sizes
from regraft.models.view import LayerSizes, ModelView
from slicing import Kept, ids, sliced, zeroed

UNIFORM = [Kept((0, 2), range(1, 49, 2)), Kept((1, 2), range(24)), Kept((0, 1), range(40, 64))]
UNEVEN = [Kept((1,), range(0, 64, 3)), Kept((0, 1, 2), range(64)), Kept((0, 2), range(7, 50))]
REMOVED = [Kept((), range(0, 64, 3)), Kept((0, 2), ()), Kept((), ())]


@pytest.mark.parametrize("kept", [UNIFORM, UNEVEN, REMOVED], ids=["uniform", "uneven", "removed"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_whole_model_with_the_rest_zeroed(make_model, family, kept, tied):
    whole = make_model(family, tie_word_embeddings=tied)
    small = build(whole, *sliced(whole, kept))
    x = ids(whole)
    torch.testing.assert_close(small(x).logits, zeroed(whole, kept)(x).logits, atol=1e-5, rtol=0)
    assert (small(x).logits - whole(x).logits).abs().max() > 1e-2  # a test that the cut did something
    view = ModelView(small)
    assert [view.sizes(i) for i in range(3)] == sliced(whole, kept)[0] == list(declared_sizes(small.config))
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == tied


def test_equal_layers_become_the_stock_class(make_model, family):
    whole = make_model(family)
    small = build(whole, *sliced(whole, UNIFORM))
    assert type(small) is type(whole)
    assert small.config.model_type == whole.config.model_type
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (4, 2, 8)
    assert small.config.intermediate_size == 24


def test_unequal_layers_become_our_class(make_model, family):
    whole = make_model(family)
    small = build(whole, *sliced(whole, UNEVEN))
    assert type(small).__name__ == f"Regraft{type(whole).__name__}"
    overrides = small.config.to_dict()["per_layer_config"]
    assert set(overrides) <= {"0", "1", "2"}
    assert len(overrides) < 4
    assert list(small.config.auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


def test_an_uneven_model_can_be_cut_again_and_become_even(make_model, family):
    whole = make_model(family)
    once = build(whole, *sliced(whole, UNEVEN))
    state = sliced(whole, [Kept((1,), range(10))] * 3)[1]
    again = build(once, [LayerSizes(2, 1, 8, 10)] * 3, state)
    assert type(again) is type(whole)
    direct = build(whole, [LayerSizes(2, 1, 8, 10)] * 3, state)
    x = ids(whole)
    assert torch.equal(again(x).logits, direct(x).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [UNIFORM, UNEVEN], ids=["uniform", "uneven"])
def test_generation_with_and_without_cache_agrees(make_model, family, kept):
    whole = make_model(family)
    small = build(whole, *sliced(whole, kept))
    _assert_generates_alike(small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept",
    [REMOVED, [Kept((), range(64)), Kept((0, 1, 2), range(64)), Kept((), range(64))], [Kept((), ())] * 3],
    ids=["mixed", "no attention in the first", "nothing left"],
)
def test_generation_without_attention_in_the_first_layer(make_model, family, kept):
    whole = make_model(family)
    _assert_generates_alike(build(whole, *sliced(whole, kept)))


def _assert_generates_alike(model):
    x = ids(model, batch=2, tokens=5)
    mask = torch.ones_like(x)
    mask[1, :2] = 0  # left padding: positions and masks come from the cache's length
    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask}
    without = model.generate(x, use_cache=False, **settings)
    assert torch.equal(model.generate(x, use_cache=True, **settings), without)
    assert torch.equal(model.generate(x, cache_implementation="static", **settings), without)
    assert len(without[0].unique()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernel_stays_and_can_be_changed(make_model, family, kernel):
    other = {"eager": "sdpa", "sdpa": "eager"}[kernel]
    whole = make_model(family)
    whole.set_attn_implementation(kernel)
    small = build(whole, *sliced(whole, UNEVEN))
    attention = small.get_decoder().layers[0].self_attn
    assert small.config._attn_implementation == attention.config._attn_implementation == kernel
    x = ids(whole)
    before = small(x).logits
    small.set_attn_implementation(other)
    assert attention.config._attn_implementation == other
    torch.testing.assert_close(small(x).logits, before, atol=1e-5, rtol=0)
    # eager attention returns its weights, so this tells which one really ran
    small.set_attn_implementation("eager")
    attentions = small(x, output_attentions=True).attentions
    assert [tuple(a.shape[1:]) for a in attentions] == [(n, 21, 21) for n in (2, 6, 4)]


def test_takes_over_dtype_mode_generation_config_and_fresh_buffers(make_model):
    whole = make_model("llama").to(torch.bfloat16).train()
    whole.generation_config.max_length = 77
    small = build(whole, *sliced(whole, UNEVEN))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.training
    assert small.generation_config.max_length == 77
    assert small.generation_config is not whole.generation_config
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    expected = 1.0 / 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    torch.testing.assert_close(small.model.rotary_emb.inv_freq, expected)
    assert all(not t.is_meta for t in (*small.parameters(), *small.buffers()))
    assert all(p.requires_grad for p in small.parameters())


def test_shares_what_was_not_cut_and_nothing_else(make_model):
    whole = make_model("llama")
    small = build(whole, *sliced(whole, UNEVEN))
    assert small.model.embed_tokens.weight.data_ptr() == whole.model.embed_tokens.weight.data_ptr()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    with torch.no_grad():
        small.model.layers[0].self_attn.q_proj.weight.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("kept", [UNEVEN, REMOVED], ids=["uneven", "removed"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, family, kept):
    whole = make_model(family)
    small = build(whole, *sliced(whole, kept)).train()
    x = ids(whole)
    plain = _gradients(small, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in later versions, but there in all that we support
        small.gradient_checkpointing_enable()
    checkpointed = _gradients(small, x)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=0)


def _gradients(model, x):
    model.zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_deep_copy_is_independent(make_model):
    whole = make_model("qwen3")
    small = build(whole, *sliced(whole, UNEVEN))
    twin = copy.deepcopy(small)
    x = ids(whole)
    assert torch.equal(twin(x).logits, small(x).logits)
    twin.set_attn_implementation("eager")
    assert twin.get_decoder().layers[0].self_attn.config._attn_implementation == "eager"
    assert small.get_decoder().layers[0].self_attn.config._attn_implementation == "sdpa"


def test_from_config_initialises_every_layer(make_model):
    whole = make_model("llama")
    config = build(whole, *sliced(whole, REMOVED)).config
    fresh = AutoModelForCausalLM.from_config(config)
    for name, parameter in fresh.named_parameters():
        deviation = float(parameter.detach().float().std()) if "norm" not in name else config.initializer_range
        assert deviation == pytest.approx(config.initializer_range, rel=0.25), name


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 500000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
}


def awkward_llama(**extra):
    """A Llama whose head count, once cut from 6 to 5, does not divide the hidden size of 48."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=16,
        max_position_embeddings=24,
        **extra,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, shift = (0.1, 1.0) if "norm" in name else (0.2, 0.0)
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("rope", sorted(ROPE))
def test_a_head_count_that_llama_refuses_is_a_mistral_of_the_same_mathematics(rope):
    whole = awkward_llama(rope_parameters=ROPE[rope])
    kept = [Kept((0, 1, 2, 4, 5), range(40))] * 3
    small = build(whole, *sliced(whole, kept))
    assert type(small) is MistralForCausalLM
    assert small.config.sliding_window is None
    assert small.config.head_dim == 16
    assert small.config.num_attention_heads == 5
    assert "attention_bias" not in small.config.to_dict()
    rope_kept = small.config.rope_parameters
    assert {key: rope_kept[key] for key in ROPE[rope]} == ROPE[rope]
    x = ids(whole, tokens=40)  # beyond max_position_embeddings, where the dynamic kinds change
    torch.testing.assert_close(small(x).logits, zeroed(whole, kept)(x).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_stand_in_that_lacks_a_bias_is_not_taken(bias):
    whole = awkward_llama(**{bias: True})
    kept = [Kept((0, 1, 2, 4, 5), range(40))] * 3
    small = build(whole, *sliced(whole, kept))
    assert type(small).__name__ == "RegraftLlamaForCausalLM"
    x = ids(whole)
    torch.testing.assert_close(small(x).logits, zeroed(whole, kept)(x).logits, atol=1e-5, rtol=0)


def test_removing_whole_layers_trims_every_per_layer_list():
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    )
    whole = Qwen2ForCausalLM(config).eval()
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    layers = (0, 2, 4)
    names = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    state = {}
    for name, tensor in whole.state_dict().items():
        prefix = next((p for p in names if name.startswith(p)), None)
        if prefix or ".layers." not in name:
            state[name.replace(prefix, names[prefix]) if prefix else name] = tensor
    small = build(whole, [LayerSizes(6, 3, 8, 64)] * 3, state, layers=layers)
    assert type(small) is Qwen2ForCausalLM
    assert small.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (small.config.num_hidden_layers, small.config.max_window_layers) == (3, 1)
    reference = copy.deepcopy(whole)
    with torch.no_grad():
        for index in (1, 3):
            reference.model.layers[index].self_attn.o_proj.weight.zero_()
            reference.model.layers[index].mlp.down_proj.weight.zero_()
    x = ids(whole)
    torch.testing.assert_close(small(x).logits, reference(x).logits, atol=1e-5, rtol=0)


def test_conform_puts_right_what_was_cut_in_place(make_model):
    whole = make_model("llama")
    assert conform(whole) is whole
    expected = build(whole, *sliced(whole, UNEVEN))
    x = ids(whole)
    kept = UNEVEN[0]
    layer = whole.model.layers[0]
    layer.mlp.gate_proj.weight = torch.nn.Parameter(layer.mlp.gate_proj.weight[list(kept.channels)])
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight[list(kept.channels)])
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, list(kept.channels)])
    right = conform(whole)
    assert type(right).__name__ == "RegraftLlamaForCausalLM"
    assert [s.ffn for s in declared_sizes(right.config)] == [22, 64, 64]
    torch.testing.assert_close(right(x).logits, whole(x).logits, atol=1e-6, rtol=0)
    assert (right(x).logits - expected(x).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([LayerSizes(4, 3, 8, 64)] * 3, "4 query heads for 3 key-value heads"),
        ([LayerSizes(0, 3, 8, 64)] * 3, "0 query heads for 3"),
        ([LayerSizes(6, 3, 8, 64)] * 2 + [LayerSizes(6, 3, 4, 64)], "use one head size"),
        ([LayerSizes(6, 3, 8, 64)] * 2, "sizes of 2 layers"),
        ([], "sizes of 0 layers"),
        ([LayerSizes(6, 3, 8, 32)] * 3, "have another shape for 'model.layers.0.mlp.down_proj.weight'"),
    ],
)
def test_impossible_sizes_are_refused(make_model, sizes, words):
    whole = make_model("llama")
    with pytest.raises(PlanError, match=words):
        build(whole, sizes, whole.state_dict())


@pytest.mark.parametrize(("change", "words"), [("drop", "lack 'model.norm.weight'"), ("add", "also hold 'model.extra.weight'")])
def test_tensors_that_do_not_fit_are_refused(make_model, change, words):
    whole = make_model("llama")
    sizes, state = sliced(whole, UNEVEN)
    if change == "drop":
        del state["model.norm.weight"]
    else:
        state["model.extra.weight"] = torch.zeros(2)
    with pytest.raises(PlanError, match=words):
        build(whole, sizes, state)


def test_the_config_of_a_pruned_model_survives_json(make_model, family, tmp_path):
    whole = make_model(family)
    sizes, _ = sliced(whole, UNEVEN)
    config = config_for(whole.config, sizes)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert declared_sizes(again) == tuple(sizes)
    assert again.to_dict()["per_layer_config"] == config.to_dict()["per_layer_config"]


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_of_random_families(seed, tmp_path):
    """Other head ratios (one head each, one for all), head sizes, layer counts and tying; saved and loaded again."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*options):
        return options[int(torch.randint(0, len(options), (), generator=generator))]

    groups, repeats, layers = draw(1, 2, 5), draw(1, 2, 3), draw(1, 2, 4)
    model_class, config_class = draw(
        (LlamaForCausalLM, LlamaConfig),
        (MistralForCausalLM, MistralConfig),
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    )
    config = config_class(
        vocab_size=61,
        hidden_size=30,
        intermediate_size=draw(17, 32),
        num_hidden_layers=layers,
        num_attention_heads=groups * repeats,
        num_key_value_heads=groups,
        head_dim=draw(4, 10),
        tie_word_embeddings=draw(True, False),
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    whole = model_class(config).eval()
    kept = []
    for _ in range(layers):
        heads = [g for g in range(groups) if draw(True, True, False)]
        channels = [c for c in range(config.intermediate_size) if draw(True, False)]
        kept.append(Kept(heads, channels))
    if draw(True, False):
        kept = [kept[0]] * layers
    small = build(whole, *sliced(whole, kept))
    x = ids(whole)
    torch.testing.assert_close(small(x).logits, zeroed(whole, kept)(x).logits, atol=1e-5, rtol=0)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(small)
    assert torch.equal(again(x).logits, small(x).logits)
    assert again.config.to_diff_dict() == small.config.to_diff_dict()


@pytest.mark.slow
def test_other_ways_to_load(make_model, tmp_path):
    whole = make_model("qwen3", tie_word_embeddings=True)
    small = build(whole, *sliced(whole, REMOVED))
    small.save_pretrained(tmp_path)
    x = ids(whole)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "RegraftQwen3Model"
    hidden = small(x, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    assert torch.equal(base(x).last_hidden_state, hidden[-1])
    for settings in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"attn_implementation": "eager"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        torch.testing.assert_close(model(x).logits, small(x).logits, atol=1e-5, rtol=0)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(x).logits.float(), small(x).logits, atol=0.2, rtol=0)
    settings = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(small.generate(x, use_cache=True, **settings), small.generate(x, use_cache=False, **settings))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks by the old name
def test_peft_adapts_and_merges_what_is_there(make_model, tmp_path):
    whole = make_model("llama-bias")
    small = build(whole, *sliced(whole, REMOVED))
    x = ids(whole)
    before = small(x).logits
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(small, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    changed = adapted(x).logits
    assert (changed - before).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, changed, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_regraft.py").is_file()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, merged(x).logits)
