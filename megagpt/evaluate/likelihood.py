"""Log-likelihoods of continuations, and whether they are the greedy choice; texts are cut into ids as lm-eval does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import UserError
from megagpt.distributed.world import World, lone_world
from megagpt.evaluate.answers import Journal, answer_groups
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer


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


def prefix_id(tokenizer: Tokenizer) -> int:
    """What an empty context stands for: the begin-of-text id, or of a tokenizer without one the end of the document before."""
    return tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> LikelihoodRequest:
    """The ids of a context and of what may follow it, by lm-eval's rules.

    Both are encoded together and cut behind as many ids as the context alone has; white space at the end of the context
    belongs to the continuation. Raises UserError if no id is left for the continuation.
    """
    kept = context.rstrip()
    context, continuation = kept, context[len(kept) :] + continuation
    first = [prefix_id(tokenizer)] if tokenizer.bos_id is not None or not context else []
    context_ids = first + (tokenizer.encode(context) if context else [])
    ids = [*first, *tokenizer.encode(context + continuation)]
    if len(ids) <= len(context_ids):
        raise UserError(
            f"continuation {continuation!r} after {context[-40:]!r} adds no token to the {len(context_ids)} before it"
        )
    return LikelihoodRequest(tuple(context_ids), tuple(ids[len(context_ids) :]))


@torch.no_grad()
def log_likelihoods(
    model: Callable[..., Tensor],
    config: ModelConfig,
    requests: Sequence[LikelihoodRequest],
    *,
    eot_id: int,
    vocab_size: int | None = None,
    micro_batch_size: int = 8,
    world: World | None = None,
    journal: Journal | None = None,
) -> list[Likelihood]:
    """The likelihood of each request, in order. `model(ids)` gives logits; put it into evaluation mode first.

    `vocab_size`: ids from there on (padding of the embedding, which no export has) get no probability; None = all have some.
    An empty context is the start of a document (`eot_id`). A context too long for the model is cut from the left; a
    continuation longer than seq_len is scored in pieces of seq_len / 2, each after what comes before it, cut likewise.
    Requests of similar length go through the model together. The ranks of `world` share the work and all get the same result,
    with the same bits on any number of them; a `journal` remembers it.
    """
    world = world or lone_world(torch.device("cpu"))
    pieces = [(i, piece) for i, request in enumerate(requests) for piece in _pieces(request, config.seq_len)]
    rows = [[*(piece.context or (eot_id,)), *piece.continuation][-(config.seq_len + 1) :] for _, piece in pieces]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]

    def answer(group: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        width = max(1, len(group[0][0]) - 1)
        ids_bt = torch.tensor([row[:-1] + [eot_id] * (width - len(row) + 1) for row, _ in group], device=world.device)
        logits_btv = model(ids_bt)[..., :vocab_size]
        found = []
        for line, (row, count) in enumerate(group):
            targets = torch.tensor(row[-count:], dtype=torch.long, device=world.device)
            logits_tv = logits_btv[line, len(row) - 1 - count : len(row) - 1]
            log_p_tv = logits_tv.log_softmax(dim=-1, dtype=torch.promote_types(logits_tv.dtype, torch.float32))
            nats = float(log_p_tv.gather(1, targets[:, None]).double().sum())
            found.append((nats, bool((log_p_tv.argmax(dim=-1) == targets).all())))
        return found

    groups = [[(rows[i], len(pieces[i][1].continuation)) for i in batch] for batch in batches]
    nats, greedy = [0.0] * len(requests), [True] * len(requests)
    by_piece: dict[int, tuple[float, bool]] = {}
    for batch, answers in zip(batches, answer_groups(groups, answer, world, journal), strict=True):
        by_piece |= dict(zip(batch, answers, strict=True))
    for i, (number, _) in enumerate(pieces):
        nats[number] += by_piece[i][0]
        greedy[number] &= by_piece[i][1]
    return [Likelihood(*found) for found in zip(nats, greedy, strict=True)]


def text_scorer(
    model: Callable[..., Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    world: World,
    journal: Journal | None = None,
) -> Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]:
    """(context, continuation) texts to (nats, is_greedy), for tasks.score_task."""

    def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        requests = [encode_request(tokenizer, context, continuation) for context, continuation in pairs]
        found = log_likelihoods(
            model,
            config,
            requests,
            eot_id=tokenizer.eot_id,
            vocab_size=tokenizer.vocab_size,
            micro_batch_size=micro_batch_size,
            world=world,
            journal=journal,
        )
        return [(likelihood.nats, likelihood.is_greedy) for likelihood in found]

    return score


def _pieces(request: LikelihoodRequest, seq_len: int) -> list[LikelihoodRequest]:
    """The request itself, or pieces of it whose likelihoods multiply to its own; none of an empty one."""
    context, continuation = request.context, request.continuation
    if len(continuation) <= seq_len:
        return [request] if continuation else []
    size = max(1, seq_len // 2)
    starts = range(0, len(continuation), size)
    return [LikelihoodRequest((*context, *continuation[:i]), continuation[i : i + size]) for i in starts]
