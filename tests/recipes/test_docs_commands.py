"""The tutorial and the how-tos, followed to the letter: every command, in order, in one folder.

The tutorial is run at toy size; its runs are what the how-tos go on from. Released weights are a tiny model under their
name. Training on the how-tos' pages is checked, by a `dsv2 check` that builds the trainer and tries it on two rows;
that each shipped recipe trains is tested in test_recipes_shipped.py.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import sft.stage
from recipes.cli import main
from recipes.runs.new_model import make_model

from ..helpers.browser import asked_for, browser, contrast, needs_browser, overflow, plots, said, show
from ..helpers.chain_launch import smoke

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "tutorial",
    "howto/own_data",
    "howto/one_card",
    "howto/reward_models",
    "howto/two_rl_stages",
    "howto/evaluate",
    "howto/serve",
    "howto/coming_from",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLING = "pip install -c constraints.txt -e ."  # as `make` has done it where this runs
TRAINS = ("sft", "reward", "rl", "pairs")
ADAPTER = "output_dir=runs/mine"  # the one run of the how-tos that is trained: others need an adapter
# Where training was checked only: the run that other pages go on from.
STANDS = {
    "runs/helpful": "tiny/reward_helpful",
    "runs/safety": "tiny/reward_safety",
    "runs/rl1": "mine",
    "runs/rl2": "mine",
}


UNNAMED = "plans"  # a folder where the released name is not that of a tiny model: plans are of the real one


class Command(NamedTuple):
    """A command of a page: its line, what it is fed, and the lines that follow it."""

    line: str
    text: str
    expected: list[str]


class Told(NamedTuple):
    """What a command did."""

    command: Command
    code: int
    text: str


def commands(page: str) -> Iterator[Command]:
    for language, block in BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] if language == "console" else ():
            line, *rest = part.splitlines()
            written = line.endswith("<<'END'")
            text = "".join(f"{row}\n" for row in rest[: rest.index("END")]) if written else ""
            yield Command(line, text, [] if written else rest)


def rows(kind: str) -> list[dict]:
    """Twenty rows: conversations, problems or pairs."""
    made = []
    for n in range(20):
        asked, right = {"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}
        pair = {"prompt": asked["content"], "chosen": f"It is {n + 1}.", "rejected": "No."}
        problem = {"question": asked["content"], "answer": f"Add one.\n#### {n + 1}"}
        made.append({"chats": {"messages": [asked, right]}, "pairs": pair, "problems": problem}[kind])
    return made


FILES = {
    "my": "chats",
    "problems": "problems",
    "held_out": "problems",
    "helpful": "pairs",
    "safe": "pairs",
    "helpful_held_out": "pairs",
}


def prepare(home: Path) -> None:
    """What the readers of the how-tos bring."""
    model = home / "deepseek-ai" / "DeepSeek-V2-Lite"
    make_model(model, "tiny", 0)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    (home / UNNAMED).mkdir()
    for name, kind in FILES.items():
        for place in (home, home / UNNAMED):
            (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(kind)))
    for page in PAGES:
        for language, block in BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
            if language == "yaml" and (named := re.match(r"# (\w+\.yaml)\n", block)):
                (home / named[1]).write_text(block)


def run(command: Command) -> Told:
    """Run a command as written, but for what makes it small."""
    name, *words = shlex.split(command.line)
    if name == "cat":
        Path(words[1]).write_text(command.text, encoding="utf-8")
        return Told(command, 0, "")
    assert name == "dsv2", f"nothing here runs {command.line}"
    checked = words[0] in TRAINS and words[1] != "tiny/sft" and ADAPTER not in words
    if words[:2] == ["run", "tiny/chain"]:
        words += smoke()
    elif checked:
        words = ["check", *words[1:]]
    elif words[0] in (*TRAINS, "eval", "chat"):
        words = toy(words)
    text = io.StringIO()
    place = contextlib.chdir(UNNAMED) if words[0] == "plan" else contextlib.nullcontext()
    with place, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(words)
    written = words[-1].removeprefix("output_dir=")
    if checked and written in STANDS:
        shutil.copytree(Path("runs") / STANDS[written], written)
    return Told(command, code, text.getvalue())


def toy(words: list[str]) -> list[str]:
    """A command made small."""
    if words[0] == "chat":
        return [*words, "--max-new-tokens", "8"]
    if words[-1] == "compare.yaml":
        return [*words, "--smoke"]
    return [*words[:2], "--smoke", "model.dtype=float32", *words[2:]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    prepare(home)
    return home


@pytest.fixture(scope="module")
def told(home: Path) -> dict[str, list[Told]]:
    """What the commands of each page did."""
    found: dict[str, list[Told]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 2)
        patch.setattr("recipes.report.watch._Server.serve_forever", lambda server: signal_interrupt())
        patch.setattr("recipes.serving.server._run", lambda app, listener: None)
        for page in PAGES:
            found[page] = [run(command) for command in commands(page) if command.line != INSTALLING]
    return found


def signal_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("page", PAGES)
def test_each_command_does_what_the_page_says(page: str, told: dict[str, list[Told]]) -> None:
    assert told[page]
    for command, code, text in told[page]:
        expected = "\n".join(command.expected)
        assert code == (2 if expected.startswith("error: ") else 0), f"$ {command.line}\n{text}"
        pattern = ".*".join(map(re.escape, expected.split("..."))) if expected else ".*"
        assert re.fullmatch(pattern, text.strip("\n"), re.DOTALL), f"$ {command.line}\n{text}\nis not\n{expected}"


@needs_browser
def test_the_report_of_the_chain_in_a_browser(home: Path, told: dict[str, list[Told]], tmp_path: Path) -> None:
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
