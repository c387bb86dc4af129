"""Keep arrays on disk and find them by digests of everything that they were computed from.

The cache only saves time: `jcrosslora cache clear` or removing the folder by hand is always safe.
"""

from jcrosslora.cache.manifest import Entry as Entry
from jcrosslora.cache.store import Cache as Cache
from jcrosslora.cache.store import open_cache as open_cache
