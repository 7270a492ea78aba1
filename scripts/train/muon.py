"""Muon (Jordan et al., 2024) in the precision that the device multiplies fastest.

torch.optim.Muon orthogonalizes in bfloat16 whatever the device; without AMX a CPU takes twice as
long for that as in float32, longer than for a draft head's forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from fast_dtype import fast_dtype
from torch import Tensor

MOMENTUM, WEIGHT_DECAY = 0.95, 0.01
STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration, Muon's own
UPDATE_SIZE = 0.2  # root mean square of an update at rate 1, AdamW's usual one (arXiv 2502.16982)


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonal matrices.

    Args:
        params: matrices.
        rate: of learning, as for AdamW.
    """

    def __init__(self, params: Iterable[Tensor], rate: float) -> None:
        super().__init__(params, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(state["momentum"], MOMENTUM))
                weight.mul_(1 - group["lr"] * WEIGHT_DECAY)
                size = UPDATE_SIZE * max(weight.shape) ** 0.5
                weight.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near 1 (0.7 to 1.2), by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = (x / x.norm().clamp(min=1e-7)).to(fast_dtype(matrix.device.type))
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
