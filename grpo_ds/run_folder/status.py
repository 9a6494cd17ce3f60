"""run_status.json in a run's folder: where it stands, for people and for what starts runs again."""

import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path

from grpo_ds.run_folder.checkpoints import write_whole
from grpo_ds.system.invocation import started

STATUS_FILE = "run_status.json"


class RunStatus:
    """Written by rank 0 whenever something changes; a run killed outright leaves "training" and a pid that is gone."""

    def __init__(self, folder: Path, *, max_steps: int, speaks: bool = True) -> None:
        self.folder, self.speaks, self.told = folder, speaks, False
        self.facts: dict[str, object] = {"max_steps": max_steps, "pid": os.getpid(), "host": socket.gethostname()}

    def write(self, state: str, **facts: object) -> None:
        """state: evaluating, training, done, stopped or failed."""
        if not self.speaks:
            return
        self.facts |= facts
        line = {"state": state, **self.facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            write_whole(self.folder / STATUS_FILE, json.dumps(line, indent=1) + "\n")
        except OSError as error:  # a full disk must not end what it cannot describe
            if not self.told:
                print(f"Warning: {STATUS_FILE} could not be written ({error.strerror}).", file=sys.stderr)
            self.told = True


def resume_command(checkpoint: Path, *, trust_remote_code: bool = False) -> str:
    """What a person types to go on from there, with the launcher this process was started by."""
    trust = ["--trust_remote_code"] if trust_remote_code else []  # a checkpoint's own flags do not say it
    return shlex.join([*started(), "--resume_from_checkpoint", str(checkpoint), *trust])
