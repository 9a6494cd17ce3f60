"""Write the report of a run, finished or not: DIR/report.html, one page that opens offline."""

import argparse
from pathlib import Path
from typing import NoReturn

from grpo_ds.errors import UsageError
from grpo_ds.settings.paths import absolute
from grpo_ds.system.invocation import command, program


class ReportParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nUse: {command('report')} outputs/RUN [--output FILE.html]")


def _path(text: str) -> Path:
    return Path(absolute(text))


def main(argv: list[str]) -> None:
    parser = ReportParser(prog=program(), usage="%(prog)s DIR [options]", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=_path, metavar="DIR", help="the --output_dir of a training run")
    parser.add_argument("--output", type=_path, metavar="FILE", help="file of the page; default: DIR/report.html")
    asked = parser.parse_args(argv)
    if asked.output and asked.output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output {asked.output}: the page is HTML, so the name must end in .html.")

    from grpo_ds.report.page import WRONG, write_page  # imports matplotlib, which is slow

    try:
        print(f"Report: {write_page(asked.folder, asked.output)}")
    except WRONG as error:  # damage that run_files.py does not detect, such as numbers too large for a chart
        raise UsageError(f"The run in {asked.folder} cannot be drawn: {type(error).__name__}: {error}"[:300]) from None
    except OSError as error:
        raise UsageError(
            f"The report cannot be written: {error.strerror} ({error.filename}).\n"
            "Name a file that you may write to: --output FILE.html"
        ) from None
