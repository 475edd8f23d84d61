"""Write a corpus's report: one self-contained HTML page with funnel, reasons, lengths, languages, domains, duplicates, samples.

python tools/report_data.py work_dir=/data/crawl
"""

from megagpt.command import main
from megagpt.report.data_report import DataReportConfig, report_data


def run(config: DataReportConfig) -> None:
    """Write the page, and print its path."""
    print(report_data(config))


if __name__ == "__main__":
    main(DataReportConfig, run, __doc__ or "")
