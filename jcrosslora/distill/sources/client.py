"""Send JSON requests to a server, several at a time, retry those that may succeed later, and keep answers on disk.

The API key is sent in one header and used nowhere else.
"""

import asyncio
import json
import os
import random
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from jcrosslora.distill.sources import ServedModel
from jcrosslora.errors import SourceError, UsageError
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.progress import Track
from jcrosslora.utils.unfinished import remove_unchanged

T = TypeVar("T")
R = TypeVar("R")
KEYS = ("JCROSSLORA_SOURCE_KEY", "OPENAI_API_KEY")
# Too many requests, and faults of a server or its proxy that may pass.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT, _MOST_ASKED_WAIT = 6, 0.5, 20.0, 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Bytes of an answer: a list of models has 1 MB, a text up to 4,096 positions with 256 bytes for each likely token.
_FEWEST_BYTES, _BYTES = 16 << 20, 4096 * 256
_SAMPLE = "sample"
_JSON = "application/json"
_HEADERS = {"Content-Type": _JSON, "Accept": _JSON, "Accept-Encoding": "identity", "User-Agent": "jcrosslora"}


class DamagedError(SourceError):
    """An answer does not fit the request; the message names the field."""


class RefusedError(SourceError):
    """The server rejected the content of a request, with status 400, 404 or 422."""


def read_reply(content: bytes, kind: type[T]) -> T:
    """Read JSON as a type, or raise DamagedError; unknown fields are ignored."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(str(error)) from None


class Client:
    """A server of the OpenAI API."""

    def __init__(self, served: ServedModel, wait: Callable[[float], Any] | None = None) -> None:
        """Take the address and the key; nothing is sent yet. `wait` is called with the seconds between attempts."""
        self.url = served.url.rstrip("/")
        self._requests, self._seconds = served.requests, served.timeout
        self._most = max(_FEWEST_BYTES, _BYTES * (served.top_logprobs + 1))
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), "")
        if not self._key.isascii() or not self._key.isprintable():
            raise UsageError(f"the key in {' or '.join(KEYS)} holds characters that no header can hold: set it again")
        try:
            self._root = httpx.URL(f"{self.url}/")
            self._http = httpx.AsyncClient(
                headers=_HEADERS | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
                # The certificates of this machine; and one connection for each request, so that none is left open.
                verify=ssl.create_default_context(),
                limits=httpx.Limits(max_keepalive_connections=0),
                timeout=None,
                # No proxy stands in front of the machine itself, whatever the environment says.
                trust_env=self._root.host not in _LOOPBACK,
            )
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            msg = f"{self.url}: cannot be reached ({error}): check the address, and the proxies in the environment"
            raise UsageError(msg) from None

    def ask(self, path: str, read: Callable[[bytes], R], body: Mapping[str, Any] | None = None) -> R:
        """Request a path below the server's address, or with a leading / below its root, until the answer is valid.

        `read` takes the content; if it raises DamagedError, the request is sent again. Raises RefusedError if the
        server rejects the request, and SourceError if it cannot be reached, rejects the key, or gave no whole answer in
        several attempts.
        """
        data = None if body is None else json.dumps(body).encode()
        reason, advice, asked_wait = "", "", 0.0
        for attempt in range(_ATTEMPTS):
            if attempt:
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                self._wait(max(backoff, asked_wait))
            if self._stopped.is_set():
                break
            asked_wait, advice = 0.0, "check that the server runs, ask it for less at a time with --source-requests"
            try:
                answer, content = asyncio.run_coroutine_threadsafe(self._once(path, data), _loop()).result()
                if answer.is_success:
                    return read(content)
                reason = f"status {answer.status_code}: {self._scrubbed(_said(content)) or answer.reason_phrase}"
                if answer.status_code not in _PASSING:
                    raise self._final(answer.status_code, reason)
                asked_wait = min(_stated_wait(answer.headers.get("Retry-After")), _MOST_ASKED_WAIT)
            except TimeoutError:
                reason = f"no whole answer in {self._seconds:.3g} seconds"
            except httpx.ConnectError as error:
                reason = f"the connection was refused or failed: {self._scrubbed(str(error))}"
            except (httpx.HTTPError, OSError) as error:  # broken off
                reason = self._scrubbed(str(error)) or type(error).__name__
            except DamagedError as error:
                reason = f"half an answer, or not the one that was asked for: {self._scrubbed(str(error))}"
                advice = "check what runs behind this address"
        msg = f"{self.url}: gave no answer in {_ATTEMPTS} attempts ({reason}): {advice}, and run the same command again"
        raise SourceError(msg + " to go on")

    def map(self, function: Callable[[T], R], items: Sequence[T], bar: Track | None = None) -> list[R]:
        """Call a function that queries the server on every item, several at a time; the first error stops all."""
        with ThreadPoolExecutor(self._requests, thread_name_prefix="source") as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    if bar is not None:
                        bar.update(1)
            except BaseException:
                self._stopped.set()  # also wakes those that wait for another attempt
                pool.shutdown(cancel_futures=True)
                self._stopped.clear()
                raise
        return [future.result() for future in futures]

    async def _once(self, path: str, data: bytes | None) -> tuple[httpx.Response, bytes]:
        """Return an answer with its content; raise TimeoutError unless all of it comes in time."""
        method, url, content = "GET" if data is None else "POST", self._root.join(path), bytearray()
        async with asyncio.timeout(self._seconds), self._http.stream(method, url, content=data) as answer:
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > self._most:
                    msg = f"{url}: answers with more than {self._most >> 20} MB, more than what was asked "
                    raise SourceError(msg + "for can have: check what runs behind this address")
        return answer, bytes(content)

    def _final(self, status: int, reason: str) -> SourceError:
        if status in (401, 403):
            have = "the key of the environment was sent" if self._key else "no key was sent"
            return SourceError(f"{self.url}: refuses the request ({reason}; {have}): set {' or '.join(KEYS)}")
        if 300 <= status < 400:
            return SourceError(f"{self.url}: sends requests elsewhere ({reason}): give the address that it names")
        msg = f"{self.url}: refuses the request ({reason}): check the address, which usually ends in /v1, and the model"
        return RefusedError(msg)

    def _scrubbed(self, text: str) -> str:
        """Return a text in one line of at most 300 characters, without the key."""
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:300]


class Answers:
    """A cache of the answers of one model on one server, off without a folder. Disk errors are ignored."""

    def __init__(self, parent: Path | None, identity: Any) -> None:
        """Use a folder below `parent`, named by a digest of the JSON value `identity`; None turns the cache off."""
        self._folder = None if parent is None else parent / digest_of(identity)[:24]
        if parent is not None and self._folder is not None:
            remove_unchanged(parent, self._folder)

    def renew(self, sample: T, is_of: Callable[[T], bool]) -> None:
        """Drop all answers unless the cached sample, answers to fixed requests, is of the same model as this one."""
        kept = self.find(_SAMPLE, type(sample))
        if self._folder is not None and (kept is None or not is_of(kept)):
            shutil.rmtree(self._folder, ignore_errors=True)
            self.keep(_SAMPLE, sample)

    def find(self, key: str, kind: type[T]) -> T | None:
        """Return the answer under a key, if there is one of this type."""
        with suppress(OSError, DamagedError):
            return None if self._folder is None else read_reply((self._folder / f"{key}.json").read_bytes(), kind)
        return None

    def keep(self, key: str, answer: Any) -> None:
        """Keep an answer under a key, which is a file name, with or without a folder."""
        if self._folder is not None:
            with suppress(OSError):
                path = self._folder / f"{key}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, msgspec.json.encode(answer))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Start the thread that sends all requests: a notebook already runs a loop, which cannot be waited on."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="source", daemon=True).start()
    return loop


def _said(content: bytes) -> str:
    """Return a server's error message, from JSON of several forms or from plain text."""
    try:
        said: Any = msgspec.json.decode(content)
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
        return said if isinstance(said, str) else json.dumps(said)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return content[:4096].decode(errors="replace")


def _stated_wait(text: str | None) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 if there is none, or one in the past."""
    for read in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        with suppress(ValueError, OverflowError):
            return max(0.0, read(text or "0"))
    return 0.0
