"""The server's page in a browser: all that it offers, with answers by a script."""

import json
import re

import pytest
from in_browser import ANSWER, answer, bodies, chat, contents, expect, needs_chromium, send
from scripted_server import Reply

pytest_plugins = ["in_browser"]
pytestmark = [pytest.mark.slow, needs_chromium]
SLOW = Reply(tokens=("one",) + (" more",) * 200, delay=0.05)


def test_an_event_stream_may_be_cut_anywhere(page):
    stream = (
        ": a comment\n\ndata: é🌊\r\n\r\nevent: error\ndata: a\rdata:b\r\rdata\n\nid: 7\ndata: x"
    )
    found = page.evaluate(
        """async (bytes) => {
          const { parseEvents, STREAM_START } = await import("/stream.js");
          const parse = (...chunks) => {
            let state = STREAM_START, events = [];
            for (const chunk of chunks) {
              const parsed = parseEvents(state, new Uint8Array(chunk));
              state = parsed.state;
              events = [...events, ...parsed.events];
            }
            return JSON.stringify(events);
          };
          const results = new Set([parse(bytes), parse(...bytes.map((byte) => [byte]))]);
          for (let i = 0; i <= bytes.length; i++) {
            for (let j = i; j <= bytes.length; j++) {
              results.add(parse(bytes.slice(0, i), bytes.slice(i, j), bytes.slice(j)));
            }
          }
          return [...results];
        }""",
        list(stream.encode()),
    )
    assert len(found) == 1
    assert json.loads(found[0]) == [
        {"event": "message", "data": "é🌊"},
        {"event": "error", "data": "a\nb"},
        {"event": "message", "data": ""},
    ]


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("a b", ["a", " b"], ["a:0-1", " b:1-2"]),
        ("🌊 b", ["bytes:\\xf0\\x9f", "bytes:\\x8c\\x8a", " b"], ["🌊:0-2", " b:2-3"]),
        ("a\ufffd", ["a", "bytes:\\xff"], ["a:0-1", "\ufffd:1-2"]),
        ("The sea", [" The", " sea", "<|im_end|>"], ["The:0-1", " sea:1-2"]),
        ("aba", ["<|say|>", "ab", "a"], ["ab:1-2", "a:2-3"]),
        ("one", ["one", " STOP", "!"], ["one:0-1"]),
        ("no scores", [], ["no scores:0-0"]),
        ("", ["a"], []),
    ],
)
def test_the_pieces_of_an_answer_are_its_text(page, text, tokens, pieces):
    found = page.evaluate(
        """async ([text, tokens]) => {
          const { alignTokens } = await import("/tokens.js");
          return alignTokens(text, tokens.map((token) => [token, -1, []]));
        }""",
        [text, tokens],
    )
    assert [f"{each['text']}:{each['from']}-{each['to']}" for each in found] == pieces
    assert "".join(each["text"] for each in found) == text


def test_a_chat_is_streamed_with_its_numbers(page, server):
    page.locator("#open-settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.locator("#set-temperature").fill("0.5")
    page.locator("#set-top_k").fill("40")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop strings").fill("END\n\\n\\n")
    server.replies.append(Reply(delay=0.2))
    send(page, "What is the sea?")
    expect(answer(page)).to_contain_text("The sea")
    assert ANSWER not in answer(page).text_content()  # it has not ended yet
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    expect(answer(page)).to_have_text(ANSWER)
    stats = page.locator(".last .stats")
    expect(stats).to_have_text(
        re.compile(r"9.tokens · prompt.3 · first.after.\d\.\d\d.s · \d\.\d.tokens/s · seed.7")
    )
    (body,) = bodies(server)
    assert contents(body) == ["Be brief.", "What is the sea?"]
    assert {name: body[name] for name in ("temperature", "top_k", "seed", "stop", "stream")} == {
        "temperature": 0.5, "top_k": 40, "seed": 7, "stop": ["END", "\n\n"], "stream": True,
    }  # fmt: skip
    chat(page, "And the sky?")
    assert contents(bodies(server)[1]) == [
        "Be brief.",
        "What is the sea?",
        ANSWER,
        "And the sky?",
    ]


def test_stop_keeps_what_there_is_and_leaves_the_server(page, server):
    for stop in (page.locator("#stop").click, lambda: page.keyboard.press("Escape")):
        server.replies.append(SLOW)
        send(page, "Count.")
        expect(answer(page)).to_contain_text("one more")
        expect(page.locator("#send")).to_be_hidden()
        stop()
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator(".last .stats")).to_contain_text("stopped")
        expect(answer(page)).to_contain_text("one more")
    for _ in range(50):
        if server.closed_early == 2:
            break
        page.wait_for_timeout(50)
    assert server.closed_early == 2


def test_regenerate_replaces_the_answer_and_can_be_undone(page, server):
    chat(page, "What is the sea?")
    server.replies.append(Reply(tokens=("Water", ".")))
    page.get_by_role("button", name="Regenerate").click()
    expect(answer(page)).to_have_text("Water.")
    first, second = bodies(server)
    assert first["messages"] == second["messages"]
    assert first["seed"] != second["seed"]
    page.get_by_role("button", name="Undo").click()
    expect(answer(page)).to_have_text(ANSWER)


def test_an_earlier_message_is_edited_and_sent_again(page, server):
    chat(page, "first", "second")
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit and resend").first.click()
    area = page.get_by_label("Edit the message")
    expect(area).to_be_focused()
    area.press("Escape")
    expect(area).to_have_count(0)
    page.get_by_role("button", name="Edit and resend").first.click()
    area.fill("other")
    area.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    expect(answer(page)).to_have_text(ANSWER)
    assert contents(bodies(server)[-1]) == ["other"]
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article")).to_have_count(4)


def test_an_answer_is_continued_from_its_tokens(page, server):
    server.replies += [Reply(tokens=("It", " is"), finish="length"), Reply(tokens=(" wet", "."))]
    send(page, "Sea?")
    expect(page.locator(".last .stats")).to_contain_text("cut at max tokens")
    page.get_by_role("button", name="Continue").click()
    expect(answer(page)).to_have_text("It is wet.")
    asked = bodies(server, "/tokenize")
    assert [asked[0]["messages"][0]["content"], asked[1]["prompt"]] == ["Sea?", "It is"]
    assert bodies(server, "/v1/completions")[0]["prompt"] == [ord(c) for c in "Sea?It is"]
    expect(answer(page).locator("span")).to_have_count(4)


def test_a_text_is_completed_and_continued(page, server):
    page.get_by_label("Completion").check()
    expect(page.get_by_label("System prompt")).to_be_hidden()
    for text in ("Once", "", " upon"):
        send(page, text)
        expect(page.locator(".last .stats")).to_contain_text("seed")
    expect(answer(page)).to_have_text(ANSWER)
    texts = page.locator("#log .text")
    expect(texts).to_have_text(["Once", f"{ANSWER}{ANSWER}", " upon", ANSWER])
    prompts = [body["prompt"] for body in bodies(server, "/v1/completions")]
    assert prompts == ["Once", f"Once{ANSWER}", f"Once{ANSWER}{ANSWER} upon"]
    page.get_by_role("button", name="Once").last.press("Enter")
    page.get_by_label("Edit the message").fill("Twice")
    page.get_by_label("Edit the message").press("Enter")
    expect(page.locator(".user .text")).to_have_text(["Twice"])


def test_a_base_model_has_no_chat(open_page, server):
    server.models = [{"id": "base", "chat": False}]
    page = open_page(server.url)
    expect(page.get_by_label("Completion")).to_be_checked()
    expect(page.get_by_label("Chat", exact=True)).to_be_disabled()
    send(page, "Once")
    expect(answer(page)).to_have_text(ANSWER)


def test_the_alternatives_of_a_token_are_shown_and_chosen(page, server):
    chat(page, "What is the sea?")
    tip = page.locator("#tip")
    answer(page).locator("span", has_text="is").hover()
    expect(tip.locator("code")).to_have_text(["·is", "·otherwise", "·nothing"])
    expect(tip.locator("span")).to_have_text(["13 %", "11 %", "2.0 %"])
    assert answer(page).locator("span").nth(3).get_attribute("data-level") == "2"
    answer(page).locator("span", has_text="is").click()
    tip.get_by_role("button", name="otherwise").click()
    expect(answer(page)).to_have_text(f"The sea otherwise{ANSWER}")
    assert bodies(server, "/tokenize")[1]["prompt"] == "The sea otherwise"
    page.get_by_label("Token probabilities").click()
    answer(page).locator("span").first.hover()
    expect(tip).to_be_hidden()


def test_a_conversation_outlives_the_page(page, server):
    chat(page, "first")
    page.get_by_role("button", name="New conversation").click()
    chat(page, "second")
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["second", "first"])
    expect(page.locator(".user .text")).to_have_text("second")
    page.get_by_role("button", name="first", exact=True).click()
    expect(answer(page)).to_have_text(ANSWER)
    page.get_by_role("button", name="Rename first").click()
    page.get_by_label("Title").fill("of the sea")
    page.keyboard.press("Enter")
    page.reload()
    page.locator("#list li").last.hover()
    page.get_by_role("button", name="Delete of the sea").click()
    expect(page.locator("#list .open")).to_have_text(["second"])
    page.get_by_role("button", name="Undo").click()
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["second", "of the sea"])


def test_a_page_that_is_left_keeps_what_there_is_of_an_answer(page, server):
    server.replies.append(SLOW)
    send(page, "Count.")
    expect(answer(page)).to_contain_text("one more")
    page.reload()
    expect(answer(page)).to_contain_text("one more")
    expect(page.locator(".last .stats")).to_contain_text("stopped")


def test_a_conversation_deleted_during_its_answer_stays_deleted(page, server):
    server.replies.append(SLOW)
    send(page, "Count.")
    expect(answer(page)).to_contain_text("one more")
    page.locator("#list li").hover()
    page.get_by_role("button", name="Delete Count.").click()
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#list .open")).to_have_count(0)
    page.reload()
    expect(page.locator("#welcome h2")).to_have_text("scripted")
    expect(page.locator("#list .open")).to_have_count(0)


def test_an_answer_goes_on_while_another_conversation_is_shown(page, server):
    server.replies.append(Reply(delay=0.1))
    send(page, "first")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()  # it has ended
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="first", exact=True).click()
    expect(answer(page)).to_have_text(ANSWER)


def test_the_keyboard_suffices(page, server):
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answer(page)).to_have_text(ANSWER)
    assert contents(bodies(server)[0]) == ["one\ntwo"]
    expect(page.locator("#input")).to_be_focused()
    for _ in range(4):  # over the buttons of the answer, back to its text
        page.keyboard.press("Shift+Tab")
    expect(answer(page)).to_be_focused()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#tip .chosen code")).to_have_text("·is")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(answer(page)).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(answer(page)).to_have_text(f" nothing{ANSWER}")
    names = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select")]
      .filter((node) => node.checkVisibility())
      .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
      .map((node) => node.outerHTML)""")
    assert not names


def test_a_phone_shows_all_without_scrolling_sideways(open_page, server):
    server.models = [{"id": "a-model-with-a-long-name-" * 3, "chat": True}]
    server.replies += [Reply(tokens=("word " * 30, "x" * 300)), Reply()]
    size = {"width": 360, "height": 640}
    page = open_page(server.url, viewport=size, has_touch=True, is_mobile=True)
    for step in (
        lambda: send(page, "y" * 200),
        lambda: send(page, "and"),
        lambda: page.locator("#open-settings").tap(),
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="Conversations").tap(),
        lambda: page.get_by_role("button", name="Close the list").tap(),
        lambda: answer(page, 0).locator("span").first.tap(position={"x": 5, "y": 5}),
    ):
        step()
        page.wait_for_timeout(200)
        assert page.evaluate("document.scrollingElement.scrollWidth") == size["width"]
        assert page.evaluate("document.getElementById('log').scrollWidth") <= size["width"]
    expect(page.locator("#tip code")).to_have_count(3)


def test_the_theme_follows_the_system_or_the_choice(open_page, server):
    page = open_page(server.url, color_scheme="dark")
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = ground()
    page.emulate_media(color_scheme="light")
    light = ground()
    assert light != dark
    themes = []
    for _ in range(3):
        page.locator("#theme").click()
        themes.append(ground())
    assert themes == [light, dark, light]
    page.locator("#theme").click()
    page.locator("#theme").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert ground() == dark
