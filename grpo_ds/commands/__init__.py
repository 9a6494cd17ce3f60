"""Commands that a user types, one module each with a `main(argv)`; `grpo-ds` and launch/ start them."""
