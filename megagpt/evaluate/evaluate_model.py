"""How good a model is: validation loss, perplexity and bits per byte, and likelihoods of given texts for tasks with answers."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from megagpt.checkpoint.load_model import LoadedModel, load_model
from megagpt.config import Config, UserError, validate
from megagpt.data.dataset import TokenDataset
from megagpt.data.loader import MicroBatch, eval_batches
from megagpt.data.open_data import DataConfig
from megagpt.distributed.world import World, lone_world, pick_device
from megagpt.evaluate.tasks import TaskResult, read_task, score_task
from megagpt.files import write_json
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import Tokenizer, token_lengths

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the targets of a text, and what follows from them."""

    nats: float
    """Sum of -log p(target)."""
    tokens: int
    """Targets counted, end-of-text tokens included."""
    text_bytes: int
    """UTF-8 bytes of the text that the targets stand for (end-of-text tokens stand for none)."""

    @property
    def loss(self) -> float:
        """Mean nats per target token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the whole text takes, document ends included, per byte of text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    def summary(self) -> dict[str, float | int | None]:
        """loss, perplexity, bits_per_byte, tokens, text_bytes: as metrics.jsonl and the tool's result have them."""
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "text_bytes")
        return {name: getattr(self, name) for name in names}


class EvaluateConfig(Config):
    """Evaluate a checkpoint of a run, on one process."""

    run_dir: Path
    """The run whose checkpoint is evaluated."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint: last, best (lowest validation loss), or a step."""
    shards: dict[str, Path] = Field(default_factory=dict)
    """Folders of shards to evaluate on, by name (each with a manifest.json); empty = the run's own validation splits."""
    tasks: dict[str, Path] = Field(default_factory=dict)
    """Multiple-choice and last-word tasks, by name: .jsonl files of the kinds that megagpt/evaluate/tasks.py describes."""
    micro_batch_size: int = Field(default=8, gt=0)
    """Samples per forward."""
    max_samples: int | None = Field(default=None, gt=0)
    """Samples per source and questions per task at most; null = all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""


@dataclass(frozen=True)
class Evaluation:
    """What evaluate_run found, and the file it is written to."""

    path: Path
    step: int
    total: Score
    sources: dict[str, Score]
    unigram_entropies: dict[str, float]
    """Nats per token of each source if tokens were drawn independently with their own frequencies: what loss must beat."""
    tasks: dict[str, TaskResult]


def evaluate_run(config: EvaluateConfig) -> Evaluation:
    """Load a checkpoint, evaluate it, and write run_dir/evaluations/step_<step>.json.

    Raises UserError if run, checkpoint, shards or tasks are missing or do not fit, before the model is loaded where possible.
    """
    questions = {name: read_task(path)[: config.max_samples] for name, path in config.tasks.items()}
    device = pick_device(config.device)
    loaded = load_model(config.run_dir, config.step, device=str(device))
    data_config = validate(DataConfig, loaded.run_config["data"], source=f"{loaded.path}/state.json")
    datasets = _datasets(config, loaded, data_config)
    sources = evaluate_sources(
        loaded.model,
        loaded.model,
        datasets,
        loaded.tokenizer,
        lone_world(device),
        micro_batch_size=config.micro_batch_size,
        max_samples=config.max_samples,
        mask_documents=data_config.mask_documents,
    )
    entropies = {name: unigram_entropy(dataset) for name, dataset in datasets.items()}
    log_likelihood = _scorer(loaded, config.micro_batch_size)
    tasks = {name: score_task(log_likelihood, items) for name, items in questions.items()}
    path = config.run_dir / "evaluations" / f"step_{loaded.step:08d}.json"
    result = Evaluation(path, loaded.step, combine(sources.values()), sources, entropies, tasks)
    write_json(path, to_json(result, config))
    return result


def to_json(result: Evaluation, config: EvaluateConfig) -> dict[str, Any]:
    """An evaluation as it is written to disk."""
    sources = {
        name: {**score.summary(), "unigram_entropy": result.unigram_entropies[name]} for name, score in result.sources.items()
    }
    tasks = {name: asdict(task) for name, task in result.tasks.items()}
    settings = config.model_dump(mode="json")
    return {"step": result.step, **result.total.summary(), "sources": sources, "tasks": tasks, "config": settings}


def describe(result: Evaluation) -> str:
    """An evaluation as lines of text."""
    lines = [f"step {result.step}"]
    for name, score in [*result.sources.items(), ("all", result.total)]:
        entropy = result.unigram_entropies.get(name)
        bits = "" if score.bits_per_byte is None else f"  bits_per_byte {score.bits_per_byte:.4f}"
        beaten = "" if entropy is None else f"  (unigram entropy {entropy:.4f})"
        lines.append(
            f"  {name:<20} loss {score.loss:.4f}{beaten}  perplexity {score.perplexity:.4g}{bits}  tokens {score.tokens:,}"
        )
    for name, task in result.tasks.items():
        lines.append(
            f"  {name:<20} accuracy {task.accuracy:.3f} ± {task.standard_error:.3f} (per byte {task.accuracy_per_byte:.3f}, "
            f"chance {task.chance:.3f}) of {task.questions:,} questions"
        )
    return "\n".join([*lines, f"written to {result.path}"])


def evaluate_sources(
    model: Callable[..., Tensor],
    module: nn.Module,
    datasets: Mapping[str, TokenDataset],
    tokenizer: Tokenizer,
    world: World,
    *,
    micro_batch_size: int,
    max_samples: int | None = None,
    mask_documents: bool = False,
) -> dict[str, Score]:
    """The score of each source; all ranks call it together and all get the same.

    `model(ids, targets, doc_lengths)` gives the summed loss; `module` is what is behind it, put into evaluation mode meanwhile.
    """
    lengths = token_lengths(tokenizer)
    scores = {}
    with evaluation_mode(module):
        for name, dataset in datasets.items():
            batches = eval_batches(
                dataset,
                micro_batch_size=micro_batch_size,
                rank=world.rank,
                size=world.size,
                max_samples=max_samples,
                mask_documents=mask_documents,
                token_lengths=lengths,
            )
            scores[name] = evaluate(model, batches, world)
    return scores


@torch.no_grad()
def evaluate(model: Callable[..., Tensor], batches: Iterable[MicroBatch], world: World) -> Score:
    """Sum the loss over the batches of all ranks. The loss is summed in fp64 and fetched from the device once, at the end."""
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens = text_bytes = 0
    for batch in batches:
        lengths = None if batch.doc_lengths is None else batch.doc_lengths.to(world.device)
        nats += model(batch.ids.to(world.device), batch.targets.to(world.device), lengths)
        tokens, text_bytes = tokens + batch.num_targets, text_bytes + batch.num_bytes
    return combine(Score(*sums) for sums in world.gather((float(nats), tokens, text_bytes)))


def combine(scores: Iterable[Score]) -> Score:
    """The score of several texts together: sums, so each token counts the same."""
    scores = list(scores)
    return Score(
        math.fsum(score.nats for score in scores),
        sum(score.tokens for score in scores),
        sum(score.text_bytes for score in scores),
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout and z-loss; the module's mode is restored."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def unigram_entropy(dataset: TokenDataset) -> float:
    """Entropy in nats per token of the frequencies of a split's tokens: no model without context has a lower loss on it."""
    counts = np.zeros(dataset.manifest.vocab_size, np.int64)
    step = 1 << 22
    for start in range(0, dataset.num_tokens, step):
        counts += np.bincount(dataset.tokens(start, step), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


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


def _scorer(loaded: LoadedModel, micro_batch_size: int) -> Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]:
    """(context, continuation) texts to (nats, is_greedy), for tasks.score_task."""
    tokenizer, device = loaded.tokenizer, next(loaded.model.parameters()).device

    def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        requests = [LikelihoodRequest(tuple(tokenizer.encode(a)), tuple(tokenizer.encode(b))) for a, b in pairs]
        found = log_likelihoods(
            loaded.model,
            loaded.model_config,
            requests,
            eot_id=tokenizer.eot_id,
            micro_batch_size=micro_batch_size,
            device=device,
        )
        return [(likelihood.nats, likelihood.is_greedy) for likelihood in found]

    return score


def _datasets(config: EvaluateConfig, loaded: LoadedModel, data_config: DataConfig) -> dict[str, TokenDataset]:
    """The splits to evaluate on, checked against the model's tokenizer."""
    own = {name: source.path / "validation" for name, source in data_config.sources.items()}
    folders = config.shards or {name: path for name, path in own.items() if path.is_dir()}
    if not folders:
        raise UserError(f"{config.run_dir}: its sources have no validation split; name shards=... to evaluate on")
    datasets = {name: TokenDataset(path, seq_len=data_config.seq_len) for name, path in folders.items()}
    for dataset in datasets.values():
        if dataset.manifest.tokenizer_sha256 != loaded.tokenizer.fingerprint:
            raise UserError(
                f"{dataset.directory}: made with tokenizer {dataset.manifest.tokenizer_sha256[:12]}, "
                f"the model has {loaded.tokenizer.fingerprint[:12]}"
            )
        if dataset.num_windows() == 0:
            raise UserError(f"{dataset.directory}: {dataset.num_tokens} tokens, at least 2 are needed")
    return datasets
