"""Generation as streams: of ids, and of texts."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from megagpt.checkpoint.load_model import LoadedModel
from megagpt.generate.batch import Batch, Text
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.text_stream import StreamDecoder, TextStream
from megagpt.model.cache import Cache
from megagpt.model.gpt import ModelConfig
from megagpt.tokenizer.base import prompt_ids


@torch.inference_mode()
def stream_texts(
    loaded: LoadedModel, prompts: Sequence[str | list[int]], sampling: SamplingConfig
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, piece of text) for every piece; the prompts themselves, texts or ids, are not repeated.

    All prompts are computed together, and each text ends by itself: at a stop string, an end-of-text token, or max_tokens.
    """
    tokenizer = loaded.tokenizer
    streams = [TextStream(StreamDecoder(tokenizer, at_start=not prompt), sampling.stop) for prompt in prompts]
    batch, numbers = new_batch(
        loaded.model,
        loaded.model_config,
        [prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
        sampling,
        vocab_size=tokenizer.vocab_size,
        streams=range(len(prompts)),
        device=next(loaded.model.parameters()).device,
    )
    while batch.texts:
        for drawn in sorted(batch.step(), key=lambda drawn: numbers[drawn.text]):
            row, text = numbers[drawn.text], drawn.text
            ended = sampling.stop_at_eot and drawn.token in tokenizer.eos_ids
            piece = "" if ended else streams[row].push(drawn.token)
            if ended or streams[row].stopped or len(text.ids) - text.num_prompt == sampling.max_tokens:
                piece += streams[row].finish()
                batch.remove(text)
            if piece:
                yield row, piece


@torch.no_grad()
def generate_ids(
    model: Callable[..., Tensor],
    config: ModelConfig,
    ids_bt: Tensor,
    sampling: SamplingConfig,
    *,
    vocab_size: int | None = None,
    eos_ids: Collection[int] = (),
    streams: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """After each step the next token of every row of `ids_bt` [B, T], None for rows that have ended at one of `eos_ids`.

    `vocab_size`: ids from there on (padding of the embedding) are never drawn. `streams`: number of each row's random stream;
    None = 0, 1, …. Without eos_ids every call makes exactly max_tokens forwards, which ranks that share a model need. When
    the model's seq_len is full, generation continues from its last half, with positions counted from 0 again. Put the model in
    evaluation mode first.
    """
    rows = ids_bt.tolist()
    numbers_of_streams = range(len(rows)) if streams is None else streams
    batch, numbers = new_batch(
        model, config, rows, sampling, vocab_size=vocab_size, streams=numbers_of_streams, device=ids_bt.device
    )
    for _ in range(sampling.max_tokens):
        found: list[int | None] = [None] * len(rows)
        for drawn in batch.step():
            if drawn.token in eos_ids:
                batch.remove(drawn.text)
            else:
                found[numbers[drawn.text]] = drawn.token
        yield found
        if not batch.texts:
            return


def new_batch(
    model: Callable[..., Tensor],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    vocab_size: int | None,
    streams: Sequence[int],
    device: torch.device,
) -> tuple[Batch, dict[Text, int]]:
    """A batch with a slot for each prompt, and which prompt each text is of: those of equal length are neighbours."""
    longest = max((len(ids) for ids in prompts), default=0) + sampling.max_tokens
    cache = Cache(config.num_layers, len(prompts), min(config.seq_len, longest))
    batch = Batch(model, cache, config.seq_len, device, vocab_size)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return batch, {batch.add(prompts[i], sampling, stream=streams[i]): i for i in order}
