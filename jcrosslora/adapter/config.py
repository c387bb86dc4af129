"""Check an `adapter_config.json`: its kind of adapter, and the range of its numbers."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jcrosslora.adapter.kinds.config_tables import KNOWN_KEYS, OLORA, PISSA, PLAIN_INITS, REFUSED, VARIANTS, why_refused
from jcrosslora.adapter.patterns import is_matchable
from jcrosslora.errors import AdapterError

Config = Mapping[str, Any]


def check_type(config: Config, where: str, types: Collection[str]) -> None:
    """Refuse a kind of adapter that cannot be read.

    Args:
        config: the JSON object.
        where: its path, for messages.
        types: the `peft_type`s that are read.

    Raises:
        AdapterError: another kind of adapter (named).
    """
    if "fine_tune_type" in config:
        msg = f"{where}: has both peft_type, of PEFT, and fine_tune_type, of MLX: remove the one that does not apply"
        raise AdapterError(msg)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        msg = f"{where}: peft_type is {peft_type!r}, a name such as 'LORA' was wanted: correct the file"
        raise AdapterError(msg)
    if peft_type.upper() not in types:
        msg = f"{where}: an adapter of type {peft_type!r} is not supported: {why_refused(peft_type.upper())}"
        raise AdapterError(msg)


def check_lora(config: Config, where: str) -> None:
    """Refuse a configuration of type LORA whose update is not defined.

    Raises:
        AdapterError: a variant that is refused (named), or a missing or invalid value.
    """
    for kind, (why, cure) in REFUSED.items():
        if VARIANTS[kind](config):
            msg = f"{where}: {kind} is not supported: {why}; {cure}"
            raise AdapterError(msg)
    _check_init(config, where)
    check_numbers(config, where)
    check_targets(config, where)


def config_notes(config: Config) -> list[str]:
    """List settings that do not move with the factors, one sentence each."""
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is true, which peft ignores on linear layers; it was ignored.")
    if str(config.get("init_lora_weights")).lower() == "lora_ga":
        notes.append(
            "init_lora_weights is lora_ga: if training changed the base weights, that change is not in the adapter."
        )
    unknown = [key for key, value in config.items() if key not in KNOWN_KEYS and value]
    return notes + [f"config key {key} is not known and was ignored." for key in unknown]


def _check_init(config: Config, where: str) -> None:
    init = config.get("init_lora_weights", True)
    read = VARIANTS[PISSA](config) or VARIANTS[OLORA](config)
    if str(init).lower() not in PLAIN_INITS and not read:
        msg = (
            f"{where}: init_lora_weights {init!r} is not known: it may have changed the base weights; use a plain LoRA"
        )
        raise AdapterError(msg)


def check_rank(config: Config, where: str) -> None:
    """Refuse an invalid rank.

    Raises:
        AdapterError: `r` is missing or is not a whole number of 1 or more.
    """
    if not is_rank(config.get("r")):
        msg = f"{where}: r is {shown(config, 'r')}, a whole number of 1 or more was wanted: correct the file"
        raise AdapterError(msg)


def check_numbers(config: Config, where: str, alpha: str = "lora_alpha") -> None:
    """Refuse invalid ranks and scales.

    Args:
        config: the JSON object.
        where: its path, for messages.
        alpha: the key of the number that is divided by the rank.

    Raises:
        AdapterError: `r`, `alpha`, `use_rslora` or one of the patterns is missing or invalid.
    """
    check_rank(config, where)
    if not is_alpha(config.get(alpha)):
        msg = f"{where}: {alpha} is {shown(config, alpha)}, a number other than 0 was wanted: correct the file"
        raise AdapterError(msg)
    if not isinstance(config.get("use_rslora") or False, bool):
        msg = f"{where}: use_rslora is {shown(config, 'use_rslora')}, true or false was wanted: correct the file"
        raise AdapterError(msg)
    _check_patterns(config, where)


def _check_patterns(config: Config, where: str) -> None:
    for table, valid, wanted in (("rank_pattern", is_rank, "ranks"), ("alpha_pattern", is_alpha, "numbers")):
        values = config.get(table) or {}
        if not isinstance(values, dict):
            msg = f"{where}: {table} is {shown(config, table)}, an object of {wanted} was wanted: correct the file"
            raise AdapterError(msg)
        for key, value in values.items():
            if not valid(value) or not is_matchable(key):
                msg = f"{where}: {table} has {key!r}: {value!r}, a pattern and one of {wanted} was wanted: correct it"
                raise AdapterError(msg)


def check_targets(config: Config, where: str) -> None:
    """Refuse `target_modules` that are not names.

    Raises:
        AdapterError: they are not.
    """
    targets = config.get("target_modules")
    as_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if targets is not None and not isinstance(targets, str) and not as_list:
        msg = f"{where}: target_modules is {shown(config, 'target_modules')}, names were wanted: correct the file"
        raise AdapterError(msg)


def is_rank(value: Any) -> bool:
    """Whether a JSON value can be a rank: a whole number of 1 or more."""
    return is_alpha(value) and value == int(value) and value >= 1


def is_alpha(value: Any) -> bool:
    """Whether a JSON value can be a lora_alpha: a finite number other than 0, which would make the update zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and not math.isnan(value) and value != 0


def shown(config: Config, key: str) -> str:
    """Format a value for a message, shortened; "missing" if it is absent."""
    return repr(config[key])[:60] if key in config else "missing"
