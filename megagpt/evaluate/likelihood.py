"""Log-likelihoods of continuations, and whether they are the greedy choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.model.gpt import ModelConfig


@dataclass(frozen=True, slots=True)
class LikelihoodRequest:
    """Token ids of a context and of what may follow it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """log p(continuation | context) in nats, and whether each of its tokens was the likeliest one."""

    nats: float
    is_greedy: bool


@torch.no_grad()
def log_likelihoods(
    model: Callable[..., Tensor],
    config: ModelConfig,
    requests: Sequence[LikelihoodRequest],
    *,
    eot_id: int,
    micro_batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> list[Likelihood]:
    """The likelihood of each request, in order. `model(ids)` gives logits; put it into evaluation mode first.

    An empty context is the start of a document (`eot_id`). A context too long for the model is cut from the left; a
    continuation longer than seq_len is scored in pieces of seq_len / 2, each after what comes before it, cut likewise.
    Requests of similar length go through the model together.
    """
    pieces = [(i, piece) for i, request in enumerate(requests) for piece in _pieces(request, config.seq_len)]
    nats, greedy = [0.0] * len(requests), [True] * len(requests)
    rows = [[*(piece.context or (eot_id,)), *piece.continuation][-(config.seq_len + 1) :] for _, piece in pieces]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), micro_batch_size):
        group = order[start : start + micro_batch_size]
        width = max(1, len(rows[group[0]]) - 1)
        ids_bt = torch.tensor([rows[i][:-1] + [eot_id] * (width - len(rows[i]) + 1) for i in group], device=device)
        log_p_btv = model(ids_bt).float().log_softmax(dim=-1)
        for line, i in enumerate(group):
            number, piece = pieces[i]
            count, end = len(piece.continuation), len(rows[i]) - 1
            targets = torch.tensor(piece.continuation, dtype=torch.long, device=device)
            log_p_tv = log_p_btv[line, end - count : end]
            nats[number] += float(log_p_tv.gather(1, targets[:, None]).double().sum())
            greedy[number] &= bool((log_p_tv.argmax(dim=-1) == targets).all())
    return [Likelihood(*found) for found in zip(nats, greedy, strict=True)]


def _pieces(request: LikelihoodRequest, seq_len: int) -> list[LikelihoodRequest]:
    """The request itself, or pieces of it whose likelihoods multiply to its own."""
    context, continuation = request.context, request.continuation
    if len(continuation) <= seq_len:
        return [request]
    size = max(1, seq_len // 2)
    starts = range(0, len(continuation), size)
    return [LikelihoodRequest((*context, *continuation[:i]), continuation[i : i + size]) for i in starts]
