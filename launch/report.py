#!/usr/bin/env python
"""Write the report of a run: the same as `grpo-ds report`; see grpo_ds/commands/report.py."""

from grpo_ds.commands.report import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
