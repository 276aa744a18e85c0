"""A conversation in the terminal: turns reuse what was read, and can be stopped."""

import os
import signal

import jax
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("httpx")
pytest.importorskip("starlette")

from serving import make_model

from nanojaxgpt.commands import chat
from nanojaxgpt.console import printable
from nanojaxgpt.errors import ConfigError, MemoryExceeded
from nanojaxgpt.generate import slots as device
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import Request


@pytest.fixture(scope="module")
def model():
    return make_model(seq_len=256)


@pytest.fixture
def talk(model):
    """Return a conversation with short answers."""
    talk = chat.Conversation(model)
    talk.sample = chat.change(talk.sample, "max_tokens", "20")
    yield talk
    talk.close()


def answers(talk) -> list[str]:
    """Return what the model has said so far."""
    return [one["content"] for one in talk.messages if one["role"] == "assistant"]


def test_turns_are_those_of_a_text_that_is_read_anew(talk, model, capsys):
    prompts, reads = [], []
    for text in ("the user and the assistant", "and then", "the end"):
        before = talk.engine.prompt_tokens
        prompts.append(tuple(talk.model.template.encode(
            [*talk.messages, {"role": "user", "content": text}]
        )))  # fmt: skip
        talk.say(text)
        while talk.engine.queued or talk.engine.busy:  # the answer is read as well
            pass
        reads.append(talk.engine.prompt_tokens - before)
    with Engine(model, slots=1) as engine:
        alone = [engine.submit(Request(
            ids, 20, temperature=talk.sample.temperature, seed=seed
        )).result().text for seed, ids in enumerate(prompts)]  # fmt: skip
    assert answers(talk) == alone
    assert capsys.readouterr().out == "".join(printable(text) + "\n" for text in alone)
    assert len(set(alone)) == 3
    added = [len(ids) - len(last) for ids, last in zip(prompts[1:], prompts, strict=False)]
    assert all(read < more + 20 + 2 * 16 for read, more in zip(reads[1:], added, strict=True))
    assert sum(reads) < len(prompts[0]) + len(prompts[1]) + len(prompts[2])


def test_ctrl_c_stops_an_answer_wherever_it_comes(talk, monkeypatch, capsys):
    talk.say("hello")
    shown = []

    def interrupt(text):
        shown.append(text)
        if len(shown) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return text

    monkeypatch.setattr(chat, "printable", interrupt)
    talk.say("the user")
    assert len(shown) < 20
    stopped = answers(talk)[1]
    monkeypatch.undo()
    talk.say("go on")
    whole = [*talk.messages]
    assert whole[3]["content"] == stopped
    talk.say(talk.take_back())
    assert len(answers(talk)) == 3
    assert answers(talk)[2] != whole[5]["content"]  # another seed
    assert capsys.readouterr().out.count("\n") == 4


def test_a_draft_model_changes_no_answer(model, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "run")
    monkeypatch.setattr(chat, "typed_lines", lambda: iter(["the user", "and then"]))
    talks, close = [], chat.Conversation.close
    monkeypatch.setattr(chat.Conversation, "close", lambda talk: talks.append(talk) or close(talk))
    call = [str(tmp_path / "run"), "--max_tokens=20", "--lookahead=2"]
    for more in ([], [f"--draft={tmp_path / 'run'}"]):
        chat.chat([*call, *more])
    plain, drafted = talks
    assert answers(drafted) == answers(plain)
    assert len(set(answers(plain))) == 2
    assert plain.engine.draft is None
    assert drafted.engine.accepted_tokens > 20
    assert capsys.readouterr().out


def test_the_oldest_turns_make_room(model, capsys):
    talk = chat.Conversation(model, "be brief", context=96)
    talk.sample = chat.change(talk.sample, "max_tokens", "8")
    for _ in range(4):
        talk.say("the user")
    assert "oldest turns are left out" in capsys.readouterr().err
    assert talk.messages[0] == {"role": "system", "content": "be brief"}
    with pytest.raises(ConfigError, match=r"the message has .* tokens, and the context 96"):
        talk.say("xyz " * 90)
    assert talk.messages[-1]["role"] == "assistant"
    talk.close()


def test_a_device_without_memory_ends_the_chat(talk, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    talk.say("hello")
    monkeypatch.setattr(device, "advance", fail)
    monkeypatch.setattr(chat, "typed_lines", lambda: iter(["the user", "again"]))
    with pytest.raises(MemoryExceeded, match="the engine ran out of memory"):
        chat.hold(talk)


def test_an_engine_that_could_not_start_ends_the_chat(talk, monkeypatch):
    def fail(*_):
        raise MemoryExceeded("there is no room")

    monkeypatch.setattr(talk.engine._device, "warm_up", fail)
    with pytest.raises(MemoryExceeded, match="no room"):
        talk.engine.start()
    monkeypatch.setattr(chat, "typed_lines", lambda: iter(["the user", "again"]))
    with pytest.raises(MemoryExceeded, match="no room"):
        chat.hold(talk)
