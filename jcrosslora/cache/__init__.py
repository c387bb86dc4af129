"""Keep arrays on disk and find them by digests of everything that they were computed from.

The cache only saves time: `jcrosslora cache clear` or removing the folder by hand is always safe.
"""

from jcrosslora.cache.entries import Entry as Entry
from jcrosslora.cache.keys import FileDigests as FileDigests
from jcrosslora.cache.place import cache_limit as cache_limit
from jcrosslora.cache.place import keep_compiled as keep_compiled
from jcrosslora.cache.place import processor as processor
from jcrosslora.cache.store import Cache as Cache
from jcrosslora.cache.store import open_cache as open_cache
