"""The settings of a transfer: options that determine the moved adapter, locations of files, and their form in TOML."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.profiles import Profile
from jcrosslora.adapter.truncation import RankRule
from jcrosslora.errors import UsageError
from jcrosslora.methods import AUTO, Auto, MethodLike, hyper_types, make_method, spec_of
from jcrosslora.shifting.records import Calibration

EffectCheck = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """Options that determine a moved adapter besides method and files. Keywords of `jcrosslora.transfer`."""

    depth: str = "proportional"
    """Which source layer feeds which target layer: proportional, by-name, similar, or a list such as 0,1,3,-,5."""
    calibrate: Calibration | None = None
    """Norm of each moved update: as the maps leave it (none) or as on the source (frobenius); else the method's own."""
    scale: float = 1.0
    """Multiply every moved update by this; refused where an update is fitted."""
    out_rank: RankRule | None = None
    """Truncate every moved update, optimally, to this rank; or to the lowest that keeps a share of its energy, such as
    0.99; or all (auto) to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each. Profile lora-xs: how many
    singular vectors of each weight to take."""
    seed: int = 0
    """Seed of everything that is drawn at random: the random control, and the texts that a base writes."""
    probe_count: int = 288
    """How many texts the source base writes; only where the bases have to run on text."""
    effect: EffectCheck = "auto"
    """Run both bases with and without the adapter in the end: always, never, or where the method runs them anyway."""

    def __post_init__(self) -> None:
        """Refuse an unknown kind of effect check."""
        if self.effect not in get_args(EffectCheck):
            msg = f"effect {self.effect!r} is unknown; use one of {', '.join(get_args(EffectCheck))}"
            raise UsageError(msg)


@dataclass(frozen=True)
class TransferSettings(TransferOptions):
    """A transfer from files to files: the settings of the command, of recipes and of batch plans."""

    adapter: str
    """The adapter to move: a folder of PEFT or MLX, a GGUF file of llama.cpp, or a hub id."""
    source: str
    """The base it was trained on: a folder of safetensors, a GGUF file or a hub id."""
    target: str
    """The base it shall work on, likewise."""
    out: str
    """The folder to write."""
    method: MethodLike = AUTO
    """How to move it: a method by name or as an object, or auto, which chooses by the weights of both bases."""
    adapter_rank: int | None = None
    """Read no update of the adapter at more than this rank; if not given exactly, a DoRA at twice its rank."""
    dtype: FileDtype = "float32"
    """Number format of the file."""
    profile: Profile = "portable"
    """portable: PEFT with one rank, read alike by every engine. peft: a rank for each module. mlx: the folder of MLX.
    gguf: the file of llama.cpp. lora-xs: a small matrix between the top singular vectors of each weight, --out-rank of
    them, for LoRA-XS. peft alone holds changes of the embedding and the output head."""
    probe_text: str | None = None
    """Text to run both bases on, one a line, or JSONL with "text", "prompt" or the "messages" of a conversation;
    without it the source base writes its own.
    Where an update is fitted: prompts that the source answers with its adapter. A few hundred of the adapter's own task
    recover more than what the source writes."""
    adapter_revision: str | None = None
    """Hub revision of the adapter."""
    source_revision: str | None = None
    """Hub revision of the source base."""
    target_revision: str | None = None
    """Hub revision of the target base."""
    source_template: str | None = None
    """File with the chat template of the source, if it is neither the base's own nor beside the adapter."""
    target_template: str | None = None
    """File with the chat template that the target is to use in place of its own."""
    target_name: str | None = None
    """What to write as the adapter's base model, where the target's own name is not the one wanted."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""
    cache: bool = True
    """Keep factors and transports in the user's cache folder, and look for them there. The result is the same."""

    def __post_init__(self) -> None:
        """Make the method an object, so that equal settings are equal."""
        super().__post_init__()
        object.__setattr__(self, "method", make_method(self.method))

    @classmethod
    def of(cls, **settings: Any) -> "TransferSettings":
        """Make settings from the flat names of files and commands, which include the method's hyper-parameters."""
        own: dict[str, Any] = {name: value for name, value in settings.items() if name in OWN_FIELDS}
        rest = {name: value for name, value in settings.items() if name not in OWN_FIELDS}
        own["method"] = make_method(own.get("method", AUTO), rest)
        return cls(**own)

    def flat(self) -> dict[str, Any]:
        """Return the settings by flat names, the method by its name and its hyper-parameters beside it."""
        values = {name: getattr(self, name) for name in OWN_FIELDS}
        return values | flat_method(self.method)


OWN_FIELDS = {field.name: field for field in dataclasses.fields(TransferSettings)}


def flat_method(method: MethodLike) -> dict[str, Any]:
    """Return a method as the flat settings that files have: `method` and its hyper-parameters."""
    made = make_method(method)
    if isinstance(made, Auto):
        return {"method": AUTO, **dict(made.settings)}
    return {"method": spec_of(made), **made.settings()}


def setting_types() -> dict[str, Any]:
    """Return the types of all settings of a transfer and hyper-parameters of methods, by their names in TOML files."""
    return hyper_types() | {name: field.type for name, field in OWN_FIELDS.items()} | {"method": str}
