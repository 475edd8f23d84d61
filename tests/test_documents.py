"""Document files: what is no document is refused by file, line and rule."""

from pathlib import Path

import pytest

from megagpt.config import UserError
from megagpt.documents import Document, read_documents

GOOD = b'{"id": "a:0", "text": "one", "source": "a"}\n'


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"{", "not valid JSON"),
        (b'["a:1", "two", "a"]', "a document is a JSON object"),
        (b"7", "a document is a JSON object"),
        (b'{"id": "a:1", "source": "a"}', "a document needs the field 'text'"),
        (b'{"id": 1, "text": "two", "source": "a"}', "id is a int, text is expected"),
        (b'{"id": "a:1", "text": null, "source": "a"}', "text is a NoneType, text is expected"),
        (b'{"id": "a:1", "text": "two", "source": ["a"]}', "source is a list, text is expected"),
        (b'{"id": "a:1", "text": "two", "source": "a", "url": 3}', "url is text or null, meta an object"),
        (b'{"id": "a:1", "text": "two", "source": "a", "meta": "b"}', "url is text or null, meta an object"),
    ],
)
def test_what_is_no_document_is_named(tmp_path: Path, line: bytes, rule: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n")
    documents = read_documents(path)
    assert next(documents) == Document("a:0", "one", "a")
    with pytest.raises(UserError) as caught:
        next(documents)
    assert str(caught.value).startswith(f"{path}: line 2: {rule}")
