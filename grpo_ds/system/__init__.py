"""The machine and the process: signals, hardware, ranks, how we were started, the hub's door."""
