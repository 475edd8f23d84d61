"""Formulas of a page as TeX between dollar signs, once each, in place of the elements that draw them.

A formula's source is, in this order: the TeX annotation of MathML, its alttext, KaTeX's annotation, the script of MathJax, the
alt text of a picture of a formula; where there is only presentation MathML, its elements are written as TeX.
"""

from selectolax.lexbor import LexborHTMLParser, LexborNode

_DRAWN = ".MathJax_Preview, .MathJax, .MathJax_Display, .MathJax_SVG, .MathJax_SVG_Display, .MathJax_CHTML"
_PICTURES = "img.latex, img.tex, img.mwe-math-fallback-image-inline, img.mwe-math-fallback-image-display"
_ANY = "math, script[type^='math/tex'], img.latex, img.tex"
_WHOLE = ".katex, .mwe-math-element"
MAX_DEPTH = 40


def replace_formulas(tree: LexborHTMLParser) -> None:
    """Write the formulas of a parsed page as text."""
    if tree.css_first(_ANY) is None:
        return
    for node in tree.css("script[type^='math/tex']"):
        kind = node.attributes.get("type") or ""
        _replace(node, node.text(deep=True) or "", is_display="display" in kind)
    for node in tree.css(_WHOLE):
        if (inner := node.css_first("math")) is not None:
            _replace(node, _tex(inner), is_display=inner.attributes.get("display") == "block")
    for node in tree.css("math"):
        if node.parent is not None:
            _replace(node, _tex(node), is_display=node.attributes.get("display") == "block")
    for node in tree.css(_DRAWN):
        if node.css_first("math") is None and "$" not in (node.text(deep=True) or ""):
            node.decompose()
    for node in tree.css(_PICTURES):
        if node.parent is not None:
            _replace(node, node.attributes.get("alt") or "", is_display=False)


def _replace(node: LexborNode, tex: str, *, is_display: bool) -> None:
    tex = " ".join(tex.split())
    for opening in ("{\\displaystyle ", "{\\textstyle "):
        if tex.startswith(opening) and tex.endswith("}"):
            tex = tex[len(opening) : -1].strip()
    mark = "$$" if is_display else "$"
    node.replace_with(f"{mark}{tex}{mark}" if tex else "")


def _tex(math: LexborNode) -> str:
    annotation = math.css_first("annotation[encoding*='tex' i]")
    if annotation is not None and (text := (annotation.text(deep=True) or "").strip()):
        return text
    return (math.attributes.get("alttext") or "").strip() or _from_presentation(math, 0)


def _from_presentation(node: LexborNode, depth: int) -> str:
    """TeX of an element of presentation MathML."""
    tag = node.tag or ""
    if tag.startswith("annotation"):
        return ""
    children = list(node.iter(include_text=False))
    if not children or depth > MAX_DEPTH:
        return (node.text(deep=True) or "").strip()
    parts = [_from_presentation(child, depth + 1) for child in children]
    match tag, len(parts):
        case ("msup" | "mover", 2):
            return f"{parts[0]}^{_group(parts[1])}"
        case ("msub" | "munder", 2):
            return f"{parts[0]}_{_group(parts[1])}"
        case ("msubsup" | "munderover", 3):
            return f"{parts[0]}_{_group(parts[1])}^{_group(parts[2])}"
        case ("mfrac", 2):
            return f"\\frac{{{parts[0]}}}{{{parts[1]}}}"
        case ("mroot", 2):
            return f"\\sqrt[{parts[1]}]{{{parts[0]}}}"
        case ("msqrt", _):
            return f"\\sqrt{{{''.join(parts)}}}"
        case ("mtable", _):
            return " \\\\ ".join(parts)
        case ("mtr", _):
            return " & ".join(parts)
        case ("mfenced", _):
            return f"{node.attributes.get('open') or '('}{','.join(parts)}{node.attributes.get('close') or ')'}"
    return "".join(parts)


def _group(tex: str) -> str:
    return tex if len(tex) == 1 else f"{{{tex}}}"
