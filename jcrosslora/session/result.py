"""The result of a transfer: the adapter for the target, with the account of how it was made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.file_factors import FileDtype
from jcrosslora.adapter.ignored import ignored_sentence
from jcrosslora.adapter.save import Profile, save_adapter, why_without_tokens
from jcrosslora.report.documents import card_text, recipe_of, report_json
from jcrosslora.report.record import TransferReport
from jcrosslora.report.verdict import Verdict, verdict
from jcrosslora.shifting.lora_xs_span import Frozen


@dataclass(frozen=True, eq=False)
class TransferResult:
    """A moved adapter.

    Attributes:
        adapter: for the target, float32.
        report: what was done and what survived.
        texts: the text that the fit was made on, or that both bases were run on; empty for methods that look at weights
            alone.
        frozen: the factors that profile lora-xs writes the adapter by; None for other profiles.
    """

    adapter: Adapter
    report: TransferReport
    texts: tuple[str, ...] = ()
    frozen: Frozen | None = None

    @property
    def verdict(self) -> Verdict:
        """What to expect of the adapter, in a sentence."""
        return verdict(self.report)

    def save(
        self,
        out: str | Path,
        *,
        profile: Profile = "portable",
        dtype: FileDtype = "float32",
        overwrite: bool = False,
    ) -> Path:
        """Write the adapter as a folder with its model card, its recipe and `transfer_report.json`.

        Args:
            out: the folder; it appears whole or not at all.
            profile: see `jcrosslora.save_adapter`.
            dtype: number format of the file.
            overwrite: whether an adapter already there may be replaced.

        Returns:
            The folder.

        Raises:
            OutputError: the place exists, cannot be written to or is full, or the numbers do not fit the format.
        """
        adapter, report = self._held_by(profile)
        target = report.target
        recipe = recipe_of(report, out=Path(out).name, profile=profile, dtype=dtype)
        return save_adapter(
            adapter,
            out,
            base_name=target.name,
            profile=profile,
            dtype=dtype,
            overwrite=overwrite,
            frozen=self.frozen,
            fused=target.fused,
            all_modules=list(target.shapes),
            family=target.family,
            heads=target.heads,
            documents={
                "README.md": card_text(report, recipe, profile),
                "transfer_report.json": report_json(report, recipe),
            },
            metadata=_metadata(report.to_json()),
        )

    def __repr__(self) -> str:
        """One line: method, bases, and what to expect."""
        report = self.report
        return f"TransferResult({report.recipe.method}, {report.source.name} -> {report.target.name}: {self.verdict.level})"

    def _held_by(self, profile: Profile) -> tuple[Adapter, TransferReport]:
        """Return the adapter and its report as a profile holds them."""
        why = why_without_tokens(profile)
        if not self.adapter.tokens or not why:
            return self.adapter, self.report
        left = [ignored_sentence(row.kind, row.modules, row.share, why) for row in self.report.tokens]
        warnings = (*self.report.warnings, *(f"not written: {text}" for text in left))
        return dataclasses.replace(self.adapter, tokens=()), dataclasses.replace(
            self.report, tokens=(), warnings=warnings
        )


def _metadata(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the provenance for the header of the safetensors file, which holds strings only."""
    parts = {f"jcrosslora.{name}": json.dumps(report[name]) for name in ("recipe", "source", "target", "adapter")}
    return {"jcrosslora.version": report["version"], **parts}
