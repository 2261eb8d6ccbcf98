"""Advice from files alone, beside the model itself; and small commands for recipes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

import fresh
from regraft.cli import app
from regraft.errors import InputError
from regraft.pipelines.advise import Facts, facts_of, for_bytes, for_speed
from regraft.pipelines.run.recipe import read_recipe, recipe_schema


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_the_files_tell_the_size_of_the_model(family: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / "m")
    facts = facts_of(str(tmp_path / "m"))
    named = dict(model.named_parameters())
    assert facts.parameters == sum(parameter.numel() for parameter in named.values())
    assert facts.stored_bytes == 4 * facts.parameters
    layers = {
        name: parameter for name, parameter in named.items() if parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))
    }
    assert facts.prunable == sum(parameter.numel() for parameter in layers.values())
    assert facts.outside == pytest.approx(1 - facts.prunable / facts.parameters)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    assert facts.cache_bytes == 2 * 2 * 3 * heads * width * 64  # three layers, a context of 64
    assert (facts.looked_up == 0) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


BILLION = Facts("m", 10**9, 4 * 10**9, 8 * 10**8, 2 * 10**7, 0, 10**8, 2048)


def test_the_mildest_that_fits_is_advised() -> None:
    sizes = (5e9, 2.5e9, 1.2e9, 0.9e9, 0.65e9, 0.5e9)
    found = [for_bytes(BILLION, int(size), running=False) for size in sizes]
    assert [one.quantize for one in found] == ["", "", "Q8_0", "Q6_K", "Q4_K_M", "Q4_K_M"]
    assert [one.ratio > 0 for one in found] == [False] * 5 + [True]
    assert all(one.bytes <= size for one, size in zip(found, sizes, strict=True))
    assert for_bytes(BILLION, int(1.2e9), running=True).bytes < found[2].bytes  # the cache takes its part
    with pytest.raises(InputError, match="less than pruning and quantizing reach"):
        for_bytes(BILLION, 10**8, running=False)


def test_a_speed_is_a_share_of_what_is_read() -> None:
    advice = for_speed(BILLION, 1.25)
    assert advice.ratio == 0.2  # 1 / (1 - 0.2)
    assert (advice.steps[0].command, advice.steps[0].settings["ratio"]) == ("prune", "0.2")
    assert for_speed(BILLION, 2.0).ratio == 0.5
    for times in (2.1, 1.0, float("inf")):
        with pytest.raises(InputError, match=r"no width|no gain"):
            for_speed(BILLION, times)


def test_the_command_prints_what_to_run_and_imports_no_torch(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "m")
    code = (
        "import sys\nfrom regraft.cli.app import run\nprint(run(sys.argv[1:]), [n for n in sys.modules if n.startswith('regraft.models.')])"
    )
    done = fresh.run(["-c", code, "advise", str(tmp_path / "m"), "--speed", "1.1x"])
    assert re.search(rf"regraft prune {tmp_path / 'm'} --ratio 0\.\d+ --calibration text\.txt --output pruned\n", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("0 ")
    assert "regraft.models.load" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "99x"], "is reached by no width"),
        (["--speed", "fast"], "is no multiple"),
        (["--size", "much"], "--size much"),
        ([], "nothing was asked for"),
        (["--size", "1GB", "--memory", "1GB"], "give one of"),
    ],
)
def test_what_cannot_be_advised_is_refused_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["advise", "seedling", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_recipe_is_copied_and_fits_its_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    monkeypatch.chdir(tmp_path)
    assert app.run(["init", "quickstart"]) == 0
    assert read_recipe("quickstart.yaml") == read_recipe("quickstart")
    assert app.run(["init", "quickstart"]) == 2
    assert "exists" in capsys.readouterr().err
    assert app.run(["init", "quickstrat"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err
    assert app.run(["schema", "--output", "schema.json"]) == 0
    schema = json.loads(Path("schema.json").read_text())
    assert schema == json.loads(json.dumps(recipe_schema()))
    values = yaml.safe_load(Path("quickstart.yaml").read_text())
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | {"prnue": {}}, schema)
