"""The result of a transfer: the adapter for the target, with its report."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from jcrosslora.adapter import Adapter, to_peft, to_pytree
from jcrosslora.adapter.contents import FileDtype
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.adapter.lora_xs import Frozen
from jcrosslora.adapter.records import ignored_sentence
from jcrosslora.adapter.save import Profile, save_adapter, why_linear_alone
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.checkpoint.hub import public_name, publish
from jcrosslora.evaluate import Answers, Scores
from jcrosslora.report.documents import documents, provenance, published, replacements
from jcrosslora.report.hub import Pushed, check_repo_id, push_folder
from jcrosslora.report.page import Roles, contents_of, report_page, result_html
from jcrosslora.report.record import TransferReport, Verdict
from jcrosslora.text import Completion
from jcrosslora.text.completion import COMPLETIONS, completion_lines


@dataclass(frozen=True, eq=False)
class TransferResult:
    """A moved adapter.

    Attributes:
        adapter: for the target, float32.
        report: the account of the transfer.
        base: the target, without its weights.
        texts: the texts of the fit, or the texts that both bases were run on; empty for methods that use weights alone.
        frozen: the frozen factors for profile lora-xs; None for other profiles.
        chat_template: Jinja source by which the target read conversations; None if the fit had none.
        completions: of the fit, if the source wrote their prompts itself. The user's own prompts are not among them.
    """

    adapter: Adapter
    report: TransferReport
    base: BaseInfo
    texts: tuple[str, ...] = ()
    frozen: Frozen | None = None
    chat_template: str | None = None
    completions: tuple[Completion, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Return what to expect of the adapter, in a sentence."""
        return self.report.verdict

    def save(
        self,
        out: str | Path,
        *,
        profile: Profile = "portable",
        dtype: FileDtype = "float32",
        overwrite: bool = False,
    ) -> Path:
        """Write the adapter as a folder with its model card, its recipe, its report and the completions of the fit.

        Args:
            out: the folder; it appears whole or not at all.
            profile: see `jcrosslora.save_adapter`.
            dtype: number format of the file.
            overwrite: whether an adapter already there may be replaced.

        Returns:
            The folder.

        Raises:
            OutputError: the folder exists, is not writable or the disk is full, or the numbers do not fit the format.
        """
        adapter, report = self._held_by(profile)
        shown = published(report, out=Path(out).name, profile=profile, dtype=dtype)
        # It may have been given another name, and its revision is none of that.
        target = dataclasses.replace(self.base, name=shown.target.name or self.base.name, revision=None)
        return save_adapter(
            adapter,
            out,
            base=target,
            profile=profile,
            dtype=dtype,
            overwrite=overwrite,
            frozen=self.frozen,
            documents=documents(shown, profile) | self._companions(),
            metadata=provenance(shown),
        )

    def _companions(self) -> dict[str, str]:
        """Return the chat template, so that the adapter is used as it was fitted, and the completions, as files."""
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template}
        return template | ({COMPLETIONS: completion_lines(self.completions)} if self.completions else {})

    def html(
        self, answers: Answers | Scores | None = None, *, trained: str | None = None, random: str | None = None
    ) -> str:
        """Return a page on the adapter, as `jcrosslora report` writes it: one HTML file that needs nothing but itself.

        Args:
            answers: what `jcrosslora.answer` or `jcrosslora.score` returns for the target with this adapter, and others
                beside it if you like; None leaves out whether it works.
            trained: name of the adapter among them that was trained on the target.
            random: name of the one that was moved by method `random`.

        Raises:
            UsageError: matplotlib is not installed (the extra `plot`), or there is no such adapter.
        """
        own = public_name(self.adapter.info.name) or ""
        return report_page(contents_of(published(self.report), answers, Roles(trained=trained, random=random), own))

    def to_peft(self, model: Any, adapter_name: str = "moved") -> Any:
        """Load the adapter into a live model of transformers or PEFT, and make it the active one.

        Args:
            model: the target; its linear layers are wrapped in place.
            adapter_name: a name that no adapter of the model has yet.

        Returns:
            The `peft.PeftModel`.

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
    ) -> Pushed:
        """Upload the adapter with its card, recipe and report. Repeated, it sends only what is not there yet.

        Args:
            repo_id: "owner/name" on the hub; the repository is created if it does not exist.
            private: whether the repository is private; False allows a public one.
            profile: see `jcrosslora.save_adapter`.
            dtype: number format of the file.
            base_model: hub id of the target, where it was not opened by one.
            with_completions: whether report and card keep the completions that the source wrote.
            token: hub token; None uses the token of `hf auth login` or of the environment.

        Returns:
            The address, the commit, and notes such as that no base model is named.

        Raises:
            UsageError: `repo_id` or `base_model` has not the form of a hub id.
            OutputError: not logged in, the repository is public or holds something else, the hub refuses the upload, or
                it cannot be reached.
        """
        check_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            written = self.save(Path(folder) / repo_id.rpartition("/")[2], profile=profile, dtype=dtype)
            return push_folder(
                written,
                repo_id,
                private=private,
                base_model=base_model,
                with_completions=with_completions,
                token=token,
            )

    def __repr__(self) -> str:
        """Return one line: method, bases, and verdict."""
        names = f"{public_name(self.report.source.name)} -> {public_name(self.report.target.name)}"
        return f"TransferResult({self.report.recipe.method}, {names}: {self.verdict.level})"

    def _repr_html_(self) -> str:
        return publish(result_html(self.report, self.texts), replacements(self.report))

    def _held_by(self, profile: Profile) -> tuple[Adapter, TransferReport]:
        """Return the adapter and its report without what a profile cannot hold."""
        why = why_linear_alone(profile)
        if not self.adapter.tokens or not why:
            return self.adapter, self.report
        left = [ignored_sentence(row.kind, row.modules, row.share, why) for row in self.report.tokens]
        warnings = (*self.report.warnings, *(f"not written: {text}" for text in left))
        report = msgspec.structs.replace(self.report, tokens=(), warnings=warnings)
        return dataclasses.replace(self.adapter, tokens=()), report
