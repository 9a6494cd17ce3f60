"""`python -m grpo_ds COMMAND`: as `grpo-ds COMMAND`, also behind a launcher."""

from grpo_ds.commands.main import main

if __name__ == "__main__":
    main()
