"""Configuration: one YAML file and key=value words, checked by pydantic before any work, frozen afterwards."""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError, model_validator

from megagpt.settings_fields import RENAMED
from megagpt.shipped import config_files, find_config, near_configs
from megagpt.strict_yaml import MAX_CHARACTERS, YamlError, parse_yaml

log = logging.getLogger(__name__)


class UserError(Exception):
    """A mistake of the user's: a file, a field or a value that breaks a rule. Tools print it and end with status 2."""


class Failure(Exception):  # noqa: N818 (it is what happened, an error is a program's)
    """Something outside the settings broke: a damaged or full disk, a lost peer. Tools print it and end with status 1."""


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, the docstring below a field is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_names(cls, values: Any) -> Any:
        """Settings under the names of earlier releases (settings_fields.RENAMED), with a warning for each name."""
        if not isinstance(values, Mapping):
            return values
        for name, earlier in RENAMED.get(cls.__name__, {}).items():
            if earlier in values:
                if name in values:
                    raise ValueError(f"{earlier} is the earlier name of {name}: only one of them can be set")
                values = {name if key == earlier else key: value for key, value in values.items()}
                _warn_renamed(earlier, name)
        return values


@cache
def _warn_renamed(earlier: str, name: str) -> None:
    """Warn of one name once per process."""
    log.warning("the setting %s is now called %s; the earlier name is still read", earlier, name)


LONGEST_SHOWN = 300
"""Characters of a value that a message shows."""

LONGEST_NAME = 255
"""Bytes of a file's name on Linux: longer words are no file in the folder."""

C = TypeVar("C", bound=Config)


def load(config_class: type[C], words: Sequence[str]) -> C:
    """Read a configuration from command-line words: at most one YAML file, then `key=value` (dots reach into sections).

    The file is a path or the name of a configuration that ships with the package (`gpt_124m`; a local file of that name wins).
    A word that holds `=` is the file if it does not begin with a setting's name and is a path. Values are YAML, except that a
    text field takes what is not in quotes as it stands (null, where it may be null). A word that sets another `kind` of a
    section drops what the file says there and the new kind does not have. Of two words for one setting the later counts, with
    a warning. Raises UserError that lists every wrong field at
    once, and where they came from: the file, the command line or both.
    """
    files = [word for word in words if _is_file(config_class, word)]
    if len(files) > 1:
        raise UserError(f"one configuration file is expected, {len(files)} were given: {' '.join(files)}")
    path = _config_file(files[0]) if files else None
    values = read_yaml(path) if path else {}
    given: dict[str, str] = {}
    for word in words:
        if word not in files:
            key, _, text = word.partition("=")
            key = _drop_earlier_name(config_class, values, key)
            for lost in [name for name in given if f"{name}.".startswith(f"{key}.")]:
                log.warning("command line: %s has no effect: %s comes later", _quoted(given.pop(lost)), _quoted(word))
            given[key] = word
            _assign(values, key, _parse_value(config_class, key, text))
            _follow_kind(config_class, values, key)
    return validate(config_class, values, source=str(path) if path else "command line", given=given if path else ())


def _is_file(config_class: type[Config], word: str) -> bool:
    """Whether a word of the command line is the configuration file: `runs/lr=0.1/a.yaml` is, `run_dir=runs/a` is not."""
    key, equals, _ = word.partition("=")
    if not equals or key.split(".")[0] in config_class.model_fields:
        return not equals
    return "/" in key or (len(word.encode(errors="replace")) <= LONGEST_NAME and Path(word).is_file())


def _config_file(word: str) -> Path:
    """The file that a word means. Raises UserError with the names that are like it if there is none."""
    path = find_config(word)
    if path is None and (near := near_configs(word)):
        raise UserError(f"{_quoted(word)[1:-1]}: no such configuration file (did you mean {' or '.join(near)}?)")
    if path is None and "/" not in word and not word.endswith((".yaml", ".yml")):
        raise UserError(f"{_quoted(word)[1:-1]}: no such configuration file; those that ship: {', '.join(config_files())}")
    return path or Path(word)


def validate(config_class: type[C], values: dict[str, Any], *, source: str, given: Iterable[str] = ()) -> C:
    """Check `values` against `config_class`; raises UserError naming `source`, each field, its value and the rule.

    given: dotted fields whose values are the command line's; a message about them names it too.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [_explain(config_class, item) for item in error.errors()]
        found = {_origin(config_class, item, source, given) for item in error.errors()}
        source = found.pop() if len(found) == 1 else f"{source} and the command line"
        raise UserError("\n  ".join([f"{source}:", *lines] if len(lines) > 1 else [f"{source}: {lines[0]}"])) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if it is missing, unreadable, or not a mapping."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        values = parse_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the configuration file: {error}") from None
    except YamlError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration file holds `key: value` lines, this one holds a {type(values).__name__}")
    return values


def dump(config: Config) -> str:
    """The resolved configuration as YAML, defaults included; `load` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def describe(config_class: type[Config], prefix: str = "") -> list[tuple[str, str, str]]:
    """One (name, default, help) row per field, sections opened, for `--help`.

    A section that the user names is `NAME`. In a section of several kinds a row says which kinds have the field, if not all
    have it with the same default and text.
    """
    rows = []
    for name, field in config_class.model_fields.items():
        sections, text = section_classes(field.annotation), " ".join((field.description or "").split())
        if not sections or field.default is None:
            default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
            rows.append((prefix + name, default, text))
        rows += _describe_sections(sections, _default_kind(field), f"{prefix}{name}.")
        if get_origin(field.annotation) is dict:
            inner = get_args(field.annotation)[1]
            rows += _describe_sections(section_classes(inner), _default_kind(inner), f"{prefix}{name}.NAME.")
    return rows


def _describe_sections(sections: Sequence[type[Config]], default_kind: str | None, prefix: str) -> list[tuple[str, str, str]]:
    kinds_of_row: dict[tuple[str, str, str], list[str]] = {}
    for section in sections:
        for row in describe(section, prefix):
            if len(sections) > 1 and row[0] == f"{prefix}kind":
                row = (row[0], default_kind or "required", row[2])
            kinds_of_row.setdefault(row, []).append(kind_of(section))
    in_all = len(sections)
    return [
        (name, default, text if len(kinds) == in_all else f"(kind={' or '.join(kinds)}) {text}")
        for (name, default, text), kinds in kinds_of_row.items()
    ]


def kind_of(section: type[Config]) -> str:
    """What `kind` is in a section of this class; empty for a section that has no kinds."""
    field = section.model_fields.get("kind")
    values = get_args(field.annotation) if field is not None else ()
    return str(values[0]) if values else ""


def _default_kind(field: Any) -> str | None:
    """The kind of a section that names none, from `by_kind` in a field or an annotation."""
    annotation = getattr(field, "annotation", field)
    found = [getattr(field, "discriminator", None), *getattr(field, "metadata", ())]
    for candidate in (annotation, *get_args(annotation)):
        found += candidate.__metadata__ if get_origin(candidate) is Annotated else ()
    callables = [item.discriminator for item in found if isinstance(item, Discriminator)]
    return callables[0]({}) if callables and callable(callables[0]) else None  # type: ignore[return-value]


def by_kind(default: str) -> Discriminator:
    """For a section that is one of several Config classes, told apart by their field `kind`, which may be left out."""
    return Discriminator(
        lambda value: (value.get("kind") or default) if isinstance(value, dict) else getattr(value, "kind", default)
    )


def _parse_value(config_class: type[Config], key: str, text: str) -> Any:
    annotation = _annotation(config_class, key)
    is_text = annotation in (str, str | None)
    if is_text and text[:1] not in ("'", '"') and (annotation is str or text not in ("null", "Null", "NULL", "~")):
        return text
    try:
        return parse_yaml(text)
    except YamlError as error:
        if is_text:
            return text
        raise UserError(f"command line: {key}={_quoted(text)} is not valid YAML (quote it?): {error}") from None


def _annotation(config_class: type[Config], key: str) -> Any:
    """The type of a dotted field, None if there is no such field."""
    classes, annotation = [config_class], None
    for part in key.split("."):
        fields = [section.model_fields[part] for section in classes if part in section.model_fields]
        annotation = fields[0].annotation if fields else None
        classes = [found for field in fields for found in section_classes(field.annotation)]
    return annotation


def _drop_earlier_name(config_class: type[Config], values: dict[str, Any], key: str) -> str:
    """Today's name of a dotted field of the command line; what a file says under its earlier name is removed from `values`."""
    section, _, last = key.rpartition(".")
    classes = section_classes(_annotation(config_class, section)) if section else [config_class]
    for name, earlier in (pair for found in classes for pair in RENAMED.get(found.__name__, {}).items()):
        if last in (name, earlier):
            for part in section.split(".") if section else ():
                values = values.get(part) or {}
                if not isinstance(values, dict):
                    return key
            if values.pop(earlier, None) is not None or last == earlier:
                _warn_renamed(earlier, name)
            return f"{section}.{name}".lstrip(".")
    return key


def _follow_kind(config_class: type[Config], values: dict[str, Any], key: str) -> None:
    section, _, last = key.rpartition(".")
    classes = section_classes(_annotation(config_class, section)) if last == "kind" else []
    if len(classes) > 1:
        for part in section.split("."):
            values = values[part]
        allowed = {name for found in classes if kind_of(found) == values["kind"] for name in found.model_fields}
        for name in set(values) - allowed if allowed else ():
            del values[name]


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"command line: {key}: {section!r} is a value in the file, not a section")
    values[last] = value


def _explain(config_class: type[Config], item: Any) -> str:
    name = ".".join(_without_kinds(config_class, [str(part) for part in item["loc"]]))
    if item["type"] == "extra_forbidden":
        names = [row[0] for row in describe(config_class)]
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        if name in names:
            return f"{name}: no such field for the kind that is set"
        return f"{name}: no such field" + (f" (did you mean {close[0]}?)" if close else "")
    if item["type"] == "missing":
        return f"{name}: required, and not given"
    if item["type"] == "model_type":
        classes = section_classes(_annotation(config_class, name))
        kinds = [kind_of(found) for found in classes if "kind" in found.model_fields]
        wanted = f"{name}.kind={item['input']}" if item["input"] in kinds else f"{name}.FIELD=..."
        return f"{name}={_show(item['input'])}: a section is expected: leave it out for its defaults, or set {wanted}"
    if item["type"] == "union_tag_invalid":
        return f"{name}.kind={_quoted(item['ctx']['tag'])}: one of {item['ctx']['expected_tags']} is expected"
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if item["msg"].startswith("Input") else message
    if item["type"] == "value_error" and isinstance(item["input"], dict):
        return f"{name}: {message}" if name else message
    return f"{name}={_quoted(item['input'])}: {message}"


def _origin(config_class: type[Config], item: Any, source: str, given: Iterable[str]) -> str:
    """Where an error's values are from: the source, the command line, or both, for a rule that ties several fields."""
    name = ".".join(_without_kinds(config_class, [str(part) for part in item["loc"]]))
    if any(f"{name}.".startswith(f"{key}.") for key in given):
        return "command line"
    typed = {end for key in given if not name or key.startswith(f"{name}.") for end in _endings(key)}
    words = [re.split(r"[^\w.]+", part) for part in item["msg"].split("=")]
    if not typed.intersection(word.strip(".") for part in words for word in part):
        return source
    fields = {part[-1] for part in words[:-1]} - {""}  # what stands before a `=`
    return "command line" if fields and fields <= typed else f"{source} and the command line"


def _endings(key: str) -> list[str]:
    """The ways in which a rule may name a dotted field: in full, and without the sections that lead to it."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _without_kinds(config_class: type[Config], path: list[str]) -> list[str]:
    """An error's path without the names of kinds, which pydantic puts between a section and its field."""
    result, classes = [], [config_class]
    for part in path:
        if len(classes) > 1:
            classes = [c for c in classes if kind_of(c) == part] or classes
            if len(classes) == 1:
                continue
        field = classes[0].model_fields.get(part) if classes else None
        classes = section_classes(field.annotation) if field else []
        result.append(part)
    return result


def section_classes(annotation: Any) -> list[type[Config]]:
    """The Config classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        found = [section for candidate in get_args(annotation) for section in section_classes(candidate)]
        return list(dict.fromkeys(found))
    return []


def _show(value: Any) -> str:
    """A value in one short line."""
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"


def _quoted(value: Any) -> str:
    """`repr` of a value in one short line: control and formatting characters are escaped by it."""
    if isinstance(value, str) and len(value) <= LONGEST_SHOWN:
        return repr(value)
    return repr(_show(value)) if isinstance(value, str) else _show(value)
