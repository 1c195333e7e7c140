"""Headless Chromium for tests of pages: Debian's packages chromium and chromium-driver, driven by Selenium."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Driver = Any  # Selenium's Chrome; it is imported where a browser starts, since tests also run where there is none
PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
MISSING += [] if find_spec("selenium") else ["selenium"]
# Skipped without a browser, but with DSV2_TEST_BROWSER=1 (as CI has it), where that is a failure.
needs_browser = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("DSV2_TEST_BROWSER") != "1", reason=f"not installed: {', '.join(MISSING)}"
)
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot have; the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Of each plot: its size, what is drawn, with which colours, and which of its texts are cut or lie on one another.
LOOK = """
for (const details of document.querySelectorAll("details")) details.open = true;
const shown = (shape) => {
  const {fill, stroke, strokeLinecap} = getComputedStyle(shape), box = shape.getBoundingClientRect();
  const spot = stroke !== "none" && strokeLinecap === "round" && shape.getTotalLength;  // a dot has no size of its own
  return (fill !== "none" || stroke !== "none") && (box.width + box.height > 0 || spot);
};
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
return [...document.querySelectorAll("svg[role=img]")].map((svg) => {
  const frame = svg.getBoundingClientRect();
  const shapes = [...svg.querySelectorAll("polyline, path, rect, circle")].filter(shown);
  const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  const cut = texts.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2);
  const crossed = texts.filter(([, box], place) => texts.slice(0, place).some(([, other]) => meet(box, other)));
  return {
    label: svg.getAttribute("aria-label"), width: frame.width, height: frame.height, shapes: shapes.length,
    strokes: [...new Set([...svg.querySelectorAll(".curve")].map((curve) => getComputedStyle(curve).stroke))],
    cut: cut.map(([text]) => text), crossed: crossed.map(([text]) => text),
  };
});
"""


@contextmanager
def browser(profile: Path) -> Iterator[Driver]:
    """A browser with an empty profile, which it leaves in `profile`."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(PROGRAMS["chromium"])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, ChromeService(str(PROGRAMS["chromedriver"])))
    try:
        driver.get("about:blank")
        asked_for(driver)  # what the browser's own first page took
        yield driver
    finally:
        driver.quit()


def said(driver: Driver) -> list[str]:
    """What the page has written to the console since the last call: errors, warnings, refusals of its policy."""
    return [entry["message"] for entry in driver.get_log("browser")]


def asked_for(driver: Driver) -> list[str]:
    """The addresses of all requests since the last call, the page's own among them."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def show(driver: Driver, width: int = 1280, dark: bool = False, media: str = "screen") -> None:
    """How the page is shown from here on."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": scheme})


def plots(driver: Driver) -> list[dict[str, Any]]:
    """What is to be seen of each plot, with all that is folded opened."""
    return driver.execute_script(LOOK)


def until(driver: Driver, holds: Callable[[Driver], bool]) -> None:
    """Wait until something holds of the page."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 30).until(holds)


def overflow(driver: Driver, of: str = "html") -> int:
    """How many pixels are beside what can be seen of the page, or of the elements that match a selector."""
    found = "[...document.querySelectorAll(arguments[0])].map((one) => one.scrollWidth - one.clientWidth)"
    return driver.execute_script(f"return Math.max(0, ...{found})", of)


def contrast(one: str, other: str) -> float:
    """The contrast of two CSS colours rgb(...), by WCAG 2: 1 to 21."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
