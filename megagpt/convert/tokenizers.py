"""Tokenizers both ways: ours as tokenizer.json with equal ids, and what a model of transformers was trained with as ours.

Nothing is kept that does not give equal ids on the test strings. What tokenizer.json cannot express is returned as notes.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError
from megagpt.files import read_json, write_json, write_text
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import BytePairs, byte_characters, probe_texts
from megagpt.tokenizer.extended import Extended, write_special_tokens
from megagpt.tokenizer.hugging_face import HuggingFaceTokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.reading import GPT2_PATTERN
from megagpt.tokenizer.sentencepiece import SentencePiece
from megagpt.tokenizer.space_mark import SPACE_MARK
from megagpt.tokenizer.special_ids import write_special_ids

log = logging.getLogger(__name__)

CHAT_TEMPLATE = "chat_template.jinja"
HARD_TEXTS = (
    "", " ", "  two  spaces  ", "\n\n\t\r\n", "a\n\nb", "\x00\x01", "\ufeffbom \ufb01 \u00bd \u3000", "日本語 🎉 👩‍👩‍👧",
    "e\u0301 \u00e9", "1234567890 1,234.5", "\u00ad\u200b\u2028", "\U0010ffff", "<0x0A><0xE2>", "we'll  they've I'M",
    "def f(x):\n    return x  # \ttab\n", "https://example.org/a?b=c&d=%20", "ÄÖÜß æøå ¿¡ — “quoted”",
)  # fmt: skip
"""Strings that tell tokenizers apart, beside those from all over Unicode."""


def import_tokenizer(source: Path, given: Path | None, folder: Path) -> Tokenizer:
    """Copy the tokenizer of a model in Hugging Face's format into `folder`, with the ids that its settings name.

    tokenizer.json, which transformers uses, decides where other files give other ids. Raises UserError if there is none that
    `open_tokenizer` knows.
    """
    where = given or source
    reference = (where if where.is_dir() else where.parent) / "tokenizer.json"
    try:
        tokenizer = open_tokenizer(where)
        if reference.is_file() and differing_texts(tokenizer, reference):
            log.info("%s: the %s files beside it give other ids and are not used", reference, tokenizer.kind)
            tokenizer = HuggingFaceTokenizer(reference)
    except UserError as error:
        raise UserError(f"{error} (tokenizer=PATH names another)") from None
    if isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.lossless:
        log.warning("%s: it rewrites or drops text (%s)", reference, tokenizer.losses)
    tokenizer.save(folder)
    bos_id, eos_ids = _special_ids(source, tokenizer, reference)
    if not isinstance(tokenizer, Bytes):
        write_special_ids(folder, eos_ids=eos_ids, bos_id=bos_id)
    if added := _added_special(source, tokenizer, reference):
        ends = _listed_eos(source)
        write_special_tokens(folder, added, [name for name, number in added.items() if number in ends])
    template = source / CHAT_TEMPLATE
    settings = _optional_json(source / "tokenizer_config.json")
    if template.is_file():
        shutil.copyfile(template, folder / CHAT_TEMPLATE)
    elif isinstance(settings.get("chat_template"), str):
        (folder / CHAT_TEMPLATE).write_text(settings["chat_template"], encoding="utf-8")
    return open_tokenizer(folder, saved=True)


def export_tokenizer(tokenizer: Tokenizer, folder: Path, output: Path, seq_len: int) -> list[str]:
    """Write the files with which transformers' AutoTokenizer gives the same ids; returns what it does otherwise.

    `folder` is where the tokenizer was opened. Raises ConversionError if a test string gets other ids.
    """
    notes = []
    base = tokenizer.base if isinstance(tokenizer, Extended) else tokenizer
    if isinstance(base, SentencePiece):
        base.save(output)
        (output / "special_ids.json").unlink(missing_ok=True)
        value, reason = sentencepiece_json(base)
        if value is None:
            return [f"tokenizer.json is not written ({reason}): load tokenizer.model with sentencepiece"]
        notes.append("a text with U+2581 gets other ids: tokenizer.json cannot tell it from a space")
    elif isinstance(base, BytePairs):
        value = byte_pairs_json(base)
    elif isinstance(base, HuggingFaceTokenizer):
        value = {**read_json(base.path), "post_processor": None}
    else:
        value = _byte_level_json({_BYTE_TO_TEXT[i]: i for i in range(256)}, [], {"<|endoftext|>": Bytes.eot_id}, GPT2_PATTERN)
    if isinstance(tokenizer, Extended):
        _add_special(value, tokenizer)
    names = _names(value)
    if tokenizer.bos_id is not None:
        value["post_processor"] = _begin_with(names[tokenizer.bos_id], tokenizer.bos_id)
    write_json(output / "tokenizer.json", value)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": names[tokenizer.eot_id],
        **({"bos_token": names[tokenizer.bos_id]} if tokenizer.bos_id is not None else {}),
        **({"unk_token": value["model"]["unk_token"]} if value["model"].get("unk_token") else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    write_json(output / "tokenizer_config.json", settings)
    if isinstance(tokenizer, Extended) and tokenizer.template is not None:
        write_text(output / CHAT_TEMPLATE, tokenizer.template)
    elif (folder / CHAT_TEMPLATE).is_file():
        shutil.copyfile(folder / CHAT_TEMPLATE, output / CHAT_TEMPLATE)
    differing = differing_texts(tokenizer, output / "tokenizer.json")
    if differing:
        raise ConversionError(f"tokenizer.json gives other ids for {len(differing)} test strings, among them {differing[0]!r}")
    notes.append("the name of a special token, written in a text, becomes that token: megagpt keeps it as text")
    return notes


def _add_special(value: dict[str, Any], tokenizer: Extended) -> None:
    """Put the special tokens of an extended tokenizer into a tokenizer.json, under their ids."""
    known = {token["id"] for token in value["added_tokens"]}
    new = {name: number for name, number in tokenizer.tokens.items() if number not in known}
    taken = sorted(set(new) & set(value["model"]["vocab"]))
    if taken:
        raise ConversionError(
            f"the special token {taken[0]!r} has the name of a piece of text: tokenizer.json cannot hold both"
        )
    value["model"]["vocab"] |= new  # an added token that the vocabulary lacks would get another id
    value["added_tokens"] += [_added(number, name) for name, number in new.items()]


def differing_texts(tokenizer: Tokenizer, path: Path) -> list[str]:
    """Test strings to which a tokenizer.json gives other ids than ours (special names in them read as text)."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(path))
    fast.encode_special_tokens = True
    texts = [text for text in (*HARD_TEXTS, *probe_texts()) if SPACE_MARK not in text]
    found = fast.encode_batch(texts, add_special_tokens=False)
    return [text for text, encoding in zip(texts, found, strict=True) if encoding.ids != tokenizer.encode(text)]


def sentencepiece_json(tokenizer: SentencePiece) -> tuple[dict[str, Any] | None, str]:
    """A SentencePiece BPE model as tokenizer.json; None and the reason if it cannot be one."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    model = protocol.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tokenizer.path.read_bytes())
    kinds = protocol.ModelProto.SentencePiece.Type  # pyright: ignore[reportAttributeAccessIssue]
    if model.trainer_spec.model_type != 2 or not model.trainer_spec.byte_fallback:
        return None, "only BPE with byte fallback has equal ids there"
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        return None, "the model rewrites text"
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece])):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    special, unknown = [], None
    for i, piece in enumerate(model.pieces):
        if piece.type == kinds.UNKNOWN:
            unknown = piece.piece
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED):
            special.append(_added(i, piece.piece, special=piece.type != kinds.USER_DEFINED))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    normalizers, decoders = [spaces], [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.dummy_prefix:
        normalizers = [{"type": "Prepend", "prepend": SPACE_MARK}, spaces]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **_frame(special),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**_bpe(ids, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }, ""


def byte_pairs_json(tokenizer: BytePairs) -> dict[str, Any]:
    """A byte-level BPE as tokenizer.json: the file itself if it was read from one."""
    if tokenizer.files[0].name == "tokenizer.json":
        return read_json(tokenizer.files[0])
    vocabulary = tokenizer.vocabulary
    merges = vocabulary.merges
    if merges is None:
        merges = [tuple(_as_text(part) for part in pair) for pair in recover_merges(vocabulary.ranks)]
    vocab = {_as_text(piece): rank for piece, rank in vocabulary.ranks.items()}
    unused = set(range(vocabulary.size)) - set(vocabulary.ranks.values())
    names = {tokenizer.eot_id: "<|endoftext|>"} | {i: name for name, i in vocabulary.reading.special.items()}
    special = {names.get(i, f"<|special_{i}|>"): i for i in sorted(unused)}
    return _byte_level_json(vocab, [list(pair) for pair in merges], special, vocabulary.pattern)


def recover_merges(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The merges of a rank file: a token's last two parts when its bytes are merged by lower ranks only."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [(ranks.get(left + right, rank), i) for i, (left, right) in enumerate(itertools.pairwise(parts))]
            lowest, i = min(pairs)
            if lowest >= rank:
                raise UserError(f"tokenizer: {token!r} (rank {rank}) is not made by merges of lower ranks")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


_BYTE_TO_TEXT = {value: character for character, value in byte_characters().items()}


def _as_text(piece: bytes) -> str:
    return "".join(_BYTE_TO_TEXT[value] for value in piece)


def _byte_level_json(vocab: dict[str, int], merges: list[Any], special: dict[str, int], pattern: str) -> dict[str, Any]:
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split: dict[str, Any] = bytes_step
    if pattern != GPT2_PATTERN:
        regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [regex, {**bytes_step, "use_regex": False}]}
    return {
        **_frame([_added(i, name) for name, i in special.items()]),
        "normalizer": None,
        "pre_tokenizer": split,
        "decoder": bytes_step,
        "model": _bpe(vocab | special, merges),  # an added token that the vocabulary lacks would get another id
    }


def _frame(added: list[dict[str, Any]]) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}


def _bpe(vocab: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    options = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **options, **flags, "vocab": vocab, "merges": merges}


def _added(i: int, name: str, *, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": name, **flags, "special": special}


def _begin_with(name: str, i: int) -> dict[str, Any]:
    first, text, pair = ({"SpecialToken": {"id": name, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB"))
    token = {"id": name, "ids": [i], "tokens": [name]}
    both = {"single": [first, text], "pair": [first, text, first, pair]}
    return {"type": "TemplateProcessing", **both, "special_tokens": {name: token}}


def _names(value: dict[str, Any]) -> dict[int, str]:
    """id -> name of every token in a tokenizer.json."""
    vocab = value["model"].get("vocab", {})
    names = {i: name for name, i in vocab.items()} if isinstance(vocab, dict) else {}
    return names | {token["id"]: token["content"] for token in value.get("added_tokens", [])}


def _special_ids(source: Path, tokenizer: Tokenizer, reference: Path) -> tuple[int | None, list[int]]:
    """(bos_id, eos_ids) as transformers would use them with the model in `source`."""
    settings = _optional_json(source / "tokenizer_config.json")
    config, value = _optional_json(source / "config.json"), _optional_json(reference)
    known = {name: i for i, name in _names(value).items()} if value else {}

    def id_of(role: str) -> int | None:
        token = settings.get(role)
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name in known:
            return known[name]
        if isinstance(name, str) and isinstance(tokenizer, SentencePiece | HuggingFaceTokenizer):
            return tokenizer.id_of(name)
        found = config.get(f"{role}_id")
        return found if isinstance(found, int) else None

    last = id_of("eos_token")
    eos_ids = [i for i in (last, *_listed_eos(source)) if isinstance(i, int) and 0 <= i < tokenizer.vocab_size]
    bos_id = id_of("bos_token") if _begins_texts(settings, value) else None
    return bos_id, list(dict.fromkeys(eos_ids)) or [tokenizer.eot_id]


def _listed_eos(source: Path) -> list[Any]:
    """The ids that end a generated text, as the model's settings list them."""
    config, generation = _optional_json(source / "config.json"), _optional_json(source / "generation_config.json")
    generated = generation.get("eos_token_id", config.get("eos_token_id"))
    return generated if isinstance(generated, list) else [generated]


def _added_special(source: Path, tokenizer: Tokenizer, reference: Path) -> dict[str, int]:
    """Special tokens of tokenizer.json that the model has rows for and the tokenizer's own file lacks, as those of chats."""
    rows = _optional_json(source / "config.json").get("vocab_size")
    added = _optional_json(reference).get("added_tokens") or []
    return {
        token["content"]: token["id"]
        for token in sorted(added, key=lambda token: token["id"])
        if token.get("special") and isinstance(rows, int) and tokenizer.vocab_size <= token["id"] < rows
    }


def _begins_texts(settings: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether the source's tokenizer puts its begin-of-text token before every text."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    if value:
        processor = value.get("post_processor") or {}
        steps = [processor, *processor.get("processors", [])]
        return any("SpecialToken" in next(iter(step.get("single") or [{}])) for step in steps)
    return str(settings.get("tokenizer_class", "")).startswith("Llama")


def _optional_json(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: a mapping is expected")
    return value
