"""ADSA: KV caches that keep within a budget (arXiv 2506.18226). Knows tensors, and nothing of models or files."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adsa.cache import KVCache, LayerCache
    from adsa.config import CacheConfig
    from adsa.order import Order

__all__ = ["CacheConfig", "KVCache", "LayerCache", "Order"]
_HOMES = {"CacheConfig": "config", "KVCache": "cache", "LayerCache": "cache", "Order": "order"}


def __getattr__(name: str):
    """Imported when it is first asked for: torch comes with it, which takes a second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'adsa' has no attribute {name!r}")
    return getattr(import_module(f"adsa.{_HOMES[name]}"), name)
