"""ADSA: KV caches that keep within a budget (arXiv 2506.18226). Knows tensors, and nothing of models or files."""

from adsa.cache import KVCache, LayerCache
from adsa.config import CacheConfig

__all__ = ["CacheConfig", "KVCache", "LayerCache"]
