"""The formats of quantised weights, and the choice among them for a checkpoint."""

from collections.abc import Iterable, Mapping
from typing import Any

from jcrosslora.checkpoint.quantised.awq import AWQ
from jcrosslora.checkpoint.quantised.bitsandbytes import BITSANDBYTES4, BITSANDBYTES8
from jcrosslora.checkpoint.quantised.compressed_tensors import INT8, PACK_QUANTIZED
from jcrosslora.checkpoint.quantised.format import Format, Settings
from jcrosslora.checkpoint.quantised.fp8 import FP8
from jcrosslora.checkpoint.quantised.gptq import GPTQ
from jcrosslora.checkpoint.quantised.mxfp4 import MXFP4
from jcrosslora.errors import CheckpointError

# A checkpoint may mix the formats that claim its settings; the first that recognises the tensors of a weight opens it.
FORMATS: tuple[Format, ...] = (BITSANDBYTES4, BITSANDBYTES8, GPTQ, AWQ, PACK_QUANTIZED, FP8, INT8, MXFP4)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Return the `quantization_config` of a configuration, {} without one; a string is taken as the method."""
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    return settings if isinstance(settings, dict) else {"quant_method": settings}


def check_quantization(config: Mapping[str, Any], path: str) -> None:
    """Refuse a quantised checkpoint that no format can read, by name.

    Args:
        config: the model's configuration.
        path: its file or the name of the base, for the error.

    Raises:
        CheckpointError: an unknown quantisation, or an unsupported variant.
    """
    settings = settings_of(config)
    if not settings:
        return
    claiming = [form for form in FORMATS if form.claims(settings)]
    reasons = (form.obstacle(settings) for form in claiming)
    reason = next((reason for reason in reasons if reason is not None), None)
    if claiming and reason is None:
        return
    known = ", ".join(form.name for form in FORMATS)
    msg = (
        f"{path}: weights quantised with {str(settings.get('quant_method'))[:60]!r} are not supported"
        f"{f' where {reason}' if reason else ''} (supported: {known}): use the unquantised checkpoint, or one in GGUF"
    )
    raise CheckpointError(msg)


def formats_in(config: Mapping[str, Any], names: Iterable[str], where: str) -> tuple[Format, ...]:
    """Return the formats that may occur in a checkpoint, by its settings, or by its tensors without settings.

    Args:
        config: a configuration that has passed `check_quantization`.
        names: names of the stored tensors.
        where: the folder or base, for the error.

    Raises:
        CheckpointError: packed tensors that cannot be read without settings.
    """
    settings = settings_of(config)
    if settings:
        return tuple(form for form in FORMATS if form.claims(settings))
    names = tuple(names)
    packed = next((name for name in names if name.endswith((GPTQ.holder, AWQ.holder))), None)
    if packed is not None:
        msg = (
            f"{where}: tensor {packed!r} is packed as GPTQ and AWQ do, but config.json has no quantization_config: "
            "copy that of the model's page, or the content of quantize_config.json, into it"
        )
        raise CheckpointError(msg)
    return tuple(form for form in FORMATS if form.marks and any(name.endswith(form.marks) for name in names))
