"""The page at `/`, driven in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from fake_client import ByteTokenizer, FakeClient
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running_server import InProcess, Live

from lockstep.core.request import Request
from lockstep.server.routes.page import content_security_policy

pytestmark = pytest.mark.suite("cpu")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT_MS = 15_000
expect.set_options(timeout=TIMEOUT_MS)
MARKDOWN = "Some **bold** and `code`.\n\n- one\n- <img src=x onerror=alert(1)>\n\n```py\nx = 1\n```\nEnd."


def test_page_is_self_contained(in_process: Callable[..., InProcess]) -> None:
    response = in_process().get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy == content_security_policy(response.content)
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    links = re.findall(r"(?:src|href)=\"([^\"]+)\"|url\(([^)]+)\)", response.text)
    assert [link for pair in links for link in pair if link and not link.startswith("data:")] == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bon\w+=\"", response.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = f"no browser found; looked for {', '.join(BROWSERS)}"
        if os.environ.get("LOCKSTEP_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page whose console must stay free of errors, refused resources included."""
    context = browser.new_context()
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.set_default_timeout(TIMEOUT_MS)
    yield opened
    context.close()
    # A browser reports every answer of the 4xx and 5xx kind; those that a test provokes are no fault.
    assert [fault for fault in faults if "the server responded with a status of" not in fault] == []


def last_message(request: Request, role: str = "user") -> str:
    """The last message of a role in the prompt that the page sent."""
    prompt = ByteTokenizer().decode(list(request.prompt_token_ids), skip_special_tokens=False)
    return re.findall(rf"<\|im_start\|>{role}\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]


def test_chat_streams_and_stops(live: Callable[..., Live], page: Page) -> None:
    answers = {"first": MARKDOWN, "more": "word " * 400}
    server = live(FakeClient(answer=lambda request, index: answers[last_message(request)], delay_s=0.01))
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("Engine is up")
    expect(page.locator("#model")).to_have_text("tiny")
    page.click("#settings-toggle")
    page.fill("#system", "Be brief.")
    page.fill("#max-tokens", "2000")
    page.locator("#temperature").fill("0.2")
    page.fill("#prompt", "first")
    page.keyboard.press("Enter")
    page.wait_for_selector(".streaming .body strong")  # text shows while the answer is still being made
    expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
    page.wait_for_selector(".turn.assistant .note")
    body = page.locator(".turn.assistant .body").first
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("pre code").inner_text() == "x = 1"
    assert body.locator("li").all_inner_texts() == ["one", "<img src=x onerror=alert(1)>"]
    assert page.locator("img").count() == 0
    assert f"{len(MARKDOWN)} tokens" in page.inner_text(".note")
    sent = server.client.requests[0]
    assert (sent.params.temperature, sent.params.max_tokens) == (0.2, 2000)
    assert last_message(sent, "system") == "Be brief."

    page.fill("#prompt", "more")
    page.click("#send")
    expect(page.locator(".turn.assistant").nth(1)).to_contain_text("word word")
    expect(page.locator("#running")).to_have_text("1")
    page.click("#send")
    expect(page.locator(".turn:last-child .note")).to_have_text("stopped")
    expect(page.locator("#running")).to_have_text("0")
    assert server.client.closed_early == [server.client.requests[1].request_id]
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")

    page.click("#new-chat")
    assert page.locator(".turn").count() == 0


def test_figures_live(live: Callable[..., Live], page: Page) -> None:
    server = live(FakeClient())
    page.goto(server.url)
    expect(page.locator("#kv")).to_contain_text("25% of 1,600 tokens")
    expect(page.locator("#hits")).to_have_text("25%")
    expect(page.locator("#uptime")).to_have_text("12 s")
    server.client.num_tokens += 5000
    expect(page.locator("#rate")).to_have_text(re.compile(r"^\d,\d\d\d$"))
    expect(page.locator("#total")).to_have_text("5,000")
    points = page.get_attribute("#spark-line", "points")
    assert points and len(points.split()) >= 2


def test_engine_that_restarts_is_shown(live: Callable[..., Live], page: Page) -> None:
    server = live(FakeClient(is_alive=False))
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("Engine is restarting")
    page.fill("#prompt", "hi")
    page.keyboard.press("Enter")
    expect(page.locator(".fault")).to_contain_text("the engine stopped")
    server.client.is_alive = True
    expect(page.locator("#state")).to_have_text("Engine is up")


def test_key_is_asked_for(live: Callable[..., Live], page: Page) -> None:
    server = live(api_key="right")
    page.goto(server.url)
    page.wait_for_selector("#key-panel:not([hidden])")
    page.fill("#prompt", "hi")
    page.keyboard.press("Enter")
    expect(page.locator(".fault")).to_contain_text("API key")
    page.fill("#key", "right")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("Engine is up")
    expect(page.locator("#key-panel")).to_be_hidden()
    page.fill("#prompt", "hi")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .body").last).to_have_text("Hello, world.")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(live: Callable[..., Live], page: Page, width: int) -> None:
    server = live(FakeClient(answer=lambda request, index: "```\n" + "wide " * 60 + "\n```\n" + "long" * 60))
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(server.url)
    page.fill("#prompt", "hi")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#prompt", "#send", "#running", "#kv", "#new-chat"):
        box = page.locator(selector).bounding_box()
        assert box is not None
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800, selector
