from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from regraft.errors import ConfigError, InputError
from regraft.pipelines.run.recipe import Recipe, check_recipe, find_recipe, read_recipe, shipped_recipes, to_yaml
from regraft.settings import EvaluateSettings, PruneSettings, RecoverSettings

GOOD = """
model: some/model
seed: 7
prune:
  ratio: 0.3
  layers: 1:20
  shape: per-layer
  targets: ffn
recover:
  lr: 1e-3
evaluate:
  max_tokens: 1000
"""


@pytest.fixture
def write(tmp_path: Path):
    def put(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return put


def problems_of(source: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_recipe(source, overrides)
    return list(caught.value.problems)


def test_a_recipe_is_read(write) -> None:
    recipe = read_recipe(write(GOOD))
    assert recipe.model == "some/model"
    assert recipe.seed == 7
    assert recipe.prune == PruneSettings(ratio=0.3, layers="1:20", shape="per-layer", targets=("ffn",))
    assert recipe.recover == RecoverSettings(lr=0.001)
    assert recipe.evaluate == EvaluateSettings(max_tokens=1000)
    assert recipe.sample is None


def test_overrides_change_make_and_remove(write) -> None:
    recipe = read_recipe(
        write(GOOD),
        ["prune.ratio=0.4", "sample.prompt=Once upon", "recover=null", "prune.targets=heads,ffn", "evaluate.max_tokens="],
    )
    assert recipe.prune is not None
    assert recipe.sample is not None
    assert recipe.prune.ratio == 0.4
    assert recipe.prune.targets == ("heads", "ffn")
    assert recipe.sample.prompt == "Once upon"
    assert recipe.recover is None
    assert recipe.evaluate.max_tokens is None


@pytest.mark.parametrize(
    ("override", "prompt"),
    [("def f(x):", "def f(x):"), ("", ""), ("a: b", "a: b"), ("'quoted'", "quoted"), ("3", "3"), ("[1", "[1"), ("null", "null")],
)
def test_text_is_taken_as_it_is_typed(write, override: str, prompt: str) -> None:
    recipe = read_recipe(write(GOOD), [f"sample.prompt={override}", "prune.layers=:"])
    assert recipe.sample is not None
    assert recipe.prune is not None
    assert recipe.sample.prompt == prompt
    assert recipe.prune.layers == ":"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_right_and_described(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.description
    assert read_recipe(str(shipped_recipes()[name])) == recipe


def test_the_quick_start_prunes_a_quarter_of_seedling() -> None:
    recipe = read_recipe("quickstart")
    assert recipe.model == "seedling"
    assert recipe.prune is not None
    assert recipe.prune.ratio == 0.25
    assert recipe.recover is not None
    assert recipe.sample is not None


def test_yaml_with_every_key_is_read_back(write) -> None:
    for recipe in (Recipe(model="x"), read_recipe(write(GOOD)), read_recipe("quickstart")):
        assert read_recipe(write(to_yaml(recipe))) == recipe


def test_everything_wrong_is_listed_at_once_with_lines(write) -> None:
    found = problems_of(
        write(
            "model: seedling\n"
            "prun: {}\n"
            "prune:\n"
            "  ratio: 0.5\n"
            "  ration: 2\n"
            "  criterion: tailor\n"
            "  shape: uniform\n"
            "  layers: 1:-1\n"
            "  ratio: 1.2\n"
            "  calibration: nowhere.txt\n"
            "recover:\n"
            "evaluate: {window: 4, stride: 8}\n"
            "sample: {tokens: many}\n"
        ),
        "foo",
        "model.x=3",
        "seed=[1",
    )
    assert [problem.split(":")[0] for problem in found] == [
        "prune.ratio (line 9)",  # stands twice
        "recover (line 11)",  # nothing follows
        "override 'foo' is not key=value; write it as prune.ratio=0.3",
        "override 'model.x=3'",
        "override 'seed=[1'",
        "prune.ratio (line 4)",  # out of range
        "prune.criterion (line 6)",
        "prune.ration (line 5)",
        "sample.tokens (line 13)",
        "prun (line 2)",
        "prune.layers (line 8)",
        "prune.calibration (line 10)",
        "evaluate.stride (line 12)",
    ]
    assert "did you mean 'taylor'?" in found[6]
    assert "did you mean 'ratio'?" in found[7]
    assert "did you mean 'prune'?" in found[9]


def test_the_model_is_needed(write) -> None:
    assert problems_of(write("seed: 1\n")) == ["model: required, but not given"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("prune: {shape: uniform, layers: '1:'}", "prune.layers (line 2): '1:' spares layers"),
        ("prune: {shape: uniform, layers: ':-1'}", "spares layers"),
        ("prune: {shape: uniform, layers: '::2'}", "spares layers"),
        ("prune: {targets: []}", "names nothing to prune"),
        ("prune: {criterion: tailor}", "unknown criterion 'tailor'; known: "),
        ("prune: {budget: bytes, select: global}", "prune.select (line 2): `budget=bytes` is only known to the knapsack"),
        ("evaluate: {window: 4, stride: 5}", "evaluate.stride (line 2): 5 exceeds evaluate.window 4"),
        ("evaluate: {text: no.txt}", "no file at 'no.txt'"),
        ("recover: {data: no.txt}", "recover.data (line 2): no file at 'no.txt'"),
        ("prune: 3", "prune (line 2): should be keys and values (got 3)"),
        ("seed: -1", "seed (line 2): should be at least 0 and below 4294967296 (got -1)"),
    ],
)
def test_one_problem_is_one_line(write, section: str, words: str) -> None:
    path = write(f"model: seedling\n{section}\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith("recipe.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [":", "0:", "0:100", "-100:", "::-1", "0:8:1"])
def test_ranges_that_may_be_all_layers_fit_uniform(layers: str) -> None:
    recipe, problems = check_recipe({"model": "x", "prune": {"shape": "uniform", "layers": layers}})
    assert problems == []
    assert recipe is not None


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text"])
def test_a_file_without_keys_is_no_recipe(write, text: str) -> None:
    assert "holds no keys" in problems_of(write(text))[0]


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        read_recipe(str(tmp_path / "binary.yaml"))
    with pytest.raises(InputError, match=r"is a folder; give a YAML file or one of: .*quickstart"):
        find_recipe(str(tmp_path))
    with pytest.raises(InputError, match=r"recipe 'quickstrt' not found; .* did you mean 'quickstart'\?"):
        find_recipe("quickstrt")


def test_shipped_recipes_say_what_they_set() -> None:
    """A recipe to copy has a comment for every key that it sets beyond a handful."""
    for path in shipped_recipes().values():
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), f"{path.name} does not begin by saying what it does"
        assert isinstance(yaml.safe_load(text), dict)


def test_what_cannot_be_with_ranks_that_are_allocated(write) -> None:
    found = problems_of(
        write("model: seedling\nallocate: {confirm_seeds: 1}\nrecover: {ranks: plan.json, targets: q_proj, adapter: nola}\n"),
        "allocate.method=rankadaptor",
    )
    assert [problem.split(":")[0].split(" (")[0] for problem in found] == ["recover.ranks", "recover.targets", "allocate"]
    (lonely,) = problems_of(write("model: seedling\nallocate: {}\n"))
    assert "no section recover; add one, or leave allocate out" in lonely
