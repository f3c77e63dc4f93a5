"""A headless Chromium to look at pages with; tests that need it are skipped where there is none.

`QGRAPH_SCREENSHOTS=folder` keeps what the tests saw there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def missing() -> str:
    """Why there is no browser here; an empty string if there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "Selenium is not installed: pip install 'qgraph[test]'"
    if not any(map(shutil.which, NAMES)):
        return "Chromium is not installed: apt-get install chromium chromium-driver"
    if not shutil.which("chromedriver"):
        return "chromedriver is not installed: apt-get install chromium-driver"
    return ""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser's driver."""
    if reason := missing():
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, NAMES) if path)
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_argument("--window-size=1600,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page of qgraph in a browser."""

    def __init__(self, driver: Any, path: Path) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.driver = driver
        self._wait = WebDriverWait(driver, 30)
        driver.get_log("browser")  # what other pages said
        driver.get(path.as_uri())
        self._wait.until(lambda _: self.js("return document.documentElement.dataset.ready"))

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def texts(self, css: str) -> list[str]:
        """What the elements say, those of drawings too."""
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css
        )

    def count(self, css: str) -> int:
        return len(self.texts(css))

    def wait(self, css: str) -> None:
        self._wait.until(lambda _: self.count(css))

    def click(self, css: str) -> None:
        """Press what is first of `css`, where it is on the screen or not."""
        self.js(
            "document.querySelector(arguments[0]).dispatchEvent("
            "new MouseEvent('click', {bubbles: true, view: window}))",
            css,
        )

    def press(self, key: str) -> None:
        self.js(
            "document.activeElement.blur(); document.body.dispatchEvent("
            "new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))",
            key,
        )

    def search(self, words: str) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        field = self.driver.find_element(By.CSS_SELECTOR, ".search input")
        field.clear()
        field.send_keys(words)
        self.wait(".found.open .count")
        field.send_keys(Keys.ENTER)

    def errors(self) -> list[str]:
        """What the page complained of on its console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("QGRAPH_SCREENSHOTS")
        if folder:
            self.js("return new Promise(done => setTimeout(done, 400))")  # movements end
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))
