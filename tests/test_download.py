"""Sources at URLs: downloaded once, resumed, checked, and refused in plain words."""

import gzip
import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, SHARED, data_config

from nanojaxgpt.__main__ import main
from nanojaxgpt.config import load_config, sections
from nanojaxgpt.data import sources
from nanojaxgpt.data.sources import download
from nanojaxgpt.data.store import prepare
from nanojaxgpt.errors import DataError
from nanojaxgpt.papers.paper import load_paper

TEXT = "".join(f"line {number}\n" for number in range(5000)).encode()
DIGEST = hashlib.sha256(TEXT).hexdigest()
SHAKESPEARE = SHARED / "data" / "tinyshakespeare.txt"


class Handler(BaseHTTPRequestHandler):
    """Serves what its server holds, and notes what was asked for."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range"), self.headers.get("If-Range")
        server.asked.append(asked)
        server.before()
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        begin, total = 0, len(content)
        if server.ranges and asked[0] and asked[1] == server.tag:
            begin = int(asked[0].removeprefix("bytes=").removesuffix("-"))
        if begin >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(total - begin))
        self.end_headers()
        stop = server.cuts.pop(0) if server.cuts else total
        self.wfile.write(content[begin:stop])  # and the connection is closed

    def log_message(self, *_):
        """Log nothing."""


@pytest.fixture
def server(monkeypatch):
    """Return a server on loopback: what it serves, how, and what it was asked for."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.files, made.asked, made.cuts = {"/a.txt": TEXT}, [], []
        made.ranges, made.tag, made.before = True, '"one"', lambda: None
        made.url = f"http://127.0.0.1:{made.server_port}"
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def read(tmp_path):
    """Return a function that gives the texts of a source, downloaded into this test's cache."""

    def texts(source, **changes):
        data = data_config(cache_dir=str(tmp_path), **changes)
        sources.source_identity(source, data)  # which checks what is in the cache
        return [document.text for document in sources.read_documents(source, data)]

    return texts


def files_in(folder) -> set[str]:
    return {path.name for path in folder.glob("downloads/*/*")}


def test_every_file_is_downloaded_once_and_is_the_one_on_disk(server, read, tmp_path, capsys):
    lines = b'{"text": "one", "body": {"html": "two"}}\n'
    server.files |= {"/b.jsonl.gz": gzip.compress(lines), "/c d.txt?version=2": b"a\n\nb"}
    assert read(f"text:{server.url}/a.txt") == [TEXT.decode()]
    assert f"set data.sha256={DIGEST}" in capsys.readouterr().err
    assert read(f"jsonl:{server.url}/b.jsonl.gz#text") == ["one"]
    server.files |= {"/c%20d.txt?version=2": b"a\n\nb"}
    assert read(f"blocks:{server.url}/c d.txt?version=2") == ["a", "b"]
    assert files_in(tmp_path) == {
        name + ending for name in ("a.txt", "b.jsonl.gz", "c d.txt") for ending in ("", ".sha256")
    }
    assert len(server.asked) == 3
    server.files.clear()  # as without a network
    assert read(f"text:{server.url}/a.txt", sha256=DIGEST) == [TEXT.decode()]
    (tmp_path / "a.txt").write_bytes(TEXT)
    data = data_config(cache_dir=str(tmp_path))
    identity = sources.source_identity(f"text:{server.url}/a.txt", data)
    assert identity == sources.source_identity(f"text:{tmp_path}/a.txt", data)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("ranges", "tag", "again"),
    [
        (True, '"one"', [("bytes=1000-", '"one"')]),
        (False, '"one"', [("bytes=1000-", '"one"')]),  # which sends all of it
        (True, 'W/"one"', [(None, None)]),  # equal bytes are not promised
        (True, "", [(None, None)]),
    ],
)
def test_a_break_is_resumed(server, read, ranges, tag, again, capsys):
    server.ranges, server.tag, server.cuts = ranges, tag, [1000]
    assert read(f"text:{server.url}/a.txt", sha256=DIGEST) == [TEXT.decode()]
    assert server.asked == [(None, None), *again]
    said = capsys.readouterr().err
    assert "broke off after 1,000 bytes (the connection was closed); resuming" in said
    assert "data.sha256" not in said


def test_the_next_command_resumes_or_begins_anew_where_the_file_has_changed(server, read, tmp_path):
    source = f"text:{server.url}/a.txt"
    for begin, cuts in ((0, [1000, 1000]), (1000, [2000, 2000])):
        server.cuts = cuts
        with pytest.raises(DataError, match=r"broke off after .* rerun the command to resume"):
            read(source)
        assert server.asked[-1] == (f"bytes={begin + 1000}-", '"one"')
    assert files_in(tmp_path) == {"a.txt.partial", "a.txt.validator", "a.txt.lock"}
    server.tag, server.files["/a.txt"] = '"two"', TEXT[::-1]
    assert read(source) == [TEXT[::-1].decode()]
    assert files_in(tmp_path) == {"a.txt", "a.txt.sha256"}


@pytest.mark.parametrize("size", [len(TEXT), len(TEXT) + 10])
def test_a_partial_download_that_is_complete_or_too_long(server, read, tmp_path, size):
    server.cuts = [10, 10]
    with pytest.raises(DataError):
        read(f"text:{server.url}/a.txt")
    (partial,) = tmp_path.glob("downloads/*/a.txt.partial")
    partial.write_bytes((TEXT + b"more than is there")[:size])  # as after a kill at the end
    assert read(f"text:{server.url}/a.txt") == [TEXT.decode()]
    assert len(server.asked) == (3 if size == len(TEXT) else 4)


def test_what_has_another_hash_is_refused(server, read, tmp_path):
    source, wrong = f"text:{server.url}/a.txt", "0" * 64
    with pytest.raises(DataError, match=rf"SHA-256 is {DIGEST}.*kept as .*a\.txt\.refused"):
        read(source, sha256=wrong)
    assert "a.txt" not in files_in(tmp_path)
    assert read(source, sha256=f"{wrong}, {DIGEST.upper()}") == [TEXT.decode()]
    assert len(server.asked) == 2
    with pytest.raises(DataError, match=rf"/a\.txt, downloaded from .*SHA-256 is {DIGEST}"):
        read(source, sha256=wrong)
    assert len(server.asked) == 2


@pytest.mark.parametrize(("sha256", "noted"), [("", True), (DIGEST, True), (DIGEST, False)])
@pytest.mark.parametrize("content", [TEXT[:100], TEXT[:-1] + b"x"], ids=["shorter", "altered"])
def test_a_damaged_download_is_replaced(server, read, tmp_path, capsys, sha256, noted, content):
    source = f"text:{server.url}/a.txt"
    read(source)
    (cached,) = tmp_path.glob("downloads/*/a.txt")
    cached.write_bytes(content)
    if not noted:  # as an older version left it: only data.sha256 can tell
        cached.with_name("a.txt.sha256").unlink()
    capsys.readouterr()
    files, server.files = server.files, {}
    with pytest.raises(DataError, match=rf"{cached} (was altered|has another).*404"):
        read(source, sha256=sha256)
    assert cached.read_bytes() == content
    server.files = files
    capsys.readouterr()
    assert read(source, sha256=sha256) == [TEXT.decode()]
    lines = [line for line in capsys.readouterr().err.splitlines() if "again" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{cached} ")
    assert cached.read_bytes() == TEXT
    assert read(source, sha256=sha256) == [TEXT.decode()]
    assert len(server.asked) == 3


def test_mixtures_and_validation_sources_may_be_urls(server, tmp_path):
    server.files |= {"/b.txt": b"other words", "/c.jsonl": b'{"text": "some more"}'}
    digests = [hashlib.sha256(content).hexdigest() for content in server.files.values()]
    data = data_config(
        mixture=(f"2 text:{server.url}/a.txt", f"1 text:{server.url}/b.txt"),
        validation_source=f"jsonl:{server.url}/c.jsonl",
        sha256=",".join(digests),
        cache_dir=str(tmp_path),
    )
    corpus = prepare(data, tmp_path, lambda _: None)
    assert [part.store.manifest["text_bytes"] for part in corpus.parts] == [len(TEXT), 11]
    assert corpus.validation.manifest["text_bytes"] == 9


def test_one_process_downloads_and_the_others_wait(server, read, monkeypatch, capsys):
    waits = threading.Event()
    say = download.warn
    monkeypatch.setattr(
        download, "warn", lambda text: (say(text), waits.set() if "waiting" in text else None)
    )
    server.before = waits.wait
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(read(f"text:{server.url}/a.txt")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[TEXT.decode()]] * 2
    assert len(server.asked) == 1


def test_without_an_answer_it_ends_soon_and_says_so(server, read, monkeypatch):
    with pytest.raises(DataError, match=r"absent\.txt can't be downloaded: 404"):
        read(f"text:{server.url}/absent.txt")
    with pytest.raises(DataError, match=r"can't be downloaded: Connection refused.*give its path"):
        read("text:http://127.0.0.1:1/a.txt")
    monkeypatch.setattr(download, "SECONDS", 0.2)
    answered = threading.Event()
    server.before = answered.wait
    with pytest.raises(DataError, match="can't be downloaded: no answer within 0 s"):
        read(f"text:{server.url}/a.txt")
    answered.set()


def test_bad_urls_and_hashes_are_exit_2_or_3(tmp_path, capsys):
    command = [
        "prepare", f"--config={ROOT}/experiments/quickstart.py",
        f"--config.data.cache_dir={tmp_path}",
    ]  # fmt: skip
    for fields, code, words in (
        (["source=text:http://127.0.0.1:1/a.txt"], 3, "can't be downloaded"),
        (["source=text:http://example.com/a.txt"], 2, "use https://, or set data.sha256"),
        (["source=text:https://"], 2, "names no server"),
        (["source=text:https://[::1/a.txt"], 2, "is not a URL"),
        (["sha256=abc"], 2, "data.sha256='abc' must be a SHA-256"),
    ):
        assert main([*command, *(f"--config.data.{field}" for field in fields)]) == code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_a_terminal_sees_a_bar(server, read, monkeypatch, capsys):
    assert read(f"text:{server.url}/a.txt") == [TEXT.decode()]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"downloading {server.url}/a.txt"
    assert len(lines) == 2
    server.files["/b.txt"] = TEXT
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    read(f"text:{server.url}/b.txt")
    assert "\rb.txt: " in capsys.readouterr().err


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
def test_tiny_shakespeare_downloaded_is_the_corpus_of_the_reproductions(server, tmp_path):
    server.files["/input.txt"] = SHAKESPEARE.read_bytes()
    cfg = load_config(
        f"{ROOT}/experiments/shakespeare_char.py",
        {"data.source": f"text:{server.url}/input.txt", "data.cache_dir": str(tmp_path)},
    )
    assert cfg.data.sha256 == hashlib.sha256(SHAKESPEARE.read_bytes()).hexdigest()
    store = prepare(sections.Data(**cfg.data), tmp_path, lambda _: None).parts[0].store
    local = data_config(source=f"text:{SHAKESPEARE}", tokenizer="chars")
    plain = prepare(local, tmp_path, lambda _: None).parts[0].store
    assert store.split(0.1) == plain.split(0.1) == ((0, 1_003_854), (1_003_854, 1_115_394))
    assert store.tokenizer.content_hash() == plain.tokenizer.content_hash()
    tokens = store.identity()["tokens"]
    assert tokens == plain.identity()["tokens"]
    for name in ("shakespeare_char_cpu", "wsd", "mup_transfer", "lr_sensitivity_qknorm"):
        paper = load_paper(f"{ROOT}/experiments/papers/{name}.py")
        assert paper.tokens == tokens
        assert {arm.config.data.sha256 for arm in paper.arms} == {cfg.data.sha256}
