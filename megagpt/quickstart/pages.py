"""The quickstart's text: documentation found on this machine, as pages of headings, paragraphs, lists and code.

Source files are parsed, never imported or run, in an order that depends on their names alone, so one environment always
yields the same pages. No two pages are alike: a page that shares much with the earlier ones is left out, so that the only
copies in the corpus are the planted ones.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from megagpt.corpus.runner.progress import Progress

BlockKind: TypeAlias = Literal["heading", "paragraph", "item", "code"]

PACKAGES = (
    "PIL",
    "anyio",
    "click",
    "dask",
    "datasets",
    "deepspeed",
    "distributed",
    "fontTools",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "mpmath",
    "networkx",
    "numba",
    "numpy",
    "pandas",
    "pip",
    "psutil",
    "pyarrow",
    "pydantic",
    "pygments",
    "requests",
    "setuptools",
    "sympy",
    "torch",
    "tornado",
    "trafilatura",
    "urllib3",
    "wandb",
)
"""Packages among this project's dependencies that document themselves in prose; those not installed are passed over."""

MIN_PROSE_WORDS = 60
MIN_SMALL_WORDS = 0.2
SMALL_WORDS = frozenset(
    {
        "a", "an", "and", "are", "as", "at", "be", "by", "can", "for", "from", "has", "have", "if", "in", "is", "it",
        "not", "of", "on", "or", "that", "the", "this", "to", "was", "when", "with",
    }
)  # fmt: skip
"""English prose holds at least that share of them; lists of names do not."""
MAX_SHARED = 0.25
"""Largest share of a page's word 5-grams that earlier pages may hold: far below what any near-duplicate rule would match."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"})
_ROLE = re.compile(r":[\w:.+-]{1,60}:`~?(?:\.)?([^`<]*[^`<\s])\s*+(?:<[^`>]*+>)?`")
_LINK = re.compile(r"`([^`<]*[^`<\s])\s*+<[^`>]*+>`__?")
_QUOTED = re.compile(r"``?([^`\n]+)``?")
_UNDERLINE = re.compile(r"^([=\-~^*#\"'+])\1{2,}\s*$")
_RULE = re.compile(r"^\s*[+|=\-]{2}[+|=\- ]*$")
_LONG_STRING = re.compile(r'"""[^"]{300}|\'\'\'[^\']{300}')
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of documentation. `name` is dotted and unique ("numpy.linalg.norm")."""

    name: str
    blocks: tuple[tuple[BlockKind, str], ...]

    @property
    def paragraphs(self) -> list[str]:
        """The texts of the paragraphs."""
        return [text for kind, text in self.blocks if kind == "paragraph"]


def gather_pages(num_bytes: int, *, num_workers: int = 2) -> list[Page]:
    """Pages of about `num_bytes` of text in all (fewer if this machine has less), no two of them alike."""
    pages, names, seen, total = [], set(), set(), 0
    with ProcessPoolExecutor(num_workers) as executor, Progress("documentation", num_bytes) as progress:
        # Some files at a time: the machine has far more documentation than is wanted.
        sources = list_sources()
        for start in range(0, len(sources), 80):
            for found in executor.map(read_pages, sources[start : start + 80], chunksize=10):
                for page in found:
                    shingles = word_shingles(page)
                    if page.name in names or len(shingles & seen) > MAX_SHARED * len(shingles):
                        progress.add(0, kept=0, rejected=1)
                        continue
                    pages.append(page)
                    names.add(page.name)
                    seen |= shingles
                    size = sum(len(text.encode()) for _, text in page.blocks)
                    total += size
                    progress.add(size, kept=1, rejected=0)
                    if total >= num_bytes:
                        return pages
    return pages


def list_sources() -> list[tuple[str, Path]]:
    """(dotted name, file) of every Python source and package description to read, in an order fixed by their names."""
    paths = sysconfig.get_paths()
    library, site = Path(paths["stdlib"]), Path(paths["purelib"])
    sources = _python_files(library, library)
    for package in PACKAGES:
        sources += _python_files(site / package, site)
    sources += [(path.parent.name.removesuffix(".dist-info"), path) for path in site.glob("*.dist-info/METADATA")]
    return sorted(sources, key=lambda source: hashlib.sha256(source[0].encode()).digest())


def _python_files(folder: Path, root: Path) -> list[tuple[str, Path]]:
    found = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED_FOLDERS.intersection(parts):
            found.append((".".join(part for part in parts if part != "__init__"), path))
    return found


def read_pages(source: tuple[str, Path]) -> list[Page]:
    """The pages of one file: one per documented module, class or function, or the description of a package."""
    name, path = source
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name == "METADATA":
        # The body of a METADATA file is the package's README.
        documented: Iterator[tuple[str, str]] = iter([(name, message_from_string(text).get_payload())])  # type: ignore[list-item]
    else:
        documented = _docstrings(name, text)
    pages = [Page(title, tuple(parse_blocks(docstring))) for title, docstring in documented]
    return [page for page in pages if is_prose(page)]


def _docstrings(module: str, source: str) -> Iterator[tuple[str, str]]:
    if not _LONG_STRING.search(source):  # to parse a file is slow, and most have nothing to say
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a source's own invalid escape sequences are not this run's business
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other versions of Python lie among the sources
        return
    waiting: list[tuple[str, ast.AST]] = [(module, tree)]
    while waiting:
        name, node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) > 5 * MIN_PROSE_WORDS:
                yield name, docstring
        # Not into functions, and not into expressions, which are most of a tree and hold no documentation.
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            for child in node.body:
                named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                waiting.append((f"{name}.{child.name}" if named else name, child))


def is_prose(page: Page) -> bool:
    """Enough running English text, and mostly that: tables and listings teach a small model little."""
    words = {kind: sum(len(text.split()) for found, text in page.blocks if found == kind) for kind in get_args(BlockKind)}
    prose = [word for kind, text in page.blocks if kind in ("paragraph", "item") for word in text.lower().split()]
    small = sum(word in SMALL_WORDS for word in prose)
    return len(prose) >= max(MIN_PROSE_WORDS, 2 * words["code"]) and small >= MIN_SMALL_WORDS * len(prose)


def word_shingles(page: Page) -> set[int]:
    """Hashes of the page's word 5-grams, code left out. Stable between processes: made of digests."""
    words = [word.lower() for kind, text in page.blocks if kind != "code" for word in _WORD.findall(text)]
    grams = (" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4)))
    return {int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=8).digest()) for gram in grams}


# ---- reStructuredText and Markdown to blocks


def parse_blocks(docstring: str) -> Iterator[tuple[BlockKind, str]]:
    """The blocks of a docstring or README, inline markup removed. What is indented, ruled or starts with >>> is code."""
    in_fence = False
    for part in re.split(r"\n\s*\n", docstring.expandtabs()):
        lines = [line.rstrip() for line in part.split("\n") if line.strip()]
        fences = sum(line.lstrip().startswith("```") for line in lines)
        if in_fence or fences:
            in_fence ^= fences % 2 == 1
            yield "code", "\n".join(line for line in lines if not line.lstrip().startswith("```"))
        elif lines and not lines[0].lstrip().startswith((".. ", "<", "[!", "![")):
            yield from _parse_part(lines)


def _parse_part(lines: list[str]) -> Iterator[tuple[BlockKind, str]]:
    if len(lines) > 1 and _UNDERLINE.match(lines[1].strip()):
        yield "heading", plain(lines[0])
        lines = lines[2:]
    elif lines[0].startswith("#"):
        yield "heading", plain(lines[0].lstrip("# "))
        lines = lines[1:]
    if not lines:
        return
    indents = [len(line) - len(line.lstrip()) for line in lines]
    if lines[0].lstrip().startswith((">>>", "$ ")) or min(indents) >= 4 or any(map(_RULE.match, lines)):
        yield "code", "\n".join(line[min(indents) :] for line in lines)
    elif lines[0].lstrip().startswith(("- ", "* ", "+ ")):
        for item in re.split(r"\n[^\S\n]*+[-*+] ", "\n" + "\n".join(lines))[1:]:
            yield "item", plain(item)
    elif max(indents) > min(indents):
        yield from _parse_definitions(lines, indents)
    else:
        yield "paragraph", plain(" ".join(line.strip() for line in lines))


def _parse_definitions(lines: list[str], indents: list[int]) -> Iterator[tuple[BlockKind, str]]:
    """Lists of parameters: a name with its explanation indented below it, as numpy and Google write them."""
    if indents[0] == min(indents) < min(indents[1:]) and re.fullmatch(r"\w[\w ]*:", lines[0].strip()):
        yield "heading", lines[0].strip(" :")
        lines, indents = lines[1:], indents[1:]
    for item in re.split(rf"\n {{{min(indents)}}}(?! )", "\n" + "\n".join(lines))[1:]:
        name, _, explanation = item.partition("\n")
        name = plain(name)
        yield "item", f"{name}{'' if name.endswith(':') else ':'} {plain(explanation)}" if explanation else name


def plain(text: str) -> str:
    """Text without reStructuredText and Markdown inline markup."""
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    text = re.sub(r"\[([^\[\]]+)\]\([^()]*\)", r"\1", _QUOTED.sub(r"\1", text))
    return " ".join(text.replace("**", "").split()).removesuffix("::")
