"""Write a run's report, or a comparison of runs: one self-contained HTML page, with charts to zoom into.

python tools/report_run.py run_dir=runs/plays                     # curves, time, data funnel, checkpoints, samples
python tools/report_run.py runs='[runs/first, runs/second]'       # curves by step, tokens and time; differences of settings
"""

from megagpt.command import main
from megagpt.report.run_report import ReportConfig, report_run


def run(config: ReportConfig) -> None:
    """Write the page, and print its path."""
    print(report_run(config))


if __name__ == "__main__":
    main(ReportConfig, run, __doc__ or "")
