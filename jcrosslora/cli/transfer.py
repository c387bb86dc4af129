"""`jcrosslora transfer`: move one adapter from file to file.

Its flags are derived from the settings of a transfer and the fields of the methods.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro
from rich.console import Console

from jcrosslora.cli.flags import attribute_docs
from jcrosslora.cli.output import FailOn, Long, exit_code, print_json, print_pushed, say
from jcrosslora.errors import JCrossLoRAError, MethodError, OutputError, UsageError
from jcrosslora.methods import AUTO, METHODS, allow_module, find_method, hyper_types, setting_fields
from jcrosslora.report.hub import Pushed, Repository, push_to_hub
from jcrosslora.report.recipe import SERVED, check_found, find_files
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings, read_settings, read_toml
from jcrosslora.utils.logs import LogName, find_log, log_to
from jcrosslora.utils.terminal import SafeConsole


@dataclass(frozen=True)
class _Transfer(Long):
    """Move an adapter to another base model."""

    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "": ("adapter", "source", "target", "out", "prompts", "examples", "method", "recipe", "overwrite"),
        "method": ("allow_module", "calibrate", "depth", "probe_count", "seed", "source_template", "target_template"),
        "output": ("profile", "dtype", "out_rank", "target_id", "push_to"),
        "run": ("dry_run", "json", "table", "fail_on", "log", *Long.GROUPS["run"]),
        "expert": ("scale", "adapter_rank", "alpha", "effect", "divide", "cache"),
        "source": (
            *("source_backend", "source_url", "source_model", "source_base_model", "source_tokenizer"),
            *("source_top_logprobs", "source_requests"),
        ),
        "hub": ("adapter_revision", "source_revision", "target_revision"),
    }
    SHORT: ClassVar[tuple[str, ...]] = (
        *GROUPS[""],
        *("completions", "budget", "roles", "out_rank", "profile", "seed", "dry_run", "json", "device"),
    )
    DOCS: ClassVar[Mapping[str, str]] = {}
    METHOD_FLAGS: ClassVar[tuple[str, ...]] = ()

    recipe: Path | None = None
    """A TOML file with any of these settings, by the same names (with _ for -); flags override it."""
    allow_module: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Allow the recipe to import this Python module with methods; may be given several times."""
    dry_run: bool = False
    """Only check the input, and show the method with an estimate of time and memory; nothing is written."""
    json: bool = False
    """Print the whole report, or the estimate, as JSON instead of the table."""
    table: Literal["role", "full", "module", "none"] = "role"
    """role: a row for each role, the main figures. full: every figure. module: every figure, a row for each module."""
    fail_on: FailOn = "never"
    """no-effect: exit with code 3 if the verdict expects no effect, or harm, or nothing was measured;
    the adapter is written all the same."""
    push_to: str | None = None
    """OWNER/NAME: upload the folder to a private repository of the hub as well, as `jcrosslora push` does."""
    log: LogName | None = None
    """Log the fit to Weights & Biases, Trackio or TensorBoard; each needs its extra."""

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """Give the names that `--method` accepts, for help and completion."""
        return {"method": (AUTO, *METHODS)}

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> dict[str, Any]:
        """Read the settings of the recipe that the arguments name."""
        path = _value_of("--recipe", arguments)
        if path is None:
            return {}
        settings = read_toml(Path(path), "recipe", 'method = "cross-lora"')
        named = settings.get("method")
        if isinstance(named, str) and ":" in named:
            try:
                find_method(named)  # a user's own, whose hyper-parameters are known once it is registered
            except MethodError as error:
                raise MethodError(f"recipe {path}: {error}") from error
        found = find_files(read_settings(settings, f"recipe {path}"), Path(path))
        if "--overwrite" in arguments:
            found.pop("out", None)  # what is replaced is typed as well
        return found

    def run(self, console: Console) -> int:
        if self.recipe is not None:
            check_found(self.defaults(["--recipe", str(self.recipe)]), vars(self), self.recipe)
        if self.push_to is not None and self.settings().profile == "tunix":
            msg = "the hub does not know Orbax checkpoints: leave --push-to out, or choose another profile than tunix"
            raise UsageError(msg)
        if self.push_to is not None:
            Repository.of(self.push_to, private=True, token=None).look()  # refused before hours of work
        if self.log is not None:
            find_log(self.log)
        if self.dry_run:
            return self._estimate(console)
        from jcrosslora.report import print_report, published
        from jcrosslora.report.page.next_steps import first_steps
        from jcrosslora.session.transfer import transfer_files

        settings = self.settings()
        run = Path(settings.out).resolve().name
        with log_to(self.log, run, settings.published()):
            report = transfer_files(settings).report
        shown, end = published(report), console
        if self.json or self.table == "none":
            end = SafeConsole(stderr=True)
            say(end, f"verdict: {report.verdict.text}")
        if self.json:
            pushed = {} if self.push_to is None else {"pushed": asdict(self._push(self.push_to))}
            data = shown.to_json()
            del data["recipe_toml"]  # it is in the folder
            print_json({"out": settings.out, **pushed, **data})
        else:
            if self.table != "none":
                print_report(report, console, table=self.table)
            say(console, f"written: {settings.out}")
            if self.push_to is not None:
                print_pushed(self._push(self.push_to), console)
        for line in first_steps(shown, settings.out, settings.target, settings.profile):
            say(end, line)
        return exit_code(self.fail_on, [report.verdict.level])

    def _push(self, repo_id: str) -> Pushed:
        """Upload the written folder; an error names the command that continues."""
        out = self.settings().out
        try:
            return push_to_hub(out, repo_id)
        except JCrossLoRAError as error:
            msg = f"{error}; the adapter is written to {out}: go on with `jcrosslora push {out} {repo_id}`"
            raise OutputError(msg) from error
        except KeyboardInterrupt:
            msg = f"the adapter is written to {out}: go on with `jcrosslora push {out} {repo_id}`"
            raise KeyboardInterrupt(msg) from None

    def _estimate(self, console: Console) -> int:
        from jcrosslora.session.transfer import estimate_files

        found = estimate_files(self.settings())
        if self.json:
            print_json(found.record())
            return 0
        for name, text in found.lines():
            say(console, f"{name:<8}{text}")
        return 0

    def settings(self) -> TransferSettings:
        """Return the settings among the flags; hyper-parameters that were not given are left to the method."""
        given = {name: getattr(self, name) for name in OWN_FIELDS}
        chosen = {name: getattr(self, name) for name in self.METHOD_FLAGS}
        return TransferSettings.of(**given, **{name: value for name, value in chosen.items() if value is not None})


def transfer_command(arguments: Sequence[str]) -> type:
    """Make the dataclass of the flags: settings of a transfer, and hyper-parameters of all methods.

    Modules of the user's own that the arguments name are imported first, and their methods registered.
    """
    named = _value_of("--method", arguments) or AUTO
    for module in (*_values_of("--allow-module", arguments), *([named] if ":" in named else [])):
        allow_module(module)
    if ":" in named:
        find_method(named)
    recipe = _Transfer.defaults(arguments)  # which registers the method that it names
    kinds: dict[str, Any] = {name: field.type for name, field in OWN_FIELDS.items()}
    kinds |= {"adapter": tyro.conf.Positional[str], "method": str}
    defaults = {name: field.default for name, field in OWN_FIELDS.items()}  # those without one are required
    asked = not {"-h", "--help", "--help-all"}.isdisjoint(arguments)  # for the help, which says when they are required
    if asked or SERVED in recipe or _value_of("--source-url", arguments) is not None:
        defaults |= {"adapter": "", "source": ""}  # the server has both
    own = hyper_types()
    kinds |= {name: kind | None for name, kind in own.items()}
    defaults |= dict.fromkeys(own)  # None leaves a method's default
    groups = _Transfer.GROUPS | {"method": (*own, *_Transfer.GROUPS["method"])}
    return dataclasses.make_dataclass(
        "Transfer",
        [(name, kinds[name], dataclasses.field(default=default)) for name, default in defaults.items()],
        bases=(_Transfer,),
        namespace={"GROUPS": groups, "DOCS": _flag_docs(), "METHOD_FLAGS": tuple(own), "__doc__": _Transfer.__doc__},
        frozen=True,
        kw_only=True,
    )


def _flag_docs() -> dict[str, str]:
    """Return the help of all these flags; a hyper-parameter's ends with the default of each method."""
    docs = dict(attribute_docs(TransferSettings))
    docs["method"] = "How to move it: auto, which looks at both bases, a name of `jcrosslora methods`, or MODULE:CLASS."
    docs |= {name: f"{docs[name][:-1]} (required without --source-url)." for name in ("adapter", "source")}
    docs["cache"] = "Neither look for factors and transports in the user's cache folder nor keep them there."
    for name, by_method in setting_fields().items():
        text = next(attribute_docs(METHODS[method]).get(name, "") for method in by_method)
        defaults: dict[str, list[str]] = {}
        for method, each in by_method.items():
            shown = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else str(each.default)
            defaults.setdefault("" if each.default is None else f": {shown}", []).append(method)
        stated = "; ".join(f"{', '.join(names)}{value}" for value, names in defaults.items())
        docs[name] = f"{text} ({stated})"
    return docs


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """Return the first value of a flag before the arguments are parsed; None where it is not given."""
    return next(iter(_values_of(flag, arguments)), None)


def _values_of(flag: str, arguments: Sequence[str]) -> list[str]:
    """Return all values of a flag before the arguments are parsed."""
    found, values = [one.partition("=") for one in arguments], []
    for place, (name, given, value) in enumerate(found):
        if name.replace("_", "-") == flag and (given or place + 1 < len(found)):
            values.append(value if given else arguments[place + 1])
    return values
