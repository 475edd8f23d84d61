"""Bytes of dumps to raw records; knows no extraction."""
