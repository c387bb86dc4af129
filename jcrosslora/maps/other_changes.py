"""Move changes of an adapter without maps: token rows, experts, and invocation tokens.

A row of the embedding or the output head belongs to a token, and its entries to dimensions of the residual stream. So
rows move only with methods that keep or select these dimensions, and only for tokens that both bases have. The ids of
these tokens may differ.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter import Adapter, ExpertUpdate, TokenUpdate, expert_update
from jcrosslora.adapter.changes import EMBEDDING, HEAD, TIED, changed_rows, complete_rows, low_rank_rows
from jcrosslora.adapter.records import describe_experts
from jcrosslora.checkpoint import BaseModel, Tokenizer, load_tokenizer, shared_ids
from jcrosslora.errors import AdapterError
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import EvidenceKind
from jcrosslora.maps.method import Method
from jcrosslora.maps.moved import TokenRow
from jcrosslora.relation import ChannelScales, LayerMap, compare_token_names, expert_scales


def carry_tokens(
    adapter: Adapter, pair: BasePair, method: Method
) -> tuple[tuple[TokenUpdate, ...], tuple[TokenRow, ...], str]:
    """Move the changes of embedding and head to the target.

    A replaced row becomes the target's row plus the change from the source's row; if both bases agree, it is the same
    row. Returns the changes, a report row for each change of the adapter, and "" or the reason why nothing is moved.
    Raises AdapterError if the changed tables differ in size from the source's, and CheckpointError if a weight cannot
    be read.
    """
    source, target = pair
    ids_tgt, reason = target_ids(pair)
    if target.family.own_embedding is not None and any(update.table != HEAD for update in adapter.tokens):
        stored = target.family.stored.embedding
        return (), (), f"changes of the embedding of {target.family.name}, {stored}, are not written"
    if ids_tgt is None:
        return (), (), reason
    structure = pair.structure[0] if EvidenceKind.SELECTION in method.requires else None
    rows_to = _RowMap(pair, ids_tgt, None if structure is None else structure.stream)
    found: list[TokenUpdate] = []
    rows = []
    for update in adapter.tokens:
        if (update.size, update.width) != (source.dims.vocab, source.dims.hidden):
            raise AdapterError(
                f"adapter {adapter.info.name} changes {update.table} of {update.size} x {update.width}, but the base "
                f"{source.name} has {source.dims.vocab} x {source.dims.hidden}; give the base it was trained on"
            )
        changed, count, kept = 0, 0, 0.0
        # The change of a tied matrix becomes one for embedding and one for head if the target has two matrices.
        for table in (EMBEDDING, HEAD) if update.table == TIED and not target.tied else (update.table,):
            part = dataclasses.replace(update, table=table)
            carried, changed, count, kept = rows_to.factors(part) if part.rows is None else rows_to.replaced(part)
            found += [dataclasses.replace(carried, share=update.share)] if len(carried.ids) else []
        share = kept / update.energy if update.energy else 1.0
        rows.append(TokenRow(update.modules, update.kind, changed, count, update.share, share))
    moved = complete_rows(found, target)
    pair.release()
    return moved, tuple(rows), ""


def target_ids(pair: BasePair) -> tuple[np.ndarray | None, str]:
    """Return the target's id of every source token, int64 (V_src,), -1 for none; or None and the reason.

    Normal tokens match if they stand for the same bytes, special tokens if they have the same name. If both
    vocabularies are identical, ids without a token match too. If the tokenizers contradict the embeddings, equal ids
    match, because their rows are the same.
    """
    source, target = pair
    size, src, tgt = source.dims.vocab, source.vocabulary(), target.vocabulary()
    same = src.tokens == tgt.tokens and src.special == tgt.special and size == target.dims.vocab
    if same and (src.tokens is not None or source.digest() == target.digest()):
        return np.arange(size), ""
    names = compare_token_names(source, target)
    if names is not None and names.contradict:
        ids = np.arange(size)
        return np.where(ids < target.dims.vocab, ids, -1), ""
    shared, reason = shared_ids(source, target)
    if shared is None:
        return None, reason
    found = np.full(size, -1)
    for name in src.special.keys() & tgt.special.keys():
        found[src.special[name]] = tgt.special[name]
    ids_src, ids_tgt = shared
    found[ids_src] = ids_tgt
    return found, ""


# The change for the target, the number of changed source rows, how many of them move, and the energy of the moved rows.
_Carried = tuple[TokenUpdate, int, int, float]


@dataclasses.dataclass(frozen=True, eq=False)
class _RowMap:
    """Moves rows of embedding and head to the target.

    Attributes:
        ids: (V_src,), the target's id of each source token, -1 for none.
        stream: (D_tgt,), the source dimension for each target dimension, -1 for none; None keeps all.
    """

    pair: BasePair
    ids: np.ndarray
    stream: np.ndarray | None

    def factors(self, update: TokenUpdate) -> _Carried:
        """Move a change that is held as factors."""
        assert update.factors is not None
        ids = self.ids[update.ids]
        order = np.argsort(ids, kind="stable")[np.count_nonzero(ids < 0) :]
        a, b = self._columns(np.asarray(update.factors.a)), np.asarray(update.factors.b)[order]
        factors = dataclasses.replace(update.factors, a=a, b=b)
        moved = low_rank_rows(update.table, update.kind, self.pair.target.dims.vocab, ids[order], factors)
        return moved, len(ids), len(order), moved.energy

    def replaced(self, update: TokenUpdate) -> _Carried:
        """Move a change that is held as whole rows."""
        source, target = self.pair
        name = f"{update.modules[0]}.weight"
        ids, rows, changed, energy = [], [], 0, 0.0
        for part in update.parts():
            old = source.rows(name, update.ids[part])
            change = update.changed(old, part) - old
            changes = change.any(axis=1)
            changed += int(np.count_nonzero(changes))
            moved_ids = self.ids[update.ids[part]]
            moves = changes & (moved_ids >= 0)
            change = self._columns(change[moves])
            energy += float(np.sum(change**2))
            ids.append(moved_ids[moves])
            rows.append((target.rows(name, moved_ids[moves]) + change).astype(np.float32))
        found = np.concatenate(ids)
        order = np.argsort(found)
        carried = changed_rows(update.table, update.kind, target, found[order], np.concatenate(rows)[order])
        return carried, changed, len(found), energy

    def _columns(self, matrix: np.ndarray) -> np.ndarray:
        """Select the target's columns (m, D_tgt) from a matrix (m, D_src); columns that the source lacks are zero."""
        stream = self.stream
        return matrix if stream is None else np.where(stream >= 0, matrix[:, np.maximum(stream, 0)], 0)


def carry_experts(adapter: Adapter, pair: BasePair, method: Method) -> tuple[tuple[ExpertUpdate, ...], tuple[str, ...]]:
    """Return the updates of target experts, each from the corresponding source expert, and notes on the outcome.

    A method that selects layers takes updates from any layer, others only from the layer of the same number.
    """
    structure, reason = pair.structure
    selects = EvidenceKind.SELECTION in method.requires
    found: list[ExpertUpdate] = []
    used: set[str] = set()
    for number, layer in enumerate(() if structure is None else structure.layers):
        if layer is None or layer.experts is None or not (layer.experts >= 0).any():
            continue
        if selects or layer.layer == number:
            own = [update for update in adapter.experts if update.layer == layer.layer]
            scales = pair.channels if EvidenceKind.CHANNEL_SCALES in method.requires and own else None
            rescaled = None if scales is None else _rescaled_experts(pair, scales, layer)
            found += [_carried(update, layer, pair.target, number, rescaled) for update in own]
            used |= {update.name for update in own}
    left = [update for update in adapter.experts if update.name not in used]
    notes = [f"moved too: {describe_experts(adapter.experts)}, to the same experts of the target."] if found else []
    if left:
        why = reason or "the target has no counterpart of these experts"
        notes.append(f"not moved: {describe_experts(left)}: {why}.")
    return tuple(found), tuple(notes)


def _rescaled_experts(pair: BasePair, scales: ChannelScales, layer: LayerMap) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the scales of rows (E, O) and columns (E, I) of the target's experts, for each of their matrices."""
    assert layer.experts is not None
    found = [expert_scales(pair, scales, layer.layer, (max(src, 0), tgt)) for tgt, src in enumerate(layer.experts)]
    return {matrix: tuple(map(np.stack, zip(*(one[matrix] for one in found), strict=True))) for matrix in found[0]}


def _carried(
    update: ExpertUpdate,
    layer: LayerMap,
    target: BaseModel,
    number: int,
    rescaled: dict[str, tuple[np.ndarray, ...]] | None,
) -> ExpertUpdate:
    assert layer.experts is not None
    kept, experts = (layer.experts >= 0)[:, None, None], np.maximum(layer.experts, 0)
    a, b = (np.where(kept, each[experts], np.float32(0)) for each in (update.a, update.b))
    if rescaled is not None:
        rows, columns = rescaled[update.matrix]
        a, b = a * columns[:, None], b * rows[:, :, None]
    return expert_update(target, number, update.matrix, a, b, update.share)


def with_invocation(adapter: Adapter, source: BaseModel, target: BaseModel) -> Adapter:
    """Return the adapter with its invocation, if any, translated to tokens of the target.

    Raises AdapterError if a tokenizer does not reproduce the text of the invocation, and CheckpointError if the
    tokenizer of a base cannot be read.
    """
    tokens = adapter.info.invocation
    if tokens is None or adapter.info.invocation_target is not None:
        return adapter
    found = translate(tokens, load_tokenizer(source), load_tokenizer(target), adapter.info.name)
    return dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation_target=found))


def translate(tokens: Sequence[int], source: Tokenizer, target: Tokenizer, name: str) -> tuple[int, ...]:
    """Translate tokens of one tokenizer into tokens of another through their text.

    Raises AdapterError if a token is not in the source's vocabulary, the source does not encode the text to the same
    tokens, or the target's tokens do not decode to the same text.
    """
    if max(tokens) >= source.vocab:
        msg = f"{name}: its invocation has token {max(tokens)}, but the base {source.ref} has {source.vocab} tokens"
        raise AdapterError(msg + ": give the base it was trained on")
    text = _text(source, tokens)
    again = source.encode(text, special=False).ids.tolist()
    if again != list(tokens):
        msg = f"{name}: its invocation {text!r} is {list(tokens)}, but {source.ref} encodes it as {again}"
        raise AdapterError(msg + ": it would not be found in text")
    found = target.encode(text, special=False).ids.tolist()
    if not found or _text(target, found) != text:
        msg = f"{name}: its invocation {text!r} becomes {_text(target, found)!r} in the tokens of {target.ref}"
        raise AdapterError(msg + ": the adapter could not be called there")
    return tuple(found)


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Decode tokens and keep special tokens, because invocations often consist of them."""
    return tokenizer.backend.decode(list(tokens), skip_special_tokens=False)
