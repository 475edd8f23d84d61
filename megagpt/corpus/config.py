"""The recipe of a corpus: one YAML file with a section per stage, and where each stage reads and writes under work_dir."""

from pathlib import Path
from typing import Literal, TypeAlias

from megagpt.corpus.dedup.config import DedupConfig
from megagpt.corpus.extraction.config import ExtractConfig
from megagpt.corpus.filters.registry import FilterConfig
from megagpt.corpus.packing.config import TokenizeConfig
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.summary import stage_outputs
from megagpt.files import matching_files
from megagpt.tokenizer.config import TokenizerConfig

Stage: TypeAlias = Literal["extract", "filter", "dedup", "tokenizer", "shards"]

_SECTIONS: dict[Stage, str] = {"shards": "tokenize"}
"""Sections of the config that are not called like their stage."""
_PREVIOUS: dict[Stage, Stage] = {"filter": "extract", "dedup": "filter", "tokenizer": "dedup", "shards": "dedup"}


class CorpusConfig(Execution):
    """One corpus from its dumps to its shards. Every tool of the data half reads its own section of the same file.

    The settings of `Execution` stand at the top and hold for whichever stage is run: `num_workers=8 part=0/4 executor=dask`.
    """

    work_dir: Path
    """Everything is written below it: extract/, filter/, dedup/, tokenizer/, shards/."""
    extract: ExtractConfig | None = None
    """Dumps to text. A corpus that starts from documents has no such section and sets filter.inputs."""
    filter: FilterConfig = FilterConfig()
    """Which documents are good enough, and how their text is rewritten."""
    dedup: DedupConfig = DedupConfig()
    """Which documents are copies of others."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Train a tokenizer on the result."""
    tokenize: TokenizeConfig = TokenizeConfig()
    """Documents to shards of tokens."""

    def directory(self, stage: Stage) -> Path:
        """Where a stage writes."""
        return self.work_dir / stage

    def inputs(self, stage: Stage, given: tuple[str, ...] = ()) -> list[Path]:
        """The document files a stage reads: those that match `given`, else the complete output of the stage before.

        Raises UserError if a pattern matches nothing, or the stage before has not run to its end.
        """
        if given:
            return match_paths(given, f"{_SECTIONS.get(stage, stage)}.inputs")
        return stage_outputs(self.directory(_PREVIOUS[stage]), verify=self.verify)


def match_paths(patterns: tuple[str, ...], field: str) -> list[Path]:
    """The files of paths and globs, sorted, each once. Raises UserError as `matching_files` does."""
    found: set[Path] = set()
    for pattern in patterns:
        found.update(map(Path, matching_files(pattern, field)))
    return sorted(found)
