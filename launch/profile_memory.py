#!/usr/bin/env python
"""Where a run's memory goes: grpo_ds/commands/profile.py, also as `grpo-ds profile`."""

from grpo_ds.commands.profile import main
from grpo_ds.errors import run_script

if __name__ == "__main__":
    run_script(main)
