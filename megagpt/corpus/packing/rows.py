"""Rows of fine-tuning data: local files of JSON lines (or .tsv of text and label) to messages; what is wrong with a row.

Each row becomes a Document whose `meta["messages"]` are the messages, so that it is split and compared as any document is.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from megagpt.config import UserError
from megagpt.corpus.packing.config import SupervisedConfig
from megagpt.documents import Document, open_lines, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = {
    "prompt_completion": ("prompt", "completion"),
    "dialogue_summary": ("dialogue", "summary"),
    "question_answer": ("question", "answer"),
    "text_label": ("text", "label"),
}
"""Format -> (field of the prompt, field of the answer)."""
PROMPTS = {"dialogue_summary": "Summarize this dialogue.\n\n{dialogue}"}
"""Format -> prompt, where it is not the field alone."""

Report: TypeAlias = Callable[[int, str, str], None]
"""(line from 1, kind, what is wrong)"""


class RowError(ValueError):
    """What is wrong with a row: its kind, by which such rows are counted, and a sentence."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_rows(path: Path, config: SupervisedConfig, report: Report) -> Iterator[Document]:
    """The rows of a file; those that are malformed are reported instead. Empty lines are none."""
    name = path.name
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    source, tabs = name.rpartition(".")[0] or name, name.endswith(".tsv")
    with open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                messages = _messages(_fields_of_tsv(line) if tabs else _value(line), config)
            except RowError as error:
                report(number, error.kind, str(error))
                continue
            text = "\n".join(message["content"] for message in messages)
            yield Document(f"{path.name}:{number}", text, source, meta={"messages": messages, "line": number})


def _value(line: bytes) -> Mapping[str, Any]:
    try:
        value = parse_json(line)
    except orjson.JSONDecodeError as error:
        raise RowError("not_json", f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise RowError("not_json", f"a {type(value).__name__}, a JSON object is expected")
    return value


def _fields_of_tsv(line: bytes) -> Mapping[str, Any]:
    try:
        columns = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise RowError("not_text", f"not UTF-8 ({error.reason})") from None
    if len(columns) != 2:
        raise RowError("fields", f"{len(columns)} columns, text and label are expected")
    return {"text": columns[0], "label": columns[1]}


def _messages(value: Mapping[str, Any], config: SupervisedConfig) -> list[dict[str, str]]:
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    if config.format == "chat":
        return [*system, *_chat(value)]
    asked, answered = FIELDS[config.format]
    answer = _text(value, answered, numbers=config.format == "text_label")
    prompt = _text(value, asked)
    if not prompt.strip():
        raise RowError("empty_prompt", f"{asked} is empty")
    if config.labels:
        if answer not in config.labels:
            raise RowError("label", f"{answered}={answer!r} is none of {sorted(config.labels)}")
        answer = config.labels[answer]
    elif config.classes and answer not in config.classes:
        raise RowError("label", f"{answered}={answer!r} is none of {list(config.classes)}")
    if not answer.strip():
        raise RowError("empty_answer", f"{answered} is empty")
    template = config.prompt or PROMPTS.get(config.format, f"{{{asked}}}")
    question = template.replace(f"{{{asked}}}", prompt)
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chat(value: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RowError("fields", "messages: a list of objects with role and content is expected")
    if not any(message.get("role") == "assistant" for message in messages):
        raise RowError("empty_answer", "no message of the assistant")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RowError("role", f"messages[{number}].role={role!r}: one of {', '.join(ROLES)} is expected")
        if not isinstance(content, str):
            raise RowError("fields", f"messages[{number}].content: text is expected, not {type(content).__name__}")
        if role == "assistant" and not content.strip():
            raise RowError("empty_answer", f"messages[{number}]: the answer is empty")
        yield {"role": role, "content": content}


def _text(value: Mapping[str, Any], field: str, *, numbers: bool = False) -> str:
    if field not in value:
        raise RowError("fields", f"the field {field} is missing; there are {', '.join(sorted(map(str, value))) or 'none'}")
    found = value[field]
    if numbers and type(found) is int:
        return str(found)
    if not isinstance(found, str):
        raise RowError("fields", f"{field}: text is expected, not {type(found).__name__}")
    return found


def refuse_too_many(malformed: list[dict[str, Any]], config: SupervisedConfig) -> None:
    """Raise UserError naming the first malformed rows by file and line if there are more than the limit."""
    if len(malformed) > config.max_malformed:
        lines = [f"{row['file']}: line {row['line']}: {row['kind']}: {row['problem']}" for row in malformed[:5]]
        limit = f"tokenize.supervised.max_malformed={config.max_malformed}: {len(malformed)} malformed rows or more"
        raise UserError("\n  ".join([f"{limit}, the first ones are", *lines]))
