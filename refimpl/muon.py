"""Muon with matrices of one shape orthogonalized together."""

from collections import defaultdict

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration that pushes singular values towards 1


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, one batched iteration for all matrices of a shape: equal updates, fewer kernels.

    Muon (K. Jordan, 2024) replaces the update of a matrix by its nearest orthogonal matrix. A small
    transformer has dozens of small matrices of four shapes; one by one they cost more time than its forward
    pass. Parameters, state and hyperparameters are torch's; `step` must give what torch's gives (tested).

    B ← μB + (1-μ)G;  U = orthogonal((1-μ)G + μB);  W ← W - ηλW - 0.2 η sqrt(max(rows, columns)) U

    >>> weight = nn.Parameter(torch.eye(4))
    >>> optimizer = Muon([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    >>> weight.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> optimizer.step()
    >>> bool((weight.diagonal() < 1).all())
    True
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Update every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("closure: this optimizer takes none")
        for group in self.param_groups:
            if group["adjust_lr_fn"] != "match_rms_adamw" or not group["nesterov"]:
                raise ValueError("Muon here is nesterov with adjust_lr_fn='match_rms_adamw'")
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
                gradients = [p.grad for p in parameters]
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                moved = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalized(torch.stack(moved), group["ns_steps"], group["eps"])
                rate = 0.2 * group["lr"] * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-rate)


def orthogonalized(stack: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices [N, rows, columns] with their singular values brought to about 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
