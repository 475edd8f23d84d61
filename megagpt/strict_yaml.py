"""YAML as a configuration needs it: nothing is lost in silence, and no file can hang or fill the reader.

The scalars are those of YAML 1.2. A key that a mapping has twice is an error, whether it is written there or merged into it by
`<<`; so are an anchor that is defined twice, an alias inside itself, and a tag other than those of plain values. Size, nesting
and what aliases expand to have limits.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_CHARACTERS = 1_000_000
"""Longest text that is read; the longest configuration of this project has 6,000."""
MAX_DEPTH = 40
"""Mappings and lists inside each other."""
MAX_VALUES = 100_000
"""Values after aliases have been expanded: ten lines of aliases of aliases stand for billions."""
MAX_DIGITS = 40

_MERGE = "tag:yaml.org,2002:merge"
_TAGS = {_MERGE} | {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_UNUSABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")
"""NUL, and surrogates, but for those that stand for a file name's bytes that are not UTF-8 (PEP 383)."""


class YamlError(Exception):
    """What is wrong with a text, in one line that begins with the line's number."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, None if it is empty. Raises YamlError, whatever the text is."""
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, at most {MAX_CHARACTERS:,} are read")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise YamlError(_in_one_line(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise YamlError(f"line {line}: the character U+{code:04X} is not allowed") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # a tag and a value that do not fit
        raise YamlError(f"a value cannot be read: {error}".replace("\n", " ")) from None


class _Loader(yaml.SafeLoader):
    """`3e-4` is a number, `no`, `on`, `off`, `yes` and dates are text (`no` is Norwegian)."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Composes no deeper than MAX_DEPTH: PyYAML calls itself once per level."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YamlError(f"line {self.peek_event().start_mark.line + 1}: nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _check(root: Node) -> None:
    sizes: dict[int, int] = {}
    _count(root, sizes, set())
    if sizes[id(root)] > MAX_VALUES:
        raise YamlError(f"its aliases stand for {sizes[id(root)]:,} values, at most {MAX_VALUES:,} are read")


def _count(node: Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Check a node and all below it once; returns how many values it stands for."""
    if id(node) in open_nodes:
        raise YamlError(f"line {_line(node)}: an alias stands inside what it is an alias of")
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _TAGS:
        raise YamlError(f"line {_line(node)}: the tag {node.tag} is not allowed")
    children: list[Node] = []
    if isinstance(node, ScalarNode):
        found = _UNUSABLE.search(node.value)
        if found is not None:
            raise YamlError(f"line {_line(node)}: the character U+{ord(found[0]):04X} is not allowed")
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise YamlError(f"line {_line(node)}: a whole number of {len(node.value):,} digits, at most {MAX_DIGITS} are read")
    elif isinstance(node, SequenceNode):
        children = node.value
    elif isinstance(node, MappingNode):
        children = [child for pair in node.value for child in pair]
    open_nodes.add(id(node))
    sizes[id(node)] = 1 + sum(_count(child, sizes, open_nodes) for child in children)
    open_nodes.remove(id(node))
    if isinstance(node, MappingNode):
        _refuse_repeated_keys(node)
    return sizes[id(node)]


def _refuse_repeated_keys(node: MappingNode) -> None:
    first: dict[str, str] = {}
    for key, place in _keys(node):
        if key in first:
            raise YamlError(f"{place}: the key {key!r} comes twice in one section, first in {first[key]}: keep one of them")
        first[key] = place


def _keys(node: MappingNode) -> Iterator[tuple[str, str]]:
    """(key, where it stands) of all keys of a mapping, with those merged into it."""
    for key, value in node.value:
        if key.tag != _MERGE:
            if not isinstance(key, ScalarNode):
                raise YamlError(f"line {_line(key)}: a key is expected to be one word, not a list or a section")
            yield key.value, f"line {_line(key)}"
            continue
        for merged in value.value if isinstance(value, SequenceNode) else [value]:
            if not isinstance(merged, MappingNode):
                raise YamlError(f"line {_line(key)}: `<<` is expected to name a section, or a list of sections")
            for name, place in _keys(merged):
                yield name, f"line {_line(key)} (`<<`, from {place})"


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _in_one_line(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's message without its excerpts of the text."""
    mark, context = error.problem_mark, error.context_mark
    if context is not None and mark is not None and (error.context or "").startswith("found duplicate anchor"):
        return f"line {mark.line + 1}: an anchor is defined twice, first in line {context.line + 1}: give it another name"
    where = f"line {mark.line + 1}: " if mark is not None else ""
    begun = f" ({error.context}, line {context.line + 1})" if context is not None and error.context else ""
    return f"{where}{error.problem}{begun}".replace("\n", " ")
