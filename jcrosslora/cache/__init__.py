"""Factors of bases and transports of pairs, kept on disk and found again by the contents of what they were made from.

Nothing in the cache is needed: it may be removed at any time, by `jcrosslora cache clear` or by hand.
"""

from jcrosslora.cache.store import KINDS as KINDS
from jcrosslora.cache.store import Cache as Cache
from jcrosslora.cache.store import Entry as Entry
from jcrosslora.cache.store import open_cache as open_cache
