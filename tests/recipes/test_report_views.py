"""What the report draws besides curves: the chain, scores of reward models, held-out figures against the reward, expert
load over the steps; and how its samples can be filtered."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.report.chain_picture import BASE, Node, Shown, chain_nodes, draw_chain
from recipes.report.expert_maps import expert_maps
from recipes.report.flags import warnings_of
from recipes.report.metrics import Metrics, collect
from recipes.report.relations import held_out_chart, score_charts
from recipes.report.report import report_page
from recipes.report.samples import MAX_PROMPTS, across_runs, answers
from recipes.report.svg import draw

from ..helpers.run_files import lines, make_stage, sample

CHAIN = {
    "stage": "chain",
    "model": {"path": "${output_dir}/base", "preset": "tiny"},
    "stages": [
        {"name": "eval_base", "recipe": "x", "results": "stages.base"},
        {"name": "sft", "recipe": "x", "title": "SFT"},
        {"name": "helpful", "recipe": "x", "model": {"path": "${sft}"}},
        {"name": "pairs", "recipe": "x", "model": {"path": "${sft}/final"}},
        {
            "name": "rl", "recipe": "x", "title": "RL on what reward models score", "model": {"path": "${sft}"},
            "rewards": [{"model": "${helpful}"}], "data": [{"path": "${pairs}/best.jsonl"}],
        },
    ],
}  # fmt: skip


def test_a_chain_is_a_picture_of_what_each_model_was_made_of() -> None:
    nodes = chain_nodes(CHAIN, {"sft": "SFT", "rl": "RL on what reward models score"})
    assert nodes == [
        Node(BASE, "base (tiny)", None),
        Node("sft", "SFT", BASE),
        Node("helpful", "helpful", "sft"),
        Node("pairs", "pairs", "sft"),
        Node("rl", "RL on what reward models score", "sft", ("helpful", "pairs")),
    ]
    shown = {"sft": Shown("supervised fine-tuning", "", "run-1"), "helpful": Shown("reward model", "running")}
    drawing = draw_chain(nodes, shown)
    assert "rl on what reward models score from sft with helpful, pairs" in drawing.lower()
    boxes = re.findall(r'<title>([^:<]+): [^<]*</title><rect x="[\d.-]+" y="([\d.]+)"', drawing)
    top = {name: float(y) for name, y in boxes}
    assert top["base (tiny)"] < top["SFT"] < top["helpful"] == top["pairs"] < top["RL on what reward models score"]
    assert drawing.count('class="arrow uses"') == 2 and drawing.count("<a ") == 1 and 'href="#run-1"' in drawing
    assert drawing.count(">running</text>") == 1 and drawing.count(">not begun</text>") == 3, "base, pairs, rl"
    assert chain_nodes({"stage": "chain", "stages": []}, {}) == []


def test_arrows_pass_between_the_boxes_of_a_row() -> None:
    """From the base past a row of three to a fourth model that is also made of the second."""
    beside = [Node(name, name, BASE) for name in ("a", "b", "c")]
    drawing = draw_chain([Node(BASE, "base", None), *beside, Node("d", "d", BASE, ("b",))], {})
    boxes = [
        tuple(map(float, found)) for found in re.findall(r'<rect x="([\d.-]+)" y="([\d.]+)" width="([\d.]+)"', drawing)
    ]
    (passing,) = re.findall(r'd="(M[^"]*V[^"]*)"', drawing)
    x = float(re.findall(r"([\d.-]+) [\d.-]+V", passing)[0])
    row = sorted(left for left, top, _ in boxes if top == boxes[1][1])
    assert len(row) == 3 and not any(left <= x <= left + boxes[0][2] for left in row)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.sampled_from(["a", "${a}", "${b}/final", "${a.tokens}", "果" * 40]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "model", "path", "rewards"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(JSON, max_size=6), JSON)
def test_any_recipe_of_a_chain_makes_a_picture(stages: list, model: object) -> None:
    nodes = chain_nodes({"stages": stages, "model": model}, {})
    assert not nodes or draw_chain(nodes, {}).startswith("<svg")


def scored(task: str, margin: float, prompt: str = "p") -> dict:
    return {"task": task, "prompt": prompt, "scores": [margin, 0.0], "lengths": [9, 4], "right": 1}


def test_calibration_shows_how_often_a_confidence_is_right() -> None:
    """Margins of log 4: confidence 0.8, of which 0.6 are right; a margin of 0 is half right."""
    sure = [scored("t", 1.3862943611 * (1 if number < 6 else -1), f"p{number}") for number in range(10)]
    calibration, length = score_charts([*sure, scored("t", 0.0, "q"), {"task": "u", "value": 1.0}])
    (line, ideal) = calibration.lines
    assert [*line.points] == [(pytest.approx(0.5), 0.5), (pytest.approx(0.8), pytest.approx(0.6))]
    assert line.bars[1][0] < 0.4 < 0.6 < 0.8 < line.bars[1][1], "ten comparisons say little"
    assert ideal.guide and line.label == "t (11 comparisons)"
    assert [len(of.points) for of in length.lines] == [11, 11] and length.over == "tokens"
    assert 'class="curve whisker c0"' in draw(calibration).drawing


def test_answers_to_one_prompt_are_no_more_certain_than_one() -> None:
    (alone, _), (same, _) = (
        score_charts([scored("t", 2.0 if n // 10 % 3 else -2.0, f"p{n if apart else n // 10}") for n in range(60)])[
            0
        ].lines
        for apart in (True, False)
    )
    assert alone.points == same.points
    assert same.bars[0][0] < alone.bars[0][0] < alone.bars[0][1] < same.bars[0][1]


def test_labelled_and_unjudged_answers_have_their_charts() -> None:
    rows = [{"scores": [2.0], "lengths": [3], "label": True}, {"scores": [1.0], "lengths": [3], "label": False}]
    calibration, length = score_charts(rows)
    assert [len(line.points) for line in length.lines] == [1, 1]
    assert {share for _, share in calibration.lines[0].points} == {0.0, 1.0}
    (only,) = score_charts([{"scores": [0.3], "lengths": [7], "score": 4.0}])
    assert only.title == "Score against length" and only.lines[0].label == "answers"


def test_pairs_that_were_only_ranked_are_calibrated_too() -> None:
    """As the metric pair_accuracy writes them: without lengths, the chosen answer's score first."""
    (chart,) = score_charts([{"task": "t", "chosen": "a", "rejected": "b", "scores": [1.0, 3.0]}])
    assert [share for _, share in chart.lines[0].points] == [0.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["scores", "lengths", "right", "label", "task"]), JSON
                | st.lists(st.floats() | st.integers(), max_size=4) | st.integers(-2, 5))))  # fmt: skip
def test_no_sample_breaks_the_charts_of_scores(samples: list[dict]) -> None:
    for chart in score_charts(samples):
        assert not re.search(r' (d|points|[cr]?[xy][12]?)="[^"]*(nan|inf)', draw(chart).drawing)


def test_held_out_answers_stand_against_the_reward() -> None:
    rows = [{"step": step, "reward": step / 10} for step in range(10)]
    held_out = [{"step": step, "eval_avg@4": value} for step, value in ((0, 0.2), (5, 0.6), (9, 0.4))]
    chart = held_out_chart(collect([*rows, *held_out], []))
    assert chart and [*chart.lines[0].points] == [(0.0, 0.2), (0.5, 0.6), (0.9, 0.4)]
    assert chart.over == "reward in training" and "reward in training 0 to 0.9" in chart.in_words
    assert held_out_chart(collect(rows, [])) is None and held_out_chart(Metrics()) is None


def test_load_over_the_steps_is_by_expert_in_one_layer_and_by_layer_in_several() -> None:
    one = [{"step": step, "expert_load/layer_3/share": [0.5, 0.5 - step / 10, step / 10]} for step in range(3)]
    ((title, drawing),) = expert_maps(collect(one, []))
    assert title == "Load of each expert of layer 3 over the steps"
    assert ">expert</text>" in drawing and "cells without a token: 1" in drawing
    two = [{"step": s, **{f"expert_load/layer_{n}/max_over_mean": 1.0 + s * n for n in (1, 2)}} for s in range(3)]
    ((title, drawing),) = expert_maps(collect(two, []))
    assert title == "Busiest expert of each layer over the steps" and "Highest: 5 times" in drawing


def test_of_a_long_prompt_its_end_is_shown() -> None:
    asked = answers([sample("example " * 400 + "the question?", "x")])
    gallery = across_runs([("a", asked), ("b", asked)])
    assert gallery and gallery.rows[0].prompt.endswith("the question?")
    assert gallery.rows[0].prompt.startswith("(2,013 more characters) … ")


@pytest.mark.parametrize(
    ("samples", "warnings"),
    [
        ([{"completion": "42", "read": "42", "value": 1}], []),
        ([{"completion": "4", "truncated": True}, {"completion": "42", "truncated": False}], []),
        ([{"completion": "4"}, {"completion": "4", "truncated": True}], ["cut off"]),
        ([{"completion": " ", "read": None}], ["no answer found in it", "empty"]),
        ([{"completion": "a", "value": 1}, {"completion": "b", "value": 0.5}], ["worse than in an earlier column"]),
        ([{"completion": "a", "value": 1}, None, {"completion": "b", "value": 0}], ["worse than in an earlier column"]),
        ([{"completion": "a", "value": 0}, {"completion": "b", "value": 1}], []),
        ([None], []),
    ],
)  # fmt: skip
def test_warnings_are_about_the_last_answer(samples: list, warnings: list[str]) -> None:
    assert warnings_of(samples) == warnings


def test_samples_with_warnings_stand_first_and_can_be_shown_alone() -> None:
    def asked(n: int, value: float) -> dict:
        return sample(f"prompt {n}", "x", task="sums" if n % 2 else "words", value=value, truncated=n == 7)

    before = answers([asked(n, 1.0) for n in range(100)])
    after = answers([asked(n, float(n >= 30)) for n in range(100)])
    gallery = across_runs([("before", before), ("after", after)])
    assert gallery and len(gallery.rows) == MAX_PROMPTS
    warned = [bool(row.warnings) for row in gallery.rows]
    assert warned == sorted(warned, reverse=True) and sum(warned) == MAX_PROMPTS // 2
    assert "24 of 100 prompts that 2 runs answered" in gallery.note and "12 from the 30 with a warning" in gallery.note
    kinds, tasks = gallery.filters
    assert kinds[0] == ("warned", "with a warning", 12) and ("w0", "cut off", 1) in kinds
    assert {label: rows for _, label, rows in tasks} == {"sums": 12, "words": 12}
    assert gallery.classes(gallery.rows[0])[0] in ("t0", "t1") and "warned" in gallery.classes(gallery.rows[0])
    assert "warned" not in gallery.classes(gallery.rows[-1])


def test_the_answers_of_a_single_evaluation_are_shown(tmp_path: Path) -> None:
    rows = [sample(f"{n}?", "<b>x</b>", task="sums", value=1.0, truncated=n == 20) for n in range(30)]
    make_stage(tmp_path / "one", "eval", [], rows)
    page = report_page([tmp_path / "one"])
    assert page.count('class="sample t') == MAX_PROMPTS and page.count("&lt;b&gt;x&lt;/b&gt;") == MAX_PROMPTS
    assert "24 of 30 prompts, the first of each task; 1 from the 1 with a warning." in page
    assert page.index(">20?<") < page.index(">0?<") and "Samples side by side" not in page
    make_stage(tmp_path / "two", "eval", [], rows)
    beside = report_page([tmp_path / "one", tmp_path / "two"])
    assert beside.count('class="sample t') == MAX_PROMPTS, "once, side by side"
    make_stage(tmp_path / "other", "eval", [], [sample("else?", "y", task="sums", value=1.0)])
    assert "else?" in report_page([tmp_path / name for name in ("one", "two", "other")])


def test_a_page_has_a_rule_for_each_filter(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 0.0)):
        rows = [sample(f"{n}?", "x", task=f"task {n % 2}", value=value if n < 3 else 1.0) for n in range(6)]
        make_stage(tmp_path / name, "eval", [], rows)
    page = report_page([tmp_path])
    chosen = set(re.findall(r'type="radio" name="[^"]+" value="([^"]+)"', page))
    assert chosen == {"warned", "w3", "t0", "t1"}
    assert all(f'.gallery:has(input[value="{name}"]:checked) .sample:not(.{name})' in page for name in chosen)
    assert page.count('class="sample t') == 6 and page.count(" warned") >= 3


def test_several_models_of_one_recipe_are_one_table(tmp_path: Path) -> None:
    """As `dsv2 eval` writes it for `models`."""
    root = tmp_path / "compare"
    for name in ("rl", "base"):
        make_stage(root / name, "eval", [], [sample("1?", "x", task="right", value=1.0)])
    lines(root / "unused", [])
    recipe = {"stage": "eval", "models": {"base": {"path": "b"}, "rl": {"path": "r"}}}
    change = {"greedy": {"difference": 0.25, "interval": [0.1, 0.4], "differs": True, "shares": True, "n": 40}}
    results = {
        "version": 1, "seed": 0, "stages": {"rl": {"right": 0.75, "n": 40}, "base": {"right": 0.5, "n": 40}},
        "right: base to rl": {"before": "base", "after": "rl", "task": "right", "change": change},
    }  # fmt: skip
    for file, value in (
        ("recipe.yaml", recipe),
        ("manifest.json", {"status": "finished", "seconds": 61.0}),
        ("results.json", results),
    ):
        (root / file).write_text(json.dumps(value))
    text = " ".join(re.sub(r"<[^>]*>", " ", report_page([root]).split("</style>")[1]).split())
    assert "is missing" not in text and "Time 1 min 1 s" in text and "Also in results.json" not in text
    figures = text[text.index("Figures") :]
    assert figures.index("base 50.0 %") < figures.index("rl 75.0 %"), "in the recipe's order"
    assert "+25.0 * +10.0 to +40.0" in figures
