"""Send JSON requests to a server, several at a time, and retry those that may succeed later.

The API key is sent in one header and used nowhere else.
"""

import email.utils
import http.client
import io
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from jcrosslora.distill.sources import ServedModel
from jcrosslora.errors import SourceError, UsageError
from jcrosslora.utils.progress import Track

T = TypeVar("T")
R = TypeVar("R")
KEYS = ("JCROSSLORA_SOURCE_KEY", "OPENAI_API_KEY")
# Too many requests, and faults of a server or of what stands in front of it, that may pass.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT, _MOST_ASKED_WAIT = 6, 0.5, 20.0, 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Bytes of an answer: a list of models has 1 MB, a text up to 4,096 positions with 256 bytes for each likely token.
_FEWEST_BYTES, _BYTES = 16 << 20, 4096 * 256
_PIECE = 1 << 16  # bytes


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
        """Take the address and the key; nothing is sent yet. `wait` takes the seconds between two attempts."""
        self.url = served.url.rstrip("/")
        self._requests = served.requests
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        if not (self._key or "").isascii() or not (self._key or "").isprintable():
            raise UsageError(f"the key in {' or '.join(KEYS)} holds characters that no header can hold: set it again")
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        # No proxy stands in front of the machine itself, whatever the environment says.
        proxies = [urllib.request.ProxyHandler({})] if urlsplit(self.url).hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirect, _Timed, *proxies)
        self._most = max(_FEWEST_BYTES, _BYTES * (served.top_logprobs + 1))
        self._seconds = served.timeout

    def get(self, path: str, kind: type[T]) -> T:
        """Fetch JSON of a type from an address below the server's, or, with a leading /, from its root; see `post`."""
        parts = urlsplit(self.url)
        url = f"{parts.scheme}://{parts.netloc}{path}" if path.startswith("/") else f"{self.url}/{path}"
        return self._ask(url, None, lambda content: read_reply(content, kind))

    def post(self, path: str, body: Mapping[str, Any], kind: type[T], check: Callable[[T], R]) -> R:
        """Send a request to a path below the server's address, retry until the answer is valid, and return its content.

        `check` extracts the content; if it raises `DamagedError`, the request is sent again. Raises RefusedError if the
        server rejects the request, and SourceError if the server cannot be reached, rejects the key, or gave no whole
        answer in several attempts.
        """
        data = json.dumps(body).encode()
        return self._ask(f"{self.url}/{path}", data, lambda content: check(read_reply(content, kind)))

    def map(self, function: Callable[[T], R], items: Sequence[T], bar: Track | None = None) -> list[R]:
        """Call a function that queries the server on every item, several at a time; the first error stops all."""

        def one(item: T) -> R:
            if self._stopped.is_set():
                raise SourceError("the request was given up")
            return function(item)

        pool = ThreadPoolExecutor(min(self._requests, max(1, len(items))), thread_name_prefix="source")
        try:
            futures = [pool.submit(one, item) for item in items]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if bar is not None and done:
                    bar.update(len(done))
            return [future.result() for future in futures]
        except BaseException:
            self._stopped.set()  # also wakes those that wait for another attempt
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()

    def _ask(self, url: str, data: bytes | None, read: Callable[[bytes], R]) -> R:
        reason, advice = "", ""
        for attempt in range(_ATTEMPTS):
            asked_wait, advice = 0.0, "check that the server runs, ask it for less at a time with --source-requests"
            try:
                return read(self._once(url, data))
            except urllib.error.HTTPError as error:
                reason = self._refusal(error)
                if error.code not in _PASSING:
                    raise self._final(error.code, reason) from None
                asked_wait = min(_stated_wait(error.headers.get("Retry-After")), _MOST_ASKED_WAIT)
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # refused, broken off, late
                reason = self._scrubbed(str(getattr(error, "reason", None) or error) or type(error).__name__)
            except DamagedError as error:
                reason = f"half an answer, or not the one that was asked for: {self._scrubbed(str(error))}"
                advice = "check what runs behind this address"
            if attempt + 1 < _ATTEMPTS and not self._stopped.is_set():
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                self._wait(max(backoff, asked_wait))
            if self._stopped.is_set():
                break
        msg = f"{self.url}: gave no answer in {_ATTEMPTS} attempts ({reason}): {advice}, and run the same command again"
        raise SourceError(msg + " to go on")

    def _once(self, url: str, data: bytes | None) -> bytes:
        """Return the content of an answer.

        Raises:
            urllib.error.HTTPError: the status is not 200; what it reads of the answer has the same deadline.
            OSError, http.client.HTTPException: there is no answer, or none in time.
            SourceError: the answer is too large.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "jcrosslora"}
        request = urllib.request.Request(url, data, headers)
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        content = bytearray()
        with self._opener.open(request, timeout=self._seconds) as answer:
            # In pieces, since a read of all allocates what the server says it will send.
            while piece := answer.read(_PIECE):
                content += piece
                if len(content) > self._most:
                    msg = f"{url}: answers with more than {self._most >> 20} MB, more than what was asked "
                    raise SourceError(msg + "for can have: check what runs behind this address")
        return bytes(content)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """Return what a server says of an error, in one line."""
        try:
            text = error.read(4096).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        finally:
            error.close()
        try:
            said: Any = msgspec.json.decode(text)
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
            text = said if isinstance(said, str) else json.dumps(said)
        except (msgspec.MsgspecError, RecursionError):
            pass
        return f"status {error.code}: {self._scrubbed(text) or error.reason}"

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
        text = text if self._key is None else text.replace(self._key, "***")
        return " ".join(text.split())[:300]


def _stated_wait(text: str | None) -> float:
    """Return the seconds of a Retry-After header, a number or a date; 0 if there is none, or one in the past."""
    with suppress(ValueError):
        return max(0.0, float(text or 0))
    with suppress(ValueError, OverflowError):
        parsed = email.utils.parsedate_tz(text)
        return 0.0 if parsed is None else max(0.0, email.utils.mktime_tz(parsed) - time.time())
    return 0.0


class _Timely(io.RawIOBase):
    """A socket's bytes until a deadline, which is the socket's time limit from now on."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw
        self._seconds = sock.gettimeout() or 0.0
        self._end = time.monotonic() + self._seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no whole answer in {self._seconds:.3g} seconds")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp: io.BufferedReader = io.BufferedReader(_Timely(sock, self.fp.detach()))


class _PlainConnection(http.client.HTTPConnection):
    response_class = _Answer


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Answer


class _Timed(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PlainConnection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Follow none, as they would carry a key along."""
