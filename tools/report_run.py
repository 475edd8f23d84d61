"""Write a run's report: one self-contained HTML page with curves, time spent, data funnel, checkpoints and samples.

python tools/report_run.py run_dir=runs/plays
"""

from megagpt.command import main
from megagpt.report.run_report import ReportConfig, report_run


def run(config: ReportConfig) -> None:
    """Write the page, and print its path."""
    print(report_run(config))


if __name__ == "__main__":
    main(ReportConfig, run, __doc__ or "")
