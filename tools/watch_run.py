"""Watch a run from its files: progress, time left, loss, throughput, memory, next save, last events. Needs no GPU, no torch.

    python tools/watch_run.py run_dir=runs/plays              # live, until Ctrl-C or the end of the run
    python tools/watch_run.py run_dir=runs/plays once=true    # printed once
    python tools/watch_run.py runs=runs                       # a table of all runs below a folder

It only reads files, so it can be used on any machine that sees the folder.
"""

from megagpt.command import main
from megagpt.report.watch_run import WatchConfig, watch

if __name__ == "__main__":
    main(WatchConfig, watch, __doc__ or "")
