"""Keep arrays on disk and find them by digests of everything that they were computed from.

The cache only saves time: `jcrosslora cache clear` or removing the folder by hand is always safe.
"""

from jcrosslora.cache.entries import Entry as Entry
from jcrosslora.cache.keys import FileDigests as FileDigests
from jcrosslora.cache.store import Cache as Cache
from jcrosslora.cache.store import cache_limit as cache_limit
from jcrosslora.cache.store import keep_compiled as keep_compiled
from jcrosslora.cache.store import open_cache as open_cache
from jcrosslora.cache.store import processor as processor
