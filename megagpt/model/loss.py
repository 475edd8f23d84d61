"""Cross-entropy summed over tokens, computed in chunks so that the logits of a batch are never held.

Logits of 8 x 2,048 tokens over a vocabulary of 50k are 3.3 GB in fp32. Here each chunk of tokens makes its logits, its loss
and its gradients at once in the forward pass; the backward pass only scales them by the incoming gradient. What is done to the
logits between the matrix products is one function, which works in place and can be compiled into two passes over them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megagpt.documents import IGNORE

CHUNK_ELEMENTS, CHUNK_ELEMENTS_GPU = 1 << 25, 1 << 28
"""Logits made at a time: 128 MiB in fp32; 1 GiB on GPUs, where small products and sums of the weight's gradient cost more."""


def summed_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Sum over n of -log softmax(hidden @ weight.T)[target], fp32 scalar in nats; targets equal to IGNORE add nothing.

    `z_loss` adds z_loss * logsumexp^2 per counted token (arXiv 2204.02311). With `label_smoothing` s a token's loss is that of
    the target with weight 1 - s and the mean over the vocabulary with weight s (arXiv 1512.00567). Gradients flow to hidden
    and weight. `compiled` uses torch.compile for what lies between the matrix products; on CPUs it would be slower and is not.
    """
    total, _, _ = summed_loss_terms(
        hidden_nd, weight_vd, targets_n, z_loss=z_loss, label_smoothing=label_smoothing, compiled=compiled
    )
    return total


def summed_loss_terms(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    compiled: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What `summed_cross_entropy` gives, and its terms without gradient: `loss` in nats, and of `z_loss` and `label_smoothing`
    what those that are on add to it; {} without both. Where no gradient is computed also `hits`, the number of counted targets
    (int64) that are the likeliest token. Third: each token's loss, [n] fp32 in nats, without gradient, 0 for IGNORE.

    `chunk_elements`: logits made at a time; None = CHUNK_ELEMENTS of the device.
    """
    if not torch.is_grad_enabled():  # needs_input_grad is true in no_grad as well
        hidden_nd, weight_vd = hidden_nd.detach(), weight_vd.detach()
    chunk = chunk_elements or (CHUNK_ELEMENTS_GPU if hidden_nd.is_cuda else CHUNK_ELEMENTS)
    results = _SummedCrossEntropy.apply(hidden_nd, weight_vd, targets_n, z_loss, label_smoothing, compiled, chunk)
    total, nats, added, smoothed, hits, token_losses = results  # type: ignore[misc]
    extra = ({"z_loss": added} if z_loss else {}) | ({"label_smoothing": smoothed} if label_smoothing else {})
    terms = {"loss": nats, **extra} if extra else {}
    return total, terms if torch.is_grad_enabled() else {**terms, "hits": hits}, token_losses


def loss_and_gradient(
    logits_nv: Tensor, targets_n: Tensor, z_loss: float, label_smoothing: float, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(summed loss, summed z-loss, what label smoothing adds, hits, the losses of the tokens, the gradient of the losses' sum
    with respect to the logits, in their dtype), computed in fp32; `logits_nv` may be overwritten.

    Hits are counted without `wants_gradient` only, and the last result then means nothing.
    """
    counted_n1 = (targets_n != IGNORE)[:, None]
    index_n1 = targets_n.clamp(min=0)[:, None]
    values_nv = logits_nv.float()
    hits = torch.zeros((), dtype=torch.int64, device=logits_nv.device)
    if not wants_gradient:
        hits = (logits_nv.argmax(dim=-1) == targets_n).sum()  # IGNORE is no id
    largest_n1 = values_nv.amax(dim=-1, keepdim=True)
    values_nv -= largest_n1
    target_n1 = values_nv.gather(1, index_n1)
    mean_n1 = values_nv.mean(dim=-1, keepdim=True) if label_smoothing else target_n1
    values_nv.exp_()
    sum_n1 = values_nv.sum(dim=-1, keepdim=True)
    log_sum_n1 = sum_n1.log()
    log_z_n1 = log_sum_n1 + largest_n1
    nats_n1 = (log_sum_n1 - target_n1).masked_fill(~counted_n1, 0.0)
    nats = nats_n1.sum()
    added = (z_loss * log_z_n1.square()).masked_fill(~counted_n1, 0.0).sum() if z_loss else torch.zeros_like(nats)
    difference_n1 = label_smoothing * (target_n1 - mean_n1)
    smoothed = difference_n1.masked_fill(~counted_n1, 0.0).sum() if label_smoothing else torch.zeros_like(nats)
    if wants_gradient:
        values_nv *= ((1 + 2 * z_loss * log_z_n1) / sum_n1).masked_fill(~counted_n1, 0.0)
        if torch.compiler.is_compiling():  # a comparison is fused with the rest, a scatter would be a pass of its own
            hits_nv = (torch.arange(values_nv.shape[1], device=values_nv.device) == index_n1) & counted_n1
            values_nv = values_nv - (1 - label_smoothing) * hits_nv.to(values_nv.dtype)
        else:
            values_nv.scatter_add_(1, index_n1, (label_smoothing - 1) * counted_n1.to(values_nv.dtype))
        if label_smoothing:
            values_nv -= (label_smoothing / values_nv.shape[1]) * counted_n1.to(values_nv.dtype)
    return nats, added, smoothed, hits, nats_n1[:, 0], values_nv.to(logits_nv.dtype)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    return torch.compile(loss_and_gradient)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        z_loss: float,
        label_smoothing: float,
        compiled: bool,
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        between = _compiled() if compiled and hidden_nd.is_cuda else loss_and_gradient
        nats = added = smoothed = torch.zeros((), dtype=torch.float32, device=hidden_nd.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden_nd.device)
        token_losses = torch.empty(len(hidden_nd), dtype=torch.float32, device=hidden_nd.device)
        grad_hidden = torch.empty_like(hidden_nd) if wants_grad else None
        trained = ctx.needs_input_grad[1]  # a frozen head needs no gradient
        grad_weight = torch.zeros_like(weight_vd, dtype=torch.float32) if trained else None
        chunk = max(1, chunk_elements // weight_vd.shape[0])
        for start in range(0, hidden_nd.shape[0], chunk):
            hidden, targets = hidden_nd[start : start + chunk], targets_n[start : start + chunk]
            terms = between(hidden @ weight_vd.T, targets, z_loss, label_smoothing, wants_grad)
            chunk_nats, chunk_added, chunk_smoothed, chunk_hits, token_losses[start : start + chunk], grad = terms
            nats, added = nats + chunk_nats, added + chunk_added
            smoothed, hits = smoothed + chunk_smoothed, hits + chunk_hits
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grad @ weight_vd
            if grad_weight is not None:
                grad_weight += grad.T @ hidden
            del grad, terms  # else the next chunk's logits are made beside this one's gradient
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_vd.dtype))
        ctx.mark_non_differentiable(nats, added, smoothed, hits, token_losses)
        return nats + added + smoothed, nats, added, smoothed, hits, token_losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale, *_ = grads
        return grad_hidden * scale, None if grad_weight is None else grad_weight * scale, None, None, None, None, None
