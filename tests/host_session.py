"""The program of each of the two processes of tests/test_hosts.py; arguments: folder, process number, port."""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from command_line import main
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch, transfer_files
from jcrosslora.checkpoint import ShardedStore
from jcrosslora.utils import hosts

jax.config.update("jax_numpy_dtype_promotion", "strict")
FOLDER, NUMBER, PORT = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
COMMAND = ["transfer", str(FOLDER / "adapter"), "--source", str(FOLDER / "source"), "--target", str(FOLDER / "target")]
COMMAND += ["--method", "cross-lora", "--table", "none"]
read: dict[str, list[str]] = {"weights": [], "digests": []}


def recorded(owner, name, kind):
    plain = getattr(owner, name)

    def call(self, *rest):
        read[kind] += [str(one) for one in rest] or [name]
        return plain(self, *rest)

    setattr(owner, name, call)


def failure(work) -> str:
    try:
        work()
    except jcl.JCrossLoRAError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def settings(**changes):
    names = {"adapter": "adapter", "source": "source", "target": "target", "out": "bad"}
    paths = {key: str(FOLDER / value) for key, value in (names | changes).items() if key in names}
    return transfer_settings(**({"method": "cross-lora", "cache": False} | changes | paths))


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    recorded(jcl.BaseModel, "weight", "weights")
    recorded(ShardedStore, "sha256s", "digests")
    joined = ["--coordinator", f"127.0.0.1:{PORT}", "--processes", "2", "--process", str(NUMBER)]
    main([*COMMAND, "--out", str(FOLDER / "first"), *joined])
    found: dict[str, object] = {"read": {kind: list(names) for kind, names in read.items()}}
    read["weights"].clear()
    # Only the cache of the first process has the transport.
    main([*COMMAND, "--out", str(FOLDER / "again")])
    found["read again"] = list(read["weights"])
    source, target = (jcl.open_base(FOLDER / name) for name in ("source", "target"))
    transport = jcl.align(source, target, method="random", sources=jcl.load_adapter(FOLDER / "adapter").modules)
    arrays = [np.asarray(leaf) for group in transport.groups for leaf in jax.tree.leaves(group)]
    np.savez(FOLDER / f"transport{NUMBER}.npz", *arrays)
    found["one fails"] = failure(lambda: transfer_files(settings(adapter="none" if NUMBER else "adapter")))
    found["first fails"] = failure(lambda: transfer_files(settings(out="first")))
    found["unlike"] = failure(lambda: transfer_files(settings(seed=NUMBER)))
    found["runs bases"] = failure(lambda: transfer_files(settings(method="theseus")))
    found["batch"] = failure(lambda: run_batch(read_plan(FOLDER / "plan.toml")))
    found["devices"] = [jax.local_device_count(), jax.device_count(), hosts.count()]
    (FOLDER / f"found{NUMBER}.json").write_text(json.dumps(found))
    if NUMBER:
        jcl.BaseModel.weight = kill
    main([*COMMAND, "--out", str(FOLDER / "never"), "--no-cache"])
