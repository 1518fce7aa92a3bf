"""ADSA: KV caches that keep within a budget (arXiv 2506.18226). Knows tensors, and nothing of models or files."""

from adsa.cache import KVCache, LayerCache
from adsa.config import CacheConfig
from adsa.order import Order

__all__ = ["CacheConfig", "KVCache", "LayerCache", "Order"]
