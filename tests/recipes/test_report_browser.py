"""The report in headless Chromium: what its filters show, and a watched page that stays as it was left."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.listening import listen
from recipes.lock import hold_directory
from recipes.report.report import write_report
from recipes.report.watch import LivePage, _Server

from ..helpers.browser import Driver, asked_for, browser, needs_browser, said, until
from ..helpers.run_files import make_stage, sample

pytestmark = needs_browser
VISIBLE = """
const rows = [...document.querySelector(".gallery").querySelectorAll(".sample")];
return rows.filter((row) => row.offsetParent !== null).map((row) => row.querySelector(".prompt").textContent);
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_filters_show_rows_of_a_task_with_a_warning(driver: Driver, tmp_path: Path) -> None:
    for name, worse in (("a", ()), ("b", (1, 2, 5))):
        rows = [sample(f"prompt {n}", "x", task=f"task {n % 2}", value=float(n not in worse)) for n in range(6)]
        make_stage(tmp_path / name, "eval", [], rows)
    driver.get(write_report([tmp_path / "a", tmp_path / "b"]).as_uri())
    everything = driver.execute_script(VISIBLE)
    assert sorted(everything[:3]) == ["prompt 1", "prompt 2", "prompt 5"] and len(everything) == 6

    def choose(label: str) -> list[str]:
        driver.find_element("xpath", f"(//div[@class='gallery'])[1]//label[contains(., '{label}')]").click()
        return sorted(driver.execute_script(VISIBLE))

    assert choose("with a warning") == ["prompt 1", "prompt 2", "prompt 5"]
    assert choose("task 1") == ["prompt 1", "prompt 5"]
    driver.find_element("xpath", "(//div[@class='gallery'])[1]//label[.='all']").click()
    assert sorted(driver.execute_script(VISIBLE)) == ["prompt 1", "prompt 3", "prompt 5"], "the task is still chosen"
    assert said(driver) == []


def test_a_watched_page_shows_new_steps_and_stays_as_it_was_left(driver: Driver, tmp_path: Path) -> None:
    rows = [sample(f"prompt {n}", "x", step=step, truncated=n < 2) for n in range(4) for step in (0, 1)]
    run = make_stage(tmp_path / "run", "sft", [{"step": step, "loss": 3 / step} for step in (1, 2)], rows)
    (run / "manifest.json").write_text(json.dumps({"status": "running"}))
    with hold_directory(run), listen("127.0.0.1", 0) as listener, _Server(LivePage([run]), listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        driver.get(home)
        driver.execute_script("document.querySelector('details:has(.gallery)').open = true")
        driver.find_element("xpath", "//label[contains(., 'with a warning')]").click()
        driver.execute_script("scrollTo(0, 300)")
        asked_for(driver)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
        until(driver, lambda page: "over steps 1 to 3" in page.page_source)
        assert driver.execute_script("return [document.querySelectorAll('details[open]').length, scrollY]") == [1, 300]
        assert driver.execute_script(VISIBLE) == ["prompt 0", "prompt 1"]
        assert {*asked_for(driver)} == {home} and said(driver) == []
        server.shutdown()
    until(driver, lambda page: "The command has ended" in page.find_element("tag name", "footer").text)
