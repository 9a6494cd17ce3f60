#!/usr/bin/env python
"""Fine-tune a language model by GRPO: the same as `grpo-ds train`; see grpo_ds/commands/train.py."""

from grpo_ds.commands.train import main
from grpo_ds.system.script import run_script

if __name__ == "__main__":
    run_script(main)
