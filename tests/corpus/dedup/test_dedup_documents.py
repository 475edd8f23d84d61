"""Deduplication: signatures against a slow version, decisions against brute force, chains, families, kills and workers."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from small_disk import SmallDisk

from megagpt.config import UserError
from megagpt.corpus.dedup import dedup_documents as dedup
from megagpt.corpus.dedup import near_duplicates
from megagpt.corpus.dedup.config import DedupConfig
from megagpt.corpus.dedup.dedup_documents import dedup_documents
from megagpt.corpus.dedup.external_join import equal_key_pairs
from megagpt.corpus.runner.blocks import Block
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.text import shingle_kernels
from megagpt.corpus.text.characters import plain_characters
from megagpt.corpus.text.shingles import (
    MinHashSettings,
    exact_digests,
    minhash,
    permutations,
    shingle_set,
    shingles,
    shingles_of_texts,
)
from megagpt.documents import Document, open_lines, read_documents, write_documents
from megagpt.files import read_json

ONE = Execution(executor="inline")


SETTINGS = MinHashSettings(words_per_shingle=5, num_bands=14, rows_per_band=8, seed=1)
WORD_64 = 2**64


def slow_mix(value: int) -> int:
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD % WORD_64
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 % WORD_64
    return value ^ value >> 33


ACCENTS = (
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u2de0-\u2dff\ua66f-\ua672\ua674-\ua67d"
    "\ua69e\ua69f\ufe00-\ufe0f\ufe20-\ufe2f]"
)


def slow_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFD", text.lower())
    text = re.sub(ACCENTS, "", text)
    text = "".join("0" if unicodedata.category(c) == "Nd" else c for c in text)
    text = re.sub("0+([.,]0+)?", "0", text)
    text = re.sub("([一-鿿぀-ヿก-๎ក-៓က-႟])", r" \1 ", text)
    return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split()


def slow_shingles(text: str, size: int) -> list[int]:
    hashes = []
    for word in slow_words(text):
        value = 0xCBF29CE484222325
        for character in word:
            value = (value ^ ord(character)) * 0x100000001B3 % WORD_64
        hashes.append(slow_mix(value))
    size = min(size, len(hashes))
    found = []
    for first in range(len(hashes) - size + 1) if hashes else ():
        value = size
        for word in hashes[first : first + size]:
            value = (slow_mix(value ^ word) + 0x9E3779B97F4A7C15) % WORD_64
        found.append(slow_mix(value) >> 32)
    return found


TEXTS = [
    "The quick brown fox jumps over the lazy dog, 3,000 times; then it rests.",
    "Ça n'est pas à côté: l'été 2024 coûte 12.5 € — naïve Ångström ﬁn",
    "Привет, мир! Ёлка и съезд — 42 раза подряд, да.",
    "昨日は雨が降りました。東京へ行きますか。",
    "สวัสดีครับ ผมชื่อสมชาย",
    "too short",
    "1.5.2 10,000,000 a1b2 v2.0beta",
    "",
    "... !!! ---",
    "पिता पानी पीते हैं, क़लम और ज़मीन; ऩ न\u093c ૐ",
    "مَرْحَبًا أؤإئآ שָׁלוֹם",
    "がぎ か\u3099き\u3099 ぱ ゔ ヷ",
    "กี่ ที่\u0e38 ก\u0e48\u0e38 เก้า ๔๕ ខ្មែរ မြန်မာ",
    "𝒳𝒴 𠮷野家 emoji 👩\u200d🔬 é\u0301",
]


@pytest.mark.parametrize("text", TEXTS)
def test_shingles_and_signature_equal_a_slow_version(text: str) -> None:
    expected = slow_shingles(text, 5)
    assert shingles(text, words_per_shingle=5).tolist() == expected
    assert shingle_set(text, words_per_shingle=5).tolist() == sorted(set(expected))
    found = minhash([text, "other words", text], SETTINGS)
    assert [part.tolist() for part in found.shingles] == [expected, slow_shingles("other words", 5), expected]
    if not expected:
        return
    factors, offsets = permutations(112, 1)
    minima = [
        min((int(a) * x + int(b)) % WORD_64 >> 32 for x in expected)
        for a, b in zip(factors.tolist(), offsets.tolist(), strict=True)
    ]
    keys = []
    for band in range(14):
        value = band
        for row in minima[8 * band : 8 * band + 8]:
            value = (slow_mix(value ^ row) + 0x9E3779B97F4A7C15) % WORD_64
        keys.append(value)
    for row in (0, 2):
        assert found.signatures[row].tolist() == [value & 0xFFFF for value in minima]
        assert found.keys[row].tolist() == keys


def test_texts_are_hashed_alike_alone_and_among_others() -> None:
    alone = [minhash([text], SETTINGS) for text in TEXTS]
    together = minhash(TEXTS, SETTINGS)
    for i, found in enumerate(alone):
        assert together.shingles[i].tolist() == found.shingles[0].tolist()
        if together.shingles[i].size:
            assert together.signatures[i].tolist() == found.signatures[0].tolist()
            assert together.keys[i].tolist() == found.keys[0].tolist()
    assert shingles_of_texts([], 5)[0] == []
    assert exact_digests([]) == []
    assert exact_digests(TEXTS) == [exact_digests([text])[0] for text in TEXTS]


def normalised_whole(text: str, size: int) -> list[int]:
    """Shingles of a text that Python's own functions lower and decompose."""
    data = np.frombuffer(unicodedata.normalize("NFD", text.lower()).encode("utf-8", "surrogatepass"), np.uint8)
    entries, complete = shingle_kernels.characters(data, *plain_characters())
    assert complete
    return (shingle_kernels.shingles(entries, size) >> np.uint64(32)).tolist()


def test_every_character_alone_is_folded_as_in_its_text() -> None:
    for first in (*range(0, 0x20100, 64), *range(0x2F7C0, 0x2FA40, 64), 0x3FFC0, 0x40000, 0x10FFC0):
        text = "".join(f"A{c}b {c}{c} 1{c}2 {c}. Σ{c} AΣ" for c in map(chr, range(first, first + 64)))
        assert shingles(text, words_per_shingle=2).tolist() == normalised_whole(text, 2), hex(first)
        alone = "".join(f"A{c}b {c}{c} 1{c}2 {c}. " for c in map(chr, range(first, first + 64)))
        assert shingles(alone, words_per_shingle=2).tolist() == normalised_whole(alone, 2), hex(first)


def test_marks_that_are_letters_come_in_canonical_order() -> None:
    marks: dict[tuple[int, bool, bool], str] = {}  # one of each class, of accents and others
    for c in map(chr, range(0x20000)):
        if unicodedata.category(c)[0] == "M":
            key = (unicodedata.combining(c), re.match(ACCENTS, c) is None, unicodedata.normalize("NFD", c) == c)
            marks.setdefault(key, c)
    assert len(marks) > 50
    for first in marks.values():
        text = " ".join(f"a{first}{second} が{first}{second} é{first}{second}" for second in marks.values())
        assert shingles(text, words_per_shingle=1).tolist() == normalised_whole(text, 1)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_folded_as_a_whole(text: str) -> None:
    assert shingles(text, words_per_shingle=3).tolist() == normalised_whole(text, 3)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from([*map(chr, range(0x30)), *" \x85\xa0\u1680\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000é漢😀"]))
)
def test_white_space_is_that_of_str_split(text: str) -> None:
    data = np.frombuffer(text.encode(), np.uint8)
    assert shingle_kernels.single_spaced(data).tobytes().decode() == " ".join(text.split())


def test_every_white_space_character_is_known() -> None:
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        if chr(code).isspace() or code < 0x3100:
            data = np.frombuffer(f"a{chr(code)}".encode(), np.uint8)
            assert shingle_kernels.single_spaced(data).tobytes().decode() == f"a{chr(code)}".strip()


def test_permutations_are_splitmix64() -> None:
    # The first outputs of SplitMix64 from seed 1234567 (Vigna's reference, as Java's test vectors print them).
    factors, offsets = permutations(2, 1234567)
    assert factors.tolist() == [6457827717110365317 | 1, 3203168211198807973 | 1]
    assert offsets.tolist() == [9817491932198370423, 4593380528125082431]


def test_signatures_ignore_case_accents_punctuation_and_digits() -> None:
    found = minhash(["Café: 12 rooms, 3.5 STARS, in Rome!", "cafe 7 rooms 9,25 stars in rome"], SETTINGS)
    assert found.signatures[0].tolist() == found.signatures[1].tolist()


def similarity(a: str, b: str, **settings: Any) -> float:
    sets = [set(part.tolist()) for part in shingles_of_texts([a, b], 5, **settings)[0]]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("पिता पानी पीते हैं और फल खाते हैं", "पता पन पत ह और फल खत ह"),  # trial d03
        ("がぎぐ ばびぶ ぱぴぷ だぢづ", "かきく はひふ はひふ たちつ"),
        ("กี่ กี กิ ตี่ ตี ปู ปุ", "ก ก ก ต ต ป ป"),
        ("শিশু বই পড়ে নদী দেখে", "শশ বই পড নদ দখ"),  # Bengali
        ("தமிழ் மொழி படி", "தமழ மழ பட"),  # Tamil
        ("ភាសាខ្មែរ", "ភសខមរ"),  # Khmer
        ("كَتَبَ وَلَدٌ", "كُتِبَ وُلِدَ"),  # he wrote, it was written
        ("أمل سأل", "امل سال"),
    ],
)
def test_vowel_signs_and_voicing_marks_are_no_accents(a: str, b: str) -> None:
    assert similarity(a, b) < 0.8
    assert similarity(unicodedata.normalize("NFD", a), unicodedata.normalize("NFC", a)) == 1


def test_accents_of_latin_greek_and_cyrillic_are_folded() -> None:
    assert similarity("Çà été naïve Ångström Việt", "ca ete naive angstrom viet") == 1
    assert similarity("Ελλάδα ΐ Ёлка стано́вится", "ελλαδα ι елка становится") == 1


def test_numbers_are_folded_unless_they_matter(tmp_path: Path) -> None:
    a, b = "What is 17 + 25 ? The sum of 17 and 25 is 42 .", "What is 8 + 3 ? The sum of 8 and 3 is 11 ."  # trial d01
    assert similarity(a, b) == 1
    assert similarity(a, b, fold_numbers=False) == 0
    assert similarity("3.5 m ๑๒", "3,5 m ๑๒", fold_numbers=False) == 1
    assert kept(run(tmp_path / "a", {"1.jsonl.zst": [a, b]})) == ["1.jsonl.zst:0"]
    assert kept(run(tmp_path / "b", {"1.jsonl.zst": [a, b]}, fold_numbers=False)) == ["1.jsonl.zst:0", "1.jsonl.zst:1"]
    lines = {"1.jsonl.zst": ["Chapter 1\nHe came. So did we all.", "Chapter 2\nShe went, and nobody saw it."]}
    for fold_numbers, expected in ((True, "She went, and nobody saw it."), (False, "Chapter 2\nShe went, and nobody saw it.")):
        output = run(tmp_path / f"{fold_numbers}", lines, fold_numbers=fold_numbers, drop_repeated="lines", near=False)
        assert [document.text for document in read_documents(output / "1.jsonl.zst")][1] == expected


def test_short_texts_may_be_left_alone(tmp_path: Path) -> None:
    """Trial d02: punctuation and case are folded, so short texts are equal sooner than long ones."""
    texts = ["Yes.", "yes", "No.", "", " \n", "😀😀😀", "😀 😀😀", "C++ is fast", "C# is fast", "C is fast", "yes"]
    names = {
        min_words: kept(run(tmp_path / str(min_words), {"1.jsonl.zst": texts}, min_words=min_words)) for min_words in (1, 2, 4)
    }
    assert names[1] == [f"1.jsonl.zst:{i}" for i in (0, 2, 3, 5, 6, 7)]
    assert names[2] == [f"1.jsonl.zst:{i}" for i in (0, 1, 2, 3, 5, 6, 7)]
    assert names[4] == [f"1.jsonl.zst:{i}" for i in (0, 1, 2, 3, 5, 6, 7, 8, 9)]
    long = "one two three four five six"
    near = {"1.jsonl.zst": [long, long.upper(), long + " seven", long.upper() + " seven"]}
    assert kept(run(tmp_path / "6", near, min_words=6)) == ["1.jsonl.zst:0", "1.jsonl.zst:2"]
    assert kept(run(tmp_path / "7", near, min_words=7)) == ["1.jsonl.zst:0", "1.jsonl.zst:1", "1.jsonl.zst:2"]
    assert [row["kind"] for row in duplicates(tmp_path / "4" / "out")] == ["white_space", "exact"]


def test_a_threshold_that_the_bands_do_not_find_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for threshold, options in ((0.8, {}), (0.9, {}), (0.7, {"near": False}), (0.7, {"num_bands": 40})):
        run(tmp_path / f"{threshold}{options}", {"1.jsonl.zst": ["a b"]}, threshold=threshold, **options)
    assert "find" not in caplog.text
    run(tmp_path / "low", {"1.jsonl.zst": ["a b"]}, threshold=0.7)
    assert (
        "dedup.threshold=0.7: dedup.num_bands=14 of dedup.rows_per_band=8 find 56 % of the pairs of that similarity, the "
        "others stay: dedup.num_bands=39, or dedup.rows_per_band=5, would find 90 %"
    ) in caplog.text
    assert round(DedupConfig(threshold=0.7).recall_at_threshold, 3) == 0.565


def test_exact_digests_ignore_white_space_and_unicode_form_only() -> None:
    texts = ["Cafe\u0301  au\nlait ", "Café au lait", "café au lait", "room 1", "room 2", "", " \n"]
    digests = exact_digests(texts)
    assert [digests.index(digest) for digest in digests] == [0, 0, 2, 3, 4, 5, 5]
    assert digests[1] == xxhash.xxh3_128_digest("Café au lait".encode())


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_equal_keys_in_little_and_in_much_memory(tmp_path: Path, memory_bytes: int) -> None:
    generator = np.random.default_rng(3)
    keys = generator.integers(0, 1 << 63, 3000, dtype=np.uint64)[generator.integers(0, 3000, 10_000)]
    keys[generator.integers(0, 10_000, 4000)] = np.uint64(77)  # one key with more documents than fit in memory at once
    documents = np.arange(10_000)
    chunks = [(keys[at : at + 700], documents[at : at + 700]) for at in range(0, 10_000, 700)]
    found = np.concatenate(list(equal_key_pairs(chunks, memory_bytes=memory_bytes, scratch=tmp_path)))
    first: dict[int, int] = {}
    expected = {(first.setdefault(key, i), i) for i, key in enumerate(keys.tolist())}
    assert sorted(map(tuple, found.tolist())) == sorted(pair for pair in expected if pair[0] != pair[1])
    assert list(tmp_path.iterdir()) == []


def run(folder: Path, files: Mapping[str, Sequence[str]], execution: Execution = ONE, **settings: object) -> Path:
    """Write texts as document files, deduplicate them and return the output's folder."""
    for name, texts in files.items():
        write_documents(folder / name, [Document(f"{name}:{i}", text, "test") for i, text in enumerate(texts)])
    config = DedupConfig.model_validate(settings)
    dedup_documents(config, [folder / name for name in files], folder / "out", execution)
    return folder / "out"


def kept(output: Path) -> list[str]:
    return [document.id for path in sorted(output.glob("*.jsonl.zst")) for document in read_documents(path)]


def duplicates(output: Path) -> list[dict]:
    found = []
    for path in sorted((output / "duplicates").glob("*.jsonl.zst")):
        with open_lines(path) as lines:
            found += [orjson.loads(line) for line in lines]
    return found


class Writer:
    """Random texts, and edits of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(3, 9))) for _ in range(20_000)]

    def text(self, num_words: int = 200) -> str:
        return " ".join(self.random.choices(self.words, k=num_words))

    def edit(self, text: str, num_words: int) -> str:
        words = text.split()
        for at in self.random.sample(range(len(words)), num_words):
            words[at] = self.random.choice(self.words)
        return " ".join(words)


def jaccard(a: str, b: str) -> float:
    first, second = set(slow_shingles(a, 5)), set(slow_shingles(b, 5))
    return len(first & second) / len(first | second)


def test_the_earliest_copy_stays_and_drops_are_explained(tmp_path: Path) -> None:
    writer = Writer(1)
    a, b = writer.text(), writer.text()
    near = writer.edit(a, 3)
    output = run(tmp_path, {"1.jsonl.zst": [b, a, a], "2.jsonl.zst": [near, near, " " + b, "", "", "?!"]})
    assert kept(output) == ["1.jsonl.zst:0", "1.jsonl.zst:1", "2.jsonl.zst:3", "2.jsonl.zst:5"]
    similarity = round(jaccard(a, near), 4)
    assert duplicates(output) == [
        {"dropped": "1.jsonl.zst:2", "kept": "1.jsonl.zst:1", "kind": "exact", "similarity": 1.0},
        {"dropped": "2.jsonl.zst:0", "kept": "1.jsonl.zst:1", "kind": "near", "similarity": similarity},
        {"dropped": "2.jsonl.zst:1", "kept": "1.jsonl.zst:1", "kind": "near", "similarity": similarity},
        {"dropped": "2.jsonl.zst:2", "kept": "1.jsonl.zst:0", "kind": "white_space", "similarity": 1.0},
        {"dropped": "2.jsonl.zst:4", "kept": "2.jsonl.zst:3", "kind": "exact", "similarity": 1.0},
    ]
    summary = read_json(output / "summary.json")
    assert summary["rejected"] == {"dedup:exact": 2, "dedup:near": 2, "dedup:white_space": 1}
    assert (summary["documents_in"], summary["kept"]) == (9, 4)


def test_exact_only(tmp_path: Path) -> None:
    writer = Writer(2)
    a = writer.text()
    assert kept(run(tmp_path, {"1.jsonl.zst": [a, writer.edit(a, 1), a]}, near=False)) == ["1.jsonl.zst:0", "1.jsonl.zst:1"]


def test_a_drift_chain_does_not_collapse(tmp_path: Path) -> None:
    writer = Writer(3)
    chain = [writer.text()]
    while len(chain) < 120:
        chain.append(writer.edit(chain[-1], 1))
    assert jaccard(chain[0], chain[-1]) < 0.3
    output = run(tmp_path, {"chain.jsonl.zst": chain})
    stays = {int(name.rpartition(":")[2]) for name in kept(output)}
    assert 10 < len(stays) < 60  # about every fourth edit leaves the neighbourhood of the last one that stayed
    for found in duplicates(output):
        dropped, keeper = (int(found[name].rpartition(":")[2]) for name in ("dropped", "kept"))
        assert keeper in stays
        assert keeper < dropped
        assert found["similarity"] == pytest.approx(jaccard(chain[dropped], chain[keeper]), abs=5e-5)
        assert found["similarity"] >= 0.8


def greedy(texts: list[str], threshold: float) -> set[int]:
    """The documents that stay if all pairs are compared."""
    sets = [set(slow_shingles(text, 5)) for text in texts]
    stays: list[int] = []
    for i, found in enumerate(sets):
        if not any(len(found & sets[k]) >= threshold * len(found | sets[k]) for k in stays):
            stays.append(i)
    return set(stays)


def planted(writer: Writer, count: int) -> list[str]:
    """Texts of which a third are edits of others, of similarity .5 to .97."""
    texts = [writer.text(writer.random.randint(60, 160)) for _ in range(count * 2 // 3)]
    for _ in range(count // 3):
        base = writer.random.choice(texts)
        words = len(base.split())
        texts.append(writer.edit(base, writer.random.randint(1, max(1, words // 18))))
    writer.random.shuffle(texts)
    return texts


def test_with_many_bands_the_result_is_that_of_comparing_all_pairs(tmp_path: Path) -> None:
    texts = planted(Writer(4), 300)
    output = run(tmp_path, {"all.jsonl.zst": texts}, num_bands=120, rows_per_band=1)
    assert {int(name.rpartition(":")[2]) for name in kept(output)} == greedy(texts, 0.8)


@pytest.mark.slow
def test_recall_and_precision_with_the_default_bands(tmp_path: Path) -> None:
    texts = planted(Writer(5), 900)
    output = run(tmp_path, {"all.jsonl.zst": texts})
    stays = {int(name.rpartition(":")[2]) for name in kept(output)}
    sets = [set(shingle_set(text, words_per_shingle=5).tolist()) for text in texts]
    missed = sum(any(k < i and len(sets[i] & sets[k]) >= 0.8 * len(sets[i] | sets[k]) for k in stays) for i in stays)
    dropped = len(texts) - len(stays)
    wrong = sum(
        not any(len(sets[i] & sets[k]) >= 0.8 * len(sets[i] | sets[k]) for k in stays) for i in set(range(len(texts))) - stays
    )
    assert dropped > 80
    assert wrong == 0
    assert dropped / (dropped + missed) > 0.93  # 14 x 8 catches .924 at similarity .8 and more above; seeds are fixed


def test_signature_verification_is_close_to_exact(tmp_path: Path) -> None:
    texts = planted(Writer(6), 300)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    exact = set(kept(run(tmp_path / "a", {"all.jsonl.zst": texts})))
    estimated = set(kept(run(tmp_path / "b", {"all.jsonl.zst": texts}, verify="signature")))
    assert len(exact ^ estimated) <= 15  # the estimate's standard error at .8 is .038; 100 pairs lie between .5 and .97


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_template_family_costs_no_square(tmp_path: Path, count: int) -> None:
    writer = Writer(7)
    template = writer.text(200)
    output = run(tmp_path, {"family.jsonl.zst": [template, *(writer.edit(template, 1) for _ in range(count))]}, near=True)
    assert kept(output) == ["family.jsonl.zst:0"]
    assert read_json(output / "dedup.json")["comparisons"] <= count


def test_comparisons_are_limited_and_what_is_not_compared_stays(tmp_path: Path) -> None:
    writer = Writer(8)
    template = writer.text(200)
    texts = [writer.edit(template, 12) for _ in range(60)]  # similar enough to share bands, not to be dropped
    output = run(tmp_path, {"a.jsonl.zst": texts}, num_bands=56, rows_per_band=2, max_comparisons=5)
    counts = read_json(output / "dedup.json")
    assert len(kept(output)) == len(texts)
    assert counts["limited"] > 0
    assert counts["comparisons"] < 60 * 59 / 2


def contents(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and "index" not in path.relative_to(output).parts
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    texts = planted(Writer(9), 600)
    texts += texts[:50]
    return {f"{i}.jsonl.zst": texts[i::3] for i in range(3)}


@pytest.fixture(scope="module")
def reference(corpus: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(run(tmp_path_factory.mktemp("reference"), corpus))


def test_workers_and_memory_change_no_byte(corpus: dict[str, list[str]], reference: dict[str, bytes], tmp_path: Path) -> None:
    assert contents(run(tmp_path, corpus, Execution(num_workers=2), memory_bytes=1 << 20)) == reference


def test_parts_change_no_byte(corpus: dict[str, list[str]], reference: dict[str, bytes], tmp_path: Path) -> None:
    for _ in range(6):
        for part in ("0/2", "1/2"):
            output = run(tmp_path, corpus, Execution(executor="inline", part=part))
        if (output / "dedup.json").is_file():
            break
    assert contents(output) == reference


KILLED = """
import sys
from pathlib import Path
from megagpt.corpus.dedup.config import DedupConfig
from megagpt.corpus.dedup.dedup_documents import dedup_documents
from megagpt.corpus.runner.config import Execution
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dedup_documents(DedupConfig(), sorted(folder.glob("*.jsonl.zst")), folder / "out", Execution(num_workers=1))
"""


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_with_the_same_bytes(
    corpus: dict[str, list[str]], reference: dict[str, bytes], tmp_path: Path
) -> None:
    for name, texts in corpus.items():
        write_documents(tmp_path / name, [Document(f"{name}:{i}", text, "test") for i, text in enumerate(texts)])
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    randomness = random.Random(5)
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)], stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(randomness.uniform(0.5, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    dedup_documents(DedupConfig(), sorted(tmp_path.glob("*.jsonl.zst")), tmp_path / "out", ONE)
    assert contents(tmp_path / "out") == reference


def test_a_full_disk_is_a_clear_error_wherever_it_comes(
    corpus: dict[str, list[str]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, small_disk: SmallDisk
) -> None:
    """A disk that is a little larger at every start: each ends with the error or is the last, and nothing is lost or torn."""
    expected = contents(run(tmp_path_factory.mktemp("whole"), corpus, drop_repeated="lines"))
    for name, texts in corpus.items():
        write_documents(tmp_path / name, [Document(f"{name}:{i}", text, "test") for i, text in enumerate(texts)])
    inputs, output, size, places = [tmp_path / name for name in corpus], small_disk.path / "out", 64, set()
    while True:
        try:
            dedup_documents(DedupConfig(drop_repeated="lines"), inputs, output, ONE)
            break
        except OSError as error:
            places.add((error.errno, Path(str(error.filename)).name))
        size += 48
        small_disk.resize(size)
    assert {code for code, _ in places} == {errno.ENOSPC}
    assert len(places) > 5
    assert contents(output) == expected


def test_an_input_that_changes_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = near_duplicates.plan_partitions
    text = Writer(3).text(300)

    def plan_then_change(*arguments: Any) -> int:
        count = plan(*arguments)
        write_documents(tmp_path / "1.jsonl.zst", [Document(f"1:{i}", "!!!", "test") for i in range(2)])
        return count

    monkeypatch.setattr(near_duplicates, "plan_partitions", plan_then_change)
    with pytest.raises(UserError, match=r"1\.jsonl\.zst: document 0 of block 0 has changed since it was indexed"):
        run(tmp_path, {"1.jsonl.zst": [text, text + " more"]})


def test_a_finished_run_is_not_repeated(corpus: dict[str, list[str]], tmp_path: Path) -> None:
    output = run(tmp_path, corpus)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl.zst")}
    run(tmp_path, corpus)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl.zst")} == times


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    files = {"1.jsonl.zst": ["one text", "another text"]}
    index = run(tmp_path, files) / "index"
    before = sorted(index.rglob("*"))
    (work,) = [path for path in index.iterdir() if path.is_dir()]
    (work / "blocks" / "tmp-99-000000").mkdir()
    (work / "blocks" / "tmp-99-000000" / "keys.u64").write_bytes(b"x")
    (work / ".tmp-kept_by.i64-abc").write_bytes(b"x")
    (work / "runs-abc").mkdir()
    (index / "0123456789abcdef" / "blocks" / "000000").mkdir(parents=True)
    run(tmp_path, files)
    assert sorted(index.rglob("*")) == before


def test_other_settings_are_refused_or_replace(tmp_path: Path) -> None:
    writer = Writer(10)
    a = writer.text()
    files = {"1.jsonl.zst": [a, writer.edit(a, 5)]}
    output = run(tmp_path, files)
    assert len(kept(output)) == 2
    with pytest.raises(UserError, match=r"holds the work of other settings \(dedup.threshold: 0.8 -> 0.5\)"):
        run(tmp_path, files, threshold=0.5)
    assert len(kept(run(tmp_path, files, Execution(executor="inline", overwrite=True), threshold=0.5))) == 1


def test_an_overwrite_that_was_killed_does_not_look_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"1.jsonl.zst": ["one text", "another text"]}
    output = run(tmp_path, files)
    assert (output / "summary.json").is_file()

    def die(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(dedup, "index_block", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, files, Execution(executor="inline", overwrite=True), threshold=0.5)
    assert not (output / "summary.json").exists()
    assert not list(output.glob("*.jsonl.zst"))


def test_a_start_that_was_left_over_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its work another start with other settings begins; then both go on."""
    writer = Writer(10)
    a = writer.text()
    files = {"1.jsonl.zst": [a, writer.edit(a, 5), writer.text()], "2.jsonl.zst": [a, writer.edit(a, 7)]}
    fresh = contents(run(tmp_path / "fresh", files, threshold=0.5))
    index_one, begun = dedup.index_block, []

    def index_block(*arguments: Any) -> int:
        if not begun:
            begun.append(1)
            run(tmp_path, files, Execution(executor="inline", overwrite=True), threshold=0.5)
        return index_one(*arguments)

    monkeypatch.setattr(dedup, "index_block", index_block)
    with pytest.raises(UserError, match="a later start makes something else here"):
        run(tmp_path, files)
    assert contents(tmp_path / "out") == fresh


def test_what_a_left_over_worker_indexed_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with other MinHash settings commits every block of the index before the later start does."""
    texts = planted(Writer(13), 120)
    fresh = contents(run(tmp_path / "fresh", {"1.jsonl.zst": texts}))
    config = DedupConfig(words_per_shingle=1)
    index_one, folders = dedup.index_block, []

    def stop(block: Block, folder: Path, *_: object) -> int:
        folders.append(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dedup, "index_block", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {"1.jsonl.zst": texts}, words_per_shingle=1)

    def after_left_over(block: Block, folder: Path, settings: MinHashSettings) -> int:
        index_one(block, folders[0], config.minhash)
        return index_one(block, folder, settings)

    monkeypatch.setattr(dedup, "index_block", after_left_over)
    output = run(tmp_path, {"1.jsonl.zst": texts}, Execution(executor="inline", overwrite=True))
    assert contents(output) == fresh
    assert not folders[0].exists()


def crawls() -> dict[str, dict[str, list[str]]]:
    """Three crawls, of two files each, with copies inside each and across."""
    texts = planted(Writer(11), 330)
    texts += [texts[i] for i in range(0, 330, 9)] + ["", "?!"]
    random.Random(1).shuffle(texts)
    return {name: {f"{name}{k}.jsonl.zst": texts[2 * i + k :: 6] for k in range(2)} for i, name in enumerate("abc")}


def work_dir(folder: Path, files: Mapping[str, Sequence[str]], **settings: object) -> Path:
    """A corpus with its deduplication where `against` looks for it. The inputs are gone afterwards."""
    inputs = folder / "inputs"
    for name, texts in files.items():
        write_documents(inputs / name, [Document(f"{name}:{i}", text, "test") for i, text in enumerate(texts)])
    config = DedupConfig.model_validate(settings)
    dedup_documents(config, sorted(inputs.iterdir()), folder / "dedup", ONE)
    shutil.rmtree(inputs)
    return folder


def test_new_crawls_are_compared_with_what_was_kept_before(tmp_path: Path) -> None:
    # Taking the crawls one after the other drops what one run over all of them drops.
    files = crawls()
    whole = work_dir(tmp_path / "all", {name: texts for crawl in files.values() for name, texts in crawl.items()})
    a = work_dir(tmp_path / "a", files["a"])
    before = contents(a)
    b = work_dir(tmp_path / "b", files["b"], against=[a])
    c = work_dir(tmp_path / "c", files["c"], against=[a, b])
    assert contents(a) == before
    for crawl in (a, b, c):
        for path in sorted((crawl / "dedup").glob("*.jsonl.zst")):
            assert list(read_documents(path)) == list(read_documents(whole / "dedup" / path.name))
        # A copy of a document that was dropped itself is exact in one run; here only what was kept is known, and it is near.
        found = {(item["dropped"], item["kept"], item["similarity"]) for item in duplicates(crawl / "dedup")}
        assert len(found) > 10
        assert found == {
            (item["dropped"], item["kept"], item["similarity"])
            for item in duplicates(whole / "dedup")
            if item["dropped"][0] == crawl.name
        }
    assert {item["kept"][0] for item in duplicates(c / "dedup")} == {"a", "b", "c"}


def test_lines_of_known_corpora_are_repeated_ones(tmp_path: Path) -> None:
    files = {
        name: {file: [re.sub(r"((?:\S+ ){10})", r"\1\n", text) for text in texts] for file, texts in crawl.items()}
        for name, crawl in crawls().items()
    }
    known: list[Path] = []
    for name in "abc":
        known.append(work_dir(tmp_path / name, files[name], against=known, drop_repeated="lines"))
    outputs = [path for folder in known for path in sorted((folder / "dedup").glob("*.jsonl.zst"))]
    lines = [line for path in outputs for document in read_documents(path) for line in document.text.split("\n")]
    lines = [line for line in lines if slow_words(line)]
    assert len(lines) == len(set(lines))
    every = {line for crawl in files.values() for texts in crawl.values() for text in texts for line in text.split("\n")}
    assert len(every) > len(lines) > 0.6 * len(every)  # lines of near duplicates went with them
    summaries = [read_json(folder / "dedup" / "summary.json") for folder in known]
    assert all(summary["records"]["repeated lines"] > 10 for summary in summaries)


def test_known_documents_that_are_near_to_nothing_new_are_not_read(tmp_path: Path) -> None:
    files = crawls()
    a = work_dir(tmp_path / "a", files["a"], num_bands=56, rows_per_band=2)
    for path in (a / "dedup").glob("*.jsonl.zst"):
        path.write_bytes(bytes(path.stat().st_size))  # what was kept is similar among itself (many bands), but nothing new is
    writer = Writer(99)
    new = {"new.jsonl.zst": [writer.text() for _ in range(20)]}
    b = work_dir(tmp_path / "b", new, against=[a], num_bands=56, rows_per_band=2)
    assert read_json(b / "dedup" / "summary.json")["kept"] == 20


def test_a_known_corpus_has_to_fit(tmp_path: Path) -> None:
    files = crawls()
    a = work_dir(tmp_path / "a", files["a"], num_bands=10)
    with pytest.raises(UserError, match=r"a was deduplicated with num_bands=10, here it is 14"):
        work_dir(tmp_path / "b", files["b"], against=[a])
    with pytest.raises(UserError, match="drop_repeated=None, here it is lines"):
        work_dir(tmp_path / "c", files["b"], against=[a], num_bands=10, drop_repeated="lines")
    with pytest.raises(UserError, match="no finished stage here"):
        work_dir(tmp_path / "d", files["b"], against=[tmp_path / "none"])


@pytest.mark.parametrize(
    ("kind", "texts", "expected", "repeated"),
    [
        (
            "lines",
            ["Menu\nHome 12\n\nA story.\n---", "menu!\n\nHOME 7\n\nAnother story.\n---\nA  stóry", "Home 9\nMenu", "", "---"],
            ["Menu\nHome 12\n\nA story.\n---", "Another story.\n---", "", "---"],
            5,
        ),
        (
            "paragraphs",
            ["One line\nand two.\n\nThe end.", "One line\nand three.\n \nThe end.\n\n\nMore.\n\nMore."],
            ["One line\nand two.\n\nThe end.", "One line\nand three.\n \nMore."],
            2,
        ),
    ],
)
def test_repeated_parts_go(tmp_path: Path, kind: str, texts: list[str], expected: list[str], repeated: int) -> None:
    output = run(tmp_path, {"a.jsonl.zst": texts}, drop_repeated=kind, near=False)
    found = [document.text for path in sorted(output.glob("*.jsonl.zst")) for document in read_documents(path)]
    assert found == expected
    summary = read_json(output / "summary.json")
    assert summary["records"] == {f"repeated {kind}": repeated}
    assert summary["rejected"].get(f"dedup:{kind}", 0) == len(texts) - len(expected)


def test_repeated_lines_in_little_memory_equal_a_slow_version(tmp_path: Path) -> None:
    choose = random.Random(12)
    lines = [" ".join(choose.choices(["tick", "tack", "tock"], k=5)) for _ in range(900)]
    texts = ["\n".join(choose.choices(lines, k=8)) for _ in range(300)]
    files = {f"{k}.jsonl.zst": texts[100 * k : 100 * k + 100] for k in range(3)}
    output = run(tmp_path, files, drop_repeated="lines", near=False, memory_bytes=1 << 20)
    seen: set[str] = set()
    expected = []
    for text in dict.fromkeys(texts):
        left = [line for line in text.split("\n") if not (line in seen or seen.add(line))]
        expected += ["\n".join(left)] if left else []
    assert [document.text for path in sorted(output.glob("*.jsonl.zst")) for document in read_documents(path)] == expected


@pytest.mark.realdata
@pytest.mark.parametrize("count", [100, 1000])
def test_known_pairs_are_found_and_nothing_else(shared_data: Path, tmp_path: Path, count: int) -> None:
    lines = (shared_data / "dedup" / f"articles_{count}.train").read_text(encoding="utf-8").splitlines()
    truth = {frozenset(line.split()) for line in (shared_data / "dedup" / f"articles_{count}.truth").read_text().splitlines()}
    documents = [Document(line.split(" ", 1)[0], line.split(" ", 1)[1], "news") for line in lines]
    write_documents(tmp_path / "a.jsonl.zst", documents)
    dedup_documents(DedupConfig(), [tmp_path / "a.jsonl.zst"], tmp_path / "out", ONE)
    assert {frozenset((found["dropped"], found["kept"])) for found in duplicates(tmp_path / "out")} == truth
