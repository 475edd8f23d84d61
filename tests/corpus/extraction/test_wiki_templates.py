"""Wikitext as its reader sees it: templates that stand for text, formulas, script variants, holes, names by language."""

import time
from pathlib import Path

import pytest

from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.extraction.extract_documents import extract_documents
from megagpt.corpus.extraction.wiki_pages import read_site, wiki_outcomes
from megagpt.corpus.extraction.wiki_render import evaluate
from megagpt.corpus.extraction.wiki_sites import site_of
from megagpt.corpus.extraction.wikitext import read_wikitext
from megagpt.corpus.runner.blocks import Block, DroppedText, Seen
from megagpt.corpus.runner.config import Execution
from megagpt.documents import Document, Rejected
from megagpt.files import read_json


def shown(markup: str, language: str = "en") -> str:
    return read_wikitext(markup, site_of(language), "Title").text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("{{convert|100|sqmi|km2}}, {{convert|5|-|10|ft2|m2}}, {{cvt|20|C|F}}", "100 sq mi, 5–10 sq ft, 20 °C"),
        ("{{convert|1+1/2|in}}, {{convert|3|x|4|m}}, {{convert|7|PD/sqmi}}", "1 1/2 in, 3 × 4 m, 7/sq mi"),
        ("a {{convert|40|acre|ha|adj=on}} lot, {{convert|6|ft|2|in|m}} tall", "a 40-acre lot, 6 ft 2 in tall"),
        ("{{val|1.5|e=30|u=kg}}, {{val|1.2|0.3|u=m}}, {{val|9.11|(4)|e=-31}}", "1.5×10^30 kg, 1.2±0.3 m, 9.11(4)×10^−31"),
        ("{{val|7|+0.5|-0.4|ul=km|upl=s}}", "7 +0.5 −0.4 km/s"),
        ("6.02{{e|23}}, 1{{e|-9}}, {{10^|6}}", "6.02×10^23, 1×10^-9, 10^6"),
        ("{{frac|3|1|2}}, {{frac|2}}, {{sfrac|a|b}}, {{height|ft=5|in=11}}", "3 1/2, 1/2, a/b, 5 ft 11 in"),
        ("1{{sfrac|1|4}} days, {{sfrac|3''n'' + 1|2}}, x{{frac|1|2}}", "1 1/4 days, (3n + 1)/2, x1/2"),
        (
            "{{convert|22|e6acre|km2}}, {{convert|400|koilbbl/d}}, {{chem|NH|4|+}}",
            "22 million acres, 400 thousand barrels/d, NH4+",
        ),
        ("{{US$|5 million|link=yes}}, {{INR|500}}, {{GBP|3}}, {{currency|7|EUR}}", "US$5 million, ₹500, £3, €7"),
        ("{{nts|1234}} {{sort|01|first}} {{gaps|12|345}} {{RailGauge|1435mm}}", "1234 first 12345 1435 mm"),
        ("{{chem|H|2|O}}, {{chem|SO|4|2-}}, {{chem2|CO2}}, {{nuclide|U|235}}", "H2O, SO4^2-, CO2, U-235"),
        ("({{langx|ru|Москва}}) {{lang-el|λόγος|lógos}} {{lang|fr|mot}}", "(Russian: Москва) Greek: λόγος, lógos mot"),
        ("{{IPAc-en|ˈ|m|ɒ|s|k|oʊ}} {{IPA-fr|paʁi}} {{IPA|de|ʃ}} {{respell|MOS|kow}}", "/ˈmɒskoʊ/ [paʁi] [ʃ] MOS-kow"),
        ("{{HMS|Victory}}, {{USS|Enterprise|CV-6}}, {{USS|Iowa|BB-61|2}}", "HMS Victory, USS Enterprise (CV-6), Iowa"),
        ("{{sclass|Iowa|battleship}}, {{ship|French ship|Orient|1791|6}}", "Iowa-class battleship, French ship Orient"),
        ("{{as of|2010|5}}, {{as of|2011|lc=y}}, {{start date|2001|5|6}}", "As of May 2010, as of 2011, May 6, 2001"),
        ("{{start date|2001|5|6|df=y}}, {{circa|1850}}, {{reign|1500|1520}}", "6 May 2001, c. 1850, r. 1500–1520"),
        ("{{plainlist|\n* one\n* two\n}}\n{{ubl|three|four}}\n{{hlist|five|six}}", "one\ntwo\nthree\nfour\nfive · six"),
        ("{{poem|line one\nline two}}<poem>\nthree\nfour</poem>", "line one\nline two\nthree\nfour"),
        ("{{quote|To be|Hamlet|Act 3}}{{quote box|quote=a {brace}|author=X}}", "To be\n— Hamlet, Act 3\na {brace}\n— X"),
        ("{{formatnum:{{#expr:3*(4+1)^2}}}}, {{#expr: 7 / 2 round 1}}, {{#expr:1+}}x", "75, 3.5, x"),
        ("* {{USA}}, {{flag|Aruba}}, {{flag|DEU}}, {{flagicon|ITA}} Rome", "United States, Aruba, Germany, Rome"),
        ("{{nihongo|Tokyo|東京|Tōkyō}}, {{ill|Name|de|N}}, {{abbr|km|kilometre}}", "Tokyo (東京, Tōkyō), Name, km"),
        ("{{harvtxt|Smith|Jones|2000|p=5}}, {{harvnb|Ng|1999}}", "Smith & Jones (2000, p. 5), Ng 1999"),
        ("{{coord|51|30|N|0|7|W}} {{coord|1|N|2|E|display=title}} ''Eagle''{{'s}}", "51°30′N 0°7′W Eagle's"),
        ("{{#if:x|yes|no}} {{#ifeq:a|b|same|other}} {{#switch:b|a=1|b|c=2|#default=3}}", "yes other 2"),
        ("{{lang|en|1={{nowrap|1=a = b}}}} {{lc:ABC}} {{PAGENAME}} {{!}} {{math|''x''{{sup|2}}}}", "a = b abc Title | x^2"),
    ],
)
def test_templates_of_english(markup: str, text: str) -> None:
    assert shown(markup) == text


@pytest.mark.parametrize(
    ("language", "markup", "text"),
    [
        ("de", "{{enS|word}}, {{laS|urbs}}, {{lang|fr|mot}}", "englisch word, lateinisch urbs, mot"),
        ("de", '{{"|Sein}} {{Höhe|1234|DE-NN}} {{Bruch|1|2}} § {{0}}5', "„Sein“ 1234 m 1/2 § 5"),
        ("de", "{{Zitat|Text|Autor}} am {{start date|1821|5|5}}", "Text\n— Autor\nam 5. Mai 1821"),
        ("fr", "au {{s|XIX}}, {{s-|XII|e}}, {{s2|XII|e|XIII|e}}", "au XIXe siècle, XIIe siècle, XIIe et XIIIe siècles"),
        ("fr", "{{unité|5|km|2}}, {{unité|3|m|s|-1}}, {{nombre|12|habitants}}", "5 km², 3 m s^-1, 12 habitants"),
        ("fr", "Louis {{XIV}}, {{1er}}, {{XVIIe siècle}}, XIX{{e}}", "Louis XIV, 1er, XVIIe siècle, XIXe"),
        ("fr", "{{date|5|mai|1821}}, {{date|5|5|1821}}, {{heure|12|30}}", "5 mai 1821, 5 mai 1821, 12 h 30 min"),
        ("fr", "{{citation|mot}} {{lien|trad=A|lang=en|texte=Le Nom}} {{n°|5}}", "« mot » Le Nom nº 5"),
        ("es", "{{unidad|5|km}}, {{siglo|XIX||s}}, {{fecha|5|5|1821}}", "5 km, siglo XIX, 5 de mayo de 1821"),
        ("es", "{{esd|5 km}} {{AFI|a}} {{convertir|5|mi|km}}", "5 km [a] 5 mi"),
        ("es", "Dijo: {{cita|texto}}", "Dijo:\ntexto"),
        ("it", "{{M|5|ul=km}}, {{M|10|e=3|u=m}}, {{data|5|5|1821}}", "5 km, 10×10^3 m, 5 maggio 1821"),
        ("it", "{{senza fonte|detto}}, {{maiuscoletto|XIX}}, {{converti|5|km|mi}}", "detto, XIX, 5 km"),
        ("it", "{{citazione|Essere|Amleto}}", "Essere\n— Amleto"),
        ("ja", "{{読み仮名|漢字|かんじ}}、{{仮リンク|名前|en|Name}}、{{ruby|漢|かん}}", "漢字（かんじ）、名前、漢"),
        ("ja", "{{生年月日と年齢|1950|5|6}}生まれ、{{lang|en|word}}", "1950年5月6日生まれ、word"),
        ("ja", "{{convert|5|km|mi}}と{{補助漢字フォント|鄧}}", "5 kmと鄧"),
        ("zh", "{{le|张三|Zhang San}}和{{link-en|李四|Li Si}}，{{tsl|en|Wang|王五}}", "张三和李四，王五"),
        ("zh", "他{{bd|1879年|3月14日|1955年|4月18日}}", "他（1879年3月14日－1955年4月18日）"),
        ("zh", "{{lang|en|word}}，{{僻字|𠮷}}，{{val|5|u=km}}", "word，𠮷，5 km"),
        ("ru", "{{num|1234|км}}, {{lang-en|word}}, {{date|5|5|1821}}", "1234 км, word, 5 мая 1821"),
        ("ru", "Москва{{'}}, {{нп5|A|B|en|C}}, {{не переведено|D}}", "Москва\u0301, B, D"),
        ("ru", "{{OldStyleDate|6 июня|1799|26 мая}}, {{s|5 км}}, {{мфа|a}}", "26 мая (6 июня) 1799, 5 км, [a]"),
        ("pt", "{{fmtn|5|km}}, {{séc|XIX}}, {{dtlink|5|5|1821}}", "5 km, século XIX, 5 de maio de 1821"),
        ("pt", "{{AC|300}}, {{R$|5}}, {{fração|1|2}}", "300 a.C., R$5, 1/2"),
        ("pt", "Disse: {{citação|texto|Ana}}", "Disse:\ntexto\n— Ana"),
        ("pl", "{{w języku|en|word}}, {{data|5|5|1821}}, {{ułamek|1|2}}", "word, 5 maja 1821, 1/2"),
        ("pl", "{{link-interwiki|Nazwa|en|Name}}, {{kapitaliki|XIX}}, {{IPA|a}}", "Nazwa, XIX, a"),
        ("pl", "{{cytat|Być|Hamlet}}", "Być\n— Hamlet"),
    ],
)
def test_templates_of_other_languages(language: str, markup: str, text: str) -> None:
    assert shown(markup, language) == text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Energy <math>E = mc^2</math> of <chem>H2O</chem>, <ce>CO2</ce>", "Energy E = mc^2 of H2O, CO2"),
        (":<math>\n\\frac{1}{2^{n}}\n</math>", "\\frac{1}{2^{n} }"),
        ("x<math display=inline>a<b</math>, {{math|a{{=}}b}}", "xa<b, a=b"),
        ("<syntaxhighlight lang=c>\nif (a) {\n  b[[0]] = c && d;\n}\n</syntaxhighlight>", "if (a) {\n  b[[0]] = c && d;\n}"),
        ("<pre>\nfor i in x:\n    print(i)\n</pre>\nend", "for i in x:\n    print(i)\nend"),
        ("lead\n a = 1\n   b = 2", "lead\na = 1\n  b = 2"),
        ("{{cite|<nowiki>}}</nowiki>}}<code>vector<int></code>", "vector<int>"),
    ],
)
def test_formulas_and_code(markup: str, text: str) -> None:
    assert shown(markup) == text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("10<sup>6</sup>, 10<sup>−6</sup>, 5 m<sup>2</sup>", "10^6, 10^−6, 5 m^2"),
        ("1<sup>st</sup>, XIX<sup>e</sup>, 2<sup>n+1</sup>, ''x''<sup>2</sup>", "1st, XIXe, 2^(n+1), x^2"),
        ("CO<sub>2</sub>, Ca<sup>2+</sup>, SO<sub>4</sub><sup>2−</sup>, 20<sub>16</sub>", "CO2, Ca2+, SO4^2−, 20_16"),
    ],
)
def test_no_number_changes_its_value(markup: str, text: str) -> None:
    assert shown(markup) == text


@pytest.mark.parametrize(
    ("language", "markup", "text"),
    [
        ("zh", "用-{zh-hans:计算机;zh-hant:電腦;}-写-{字}-。", "用计算机写字。"),
        ("zh", "-{H|zh-cn:甲;zh-tw:乙}-丙-{T|zh-cn:丁}--{A|zh-tw:戊;zh-cn:己}-", "丙己"),
        ("zh", "{{lang|en|-{word}-}}-{zh-tw:{{le|乙|B}};zh-cn:[[甲|{{le|丙|C}}]]}-", "word丙"),
        ("sr", "-{sr-ec:град; sr-el:grad}-", "град"),
        ("en", "a -{b}- c", "a -{b}- c"),
    ],
)
def test_script_variants(language: str, markup: str, text: str) -> None:
    assert shown(markup, language) == text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Qui ? Personne ! Il dit : « non » ; elle ( ) partit .", "Qui ? Personne ! Il dit : « non » ; elle ( ) partit ."),
        (
            "f(&params) ?a=1&copy=2 &copy; &amp;lt; x <y and y> z [sic] a]] && b",
            "f(&params) ?a=1&copy=2 © &lt; x <y and y> z [sic] a && b",
        ),
        (
            "! Wow !\nvector<int>, map<string, int>, x[y[0]], m = {{1, 2}, {3}};",
            "! Wow !\nvector<int>, map<string, int>, x[y[0]], m = {{1, 2}, {3}};",
        ),
        ("a {{x}} b, {{x}}, c ({{x}}) d ({{x}}; e) f (g, {{x}}) {{x}}. h", "a b, c d (e) f (g). h"),
        ("a<ref>x</ref> .", "a."),
        ("f() and g( ) and ( , )", "f() and g( ) and ( , )"),
    ],
)
def test_only_holes_are_tidied(markup: str, text: str) -> None:
    assert shown(markup) == text


def test_what_vanishes_in_a_sentence_is_counted_by_name() -> None:
    markup = (
        "{{Infobox x|a={{odd|1}}}}\nPopulation {{Census 2020|DE}} and {{census_2020|FR}}.{{cn}}{{sfn|A}} It {{odd|b}} was.\n"
        "{{Stand alone}}\n== See also ==\nA {{link}} here.\n== Costs "
        "==\n${{formatnum:{{inflation|US|5}}}} {{convert|{{odd}}|km}} now."
    )
    article = read_wikitext(markup, site_of("en"))
    assert article.dropped_templates == {"census 2020": 2, "inflation": 1, "odd": 2}
    assert article.text.startswith("Population and. It was.\nCosts\n$")


@pytest.mark.parametrize(
    ("language", "files", "section"),
    [
        ("de", "[[Bild:a.jpg|mini|b]][[Kategorie:C]]", "Einzelnachweise"),
        ("fr", "[[Fichier:a.jpg|b]][[Image:a.jpg]]", "Voir aussi"),
        ("es", "[[Archivo:a.jpg|b [[c]] d]][[Imagen:x]]", "Véase también"),
        ("it", "[[Immagine:a.jpg|b]][[Categoria:C]]", "Collegamenti esterni"),
        ("ja", "[[ファイル:a.jpg|b]][[画像:a.jpg]]", "脚注"),
        ("zh", "[[文件:a.jpg|b]][[圖像:a.jpg]][[Category:甲]]", "參考文獻"),
        ("ru", "[[Файл:a.jpg|b]][[Изображение:a.jpg]]", "Примечания"),
        ("pt", "[[Ficheiro:a.jpg|b]][[Imagem:a.jpg]]", "Ligações externas"),
        ("pl", "[[Plik:a.jpg|b]][[Grafika:a.jpg]]", "Linki zewnętrzne"),
        ("", "[[Datei:a.jpg]][[Fichier:a.jpg]]", "Weblinks"),
    ],
)
def test_files_and_link_sections_by_language(language: str, files: str, section: str) -> None:
    assert shown(f"A{files}B.\n== {section} ==\n* [http://x.org C]\n== D ==\nE.", language) == "AB.\nD\nE."


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="{language}">
<siteinfo><base>https://x.org/wiki/M</base><namespaces><namespace key="6" case=""
            "first-letter">Slika</namespace></namespaces></siteinfo>
{pages}</mediawiki>"""


def revision(date: str, text: str, attributes: str = "") -> str:
    return f"<revision><id>1</id><timestamp>{date}</timestamp><model>wikitext</model><text{attributes}>{text}</text></revision>"


def outcomes(tmp_path: Path, *revisions: str, language: str = "en") -> list[object]:
    path = tmp_path / "a.xml"
    pages = f"<page><title>A &amp;amp; B</title><ns>0</ns><id>7</id>{''.join(revisions)}</page>"
    path.write_text(DUMP.format(language=language, pages=pages), encoding="utf-8")
    return list(wiki_outcomes(Block(str(path), "x"), "wiki"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_newest_of_several_revisions_counts(tmp_path: Path, order: tuple[int, ...]) -> None:
    revisions = [revision(f"20{10 + number}-01-01T00:00:00Z", f"text {number}") for number in range(3)]
    items = outcomes(tmp_path, *(revisions[number] for number in order))
    document = next(item for item in items if isinstance(item, Document))
    assert (document.text, document.meta["date"], document.meta["page_id"]) == (
        "A &amp; B\ntext 2",
        "2012-01-01T00:00:00Z",
        "7",
    )
    assert [item for item in items if isinstance(item, Seen)] == [Seen("page"), Seen("older revision", 2)]


def test_deleted_text_is_rejected_by_name(tmp_path: Path) -> None:
    deleted = '<revision><timestamp>2020-01-01T00:00:00Z</timestamp><text bytes="5" deleted="deleted" /></revision>'
    for revisions in ([deleted], [deleted, revision("2010-01-01T00:00:00Z", "old")]):
        rejected = [item for item in outcomes(tmp_path, *revisions) if isinstance(item, Rejected)]
        assert [(item.reason, item.document.text) for item in rejected] == [("source:deleted", "")]


def test_site_from_the_dump(tmp_path: Path) -> None:
    head = DUMP.format(language="hr", pages="")
    assert read_site(head).language == "hr"
    assert {"slika", "file"} <= read_site(head).drop_links
    assert read_site("<siteinfo><dbname>zhwiki</dbname>").has_variants
    text = "A[[Slika:x.jpg]]B {{odd thing|5}} c {{HMS|Victory}}"
    items = outcomes(tmp_path, revision("2020-01-01T00:00:00Z", text), language="hr")
    assert [item for item in items if isinstance(item, DroppedText)] == [DroppedText("odd thing", 1)]
    assert next(item.text for item in items if isinstance(item, Document)) == "A &amp; B\nAB c HMS Victory"


def test_the_summary_says_which_templates_cost_text(tmp_path: Path) -> None:
    for name, text in (("a", "The {{odd}} and {{odd}} of {{even}} days."), ("b", "One {{even}} day.")):
        pages = f"<page><title>T</title><ns>0</ns><id>1</id>{revision('2020-01-01T00:00:00Z', text)}</page>"
        (tmp_path / f"{name}.xml").write_text(DUMP.format(language="en", pages=pages), encoding="utf-8")
    config = ExtractConfig(inputs=(str(tmp_path / "*.xml"),))
    extract_documents(config, tmp_path / "out", Execution(num_workers=1))
    assert read_json(tmp_path / "out/summary.json")["dropped_templates"] == {"even": 2, "odd": 2}
    assert read_json(tmp_path / "out/a.xml.jsonl.zst.done.json")["dropped_templates"] == {"even": 1, "odd": 2}


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1+2*3", "7"), ("-(2^3)", "-8"), ("7 mod 4", "3"), ("2/3 round "
            "2", "0.67"), ("1e3", "1000"), ("1/0", None), ("9^9^9^9", None)]
    + [("import os", None), ("(" * 200, None), ("", None)],
)  # fmt: skip
def test_expressions(expression: str, value: str | None) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("w01_langx", ["Москва, Москва old name", "Кучково", "Moskau in German and Moskva in letters"]),
        ("w02_math", ["energy is E=mc^2 for", "where c is", "\\int_0^1 x\\,dx "
            "= \\frac12", "10^6 times, and CO2 is a^2", "1.5×10^30 kg"]),
        ("w03_tabletpl", ["Reef is a reef.", "a {brace} in it", "Second paragraph."]),
        ("w05_french", ["XIXe siècle sur 5 km : qui le sait ? "
            "Personne ! Il dit : « non » ; elle", "Louis XIV régna au XVIIe siècle", "5 mai 1821"]),
        ("w07_generic", ["vector<int>", "map<string, "
            "int>", "x <y and y> z", "f(&params)", "&copy=2", "    return x", "    print(i)"]),
        ("w10_ref", ["A B C D.", "EF G.", "a<b H", "I stays?", "J The"]),
        ("w11_de", ["Bach ist ein Bach."]),
    ],
)  # fmt: skip
@pytest.mark.realdata
def test_trials(shared_data: Path, name: str, sentences: list[str]) -> None:
    items = list(wiki_outcomes(Block(str(shared_data / f"trials/{name}.xml"), "x"), "wiki"))
    text = next(item.text for item in items if isinstance(item, Document))
    assert [sentence for sentence in sentences if sentence not in text] == []
    assert [
        word for word in ("Autre pont", "Site officiel", "Seite des Vereins", "Unterschrift", "never") if word in text
    ] == []


@pytest.mark.parametrize(
    "text",
    ["{|\n" + "x" * 3000, "== a" + " " * 200_000 + "b", "= " * 60_000, "{{" * 50_000 + "a" + "}}" * 50_000, "{{a|" * 40_000]
    + ["[[a|" * 40_000 + "]]" * 40_000, "-{" * 80_000 + "}-" * 80_000, "<math>" * 30_000, "(" + "{{x}}, "
            "" * 25_000, "x" + " " * 200_000]
    + ["[//a" + " a" * 90_000, "<ref " * 40_000, "</ref" + " " * 150_000, ""
            "{{lang|en|" * 40_000, "__" + "A" * 200_000, "&" * 150_000]
    + ["[[File:" + "[[a]] " * 30_000, "{{#expr:" + "(" * 100_000 + "}}", ""
            "{{#switch:a|" + "|b" * 80_000 + "}}", "{{convert|" + "1|to|" * 40_000],
)  # fmt: skip
def test_hostile_pages_take_linear_time(text: str) -> None:
    started = time.process_time()
    read_wikitext(text, site_of("zh"))
    assert time.process_time() - started < 5
