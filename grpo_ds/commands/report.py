"""Make a run's report again, or of one that is still going on: DIR/report.html, one page that opens offline."""

import argparse
from pathlib import Path
from typing import NoReturn

from grpo_ds.errors import UsageError
from grpo_ds.system.invocation import command, program


class Parser(argparse.ArgumentParser):
    """Errors as ours are."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nUse: {command('report')} outputs/RUN [--output FILE.html]")


def main(argv: list[str]) -> None:
    parser = Parser(prog=program(), description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the --output_dir of a training run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the page goes; default: DIR/report.html")
    asked = parser.parse_args(argv)
    if asked.output and asked.output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {asked.output} would be a page, so its name must end in .html.")

    from grpo_ds.report.page import WRONG, write_page  # matplotlib, which takes its time

    try:
        print(f"Report: {write_page(asked.folder, asked.output)}")
    except WRONG as error:  # numbers beyond any chart, and what else nobody has thought of
        raise UsageError(f"The run in {asked.folder} cannot be drawn: {type(error).__name__}: {error}"[:300]) from None
    except OSError as error:
        raise UsageError(
            f"The report cannot be written: {error.strerror} ({error.filename}).\n"
            "Name a place that you may write to: --output FILE.html"
        ) from None
