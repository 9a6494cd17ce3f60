#!/usr/bin/env python
"""Ask a model: grpo_ds/commands/ask.py, also as `grpo-ds ask`."""

from grpo_ds.commands.ask import main
from grpo_ds.errors import run_script

if __name__ == "__main__":
    run_script(main)
