"""Fused losses of the tiny pair: output projection, softmax and gradient in one chunked pass."""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_CHUNK = 1024  # tokens; 16 MB of float32 logits stay below malloc's mmap threshold


class _SoftTargetLoss(torch.autograd.Function):
    """Mean over tokens of cross-entropy to softmax targets mixed with one-hot labels.

    The gradient of either is softmax(logits) - target, so it is formed chunk by chunk in the
    forward pass and the logits are never kept (as in Liger Kernel, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        soft: float,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            log_p = (hidden[part] @ weight.T).float().log_softmax(-1)
            gold = labels[part, None]
            grad = log_p.exp()
            total -= (1 - soft) * log_p.gather(1, gold).sum()
            grad.scatter_add_(1, gold, log_p.new_full(gold.shape, soft - 1))
            if soft:
                log_q = (teacher[part] @ teacher_weight.T).float().log_softmax(-1)
                q = log_q.exp()
                total += soft * (q * (log_q - log_p)).sum()  # KL(teacher || student)
                grad.sub_(q, alpha=soft)
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part])
        if grad_weight is not None:
            grad_weight /= len(hidden)
        ctx.save_for_backward(grad_hidden / len(hidden), grad_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = None if grad_weight is None else grad_weight * grad
        return grad_hidden * grad, grad_weight, None, None, None, None


def next_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; labels of -100 do not count."""
    return mixed_loss(hidden, weight, labels, hidden, weight, soft=0.0)


def mixed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    soft: float,
) -> Tensor:
    """`soft` x KL(teacher || student) + (1 - `soft`) x next-token loss, nats per token."""
    real = labels.flatten() >= 0
    return _SoftTargetLoss.apply(
        hidden.flatten(0, 1)[real],
        weight.to(hidden.dtype),
        labels.flatten()[real],
        teacher.flatten(0, 1)[real],
        teacher_weight.to(teacher.dtype),
        soft,
    )
