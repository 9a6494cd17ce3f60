"""`python -m grpo_ds COMMAND`: the same as `grpo-ds COMMAND`, and usable by launchers."""

from grpo_ds.commands.main import main

if __name__ == "__main__":
    main()
