"""What a person types: one module a command, each with a `main(argv)`; launch/ and `grpo-ds` start them."""
