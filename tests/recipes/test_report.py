"""The report page: what stands on it, what it must never hold, and what it says of broken runs."""

import json
import os
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations.errors import ToolkitError
from recipes.lock import hold_directory
from recipes.report.report import write_report
from recipes.report.samples import answers, within_run

from ..helpers.run_files import lines, make_stage, sample

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


RESULTS = {
    "seed": 11,
    "stages": {
        "base": {"exact_match": 0.0, "exact_match_t1": 0.001, "n": 1000},
        "rl_reasoning": {"exact_match": 0.843, "exact_match_t1": 0.801, "n": 1000},
        "sft": {"exact_match": 0.612, "exact_match_t1": 0.55, "n": 1000},
        "rl_preference": {"exact_match": 0.84, "n": 1000, "refusal_unsafe": 0.982, "refusal_unsafe_n": 500},
    },
    "reward_models": {"helpful": {"pair_accuracy": 0.977, "n": 600}},
    "alignment_tax": {
        "task": "exact_match",
        "before": "eval_rl_reasoning",
        "after": "eval_rl_preference",
        "change": {"greedy": {"difference": -0.003, "standard_error": 0.01, "n": 1000}},
    },
    "seconds": 431.0,
    "peak_memory_gb": 2.345,
}


CHAIN = {
    "stage": "chain",
    "stages": [
        {"name": "eval_base", "recipe": "x", "results": "stages.base", "title": "Base"},
        {"name": "sft", "recipe": "x", "title": "SFT"},
        {"name": "eval_sft", "recipe": "x", "results": "stages.sft"},
        {"name": "rl_reasoning", "recipe": "x", "title": "RL stage 1"},
        {"name": "eval_rl_reasoning", "results": "stages.rl_reasoning", "model": {"path": "${rl_reasoning}"}},
        {"name": "eval_rl_preference", "results": "stages.rl_preference", "title": "RL stage 2"},
    ],
    "task_titles": {"refusal_unsafe": "Unsafe refused", "exact_match": "Exact match"},
    "compare": [{"name": "alignment_tax", "title": "Alignment tax of RL stage 2"}],
}


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    root = tmp_path / "chain"
    train = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3} for step in range(1, 50)]
    make_stage(root / "sft", "sft", [*train, {"step": 50, "eval_loss": 0.75}])
    for name, answer in (("eval_sft", "the SFT answer"), ("eval_rl_reasoning", "the RL answer")):
        make_stage(root / name, "eval", [], [sample("What is 1 + 2?", answer, task="exact_match", value=1.0)])
    (root / "recipe.yaml").write_text(json.dumps(CHAIN))
    (root / "manifest.json").write_text("{}")
    (root / "results.json").write_text(json.dumps(RESULTS))
    return root


def page_of(*runs: Path) -> str:
    return write_report(list(runs)).read_text(encoding="utf-8")


def visible(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.split("</style>")[1]).split())


class Tags(HTMLParser):
    """Every element of a page, its attributes, and whether all were closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_figures_of_results_json_stand_on_the_page(chain: Path) -> None:
    text = visible(page_of(chain))
    for expected in (
        "61.2 %",
        "84.3 %",
        "98.2 %",
        "97.7 %",
        "7 min 11 s",
        "2.35 GB",
        "Seed 11",
        "n = 1,000",
        "n = 500",
    ):
        assert expected in text
    assert "58.1 to 64.2" in text  # Wilson, 612 of 1,000
    assert "Alignment tax of RL stage 2 Exact match, RL stage 1 → RL stage 2" in text
    assert "−0.3 −2.3 to +1.7" in text
    assert text.index("61.2 %") < text.index("84.3 %"), "SFT stands before RL whatever the order in the file"
    assert "Targets" not in text


def test_targets_are_shown_only_when_the_results_state_them(chain: Path) -> None:
    targets = [{"name": "SFT half right", "target": 0.5, "value": 0.612, "met": True}, {"name": "B", "met": False}]
    (chain / "results.json").write_text(json.dumps({**RESULTS, "targets": targets}))
    text = visible(page_of(chain))
    assert "SFT half right 0.5 0.612 met" in text
    assert "B – – not met" in text


def test_what_no_table_knows_is_listed(chain: Path) -> None:
    (chain / "results.json").write_text(json.dumps({**RESULTS, "extra": {"deep": [1, 2]}}))
    assert "extra.deep 1, 2" in visible(page_of(chain))


def test_a_value_that_is_no_share_is_marked(chain: Path) -> None:
    (chain / "results.json").write_text(json.dumps({"stages": {"sft": {"exact_match": 61.2, "n": 10}, "odd": 3}}))
    text = visible(page_of(chain))
    assert "61.2 not between 0 and 1" in text
    assert "stages.odd is not an object" in text


def test_samples_of_one_prompt_stand_side_by_side_under_stage_names(chain: Path) -> None:
    text = visible(page_of(chain))
    assert re.search(r"What is 1 \+ 2\? SFT the SFT answer exact_match 1 .*the RL answer", text)
    assert "1 of 1 prompt that 2 runs answered" in text


def test_the_contents_list_each_stage_with_its_training_and_its_evaluation(chain: Path) -> None:
    make_stage(chain / "reward_helpful", "reward", [{"step": 1, "margin": 1}])
    make_stage(chain / "eval_reward_helpful", "eval", [])
    recipe = json.loads((chain / "recipe.yaml").read_text())
    recipe["stages"] += [
        {"name": "reward_helpful", "recipe": "x"},
        {"name": "eval_reward_helpful", "results": "reward_models.helpful", "model": {"path": "${reward_helpful}"}},
    ]
    (chain / "recipe.yaml").write_text(json.dumps(recipe))
    page = page_of(chain)
    contents = visible(page[page.index("<style>") : page.index("</nav>")])
    assert (
        "SFT supervised fine-tuning evaluation RL stage 1 evaluation reward_helpful reward model evaluation" in contents
    )
    links = re.findall(r'<a href="#([^"]+)"', page[: page.index("</nav>")])
    assert len(links) == len(set(links)) and all(f'id="{link}"' in page for link in links)
    assert page.count('<section class="run"') == len([link for link in links if link.startswith("run-")]) == 6


def test_nothing_is_fetched_and_nothing_runs(chain: Path) -> None:
    page = page_of(chain)
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    tags = parse(page)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags.seen}
    for _, attributes in tags.seen:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in page


def test_html_in_every_input_is_escaped(tmp_path: Path) -> None:
    run = make_stage(
        tmp_path / "a<b>",
        "rl",
        [{"step": s, "reward": s, f"rewards/{ATTACK}/mean": s, ATTACK: s} for s in (1, 2)] + [{ATTACK: ATTACK}],
        [sample(ATTACK, ATTACK, step=s, reference=ATTACK, rewards={ATTACK: 1}, task=ATTACK) for s in (1, 2)],
    )
    (run / "recipe.yaml").write_text(f"stage: rl\nx: {json.dumps(ATTACK)}\n")
    (run / "manifest.json").write_text(json.dumps({ATTACK: ATTACK, "command": ATTACK + "\n" + ATTACK}))
    lines(run / "rejected.jsonl", [{"reason": ATTACK}])
    (run / "results.json").write_text(json.dumps({"stages": {ATTACK: {ATTACK: ATTACK}}, ATTACK: ATTACK}))
    other = make_stage(tmp_path / "b", "eval", [], [sample(ATTACK, ATTACK, task=ATTACK)])
    page = page_of(run, other)
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") > 10
    assert not {"script", "img", "b<"} & {tag for tag, _ in parse(page).seen}


@pytest.mark.parametrize(
    "attack",
    [
        "</title><script>x</script>",
        "</style><script>x</script>",
        "</svg></text></details><form action=//evil><input>",
        '"><svg onload=alert(1)><animate onbegin=alert(1)>',
        "' onmouseover='alert(1)",
        "--><base href=//evil><!--",
        "<a href=javascript:alert(1)>x</a>",
        "<meta http-equiv=refresh content=0;url=//evil>",
        "<iframe srcdoc='&lt;script&gt;'>",
        "{{ 7*7 }}{% import os %}",
        "&lt;script&gt;\x1b]0;x\x07\u202e",
    ],
)
def test_no_text_leaves_its_place(attack: str, tmp_path: Path) -> None:
    """The page has the elements that it has with a plain word in the place of each text."""
    shapes = []
    for name, text in (("a", attack), ("b", "word")):
        run = make_stage(
            tmp_path / name / text.replace("/", "-"),
            "rl",
            [{"step": s, "loss": s, f"rewards/{text}/mean": s, text: s, f"eval_{text}_loss": s} for s in (1, 2)],
            [sample(text, text, step=s, reference=text, rewards={text: 1}, task=text, decoding=text) for s in (1, 2)],
        )
        (run / "recipe.yaml").write_text(f"stage: rl\nx: {json.dumps(text)}\n")
        (run / "manifest.json").write_text(
            json.dumps({"status": text, "command": text, "diff": f"{text}\n", text: text})
        )
        lines(run / "rejected.jsonl", [{"reason": text}])
        figures = {"stages": {text: {text: 0.5, "exact_match": 0.25}}, "reward_models": {text: {"pair_accuracy": 0.5}}}
        (run / "results.json").write_text(json.dumps({**figures, text: text}))
        page = page_of(run)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
        shapes.append([(tag, sorted(attributes)) for tag, attributes in parse(page).seen])
    assert shapes[0] == shapes[1]


def test_curves_have_axes_legends_and_words(tmp_path: Path) -> None:
    metrics = [
        {"step": s, "loss": 4.0 / s, "reward": s / 40, "rewards/safety/mean": s / 80, "kl": s / 1000, "other/key": s}
        for s in range(1, 41)
    ]
    metrics += [{"step": 40, "eval_loss": 0.5, "completions/mean_length": 12.0}]
    page = page_of(make_stage(tmp_path / "run", "rl", metrics))
    text = visible(page)
    for title in ("Loss", "Reward components", "KL to the reference", "Completion length", "other/key"):
        assert title in text
    assert "nats per token" in text and "optimizer step" in text and "held-out 0.5" in text
    assert "Line: mean over 5 values." in text
    labels = [attributes["aria-label"] for tag, attributes in parse(page).seen if attributes.get("role") == "img"]
    assert any("held-out from 0.5 to 0.5 over steps 40 to 40" in (label or "") for label in labels)


def test_expert_load_is_drawn_layer_by_layer(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "expert_load/dead": 1,
            "expert_load/layer_1/share": [0.25] * 4,
            "expert_load/layer_2/share": [0.0, 0.7, 0.15, 0.15],
            "expert_load/layer_2/max_over_mean": 2.8,
            "expert_load/layer_2/dead": 1,
        }
        for step in (1, 9)
    ]
    page = page_of(make_stage(tmp_path / "run", "sft", rows))
    assert "Load of each expert, step 9. Highest: 2.8 times an equal share in layer 2; cells without a token: 1" in page
    assert "At the last step: 1 in layer 2." in page
    assert page.count('class="load dead"') == 3  # one in the legend, one in each map


def test_missing_files_are_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("stage: sft\n")
    text = visible(page_of(run))
    for name in ("manifest.json", "metrics.jsonl", "samples.jsonl", "final"):
        assert f"{name} is missing" in text
    assert "Missing or broken (4)" in text


def test_broken_pieces_are_counted(tmp_path: Path) -> None:
    run = make_stage(tmp_path / "run", "sft", [{"step": 1, "loss": 2.5}])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo\n[1]\n\xff\xfe\n{"step": 3, "loss": NaN}\n{"step": 4, "loss": null}\n{"x": 1}\n')
    (run / "manifest.json").write_text("{")
    (run / "recipe.yaml").write_text("stage: [\n")
    text = visible(page_of(run))
    assert "3 unreadable lines in metrics.jsonl (lines 2, 3, 4)" in text
    assert "loss: 2 NaN or infinite values not drawn, the first at step 3" in text
    assert "1 line without a step in metrics.jsonl" in text
    assert "manifest.json cannot be read" in text
    assert "recipe.yaml:" in text


def test_steps_logged_again_after_a_resume_count_once(tmp_path: Path) -> None:
    run = make_stage(
        tmp_path / "run", "sft", [{"step": 1, "loss": 9.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1}]
    )
    page = page_of(run)
    assert "1 step logged more than once" in page
    assert "train from 2 to 1 over steps 1 to 2" in page


def test_rows_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    run = make_stage(tmp_path / "run", "sft", [{"step": 1, "loss": 1}])
    lines(run / "rejected.jsonl", [{"reason": "no assistant"}, {"reason": "no assistant"}, {"reason": "too long"}])
    text = visible(page_of(run))
    assert "no assistant 2 rows" in text and "too long 1 row" in text


def test_text_that_utf8_or_html_cannot_hold(tmp_path: Path) -> None:
    run = make_stage(tmp_path / "run", "sft", [], [sample("p", "\ud800\x00\u202eok", step=s) for s in (0, 1)])
    page = page_of(run)
    assert "\ufffd\ufffd\ufffdok" in page and "\x00" not in page


def test_a_folder_of_runs_is_no_chain_but_its_chains_are(chain: Path, tmp_path: Path) -> None:
    make_stage(tmp_path / "a_run", "sft", [{"step": 1, "loss": 1}])
    text = visible(write_report([tmp_path]).read_text(encoding="utf-8"))
    assert "5 runs" in text and "results.json is missing" not in text
    contents = text[text.index("the files they wrote") : text.index("Seed")]
    assert "a_run supervised fine-tuning chain chain SFT supervised fine-tuning evaluation" in contents


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_what_is_no_run_is_an_error_that_names_it(tmp_path: Path, make) -> None:
    make(tmp_path / "thing")
    with pytest.raises(ToolkitError, match="thing"):
        write_report([tmp_path / "thing"])


def test_no_runs_and_a_directory_as_target_are_errors(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="no run to report on"):
        write_report([])
    with pytest.raises(ToolkitError, match="is a directory"):
        write_report([chain], tmp_path)


def test_the_page_is_replaced_whole_or_not_at_all(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_report([chain])
    assert first == chain / "report.html"
    before = first.read_bytes()
    assert write_report([chain]).read_bytes() == before, "the same runs give the same bytes"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (chain / "results.json").write_text("{}")
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ToolkitError, match="No space left"):
        write_report([chain])
    assert first.read_bytes() == before
    assert sorted(path.name for path in chain.glob(".*")) == []


def test_a_killed_run_is_said_to_have_stopped_with_the_time_it_took(tmp_path: Path) -> None:
    """Nobody holds the lock of its directory; while somebody does, it is running."""
    chain, run = tmp_path / "out", tmp_path / "out" / "sft"
    make_stage(run, "sft", [{"step": 1, "loss": 1}])
    (chain / "recipe.yaml").write_text("stage: chain\n")
    for folder, resumed in ((run, [{"at": "2026-01-01T00:01:00+00:00"}]), (chain, [])):
        started = {"status": "running", "started": "2026-01-01T00:00:00+00:00", "resumed": resumed, "seconds": 0.0}
        (folder / "manifest.json").write_text(json.dumps({**started, "seconds": 5.0 if resumed else 0.0}))
        for path in folder.iterdir():
            os.utime(path, (0, 1767225690))  # half a minute after the resume
    text = visible(page_of(chain))
    assert text.count("stopped: it was killed, or its machine went down; the same command resumes it") >= 2
    assert "Time 35.0 s" in text and "Time 0.0 s" not in text
    with hold_directory(run):
        live = visible(page_of(chain))
    assert f"running: process {os.getpid()} on " in live


def test_several_chains_get_a_table_of_means(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "second"
    make_stage(other / "sft", "sft", [{"step": 1, "loss": 1}])
    (other / "results.json").write_text(json.dumps({"seed": 12, "stages": {"sft": {"exact_match": 0.712, "n": 1000}}}))
    out = write_report([chain, other], tmp_path / "sub" / "page.html")
    text = visible(out.read_text(encoding="utf-8"))
    assert "66.2 % 61.2 to 71.2, 2 chains" in text
    assert "seeds: 11, 12" in text
    means = text[text.index("All chains") : text.index("seeds: 11")]
    assert means.index("SFT") < means.index("RL stage 1")
    assert "second/sft" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KNOWN = ("stages", "reward_models", "targets", "sft", "exact_match", "n", "change", "before", "after", "greedy", "code")
LOGGED = ("step", "loss", "reward", "task", "prompt", "completion", "rewards", "expert_load/layer_1/share", "reason")
OBJECT = st.dictionaries(st.sampled_from(KNOWN), JSON | st.dictionaries(st.sampled_from(KNOWN), JSON), max_size=5)


@settings(max_examples=40, deadline=None)
@given(OBJECT, st.lists(st.dictionaries(st.sampled_from(LOGGED), JSON, max_size=5), max_size=4))
def test_no_json_breaks_the_page(found: dict, rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        for file in ("metrics.jsonl", "samples.jsonl", "rejected.jsonl"):
            lines(run / file, rows)
        for file in ("results.json", "manifest.json", "recipe.yaml"):
            (run / file).write_text(json.dumps(found))
        parse(page_of(run))


def test_no_torch_is_imported() -> None:
    code = "import sys, recipes.report; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_reason_for_a_reward_stands_beside_it() -> None:
    rewards = {"rewards": {"math": 1.0, "helpful": 0.25}, "reasons": {"math": "'42' equals the reference"}}
    gallery = within_run(answers([sample("6 * 7?", "42", step=step, **rewards) for step in (1, 2)]))
    assert gallery is not None
    for column in gallery.rows[0].completions:
        assert column is not None and column.marks == ["math 1 ('42' equals the reference)", "helpful 0.25"]
    odd = within_run(answers([sample("6 * 7?", "42", step=step, rewards={"math": 1}, reasons="x") for step in (1, 2)]))
    assert odd is not None and odd.rows[0].completions[0] is not None and odd.rows[0].completions[0].marks == ["math 1"]
