#!/usr/bin/env python
"""Measure a run's memory: the same as `grpo-ds profile`; see grpo_ds/commands/profile.py."""

from grpo_ds.commands.profile import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
