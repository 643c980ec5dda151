"""Shared fixtures; and one thread, no network, before torch and transformers are first imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def tiny_models() -> dict[str, nn.Module]:
    """A fresh random-weight model of each family: gpt2, llama, mistral (window 5), qwen2 (q/k/v bias)."""
    from refimpl.checks.tiny import FAMILIES, tiny

    return {family: tiny(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def bundled() -> Callable[[str], tuple]:
    """`bundled("llama-mini")` -> (model, tokenizer); skips only while its weights do not exist yet."""
    loaded: dict[str, tuple] = {}

    def load(name: str) -> tuple:
        from refimpl.paths import data_file

        if name not in loaded:
            if not data_file("models", name, "model.safetensors").exists():
                pytest.skip(f"data/models/{name}/model.safetensors does not exist yet")
            from refimpl.models import load as load_model

            loaded[name] = load_model(name)
        return loaded[name]

    return load
