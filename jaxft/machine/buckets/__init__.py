"""Object stores, ``s3://`` and ``gs://``: whole objects are read, put, listed and deleted there; nothing is renamed, nothing appended."""

from jaxft.machine.buckets.fetch import cache_root, fetched, fetched_rows
from jaxft.machine.buckets.store import Entry, Store, is_address

__all__ = ["Entry", "Store", "cache_root", "fetched", "fetched_rows", "is_address"]
