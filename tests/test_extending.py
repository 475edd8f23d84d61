"""docs/extending.md names files, tables and functions that there are, and contributors find it."""

import re
from pathlib import Path

PLACES = {
    "megagpt/corpus/filters/registry.py": ["FILTERS"],
    "tests/corpus/filters/test_registry.py": ["DROPPED", "REWRITTEN", "settings"],
    "megagpt/settings_fields.py": ["LATER", "RENAMED"],
    "megagpt/engine/optim.py": ["OPTIMIZERS"],
    "tests/support/toy.py": ["OPTIMIZERS"],
    "tests/engine/test_optim.py": ["REFUSED"],
    "megagpt/corpus/readers/config.py": ["SourceFormat"],
    "megagpt/corpus/readers/inputs.py": ["FORMATS", "_ranges"],
    "megagpt/corpus/extraction/extract_documents.py": ["read_outcomes"],
    "tests/corpus/readers/test_formats.py": ["EXAMPLES"],
    "tests/monitor/test_documented_metrics.py": ["ADDED"],
    "megagpt/monitor/metrics.py": ["EVENTS"],
    "tests/test_tools_and_configs.py": ["BAD_INPUT"],
}
"""File -> the names in it that the page sends contributors to."""


def test_the_page_sends_contributors_to_places_that_there_are(project: Path) -> None:
    page = (project / "docs" / "extending.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([\w/.]+/[\w/.]*)`", page) if "NAME" not in path}
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (project / path).exists()] == []
    for path, names in PLACES.items():
        source = (project / path).read_text(encoding="utf-8")
        for name in names:
            assert path in paths, f"docs/extending.md no longer names {path}"
            assert f"`{name}`" in page, f"docs/extending.md no longer names {name} of {path}"
            assert re.search(rf"^(def )?{name}\b", source, re.MULTILINE), f"{path} has no {name}, which docs/extending.md names"


def test_contributors_find_the_page(project: Path) -> None:
    for name in ("CONTRIBUTING.md", "docs/architecture.md"):
        assert "extending.md)" in (project / name).read_text(encoding="utf-8"), f"{name}: no link to docs/extending.md"
