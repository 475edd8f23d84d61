"""Readers: bytes of dumps to raw records. They import no extraction."""
