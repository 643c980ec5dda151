"""KV cache: one cache with a policy (what stays), a codec (how it is stored) and a reader (what is read)."""

from refimpl.kvcache.attention import release
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.codecs import Codec, Dense
from refimpl.kvcache.d2o import D2O
from refimpl.kvcache.dcp_policy import DynamicContextPruning
from refimpl.kvcache.dynamickv import DynamicKV
from refimpl.kvcache.fastgen import FastGen
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.kcache import KCache
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.kvsvd import KVSVD
from refimpl.kvcache.lacache import LaCache
from refimpl.kvcache.layer import KVLayer
from refimpl.kvcache.lorc import Latent
from refimpl.kvcache.minicache import MiniCache
from refimpl.kvcache.minikv import PrefillH2O, minikv
from refimpl.kvcache.policies import Full, KVPolicy, Random, StreamingLLM, Window
from refimpl.kvcache.pyramidkv import PyramidKV
from refimpl.kvcache.quest import Quest
from refimpl.kvcache.readers import ReadAll, Reader
from refimpl.kvcache.retrieval import RetrievalAttention
from refimpl.kvcache.scissorhands import Scissorhands
from refimpl.kvcache.slots import best
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV
from refimpl.kvcache.tailorkv import TailorKV, tailor
from refimpl.kvcache.tiers import HostValues, Offloaded
from refimpl.kvcache.tova import TOVA
from refimpl.kvcache.view import View

__all__ = [
    "AdaSnapKV", "Codec", "D2O", "Dense", "DynamicContextPruning", "DynamicKV", "FastGen", "Full",
    "H2O", "HostValues", "KCache", "KIVI", "KVCache", "KVLayer", "KVPolicy", "KVSVD", "LaCache",
    "Latent", "MiniCache", "Offloaded", "PrefillH2O", "PyramidKV", "Quest", "Random", "ReadAll",
    "Reader", "RetrievalAttention", "Scissorhands", "SnapKV", "StreamingLLM", "TOVA", "TailorKV",
    "View", "Window", "best", "minikv", "release", "tailor",
]  # fmt: skip
