"""The settings of a training run, and its checkpoints, from which a stopped run resumes; Orbax writes them."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import ROLES, wanted_roles
from jcrosslora.checkpoint.orbax import clear_marks, quiet, writing
from jcrosslora.errors import CheckpointError, OutputError, UsageError
from jcrosslora.utils.settings import Settings

Dtype = Literal["bfloat16", "float32"]
Optimizer = Literal["adamw", "lora-rite"]
Loss = Literal["answers", "all"]


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """How `train_lora` trains; the same settings, examples and base give the same adapter on one kind of machine."""

    steps: int = 160
    """Training steps."""
    batch: int = 8
    """Batch size."""
    rate: float = 1e-3
    """Highest learning rate; it rises over the first 1/20 of the steps, then falls to 0 as a cosine."""
    rank: int | None = None
    """Rank of the adapter in every module; 8 if not given, or that of the adapter to start from."""
    alpha: float | None = None
    """The update is alpha / rank * B A; 16 if not given, or that of the adapter to start from."""
    modules: tuple[str, ...] | None = None
    """Roles that get an update; those that the base does not have are left out; all if not given, or those of the
    adapter to start from."""
    seed: int = 0
    """Seed of the first factors and of the order of the examples."""
    optimizer: Optimizer = "adamw"
    """AdamW, or LoRA-RITE, whose steps of B A are the same for every factorisation of the update."""
    loss: Loss = "answers"
    """Tokens in the loss: those of answers, or all, prompts and chat template included."""
    weight_decay: float = 0.0
    """Weight decay of the optimiser."""
    clip: float = 1.0
    """The gradient's global norm is clipped to this; LoRA-RITE clips the norm of its unmagnified gradient."""
    dtype: Dtype = "bfloat16"
    """Dtype of the base's weights; the factors and their gradients are float32."""
    remat: bool = False
    """Recompute each layer in the backward pass, which takes less memory and more time."""

    @property
    def size(self) -> tuple[int, float]:
        """Rank and alpha of a fresh adapter."""
        return 8 if self.rank is None else self.rank, 16.0 if self.alpha is None else self.alpha

    @property
    def warm_up(self) -> int:
        """Steps over which the learning rate rises."""
        return self.steps // 20

    def check(self) -> None:
        """Raise UsageError if a setting is out of range."""
        modules = self.modules
        # Compiled functions are cached by the settings, and a list cannot be hashed.
        listed = modules is None or (isinstance(modules, tuple) and 0 < len(modules) == len(set(modules)))
        rank, alpha = self.size
        whole, positive = {"steps": self.steps, "batch": self.batch, "rank": rank}, {"rate": self.rate, "alpha": alpha}
        rules = {name: (value >= 1, "1 or more") for name, value in whole.items()}
        for name, value in (positive | {"clip": self.clip}).items():
            rules[name] = 0 < value < math.inf, "a positive number"
        rules["weight_decay"] = 0 <= self.weight_decay < math.inf, "a number from 0 on"
        rules["seed"] = 0 <= self.seed < 1 << 32, "an integer from 0 to 2^32 - 1"
        rules["modules"] = listed and set(modules or ROLES) <= set(ROLES), f"a tuple of {wanted_roles(modules)}"
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"training with {name} {getattr(self, name)!r}: expected {wanted}")


_KEPT = 2
_ITEMS = ("state", "run", "notes")
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in the folder of each step
_SEAL = "sha256"  # key in the saved identity of the run: Orbax has no checksum of the arrays' bytes


class Stepped(Protocol):
    """A pytree that counts its steps, in an int32 scalar."""

    @property
    def step(self) -> jax.Array: ...  # noqa: D102


State = TypeVar("State", bound=Stepped)


class Checkpoints:
    """The newest states of one run in a folder, each in a subfolder named by its step.

    Every state is saved with the run's identity. A folder of another run is refused, because the order of the examples
    and the learning rate would match neither run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        """Open or create the folder, or raise OutputError; `run` holds everything that the numbers depend on."""
        import orbax.checkpoint as ocp

        self._folder, self._run, self._ocp = folder.expanduser().absolute(), dict(run), ocp
        # Saved before the next step begins: the step would overwrite the state's buffers.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        with self._writing(None):
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Return the newest state and the notes saved with it, or `like` and no notes if there is none.

        Raises UsageError if the state is of another run, and CheckpointError if it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return like, {}
        args = self._ocp.args
        run = dict(self._read(step, run=args.JsonRestore())["run"])
        stated = run.pop(_SEAL, None)  # earlier versions wrote none, and had one optimizer
        wanted = json.loads(json.dumps(self._run))
        if "optimizer" in wanted:
            run.setdefault("optimizer", TrainingSettings.optimizer)
        for key in [*wanted, *run]:
            if run.get(key) != wanted.get(key):
                came = f"{key} was {run.get(key)!r} there and is {wanted.get(key)!r} here"
                msg = f"{self._folder}: checkpoints of another run ({came}): give another folder, or the same settings"
                raise UsageError(msg)
        shapes = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        found = self._read(step, state=args.StandardRestore(shapes), notes=args.JsonRestore())
        state, notes = jax.device_get(found["state"]), found["notes"]
        if stated is not None and stated != _digest(state, notes):
            raise self._unreadable(step, "it was changed after writing")
        # Copied, so that they are not committed to a device: committed arrays would cause a recompilation.
        return jax.tree.map(jnp.array, state), notes

    def save(self, state: Stepped, notes: Mapping[str, Any] | None = None) -> None:
        """Write a state with JSON-serialisable notes, or raise OutputError; keep only one older state."""
        args, notes = self._ocp.args, dict(notes or {})
        saved = {
            "state": args.StandardSave(state),
            "run": args.JsonSave(self._run | {_SEAL: _digest(jax.device_get(state), notes)}),
            "notes": args.JsonSave(notes),
        }
        with self._writing(self._manager.latest_step()):
            self._manager.save(int(state.step), args=args.Composite(**saved))
            clear_marks(self._folder / str(int(state.step)))

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Close the folder after the block; a KeyboardInterrupt in it says from which step the run resumes."""
        with closing(self):
            try:
                yield
            except KeyboardInterrupt:
                step = self._manager.latest_step()
                if step is None:
                    raise
                raise KeyboardInterrupt(self._kept(step)) from None

    def _read(self, step: int, **items: Any) -> Any:
        try:
            with quiet():
                return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except Exception as error:  # on changed bytes Orbax raises anything, even a bare Exception
            raise self._unreadable(step, " ".join(str(error).split())[:120]) from error

    def _unreadable(self, step: int, reason: str) -> CheckpointError:
        msg = f"{self._folder / str(step)}: not a readable checkpoint ({reason}): remove it, or the whole folder"
        return CheckpointError(msg)

    @contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Raise OutputError if the block cannot write, naming the newest step; remove its partial files."""
        try:
            with writing():
                yield
        except OSError as error:
            for part in self._folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(part, ignore_errors=True)
            advice = "choose another folder, or free space" if step is None else f"free space: {self._kept(step)}"
            raise OutputError(f"{self._folder}: cannot be written ({error.strerror or error}): {advice}") from error

    def _kept(self, step: int) -> str:
        return f"step {step} is kept in {self._folder.name}, and the same command goes on from there"


def check_folder(folder: Path) -> None:
    """Raise UsageError for a folder that is a file, or holds a model or folders that Orbax would take for states."""
    folder = folder.expanduser()
    names: list[str] = []
    with suppress(OSError):  # no folder, or an unreadable one: opening it raises the error
        names = [path.name for path in folder.iterdir()]
    steps = [name for name in names if name.isdecimal()]  # Orbax takes any of these for the state at a step
    states = [name for name in steps if (folder / name / _METADATA).exists()]
    found = [name for name in names if name.endswith(".safetensors")] or ([] if states else steps)
    if found or (folder.exists() and not folder.is_dir()):
        what = f"holds {min(found)!r}, which is no state of a training" if found else "is a file"
        raise UsageError(f"{folder}: {what}: give a new folder for checkpoints")


def _digest(state: Any, notes: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a state's arrays, on the host, and of its notes as JSON."""
    found = hashlib.sha256(json.dumps(json.loads(json.dumps(notes)), sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
