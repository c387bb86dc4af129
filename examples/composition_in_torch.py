"""Run a composition that was saved with `Composed.save` in transformers, with peft and torch.

    python composition_in_torch.py BASE COMPOSITION "a prompt"

The adapters lie in the folder as PEFT adapters. peft loads them, and a hook on each of their modules adds what the
composition makes of their outputs.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def gated(_x, out, updates, chosen, own):
    """AutoLoRA: a factor on every number that an adapter adds."""

    def norm(y, name):
        return torch.nn.functional.layer_norm(y, y.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], eps=1e-5)

    base, total = norm(out, "norm_base"), out
    for place, y in enumerate(updates):
        lora = norm(y, "norm_lora")
        inside = base * own["weight_base"] + lora * own["weight_lora"] + base * lora * own["weight_cross"] + own["bias"]
        total = total + chosen[:, place, None, None] * own["weight_out"] * torch.sigmoid(inside) * y
    return total


def router(x, out, updates, chosen, own):
    """RAMoLE: attention of the router's own LoRA over what the adapters add."""
    values = torch.stack(updates, dim=2)
    query = x @ own["lora_A.weight"].T @ own["lora_B.weight"].T
    scores = torch.einsum("bto,btno->btn", query, values) / out.shape[-1] ** 0.5
    scores = scores.masked_fill(chosen[:, None] == 0, -1e30)
    alpha = torch.softmax(scores, dim=-1) * chosen[:, None]
    return out + torch.einsum("btn,btno->bto", alpha, values)


RULES = {"gated": gated, "router": router}


def load(base, folder) -> Any:
    """Return a model of transformers that runs a saved composition.

    `model.chosen`, (B, N) of 1 and 0, says which adapters each row of a batch may use; None is all of them.
    """
    folder = Path(folder)
    facts, arrays = json.loads((folder / "composition.json").read_text()), load_file(folder / "composition.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    names = []
    for number in range(len(facts["adapters"])):
        names.append(f"adapter{number}")
        path = str(folder / "adapters" / str(number))
        if number == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=names[0])
        else:
            model.load_adapter(path, adapter_name=names[-1])
    model.eval().chosen = None
    left = dict(arrays)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            # Our names begin with "model.", those of a multimodal class with the prefix in the file.
            module = "model." + name.removeprefix(facts["prefix"]).removeprefix("model.")
            own = {key.removeprefix(f"{module}."): left.pop(key) for key in list(left) if key.startswith(f"{module}.")}
            layer.get_base_layer().register_forward_hook(
                partial(_compose, layer, names, RULES[facts["composition"]], own, model)
            )
    if left:
        msg = f"{next(iter(left))}: the model has no such module; a fused one is not read here"
        raise ValueError(msg)
    model.base_model.disable_adapter_layers()  # what they add comes from the hooks
    return model


def _compose(layer, names, rule, own, model, _module, inputs, out):
    x = inputs[0].float()
    updates = [
        layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
        if name in layer.lora_A
        else torch.zeros_like(out)
        for name in names
    ]
    chosen = torch.ones(len(x), len(names)) if model.chosen is None else model.chosen
    return rule(x, out, updates, chosen.to(x), own)


def main():
    """Print what the base with a composition writes behind a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the base model, as transformers loads it")
    parser.add_argument("composition", help="the folder that Composed.save wrote")
    parser.add_argument("prompt")
    given = parser.parse_args()
    model = load(given.base, given.composition)
    tokenizer = AutoTokenizer.from_pretrained(given.base, trust_remote_code=False)
    ids = tokenizer(given.prompt, return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=64)[0]))


if __name__ == "__main__":
    main()
