"""The commands that a person types, one module each with a `main(argv)`; started by `grpo-ds` and launch/."""
