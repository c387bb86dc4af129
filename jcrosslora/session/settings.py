"""The settings of a transfer: options, file locations, and their form in TOML."""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from msgspec import ValidationError, convert

from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.save import Profile
from jcrosslora.adapter.truncation import RankRule
from jcrosslora.checkpoint.hub import is_hub_id, local_names, public_name
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.maps.moved import Calibration
from jcrosslora.methods import AUTO, METHODS, Auto, Distill, MethodLike, hyper_types, make_method, setting_fields
from jcrosslora.report.recipe import FILES
from jcrosslora.utils.files import read_small_text
from jcrosslora.utils.settings import Settings, wanted_type

EffectCheck = Literal["auto", "always", "never"]
Divide = Literal["auto", "always", "never", "stream"]
_ARGUMENTS = ("adapter", "source", "target", "method", "prompts", "cache")  # of `transfer`, which are no options
Backend = Literal["jax", "torch"]


@dataclass(frozen=True, kw_only=True)
class TransferOptions(Settings):
    """Options of a transfer other than method and files. Keywords of `jcrosslora.transfer`."""

    depth: str = "proportional"
    """Which source layer feeds which target layer: proportional, by-name, or a list such as 0,1,3,-,5."""
    calibrate: Calibration | None = None
    """Norm of each moved update: unchanged after the maps (none), or rescaled to the norm on the source (frobenius); by
    default the method decides."""
    scale: float = 1.0
    """Factor on every mapped update; refused if the method fits an update."""
    out_rank: RankRule | None = None
    """Truncate every moved update to this rank, or to the lowest that keeps this share of its energy, such as 0.99.
    auto: all to the lowest usual rank, 8, 16, 32 and so on, that keeps 99% of each."""
    seed: int = 0
    """Seed of the random control and of the texts that a base writes."""
    probe_count: int = 288
    """Number of texts that the source writes, if the method runs the bases on text."""
    effect: EffectCheck = "auto"
    """Run both bases with and without the adapter at the end: always, never, or (auto) if the method runs them
    anyway."""
    divide: Divide = "auto"
    """Divide the weights of the bases over the devices of this process, in a fit and the check of the effect: always,
    never, or (auto) if they do not fit into one. The result is the same up to rounding. stream: keep the layers of the
    source in the host's memory, and move one at a time to the device; auto does so if nothing else fits."""

    def checks_effect(self, *, runs_bases: bool) -> bool:
        """Return whether the effect is checked, given whether the method runs the bases."""
        return self.effect == "always" or (self.effect == "auto" and runs_bases)


def make_options(given: Mapping[str, Any]) -> TransferOptions:
    """Make options from keywords of Python; a `UsageError` names an unknown one."""
    known = [field.name for field in fields(TransferOptions)]
    for name in given:
        if methods := setting_fields().get(name):
            usual = METHODS[Distill.name if Distill.name in methods else next(iter(methods))]
            example = f"methods.{usual.__name__}({name}={given[name]!r})"
            raise UsageError(f"{name} is not an option of a transfer but a setting of methods: give method={example}")
        if name not in known:
            raise UsageError(
                f"a transfer has no option {name!r}{suggestion(name, [*known, *_ARGUMENTS])}; it has {', '.join(known)}"
            )
    return TransferOptions(**given)


@dataclass(frozen=True)
class TransferSettings(TransferOptions):
    """A transfer from files to files: the settings of the command, of recipes and of batch plans."""

    adapter: str
    """The adapter to move: a folder of PEFT or MLX, a GGUF file of llama.cpp, or a hub id."""
    source: str
    """The base it was trained on: a folder of safetensors, a GGUF file or a hub id."""
    target: str
    """The base to move it to (same forms)."""
    out: str
    """The folder to write."""
    method: MethodLike = AUTO
    """How to move it: a method by name or as an object, or auto, which chooses by the weights of both bases."""
    adapter_rank: int | None = None
    """Truncate the adapter's updates to this rank when reading them. By default they are exact, except that a DoRA is
    read at twice its rank."""
    alpha: float | None = None
    """The training's alpha, for LoRA of a JAX trainer whose checkpoint does not state it (see `lora_config.json`)."""
    dtype: FileDtype = "float32"
    """Number format of the file."""
    profile: Profile = "portable"
    """Format of the result; portable: PEFT with one rank, which every engine reads. peft: PEFT with a rank for each
    module; only this profile holds changes of the embedding and the output head. mlx: an MLX folder. gguf: a file for
    llama.cpp. tunix: an Orbax checkpoint with LoRA for qwix."""
    prompts: str | None = None
    """Prompts of the adapter's task; twenty help, more help more. A file without answers, one a line, or JSONL with
    "text", "prompt" or the "messages" of a conversation.
    For a fit the source answers them with its adapter; other methods run both bases on them. By default the source
    writes prompts, which recover less."""
    examples: str | None = None
    """Prompts with right answers, which the fit learns too. A JSONL file with {"prompt", "answer"} or {"messages"}, 10
    to 1,000 lines. Only for methods that fit an update to answers."""
    adapter_revision: str | None = None
    """Hub revision of the adapter."""
    source_revision: str | None = None
    """Hub revision of the source base."""
    source_backend: Backend = "jax"
    """What runs the source: this package (jax), or transformers and PEFT (torch), which support more classes; needs
    jcrosslora[torch], and a method that fits an update."""
    source_url: str | None = None
    """A server that runs the source, such as http://host:8000/v1, instead of ADAPTER and --source. It needs the OpenAI
    API with log-probabilities. Its key comes from the environment: JCROSSLORA_SOURCE_KEY or OPENAI_API_KEY."""
    source_model: str | None = None
    """The server's name of the source with its adapter."""
    source_base_model: str | None = None
    """The server's name of the source alone, if the server does not report it."""
    source_tokenizer: str | None = None
    """The tokenizer of a queried source: a folder, a GGUF file or a hub id; for torch by default the source's."""
    source_top_logprobs: int = 20
    """Number of log-probabilities to request at each position."""
    source_requests: int = 8
    """Requests to the server at a time."""
    target_revision: str | None = None
    """Hub revision of the target base."""
    source_template: str | None = None
    """File with the chat template of the source, instead of the base's or the one next to the adapter."""
    target_template: str | None = None
    """File with a chat template for the target, instead of its own."""
    target_id: str | None = None
    """OWNER/NAME of the target on the hub, to write as the adapter's base model; PEFT and engines find the base by this
    name. GGUF files seldom contain it."""
    overwrite: bool = False
    """Replace the folder if it already holds an adapter."""
    cache: bool = True
    """Use the cache folder for factors and transports. The result is the same."""

    def __post_init__(self) -> None:
        """Make the method an object, so that equal settings are equal; refuse settings that exclude each other."""
        object.__setattr__(self, "method", make_method(self.method))
        if self.target_id is not None and not is_hub_id(self.target_id):
            msg = f"target_id {self.target_id[:200]!r} is no hub id: give OWNER/NAME, such as google/gemma-3-270m"
            raise UsageError(msg)
        queried = self.source_url is not None or self.source_backend != "jax"
        if self.alpha is not None and queried:
            msg = f"alpha {self.alpha} is only for a checkpoint of a JAX trainer, which a queried source cannot read: "
            raise UsageError(msg + "leave it out, or give the source as files for the source_backend jax")
        if self.adapter_rank is not None and queried:
            msg = f"adapter_rank {self.adapter_rank} is only for an adapter that is read, not for a queried source: "
            raise UsageError(msg + "leave it out, or give the source as files for the source_backend jax")
        self._check_served()

    def _check_served(self) -> None:
        """Check the settings of a source on a server."""
        if self.source_url is None:
            given = [name for name in ("source_model", "source_base_model") if getattr(self, name) is not None]
            if given or (self.source_tokenizer is not None and self.source_backend == "jax"):
                name = given[0] if given else "source_tokenizer"
                msg = f"{name} is only for a source on a server: give its address with --source-url, or leave it out"
                raise UsageError(msg)
            return
        for name in ("source_model", "source_tokenizer"):
            if getattr(self, name) is None:
                raise UsageError(f"a source behind a server needs {name}: give it with --{name.replace('_', '-')}")
        for name, value in (("adapter", self.adapter), ("source", self.source)):
            if value:
                msg = f"{name} {value[:200]} was given with --source-url, and the server has both source and adapter: "
                raise UsageError(msg + "leave it out")
        if self.source_backend != "jax" or self.source_revision or self.adapter_revision:
            msg = "source_backend and the revisions of source and adapter are only for files, not for a server "
            raise UsageError(msg + "(--source-url): leave them out")

    @classmethod
    def of(cls, **settings: Any) -> "TransferSettings":
        """Make settings from the flat names of files and commands, which include the method's hyper-parameters."""
        own: dict[str, Any] = {name: settings.pop(name) for name in OWN_FIELDS if name in settings}
        if own.get("source_url") is not None:  # whose server has both
            own = {"adapter": "", "source": ""} | own
        own["method"] = make_method(own.get("method", AUTO), settings)
        return cls(**own)

    def flat(self) -> dict[str, Any]:
        """Return the settings by flat names, with the name of the method and its hyper-parameters."""
        values, method = {name: getattr(self, name) for name in OWN_FIELDS}, make_method(self.method)
        if isinstance(method, Auto):
            return values | {"method": AUTO, **dict(method.settings)}
        return values | {"method": method.spec(), **method.settings()}

    def paths(self) -> dict[str, str]:
        """Return the paths among the settings with their public names, for `publish`."""
        return local_names(self.out, *(value for name, value in self.flat().items() if name in _REFERENCES))

    def published(self) -> dict[str, Any]:
        """Return the settings that are not the defaults, for others to see: files by their last part, no server."""
        plain = {name: field.default for name, field in OWN_FIELDS.items()}
        return {
            name: public_name(value) if name in _REFERENCES else value
            for name, value in self.flat().items()
            if name not in _OF_THIS_MACHINE and value != plain.get(name, MISSING)
        }


_REFERENCES = (*FILES, "source_model", "source_base_model")  # which may be paths
# A file must not decide where a key is sent or what is overwritten.
_TYPED = {"source_url": "--source-url URL", "overwrite": "--overwrite"}
_OF_THIS_MACHINE = ("out", "source_url", "overwrite", "cache", "divide")
OWN_FIELDS = {field.name: field for field in fields(TransferSettings)}


def setting_types() -> dict[str, Any]:
    """Return the types of all settings of a transfer and hyper-parameters of methods, by their names in TOML files."""
    return hyper_types() | {name: field.type for name, field in OWN_FIELDS.items()} | {"method": str}


def read_settings(values: Mapping[str, Any], where: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Check the settings of a transfer and hyper-parameters of methods in a recipe or a plan, see `read_table`.

    `more` are the types of other keys. Raises UsageError, also for a setting that only a command may have.
    """
    if typed := [name for name in _TYPED if name in values]:
        msg = f"{where} sets {typed[0]}, which no file may do: leave it out there, and add {_TYPED[typed[0]]} to the "
        raise UsageError(msg + "command")
    return read_table(values, {**(more or {}), **setting_types()}, where)


def read_toml(path: Path, what: str, example: str) -> dict[str, Any]:
    """Read a TOML file; errors name `what` it is, a recipe or a plan, and show an `example` of a line.

    Raises UsageError if the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_small_text(path))
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read ({error.strerror}); name an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not TOML ({error}); write lines such as {example}") from None


def read_table(
    values: Mapping[str, Any], kinds: Mapping[str, Any], where: str, required: Collection[str] = ()
) -> dict[str, Any]:
    """Check the keys of a table, and convert its values to their types: 2 to 2.0, a list to a tuple.

    Args:
        kinds: type of each key that it may have; the description of a `Meta` names one in errors.

    Raises:
        UsageError: a key is unknown or missing, or a value has the wrong type.
    """
    found = {}
    for key, value in values.items():
        if key not in kinds:
            known = ", ".join(kinds) or "none"
            raise UsageError(f"{where} has an unknown key {key!r}{suggestion(key, kinds)}; it may have {known}")
        try:
            found[key] = convert(value, kinds[key])
        except ValidationError:
            raise UsageError(f"{where} sets {key} to {value!r}; it must be {wanted_type(kinds[key])}") from None
    if missing := [key for key in required if key not in values]:
        raise UsageError(f"{where} has no {missing[0]}; give it {wanted_type(kinds[missing[0]])}")
    return found
