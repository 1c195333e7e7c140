"""Every command that the documentation shows.

The tutorial and the how-tos are followed to the letter, in order, in one folder: the tutorial at toy size, and the
how-tos from its runs. Of their training, and of the commands on all other pages, the very words go through `dsv2
check`, which builds the trainer and tries it on two rows; that each shipped recipe trains is tested in
test_recipes_shipped.py. Released weights are a tiny model under their name.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import sft.stage
from recipes.cli import main
from recipes.recipe.loader import load_recipe
from recipes.runs.new_model import make_model

from ..helpers.browser import asked_for, browser, contrast, needs_browser, overflow, plots, said, show
from ..helpers.chain_launch import smoke
from ..helpers.doc_commands import DOCS, ROOT, Command, commands, files

TUTORIAL = [DOCS / "tutorial.md"]
HOW_TOS = [
    DOCS / "howto" / f"{name}.md"
    for name in ("own_data", "one_card", "reward_models", "two_rl_stages", "evaluate", "serve", "coming_from")
]
FOLLOWED = [*TUTORIAL, *HOW_TOS]
# docs/extending.md has a test of its own; docs/log.md tells of what was.
OTHERS = [
    page
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    if page not in FOLLOWED and page.name not in ("extending.md", "log.md") and any(commands(page))
]
STAGES = ("sft", "reward", "rl", "pairs", "eval")
ADAPTER = "output_dir=runs/mine"  # the one run of the how-tos that is trained: others need an adapter
# The runs that pages go on from, where training was checked only.
STANDS = {
    "runs/helpful": "runs/tiny/reward_helpful",
    "runs/safety": "runs/tiny/reward_safety",
    "runs/rl1": "runs/mine",
    "runs/rl2": "runs/mine",
}
STANDS_OF_OTHERS = {
    "run": "runs/mine",
    "runs/v2_lite_sft_lora": "runs/mine",
    "runs/lora": "runs/first",
    "runs/start": "runs/first",
}
FILES = {
    "chats": ("my", "my_conversations", "a", "b"),
    "problems": ("problems", "held_out"),
    "pairs": ("pairs", "helpful", "safe", "helpful_held_out"),
}
ROWS_OF = {"sft": "my", "reward": "pairs", "preferences": "pairs", "rl": "problems", "pairs": "problems"}
UNNAMED = "plans"  # a folder where the released name is not that of a tiny model: plans are of the real one


class Told(NamedTuple):
    """What a command did."""

    command: Command
    code: int
    text: str


def rows(kind: str) -> list[dict]:
    """Forty rows: conversations, problems or pairs."""
    made = []
    for n in range(40):
        asked, right = {"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}
        pair = {"prompt": asked["content"], "chosen": f"It is {n + 1}.", "rejected": "No."}
        problem = {"question": asked["content"], "answer": f"Add one.\n#### {n + 1}"}
        made.append({"chats": {"messages": [asked, right]}, "pairs": pair, "problems": problem}[kind])
    return made


def prepare(home: Path) -> None:
    """What the readers bring."""
    model = home / "deepseek-ai" / "DeepSeek-V2-Lite"
    make_model(model, "tiny", 0)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    shutil.copytree(model, model.with_name("DeepSeek-V2"))
    (home / UNNAMED).mkdir()
    for kind, names in FILES.items():
        for name in names:
            for place in (home, home / UNNAMED):
                (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(kind)))
    for page in FOLLOWED:
        for name, text in files(page):
            (home / name).write_text(text)
    recipe = (home / "from_trl.yaml").read_text()
    (home / "law.yaml").write_text(recipe)
    (home / "recipe.yaml").write_text(recipe.replace("my.jsonl", "law.jsonl"))
    (home / "law.jsonl").write_text("broken\n")
    (home / "runs" / "tiny_pairs").mkdir(parents=True)
    shutil.copy(home / "pairs.jsonl", home / "runs" / "tiny_pairs")
    shutil.copytree(ROOT / "examples", home / "examples")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    return home


@pytest.fixture
def small(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(home, monkeypatch)


def make_small(home: Path, patch: pytest.MonkeyPatch) -> None:
    """In the readers' folder, with short samples; what waits for requests ends at once."""
    patch.chdir(home)
    patch.setattr(sft.stage, "SAMPLE_TOKENS", 2)
    patch.setattr("recipes.report.watch._Server.serve_forever", interrupt)
    patch.setattr("recipes.serving.server._run", lambda app, listener: None)


def interrupt(server: object) -> None:
    raise KeyboardInterrupt


def dsv2(command: Command, words: list[str]) -> Told:
    text = io.StringIO()
    place = contextlib.chdir(UNNAMED) if words[0] == "plan" else contextlib.nullcontext()
    with place, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(words)
    return Told(command, code, text.getvalue())


# --- the tutorial and the how-tos


def follow(command: Command) -> Told:
    """Run a command as written, but for what makes it small."""
    name, *words = shlex.split(command.line)
    if name == "cat":
        Path(words[1]).write_text(command.text, encoding="utf-8")
        return Told(command, 0, "")
    assert name == "dsv2", f"nothing here runs {command.line}"
    if words[0] in STAGES and words[0] != "eval" and words[1] != "tiny/sft" and ADAPTER not in words:
        told = dsv2(command, ["check", *words[1:]])
        written = words[-1].removeprefix("output_dir=")
        if written in STANDS:
            shutil.copytree(STANDS[written], written)
        return told
    return dsv2(command, toy(words))


def toy(words: list[str]) -> list[str]:
    """A command made small."""
    if words[:2] == ["run", "tiny/chain"]:
        return [*words, *smoke()]
    if words[0] == "chat":
        return [*words, "--max-new-tokens", "8"]
    if words[0] in STAGES:
        several = words[-1] == "compare.yaml"
        return [*words, "--smoke"] if several else [*words[:2], "--smoke", "model.dtype=float32", *words[2:]]
    return words


@pytest.fixture(scope="module")
def told(home: Path) -> dict[Path, list[Told]]:
    """What the commands of each page did."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(home, patch)
        return {page: [follow(one) for one in commands(page) if not one.line.startswith("pip ")] for page in FOLLOWED}


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_each_command_does_what_the_page_says(page: Path, told: dict[Path, list[Told]]) -> None:
    assert told[page]
    for command, code, text in told[page]:
        expected = "\n".join(command.expected)
        assert code == (2 if expected.startswith("error: ") else 0), f"$ {command.line}\n{text}"
        pattern = ".*".join(map(re.escape, expected.split("..."))) if expected else ".*"
        assert re.fullmatch(pattern, text.strip("\n"), re.DOTALL), f"$ {command.line}\n{text}\nis not\n{expected}"


@needs_browser
def test_the_report_of_the_chain_in_a_browser(home: Path, told: dict[Path, list[Told]], tmp_path: Path) -> None:
    """On a screen, on a phone, in the dark, on paper: nothing is fetched, nothing complains, every plot is there."""
    page = (home / "runs" / "tiny" / "report.html").as_uri()
    with browser(tmp_path) as driver:
        driver.get(page)
        assert asked_for(driver) == [page]
        for width, dark in ((1280, False), (1280, True), (390, False)):
            show(driver, width, dark)
            paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert contrast(paper, "rgb(0, 0, 0)" if dark else "rgb(255, 255, 255)") < 1.2
            seen = plots(driver)
            assert len(seen) > 60 and overflow(driver) == 0
            for plot in seen:
                assert plot["shapes"] and plot["width"] > 250 and plot["height"] > 50, plot
                assert not plot["cut"] and not plot["crossed"], plot
                assert all(contrast(paper, colour) >= 3 for colour in plot["strokes"]), plot
        show(driver, 717, dark=True, media="print")  # what A4 leaves between its margins
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert overflow(driver) == overflow(driver, ".scroll") == 0, "what is cut off cannot be scrolled on paper"
        assert asked_for(driver) == said(driver) == []


# --- all other pages


def is_there(words: list[str]) -> bool:
    """Whether a program that is not run here exists."""
    match words:
        case ["python", "-m", module, *_]:
            return importlib.util.find_spec(module) is not None
        case ["make", target, *_]:
            return re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
        case [program, *_]:
            scripts = importlib.metadata.entry_points(group="console_scripts", name=program)
            return program == "pip" or bool(scripts)
    return False


def tried(command: Command, words: list[str], number: int) -> Told:
    """A command of `dsv2` on small rows; what would train or answer is checked."""
    if words[0] == "run":  # test_recipes_shipped.py tries the stages of every chain
        load_recipe(Path(words[1]), words[2:])
        return Told(command, 0, "")
    if words[0] in (*STAGES, "check"):
        words = [word for word in words if not word.startswith("output_dir=")]
        launch = words.index("--processes") if "--processes" in words else len(words)
        return dsv2(command, ["check", words[1], *stand_ins(words), *words[2:launch], f"output_dir=tried/{number}"])
    return dsv2(command, toy([*words, "--prompt", "1?"]) if words[0] == "chat" else words)


def stand_ins(words: list[str]) -> list[str]:
    """Overrides that replace the data of a shipped recipe, which are large or on the hub."""
    recipe = load_recipe(Path(words[1])).recipe if "/" in words[1] else None
    if recipe is None or recipe.stage not in ROWS_OF:
        return []
    kind = "preferences" if getattr(recipe, "method", "grpo") != "grpo" else recipe.stage
    own = any(word.startswith("eval_data=") for word in words) or "eval_data" not in type(recipe).model_fields
    held_out = [] if own else ["eval_data=[]", "training.eval_strategy=no"]
    return [f"data=[{{path: {ROWS_OF[kind]}.jsonl}}]", *held_out]


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_commands_of_other_pages_are_right(page: Path, home: Path, told: object, small: None) -> None:
    for made, of in STANDS_OF_OTHERS.items():
        if not Path(made).exists():
            shutil.copytree(of, made)
    for made in ("out", "tried", "merged", "served", "back"):
        shutil.rmtree(made, ignore_errors=True)
    for number, command in enumerate(commands(page)):
        name, *words = shlex.split(command.line, comments=True)
        if name != "dsv2":
            assert is_there([name, *words]), command.line
            continue
        _, code, text = tried(command, words, number)
        wrong = bool(command.expected) and command.expected[0].startswith("error: ")
        assert code == (2 if wrong else 0), f"$ {command.line}\n{text}"
