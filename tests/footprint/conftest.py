"""What several tests of the room compare with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def one_process() -> Callable[..., dict[str, Tensor]]:
    """`one_process(model, ids, steps, lr)` trains with plain AdamW on the whole batch: name -> parameter."""

    def train(model: nn.Module, ids: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    return train
