"""The text of an article from a page's JSON-LD, which some pages have nowhere else."""

import html
import json
import re

_SCRIPT = re.compile(r"<script\b[^<>]*application/ld\+json[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_BLOCK_END = re.compile(r"</(?:p|div|li|h[1-6]|blockquote|tr)>|<br\b[^<>]*>", re.IGNORECASE)
_TYPES = ("Article", "Posting", "Report", "Recipe", "WebPage")
MAX_DEPTH = 8


def article_of_json(page: str) -> str:
    """The longest articleBody (or text of an article) in a page's JSON-LD, paragraphs as lines; "" if there is none."""
    found = ""
    for match in _SCRIPT.finditer(page):
        end = page.find("</", match.end())
        while end >= 0 and page[end + 2 : end + 8].lower() != "script":
            end = page.find("</", end + 2)
        try:
            value = json.loads(page[match.end() : end if end >= 0 else len(page)], strict=False)
        except (ValueError, RecursionError):
            continue
        found = max(found, _longest(value, 0), key=len)
    if _TAG.search(found):
        found = html.unescape(_TAG.sub("", _BLOCK_END.sub("\n", found)))
    return "\n".join(line for line in (" ".join(line.split()) for line in found.splitlines()) if line)


def _longest(value: object, depth: int) -> str:
    if depth > MAX_DEPTH:
        return ""
    if isinstance(value, list):
        return max((_longest(item, depth + 1) for item in value), key=len, default="")
    if not isinstance(value, dict):
        return ""
    types = str(value.get("@type", ""))
    keys = ("articleBody", "reviewBody", *(("text",) if any(name in types for name in _TYPES) else ()))
    own = [text for key in keys if isinstance(text := value.get(key), str)]
    nested = [_longest(item, depth + 1) for item in value.values() if isinstance(item, dict | list)]
    return max([*own, *nested], key=len, default="")
