"""Open the source of a transfer that is asked: a served model, or one on torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import AdapterFiles, read_config, stated_licences
from jcrosslora.adapter.records import AdapterInfo
from jcrosslora.cache import Cache
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.distill.sources.served.model import ServedModel
from jcrosslora.distill.sources.torch_model import TorchModel
from jcrosslora.errors import UsageError
from jcrosslora.session.asked import AskedSource

AskedModel = ServedModel | TorchModel


def open_asked(
    model: AskedModel, adapter: Any = None, *, revision: str | None = None, store: Cache | None = None
) -> AskedSource:
    """Open a source that is asked.

    Args:
        model: which one.
        adapter: a folder of PEFT or a hub id for torch; None for a served model, which has its own.
        revision: of the adapter's hub id.
        store: the cache in which a server's answers are kept; None keeps none.

    Raises:
        UsageError: an adapter where none is wanted, or none where one is.
        SourceError, CheckpointError, AdapterError: it cannot be opened.
    """
    if isinstance(model, ServedModel):
        if adapter is not None and adapter != model.model:
            msg = f"adapter {str(adapter)[:200]} was given beside a served model, which has its own: leave it out, and "
            raise UsageError(msg + "name the served adapter with --source-model")
        return _served(model, store)
    if not isinstance(adapter, str | Path):
        msg = "a source on torch needs an adapter in files: give a folder of PEFT or a hub id"
        raise UsageError(msg)
    return _on_torch(model, adapter, revision)


def _served(model: ServedModel, store: Cache | None) -> AskedSource:
    from jcrosslora.distill.sources.served.source import ServedSource

    source = ServedSource.open(model, None if store is None else store.root / "answers")
    settings: dict[str, Any] = {
        "source_model": public_name(model.model),
        "source_base_model": public_name(model.base_model),
        "source_tokenizer": public_name(str(model.tokenizer)),
    }
    if model.top_logprobs != _default("top_logprobs"):
        settings["source_top_logprobs"] = model.top_logprobs
    info = AdapterInfo(name=model.model)

    def how() -> str:
        return (
            f"asked as {model.model} over the OpenAI API, for the {source.told} at each position, beside {source.name}"
        )

    return AskedSource(source, info, None, how, settings)


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(ServedModel) if field.name == name)


def _on_torch(model: TorchModel, adapter: str | Path, revision: str | None) -> AskedSource:
    from jcrosslora.distill.sources.torch import TorchSource

    source = TorchSource.open(model, adapter, revision=revision)
    settings = {"source_backend": "torch", "source_tokenizer": public_name(_text(model.tokenizer))}
    info, rank = _read_info(source.files, source.digest, revision)
    return AskedSource(source, info, rank, lambda: "run by transformers and PEFT", settings)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _read_info(files: AdapterFiles, digest: str, revision: str | None) -> tuple[AdapterInfo, int | None]:
    """Read what an adapter's configuration and card say of it."""
    config = {} if files.config is None else read_config(files.config)
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    info = AdapterInfo(
        name=files.name,
        base_name=base if isinstance(base, str) else None,
        form=files.form,
        digest=digest,
        revision=revision,
        kind=str(config.get("peft_type", "LoRA")),
        **stated_licences(files),
    )
    return info, rank if type(rank) is int else None
