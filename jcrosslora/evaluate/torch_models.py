"""Load bases with transformers and adapters with PEFT, and limit what their files can make these do.

The weights are safetensors, no code of a base runs, a configuration cannot choose a package for attention, and the
patterns of an adapter cannot run for ever.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import CONFIG, AdapterPaths, check_imports_nothing, read_config
from jcrosslora.adapter.names import is_matchable
from jcrosslora.checkpoint.safetensors import ShardedStore
from jcrosslora.errors import AdapterError, CheckpointError

_SECONDS = 10
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        match = re.compile(pattern).fullmatch
    except (re.error, RecursionError, OverflowError):
        continue
    for name in names:
        match(name)
"""
# Around a text in a list, a key, and this setting: get_pattern_key in utils/other.py of peft 0.21, and
# check_target_module_exists in tuners/tuners_utils.py.
_LISTED = (r"(.*\.)?({})", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\..*")
_LAYERS = "layers_pattern"


def load_base(path: Path, dtype: Any) -> Any:
    """Load a base in a folder or a GGUF file as a causal language model of transformers, on the CPU.

    Raises:
        CheckpointError: it is no folder of safetensors, or holds an adapter, which transformers would load as well.
        Exception: whatever transformers raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if path.is_dir():
        ShardedStore(path)  # refuses pickle files, also those that an index names
        if (path / CONFIG).exists():
            msg = f"{path}: holds {CONFIG}, an adapter, which transformers would load with the base: give a folder of "
            raise CheckpointError(msg + "the base alone")
    folder = path.parent if path.is_file() else path
    place: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **place)
    # None is the default of the class, for the parts of the configuration as well; they may name a package.
    kernels = {"attn_implementation": None, "experts_implementation": None}
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, **place, **kernels
    ).eval()


def load_adapter(model: Any, adapter: AdapterPaths) -> Any:
    """Load an adapter of PEFT onto a model: a `peft.PeftModel`.

    Raises:
        AdapterError: PEFT would import a module, or match patterns for very long.
        Exception: whatever PEFT raises.
    """
    from peft import PeftModel

    check_imports_nothing(adapter)
    _check_patterns(adapter, [name for name, _ in model.named_modules()])
    return PeftModel.from_pretrained(model, str(adapter.weights.parent)).eval()


def _check_patterns(adapter: AdapterPaths, modules: list[str]) -> None:
    """Refuse an adapter with a pattern that takes very long; only a process of its own can be stopped."""
    costly = [] if adapter.config is None else list(_costly(read_config(adapter.config)))
    if not costly:
        return
    command, texts = [sys.executable, "-I", "-c", _MATCH], json.dumps([costly, modules])
    try:
        subprocess.run(command, input=texts, text=True, capture_output=True, check=True, timeout=_SECONDS)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        timed = isinstance(error, subprocess.TimeoutExpired)
        fault = f"takes more than {_SECONDS} s to match" if timed else f"ends the process ({error}) that matches"
        msg = f"{adapter.name}: a pattern in {CONFIG} {fault} the names of the base's modules: write target_modules, "
        raise AdapterError(msg + "and what else has one, as names") from error


def _costly(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that PEFT may match, with what it puts around them, unless the cost of each is bounded."""
    for key, value in config.items():
        several = isinstance(value, list | dict)
        for text in value if several else [value]:
            if isinstance(text, str) and not is_matchable(text):
                yield from (form.replace("{}", text) for form in (_LISTED if several or key == _LAYERS else ["{}"]))
