"""Settings as results record them: hashed over the fields of their time, stored in full, compared field by field.

How it works. A release adds a field, and the results that were made before lack it. settings_fields.LATER declares the value
that they were made with; an undeclared field counts with its default. Two rules follow:
- `recorded`, over which hashes are taken, leaves a later field out while it has that value: a new field changes no hash;
- `filled` gives stored settings, of any age, the fields they lack: old and new settings can be compared and validated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic_core import to_jsonable_python

from megagpt.config import Config, UserError, kind_of, section_classes, validate
from megagpt.settings_fields import FIELDS, LATER, RENAMED

C = TypeVar("C", bound=Config)

_NEVER = object()
"""The value before its time of a field that has none: whatever it is set to is recorded."""


def fingerprint(config: Config) -> str:
    """sha256 (hex) of the resolved settings: equal for equal settings, whatever file or release they came from."""
    return hash_of(recorded(config))


def hash_of(settings: Mapping[str, Any]) -> str:
    """sha256 (hex) of settings as `recorded` gives them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def recorded(config: Config) -> dict[str, Any]:
    """The settings as JSON, under their first names, without later fields that have the value of before their time."""
    return _recorded(config, config.model_dump(mode="json"))


def first_defaults(config_class: type[Config]) -> dict[str, Any]:
    """What `recorded` gave for a section without settings in release 0.1; {} for a section that there was not."""
    defaults = {}
    for name, default in FIELDS.get(config_class.__name__, {}).items():
        today = next((new for new, old in RENAMED.get(config_class.__name__, {}).items() if old == name), name)
        sections = section_classes(config_class.model_fields[today].annotation)
        defaults[name] = first_defaults(sections[0]) if default is ... else default
    return defaults


def filled(config_class: type[Config], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings under today's names, with the fields they lack. Fields that there are no longer stay as they are."""
    rest, result = dict(stored), {}
    for name, spec in config_class.model_fields.items():
        value = rest.pop(name, rest.pop(_first_name(config_class, name), _NEVER))
        value = _value_before(config_class, name) if value is _NEVER else value
        if value is not _NEVER:
            result[name] = _filled(spec.annotation, value)
    return {**result, **rest}


def read_settings(config_class: type[C], stored: Mapping[str, Any], *, source: str) -> C:
    """Stored settings of any age as an object. Raises UserError naming `source`, field, value and rule."""
    return validate(config_class, filled(config_class, stored), source=source)


def difference(before: Any, now: Any, prefix: str = "") -> str:
    """`name: old -> new` of everything that differs in two JSON values, "" if nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [difference(before.get(key), now.get(key), f"{prefix}.{key}".lstrip(".")) for key in sorted({**before, **now})]
        return ", ".join(part for part in parts if part)
    return "" if before == now else f"{prefix}: {before} -> {now}".removeprefix(": ")


@dataclass(frozen=True, slots=True)
class MadeWith:
    """What a stage makes its results with. It is kept beside them, so that a later start can say what differs."""

    config_hash: str
    section: str = ""
    """Of the corpus's settings; it begins the names in messages."""
    settings: Config | None = None
    """Those that shape the results."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files that the settings name."""
    format: int = 1
    """Version of the stage: of its files, and of what it does with a document."""

    def to_json(self) -> dict[str, Any]:
        """What is kept."""
        settings = None if self.settings is None else self.settings.model_dump(mode="json")
        return {"config_hash": self.config_hash, "format": self.format, "settings": settings, "contents": dict(self.contents)}

    def other(self, found: Mapping[str, Any]) -> str:
        """What else results were made with, of which `found` was kept: `other settings (section.field: old -> new)`."""
        if found.get("settings") is None or self.settings is None:
            return "other settings or inputs (an earlier release made it, and kept only a hash of them)"
        before = {self.section: filled(type(self.settings), found["settings"]), **found.get("contents", {})}
        differs = difference(before, {self.section: self.settings.model_dump(mode="json"), **self.contents})
        return f"other settings ({differs})" if differs else "other inputs"

    def keeps(self, marker: Path, *, finished: bool, overwrite: bool = False) -> bool:
        """Whether the folder of `marker` holds finished results of an earlier format, which stay as they are.

        Raises UserError if they are unfinished (unless `overwrite`), or of a later format than this release knows.
        """
        format = self._format_of(marker)
        if format > self.format and not overwrite:
            raise UserError(f"{marker}: format {format} is of a later release; this one knows formats up to {self.format}")
        if format < self.format and not finished and not overwrite:
            raise UserError(
                f"{marker.parent}: unfinished, and begun in format {format}, while this release writes format {self.format}: "
                "finish it with the release that began it, or set overwrite=true to make all of it again"
            )
        return format < self.format and finished

    def fits(self, marker: Path, *, finished: bool) -> bool:
        """Whether the results in the folder of `marker` may stay: they have this format, or an earlier one and are finished."""
        format = self._format_of(marker)
        return format == self.format or (format < self.format and finished)

    def _format_of(self, marker: Path) -> int:
        return json.loads(marker.read_text(encoding="utf-8")).get("format", 1) if marker.is_file() else self.format


def _recorded(value: Any, dumped: Any) -> Any:
    if isinstance(value, Config):
        found = {}
        for name in type(value).model_fields:
            item = _recorded(getattr(value, name), dumped[name])
            if not _is_later(type(value), name) or item != _value_before(type(value), name):
                found[_first_name(type(value), name)] = item
        return found
    if isinstance(value, Mapping):
        return {key: _recorded(item, text) for item, (key, text) in zip(value.values(), dumped.items(), strict=True)}
    if isinstance(value, list | tuple):
        return [_recorded(item, text) for item, text in zip(value, dumped, strict=True)]
    return dumped


def _filled(annotation: Any, value: Any) -> Any:
    sections = section_classes(annotation)
    if sections and isinstance(value, Mapping):
        kinds = {kind_of(section): section for section in sections}
        return filled(kinds.get(str(value.get("kind")), sections[0]), value)
    if get_origin(annotation) is dict and isinstance(value, Mapping):
        return {key: _filled(get_args(annotation)[1], item) for key, item in value.items()}
    if get_origin(annotation) is tuple and isinstance(value, list):
        return [_filled(get_args(annotation)[0], item) for item in value]
    return value


def _value_before(config_class: type[Config], name: str) -> Any:
    """What results made before there was a field had for it, as JSON; _NEVER for a field without a default."""
    if name in LATER.get(config_class.__name__, {}):
        return LATER[config_class.__name__][name]
    spec = config_class.model_fields[name]
    default = _NEVER if spec.is_required() else spec.get_default(call_default_factory=True)
    return default if default is _NEVER else _recorded(default, to_jsonable_python(default))


def _is_later(config_class: type[Config], name: str) -> bool:
    return _first_name(config_class, name) not in FIELDS.get(config_class.__name__, {})


def _first_name(config_class: type[Config], name: str) -> str:
    return RENAMED.get(config_class.__name__, {}).get(name, name)
