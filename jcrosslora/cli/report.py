"""`jcrosslora report`: a page on a moved adapter, or its pictures on a sheet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from jcrosslora.cli.output import PAGE, say, writable_file
from jcrosslora.errors import UsageError

Form = Literal["html", "svg", "pdf", "png"]


@dataclass(frozen=True)
class Report:
    """Write a page on a moved adapter: does it work, answers before and after, pictures, how it was made."""

    folder: tyro.conf.Positional[Path]
    """A folder that `jcrosslora transfer` wrote, or one that holds the output of `jcrosslora evaluate --json`."""
    answers: Path | None = None
    """The output of `jcrosslora evaluate --show 10 --json`; if not given, the one in the folder, if there is one."""
    moved: str | None = None
    """Name of the moved adapter among those evaluated; if not given, the one called like the folder, or the only."""
    trained: str | None = None
    """Name of the adapter among those evaluated that was trained on the target; if not given, as the file says."""
    random: str | None = None
    """Name of the adapter among those evaluated that was moved by method random."""
    out: Path | None = None
    """The file to write; an old one is replaced. If not given, report.html (or .svg and so on) in the folder."""
    format: Form | None = None
    """html: the page. svg, pdf, png: verdict and pictures alone. If not given, as the name of the file ends."""

    def run(self, console: Console) -> None:
        """Write the file, and print its name."""
        from jcrosslora.report.page import Roles, find_contents, report_page, report_sheet
        from jcrosslora.utils.files import write_output

        form = self._form()
        contents = find_contents(self.folder, self.answers, Roles(self.moved, self.trained, self.random))
        out = writable_file(self.out or self.folder / f"report.{form}", _ENDINGS[form])
        content = report_page(contents).encode() if form == "html" else report_sheet(contents, form)
        write_output(out, content, "free space, or choose another file")
        say(console, f"written: {out}")

    def _form(self) -> Form:
        ending = "" if self.out is None else self.out.suffix.lower()
        if self.format is not None or self.out is None:
            return self.format or "html"
        for form, endings in _ENDINGS.items():
            if ending in endings:
                return form
        msg = f"{self.out}: does not say what to write: give a file that ends in .html, .svg, .pdf or .png"
        raise UsageError(msg)


_ENDINGS: dict[Form, tuple[str, ...]] = {"html": PAGE, "svg": (".svg",), "pdf": (".pdf",), "png": (".png",)}
