"""Language models by name: what they find, what they cannot, capitals, short texts, warnings."""

import logging
import sys
from pathlib import Path

import pytest

from megagpt.config import UserError
from megagpt.corpus.filters.filter_documents import filter_documents, made_with
from megagpt.corpus.filters.language import LanguageConfig, language
from megagpt.corpus.filters.registry import FilterConfig
from megagpt.corpus.runner.executors import Execution
from megagpt.corpus.text import language_models
from megagpt.corpus.text.fasttext_models import bundled_language_model
from megagpt.corpus.text.language_models import HARDLY_FOUND, NAMES, is_in_capitals, labels_of, open_language_model, warnings
from megagpt.documents import Document, Rejected, write_documents
from megagpt.files import read_json
from megagpt.measurement import RESULTS

# Written for this test.
TEXTS = {
    "en": "The river rises in the northern hills and flows past three small towns before it reaches the sea.",
    "de": "Der Fluss entspringt in den Hügeln des Nordens und fließt an drei kleinen Städten vorbei ins Meer.",
    "fr": "La rivière prend sa source dans les collines du nord et traverse trois petites villes avant la mer.",
    "ru": "Река начинается на северных холмах и протекает мимо трёх маленьких городов, прежде чем впадает в море.",
    "zh": "这条河发源于北部的群山，流经三座小镇，最后在旧港附近注入大海。",
    "ja": "この川は北の山地に源を発し、三つの小さな町を流れて古い港の近くで海に注いでいる。",
    "zu": "Umfula uqala emagqumeni asenyakatho futhi ugeleza udlule emadolobheni amathathu ngaphambi kokufika olwandle.",
    "ha": "Kogin ya fara ne daga tuddan arewa kuma yana wucewa ta garuruwa guda uku kafin ya isa teku.",
    "ms": "Sungai itu bermula di bukit-bukit utara dan mengalir melalui tiga buah pekan kecil sebelum sampai ke laut.",
}


@pytest.mark.parametrize("name", NAMES)
def test_plain_languages_in_every_model(name: str) -> None:
    model = open_language_model(name)
    for label in ("en", "de", "fr", "ru", "zh", "ja"):
        found, score = model(TEXTS[label])
        assert (found, 0.5 < score <= 1) == (label, True), (name, label, score)
        assert model(TEXTS[label].upper())[0] == label
    assert label in labels_of(name)
    assert model("12345 67890")[1] < 0.65


def test_cld2_and_langid_find_what_lid_176_has_no_label_for() -> None:
    for label in ("zu", "ha"):
        assert label not in labels_of("lid.176")
        assert open_language_model("lid.176")(TEXTS[label])[0] != label
        for name in ("cld2", "langid", "agreement"):
            assert open_language_model(name)(TEXTS[label])[0] == label, name
    assert open_language_model("cld2")(TEXTS["ms"])[0] == "ms"


def test_models_that_disagree_give_no_language() -> None:
    assert open_language_model("agreement")("Ok") == ("und", 0.0)
    found = language(Document("a", "Ok", "web"), LanguageConfig(labels=("en",)), predict=open_language_model("agreement"))
    assert isinstance(found, Rejected)
    assert found.reason == "language:other"


def test_characters_that_cld2_refuses() -> None:
    text = "\x01" + TEXTS["en"][:40] + "\x85\ufffe\ud800" + TEXTS["en"][40:]
    for name in ("cld2", "langid"):
        assert open_language_model(name)(text)[0] == "en"


def test_a_model_is_a_name_or_a_file_whose_bytes_count(tmp_path: Path) -> None:
    (tmp_path / "own.ftz").write_bytes(bundled_language_model().read_bytes())
    named = FilterConfig.model_validate({"order": ["language"], "language": {"model": "cld2"}})
    own = FilterConfig.model_validate({"order": ["language"], "language": {"model": str(tmp_path / "own.ftz")}})
    assert (named.section(LanguageConfig).model, made_with(named).contents) == ("cld2", {})
    assert list(made_with(own).contents) == [str(tmp_path / "own.ftz")]
    assert open_language_model(str(tmp_path / "own.ftz"))(TEXTS["de"]) == open_language_model("lid.176")(TEXTS["de"])


def test_what_counts_as_capitals() -> None:
    assert [is_in_capitals(text) for text in ("HELLO World AGAIN", "Hello World", "日本", "", "НАТО і США", "ΑΒΓ δ")] == [
        True, False, False, False, True, True
    ]  # fmt: skip
    assert not is_in_capitals("İstanbul straße, ß becomes SS")  # whose small or capital forms have other lengths
    assert is_in_capitals("İSTANBUL, STRAßE")
    assert is_in_capitals("ÉÀÇÉ a")


def test_labels_that_a_model_cannot_give_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_documents(tmp_path / "a.jsonl.zst", [Document("a", TEXTS["en"], "web")])
    config = FilterConfig(order=("language",), language=LanguageConfig(labels=("en", "zu", "bs")))
    with caplog.at_level(logging.WARNING):
        filter_documents(config, [tmp_path / "a.jsonl.zst"], tmp_path / "out", Execution(executor="inline"))
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "language.labels=zu: lid.176 has no such label, so it keeps no text: "
        "language.model=cld2 or langid or agreement does better",
        "language.labels=bs: lid.176 finds 1% of the texts in it: language.model=langid does better",
    ]
    assert warnings(("en", "de", "zh"), "lid.176") == []
    assert warnings(("en",), "agreement") == []


def test_models_are_not_loaded_for_labels_that_need_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_models, "_langid_model", lambda: pytest.fail("it takes half a second"))
    assert warnings(("en", "de"), "lid.176") == []


def test_the_table_is_that_of_the_measurement() -> None:
    measured = read_json(RESULTS / "languages.json")["results"]["hardly_found"]
    assert {name: values for name, values in measured.items() if values} == HARDLY_FOUND


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    open_language_model.cache_clear()
    monkeypatch.setitem(sys.modules, "pycld2", None)
    with pytest.raises(UserError, match=r"language\.model needs pycld2: pip install -c constraints\.txt '\.\[languages\]'"):
        open_language_model("cld2")
    with pytest.raises(UserError, match="no such model file"):
        open_language_model(str(tmp_path / "none.ftz"))


@pytest.mark.realdata
def test_recall_of_short_sentences(shared_data: Path) -> None:
    lines = (shared_data / "langid/tatoeba.deu.txt").read_text(encoding="utf-8").splitlines()[:200]
    found = {name: sum(open_language_model(name)(line)[0] == "de" for line in lines) for name in NAMES}
    assert {name: count > 170 for name, count in found.items()} == dict.fromkeys(NAMES, True)
