"""The digest of a base's weights, from the record of digests on disk where its files are in it."""

from jcrosslora.cache.store import open_cache
from jcrosslora.checkpoint import BaseModel


def base_digest(base: BaseModel) -> str:
    """Return `BaseModel.digest`; files that have not changed since they were last read are not read again."""
    store = open_cache()
    return base.digest(None if store is None else store.digests)
