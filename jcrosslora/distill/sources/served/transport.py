"""HTTP requests whose answers have a deadline and a largest size, headers and refusals included.

The time limit of a socket is for each read, so that a byte now and then would hold a read on for ever.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.request
from typing import Any

from jcrosslora.errors import SourceError

_PIECE = 1 << 16  # bytes


class Transport:
    """Sends requests. Redirects are not followed, because they would carry a key along."""

    def __init__(self, seconds: float, most: int, *, direct: bool) -> None:
        """Set the limits.

        Args:
            seconds: that reaching the server, sending a request and reading its answer may take, each.
            most: bytes of an answer.
            direct: whether to pass by the proxies of the environment.
        """
        self._seconds, self._most = seconds, most
        proxies = [urllib.request.ProxyHandler({})] if direct else []
        self._opener = urllib.request.build_opener(_NoRedirect, _Plain, _Secure, *proxies)

    def fetch(self, request: urllib.request.Request) -> bytes:
        """Return the content of an answer.

        Raises:
            urllib.error.HTTPError: the status is not 200; what it reads of the answer has the same deadline.
            OSError, http.client.HTTPException: there is no answer, or none in time.
            SourceError: the answer is too large.
        """
        content = bytearray()
        with self._opener.open(request, timeout=self._seconds) as answer:
            # In pieces, since a read of all allocates what the server says it will send.
            while piece := answer.read(_PIECE):
                content += piece
                if len(content) > self._most:
                    msg = f"{request.full_url}: answers with more than {self._most >> 20} MB, more than what was asked "
                    raise SourceError(msg + "for can have: check what runs behind this address")
        return bytes(content)


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
            msg = f"no whole answer in {self._seconds:.3g} seconds"
            raise TimeoutError(msg)
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


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PlainConnection, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Follow none."""
