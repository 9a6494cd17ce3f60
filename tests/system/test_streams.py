"""Broken output streams, in processes of their own: a run goes on, and a command whose output is lost says so."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from select import select

import pytest

pytestmark = pytest.mark.faults("output of a command that breaks")

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
from grpo_ds.errors import DataError
from grpo_ds.system.script import run_script
from grpo_ds.system.streams import output_is_optional

def main(argv):
    if "run" in argv:
        output_is_optional()
    if "close" in argv:
        sys.stdout.close()
    for number in range(1 if "short" in argv else 20_000):
        print("a line of output", number, flush="flush" in argv)
    print("the end", file=sys.stderr)
    if "error" in argv:
        raise DataError("bad data")
    if "exit" in argv:
        sys.exit()

run_script(main)
"""
HEAD = "| head -n 1; exit ${PIPESTATUS[0]}"  # gone before all is written: a pipe holds 64 KiB
FULL, CLOSED = "> /dev/full", ">&-"
EVERYTHING = ("2>&1 | head -n 1; exit ${PIPESTATUS[0]}", "> /dev/full 2>&1", "<&- >&- 2>&-")


def shell(words: str, redirect: str, *options: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of the script under bash."""
    command = f'"$0" {" ".join(options)} -c "$1" {words} {redirect}'
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable, SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])  # launchers start python -u
@pytest.mark.parametrize("words", ["run", "run flush", "run exit", "run close"])
def test_a_run_goes_on_and_says_once_on_stderr_that_its_output_is_lost(words, options):
    for redirect, reason in ((HEAD, "Broken pipe"), (FULL, "No space left on device"), (CLOSED, "Bad file descriptor")):
        code, _, err = shell(words, redirect, *options)
        lost, end = err.splitlines()[-2:] if err.endswith("the end\n") else err.splitlines()[::-1]
        assert (code, end) == (0, "the end"), err
        assert lost == f"Standard output cannot be written ({reason}); the run continues."
    for redirect in EVERYTHING:
        assert shell(words, redirect, *options)[0] == 0
        assert shell(f"{words} error", redirect, *options)[0] == 3  # the code of its own end


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", ["ask", "ask flush", "ask exit", "ask short exit"])
def test_a_command_whose_output_is_lost_ends_with_a_code(words, options):
    if "short" not in words:
        code, out, err = shell(words, HEAD, *options)
        assert (code, out, err) == (128 + signal.SIGPIPE, "a line of output 0\n", "")
        assert shell(words, HEAD.replace("|", "2>&1 |"), *options)[0] == 128 + signal.SIGPIPE
    remedies = (FULL, "No space left on device", "Free some"), (CLOSED, "Bad file descriptor", "It was closed")
    for redirect, reason, remedy in remedies:
        code, _, err = shell(words, redirect, *options)
        assert code == 2 and "Traceback" not in err and "ignored" not in err
        assert f"Error: Standard output cannot be written: {reason}." in err and err.count("\n") <= 3
        assert f"\n{remedy}" in err
    assert [shell(words, redirect, *options)[0] for redirect in EVERYTHING[1:]] == [2, 2]


def test_what_is_printed_arrives_complete_and_after_a_library_has_closed_the_stream():
    expected = "".join(f"a line of output {number}\n" for number in range(20_000))
    for words in ("run", "run close", "ask flush"):
        assert shell(words, "") == (0, expected, "the end\n")


def test_a_file_opened_later_does_not_get_the_number_of_a_closed_stream():
    script = "from grpo_ds.system.script import run_script; run_script(lambda argv: exit(open('/dev/null').fileno()))"
    ended = subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script], cwd=ROOT)
    assert ended.returncode > 2


def test_a_terminal_that_another_program_made_non_blocking_gets_everything():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "run"], cwd=ROOT, stdout=writer, stderr=writer)
    while select([], [writer], [], 0)[1]:  # until it is full
        time.sleep(0.01)
    os.close(writer)
    with open(reader) as output:
        assert sum(line.startswith("a line of output") for line in output) == 20_000
    assert process.wait() == 0
