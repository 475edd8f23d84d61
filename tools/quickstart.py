"""The whole way from web dump to trained GPT, small: in a few minutes, on two CPU cores, with no other input.

    make quickstart
    python tools/quickstart.py warc=PATH/*.warc.gz wiki=PATH/*.xml.bz2

Makes a web crawl and a wiki dump from the documentation on this machine (or takes yours), then runs the other tools as you do:
extract, filter, deduplicate, train a tokenizer, tokenize, train on two processes with a SIGTERM half-way, evaluate, generate,
report, export, serve. Ends with a table of what was planted in the dumps and what was found, and whether the exported and the
served model write the same text; status 1 if something differs.
"""

from megagpt.command import main
from megagpt.quickstart.run import QuickstartConfig, run_quickstart

if __name__ == "__main__":
    main(QuickstartConfig, run_quickstart, __doc__ or "")
