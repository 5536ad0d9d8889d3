"""Object stores behind the Storage port, by obstore: S3 and what speaks its language, Google's and Azure's.

This package is imported where a URL asks for it, since obstore is an extra.
"""

from __future__ import annotations

from asyncdcp.storage.object_store.place import ObjectPlace
from asyncdcp.storage.object_store.storage import ObjectStorage

__all__ = ["ObjectPlace", "ObjectStorage"]
