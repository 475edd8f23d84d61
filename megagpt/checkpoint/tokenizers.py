"""The tokenizers of a run: the first one is in run_dir/tokenizer, later ones are beside it under their sha256.

A checkpoint's state.json names the sha256 of its tokenizer (checkpoints of release 0.1 do not: theirs is run_dir/tokenizer).
"""

import shutil
from pathlib import Path

from megagpt.config import UserError
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer

NAME_CHARACTERS = 12


def tokenizer_of(run_dir: Path, sha256: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint of the run. Raises UserError if it is missing or another one."""
    first = run_dir / "tokenizer"
    later = run_dir / f"tokenizer_{sha256[:NAME_CHARACTERS]}" if sha256 else first
    tokenizer = open_tokenizer(later if later.is_dir() else first, saved=True)
    if sha256 is not None and tokenizer.fingerprint != sha256:
        raise UserError(f"{first}: its sha256 {tokenizer.fingerprint} is not that of the checkpoint's tokenizer, {sha256}")
    return tokenizer


def keep_tokenizer(run_dir: Path, tokenizer: Tokenizer) -> Path:
    """Write a tokenizer into the run so that `tokenizer_of` finds it, and no other one is replaced; returns its folder."""
    first = run_dir / "tokenizer"
    try:
        found = open_tokenizer(first, saved=True).fingerprint
    except UserError:  # none yet, or torn by a kill
        found = ""
    if found == tokenizer.fingerprint:
        return first
    used = any((run_dir / "checkpoints").glob("*step_*"))
    folder = run_dir / f"tokenizer_{tokenizer.fingerprint[:NAME_CHARACTERS]}" if found and used else first
    shutil.rmtree(folder, ignore_errors=True)  # what another kind left there would be found first
    tokenizer.save(folder)
    return folder
