"""The machine and the process: hardware, ranks, signals, the command that started us, the model hub."""
