"""Activated LoRA: s B A, active only from the last occurrence of certain tokens on (arXiv 2504.12397).

Its weights are those of a plain LoRA. `maps.shifting.other_changes` translates the tokens to another tokenizer.
"""

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.kinds import config_tables
from jcrosslora.adapter.kinds.kind import Config, Kind
from jcrosslora.adapter.kinds.plain import PLAIN
from jcrosslora.errors import AdapterError


def invocation_of(config: Config) -> tuple[int, ...] | None:
    """Return the token ids from which on an adapter is active; None if it is always active."""
    tokens = config.get("alora_invocation_tokens")
    return None if tokens is None else tuple(tokens)


def _check(config: Config, where: str) -> None:
    check_lora(config, where)
    tokens = config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        msg = (
            f"{where}: alora_invocation_tokens is {str(tokens)[:60]}, a list of token ids was wanted: correct the file"
        )
        raise AdapterError(msg)


ALORA = Kind(
    name="aLoRA",
    peft_type="LORA",
    formula="s B A after its invocation tokens",
    read=PLAIN.read,
    check=_check,
    applies=lambda config, _: config_tables.VARIANTS[config_tables.ALORA](config),
)
