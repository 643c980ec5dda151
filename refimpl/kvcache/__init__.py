"""KV cache: one cache with a policy (what stays), a codec (how it is stored) and a reader (what is read)."""

from refimpl.kvcache.attention import release
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.codecs import Codec, Dense
from refimpl.kvcache.layer import KVLayer
from refimpl.kvcache.policies import Full, KVPolicy, Random, StreamingLLM, Window
from refimpl.kvcache.readers import ReadAll, Reader
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["Codec", "Dense", "Full", "KVCache", "KVLayer", "KVPolicy", "Random", "ReadAll", "Reader",
           "StreamingLLM", "View", "Window", "best", "release"]  # fmt: skip
