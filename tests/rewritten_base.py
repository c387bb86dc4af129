"""Write the files of a base again, with some of its layers and with other tensors."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

import jcrosslora as jcl


def rewritten(folder, out, config, layers, change):
    """Write the base of a folder into another one.

    Args:
        folder: of the base, in one file.
        out: a folder that exists.
        config: what its configuration has in place of the base's.
        layers: those of the base that it has, in this order.
        change: of a tensor's new name and the tensor: both as they are written.
    """
    stated = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(stated | config | {"num_hidden_layers": len(layers)}))
    tensors = {}
    for name, array in load_file(folder / "model.safetensors").items():
        part = name.split(".")
        if part[1] == "layers":
            if int(part[2]) not in layers:
                continue
            part[2] = str(layers.index(int(part[2])))
        name, array = change(".".join(part), array)
        tensors[name] = np.ascontiguousarray(array)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return jcl.open_base(out)
