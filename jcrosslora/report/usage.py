"""How to load a moved adapter: lines to paste, for its card and for the end of a transfer."""

import json
import shlex
from pathlib import Path

from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.report.record import Base
from jcrosslora.utils.texts import markdown_code, visible

QUESTION = "What do bees make?"


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
        f'inputs = tokenizer({_literal(QUESTION)}, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]


def usage(base: Base, profile: str) -> str:
    """Show how to load the adapter: with peft in Python, or by the command of its engine."""
    ref, name = base.ref or base.name or "BASE", base.name or "BASE"
    command = {
        "mlx": f"mlx_lm.generate --model {quoted(name)} --adapter-path FOLDER --prompt PROMPT",
        "gguf": f"llama-cli --model {quoted(ref)} --lora adapter.gguf --prompt PROMPT",
        "lora-xs": f"jcrosslora generate PROMPT --base {quoted(ref)} --adapter FOLDER",
    }.get(profile)
    if command is not None:
        return f"```sh\n{command}\n```"
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
    """Write a text as Python does, in double quotes if that needs no further escapes."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)
