"""Filters: for each a text it keeps, one it drops, and the reason; n-gram counts against an obvious version; the stage."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from megagpt.config import UserError
from megagpt.corpus.filters.classifier import ClassifierConfig, classifier
from megagpt.corpus.filters.filter_documents import filter_documents, made_with
from megagpt.corpus.filters.registry import FILTERS, FilterConfig, apply_filters, build_filters, rules_passed
from megagpt.corpus.filters.score_quantile import score_of_top
from megagpt.corpus.filters.spec import Filter
from megagpt.corpus.filters.url import UrlConfig, UrlLists, url
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.text.fasttext_models import bundled_language_model, load_classifier, load_language_model
from megagpt.corpus.text.words import (
    DEFAULT_SPLITTER,
    Analysis,
    Splitter,
    _word,
    count_duplicates,
    count_repeated_n_grams,
    number_split_words,
    number_words,
    split_sentences,
    split_words,
)
from megagpt.documents import Document, Rejected, read_documents, write_documents

PROSE = (
    "The harbour was quiet when the two sisters came down to the water with their baskets, and nobody spoke to them.\n"
    "They had walked since dawn along the cliff path, which the storms of that winter had broken in several places.\n"
    "A fisherman mending nets looked up, nodded, and went back to his work as though he had been expecting somebody else.\n"
    "Behind the church, on the hill, a bell began to ring for a wedding that would have to wait until the rain stopped.\n"
    "Margaret counted the coins in her pocket again; there were not enough of them to pay for both of their passages.\n"
    "It was a small boat, old but dry, and its owner asked them only where they came from and where they hoped to sleep."
)


def document(text: str, **meta: object) -> Document:
    return Document("file:0", text, "test", meta=dict(meta))


def reason(outcome: Document | Rejected) -> str:
    return outcome.reason if isinstance(outcome, Rejected) else "kept"


def rule(name: str, splitter: Splitter = DEFAULT_SPLITTER, **thresholds: object) -> Filter:
    """A filter with its defaults but for these thresholds."""
    spec = FILTERS[name]
    return spec.bind(spec.config_class(**thresholds), splitter)


@pytest.mark.parametrize(
    "name",
    ["gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb", "min_length", "personal_data", "clean"],
)
def test_prose_passes_every_rule_unchanged(name: str) -> None:
    assert rule(name)(document(PROSE)) == document(PROSE)


LINES = PROSE.split("\n")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gopher_repetition", "", "empty"),
        ("gopher_repetition", "\n".join(LINES[:2] + LINES[:1] * 2), "duplicate_lines"),
        ("gopher_repetition", "\n\n".join(LINES[:2] + LINES[:1] * 2), "duplicate_paragraphs"),
        ("gopher_repetition", "\n".join([*LINES[:3], "a", "b", LINES[0]]), "duplicate_line_chars"),
        ("gopher_repetition", "\n\n".join([*LINES[:3], "a", "b", LINES[0]]), "duplicate_paragraph_chars"),
        ("gopher_repetition", " ".join(f"very tall w{i}" for i in range(40)), "top_2_gram"),
        (
            "gopher_repetition",
            " ".join(f"more than once but{i} word{i} number{i} is{i} other{i} here{i}" for i in range(60)),
            "top_3_gram",
        ),
        (
            "gopher_repetition",
            PROSE + " " + " ".join(LINES[0].split()[:19]) + " end " + " ".join(LINES[1].split()[:17]),
            "duplicate_5_grams",
        ),
        ("gopher_quality", "Too short to be of use to the reader of it.", "too_few_words"),
        ("gopher_quality", "I am at it to be of a no. " * 20, "words_too_short"),
        ("gopher_quality", "Donaudampfschifffahrtsgesellschaft Kapitänsmützenabzeichen " * 30, "words_too_long"),
        ("gopher_quality", PROSE.replace(" the ", " #the "), "kept"),
        ("gopher_quality", PROSE.replace(" ", " # "), "too_many_hashes"),
        ("gopher_quality", PROSE.replace(" ", " ... "), "too_many_ellipses"),
        ("gopher_quality", "\n".join("- " + line for line in LINES), "too_many_bullet_lines"),
        ("gopher_quality", "\n".join(line + "..." for line in LINES), "too_many_ellipsis_lines"),
        ("gopher_quality", PROSE.replace(" ", " 1234 "), "too_few_alphabetic_words"),
        ("gopher_quality", re.sub(r"\b(the|to|of|and|that|have|with|be)\b", "foo", PROSE), "too_few_stop_words"),
        ("c4", PROSE + "\nlorem ipsum dolor sit amet.", "lorem_ipsum"),
        ("c4", PROSE + "\nfunction f() { return 1; }.", "curly_bracket"),
        ("c4", "\n".join(LINES[:2]), "too_few_sentences"),
        ("fineweb", " \n ", "empty"),
        ("fineweb", PROSE.replace(".", ""), "few_punctuated_lines"),
        ("fineweb", "\n".join([*LINES[:2], *(f"Menu entry {i}." for i in range(6))]), "short_lines"),
        ("fineweb", "\n".join([*LINES, LINES[0]]), "duplicate_line_chars"),
        ("fineweb", "\n".join(f"Extraordinarilylongwords{i}everywhere." for i in range(9)), "list_like"),
        ("refinedweb", PROSE + "\nHOME\nABOUT US AND ALL OUR FINE PRODUCTS\n3 likes", "too_many_words_removed"),
        ("refinedweb", "HOME\n12", "empty"),
        ("min_length", "Short.", "characters"),
    ],
)
def test_reasons(name: str, text: str, expected: str) -> None:
    assert reason(rule(name)(document(text))) == (expected if expected == "kept" else f"{name}:{expected}")


def test_c4_drops_lines_and_citations() -> None:
    dropped = [
        "Please enable JavaScript to see this page.",
        "We use cookies on this site.",
        "Two words.",
        "No full stop here at all",
        "And so on...",
    ]
    text = "\n".join([*LINES[:3], *dropped, "As Smith wrote [12], it rained.[edit]", *LINES[3:]])
    outcome = rule("c4")(document(text))
    assert isinstance(outcome, Document)
    assert outcome.text.split("\n") == [*LINES[:3], "As Smith wrote , it rained.", *LINES[3:]]
    relaxed = rule("c4", keep_only_terminal_punctuation=False)(document(text))
    assert isinstance(relaxed, Document)
    assert "No full stop here at all" in relaxed.text
    assert "javascript" not in relaxed.text.lower()


def test_refinedweb_drops_lines() -> None:
    outcome = rule("refinedweb")(document(f"{PROSE}\n1.2K views\n\nHOME"))
    assert isinstance(outcome, Document)
    assert outcome.text == PROSE


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("gopher_repetition", "max_duplicate_lines"), ("gopher_quality", "min_words"), ("fineweb", "max_short_lines")],
)
def test_null_switches_a_rule_off(name: str, threshold: str) -> None:
    text = "To be of use.\nTo be of use.\nWith that, to be."
    before = reason(rule(name)(document(text)))
    assert before != "kept"
    assert reason(rule(name, **{threshold: None})(document(text))) != before


def test_languages_without_lists_pass_the_bound_rules_by_name() -> None:
    german = document(re.sub(r"\b(the|to|of|and|that|have|with|be)\b", "und", PROSE), language="de")
    assert reason(rule("gopher_quality")(german)) == "kept"
    assert "gopher_quality.min_stop_words" in rules_passed("de")
    assert "gopher_quality.min_words" not in rules_passed("de")
    assert "gopher_quality.min_words" in rules_passed("ja")
    assert rules_passed("en") == []
    japanese = document("昨日は雨が降りましたが、今日はよく晴れています。" * 3, language="ja")
    assert reason(rule("gopher_quality")(japanese)) == "kept"


LISTS = UrlLists(
    domains=frozenset({"bad.example"}),
    urls=frozenset({"http://ok.example/one"}),
    words=frozenset({"porn"}),
    soft_words=frozenset({"poker", "casino"}),
    substrings=re.compile("freecamz"),
)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "kept"),
        ("https://good.example/essex/poker-history", "kept"),
        ("https://notbad.example/", "kept"),
        ("https://bad.example/a", "url:domain"),
        ("http://www.BAD.example:8080/a", "url:domain"),
        ("http://ok.example/one", "url:address"),
        ("http://ok.example/Porn/1", "url:word"),
        ("http://poker.example/casino", "url:soft_words"),
        ("http://ok.example/free-cam.z", "url:substring"),
        ("http://[broken", "url:malformed"),
    ],
)
def test_url(address: str | None, expected: str) -> None:
    assert reason(url(Document("f:0", "text", "test", address), UrlConfig(), lists=LISTS)) == expected


def test_url_lists_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "domains").write_text("# comment\nspam.example\n\n")
    config = FilterConfig.model_validate({"order": ["url"], "url": {"domains": [str(tmp_path / "domains")]}})
    (apply,) = build_filters(config)
    assert reason(apply(Document("f:0", "t", "s", "http://a.spam.example/"))) == "url:domain"
    assert reason(apply(Document("f:0", "t", "s", "http://a.example/xxx"))) == "url:word"
    assert reason(apply(Document("f:0", "t", "s", "http://a.example/"))) == "kept"
    with pytest.raises(UserError, match=r"nowhere: cannot read this list"):
        build_filters(FilterConfig.model_validate({"order": ["url"], "url": {"domains": [str(tmp_path / "nowhere")]}}))


def test_language_with_the_bundled_model() -> None:
    (apply,) = build_filters(FilterConfig(order=("language",)))
    kept = apply(document(PROSE))
    assert isinstance(kept, Document)
    assert kept.meta["language"] == "en"
    assert kept.meta["language_score"] > 0.9
    german = (
        "Der Hafen lag still, als die beiden Schwestern mit ihren Körben ans Wasser hinunterkamen und niemand mit ihnen sprach."
    )
    assert reason(apply(document(german))) == "language:other"
    assert reason(apply(document("ok lol xD 123 zz"))) in ("language:unsure", "language:other")
    assert reason(apply(document(" \n "))) == "language:no_text"


@pytest.mark.realdata
def test_language_on_real_sentences(shared_data: Path) -> None:
    predict = load_language_model(bundled_language_model())
    for code, label in (("eng", "en"), ("deu", "de"), ("fra", "fr"), ("rus", "ru"), ("jpn", "ja"), ("hin", "hi")):
        sentences = (shared_data / "langid" / f"tatoeba.{code}.txt").read_text(encoding="utf-8").splitlines()
        chunks = [" ".join(sentences[i : i + 10]) for i in range(0, len(sentences), 10)]
        right = sum(predict(chunk)[0] == label for chunk in chunks)
        assert right >= 0.97 * len(chunks), (code, right, len(chunks))


def test_bad_words(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("darn\nheck of a mess\n")
    config = FilterConfig.model_validate({"order": ["bad_words"], "bad_words": {"files": {"en": str(tmp_path / "en")}}})
    (apply,) = build_filters(config)
    assert reason(apply(document("That is a Heck of a mess!"))) == "bad_words:listed"
    assert reason(apply(document("She was darning socks."))) == "kept"
    assert reason(apply(document("darn", language="fr"))) == "kept"


def test_classifier_notes_the_score_and_keeps_what_reaches_it() -> None:
    score = load_classifier(bundled_language_model(), "en")
    kept = classifier(document(PROSE), ClassifierConfig(min_score=0.5), score=score)
    assert isinstance(kept, Document)
    assert kept.meta["quality_score"] == pytest.approx(score(" ".join(PROSE.split())), abs=1e-5)
    dropped = classifier(
        document("Der Hafen war still und niemand sprach mit ihnen."), ClassifierConfig(min_score=0.5), score=score
    )
    assert reason(dropped) == "classifier:quality_score"
    with pytest.raises(UserError, match="has no label 'hq'"):
        load_classifier(bundled_language_model(), "hq")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to jane.doe+news@mail.example.co.uk, please.", "Write to email@example.com, please."),
        ("a@b and x @ y.com", "a@b and x @ y.com"),
        ("from 8.8.8.8 to 10.0.0.1 and 127.0.0.1", "from 22.214.171.124 to 10.0.0.1 and 127.0.0.1"),
        ("version 1.2.3.4.5 and 999.1.1.1", "version 1.2.3.4.5 and 999.1.1.1"),
    ],
)
def test_personal_data(text: str, expected: str) -> None:
    outcome = rule("personal_data")(document(text))
    assert isinstance(outcome, Document)
    assert outcome.text == expected


def test_masking_email_takes_linear_time_on_hostile_text() -> None:
    text = "a." * 100_000
    assert rule("personal_data")(document(text + "@")) == document(text + "@")


def slow_top(words: list[str], n: int) -> int | None:
    grams = Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams.most_common(1)[0][0]) * grams.most_common(1)[0][1] if grams else None


def slow_duplicates(words: list[str], n: int) -> int:
    seen: set[str] = set()
    characters = i = 0
    while i + n <= len(words):
        gram = "".join(words[i : i + n])
        characters += len(gram) if gram in seen else 0
        i += n if gram in seen else 1
        seen.add(gram)
    return characters


def test_n_gram_counts_equal_a_slow_version() -> None:
    random_words = random.Random(1)
    pool = ["a", "b", "ab", "ba", "aé", "𝒳", "c", "longer", "aa"]
    for _ in range(400):
        words = random_words.choices(pool[: random_words.randint(1, len(pool))], k=random_words.randint(0, 90))
        counts = count_repeated_n_grams("".join(words), *number_words(words))
        assert {n: counts.top.get(n) for n in (2, 3, 4)} == {n: slow_top(words, n) for n in (2, 3, 4)}
        assert counts.duplicate == {n: slow_duplicates(words, n) for n in range(5, 11)}


PIECES = [
    *"abAwW_..,,::;-=*#''’\"()/@019é…“”–٣\u0301 \n\u00a0\u2003",
    "www.",
    "http://",
    "n't",
    "U.S.",
    "...",
    "--",
    "1,2",
    "ab",
]


@pytest.mark.parametrize("seed", range(4))
def test_words_are_numbered_as_they_are_split(seed: int) -> None:
    pieces = random.Random(seed)
    for _ in range(3000):
        text = "".join(pieces.choices(PIECES, k=pieces.randint(0, 30)))
        (expected, first), (found, second) = number_words(split_words(text)), number_split_words(text)
        assert [found[i] for i in second] == [expected[i] for i in first], repr(text)
        assert len(found) == len(expected)
        assert "".join(text.split()) == "".join(split_words(text))


def test_a_splitter_of_another_package_is_asked_for_the_words() -> None:
    text = "One two three. " * 40
    splitter = Splitter(words=lambda text: [text])
    assert Analysis(text, splitter).numbered[0] == [text]
    assert Analysis(text, splitter).repeated_n_grams.top == {}
    assert Analysis(text).num_words == 160
    assert Analysis(text).repeated_n_grams.top[2] == 40 * len("One two")


def test_count_duplicates() -> None:
    assert count_duplicates(["a", "bb", "a", "bb", "bb"]) == (3, 5)


@pytest.mark.parametrize("token", ["word,", "naïve)", "www.", "U.", "dogs'", "end…”", "日本。", "word”", "a1", "is!", "कि:"])
def test_the_short_way_for_marks_behind_words_is_the_patterns(token: str) -> None:
    assert split_words(token) == _word(with_at=True).findall(token)


def test_the_default_splitter() -> None:
    words = split_words("I don't think it's U.S. law: see https://x.org/a?b, 1,234.5 or me@x.org... — \"हिन्दी\"!")
    assert words == (
        [
            "I",
            "do",
            "n't",
            "think",
            "it",
            "'s",
            "U.S.",
            "law",
            ":",
            "see",
            "https://x.org/a?b",
            ",",
            "1,234.5",
            "or",
            "me@x.org",
        ]
        + ["...", "—", '"', "हिन्दी", '"', "!"]
    )
    assert split_sentences('He said "No." Then left? Yes! 3.5 is a number') == [
        'He said "No." ',
        "Then left? ",
        "Yes! ",
        "3.5 is a number",
    ]


def test_rules_count_with_the_splitter_they_are_given() -> None:
    shouting = Splitter(words=lambda text: [text] * 200, sentences=lambda text: [])
    config = FilterConfig(order=("gopher_quality",))
    (apply,) = build_filters(config, splitter=shouting)
    assert reason(apply(document(PROSE))) == "gopher_quality:words_too_long"
    assert reason(rule("c4", shouting)(document(PROSE))) == "c4:too_few_sentences"


def test_filters_run_in_order_and_stop_at_the_first_rejection() -> None:
    config = FilterConfig.model_validate({"order": ["clean", "min_length", "c4"], "min_length": {"min_characters": 10}})
    filters = build_filters(config)
    assert reason(apply_filters(document("\x00 a \x00"), filters)) == "min_length:characters"
    assert apply_filters(document(PROSE + "\u200b"), filters) == document(PROSE)


def test_a_list_that_has_changed_is_another_setting(tmp_path: Path) -> None:
    path = tmp_path / "domains.txt"
    path.write_text("a.com\n")
    config = FilterConfig.model_validate({"order": ["url"], "url": {"domains": [str(path)]}})
    before = made_with(config).config_hash
    assert made_with(config).config_hash == before
    path.write_text("a.com\nb.com\n")
    assert made_with(config).config_hash != before


def test_a_mebibyte_without_a_space_is_split_in_no_time() -> None:
    """Time that grows with the square of a token's length would make this test take half an hour."""
    assert len(split_words("ab-" * 350_000)) == 700_000
    assert split_sentences("." * 1_000_000 + "x") == ["." * 1_000_000 + "x"]


def test_config_hash_ignores_filters_that_do_not_run() -> None:
    plain = FilterConfig(order=("c4",))
    other = FilterConfig.model_validate({"order": ["c4"], "fineweb": {"max_short_lines": 0.5}})
    assert made_with(plain).config_hash == made_with(other).config_hash
    changed = FilterConfig.model_validate({"order": ["c4"], "c4": {"min_sentences": 3}})
    assert made_with(plain).config_hash != made_with(changed).config_hash


def test_filter_stage_counts_reasons(tmp_path: Path) -> None:
    texts = [PROSE, "Too short.", PROSE.replace(".", "!"), PROSE + "\nlorem ipsum dolor sit amet."]
    write_documents(tmp_path / "in.jsonl.zst", [Document(f"in:{i}", text, "test") for i, text in enumerate(texts)])
    config = FilterConfig(order=("gopher_quality", "c4"))
    summary = filter_documents(config, [tmp_path / "in.jsonl.zst"], tmp_path / "out", Execution(executor="inline"))
    assert summary is not None
    assert summary.rejected == {"c4:lorem_ipsum": 1, "gopher_quality:too_few_words": 1}
    assert [found.id for found in read_documents(tmp_path / "out" / "in.jsonl.zst")] == ["in:0", "in:2"]


def test_a_filter_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="each filter may be named once"):
        FilterConfig(order=("c4", "c4"))


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.37, 0.999])
def test_the_score_of_the_best_fraction_is_exact(tmp_path: Path, fraction: float) -> None:
    rng = np.random.default_rng(4)
    scores = np.concatenate([rng.random(5000), rng.normal(0.5, 1e-6, 3000), [0, 1]]).astype(np.float32)
    for number, part in enumerate(np.array_split(scores, 3)):
        part.tofile(tmp_path / f"{number}")
    expected = np.sort(scores)[::-1][max(1, int(np.ceil(fraction * scores.size))) - 1]
    assert score_of_top(sorted(tmp_path.iterdir()), fraction) == expected
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="no document reaches the classifier"):
        score_of_top([tmp_path / "empty"], 0.5)


def test_the_best_fraction_of_what_reaches_the_classifier_stays(tmp_path: Path) -> None:
    german = "Der Hafen war still und niemand sprach mit ihnen, als sie zum Wasser kamen."
    words = german.split()
    texts = [" ".join(PROSE.split()[i : i + 9] + words[: i % 13]) for i in range(60)] + ["short"] * 20
    for number in range(2):
        items = [Document(f"{number}:{i}", text, "test") for i, text in enumerate(texts[number::2])]
        write_documents(tmp_path / f"{number}.jsonl.zst", items)
    inputs = sorted(tmp_path.glob("*.jsonl.zst"))
    model = bundled_language_model()
    config = FilterConfig.model_validate(
        {
            "order": ["min_length", "classifier"],
            "min_length": {"min_characters": 10},
            "classifier": {"model": str(model), "label": "en", "top_fraction": 0.3},
        }
    )
    for part in ("0/2", "1/2", "0/2"):
        summary = filter_documents(config, inputs, tmp_path / "out", Execution(executor="inline", part=part))
        assert (summary is None) == (not (tmp_path / "out" / "min_score.json").is_file())
    score = load_classifier(model, "en")
    ranked = sorted((score(" ".join(text.split())) for text in texts if len(text) >= 10), reverse=True)
    best = {text for text in texts if len(text) >= 10 and score(" ".join(text.split())) >= ranked[17]}
    kept = [found.text for path in sorted((tmp_path / "out").glob("*.jsonl.zst")) for found in read_documents(path)]
    assert sorted(kept) == sorted(best)
    assert len(kept) == 18
    assert summary is not None
    assert summary.rejected == {"classifier:quality_score": 42, "min_length:characters": 20}
    assert list((tmp_path / "out").glob(".scores-*")) == []
    # More input: the summary of before goes before the other part has scored its documents.
    for name in ("2", "3"):
        write_documents(tmp_path / f"{name}.jsonl.zst", [Document(f"{name}:0", texts[0], "test")])
    more = sorted(tmp_path.glob("*.jsonl.zst"))
    assert filter_documents(config, more, tmp_path / "out", Execution(executor="inline", part="0/2")) is None
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_classifier_without_a_model_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"filter\.classifier\.model: required"):
        filter_documents(FilterConfig(order=("classifier",)), [], tmp_path / "out", Execution(executor="inline"))
    assert not (tmp_path / "out").exists()


def test_contamination_by_evaluation_sets(tmp_path: Path) -> None:
    passage = "a fisherman mending nets looked up nodded and went back to his work as though he"
    (tmp_path / "eval.jsonl").write_text(
        '{"context": "Nothing of this: ' + "x y z " * 9 + '"}\n{"q": ["A short one"]}\n{"c": "' + passage + '"}\n'
    )
    files = {"files": [str(tmp_path / "eval.jsonl")]}
    (apply,) = build_filters(FilterConfig.model_validate({"order": ["contamination"], "contamination": files}))
    outcome = apply(document(PROSE))
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "contamination:eval.jsonl"
    assert outcome.document.meta["contaminated_by"] == ["eval.jsonl: line 3"]
    assert reason(apply(document(PROSE.replace("nodded", "smiled")))) == "kept"
    one_hit = document("Yesterday " + " ".join(passage.split()[:13]) + " fine.")
    assert reason(apply(one_hit)) == "contamination:eval.jsonl"
    (twice,) = build_filters(
        FilterConfig.model_validate({"order": ["contamination"], "contamination": {**files, "min_hits": 2}})
    )
    assert reason(twice(one_hit)) == "kept"
    assert reason(apply(document("A short one"))) == "kept"
    assert reason(apply(document(""))) == "kept"
    (tmp_path / "eval.jsonl").write_text('{"q": "A short one"}\n')
    with pytest.raises(UserError, match="no evaluation item with 12 words"):
        build_filters(FilterConfig.model_validate({"order": ["contamination"], "contamination": {**files, "words": 12}}))


@pytest.mark.realdata
def test_planted_evaluation_passages_are_all_found(shared_data: Path) -> None:
    config = {"order": ["contamination"], "contamination": {"files": [str(shared_data / "eval" / "lambada_openai.jsonl")]}}
    (apply,) = build_filters(FilterConfig.model_validate(config))
    lines = (shared_data / "eval" / "lambada_openai.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[::50]:
        context = json.loads(line)["context"]
        assert reason(apply(document(f"{PROSE}\n{context.upper()}\n{PROSE}"))) == "contamination:lambada_openai.jsonl"
    assert reason(apply(document(PROSE))) == "kept"


def test_the_documented_thresholds_are_the_defaults(project: Path) -> None:
    rows = re.findall(
        r"^\| `(\w+)\.(\w+)` \| ([^|]+) \|", (project / "docs" / "filters.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    defaults = FilterConfig()
    documented = {f"{section}.{name}": yaml.safe_load(value) for section, name, value in rows}
    for name, value in documented.items():
        section, _, field = name.partition(".")
        assert getattr(getattr(defaults, section), field) == value, name
    for section in ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb"):
        for field in type(getattr(defaults, section)).model_fields:
            assert f"{section}.{field}" in documented or field in ("labels", "model"), f"{section}.{field} is not documented"
