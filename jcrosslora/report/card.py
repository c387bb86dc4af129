"""The model card (README.md) of a moved adapter: its origin, how it was made, what to expect."""

import re
from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCardData

from jcrosslora.checkpoint.hub import is_on_hub
from jcrosslora.utils.texts import markdown_code, markdown_text

BaseRow = tuple[str | None, str | None, str | None]

_EXAMPLES = "Some of the completions, prompts and answers written by the source with the original adapter:"


def model_card(
    *,
    base_name: str | None,
    library: str = "peft",
    licence: str | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    source_adapter: str,
    method: str,
    recipe: str,
    bases: Mapping[str, BaseRow],
    verdict: str,
    table: Sequence[Mapping[str, str]],
    dropped: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    tokens: Sequence[str] = (),
    choice: str | None = None,
    effect: Sequence[Mapping[str, str]] = (),
    fitted: str | None = None,
    curve: Sequence[tuple[int, float]] = (),
    examples: Sequence[str] = (),
    added: str | None = None,
    ranks: str | None = None,
    truncation: str | None = None,
) -> str:
    """Return the text of the card, with the front matter that the hub reads.

    Args:
        base_name: the target base. A hub id goes into the front matter; a local path, which the hub refuses there,
            appears in the text only.
        library: the library whose format the files have, as the hub names it.
        licence: the licence on the source adapter's own card; None if it states none.
        licence_name: the name of one that the hub does not know, likewise.
        licence_link: its address, likewise.
        source_adapter: name of the adapter that was moved.
        method: the transfer method.
        recipe: the exact recipe, as TOML.
        bases: "source" and "target" to (name, revision, digest), each of which may be None.
        verdict: the sentence on what to expect.
        table: rows of text with the same columns.
        dropped: (source module, share of the update) for updates that were not moved.
        notes: warnings, one sentence each.
        tokens: what was moved of the embedding and the output head, one sentence without a full stop each.
        choice: why this method was chosen, if it was not named by the user.
        effect: rows of text on what the update changes on both bases, if that was measured.
        fitted: what was fitted behind the maps, if anything was.
        curve: completions used and the divergence on held-out ones, as the fit went.
        examples: some of the completions of the fit.
        added: what goes with the update that the maps do not make, if anything does.
        ranks: what the ranks became, if that is worth saying.
        truncation: to which ranks the updates were truncated, and what that left, if they were.
    """
    chosen = f", chosen because {markdown_text(choice)}" if choice else ""
    sections = [
        _front_matter(base_name, library, licence, licence_name, licence_link),
        f"# {markdown_code(source_adapter)} moved to {markdown_code(base_name or 'another base model')}",
        "This LoRA adapter was not trained on its base model. jcrosslora moved it there from another base, without "
        f"the data that it was trained on, by the method {markdown_code(method)}{chosen}.",
        f"**What to expect:** {markdown_text(verdict)}",
        "## Base models\n\n" + _bases(bases),
        f"## Recipe\n\n```toml\n{recipe.strip()}\n```\n\n"
        "The same is in `recipe.toml`; run it again with `jcrosslora transfer --recipe recipe.toml`" + _module(method),
        "## Diagnostics\n\n" + _markdown(table) if table else "",
        f"## Fit\n\nThe update was {markdown_text(fitted)}." if fitted else "",
        _markdown([{"completions used": f"{used:,}", "divergence": f"{found:.3f}"} for used, found in curve])
        if curve
        else "",
        f"{_EXAMPLES}\n\n{_quoted(examples)}" if examples else "",
        f"## Added\n\n{markdown_text(added[:1].upper() + added[1:])}." if added else "",
        "## Rank\n\n" + " ".join(_sentences(ranks, truncation and f"the update was truncated to {truncation}"))
        if ranks or truncation
        else "",
        "## Embedding and output head\n\n" + _listed(tokens) if tokens else "",
        "## Effect on text\n\n" + _effect(effect) if effect else "",
        "## Not moved\n\n" + _dropped(dropped) if dropped else "",
        "## Warnings\n\n" + _listed(notes) if notes else "",
        "## Licence\n\nThe licences of the source adapter, of the source base model and of the target base model all "
        "apply to this adapter.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def without_examples(card: str) -> str:
    """Return a card without the completions that `model_card` shows in it."""
    return re.sub(rf"{re.escape(_EXAMPLES)}\n\n(?:- .*\n)+\n?", "", card)


def _front_matter(
    base_name: str | None, library: str, licence: str | None, licence_name: str | None, licence_link: str | None
) -> str:
    on_the_hub = is_on_hub(base_name)
    data = ModelCardData(
        base_model=base_name if on_the_hub else None,
        base_model_relation="adapter" if on_the_hub else None,
        library_name=library,
        license=licence,
        license_name=licence_name,
        license_link=licence_link,
        pipeline_tag="text-generation",
        tags=[*([f"base_model:adapter:{base_name}"] if on_the_hub else []), "lora", "jcrosslora"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _module(method: str) -> str:
    """Say what the command needs for a method of a user's own, and end the sentence."""
    module, _, own = method.partition(":")
    return f", and `--allow-module {module}` once you have looked at the code of that module." if own else "."


def _bases(bases: Mapping[str, BaseRow]) -> str:
    rows = [
        {"": side, "name": name or "-", "revision": revision or "-", "digest": digest or "-"}
        for side, (name, revision, digest) in bases.items()
    ]
    return _markdown(rows)


def _dropped(dropped: Sequence[tuple[str, str]]) -> str:
    rows = [{"source module": name, "share of the update's energy": share} for name, share in dropped]
    return "These source modules feed no module of the target.\n\n" + _markdown(rows)


def _effect(rows: Sequence[Mapping[str, str]]) -> str:
    explained = (
        "What the original update changes on the source and the moved one on the target, over the same positions of "
        "the same texts: the divergence from the base without it (mean and standard deviation over texts), and the "
        "negative log-likelihood of the text, in nats."
    )
    return explained + "\n\n" + _markdown(rows)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "-"
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[column] for column in head] for row in rows)]
    return "\n".join("| " + " | ".join(markdown_text(cell) for cell in line) + " |" for line in lines)


def _quoted(texts: Sequence[str]) -> str:
    """Return texts as a list of code, which nothing in them can end."""
    return "\n".join(f"- {markdown_code(text)}" for text in texts)


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_text(sentence)}" for sentence in sentences)


def _sentences(*texts: str | None) -> list[str]:
    return [f"{plain[:1].upper()}{plain[1:]}." for plain in map(markdown_text, filter(None, texts))]
