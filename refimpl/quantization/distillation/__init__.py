"""Knowledge distillation: train a small or compressed model towards the outputs of the large one."""

from refimpl.quantization.distillation.losses import TopK, feature_loss, kd_loss, kl_loss, top_k
from refimpl.quantization.distillation.repair import repair
from refimpl.quantization.distillation.train import Distillation, distil, half_depth, layer_map, store

__all__ = [
    "Distillation", "TopK", "distil", "feature_loss", "half_depth", "kd_loss", "kl_loss", "layer_map",
    "repair", "store", "top_k",
]  # fmt: skip
