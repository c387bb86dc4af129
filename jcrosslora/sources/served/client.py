"""Requests to a server: JSON in and out, several at a time, tried again where that can help.

The key goes into one header and nowhere else. Redirects are not followed, because they would carry it along.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jcrosslora.errors import SourceError
from jcrosslora.sources.served.model import ServedModel
from jcrosslora.utils.progress import Track

T = TypeVar("T")
R = TypeVar("R")
KEYS = ("JCROSSLORA_SOURCE_KEY", "OPENAI_API_KEY")
# Too many requests, and faults of a server or of what stands in front of it, that may pass.
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_ATTEMPTS, _FIRST_WAIT, _LONGEST_WAIT, _MOST_ASKED_WAIT = 6, 0.5, 20.0, 120.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RefusedError(SourceError):
    """The server refused a request for what it asks, with status 400, 404 or 422."""


class Client:
    """A server of the OpenAI API."""

    def __init__(self, served: ServedModel, wait: Callable[[float], Any] | None = None) -> None:
        """Take the address and the key; nothing is sent yet.

        Args:
            served: the server.
            wait: takes the seconds between two attempts; None waits for them.
        """
        self.url = served.url.rstrip("/")
        self._timeout, self._requests = served.timeout, served.requests
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        direct = urlsplit(self.url).hostname in _LOOPBACK
        # No proxy stands in front of the machine itself, whatever the environment says.
        proxies = [urllib.request.ProxyHandler({})] if direct else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def get(self, path: str) -> Any:
        """Fetch JSON from an address below the server's, or, with a leading /, from its root.

        Raises:
            SourceError: see `post`.
        """
        parts = urlsplit(self.url)
        return self._ask(f"{parts.scheme}://{parts.netloc}{path}" if path.startswith("/") else f"{self.url}/{path}")

    def post(self, path: str, body: Mapping[str, Any], check: Callable[[Any], R]) -> R:
        """Send a request until its answer is one.

        Args:
            path: below the server's address.
            body: JSON values.
            check: takes the parts that are wanted out of the answer; a `ValueError`, `LookupError` or `TypeError` of it
                says that the answer is damaged, which is asked for again.

        Raises:
            RefusedError: the server refuses what is asked for.
            SourceError: the server cannot be reached, refuses the key, or gave no whole answer in several attempts.
        """
        return self._ask(f"{self.url}/{path}", json.dumps(body).encode(), check)

    def map(self, function: Callable[[T], R], items: Sequence[T], bar: Track | None = None) -> list[R]:
        """Call a function that asks the server on every item, several at a time; the first error ends all.

        Args:
            function: to call.
            items: in any number.
            bar: advances by one for each.
        """

        def one(item: T) -> R:
            if self._stopped.is_set():
                msg = "the request was given up"
                raise SourceError(msg)
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

    def _ask(self, url: str, data: bytes | None = None, check: Callable[[Any], Any] = lambda found: found) -> Any:
        reason = ""
        for attempt in range(_ATTEMPTS):
            asked_wait = None
            try:
                return check(self._once(url, data))
            except urllib.error.HTTPError as error:
                reason = self._refusal(error)
                if error.code not in _PASSING:
                    raise self._final(error.code, reason) from None
                asked_wait = _stated_wait(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # refused, broken off, no answer in time
                reason = self._scrubbed(str(getattr(error, "reason", None) or error) or type(error).__name__)
            except (ValueError, LookupError, TypeError) as error:
                reason = f"half an answer, or not the one that was asked for ({self._scrubbed(str(error))})"
            if attempt + 1 < _ATTEMPTS and not self._stopped.is_set():
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                self._wait(backoff if asked_wait is None else min(asked_wait, _MOST_ASKED_WAIT))
            if self._stopped.is_set():
                break
        msg = f"{self.url}: gave no answer in {_ATTEMPTS} attempts ({reason}): check that the server runs, ask it for "
        raise SourceError(msg + "less at a time with --source-requests, and run the same command again to go on")

    def _once(self, url: str, data: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "jcrosslora"}
        request = urllib.request.Request(url, data, headers)
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self._timeout) as answer:
            return json.loads(answer.read())

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """Return what a server says of an error, in one line."""
        try:
            text = error.read(4096).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        finally:
            error.close()
        try:
            said: Any = json.loads(text)
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
            text = said if isinstance(said, str) else json.dumps(said)
        except ValueError:
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Follow none."""


def _stated_wait(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        parsed = email.utils.parsedate_tz(text)
        return None if parsed is None else max(0.0, email.utils.mktime_tz(parsed) - time.time())
