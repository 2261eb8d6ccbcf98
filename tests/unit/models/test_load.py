"""Loading: what loads, that it stays off the network, and one line for everything that does not load."""

from __future__ import annotations

import json
import logging
import struct
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from folders import UNEVEN, edit_header, edit_json, provenance, tiny_tokenizer
from regraft.errors import InputError, ModelError
from regraft.models import load as load_module
from regraft.models.build import build
from regraft.models.family import family_of
from regraft.models.load import load, require_tokenizer
from regraft.models.save import save
from regraft.models.view import fingerprint
from regraft.settings import LoadSettings
from slicing import files_of, ids, sliced

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def refused(folder: Path | str, words: str, **settings: object) -> str:
    """Asserts that a source is refused in one line that contains ``words``; returns the line."""
    before = files_of(Path(folder)) if Path(folder).is_dir() else {}
    with pytest.raises(InputError) as caught:
        load(folder, LoadSettings.model_validate(settings))
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    assert len(line) < 600
    if before:
        assert files_of(Path(folder)) == before
    return line


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_loads_what_transformers_loads(make_folder, family, uneven):
    folder = make_folder(family, uneven=uneven)
    loaded = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    x = ids(plain)
    assert torch.equal(loaded.model(x).logits, plain(x).logits)
    assert type(loaded.model) is type(plain)
    assert not loaded.model.training
    assert loaded.fingerprint == fingerprint(plain)
    assert loaded.source == str(folder)
    assert require_tokenizer(loaded).encode("a b") == tiny_tokenizer().encode("a b")
    assert (loaded.provenance is not None) == uneven


@pytest.mark.usefixtures("no_network")
def test_seedling_loads_by_name():
    loaded = load("seedling")
    assert loaded.source == "seedling"
    assert loaded.model.config.model_type == "llama"
    assert require_tokenizer(loaded).decode(require_tokenizer(loaded).encode("import os")).endswith("import os")


@pytest.mark.parametrize("stored", sorted(DTYPES))
def test_auto_keeps_the_number_type_of_the_file(make_model, tmp_path, stored):
    model = make_model("llama").to(DTYPES[stored])
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", dtype="float64")  # what the config says does not matter
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.model.parameters()} == {DTYPES[stored]}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


@pytest.mark.parametrize("wanted", sorted(DTYPES))
def test_a_number_type_can_be_asked_for(make_folder, wanted):
    loaded = load(make_folder("qwen3"), LoadSettings(dtype=wanted))
    assert {p.dtype for p in loaded.model.parameters()} == {DTYPES[wanted]}


def test_shards_load(make_model, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    x = ids(model)
    assert torch.equal(load(tmp_path).model(x).logits, model(x).logits)


def test_a_folder_without_a_tokenizer_loads(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.tokenizer is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        require_tokenizer(loaded)


def test_two_different_matrices_stay_two(make_folder):
    folder = make_folder("llama", tie_word_embeddings=False)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    model = load(folder).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_rotary_frequencies_in_old_checkpoints_are_ignored(make_folder):
    folder = make_folder("llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).model is not None


@pytest.mark.slow
def test_says_nothing_on_the_terminal(make_folder, capfd, caplog):
    folder = make_folder("llama", uneven=True)
    capfd.readouterr()
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(folder)
    out = capfd.readouterr()
    assert (out.out, out.err, caught) == ("", "", [])
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    assert "Loading weights" in capfd.readouterr().err  # the bars are as they were for everybody else


# --- one line for what does not load


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nothing", "there is no folder")
    refused(f"{tmp_path}/nothing", "there is no folder")
    refused("../nothing/at all", "there is no folder")


def test_a_file_is_not_a_folder(make_folder):
    refused(str(make_folder() / "model.safetensors"), "is a file; give the folder")


def test_without_config(make_folder):
    folder = make_folder()
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is an adapter on the base 'unknown', not a model; fold it in first with `regraft export")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ('{"model_type": "llama"', "is not JSON"),
        ("\x00\x01\x02", "is not JSON"),
        ("[1, 2]", "has no model_type; known families: bloom, falcon, gemma2"),
        ('{"hidden_size": 4}', "has no model_type"),
        ('{"model_type": 7}', "has no model_type"),
        ('{"model_type": "bert"}', "model family 'bert' is not known (its predictions depend on later tokens"),
        ('{"model_type": "lama"}', "did you mean 'llama'?"),
        ('{"model_type": "regraft_bert"}', "is not known"),
    ],
)
def test_bad_configs(make_folder, text, words):
    folder = make_folder()
    (folder / "config.json").write_text(text)
    refused(folder, words)


def test_a_family_that_transformers_knows_is_not_taken_for_a_slip() -> None:
    with pytest.raises(ModelError, match=r"others are inferred where their layers are like these$"):
        family_of("mamba")


def test_bytes_that_are_no_text(make_folder):
    folder = make_folder()
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(folder, "is not JSON")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 54}, "is [97, 48] in the weights, but config.json asks for [97, 54]"),
        ({"hidden_size": 56}, "The hidden size (56) is not a multiple of the number of attention heads (6)"),
        ({"vocab_size": 98}, "is [97, 48] in the weights, but config.json asks for [98, 48]"),
        ({"intermediate_size": 63}, "'model.layers.0.mlp.down_proj.weight' is [48, 64] in the weights"),
        ({"num_hidden_layers": 4}, "config.json says 4 layers, the weights hold 3"),
        ({"num_hidden_layers": 2}, "config.json says 2 layers, the weights hold 3"),
        ({"num_hidden_layers": 10**9}, "config.json says 1000000000 layers"),
        ({"num_hidden_layers": 0}, "config.json says 0 layers"),
        ({"num_attention_heads": 0}, "config.json' is not valid"),
        ({"hidden_size": "many"}, "config.json' is not valid"),
        ({"attention_bias": True}, "the weights lack 'model.layers.0.self_attn.k_proj.bias'"),
        ({"num_attention_heads": 5}, "is not valid"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized (gptq)"),
        ({"model_type": "qwen3"}, "the weights lack 'model.layers.0.self_attn.k_norm.weight'"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_the_weights(make_folder, change, words):
    folder = make_folder()
    edit_json(folder / "config.json", **change)
    refused(folder, words)


def test_uneven_config_that_does_not_fit(make_folder):
    folder = make_folder(uneven=True)
    (folder / "regraft.json").unlink()
    edit_json(folder / "config.json", per_layer_config={"0": {"intermediate_size": 23}})
    refused(folder, "in the weights, but config.json asks for")
    edit_json(folder / "config.json", per_layer_config={"9": {"intermediate_size": 23}})
    refused(folder, "config.json' is not valid")


def test_a_pickle_is_not_opened(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    line = refused(folder, "as a pickle ('pytorch_model.bin')")
    assert "safetensors" in line


def test_weights_of_another_kind_or_none(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, "as GGUF")
    (folder / "model.gguf").unlink()
    refused(folder, "has no model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 200, 0.5, -1])
def test_truncated(make_folder, kept):
    file = make_folder() / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * kept) if isinstance(kept, float) else kept])
    refused(file.parent, "truncated")


def test_longer_than_it_says(make_folder):
    file = make_folder() / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    refused(file.parent, "is damaged: it holds")


@pytest.mark.slow
def test_every_flipped_bit_of_the_header_is_seen_or_harmless(make_folder):
    """Flips one bit in each of 150 places of the header: the model is refused in one line, or (in metadata) it is unchanged."""
    folder = make_folder()
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    want = load(folder).fingerprint
    generator = torch.Generator().manual_seed(0)
    lines = []
    for place in torch.randint(0, 8 + length, (150,), generator=generator).tolist():
        bit = int(torch.randint(0, 8, (), generator=generator))
        spoiled = bytearray(raw)
        spoiled[place] ^= 1 << bit
        file.write_bytes(bytes(spoiled))
        try:
            loaded = load(folder)
        except ModelError as error:
            lines.append(str(error))
        else:
            assert loaded.fingerprint == want
    assert len(lines) > 120
    assert not any("\n" in line for line in lines)


def test_a_flipped_bit_of_the_weights_is_seen_where_the_checksum_is_known(make_folder):
    folder = make_folder(uneven=True)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(bytes(raw))
    refused(folder, "is damaged or was changed: SHA-256")


def test_a_flipped_exponent_bit_is_seen_without_a_checksum(make_folder):
    folder = make_folder()
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state[name].view(torch.int32)[3, 5] ^= 1 << 30
    assert float(state[name].abs().max()) > 1e30
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(folder, "holds a value of")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_weights_that_are_not_numbers(make_folder, value, dtype):
    folder = make_folder()
    state = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
    state["model.layers.2.self_attn.k_proj.weight"][1, 2] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "'model.layers.2.self_attn.k_proj.weight' holds NaN or infinity in 1 of 1152 values")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.update(surplus=h.pop("model.norm.weight")), "'model.norm.weight'"),
        (lambda h: h["model.norm.weight"].update(shape=[47]), "the bytes of 'model.norm.weight' do not fit its shape [47]"),
        (lambda h: h["model.norm.weight"].update(shape=[-48]), "do not fit its shape"),
        (lambda h: h["model.norm.weight"].update(shape=["48"]), "do not fit its shape"),
        (lambda h: h["model.norm.weight"].update(shape=48), "header cannot be read"),
        (lambda h: h["model.norm.weight"].pop("dtype"), "header cannot be read"),
        (lambda h: h["model.norm.weight"].update(dtype="I32"), "as I32, not as F32, F16, BF16, F64"),
        (lambda h: h["model.norm.weight"].update(dtype="F8_E4M3"), "as F8_E4M3"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0]), "do not fit its shape"),
        (lambda h: h["model.norm.weight"].update(data_offsets=[0, 192]), "is damaged: '"),
        (lambda h: h.clear(), "is damaged: it holds"),
    ],
)
def test_headers_that_do_not_fit(make_folder, change, words):
    folder = make_folder()
    edit_header(folder / "model.safetensors", change)
    refused(folder, words)


def test_a_git_lfs_pointer(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")
    refused(folder, "git lfs pull")


def test_shards_that_are_missing_or_do_not_fit(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text(encoding="utf-8")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    values = json.loads(whole)
    values["weight_map"]["model.norm.weight"] = next(
        shard.name for shard in shards if shard.name != values["weight_map"]["model.norm.weight"]
    )
    index.write_text(json.dumps(values))
    refused(tmp_path, "holds 'model.norm.weight', but it does not")
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(values))
    refused(tmp_path, "weight files lie beside it")
    index.write_text("{")
    refused(tmp_path, "no list of weight files can be read")
    index.write_text(whole)
    removed = shards[1].read_bytes()
    shards[1].unlink()
    refused(tmp_path, f"lacks 1 of {len(shards)} weight files, such as '{shards[1].name}'")
    shards[1].write_bytes(removed[:-7])
    refused(tmp_path, "truncated")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(tmp_path, "twice, in")


def test_a_tokenizer_that_exceeds_the_embedding(make_folder):
    folder = make_folder()
    tiny_tokenizer(98).save_pretrained(folder)
    refused(folder, "the tokenizer has ids up to 97, the embedding has 97 rows")
    tokenizer = tiny_tokenizer(97)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    refused(folder, "the tokenizer has ids up to 97")
    tiny_tokenizer(90).save_pretrained(folder)
    assert load(folder).tokenizer is not None


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that marks spaces as Llama 2 does, which the class that stands for Qwen 2 knows nothing of."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_the_tokenizer_does_what_its_file_says(make_model, family, tmp_path, uneven):
    """Also where the class that AutoTokenizer picks for the family would split text in another way."""
    tokenizer = sentencepiece_like()
    source, target = tmp_path / "source", tmp_path / "target"
    config = {"vocab_size": len(tokenizer)}
    model = type(make_model(family))(make_model(family).config.__class__(**make_model(family).config.to_dict() | config))
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    text = "def f(x):\n    return  'a b c'  # caf\u00e9"
    first = load(source)
    assert require_tokenizer(first).encode(text) == tokenizer.encode(text)
    assert require_tokenizer(first).eos_token == "</s>"
    if uneven:
        first.model = build(first.model, *sliced(first.model, UNEVEN))
    save(first.model, first.tokenizer, target, provenance(), "")
    again = require_tokenizer(load(target))
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_tokenizer_that_is_damaged(make_folder):
    folder = make_folder()
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    refused(folder, "the tokenizer of")


def test_a_damaged_or_incomplete_record(make_folder):
    folder = make_folder(uneven=True)
    record = folder / "regraft.json"
    whole = record.read_text(encoding="utf-8")
    record.write_text(whole[:-9])
    refused(folder, "regraft.json' is damaged")
    edit_json_text = json.loads(whole)
    edit_json_text["files"]["model-2.safetensors"] = "0" * 64
    record.write_text(json.dumps(edit_json_text))
    refused(folder, "lacks 'model-2.safetensors', which its regraft.json lists")


def test_code_in_the_folder_does_not_run(make_folder, tmp_path):
    folder = make_folder("llama")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert load(folder).model.config.model_type == "llama"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device 'gpu' is not known"), ("meta", "is not supported"), ("cuda:99", "is not here"), ("", "not known")],
)
def test_devices_that_are_not_there(make_folder, device, words):
    refused(make_folder(), words, device=device)


# --- the hub


def answer(kind: type[Exception]) -> Exception:
    """Returns an error of the hub's client without the HTTP response that its constructor wants."""
    return kind.__new__(kind, "no")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("Got: ConnectError: no\nAn error happened while"), "the hub cannot be reached (Got: ConnectError: no)"),
        (answer(RepositoryNotFoundError), "the hub has no model of this name"),
        (answer(GatedRepoError), "hf auth login"),
        (OSError("proxy"), "the hub cannot be reached (proxy)"),
    ],
)
def test_a_hub_that_does_not_answer(monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(load_module, "snapshot_download", fail)
    refused("some-maker/some-model", words)


@pytest.mark.usefixtures("no_network")
def test_a_hub_id_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("some-maker/some-model", "is not a folder here, and the hub cannot be reached")
    assert "did you mean 'seedling'?" in refused("seedlign", "is not a folder here")


def test_a_hub_model_is_checked_like_a_folder(monkeypatch, make_folder):
    folder = make_folder("qwen2")
    asked = {}

    def fetch(name, **settings):
        asked.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr(load_module, "snapshot_download", fetch)
    assert load("some-maker/some-model").source == "some-maker/some-model"
    assert asked["name"] == "some-maker/some-model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern in asked["allow_patterns"] for pattern in ("*.bin", "*.py", "*.pt"))
    (folder / "config.json").unlink()
    refused("some-maker/some-model", "has no config.json")
