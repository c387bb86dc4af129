"""Code and commands that load a moved adapter, for its model card and the end of a transfer."""

import json
import shlex
from pathlib import Path

from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.report.record import Base
from jcrosslora.utils.texts import markdown_code, visible

PROMPT = "A prompt of its task"


def peft_lines(base: str, adapter: str) -> list[str]:
    """Return statements, one a line, that load an adapter with peft and generate text.

    `base` is a hub id, a folder, or a GGUF file, whose weights transformers reads as floats.
    """
    place = _literal(base)
    if base.endswith(".gguf"):
        place = f"{_literal(str(Path(base).parent))}, gguf_file={_literal(Path(base).name)}"
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        f"model = AutoModelForCausalLM.from_pretrained({place})",
        f"model = PeftModel.from_pretrained(model, {_literal(adapter)})",
        f'inputs = tokenizer({_literal(PROMPT)}, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]


_TUNIX = (
    "import json",
    "from pathlib import Path",
    "import qwix",
    "from flax import nnx",
    "from tunix.sft.checkpoint_manager import CheckpointManager",
    'provider = qwix.LoraProvider(**json.loads(Path("FOLDER/lora_config.json").read_text()))',
    "model = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))",
    'CheckpointManager("FOLDER").maybe_restore(model, restore_only_lora_params=True)',
)


def usage(base: Base, profile: str) -> str:
    """Return how to load the adapter, in Markdown: Python code for peft or tunix, or the command of another engine."""
    ref, name = base.ref or base.name or "BASE", base.name or "BASE"
    command = {
        "mlx": f"mlx_lm.generate --model {quoted(name)} --adapter-path FOLDER --prompt PROMPT",
        "gguf": f"llama-cli --model {quoted(ref)} --lora adapter.gguf --prompt PROMPT",
    }.get(profile)
    if command is not None:
        return f"```sh\n{command}\n```"
    if profile == "tunix":
        lines = "\n".join(_TUNIX)
        return f"```python\n{lines}\n```\n\n`model` is the base as tunix loads it, and `FOLDER` the absolute path here."
    python = "\n".join(peft_lines(ref, "FOLDER"))
    said = "`FOLDER` is the folder of this card, or the adapter's id on the hub."
    if ref.endswith(".gguf"):
        said += f" The base is read from {markdown_code(ref)} in the current folder"
        said += f"; {markdown_code(name)} on the hub may take its place." if is_hub_id(name) else "."
    return f"```python\n{python}\n```\n\n{said}"


def quoted(name: str) -> str:
    """Quote an untrusted name for a shell."""
    return shlex.quote(visible(name, keep=""))


def _literal(text: str) -> str:
    """Return a Python literal of a text: in double quotes, or by `repr` if a character does not print."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)
