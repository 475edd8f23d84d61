"""Look into documents, shards and the data of a run.

    python tools/inspect_data.py shards=DIR                     statistics
    python tools/inspect_data.py shards=DIR verify=true         check every byte
    python tools/inspect_data.py shards=DIR token=N             which record of which dump a token comes from
    python tools/inspect_data.py shards=DIR sample=N            rows of fine-tuning data, and which tokens are learned
    python tools/inspect_data.py shards=DIR token=N dumps=DIR   and that record's headers
    python tools/inspect_data.py stage=DIR [reason=...]         documents that a stage dropped, with examples
    python tools/inspect_data.py work_dir=DIR url=URL           why a page was kept or dropped
    python tools/inspect_data.py run_dir=DIR                    compare the run's ledger with the shards
    python tools/inspect_data.py run_dir=DIR step=N [rank=R]    which documents were in a batch

Ends with status 2 if something is damaged or does not agree.
"""

import sys

from megagpt.command import main
from megagpt.report.inspect_data import InspectConfig, inspect
from megagpt.report.show_rows import coloured
from megagpt.terminal import safe_text


def run(config: InspectConfig) -> None:
    """Print the findings."""
    for line in inspect(config):
        print(coloured(safe_text(line)) if sys.stdout.isatty() else safe_text(line))


if __name__ == "__main__":
    main(InspectConfig, run, __doc__ or "")
