"""A headless Chromium (Debian's, driven by Playwright) for tests, benchmarks and screenshots; axe-core's rules."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from support import debian
from support.waiting import wait_until

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
AXE_CORE = "axe-core@4.14.1"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffcolor-tests"


class NoBrowserError(RuntimeError):
    """The reason why no browser can be started here."""


def chromium(*, install: bool = False) -> str:
    """The path of Chromium. install: install it if it is missing (Debian, root). Raises NoBrowserError."""
    if install and not any(map(shutil.which, PROGRAMS)):
        debian.install(["chromium"], NoBrowserError)
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        raise NoBrowserError("no Chromium here: set DIFFCOLOR_TEST_BROWSER=1 to have it installed (Debian, root)")
    return found


@contextmanager
def browser(path: str) -> Iterator[Browser]:
    """The Chromium at `path`, without a screen."""
    with sync_playwright() as playwright:
        arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        running = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield running
        finally:
            running.close()


def watch(page: Page, *origins: str) -> list[str]:
    """What is wrong with a page, a list that grows: what it logs, its errors, its requests to others than `origins`.

    origins: how the addresses of allowed requests begin.
    """
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: problems.append(str(error)))
    allowed = (*origins, "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(allowed) or problems.append(request.url))
    page.on("response", lambda response: response.ok or problems.append(f"{response.status}: {response.url}"))
    return problems


@contextmanager
def pages(chrome: Browser, *origins: str) -> Iterator[Callable[..., Page]]:
    """Yields what opens a report at an address, as somebody who has never seen it, and waits until it is shown.

    At the end nothing must have been logged, and nothing asked of others than `origins`.
    """
    contexts, problems = [], []

    def open_page(address: str, **options: Any) -> Page:
        context = chrome.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        problems.append(watch(page, *origins))
        page.goto(address)
        wait_for(page, "diffcolor.loaded")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [problem for some in problems for problem in some] == []


def wait_for(page: Page, expression: str) -> None:
    """Wait until the expression holds. Playwright's own waiting evaluates text in the page, which reports forbid."""
    if not wait_until(lambda: bool(page.evaluate(expression)), 60):
        raise TimeoutError(f"after a minute it is still not true that {expression}")


def axe_core() -> str:
    """The script of axe-core, from npm's registry on first use. Raises NoBrowserError if it cannot be fetched."""
    file = CACHE / f"{AXE_CORE}.js"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if shutil.which("npm") is None:
            raise NoBrowserError("no npm here, which fetches axe-core")
        command = ["npm", "pack", AXE_CORE, "--pack-destination", str(CACHE), "--silent"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise NoBrowserError(f"npm cannot fetch {AXE_CORE}: {done.stderr.strip()[-300:]}")
        packed = CACHE / done.stdout.split()[-1]
        with tarfile.open(fileobj=io.BytesIO(packed.read_bytes())) as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            file.write_bytes(member.read())
        packed.unlink()
    return file.read_text(encoding="utf-8")
