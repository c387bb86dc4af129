"""Table of the settings that make a configuration of type LORA more than dW = scale B A on an unchanged base."""

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]


def _truthy(key: str) -> Callable[[Config], bool]:
    return lambda config: bool(config.get(key))


def _present(key: str) -> Callable[[Config], bool]:
    return lambda config: config.get(key) is not None


def _init_starts(prefix: str) -> Callable[[Config], bool]:
    return lambda config: str(config.get("init_lora_weights")).lower().startswith(prefix)


DORA = "DoRA (use_dora)"
PISSA = "PiSSA (init_lora_weights)"
OLORA = "OLoRA (init_lora_weights)"
CORDA = "CorDA (init_lora_weights)"
LOFTQ = "LoftQ (init_lora_weights)"
ALORA = "aLoRA (alora_invocation_tokens)"
QALORA = "QALoRA (use_qalora)"
BDLORA = "BD-LoRA (use_bdlora)"
KASA = "KaSA (kasa_config)"
ARROW = "Arrow (arrow_config)"
MONTECLORA = "MonteCLoRA (monteclora_config)"
PARAMETERS = "LoRA of parameters (target_parameters)"
BIASES = "LoRA with biases (lora_bias)"
REPLICATION = "layer replication (layer_replication)"
BEAM = "BeamLoRA (use_beamlora)"

# Name, as its users know it -> whether it applies to a configuration.
VARIANTS: Mapping[str, Callable[[Config], bool]] = {
    DORA: _truthy("use_dora"),
    PISSA: _init_starts("pissa"),
    OLORA: _init_starts("olora"),
    CORDA: _init_starts("corda"),
    LOFTQ: _init_starts("loftq"),
    ALORA: _present("alora_invocation_tokens"),
    QALORA: _truthy("use_qalora"),
    BDLORA: _truthy("use_bdlora"),
    KASA: _truthy("kasa_config"),
    ARROW: _truthy("arrow_config"),
    MONTECLORA: _truthy("monteclora_config"),
    PARAMETERS: _truthy("target_parameters"),
    BIASES: _truthy("lora_bias"),
    REPLICATION: _truthy("layer_replication"),
    BEAM: _truthy("use_beamlora"),
}
