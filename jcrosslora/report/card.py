"""The model card (README.md) of a moved adapter: its origin, how it was made, what to expect."""

import re
from collections.abc import Iterator, Mapping, Sequence

from huggingface_hub import ModelCardData

from jcrosslora.checkpoint.hub import is_on_hub, public_name
from jcrosslora.report.record import SourceAdapter, TransferReport, spread
from jcrosslora.report.table import role_rows
from jcrosslora.utils.texts import markdown_code, markdown_text

_LOOKS = 10  # points of a fit's curve that the card shows
_EXAMPLES = "Some of the completions, prompts and answers written by the source with the original adapter:"
_EFFECT = (
    "What the original update changes on the source and the moved one on the target, over the same positions of "
    "the same texts: the divergence from the base without it (mean and standard deviation over texts), and the "
    "negative log-likelihood of the text, in nats."
)
_LICENCE = (
    "The licences of the source adapter, of the source base model and of the target base model all apply to this "
    "adapter."
)


def model_card(report: TransferReport, profile: str = "portable") -> str:
    """Return the text of the card, with the front matter that the hub reads.

    Args:
        report: as `documents.published` returns it. A target that is a hub id goes into the front matter; a local name,
            which the hub refuses there, appears in the text only.
        profile: file format of the adapter.
    """
    name, base = public_name(report.adapter.name) or "adapter", report.target.name
    library = "peft" if profile in ("portable", "peft") else profile
    chosen = f", chosen because {markdown_text(report.choice)}" if report.choice else ""
    sections = [
        _front_matter(base, library, report.adapter),
        f"# {markdown_code(name)} moved to {markdown_code(base or 'another base model')}",
        "This LoRA adapter was not trained on its base model. jcrosslora moved it there from another base, without "
        f"the data that it was trained on, by the method {markdown_code(report.recipe.method)}{chosen}.",
        f"**What to expect:** {markdown_text(report.verdict.text)}",
        *(f"## {title}\n\n{text}" for title, text in _sections(report) if text),
        f"## Licence\n\n{_LICENCE}",
    ]
    return "\n\n".join(sections) + "\n"


def _sections(report: TransferReport) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section; one without text is left out."""
    yield "Base models", _bases(report)
    again = "The same is in `recipe.toml`; run it again with `jcrosslora transfer --recipe recipe.toml`"
    recipe = f"```toml\n{report.recipe_toml.strip()}\n```"
    yield "Recipe", f"{recipe}\n\n{again}{_module(report.recipe.method)}"
    yield "Diagnostics", _markdown(role_rows(report)) if report.rows else ""
    yield "Fit", "\n\n".join(_fit(report))
    yield "Added", _sentence(report.added)
    ranks = report.rank_sentence if report.fitted or report.added else None
    truncation = report.truncation and f"the update was truncated to {report.truncation.sentence}"
    yield "Rank", " ".join(filter(None, (_sentence(ranks), _sentence(truncation))))
    yield "Embedding and output head", _listed([row.sentence for row in report.tokens])
    yield "Effect on text", "" if report.effect is None else f"{_EFFECT}\n\n{_markdown(report.effect.rows())}"
    yield "Not moved", _left(report)
    yield "Warnings", _listed(report.warnings)


def _fit(report: TransferReport) -> Iterator[str]:
    """Yield what was fitted, the curve of the fit, and some of its completions."""
    if report.fitted:
        yield f"The update was {markdown_text(report.fitted)}."
    if report.curve:
        looks = spread(report.curve, _LOOKS)
        rows = [(f"{used:,}", "-" if found is None else f"{found:.3f}") for used, found in looks]
        yield _markdown([{"completions used": used, "divergence": found} for used, found in rows])
    if report.examples:
        yield f"{_EXAMPLES}\n\n" + "\n".join(f"- {markdown_code(text)}" for text in report.examples)


def without_examples(card: str) -> str:
    """Return a card without the completions that `model_card` shows in it."""
    return re.sub(rf"{re.escape(_EXAMPLES)}\n\n(?:- .*\n)+\n?", "", card)


def _front_matter(base: str | None, library: str, adapter: SourceAdapter) -> str:
    on_the_hub = is_on_hub(base)
    data = ModelCardData(
        base_model=base if on_the_hub else None,
        base_model_relation="adapter" if on_the_hub else None,
        library_name=library,
        license=adapter.licence,
        license_name=adapter.licence_name,
        license_link=adapter.licence_link,
        pipeline_tag="text-generation",
        tags=[*([f"base_model:adapter:{base}"] if on_the_hub else []), "lora", "jcrosslora"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _module(method: str) -> str:
    """Say what the command needs for a method of a user's own, and end the sentence."""
    module, _, own = method.partition(":")
    return f", and `--allow-module {module}` once you have looked at the code of that module." if own else "."


def _bases(report: TransferReport) -> str:
    return _markdown(
        [
            {"": side, "name": base.name or "-", "revision": base.revision or "-", "digest": base.digest or "-"}
            for side, base in (("source", report.source), ("target", report.target))
        ]
    )


def _left(report: TransferReport) -> str:
    left = report.unmapped_sources
    rows = [{"source module": item.source, "share of the update's energy": f"{item.share:.2%}"} for item in left]
    return "These source modules feed no module of the target.\n\n" + _markdown(rows) if rows else ""


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[column] for column in head] for row in rows)]
    return "\n".join("| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in lines)


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)


def _sentence(text: str | None) -> str:
    """Return a text with a capital and a full stop; "" without one."""
    plain = markdown_text(text) if text else ""
    return f"{plain[:1].upper()}{plain[1:]}." if plain else ""
