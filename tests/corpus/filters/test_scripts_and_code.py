"""Rules that know which languages they may judge, code that cleaning and C4 leave alone, and words inside host names."""

import json
from pathlib import Path

import pytest

from megagpt.corpus.filters.clean import CleanConfig, clean_text, normalize_whitespace
from megagpt.corpus.filters.registry import FilterConfig, apply_filters, build_filters, rules_passed
from megagpt.corpus.filters.url import UrlConfig, load_url_lists, url
from megagpt.corpus.text.languages import language_of_script
from megagpt.documents import Document, Rejected

PARAGRAPH = "The old harbour is now used by fishing boats only, but on Saturdays there is still a market on the quay."
# Three paragraphs each, written for these tests.
TEXTS = {
    "zh": "图书馆坐落在河的北岸，建于一百年前，至今仍向所有人开放。\n"
    "馆里收藏了两万多册旧书，其中许多是本地人捐赠的手稿和信件。\n"
    "每到冬天，老人们围坐在炉边读报，孩子们在楼上听故事。\n"
    "去年馆方修好了屋顶，又添了一间安静的阅览室。\n"
    "据馆长说，明年春天将举办一次地图展览。\n"
    "欢迎各地的读者前来参观，门票一律免费。",
    "ja": "図書館は川の北岸にあり、百年前に建てられ、今もすべての人に開かれている。\n"
    "館内には二万冊を超える古い本があり、その多くは町の人々が寄贈した手紙や日記である。\n"
    "冬になると老人たちは暖炉を囲んで新聞を読み、子どもたちは二階で「昔話を聞きたい。」\n"
    "昨年は屋根が直され、静かな閲覧室が一つ増えた。\n"
    "来年の春には地図の展示が予定されている。",
    "th": "ห้องสมุดตั้งอยู่ริมฝั่งแม่น้ำทางทิศเหนือสร้างขึ้นเมื่อร้อยปีก่อนและยังเปิดให้ทุกคนเข้าใช้\n"
    "ในอาคารมีหนังสือเก่ากว่าสองหมื่นเล่มซึ่งหลายเล่มเป็นจดหมายที่ชาวเมืองบริจาคไว้\n"
    "ในฤดูหนาวผู้เฒ่าผู้แก่นั่งล้อมเตาผิงอ่านหนังสือพิมพ์และเด็กๆฟังนิทานอยู่ชั้นบน",
    "lo": "ຫ້ອງສະໝຸດຕັ້ງຢູ່ແຄມແມ່ນ້ຳທາງທິດເໜືອສ້າງຂຶ້ນເມື່ອຮ້ອຍປີກ່ອນແລະຍັງເປີດໃຫ້ທຸກຄົນເຂົ້າໃຊ້\n"
    "ໃນອາຄານມີປຶ້ມເກົ່າຫຼາຍກວ່າສອງໝື່ນຫົວເຊິ່ງຫຼາຍຫົວເປັນຈົດໝາຍທີ່ຊາວເມືອງບໍລິຈາກ",
    "km": "បណ្ណាល័យស្ថិតនៅច្រាំងទន្លេខាងជើងត្រូវបានសាងសង់កាលពីមួយរយឆ្នាំមុន។\n"
    "ក្នុងអគារមានសៀវភៅចាស់ជាងពីរម៉ឺនក្បាលដែលអ្នកស្រុកបានបរិច្ចាគ។\n"
    "នៅរដូវរងាចាស់ៗអង្គុយអានកាសែត។\n"
    "ក្មេងៗស្តាប់រឿងនិទាន។\n"
    "ឆ្នាំក្រោយនឹងមានការតាំងពិព័រណ៍ផែនទី។",
    "my": "စာကြည့်တိုက်သည်မြစ်၏မြောက်ဘက်ကမ်းတွင်တည်ရှိသည်။\n"
    "အဆောက်အအုံထဲတွင်စာအုပ်ဟောင်းနှစ်သောင်းကျော်ရှိသည်။\n"
    "ဆောင်းရာသီတွင်အဘိုးအဘွားများသတင်းစာဖတ်ကြသည်။\n"
    "ကလေးများပုံပြင်နားထောင်ကြသည်။\n"
    "လာမည့်နှစ်တွင်မြေပုံပြပွဲကျင်းပမည်။",
}


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("code", TEXTS)
def test_languages_without_spaces_are_not_called_repetitive_or_unpunctuated(code: str, noted: bool) -> None:
    filters = build_filters(FilterConfig(order=("clean", "gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb")))
    outcome = apply_filters(Document("f:0", TEXTS[code], "test", meta={"language": code} if noted else {}), filters)
    assert not isinstance(outcome, Rejected), outcome.reason
    assert outcome.text == TEXTS[code]
    assert "gopher_repetition.max_top_n_gram_chars" in rules_passed(code)
    assert ("c4.keep_only_terminal_punctuation" in rules_passed(code)) == (code in ("th", "lo"))


@pytest.mark.parametrize("code", TEXTS)
def test_repeated_lines_are_still_found(code: str) -> None:
    filters = build_filters(FilterConfig(order=("gopher_repetition",)))
    outcome = apply_filters(Document("f:0", "\n".join([TEXTS[code]] * 3), "test", meta={"language": code}), filters)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "gopher_repetition:duplicate_lines"


def test_short_lines_of_dense_scripts_are_measured_in_their_characters() -> None:
    (apply,) = build_filters(FilterConfig(order=("fineweb",)))
    lines = [f"第{i}位读者今天又来到这里看书写字休息。" for i in range(6)]  # 20 characters each
    assert isinstance(apply(Document("f:0", "\n".join(lines), "test")), Document)
    menu = apply(Document("f:0", "\n".join(f"第{i}页。" for i in range(9)), "test"))
    assert isinstance(menu, Rejected)
    assert menu.reason == "fineweb:short_lines"


def test_a_script_tells_the_language_where_none_was_noted() -> None:
    assert {code: language_of_script(text) for code, text in TEXTS.items()} == {code: code for code in TEXTS}
    assert language_of_script("Река берёт начало на севере") == "und"
    assert language_of_script("यह नदी उत्तर की पहाड़ियों से निकलती है") == "und"
    assert language_of_script("Où est l’été ? 12 %") == "en"
    assert language_of_script("") == "en"


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["g01_langs.jsonl", "g07_thai_long.jsonl"])
def test_trials_of_languages(shared_data: Path, name: str) -> None:
    filters = build_filters(FilterConfig(order=("clean", "gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb")))
    for line in (shared_data / "trials" / name).read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        outcome = apply_filters(Document(value["id"], value["text"], "test"), filters)
        reason = outcome.reason if isinstance(outcome, Rejected) else "kept"
        assert reason == ("gopher_repetition:duplicate_lines" if value["id"] == "g01_langs.jsonl:4" else "kept")


CODE = {
    "python": "Run this:\n\ndef f(x):\n    for y in x:\n        print(y,   'two  spaces')\n\n    return x",
    "class": "class A:\n\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2",
    "c": "int main(void) {\n\tif (x) {\n\t\treturn 1;\n\t}\n\treturn 0;\n}",
    "yaml": "model:\n  layers: 2\n  heads:\n    - 1\n    - 2\nseed: 1",
    "fence": "As follows.\n\n```python\n  x = 1\n\n  y  =  2\n```\n\nThat is all.",
    "list": "- fruit\n  - apples\n  - pears\n- bread",
}


@pytest.mark.parametrize("name", CODE)
def test_cleaning_keeps_code(name: str) -> None:
    text = f"{PARAGRAPH}\n\n{CODE[name]}\n\n{PARAGRAPH}"
    assert clean_text(text, CleanConfig(), language="en") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "    First lines of paragraphs\nare no code.\n\n    Nor is this.",
            "First lines of paragraphs\nare no code.\n\nNor is this.",
        ),
        ("    all\n    indented\n        but  this", "all\nindented\n    but  this"),
        ("a\n b  c\n\n  d", "a\nb c\n\nd"),
        ("\u3000\u3000这条河。\n\u3000\u3000两岸。", "这条河。\n两岸。"),
        ("```\nnever  closed", "```\nnever closed"),
        ("Title\n\n  one\n  two", "Title\n\none\ntwo"),
    ],
)
def test_cleaning_tidies_what_is_no_code(text: str, expected: str) -> None:
    assert normalize_whitespace(text) == expected
    assert normalize_whitespace(expected) == expected


@pytest.mark.realdata
def test_trial_of_code(shared_data: Path) -> None:
    text = json.loads((shared_data / "trials" / "g03_code.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    cleaned = clean_text(text, CleanConfig(), language="en")
    assert "def f(x):\n    for y in x:\n        if y:\n            print(y)\n    return x\n" in cleaned


@pytest.mark.parametrize("name", ["python", "c", "fence"])
def test_c4_leaves_code_alone_if_asked(name: str) -> None:
    text = f"{PARAGRAPH}\n{PARAGRAPH}\n{PARAGRAPH}\nA menu\n{CODE[name]}\n\n{PARAGRAPH}\n{PARAGRAPH}"
    settings = {"order": ["c4"], "c4": {"keep_code": True, "drop_curly_brackets": False}}
    outcome = apply_filters(Document("f:0", text, "test"), build_filters(FilterConfig.model_validate(settings)))
    assert not isinstance(outcome, Rejected)
    indented = [line for line in CODE[name].split("\n") if line.startswith((" ", "\t"))]
    assert all(line in outcome.text.split("\n") for line in indented)
    assert "A menu" not in outcome.text
    without = apply_filters(Document("f:0", text, "test"), build_filters(FilterConfig.model_validate({"order": ["c4"]})))
    assert isinstance(without, Rejected) or not any(line in without.text for line in indented)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://pornhub.com/x", "url:word"),
        ("https://www.youporn.example/", "url:word"),
        ("http://freesexcams24.example/a", "url:word"),
        ("http://bestescorts.co.uk/", "url:word"),
        ("http://onlinecasinopoker.example/", "url:soft_words"),
        ("http://sexycasino.net/", "url:soft_words"),
        ("http://essexcasino.co.uk/", "kept"),
        ("http://middlesexcasino.example/", "kept"),
        ("http://milford.example/", "kept"),
        ("http://pornichet.example/plage", "kept"),
        ("http://escortradardetectors.example/", "kept"),
        ("http://freeonlinegirls.example/", "kept"),
        ("http://a.example/pornhub-history", "kept"),
    ],
)
def test_words_inside_a_host_name(address: str, expected: str) -> None:
    lists = load_url_lists((), (), (), (), (), True)
    outcome = url(Document("f:0", "text", "test", address), UrlConfig(), lists=lists)
    assert (outcome.reason if isinstance(outcome, Rejected) else "kept") == expected


def test_words_of_the_user_are_found_only_where_the_rest_is_explained(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("anal\nass\n")
    lists = load_url_lists((), (), (tmp_path / "words",), (), (), False)
    for host, is_kept in (("analytics", True), ("assets", True), ("freeanalvideos", False), ("grass", True)):
        outcome = url(Document("f:0", "text", "test", f"http://{host}.example/"), UrlConfig(), lists=lists)
        assert isinstance(outcome, Document) == is_kept, host
