#!/usr/bin/env python
"""Find the model that fits this card and this RAM: the same as `grpo-ds select`; see grpo_ds/commands/select.py."""

from grpo_ds.commands.select import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
