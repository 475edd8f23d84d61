"""What every filter needs: a row in the table, in the documentation, and here a text it keeps and one it drops or rewrites."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import UserError, load, validate
from megagpt.corpus import filters
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.filters.registry import FILTERS, FilterConfig, build_filters
from megagpt.corpus.filters.spec import FilterSpec
from megagpt.corpus.text.fasttext_models import bundled_language_model
from megagpt.documents import Document, Rejected

PROSE = (
    "The harbour was quiet when the two sisters came down to the water with their baskets, and nobody spoke to them.\n"
    "They had walked since dawn along the cliff path, which the storms of that winter had broken in several places.\n"
    "A fisherman mending nets looked up, nodded, and went back to his work as though he had been expecting somebody else.\n"
    "Behind the church, on the hill, a bell began to ring for a wedding that would have to wait until the rain stopped.\n"
    "Margaret counted the coins in her pocket again; there were not enough of them to pay for both of their passages."
)
REWRITTEN: dict[str, tuple[str, str]] = {
    "personal_data": ("Write to jane@mail.example.org.", "Write to email@example.com."),
}
"""Filters that drop no document: a text, and what becomes of it."""
DROPPED: dict[str, tuple[str, str]] = {
    "url": ("https://xxx.example/", "url:word"),
    "language": ("Der Hafen lag still, als die beiden Schwestern mit ihren Körben ans Wasser hinunterkamen.", "language:other"),
    "clean": ("\u200b\x00", "clean:empty"),
    "min_length": ("Short.", "min_length:characters"),
    "gopher_repetition": ("The same line.\n" * 9, "gopher_repetition:duplicate_lines"),
    "gopher_quality": ("To be of use.", "gopher_quality:too_few_words"),
    "c4": (PROSE + "\nLorem ipsum dolor sit amet.", "c4:lorem_ipsum"),
    "fineweb": (PROSE.replace(".", ""), "fineweb:few_punctuated_lines"),
    "refinedweb": ("HOME\n12", "refinedweb:empty"),
    "bad_words": ("What a darn day it was.", "bad_words:listed"),
    "classifier": ("Der Hafen war still und niemand sprach mit ihnen.", "classifier:quality_score"),
    "contamination": ("This is the answer of the test that nobody ought to have seen before.", "contamination:answers.txt"),
}
"""Filters that keep PROSE: a text that they drop (of url: the address), and the reason."""


def settings(name: str, folder: Path) -> dict[str, Any]:
    """What a filter needs besides its defaults."""
    (folder / "words.txt").write_text("darn\n")
    (folder / "answers.txt").write_text("This is the answer of the test that nobody ought to have seen before.\n")
    needed: dict[str, dict[str, Any]] = {
        "bad_words": {"files": {"en": str(folder / "words.txt")}},
        "classifier": {"model": str(bundled_language_model()), "label": "en", "min_score": 0.5},
        "contamination": {"files": [str(folder / "answers.txt")]},
    }
    return needed.get(name, {})


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_has_a_text_that_it_keeps_and_one_that_it_drops(name: str, tmp_path: Path) -> None:
    assert name in REWRITTEN or name in DROPPED, f"{Path(__file__).name}: no text that the filter {name} drops or rewrites"
    config = validate(FilterConfig, {"order": [name], name: settings(name, tmp_path)}, source="test")
    (apply,) = build_filters(config)
    text, expected = REWRITTEN.get(name) or DROPPED[name]
    kept = apply(Document("f:0", PROSE, "test", "https://good.example/"))
    assert isinstance(kept, Document), name
    assert kept.text == PROSE
    outcome = apply(Document("f:0", text, "test", text if name == "url" else None))
    assert (outcome.reason if isinstance(outcome, Rejected) else outcome.text) == expected


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_documented(name: str, project: Path) -> None:
    page = (project / "docs" / "filters.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| `{name}` \| \S.* \|$", page, re.MULTILINE), f"docs/filters.md: no row for the filter {name}"


def test_every_filter_of_the_folder_is_in_the_table() -> None:
    for found in pkgutil.iter_modules(filters.__path__):
        module = importlib.import_module(f"{filters.__name__}.{found.name}")
        for name, value in vars(module).items():
            if isinstance(value, FilterSpec):
                in_table = value in FILTERS.values()
                assert in_table, f"registry.py: FILTERS has no row for {name} of {found.name}.py"


@pytest.mark.parametrize("name", FILTERS)
def test_what_a_filter_says_of_its_thresholds_names_thresholds(name: str) -> None:
    spec = FILTERS[name]
    assert {*spec.word_lists, *spec.spaced_only, *spec.punctuated_only} <= {*spec.config_class.model_fields}


@pytest.mark.parametrize("name", FILTERS)
def test_every_section_is_read_and_explained(name: str) -> None:
    words = ["work_dir=w", f"filter.order=[{name}]", f"filter.{name}.no_such=1"]
    with pytest.raises(UserError, match=rf"filter\.{name}\.no_such: no such field"):
        load(CorpusConfig, words)
    config = load(CorpusConfig, words[:2]).filter
    assert config.section(FILTERS[name].config_class) == FILTERS[name].config_class()


def test_an_unknown_filter_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"filter\.order\.0='gophre': input should be 'url', 'language',"):
        load(CorpusConfig, ["work_dir=w", "filter.order=[gophre]"])
