"""The result of a transfer: the adapter for the target, with its report. Writing and uploading any adapter."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from jcrosslora.adapter import Adapter, fit_to_base, save, to_peft, to_pytree
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.adapter.records import check_numbers
from jcrosslora.adapter.save import Profile
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base, open_base
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.evaluate import Answers, Scores
from jcrosslora.report import TransferReport, Verdict, hub
from jcrosslora.report.documents import documents, provenance, published
from jcrosslora.report.page import Roles, contents_of, report_page
from jcrosslora.report.page.html import result_html
from jcrosslora.text import COMPLETIONS, Completion, completion_lines


@dataclass(frozen=True, eq=False)
class TransferResult:
    """A moved adapter.

    Attributes:
        adapter: for the target, float32.
        base: the target, without its weights.
        texts: the texts of the fit, or the texts that both bases were run on; empty for methods that use weights alone.
        chat_template: Jinja source of the target's chat template in the fit; None if the fit used none.
        completions: completions of the fit whose prompts a base wrote; empty if the user gave the prompts.
    """

    adapter: Adapter
    report: TransferReport
    base: BaseInfo
    texts: tuple[str, ...] = ()
    chat_template: str | None = None
    completions: tuple[Completion, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Return what to expect of the adapter, in a sentence."""
        return self.report.verdict

    def save(
        self, out: str | Path, *, profile: Profile = "portable", dtype: FileDtype = "float32", overwrite: bool = False
    ) -> Path:
        """Write the adapter as a folder with its model card, its recipe, its report and the completions of the fit.

        Args:
            out: the folder, which is returned; it appears whole or not at all.
            profile: the file format, see `jcrosslora.save_adapter`; `dtype` is its number format.
            overwrite: whether an adapter already there may be replaced.

        Raises:
            OutputError: the folder exists, is not writable or the disk is full, or the numbers do not fit the format.
        """
        adapter, report = self._held_by(profile)
        shown = published(report, out=Path(out).name, profile=profile, dtype=dtype)
        files = documents(shown, profile)
        if self.chat_template is not None:  # the adapter is used as it was fitted
            files[CHAT_TEMPLATE] = self.chat_template
        if self.completions:
            files[COMPLETIONS] = completion_lines(self.completions)
        return save.save_adapter(
            adapter,
            out,
            # The recipe may name the base differently; the revision does not belong to that name.
            base=replace(self.base, name=shown.target.name or self.base.name, revision=None),
            profile=profile,
            dtype=dtype,
            overwrite=overwrite,
            documents=files,
            metadata=provenance(shown),
        )

    def html(
        self,
        answers: Answers | Scores | None = None,
        *,
        moved: str | None = None,
        trained: str | None = None,
        random: str | None = None,
    ) -> str:
        """Return a page on the adapter, as `jcrosslora report` writes it: one self-contained HTML file.

        Args:
            answers: what `jcrosslora.answer` or `jcrosslora.score` returns for the target with this adapter and
                possibly others; None leaves out whether it works.
            moved: name of this adapter in `answers`; by default the adapter's name.
            trained: name of an adapter that was trained on the target.
            random: name of an adapter that was moved by method `random`.

        Raises:
            UsageError: matplotlib is not installed (the extra `plot`), or there is no such adapter.
        """
        report, roles = published(self.report), Roles(moved, trained, random)
        return report_page(contents_of(report, answers, roles, public_name(self.adapter.info.name) or ""))

    def to_peft(self, model: Any, adapter_name: str = "moved") -> Any:
        """Load the adapter into a live model of transformers or PEFT, and make it the active one.

        Args:
            model: the target; its linear layers are wrapped in place, and the `peft.PeftModel` is returned.
            adapter_name: a name that no adapter of the model has yet.

        Raises:
            AdapterError: the model is not the target, or a tensor was not loaded (named).
        """
        return to_peft(self.adapter, model, adapter_name, fused=self.base.fused)

    def to_pytree(self) -> dict[str, Any]:
        """Return the adapter as nested dictionaries of arrays, see `jcrosslora.adapter.to_pytree`."""
        return to_pytree(self.adapter)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        profile: Profile = "portable",
        dtype: FileDtype = "float32",
        base_model: str | None = None,
        with_completions: bool = False,
        token: str | None = None,
    ) -> hub.Pushed:
        """Upload the adapter with its card, recipe and report, see `jcrosslora.push_to_hub`.

        Repeated, it sends only what is not there yet. `profile` and `dtype` are those of `save`.
        """
        hub.check_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            written = self.save(Path(folder) / repo_id.rpartition("/")[2], profile=profile, dtype=dtype)
            return hub.push_to_hub(
                written, repo_id, private=private, base_model=base_model, with_completions=with_completions, token=token
            )

    def __repr__(self) -> str:
        """Return one line: method, bases, and verdict."""
        names = f"{public_name(self.report.source.name)} -> {public_name(self.report.target.name)}"
        return f"TransferResult({self.report.recipe.method}, {names}: {self.verdict.text})"

    def _repr_html_(self) -> str:
        return result_html(self.report, self.texts)

    def _held_by(self, profile: Profile) -> tuple[Adapter, TransferReport]:
        """Return the adapter and its report without what a profile cannot hold."""
        held = save.for_profile(self.adapter, profile)
        if held is self.adapter:
            return self.adapter, self.report
        left = held.info.ignored[len(self.adapter.info.ignored) :]
        warnings = (*self.report.warnings, *(f"not written: {text}" for text in left))
        # The ranks are those of what is written.
        written = {name: rank for name, rank in self.report.ranks.items() if name in held.modules}
        report = msgspec.structs.replace(self.report, tokens=(), ranks=written, warnings=warnings)
        return replace(held, info=self.adapter.info), report


def save_adapter(
    adapter: Adapter,
    out: str | Path,
    *,
    base: BaseModel | str | Path | Any | None = None,
    base_name: str | None = None,
    profile: Profile = "portable",
    dtype: FileDtype = "float32",
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a folder. Results of `transfer` have their own method `save`.

    Args:
        adapter: what to write. Its changes of embedding and head are written by profile "peft" only.
        out: the folder, which is returned; it appears whole or not at all.
        base: the base that it is for, opened, or what `open_base` opens; profiles gguf and tunix need it.
        base_name: `base_model_name_or_path`; None is the name of the base.
        profile: "portable" is PEFT's format with every module padded to one rank, and alpha equal to it, which all
            engines read alike; "peft" keeps a rank for each module in patterns; "mlx" is the folder of mlx_lm, and
            "gguf" the file `adapter.gguf` of llama.cpp.
        overwrite: whether an adapter already there may be replaced.

    Raises:
        AdapterError: the adapter has other modules than the base, or its factors are no finite numbers.
        OutputError: the place exists, cannot be written to or is full, or the numbers do not fit the format.
    """
    described = None if base is None else describe_base(open_base(base), digest="")
    check_numbers(adapter)
    if described is not None:
        fit_to_base(adapter, described)
    return save.save_adapter(
        adapter,
        out,
        base=described,
        base_name=base_name,
        profile=profile,
        dtype=dtype,
        overwrite=overwrite,
    )
