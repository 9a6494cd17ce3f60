#!/usr/bin/env python
"""Ask a model: the same as `grpo-ds ask`; see grpo_ds/commands/ask.py."""

from grpo_ds.commands.ask import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
