"""How deep a page is as lexbor parses it."""

from selectolax.lexbor import LexborHTMLParser

DEEP = ("<div>", "<g>", "<b>", "<div x='>")
"""Tags that nest when they are repeated."""
MOST = 700
"""How often they are repeated to find a page in which the guard does not see them."""


def parsed_depth(html: bytes) -> int:
    """The number of elements that the last ones of those that DEEP opens are in."""
    depth = 0
    for node in LexborHTMLParser(html).css("div, g, b")[-4:]:
        around, levels = node.parent, 1
        while around is not None:
            around, levels = around.parent, levels + 1
        depth = max(depth, levels)
    return depth
