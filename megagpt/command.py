"""What every tool does around its one library call: help, configuration, errors and the exit status."""

import errno
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from megagpt.config import Config, Failure, UserError, describe, dump, load
from megagpt.shipped import as_installed
from megagpt.terminal import SafeFormatter, safe_text, without_secrets

EXIT_DONE, EXIT_CRASH, EXIT_USER_ERROR, EXIT_STOPPED, EXIT_WATCHDOG = 0, 1, 2, 75, 76
EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ended."""

C = TypeVar("C", bound=Config)


def main(config_class: type[C], run: Callable[[C], int | None], about: str) -> None:
    """Run a tool with the words of the command line and end the process with its exit status.

    `about` is the tool's docstring. Status: 0 done, 2 the user's mistake, 75 stopped on request with a checkpoint saved,
    76 ended by the watchdog, 1 a crash, 141 if nobody reads standard output any more (`| head`, say). `run` may return one of
    these; None is 0.
    """
    try:
        status = run_words(config_class, run, about, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        status = EXIT_BROKEN_PIPE
    sys.exit(status)


def run_words(config_class: type[C], run: Callable[[C], int | None], about: str, words: list[str]) -> int:
    """`main` without the process around it: returns the exit status."""
    options = {word for word in words if word.startswith("--")}
    words = [word for word in words if word not in options]
    unknown = {o for o in options if not o.startswith(("--local_rank", "--local-rank"))} - {"--help", "--debug", "--print"}
    if "--help" in options:
        print(_help(config_class, about))
        return EXIT_DONE
    try:
        if unknown:
            raise UserError(f"no such option: {' '.join(sorted(unknown))} (settings are key=value; see --help)")
        config = load(config_class, words)
        if "--print" in options:
            print(dump(config), end="")
            return EXIT_DONE
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(SafeFormatter("%(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        return run(config) or EXIT_DONE
    except UserError as error:
        return _fail(error, EXIT_USER_ERROR, "--debug" in options)
    except Failure as error:
        return _fail(error, EXIT_CRASH, "--debug" in options)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full while writing {error.filename or 'a file'}: everything committed before is whole;"
            return _fail(OSError(f"{message} free some space and run the same command again"), EXIT_CRASH, "--debug" in options)
        if (
            error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
            and error.filename
        ):
            return _fail(UserError(f"{error.filename}: {error.strerror}"), EXIT_USER_ERROR, "--debug" in options)
        raise
    except KeyboardInterrupt:
        print("interrupted; committed results are complete, and the same command resumes from them", file=sys.stderr)
        return 130


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {safe_text(without_secrets(as_installed(str(error))))}", file=sys.stderr)
    return status


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe without a reader; what is still to be written to it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _help(config_class: type[Config], about: str) -> str:
    rows = describe(config_class)
    width = min(max((len(name) for name, _, _ in rows), default=0), 44)
    lines = [about.strip(), "", "Settings, as `key: value` in a YAML file or key=value here (the latter wins):"]
    lines += [f"  {name:<{width}}  [{default}]  {text}".rstrip() for name, default, text in rows]
    lines += ["", "Options: --help (this text), --print (show the resolved settings and end), --debug (traceback on errors)."]
    return as_installed("\n".join(lines))
