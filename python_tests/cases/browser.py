"""The system's Chromium, headless, and a page in it that notes errors and requests."""

import contextlib
import shutil
import time
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Visit(NamedTuple):
    """A page that is open."""

    page: object  # playwright's
    errors: list  # of the console and of scripts
    requests: list  # addresses other than the page's own

    def text(self, selector):
        """What a reader sees there, on one line."""
        return " ".join(self.page.locator(selector).first.inner_text().split())


@contextlib.contextmanager
def browser():
    """Skips the test where there is no Chromium or no playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as driver:
        # In a container Chromium may have neither its sandbox nor shared memory.
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


def visit(found, path, *, ready="section.explore[data-ready]", **options):
    """Open a page's file in a context of its own, until its explorer is there."""
    page = found.new_context(**options).new_page()
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector(ready, timeout=60_000, state="attached")
    return Visit(page, errors, [url for url in requests if url != path.as_uri() and not url.startswith("data:")])


def settled(page, expression, seconds=15):
    """Wait until an expression holds. Playwright's own waiting evaluates text in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def seconds_to_filter(page, label, text, shown):
    """From typing `text` to the first frame in which every element of `shown` holds it, as the page's own clock has it."""
    return page.evaluate(
        """async ([label, text, shown]) => {
            const input = [...document.querySelectorAll('label')].find(one => one.textContent.trim() === label).control;
            const start = performance.now();
            input.value = text;
            input.dispatchEvent(new Event('input'));
            const cells = () => [...document.querySelectorAll(shown)];
            do await new Promise(requestAnimationFrame);
            while (!cells().length || !cells().every(one => one.textContent.includes(text)));
            return (performance.now() - start) / 1000;
        }""",
        [label, text, shown],
    )
