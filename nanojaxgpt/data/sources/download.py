"""In: a URL. Out: its file below the cache, downloaded once and resumed after a break.

CACHE/downloads/KEY/NAME           KEY is a hash of the URL, NAME the last part of its path
CACHE/downloads/KEY/NAME.sha256    its hash as it came, by which damage is found
CACHE/downloads/KEY/NAME.partial   what has come so far; NAME.validator names its version
CACHE/downloads/KEY/NAME.refused   a download whose hash is not among those of data.sha256
"""

import fcntl
import hashlib
import ipaddress
import queue
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from nanojaxgpt.config import cache_path, sections
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError, DataError

SECONDS = 15.0  # until a server answers, and until it sends more of the file
CHUNK_BYTES = 1 << 18
URL = re.compile(r"https?://", re.IGNORECASE)


def is_url(location: str) -> bool:
    """Return whether a location is to be downloaded."""
    return bool(URL.match(location))


def fetch(url: str, data: sections.Data, verify: bool = False) -> Path:
    """Return the file that `url` names, downloaded into the cache where it is not there yet.

    With `verify`, a file that is not as it came is downloaded again. Of several processes one
    downloads and the others wait. Raises ConfigError for a URL that can't be used, DataError where
    the file can't be had or has another hash than data.sha256 says.
    """
    folder, name = place_of(url, data)
    target = folder / name
    problem = damage(target, data.sha256) if verify else ""
    if target.exists() and not problem:
        return target
    check_url(url, data.sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder / f"{name}.lock", f"another process is downloading {url}", warn):
            if not target.exists():
                download(url, target, data.sha256)
            elif problem := damage(target, data.sha256):  # unless another process has mended it
                warn(f"{target} {problem}: downloading {url} again")
                try:
                    download(url, target, data.sha256)
                except DataError as error:
                    raise DataError(f"{target} {problem}, and {error}") from error
    except OSError as error:
        raise DataError(f"can't write to {folder}: {error.strerror or error}") from error
    return target


def place_of(url: str, data: sections.Data) -> tuple[Path, str]:
    """Return the folder of a download and the name of its file. Raises ConfigError."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{url} is not a URL: {error}") from error
    if not parts.hostname:
        raise ConfigError(f"{url} is not a URL: it names no server")
    name = Path(urllib.parse.unquote(parts.path)).name
    return cache_path(data.cache_dir) / "downloads" / key, name or "download"


def damage(target: Path, sha256: str) -> str:
    """Return in words how a cached download differs from what came, or ""; "" if it is not there.

    One that has no hash beside it, from an older version, is compared with data.sha256 alone.
    """
    note = note_path(target)
    came = note.read_text().strip() if note.is_file() else ""
    if not target.is_file() or not (came or sha256):
        return ""
    digest = hash_of(target)
    if came and digest != came:
        return f"was altered since it was downloaded (its SHA-256 is {digest}, it was {came})"
    if not came and digest not in split_digests(sha256):
        return f"has another content than data.sha256 says (its SHA-256 is {digest})"
    return ""


def note_path(target: Path) -> Path:
    """Return the file that holds the hash of a download as it came."""
    return target.with_name(target.name + ".sha256")


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_url(url: str, sha256: str) -> None:
    """Raise ConfigError where anybody on the way could change the file unnoticed."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if parts.scheme.lower() == "http" and not local and not sha256:
        raise ConfigError(
            f"{url} is not encrypted; use https://, or set data.sha256 so that the file is checked"
        )


def download(url: str, target: Path, sha256: str) -> None:
    """Download `url` as `target`, whose lock is held; what came before a break is kept."""
    partial = target.with_name(target.name + ".partial")
    furthest = partial.stat().st_size if partial.exists() else 0
    while problem := receive(url, partial, sha256):
        size = partial.stat().st_size
        if size <= furthest:  # nothing new has come
            raise DataError(
                f"{url} broke off after {size:,} bytes ({problem}); rerun the command to resume"
            )
        furthest = size
        warn(f"{url} broke off after {size:,} bytes ({problem}); resuming")
    digest = hash_of(partial)
    try:
        check_digest(url, digest, sha256)
    except DataError as error:
        refused = target.with_name(target.name + ".refused")
        partial.replace(refused)
        raise DataError(f"{error}; the file was kept as {refused}") from None
    size = partial.stat().st_size
    note_path(target).unlink(missing_ok=True)  # a kill here leaves no wrong one
    partial.replace(target)
    note_path(target).write_text(f"{digest}\n")
    validator_path(partial).unlink(missing_ok=True)
    hint = "" if sha256 else f"; to check it from now on, set data.sha256={digest}"
    warn(f"downloaded {url}: {size:,} bytes, {target}{hint}")


def check_digest(url: str, digest: str, sha256: str) -> None:
    """Raise DataError unless data.sha256 is "" or lists the digest of a download."""
    if sha256 and digest not in split_digests(sha256):
        raise DataError(
            f"{url} has another content than data.sha256 says: its SHA-256 is {digest}. Correct "
            'data.sha256, or set it to "" to have nothing checked'
        )


def split_digests(sha256: str) -> list[str]:
    """Return the digests that data.sha256 lists."""
    return [digest.strip().lower() for digest in sha256.split(",")]


def receive(url: str, partial: Path, sha256: str) -> str:
    """Add the missing bytes to `partial`; return "", or the reason why it broke off.

    A server that does not know ranges, or whose file has changed since, sends all of it: `partial`
    begins anew. Raises DataError where it does not answer or refuses.
    """
    tag = validator_path(partial)
    start = partial.stat().st_size if partial.exists() and tag.exists() else 0
    headers = {"User-Agent": "nanojaxgpt"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text()}
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    try:
        response = open_url(urllib.request.Request(quoted, headers=headers))
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # no such range: it is complete, or another file
            if error.headers.get("Content-Range", "") == f"bytes */{start}":
                return ""
            partial.unlink()
            return receive(url, partial, sha256)
        raise DataError(f"{url} can't be downloaded: {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"{url} can't be downloaded: {reason_of(error)}. Check the network and the address; or "
            "fetch the file on another machine, and give its path in place of the URL"
        ) from error
    with response:
        check_url(response.url, sha256)  # it may have been redirected
        begin, total = extent(response)
        if begin not in (0, start):
            return f"the server sent bytes from {begin:,} where {start:,} was requested"
        write_validator(tag, response)
        with (
            open(partial, "ab" if begin else "wb") as file,
            progress(url, begin, total) as advance,
        ):
            while True:
                try:
                    chunk = response.read1(CHUNK_BYTES)
                except (OSError, HTTPException) as error:
                    return reason_of(error)
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
            return "the connection was closed" if file.tell() < total else ""


def open_url(request: urllib.request.Request) -> HTTPResponse:
    """Return the answer to a request. Raises TimeoutError where there is none within SECONDS.

    The thread bounds all of it: finding the host, and trying its addresses one after the other,
    would take that long each.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=SECONDS)
    except queue.Empty:
        answer = TimeoutError()
    # The connection's own timeout may come first.
    if isinstance(getattr(answer, "reason", answer), TimeoutError):
        raise TimeoutError(f"no answer within {SECONDS:.0f} s")
    if isinstance(answer, Exception):
        raise answer
    return answer


def extent(response: HTTPResponse) -> tuple[int, int]:
    """Return at which byte a response begins, and the size of the whole file; 0: not told."""
    if response.status == 206:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found:
            return -1, 0
        return int(found[1]), 0 if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else 0


def validator_path(partial: Path) -> Path:
    """Return the file that says which version of a URL's file a partial download is of."""
    return partial.with_suffix(".validator")


def write_validator(path: Path, response: HTTPResponse) -> None:
    """Write what If-Range compares: a strong ETag, else the date; nothing where there is neither.

    Without one a partial download can't be resumed: the rest might be another version's.
    """
    tag = response.headers.get("ETag", "")
    validator = response.headers.get("Last-Modified", "") if tag[:2] in ("", "W/") else tag
    if validator:
        path.write_text(validator)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def progress(url: str, begin: int, total: int) -> Iterator[Callable[[int], object]]:
    """Give a function of how many bytes came: a bar on a terminal, elsewhere one line ahead."""
    if not sys.stderr.isatty():
        size = f" of {total:,}" if total else ""
        warn(f"downloading {url}: from byte {begin:,}{size}" if begin else f"downloading {url}")
        yield lambda _: None
        return
    from tqdm import tqdm

    name = url.rpartition("/")[2][:40]
    with tqdm(
        total=total or None, initial=begin, unit="B", unit_scale=True, desc=name, leave=False
    ) as bar:
        yield bar.update


@contextmanager
def hold_lock(path: Path, busy: str, report: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock at `path`; where another process has it, report `busy` and wait.

    The file goes when all went well: what it guards is there by then, for those who waited too.
    """
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{busy}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)


def reason_of(error: Exception) -> str:
    """Return in words what went wrong with a connection."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return str(cause) if "answer" in str(cause) else f"no data came for {SECONDS:.0f} s"
    text = cause.strerror if isinstance(cause, OSError) else str(cause)
    return text or type(cause).__name__
