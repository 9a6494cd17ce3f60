"""run_status.json in a run's folder: the state of the run, for users and for programs that restart runs."""

import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from grpo_ds.system.files import write_whole
from grpo_ds.system.invocation import is_from_python, restart_words

STATUS_FILE = "run_status.json"
CHANGED_INPUTS = "changed_inputs"  # inputs that changed while the run rested (--resume_changed_inputs), a text for each


class RunStatus:
    """Written by rank 0 at every change; after a kill it still has "training" and the pid of a dead process."""

    def __init__(self, folder: Path, *, max_steps: int, speaks: bool = True) -> None:
        self.folder, self.speaks, self.warned = folder, speaks, False
        self.facts: dict[str, object] = {"max_steps": max_steps, "pid": os.getpid(), "host": socket.gethostname()}

    def write(self, state: str, **facts: object) -> None:
        """state: evaluating, training, done, stopped or failed."""
        if not self.speaks:
            return
        self.facts |= facts
        line = {"state": state, **self.facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        file, text = self.folder / STATUS_FILE, json.dumps(line, indent=1) + "\n"
        try:
            write_whole(file, text)
        except OSError as error:  # a full disk must not end the run
            if not self.warned:
                print(f"Warning: {STATUS_FILE} could not be written ({error.strerror}).", file=sys.stderr)
            self.warned = True
            with suppress(OSError):  # the old state is not true any more, and its space may be enough for the new one
                file.unlink()
                write_whole(file, text)


def resume_command(checkpoint: Path, *, trust_remote_code: bool = False) -> str:
    """Return the command that resumes from a checkpoint in any folder, with the launcher that started this process.

    From Python it is a line of Python; data and reward functions are passed again beside the config.
    """
    if is_from_python():
        trusted = ", trust_remote_code=True" if trust_remote_code else ""
        return f"train(TrainConfig(resume_from_checkpoint={str(checkpoint)!r}{trusted}), ...)"
    trust = ["--trust_remote_code"] if trust_remote_code else []  # never read from the checkpoint's flags
    return shlex.join([*restart_words(anywhere=True), "--resume_from_checkpoint", str(checkpoint), *trust])
