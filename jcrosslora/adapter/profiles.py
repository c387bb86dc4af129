"""The profiles that an adapter is written in, and what each of them can hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jcrosslora.adapter.contents import Contents
from jcrosslora.adapter.ignored import Carried, check_always_active, restrict
from jcrosslora.adapter.mlx import write_mlx
from jcrosslora.adapter.records import Adapter
from jcrosslora.adapter.write_gguf import check_gguf, write_gguf
from jcrosslora.adapter.write_lora_xs import LORA_XS, write_lora_xs
from jcrosslora.adapter.write_peft import write_peft, write_portable
from jcrosslora.errors import OutputError, UsageError

Profile = Literal["portable", "peft", "mlx", "gguf", "lora-xs"]


@dataclass(frozen=True)
class ProfileFormat:
    """One profile.

    Attributes:
        write: writes the files into a folder.
        reader: of the files, for messages.
        magnitudes: whether it holds the magnitudes of a DoRA.
        invocation: whether it holds invocation tokens (aLoRA); otherwise an adapter would always be active.
        carries: the kinds of change that it holds.
    """

    write: Callable[[Contents, Path], None]
    reader: str
    magnitudes: bool = False
    invocation: bool = True
    carries: Carried = Carried.LINEAR


FORMATS: Mapping[str, ProfileFormat] = {
    "portable": ProfileFormat(write_portable, "PEFT"),
    "peft": ProfileFormat(write_peft, "PEFT", magnitudes=True, carries=Carried.EVERYTHING),
    "mlx": ProfileFormat(write_mlx, "MLX", magnitudes=True, invocation=False),
    "gguf": ProfileFormat(write_gguf, "llama.cpp"),
    LORA_XS: ProfileFormat(write_lora_xs, "LoRA-XS", invocation=False),
}


def why_linear_alone(profile: str) -> str:
    """Say why a profile holds updates of linear layers alone; "" if it holds more."""
    alone = FORMATS[profile].carries == Carried.LINEAR
    return f"profile {profile} does not hold it, profile peft does" if alone else ""


def for_profile(adapter: Adapter, profile: str) -> Adapter:
    """Return the part of an adapter that a profile holds; the rest is listed in `info.ignored`."""
    return restrict(adapter, FORMATS[profile].carries, why_linear_alone(profile))


def check_holds(profile: str, adapter: Adapter) -> None:
    """Refuse a profile that cannot hold the invocation tokens of an adapter.

    Raises:
        OutputError: the adapter is active only after invocation tokens (aLoRA), which the profile does not hold.
    """
    if not FORMATS[profile].invocation:
        others = ", ".join(name for name, form in FORMATS.items() if form.invocation)
        why = f"which {FORMATS[profile].reader} does not know: write it in one of the profiles {others}"
        check_always_active(adapter, why, OutputError)


def check_profile(profile: str, family: str | None, heads: tuple[int, int] | None, *, dora: bool = False) -> None:
    """Refuse a profile that cannot be written for a base, before any work is done.

    Args:
        profile: see `save_adapter`.
        family: of the base, None if it is not known.
        heads: (query heads, key heads) of the base, None if they are not known.
        dora: whether a DoRA is written with its magnitudes.

    Raises:
        UsageError: an unknown profile, or one that does not hold magnitudes.
        OutputError: profile gguf without the gguf package, or without a base that it knows; profile lora-xs without
            a base.
    """
    if profile not in FORMATS:
        msg = f"profile {profile!r} is unknown; use one of {', '.join(FORMATS)}"
        raise UsageError(msg)
    if dora and not FORMATS[profile].magnitudes:
        able = " or ".join(name for name, form in FORMATS.items() if form.magnitudes)
        msg = f"profile {profile} does not hold the magnitudes of a DoRA; use {able}, or write a fit of a lower rank "
        raise UsageError(msg + "(leave out --keep-dora)")
    if profile == "gguf":
        check_gguf(family, heads)
    if profile == LORA_XS and family is None:
        msg = "profile lora-xs needs the base model, whose singular vectors it is written in: name it with --base"
        raise OutputError(msg)
