"""The server's page in a browser: the states of a server, files, hostile texts, a real model."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import byte_level_tokenizer
from in_browser import ANSWER, answer, bodies, chat, expect, needs_chromium, send
from scripted_server import Reply

pytest_plugins = ["in_browser"]
pytestmark = [pytest.mark.slow, needs_chromium]
ATTACK = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_conversations_are_exported_and_imported(page, open_page, server, tmp_path):
    chat(page, "first")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this conversation").click()
    assert download.value.suggested_filename == "first.json"
    file = tmp_path / "first.json"
    download.value.save_as(file)
    other = open_page(server.url)
    other.locator("#file").set_input_files(file)
    expect(answer(other)).to_have_text(ANSWER)
    answer(other).locator("span").first.hover()
    expect(other.locator("#tip code")).to_have_count(3)
    other.reload()
    expect(other.locator("#list .open")).to_have_text(["first"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: "{", "it is not JSON"),
        (lambda file: "null", 'its "format" is not'),
        (lambda file: file | {"conversations": {}}, '"conversations" is not a list'),
        (lambda file: file["conversations"][0].update(mode="talk"), '"mode" is neither'),
        (lambda file: file["conversations"][0]["messages"].append({"role": "system"}),
         'message 3: "role" is not user or assistant'),
        (lambda file: file["conversations"][0]["messages"][1].update(scores=[["a", "b", []]]),
         'message 2: "scores" are not tokens'),
        (lambda file: file["conversations"][0]["messages"][1].update(stats={"tokens": ATTACK}),
         'message 2: "stats" are not numbers'),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_changes_nothing(page, server, tmp_path, change, message):
    chat(page, "first")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    content = json.loads(Path(download.value.path()).read_text())
    changed = change(content) or content
    file = tmp_path / "wrong.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    before = page.evaluate("JSON.stringify(localStorage)")
    page.locator("#file").set_input_files(file)
    expect(page.locator("#notice")).to_contain_text("wrong.json was not imported: ")
    expect(page.locator("#notice")).to_contain_text(message)
    assert page.evaluate("JSON.stringify(localStorage)") == before
    expect(page.locator("#list .open")).to_have_text(["first"])


def test_two_tabs_keep_each_others_conversations(page, server):
    other = page.context.new_page()
    other.goto(server.url)
    chat(page, "of the first tab")
    chat(other, "of the second tab")
    expect(page.locator("#list .open")).to_have_text(["of the second tab", "of the first tab"])
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["of the second tab", "of the first tab"])


def test_a_full_storage_loses_probabilities_but_no_text(page, server):
    chat(page, "first")
    page.evaluate("""() => {
      const key = Object.keys(localStorage).find((name) => name.includes("conversation:"));
      const value = JSON.parse(localStorage[key]);
      value.messages[1].scores = Array(60000).fill(["The", -1, [["a", -1], ["b", -2]]]);
      localStorage[key] = JSON.stringify(value);
      for (let size = 1 << 21; size; size >>= 1) {
        try { localStorage[`filled ${size}`] = "x".repeat(size); } catch { }
      }
    }""")
    page.reload()
    page.get_by_role("button", name="New conversation").click()
    chat(page, "second")
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["second", "first"])
    page.get_by_role("button", name="first", exact=True).click()
    expect(answer(page)).to_have_text(ANSWER)


def test_hostile_texts_are_shown_as_text(open_page, server, tmp_path):
    server.models = [{"id": ATTACK, "chat": True}]
    page = open_page(server.url)
    expect(page.locator("#welcome h2")).to_have_text(ATTACK)
    server.replies += [
        Reply(tokens=(ATTACK, " and", f" {ATTACK}")),
        Reply(status=400, message=ATTACK),
    ]
    send(page, ATTACK)
    expect(answer(page)).to_have_text(f"{ATTACK} and {ATTACK}")
    answer(page).locator("span").first.hover(position={"x": 5, "y": 5})
    expect(page.locator("#tip code").first).to_contain_text("<script>window.hacked")
    send(page, "again")
    expect(page.locator(".problem").last).to_have_text(ATTACK)
    page.reload()
    expect(answer(page, 0)).to_have_text(f"{ATTACK} and {ATTACK}")
    assert page.locator("img, body script").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_busy_server_is_asked_again(page, server):
    server.replies.append(Reply(status=429, message="the queue is full", retry_after=2))
    send(page, "Hello")
    expect(page.locator("#status")).to_contain_text("The queue is full. Trying again in")
    expect(answer(page)).to_have_text(ANSWER)
    expect(page.locator("#status")).to_be_empty()
    server.replies.append(Reply(status=429, message="the queue is full", retry_after=30))
    send(page, "Hello")
    expect(page.locator("#status")).to_contain_text("Trying again in")
    page.keyboard.press("Escape")
    expect(page.locator(".last .stats")).to_have_text("stopped")


def test_the_length_of_the_queue_is_shown(page, server):
    server.queued = 3
    server.replies.append(Reply(before=2.5))
    send(page, "Hello")
    expect(page.locator("#status")).to_have_text("Waiting for a place: 3 in the queue.")
    expect(answer(page)).to_have_text(ANSWER)
    expect(page.locator("#status")).to_be_empty()


def test_the_page_waits_while_the_model_is_loading(open_page, server):
    server.loading = True
    page = open_page(server.url)
    expect(page.locator("#status")).to_contain_text("The model is loading.")
    server.loading = False
    expect(page.locator("#welcome h2")).to_have_text("scripted")
    expect(page.locator("#status")).to_be_empty()


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page, server):
    server.key = "secret"
    page = open_page(server.url)
    for key in ("wrong", "secret"):
        page.get_by_label("API key").last.fill(key)
        page.get_by_role("button", name="Continue").click()
    expect(page.locator("#welcome h2")).to_have_text("scripted")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.locator("#welcome h2")).to_have_text("scripted")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(fails_after=2, message="the engine failed"), "the engine failed"),
        (Reply(fails_after=2), "The connection ended before the answer did."),
    ],
)
def test_an_answer_that_breaks_off_is_kept(page, server, reply, message):
    server.replies.append(reply)
    send(page, "Hello")
    expect(page.locator(".problem")).to_have_text(message)
    expect(answer(page)).to_have_text("The sea")
    page.get_by_role("button", name="Continue").click()
    expect(answer(page)).to_have_text(f"The sea{ANSWER}")
    expect(page.locator(".problem")).to_be_hidden()


def test_a_limit_beyond_the_context_becomes_what_there_is_room_for(open_page, server):
    server.models = [{"id": "short", "chat": True, "max_model_len": 20}]
    page = open_page(server.url)
    server.replies.append(Reply(status=400, message="long", code="context_length_exceeded"))
    chat(page, "Hello")
    assert [body["max_tokens"] for body in bodies(server)] == [256, 15]
    server.replies.append(Reply(status=400, message="too long", code="context_length_exceeded"))
    send(page, "This is longer than twenty")
    expect(page.locator(".last .problem")).to_have_text("Too long")


@pytest.fixture(scope="module")
def served():
    """Serve a chat model of random weights: its answers are parts of characters, mostly."""
    import test_engine

    from nanojaxgpt.server.running import serve

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_tokenizer(["user assistant system é 🌊"], control, 264, end=0)
    model = dataclasses.replace(
        test_engine.make_model(seq_len="1024"), tokenizer=tokenizer, chat_template=CHATML
    )
    with serve({"tiny": model}, port=0, slots=2) as running:
        yield running


def test_a_model_answers(open_page, served):
    page = open_page(served.url)
    page.locator("#open-settings").click()
    page.locator("#set-max_tokens").fill("40")
    page.get_by_label("Seed").fill("3")
    send(page, "Hello")
    stats = page.locator(".last .stats")
    expect(stats).to_contain_text("40 tokens · prompt", timeout=60_000)
    first = answer(page).text_content()
    assert first
    answer(page).locator("span").nth(3).hover()
    assert page.locator("#tip code").count() >= 5
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    expect(stats).to_contain_text("40 tokens")
    expect(answer(page)).to_have_text(first)  # it has the same seed
    page.get_by_role("button", name="Continue").click()
    expect(stats).to_contain_text("cut at max tokens")
    assert answer(page).text_content().startswith(first)
    page.reload()
    assert answer(page).text_content().startswith(first)
    page.get_by_label("Completion").check()
    send(page, "Hello")
    expect(stats).to_contain_text("cut at max tokens")
    page.locator("#open-settings").click()
    page.locator("#set-max_tokens").fill("2048")
    send(page, "")
    expect(stats).to_contain_text("seed", timeout=60_000)
    expect(page.locator(".problem")).to_be_hidden()


def test_stop_frees_the_slot_of_a_model(open_page, served):
    engine = served.service.served["tiny"].engine
    before = engine.generated_tokens
    page = open_page(served.url)
    page.locator("#open-settings").click()
    page.locator("#set-max_tokens").fill("1000")
    page.locator("#set-temperature").fill("0")  # it repeats itself, and finds no end
    send(page, "Hello")
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator(".last .stats")).to_contain_text("stopped")
    while engine.queued or engine.busy:
        page.wait_for_timeout(20)
    assert engine.generated_tokens - before < 900


def test_a_model_on_a_phone_in_the_dark(open_page, served, tmp_path):
    size = {"width": 360, "height": 640}
    page = open_page(served.url, viewport=size, has_touch=True, is_mobile=True, color_scheme="dark")
    page.locator("#open-settings").tap()
    page.locator("#set-max_tokens").fill("24")
    page.get_by_label("Seed").fill("3")
    page.keyboard.press("Escape")
    stats = page.locator(".last .stats")
    for text in ("first", "second"):
        send(page, text)
        expect(stats).to_contain_text("24 tokens · prompt", timeout=60_000)
    before = [answer(page, index).text_content() for index in (0, 1)]
    page.get_by_role("button", name="Edit and resend").first.tap()
    area = page.get_by_label("Edit the message")
    area.fill("other")
    area.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    expect(stats).to_contain_text("seed 3")
    other = answer(page).text_content()
    assert other
    assert other not in before
    page.get_by_role("button", name="Undo").tap()
    expect(page.locator("article")).to_have_count(4)
    assert [answer(page, index).text_content() for index in (0, 1)] == before
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this conversation").tap()
    download.value.save_as(tmp_path / "talk.json")
    [talk] = json.loads((tmp_path / "talk.json").read_text())["conversations"]
    assert [one["text"] for one in talk["messages"]] == ["first", before[0], "second", before[1]]
    assert [len(one["scores"]) for one in talk["messages"][1::2]] == [24, 24]
    answer(page, 0).locator("span").first.tap(position={"x": 3, "y": 5})
    assert page.locator("#tip code").count() >= 5
    assert page.evaluate("document.scrollingElement.scrollWidth") == size["width"]
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) != dark
    wide = open_page(served.url)
    wide.locator("#file").set_input_files(tmp_path / "talk.json")
    expect(answer(wide, 1)).to_have_text(before[1])
    wide.get_by_role("button", name="Continue").click()
    expect(answer(wide, 1)).not_to_have_text(before[1])
    assert answer(wide, 1).text_content().startswith(before[1])
