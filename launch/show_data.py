#!/usr/bin/env python
"""Show how a data file is understood: the same as `grpo-ds data`; see grpo_ds/commands/data.py."""

from grpo_ds.commands.data import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
