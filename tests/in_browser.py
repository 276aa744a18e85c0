"""A page of a server in Chromium: fixtures, and what a user does with it."""

import shutil

import pytest
from conftest import ROOT
from scripted_server import WORDS, ScriptedServer, running

playwright = pytest.importorskip("playwright.sync_api", reason="a browser runs by playwright")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Debian's package chromium")
PAGE = ROOT / "nanojaxgpt" / "server" / "page"
ANSWER = "".join(WORDS)


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def server():
    with running(ScriptedServer(PAGE)) as server:
        yield server


@pytest.fixture
def open_page(browser):
    """Return a function that opens a URL in a new profile; no page may have an error or ask
    another site."""
    contexts, faults = [], []

    def open_page(url: str, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(5000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if is_fault(line) else None)
        page.on("request", lambda asked: asked.url.startswith((url, "blob:")) or faults.append(
            asked.url))  # fmt: skip
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def is_fault(line) -> bool:
    """Return whether a line of the console tells of a fault; refused requests are expected."""
    return line.type in ("error", "warning") and "Failed to load resource" not in line.text


@pytest.fixture
def page(open_page, server):
    return open_page(server.url)


def send(page, text: str) -> None:
    """Write a message and send it by Enter."""
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def answer(page, index: int = -1):
    """Return the text of an answer, of the last one by default."""
    return page.locator(".assistant .text").nth(index)


def chat(page, *messages: str) -> None:
    """Send messages, each when the answer before it has ended."""
    for message in messages:
        send(page, message)
        expect(page.locator(".assistant.last .stats")).to_contain_text("seed")
        expect(answer(page)).to_have_text(ANSWER)


def bodies(server: ScriptedServer, path: str = "/v1/chat/completions") -> list[dict]:
    """Return the bodies of the requests so far."""
    return [body for asked, body in server.requests if asked == path]


def contents(body: dict) -> list[str]:
    """Return the texts of a chat request."""
    return [message["content"] for message in body["messages"]]
