#!/usr/bin/env python
"""Which model fits this card and this RAM: grpo_ds/commands/select.py, also as `grpo-ds select`."""

from grpo_ds.commands.select import main
from grpo_ds.errors import run_script

if __name__ == "__main__":
    run_script(main)
