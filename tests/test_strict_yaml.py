"""What YAML is read, and that nothing in it is lost, hangs or fills the reader."""

import time
from pathlib import Path

import pytest

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, YamlError, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)

REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' comes twice in one section, first in line 1: keep one of them"),
    ("s:\n  x: 1\nt:\n  y: 1\ns:\n  z: 1\n", "line 5: the key 's' comes twice in one section, first in line 1"),
    ("s: {x: 1, x: 1}\n", "line 1: the key 'x' comes twice"),
    ('a: 1\n"a": 2\n', "line 2: the key 'a' comes twice in one section, first in line 1"),
    ("l:\n- {x: 1}\n- x: 1\n  x: 2\n", "line 4: the key 'x' comes twice in one section, first in line 3"),
    (
        "a: &m\n  x: 1\nb:\n  <<: *m\n  x: 2\n",
        "line 5: the key 'x' comes twice in one section, first in line 4 (`<<`, from",
    ),
    (
        "a: &m\n  x: 1\nb:\n  x: 2\n  <<: *m\n",
        "line 5 (`<<`, from line 2): the key 'x' comes twice in one section, first in",
    ),
    ("a: &m\n  x: 1\nb: &n\n  x: 2\nc:\n  <<: [*m, *n]\n", "line 6 (`<<`, from line 4): the key 'x' comes twice"),
    ("a: &m\n  x: 1\nb:\n  <<: *m\n  <<: *m\n", "line 5 (`<<`, from line 2): the key 'x' comes twice"),
    ("a: &m 1\nb: &m 2\n", "line 2: an anchor is defined twice, first in line 1: give it another name"),
    ("a: &m [*m]\n", "line 1: an alias stands inside what it is an alias of"),
    ("a: 1\nb:\n  <<: 3\n", "line 3: `<<` is expected to name a section"),
    ("a: 1\n? [x]\n: 2\n", "line 2: a key is expected to be one word"),
    ("a: [1\n", "line 2: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence, line 1)"),
    ("a: *m\n", "line 1: found undefined alias 'm'"),
    ("a: 1\n---\na: 2\n", "but found another document (expected a single document in the stream, line 1)"),
    ("a: 1\nb: x\0y\n", "line 2: the character U+0000 is not allowed"),
    ('a: 1\nb: "x\\0y"\n', "line 2: the character U+0000 is not allowed"),
    ('a: "\\ud800"\n', "line 1: the character U+D800 is not allowed"),
    ("a: \x1b[2J\n", "line 1: the character U+001B is not allowed"),
    ("a: " + "[" * (MAX_DEPTH + 1), f"line 1: nested deeper than {MAX_DEPTH}"),
    ("[" * 500_000, f"nested deeper than {MAX_DEPTH}"),
    ("{a: " * 200_000, f"nested deeper than {MAX_DEPTH}"),
    ("- " * 400_000, f"nested deeper than {MAX_DEPTH}"),
    ("? " * 400_000, f"nested deeper than {MAX_DEPTH}"),
    ("\n".join(" " * i + "a:" for i in range(500)), f"line {MAX_DEPTH}: nested deeper than {MAX_DEPTH}"),
    ("a" * (MAX_CHARACTERS + 1), "1,000,001 characters, at most 1,000,000 are read"),
    (BOMB, "values, at most 100,000 are read"),
    ("a: " + "9" * 5000, "line 1: a whole number of 5,000 digits, at most 40 are read"),
    ("a: !!int x\n", "a value cannot be read"),
    ("a: !!bool x\n", "a value cannot be read"),
    ("a: !!int ''\n", "a value cannot be read"),
    ("a: !!python/object/apply:os.system [ls]\n", "line 1: the tag tag:yaml.org,2002:python/object/apply:os.system is not"),
    ("a: !!binary eA==\n", "line 1: the tag tag:yaml.org,2002:binary is not allowed"),
    ("a: !x 1\n", "line 1: the tag !x is not allowed"),
    ("a: \t1\n\tb: 2", "line 1: found character '\\t' that cannot start any token"),
    ("%YAML 9.0\n---\na: 1\n", "line 1: found incompatible YAML document"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_refused_in_one_line_with_its_place(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(YamlError) as raised:
        parse_yaml(text)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# nothing\n", None),
        ("a: &m {x: 1}\nb: *m\n", {"a": {"x": 1}, "b": {"x": 1}}),
        ("a: &m {x: 1}\nb: {<<: *m, y: 2}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("a: &m {x: 1}\nb: &n {y: 2}\nc: {<<: [*m, *n]}\n", {"a": {"x": 1}, "b": {"y": 2}, "c": {"x": 1, "y": 2}}),
        ("a: 3e-4\nb: no\nc: 2024-02-30\nd: 0x10\n", {"a": 3e-4, "b": "no", "c": "2024-02-30", "d": 16}),
        ('"\\udcff"', "\udcff"),
        ("x: " + "[" * 30 + "]" * 30, None),
    ],
)
def test_what_is_read(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value or (value is None and text.startswith("x:"))


def test_a_long_configuration_is_read_in_seconds() -> None:
    started = time.process_time()
    assert len(parse_yaml("".join(f"name_{i}: {{path: /data/{i}, weight: 1.0}}\n" for i in range(3000)))) == 3000
    assert time.process_time() - started < 30


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "9" * 5000, "\xff"])
def test_damaged_json_is_one_line_that_names_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"owner\.json: not valid JSON") as raised:
        read_json(path)
    assert len(str(raised.value).splitlines()) == 1
