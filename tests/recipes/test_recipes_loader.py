"""Recipe files, overrides and --smoke: what is read, and how what is wrong is named."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from conversations.sections import Target
from deepseek_v2_modeling.adapters.lora import GROUPS, PROJECTIONS
from recipes.cli import main
from recipes.recipe.loader import load_recipe, of_stage
from recipes.recipe.overrides import Override, apply_override, merge, parse_override
from recipes.recipe.paths import absolute_paths, is_hub_name
from recipes.recipe.yaml_text import parse_yaml, read_mapping
from recipes.runs.prepare import check_settings

SFT = """\
stage: sft
model: {path: some/model, dtype: bfloat16}
lora: {targets: [attention, experts], r: {attention: 8, experts: 4}}
data:
  - {path: rows.jsonl}
  - {path: owner/name, split: train}
training: {learning_rate: 1e-4, max_steps: 500}
output_dir: runs/x
"""
EVAL = """\
stage: eval
model: {path: m}
data: [{path: "tiny:test_problems?seed=3&n=7"}]
tasks:
  - {name: exact_match, metric: exact_match, temperatures: [0, 1]}
  - {name: refusals, metric: refusal, data: [{path: r.jsonl}]}
output_dir: runs/e
"""
RL = """\
stage: rl
model: {path: m}
data: [{path: p.jsonl}]
rewards:
  - {model: runs/rm, weight: 0.5, clip: 3}
  - {rule: number}
output_dir: runs/r
"""
CHAIN = """\
stage: chain
model: {path: m}
stages: [{name: one, recipe: sft.yaml, training: {max_steps: 3}}]
output_dir: runs/c
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SFT, encoding="utf-8")
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5.0e-6", 5e-6), ("1e3", 1000.0), ("-2", -2), ("007", 7), (".5", 0.5),
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("true", True), ("False", False), ("null", None), ("", None),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2024-01-02", "2024-01-02"), ("0x1f", "0x1f"), ("1.2.3", "1.2.3"),
        ("'5'", "5"), ("-", [None]),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "x")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 'bad.yaml:3: not valid YAML: key "a" is given twice'),
        ("a:\n  x: 1\n  x: 2\n", 'bad.yaml:3: not valid YAML: key "x" is given twice'),
        ("a: [1,\nb: 2", "bad.yaml:2: not valid YAML"),
        ("a: 1\n\tb: 2", "bad.yaml:2: not valid YAML"),
        ("", "this file is empty"),
        ("- a\n- b\n", "this file is a list"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ToolkitError) as caught:
        read_mapping(path)
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match=r"no such recipe: .*missing\.yaml"):
        read_mapping(tmp_path / "missing.yaml")
    with pytest.raises(ToolkitError, match="is a directory"):
        read_mapping(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ToolkitError, match="not UTF-8 at byte 3"):
        read_mapping(tmp_path / "latin.yaml")


# --- overrides

KEYS = st.text("abcxyz_", min_size=1, max_size=5)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), KEYS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(max_examples=40, deadline=None)
@given(path=st.lists(KEYS, min_size=1, max_size=4), value=VALUES)
def test_an_override_sets_exactly_its_key(path: list[str], value: Any) -> None:
    text = ".".join(path) + "=" + yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    override = parse_override(text)
    assert override == Override(tuple(path), value)
    tree: dict[str, Any] = {"untouched": [1, {"a": 2}]}
    apply_override(tree, override)
    node: Any = tree
    for key in path:
        node = node[key]
    assert node == value and tree["untouched"] == [1, {"a": 2}]


@settings(max_examples=40, deadline=None)
@given(base=st.dictionaries(KEYS, VALUES, max_size=3), changes=st.dictionaries(KEYS, VALUES, max_size=3))
def test_merging_changes_neither_side_and_is_repeatable(base: dict[str, Any], changes: dict[str, Any]) -> None:
    before = copy.deepcopy((base, changes))
    merged = merge(base, changes)
    assert (base, changes) == before
    assert merge(merged, changes) == merged and set(merged) == {*base, *changes}


def test_list_entries_are_addressed_by_number_and_by_name() -> None:
    tree = {"data": [{"path": "a"}, {"path": "b"}], "tasks": [{"name": "one"}, {"name": "two"}]}
    apply_override(tree, parse_override("data.1.path=c"))
    apply_override(tree, parse_override("tasks.two.limit=5"))
    assert tree == {"data": [{"path": "a"}, {"path": "c"}], "tasks": [{"name": "one"}, {"name": "two", "limit": 5}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path", '"model.path" is not an override; write key.path=value'),
        ("=3", '"=..." is not an override'),
        ("model..path=3", "is not an override"),
        ("data." + "9" * 5000 + "=1", "is too long: a key.path has at most 300 characters and 30 keys"),
        ("a." * 40 + "b=1", "is too long"),
        ("data.99999999999999999999=1", 'has no entry "99999999999999999999"'),
        ("seed=!!float x", "not valid YAML"),
        ("seed=!!timestamp x", "not valid YAML"),
        ("seed=!!timestamp 2001-99-99", "not valid YAML"),
        ("seed=!!bool maybe", "not valid YAML"),
        ('seed="\\U00110000"', "not valid YAML"),
        ("lora={[1]: 2}", "not valid YAML"),
        ("data=" + "[" * 101 + "]" * 101, "nested too deeply (at most 100)"),
        ("data=[{path: x", 'override "data":1: not valid YAML'),
        ("data.2.path=x", 'override "data.2.path": data has no entry "2"; its entries are 0 to 1'),
        ("output_dir.x=1", "override \"output_dir.x\": output_dir is 'runs/x', not a section with keys"),
        ("model={path: a, path: b}", 'key "path" is given twice'),
    ],
)
def test_a_wrong_override_is_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        load_recipe(recipe, [override])
    assert message in str(caught.value)


PATHS = (
    "stage", "model", "model.path", "model.config.x", "lora", "lora.r", "lora.targets.0", "data", "data.0",
    "data.0.path",
    "data.-1", "data.²", "data.٣", "data.7", "format", "training", "training.learning_rate", "training.a.b", "seed",
    "output_dir", "", ".", "__class__", "${sft}", "\x1b", " model.path ",
)  # fmt: skip
TAGS = st.sampled_from(
    [
        "float",
        "int",
        "bool",
        "timestamp",
        "null",
        "binary",
        "set",
        "omap",
        "pairs",
        "str",
        "map",
        "seq",
        "merge",
        "python/name:os",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text("[]{}&*!|>:-?#'\",%@`\\ \n\t0a~<=.", max_size=20),
    st.builds("!!{} {}".format, TAGS, st.sampled_from(["x", "", "[a]", "{a: 1}", "2001-99-99", "0x", "=="])),
    st.builds(lambda opening, depth, closing: opening * depth + closing * depth, st.sampled_from(["[", "{a: "]),
              st.sampled_from([50, 101, 400, 2000]), st.sampled_from(["]", "}", ""])),
    st.sampled_from(
        ["{<<: 3}", "{<<: [1]}", "{[1]: 2}", "{null: 1}", "[&x [*x]]", "&a [*a]", "*a", ".inf", ".nan", "1e999",
         "-0", "~", "~nobody/x", "9" * 5000, "a" * 20_000, '"\\0"', '"\\ud800"', '"\\U00110000"', "--- a\n--- b",
         "%YAML 9\n---\na"]
    ),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.one_of(st.sampled_from(PATHS), st.text(max_size=8)),
    equals=st.sampled_from(["=", "=", "==", ""]),
    value=TEXTS,
)
def test_whatever_an_override_says_is_one_message(
    recipe: Path, capsys: pytest.CaptureFixture[str], key: str, equals: str, value: str
) -> None:
    """By the command of another stage, so that a recipe which can be read is refused too."""
    override = f"{key}{equals}{value}"
    if override.startswith("-") or override.startswith("stage=eval"):
        return
    assert main(["eval", str(recipe), override]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said


def test_overrides_replace_lists_and_make_sections(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["data=[{path: owner/b}]", "model.config.aux_loss_alpha=0.01", "lora=null"])
    assert [source.path for source in loaded.recipe.data] == ["owner/b"]
    assert loaded.recipe.model.config == {"aux_loss_alpha": 0.01} and loaded.recipe.lora is None


# --- paths


def test_data_is_relative_to_the_recipe_and_in_overrides_to_the_working_directory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = load_recipe(recipe)
    assert [source.path for source in loaded.recipe.data] == [str(tmp_path / "rows.jsonl"), "owner/name"]
    assert loaded.recipe.model.path == "some/model" and loaded.recipe.output_dir == "runs/x"
    loaded = load_recipe(recipe, ["data=[{path: mine.jsonl}, {path: ../up.json}]"])
    assert [source.path for source in loaded.recipe.data] == [str(elsewhere / "mine.jsonl"), str(tmp_path / "up.json")]
    assert load_recipe(recipe, ["data.0.path=mine.jsonl"]).recipe.data[0].path == str(elsewhere / "mine.jsonl")


def test_paths_inside_tasks_and_chains_are_files_too(tmp_path: Path) -> None:
    tree = {
        "tasks": [{"data": [{"path": "a.jsonl"}]}],
        "stages": [{"recipe": "s.yaml", "data": [{"path": "b.jsonl"}], "model": {"path": "${sft}"}}],
        "eval_data": [{"path": "${sft}/samples.jsonl"}, {"path": "tiny:sft_train"}, {"path": "/c.jsonl"}],
    }
    assert absolute_paths(tree, tmp_path) == {
        "tasks": [{"data": [{"path": str(tmp_path / "a.jsonl")}]}],
        "stages": [
            {
                "recipe": str(tmp_path / "s.yaml"),
                "data": [{"path": str(tmp_path / "b.jsonl")}],
                "model": {"path": "${sft}"},
            }
        ],
        "eval_data": [{"path": "${sft}/samples.jsonl"}, {"path": "tiny:sft_train"}, {"path": "/c.jsonl"}],
    }


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    tree = {
        "model": {"path": "~/m"},
        "lora": {"experts_file": "~/e.json"},
        "data": [{"path": "~/a.jsonl"}],
        "rewards": [{"model": "~/rm"}, {"rule": "~/no path"}],
        "stages": [{"recipe": "~/s.yaml", "model": {"path": "~/n"}}],
        "output_dir": "~",
    }
    home = str(tmp_path / "h")
    assert absolute_paths(tree, Path("/recipes")) == {
        "model": {"path": f"{home}/m"},
        "lora": {"experts_file": f"{home}/e.json"},
        "data": [{"path": f"{home}/a.jsonl"}],
        "rewards": [{"model": f"{home}/rm"}, {"rule": "~/no path"}],
        "stages": [{"recipe": f"{home}/s.yaml", "model": {"path": f"{home}/n"}}],
        "output_dir": home,
    }
    with pytest.raises(ToolkitError, match="output_dir: '~nobody-here/x': no home directory"):
        absolute_paths({"output_dir": "~nobody-here/x"}, tmp_path)


@pytest.mark.parametrize("name", ["owner/name", "openai/gsm8k:main", "a-b/c.d_e"])
def test_hub_names(name: str, tmp_path: Path) -> None:
    assert is_hub_name(name)
    assert absolute_paths({"data": [{"path": name}]}, tmp_path)["data"][0]["path"] == name


@pytest.mark.parametrize(
    "name", ["a.jsonl", "gsm8k", "here/train", "data/a.json", "./a/b", "../a", "a/b/c", "x.jsonl.gz", "/a/b", "a b"]
)
def test_what_is_no_hub_name_is_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert not is_hub_name(name) or name.startswith("here/")
    assert Path(absolute_paths({"data": [{"path": name}]}, tmp_path)["data"][0]["path"]).is_absolute()


def test_a_file_that_exists_goes_before_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "gsm8k").write_text("")
    path = absolute_paths({"data": [{"path": "openai/gsm8k"}]}, tmp_path)["data"][0]["path"]
    assert path == str(tmp_path / "openai" / "gsm8k")


# --- wrong keys and values, at every level


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (SFT, "model.pth=x", 'unknown key "model.pth", did you mean "model.path"?'),
        (SFT, "modle.path=x", 'unknown key "modle", did you mean "model"?'),
        (SFT, "sede=1", 'unknown key "sede", did you mean "seed"?'),
        (SFT, "path=x", 'unknown key "path", did you mean "model.path"?'),
        (SFT, "lora.target=[attention]", 'unknown key "lora.target", did you mean "lora.targets"?'),
        (SFT, "data.1.wieght=2", 'unknown key "data.1.wieght", did you mean "data.1.weight"?'),
        (SFT, "format.train=all", 'unknown key "format.train", did you mean "format.train_on"?'),
        (SFT, "rewards=[]", 'unknown key "rewards"; known here: stage, model, output_dir'),
        (SFT, "learning_rate=1", "fields of the TRL config go under training"),
        (EVAL, "tasks.0.metrc=loss", 'unknown key "tasks.0.metrc", did you mean "tasks.0.metric"?'),
        (EVAL, "tasks.refusals.data.0.pth=a", 'unknown key "tasks.1.data.0.pth", did you mean "tasks.1.data.0.path"?'),
        (RL, "rewards.0.wieght=1", 'unknown key "rewards.0.wieght", did you mean "rewards.0.weight"?'),
        (CHAIN, "stges=[]", 'unknown key "stges", did you mean "stages"?'),
        (CHAIN, "model.presett=tiny", 'unknown key "model.presett", did you mean "model.preset"?'),
        (SFT, "stage=stf", "stage: 'stf' is not one of sft, reward, rl, eval, pairs, chain, did you mean \"sft\"?"),
        (SFT, "stage=null", "stage: None is not one of"),
        (SFT, "seed=abc", "seed: must be a valid integer, not 'abc'"),
        (SFT, "seed=true", "seed: must be a valid integer, not True"),
        (SFT, "seed=-1", "seed: must be greater than or equal to 0, not -1"),
        (SFT, "model=x", "model: must be a section with keys, not 'x'"),
        (SFT, "model={}", 'missing key "model.path": A model directory'),
        (SFT, "model.dtype=float8", "model.dtype: must be 'float32', 'bfloat16' or 'float16', not 'float8'"),
        (SFT, "output_dir=null", "output_dir: must be a valid string, not None"),
        (SFT, "output_dir=''", "output_dir: must not be empty, not ''"),
        (SFT, "data=[]", "data: must not be empty"),
        (SFT, "data=x.jsonl", "data: must be a list, not 'x.jsonl'"),
        (SFT, "data.0.weight=0", "data.0.weight: must be greater than 0, not 0"),
        (SFT, "data.0.on_bad_row=ignore", "data.0.on_bad_row: must be 'error' or 'skip', not 'ignore'"),
        (SFT, "data.0.max_bad_rows=3", "max_bad_rows needs on_bad_row: skip"),
        (SFT, "data.0.fim=0.5", "data.0.fim: must be a section with keys, not 0.5"),
        (SFT, "data.0.fim={mode: pms}", "data.0.fim.mode: must be 'psm' or 'spm', not 'pms'"),
        (SFT, "lora.targets=[attention, router]", "r names ['attention', 'experts'] but targets are"),
        (SFT, "lora.targets=[attention, mlp]", "lora.targets.1: must be 'attention', 'attention.q'"),
        (SFT, "lora.targets=[experts, experts]", "lora.targets: listed twice: experts"),
        (SFT, "lora.r=0", "lora.r: must be greater than or equal to 1"),
        (SFT, "lora.dropout=1", "lora.dropout: must be less than 1"),
        (SFT, "lora={targets: [attention], experts_file: e.json}", "experts_file needs experts among the targets"),
        (SFT, "experts_file=e.json", "experts_file is for full fine-tuning (lora: null); with adapters write lora."),
        (SFT, "format.too_long=cut", "format.too_long: must be 'truncate', 'drop' or 'split', not 'cut'"),
        (SFT, "on_nan=ignore", "on_nan: must be 'stop' or 'skip'"),
        (RL, "rewards.1.model=x", "rewards.1: needs one of model, rule and python"),
        (RL, "rewards.1={weight: 2}", "rewards.1: needs one of model, rule and python"),
        (RL, "rewards.1.weight=0", "rewards.1: weight is 0"),
        (RL, "rewards.1.rule=nubmer", "rewards.1: unknown rule 'nubmer' (did you mean 'number'?)"),
        (EVAL, "tasks.1.name=exact_match", "tasks share a name: exact_match"),
        (EVAL, "data=[]", "task exact_match has no data"),
        (EVAL, "tasks.0={name: pairs, metric: pair_accuracy}", "use two recipes"),
        (EVAL, "tasks.0.temperatures=[]", "tasks.0.temperatures: must not be empty"),
        (CHAIN, "stages.one.name=model", 'a stage may not be called "model"'),
        (CHAIN, "compare=[{name: c, before: one, after: two, task: t}]", 'names no stage of this chain: "two"'),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, override: str, message: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        load_recipe(write(tmp_path, text), [override])
    assert message in str(caught.value)


def test_all_faults_are_told_at_once(recipe: Path) -> None:
    with pytest.raises(ToolkitError) as caught:
        load_recipe(recipe, ["seed=x", "model.pth=y", "data.0.weight=-1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and len({line.split(":")[0] for line in lines}) == 3


def test_a_file_without_stage_or_of_another_stage_is_refused(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(ToolkitError, match='missing key "stage"'):
        load_recipe(write(tmp_path, "model: {path: x}"))
    with pytest.raises(ToolkitError, match=r"is a recipe of stage sft, not reward; run: dsv2 sft .*recipe\.yaml"):
        of_stage(load_recipe(recipe), ["reward"])


# --- --smoke


def test_smoke_replaces_says_so_and_gives_way_to_overrides(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["training.max_steps=7"], smoke=True)
    training = loaded.recipe.training
    expected = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 256, "max_steps": 7,
    }  # fmt: skip
    assert {key: training[key] for key in expected} == expected
    assert training["learning_rate"] == 1e-4  # real settings stay
    assert "training.max_steps: 500 -> 2" in loaded.notes
    assert "training.max_length: (not set) -> 256" in loaded.notes


def test_smoke_for_rl_evaluation_and_chains(tmp_path: Path) -> None:
    rl = load_recipe(write(tmp_path, RL + "training: {generation_batch_size: 64}\n"), smoke=True)
    training = rl.recipe.training
    assert (training["num_generations"], training["max_completion_length"], training["max_steps"]) == (2, 16, 2)
    assert training["per_device_train_batch_size"] * training["steps_per_generation"] == 2
    assert training["generation_batch_size"] is None
    assert [reward.if_missing for reward in rl.recipe.rewards] == ["random", "error"]
    evaluation = load_recipe(write(tmp_path, EVAL), smoke=True)
    assert {(task.batch_size, task.max_new_tokens, task.limit) for task in evaluation.recipe.tasks} == {(1, 16, 2)}
    (tmp_path / "sft.yaml").write_text(SFT, encoding="utf-8")
    chain = load_recipe(write(tmp_path, CHAIN), ["stages.one.training.max_steps=9"], smoke=True)
    assert chain.recipe.stages[0].overrides["training"]["max_steps"] == 9
    assert chain.recipe.stages[0].overrides["training"]["per_device_train_batch_size"] == 1
    assert "training.max_steps: 3 -> 2 (one)" in chain.notes
    (tmp_path / "sft.yaml").write_text(SFT + "early_stopping_patience: 2\n", encoding="utf-8")
    chain = load_recipe(write(tmp_path, CHAIN), smoke=True)
    assert chain.recipe.stages[0].overrides["early_stopping_patience"] is None
    assert "early_stopping_patience: 2 -> None (one)" in chain.notes


def test_smoke_has_no_evaluations_and_what_goes_by_them(tmp_path: Path) -> None:
    fields = (
        "eval_strategy: steps, eval_on_start: true, save_strategy: best, lr_scheduler_type: reduce_lr_on_plateau, "
        "load_best_model_at_end: true, metric_for_best_model: loss"
    )
    text = SFT.split("training:")[0] + f"training: {{{fields}}}\neval_data: [{{path: y.jsonl}}]\noutput_dir: o\n"
    loaded = load_recipe(write(tmp_path, text), smoke=True)
    expected = {
        "eval_strategy": "no", "eval_on_start": False, "save_strategy": "steps", "lr_scheduler_type": "constant",
        "load_best_model_at_end": False,
    }  # fmt: skip
    assert {key: loaded.recipe.training[key] for key in expected} == expected and not loaded.recipe.eval_data
    assert "training.eval_on_start: True -> False" in loaded.notes
    check_settings(loaded.recipe)


def test_a_smoke_evaluation_reads_example_rows_where_its_own_are_missing(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("{}\n")
    tasks = [
        {"task": "gsm8k_local", "name": "a", "path": "absent.jsonl", "fewshot_path": "absent.jsonl", "num_fewshot": 3},
        {"task": "gsm8k_local", "name": "b", "path": "there.jsonl", "fewshot_path": "there.jsonl"},
        {"task": "open_ended", "path": "absent.jsonl", "references": "absent.jsonl", "reward": {"model": "absent"}},
    ]
    text = EVAL.split("tasks:")[0] + f"tasks: {json.dumps(tasks)}\noutput_dir: o\n"
    loaded = load_recipe(write(tmp_path, text), smoke=True)
    first, second, third = loaded.recipe.tasks
    assert Path(first.path).name == "gsm8k_local.jsonl" and Path(first.path).is_file()
    assert first.fewshot_path is None and first.num_fewshot == 0
    assert second.path == second.fewshot_path == str(tmp_path / "there.jsonl")
    assert Path(third.path).is_file() and third.references is None and third.reward.if_missing == "random"
    assert any(note.startswith("tasks.0.path: ") and note.endswith("gsm8k_local.jsonl'") for note in loaded.notes)


def test_the_resolved_recipe_is_a_recipe_with_the_same_meaning(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    again = load_recipe(write(tmp_path, yaml.safe_dump(loaded.resolved)))
    assert again.recipe == loaded.recipe


def test_recipes_name_every_lora_target():
    assert set(get_args(Target)) == {*GROUPS, *PROJECTIONS}
