"""Languages of documents: which one a document was found to be in, and what its script lacks."""

from megagpt.documents import Document

UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz", "wuu", "yue"})
"""Languages written without spaces: rules about the number and the length of words do not apply to them."""


def language_of(document: Document) -> str:
    """The language a document was found to be in; English where no stage has looked."""
    found = document.meta.get("language")
    return found if isinstance(found, str) and found else "en"
