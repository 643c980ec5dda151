"""Quantization: weights in few bits; one compressed layer, one calibrator, one loop for all methods.

Functions of a whole model are imported from their modules: `awq.awq`, `smoothquant.smoothquant`, `peqa.peqa`,
`mixllm.mixllm`. Beside this package's methods stand `refimpl.quantization.pruning`, `.distillation` and
`.evaluation`, the protocols.
"""

from refimpl.quantization.activations import W8A8
from refimpl.quantization.aqlm import AQLM
from refimpl.quantization.aser import ASER
from refimpl.quantization.calibrate import Stats, calibrate, collect, stats_of
from refimpl.quantization.entropy import EntropyRTN
from refimpl.quantization.feedback import feedback_quantize
from refimpl.quantization.fold import consumers, fold
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.gptvq import GPTVQ
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.int8 import LLMInt8
from refimpl.quantization.linear import (
    CompressedLinear,
    GridLinear,
    compressed_names,
    replace_linear,
    untie_head,
)
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.nf4 import NF4, qlora
from refimpl.quantization.outliers import inject_outliers
from refimpl.quantization.quip import QuIP, QuIPSharp
from refimpl.quantization.repair import Repair
from refimpl.quantization.rtn import RTN
from refimpl.quantization.slim import SLiM
from refimpl.quantization.sparse import SparseLinear, n_m_mask
from refimpl.quantization.storage import load_compressed, save_compressed
from refimpl.quantization.symmetric import algorithm_2, distortion, output_distortion, symmetric_codes

__all__ = [
    "AQLM", "ASER", "GPTQ", "GPTVQ", "NF4", "RTN", "W8A8", "CompressedLinear", "EntropyRTN", "Grid",
    "GridLinear", "LLMInt8", "QuIP", "QuIPSharp", "Quantized", "Repair", "Report", "SLiM", "SparseLinear",
    "Stats", "algorithm_2", "calibrate", "collect", "compress_model", "compressed_names", "consumers",
    "dequantize", "distortion", "feedback_quantize", "fold", "inject_outliers", "load_compressed",
    "n_m_mask", "output_distortion", "qlora", "replace_linear", "save_compressed", "stats_of",
    "symmetric_codes", "untie_head",
]  # fmt: skip
