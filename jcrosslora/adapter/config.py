"""Check an `adapter_config.json`: that it is a plain LoRA configuration whose numbers make sense."""

import math
from collections.abc import Mapping
from typing import Any

from jcrosslora.adapter.kinds import KNOWN_KEYS, PLAIN_INITS, REFUSED, peft_type_cure
from jcrosslora.adapter.pattern_cost import is_matchable
from jcrosslora.errors import AdapterError

Config = Mapping[str, Any]


def check_config(config: Config, where: str) -> None:
    """Refuse a configuration that is not one of plain LoRA, or that cannot be computed with.

    Args:
        config: the JSON object.
        where: its path, for messages.

    Raises:
        AdapterError: another kind of adapter (named), or a missing or senseless value.
    """
    _check_type(config, where)
    for refusal in REFUSED:
        if refusal.applies(config):
            msg = f"{where}: {refusal.kind} is not supported: {refusal.why}; {refusal.cure}"
            raise AdapterError(msg)
    _check_init(config, where)
    check_numbers(config, where)
    _check_targets(config, where)


def config_notes(config: Config) -> list[str]:
    """What the configuration holds that does not move with the factors, one sentence each."""
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is true, which peft ignores on linear layers; it was ignored.")
    if str(config.get("init_lora_weights")).lower() == "lora_ga":
        notes.append(
            "init_lora_weights is lora_ga: if training changed the base weights, that change is not in the adapter."
        )
    unknown = [key for key, value in config.items() if key not in KNOWN_KEYS and value]
    return notes + [f"config key {key} is not known and was ignored." for key in unknown]


def _check_type(config: Config, where: str) -> None:
    if "fine_tune_type" in config:
        msg = f"{where}: an adapter in the format of MLX, a PEFT adapter was wanted: convert it to PEFT first"
        raise AdapterError(msg)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        msg = f"{where}: peft_type is {peft_type!r}, 'LORA' was wanted: this is not a complete PEFT configuration"
        raise AdapterError(msg)
    if peft_type.upper() != "LORA":
        msg = f"{where}: an adapter of type {peft_type!r} is not supported, only LORA is; {peft_type_cure(peft_type)}"
        raise AdapterError(msg)


def _check_init(config: Config, where: str) -> None:
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in PLAIN_INITS:
        msg = (
            f"{where}: init_lora_weights {init!r} is not known: it may have changed the base weights; use a plain LoRA"
        )
        raise AdapterError(msg)


def check_numbers(config: Config, where: str) -> None:
    """Refuse ranks and scales that cannot be computed with.

    Raises:
        AdapterError: `r`, `lora_alpha`, `use_rslora` or one of the patterns is missing or makes no sense.
    """
    if not is_rank(config.get("r")):
        msg = f"{where}: r is {_shown(config, 'r')}, a whole number of 1 or more was wanted: correct the file"
        raise AdapterError(msg)
    if not is_alpha(config.get("lora_alpha")):
        msg = (
            f"{where}: lora_alpha is {_shown(config, 'lora_alpha')}, a number other than 0 was wanted: correct the file"
        )
        raise AdapterError(msg)
    if not isinstance(config.get("use_rslora") or False, bool):
        msg = f"{where}: use_rslora is {_shown(config, 'use_rslora')}, true or false was wanted: correct the file"
        raise AdapterError(msg)
    _check_patterns(config, where)


def _check_patterns(config: Config, where: str) -> None:
    for table, valid, wanted in (("rank_pattern", is_rank, "ranks"), ("alpha_pattern", is_alpha, "numbers")):
        values = config.get(table) or {}
        if not isinstance(values, dict):
            msg = f"{where}: {table} is {_shown(config, table)}, an object of {wanted} was wanted: correct the file"
            raise AdapterError(msg)
        for key, value in values.items():
            if not valid(value) or not is_matchable(key):
                msg = f"{where}: {table} has {key!r}: {value!r}, a pattern and one of {wanted} was wanted: correct it"
                raise AdapterError(msg)


def _check_targets(config: Config, where: str) -> None:
    targets = config.get("target_modules")
    as_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if targets is not None and not isinstance(targets, str) and not as_list:
        msg = f"{where}: target_modules is {_shown(config, 'target_modules')}, names were wanted: correct the file"
        raise AdapterError(msg)


def is_rank(value: Any) -> bool:
    """Whether a JSON value can be a rank: a whole number of 1 or more."""
    return is_alpha(value) and value == int(value) and value >= 1


def is_alpha(value: Any) -> bool:
    """Whether a JSON value can be a lora_alpha: a finite number other than 0, which would switch the adapter off."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and not math.isnan(value) and value != 0


def _shown(config: Config, key: str) -> str:
    return repr(config[key])[:60] if key in config else "missing"
