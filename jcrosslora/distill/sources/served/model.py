"""`ServedModel`: what has to be known of a source that a server runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jcrosslora.errors import UsageError


@dataclass(frozen=True)
class ServedModel:
    """A base with an adapter that an OpenAI-compatible server runs: vLLM, SGLang, llama.cpp's or another.

    A key for the server is taken from the environment, JCROSSLORA_SOURCE_KEY or else OPENAI_API_KEY, and sent to this
    server alone.

    Attributes:
        url: such as http://host:8000/v1.
        model: the server's name of the base with the adapter.
        tokenizer: of the base: a folder with tokenizer.json, a GGUF file, or a hub id.
        base_model: the server's name of the base alone; None takes what the server says of the adapter: its parent
            (vLLM, SGLang), or the model with the adapter switched off (llama.cpp).
        chat_template: a file with the template that takes the place of the tokenizer's own.
        top_logprobs: how many of the likeliest tokens to ask for; servers allow 20 unless told otherwise.
        requests: the most requests at a time.
        timeout: seconds that a whole answer may take, however it trickles in.
    """

    url: str
    model: str
    tokenizer: str | Path
    base_model: str | None = None
    chat_template: str | Path | None = None
    top_logprobs: int = 20
    requests: int = 8
    timeout: float = 120.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: the address is none, or holds a password or a query; or a number is out of range.
        """
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            msg = f"source_url is {self.url[:200]!r}, wanted an address such as http://host:8000/v1"
            raise UsageError(msg)
        if parts.username or parts.password or parts.query or parts.fragment:
            msg = "source_url holds a name, a password or a query, which do not belong there: give a key by the "
            raise UsageError(msg + "environment variable JCROSSLORA_SOURCE_KEY or OPENAI_API_KEY")
        for name, fewest in (("top_logprobs", 1), ("requests", 1)):
            if getattr(self, name) < fewest:
                msg = f"source_{name} is {getattr(self, name)}, wanted {fewest} or more"
                raise UsageError(msg)
        if not self.timeout > 0:
            msg = f"the timeout of the source is {self.timeout}, wanted a positive number of seconds"
            raise UsageError(msg)
