"""A headless browser for tests of pages, which sees to it that a page stays where it is."""

import contextlib
import shutil
from typing import NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",  # which root is refused
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
)


class Watched(NamedTuple):
    """A page of the browser, and what it did that it may not."""

    page: object  # playwright's
    strayed: list  # addresses it asked for elsewhere; they were refused
    errors: list  # of its scripts


@contextlib.contextmanager
def open_browser():
    """The Chromium of this machine; skips the test where there is none, or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is there")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser, allowed, **options):
    """An empty page that reaches addresses that start as allowed, and no other ones.

    Args:
        allowed: "http://127.0.0.1:7860/" or "file:///path/", for example.
        options: of playwright's new_context, such as viewport and color_scheme.
    """
    watched = Watched(None, [], [])

    def refuse(route):
        watched.strayed.append(route.request.url)
        route.abort()

    context = browser.new_context(**options)
    try:
        context.route(lambda url: not url.startswith((allowed, "data:", "blob:")), refuse)
        page = context.new_page()
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        yield watched._replace(page=page)
    finally:
        context.close()
