"""Ids that begin and end texts, for tokenizers whose files do not name them: `special_ids.json` beside them.

A tokenizer without that file has no begin-of-text id, and only its end-of-text id ends a text. An import writes the file with
the ids that the imported model was trained with. The fingerprint covers it, because it changes the ids of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.config import UserError
from megagpt.files import read_json, write_json

FILE_NAME = "special_ids.json"


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The ids, and the file that they come from (none or one)."""

    eot_id: int
    """Ends every document of a corpus."""
    eos_ids: tuple[int, ...]
    """Each of them ends a generated text; eot_id is the first."""
    bos_id: int | None = None
    """Begins every document and every prompt; None = there is no such id."""
    files: tuple[Path, ...] = ()


def read_special_ids(folder: Path, eot_id: int, vocab_size: int, bos_id: int | None = None) -> SpecialIds:
    """The special ids of the tokenizer in a folder. eot_id, bos_id: its own, for a folder without special_ids.json.

    Raises UserError naming file and field.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return SpecialIds(eot_id, (eot_id,), bos_id)
    value = read_json(path)
    fields = ("eos_ids", "bos_id")
    if not isinstance(value, dict) or set(value) != set(fields) or not isinstance(value["eos_ids"], list):
        raise UserError(f"{path}: a mapping of eos_ids (a list) and bos_id (a number or null) is expected")
    bos_id, eos_ids = value["bos_id"], value["eos_ids"]
    for name, found in (("bos_id", [] if bos_id is None else [bos_id]), ("eos_ids", eos_ids or [None])):
        for number in found:
            if type(number) is not int or not 0 <= number < vocab_size:
                raise UserError(f"{path}: {name}={number}: an id from 0 to {vocab_size - 1} is expected")
    return SpecialIds(eos_ids[0], tuple(dict.fromkeys(eos_ids)), bos_id, (path,))


def write_special_ids(folder: Path, *, eos_ids: Sequence[int], bos_id: int | None) -> None:
    """Write `special_ids.json` into a folder; the first of `eos_ids` ends documents."""
    write_json(folder / FILE_NAME, {"eos_ids": list(eos_ids), "bos_id": bos_id})
