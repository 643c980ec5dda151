"""Golden arrays of two peers' AWQ: writes golden/awq_torchao.npz and golden/awq_llmcompressor.npz.

Run it once for each peer, `python data/quantization_golden_awq.py torchao`, in an environment of its own made
by `pip install torch==2.13.0` with `torchao==0.18.0` or `llmcompressor==0.14.0.1`. Nothing of refimpl is
imported; the inputs are drawn anew from the seed, by the test as well, and only their hash is stored.

torchao: the scales that its AWQObserver finds for one linear layer, 4 and 8 bits. llm-compressor: the scales
that its AWQModifier (duo_scaling=False) folds in a random LLaMA of two blocks, whose losses are those of
attention and MLP. Its exponents are i / 19, not i / 20.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS, TOKENS, GROUP = 0, 24, 64, 400, 16
BITS = (4, 8)
CONFIG = {
    "vocab_size": 48, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 32,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
MODEL_BITS, MODEL_GROUP = 4, 128  # the preset W4A16_ASYM
SITES = {
    "ln1": "self_attn.q_proj",
    "v-o": "self_attn.o_proj",
    "ln2": "mlp.gate_proj",
    "up-down": "mlp.down_proj",
}


def linear_inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [24, 64] and X [400, 64], float32, a few channels of X much larger than the others."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS))
    X = rng.normal(size=(TOKENS, COLUMNS)) * np.exp(rng.normal(0, 1, COLUMNS))
    return W.astype(np.float32), X.astype(np.float32)


def model_inputs(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by name and calibration ids [8, 24]; norms spread their channels widely."""
    rng = np.random.default_rng(SEED)
    weights = {}
    for name in sorted(shapes):
        drawn = rng.normal(0, 0.2, shapes[name])
        weights[name] = (np.exp(5 * drawn) if "norm" in name else drawn).astype(np.float32)
    return weights, rng.integers(2, CONFIG["vocab_size"], (8, 24))


def digest(*arrays: np.ndarray) -> str:
    """The hash of the inputs."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def torchao() -> tuple[dict[str, np.ndarray], str]:
    """Scales by "scale_bits"."""
    import torch
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    arrays = linear_inputs()
    W, X = map(torch.from_numpy, arrays)
    stored = {}
    for bits in BITS:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP),
            mapping_type=MappingType.ASYMMETRIC,
        )  # fmt: skip
        observer = AWQObserver(W, None, config)
        observer(X, X)
        stored[f"scale_{bits}"] = observer.calculate_qparams().numpy()
    return stored, digest(*arrays)


def llmcompressor() -> tuple[dict[str, np.ndarray], str]:
    """Scales by "layer_site"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # it looks at the files that a model came from
        LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
        return _folded(LlamaForCausalLM.from_pretrained(folder).eval())


def _folded(model: object) -> tuple[dict[str, np.ndarray], str]:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    weights, ids = model_inputs({name: tuple(p.shape) for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    rows = torch.from_numpy(ids)
    batches = torch.utils.data.DataLoader([{"input_ids": row} for row in rows], batch_size=len(rows))
    recipe = [
        AWQModifier(duo_scaling=False),
        QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16_ASYM"),
    ]
    IntermediatesCache.pin_memory = lambda self, index: None  # it pins memory for a GPU, there or not
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, "a"))  # it asks for one, and has no use for it
    oneshot(
        model=model, processor=PreTrainedTokenizerFast(tokenizer_object=tokenizer), dataset=batches,
        recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
    )  # fmt: skip
    stored = {}
    now = dict(model.named_parameters())
    for layer in range(CONFIG["num_hidden_layers"]):
        for site, reader in SITES.items():
            name = f"model.layers.{layer}.{reader}.weight"
            columns = now[name].detach().float().numpy()
            stored[f"{layer}_{site}"] = np.median(columns / weights[name], 0)
    return stored, digest(*(weights[name] for name in sorted(weights)), ids)


def main() -> int:
    """Store one peer's arrays with its versions, the seed and the hash of the inputs."""
    peers = {"torchao": torchao, "llmcompressor": llmcompressor}
    if len(sys.argv) != 2 or sys.argv[1] not in peers:
        print(f"usage: {sys.argv[0]} {' | '.join(peers)}", file=sys.stderr)
        return 2
    name = sys.argv[1]
    stored, hashed = peers[name]()
    versions = {package: importlib.metadata.version(package) for package in (name, "torch", "numpy")}
    about = "; ".join(f"{package} {version}" for package, version in versions.items())
    about = f"{about}; seed {SEED}; sha256 of the inputs {hashed}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / f"awq_{name}.npz"
    np.savez_compressed(out, about=np.array(about), **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
