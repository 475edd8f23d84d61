"""Cross-entropy summed over tokens, computed in chunks so that the logits of a batch are never held.

Logits of 8 x 2,048 tokens over a vocabulary of 50k are 3.3 GB in fp32. Here each chunk of tokens makes its logits, its loss
and its gradients at once in the forward pass; the backward pass only scales them by the incoming gradient.
"""

from typing import Any

import torch
from torch import Tensor

from megagpt.samples import IGNORE

CHUNK_ELEMENTS = 1 << 25
"""Logits made at a time: 128 MiB in fp32."""


def summed_cross_entropy(hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """Sum over n of -log softmax(hidden @ weight.T)[target], fp32 scalar in nats; targets equal to IGNORE add nothing.

    `z_loss` adds z_loss * logsumexp^2 per counted token (arXiv 2204.02311). Gradients flow to hidden and weight.
    """
    return _SummedCrossEntropy.apply(hidden_nd, weight_vd, targets_n, z_loss)  # type: ignore[return-value]


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, targets_n: Tensor, z_loss: float) -> Tensor:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden_nd.device)
        grad_hidden = torch.empty_like(hidden_nd) if wants_grad else None
        grad_weight = torch.zeros_like(weight_vd, dtype=torch.float32) if wants_grad else None
        chunk = max(1, CHUNK_ELEMENTS // weight_vd.shape[0])
        for start in range(0, hidden_nd.shape[0], chunk):
            hidden, targets = hidden_nd[start : start + chunk], targets_n[start : start + chunk]
            counted = targets != IGNORE
            logits = (hidden @ weight_vd.T).float()
            log_z = logits.logsumexp(dim=-1, keepdim=True)
            index = targets.clamp(min=0)[:, None]
            loss = log_z - logits.gather(1, index) + z_loss * log_z.square()
            total += loss.squeeze(1).masked_fill(~counted, 0.0).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = (logits - log_z).exp_()
                if z_loss:
                    grad *= 1 + 2 * z_loss * log_z
                grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
                grad = grad.masked_fill_(~counted[:, None], 0.0).to(hidden.dtype)
                grad_hidden[start : start + chunk] = grad @ weight_vd
                grad_weight += grad.T @ hidden
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_vd.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        return grad_hidden * scale, grad_weight * scale, None, None
