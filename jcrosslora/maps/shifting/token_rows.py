"""Move an adapter's changes of the embedding and the output head to another base, row by row.

A row belongs to a token, and its numbers to dimensions of the residual stream. Rows therefore move only by methods that
preserve the coordinates of the stream (or select among them), and only for tokens that both bases have, under any ids.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.token_updates import (
    EMBEDDING,
    HEAD,
    TIED,
    TokenUpdate,
    changed_rows,
    complete_rows,
    low_rank_rows,
)
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.vocabulary import shared_ids
from jcrosslora.errors import AdapterError
from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import Method
from jcrosslora.maps.shifting.records import TokenRow
from jcrosslora.relation.token_names import compare_token_names


def carry_tokens(
    adapter: Adapter, pair: BasePair, method: Method
) -> tuple[tuple[TokenUpdate, ...], tuple[TokenRow, ...], str]:
    """Move the changes of embedding and head to the target.

    A replaced row becomes the target's row plus its change of the source's row: the same row, if both bases agree.

    Args:
        adapter: an adapter of the source, read with it.
        pair: the source and the target.
        method: a method that preserves the basis of the residual stream.

    Returns:
        The changes for the target, one report row for each change of the adapter, and "" or why nothing is moved.

    Raises:
        AdapterError: the changed tables differ in size from the source's.
        CheckpointError: a weight cannot be read.
    """
    source, target = pair.source, pair.target
    places, reason = token_places(source, target)
    if target.family.own_embedding is not None and any(update.table != HEAD for update in adapter.tokens):
        return (), (), f"changes of the embedding of {target.family.name}, {target.family.embedding}, are not written"
    if places is None:
        return (), (), reason
    structure = pair.structure[0] if EvidenceKind.SELECTION in method.requires else None
    stream = None if structure is None else structure.stream
    found: list[TokenUpdate] = []
    rows = []
    for update in adapter.tokens:
        if (update.size, update.width) != (source.dims.vocab, source.dims.hidden):
            msg = (
                f"adapter {adapter.info.name} changes {update.table} of {update.size} x {update.width}, but the base "
                f"{source.name} has {source.dims.vocab} x {source.dims.hidden}; give the base it was trained on"
            )
            raise AdapterError(msg)
        changed, count, kept = 0, 0, 0.0
        for part in _split(update, target):
            carry = _factors if part.rows is None else _rows
            carried, changed, count, kept = carry(part, source, target, places, stream)
            found += [carried] if len(carried.ids) else []
        share = kept / update.energy if update.energy else 1.0
        rows.append(TokenRow(update.modules, update.kind, changed, count, update.share, share))
    moved = complete_rows(found, target)
    for base in (source, target):
        base.release()
    return moved, tuple(rows), ""


def token_places(source: BaseModel, target: BaseModel) -> tuple[np.ndarray | None, str]:
    """Find the target's id of every token of the source.

    Normal tokens match if they stand for the same bytes, special tokens if they have the same name. If both
    vocabularies are identical, ids without a token match as well. Where the tokenizers contradict the embeddings, equal
    ids match, whose rows are the same.

    Returns:
        int64 (V_src,), -1 for tokens that the target does not have; or None with the reason.
    """
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
    places = np.full(size, -1)
    for name in src.special.keys() & tgt.special.keys():
        places[src.special[name]] = tgt.special[name]
    ids_src, ids_tgt = shared
    places[ids_src] = ids_tgt
    return places, ""


def _split(update: TokenUpdate, target: BaseModel) -> Iterator[TokenUpdate]:
    """Split a change of a tied matrix into one for embedding and one for head if the target has two matrices."""
    if update.table != TIED or target.tied:
        yield update
    else:
        yield dataclasses.replace(update, table=EMBEDDING)
        yield dataclasses.replace(update, table=HEAD)


Carried = tuple[TokenUpdate, int, int, float]
"""The change for the target, its number of rows on the source, how many of them move, and the energy of these."""


def _factors(
    update: TokenUpdate, source: BaseModel, target: BaseModel, places: np.ndarray, stream: np.ndarray | None
) -> Carried:
    del source
    assert update.factors is not None
    ids = places[update.ids]
    order = np.argsort(ids, kind="stable")[np.count_nonzero(ids < 0) :]
    factors = dataclasses.replace(
        update.factors, a=_chosen(np.asarray(update.factors.a), stream), b=np.asarray(update.factors.b)[order]
    )
    carried = low_rank_rows(update.table, update.kind, target.dims.vocab, ids[order], factors)
    return carried, len(ids), len(order), carried.energy


def _rows(
    update: TokenUpdate, source: BaseModel, target: BaseModel, places: np.ndarray, stream: np.ndarray | None
) -> Carried:
    name = f"{update.modules[0]}.weight"
    ids, rows, changed, energy = [], [], 0, 0.0
    for part in update.parts():
        old = source.rows(name, update.ids[part])
        change = update.changed(old, part) - old
        changes = change.any(axis=1)
        changed += int(np.count_nonzero(changes))
        place = places[update.ids[part]]
        moves = changes & (place >= 0)
        change = _chosen(change[moves], stream)
        energy += float(np.sum(change**2))
        ids.append(place[moves])
        rows.append((target.rows(name, place[moves]) + change).astype(np.float32))
    found = np.concatenate(ids)
    order = np.argsort(found)
    carried = changed_rows(update.table, update.kind, target, found[order], np.concatenate(rows)[order])
    return carried, changed, len(found), energy


def _chosen(matrix: np.ndarray, stream: np.ndarray | None) -> np.ndarray:
    """Select the target's columns (m, D_tgt) of a matrix (m, D_src), with zeros in columns that the source lacks."""
    return matrix if stream is None else np.where(stream >= 0, matrix[:, np.maximum(stream, 0)], 0)
