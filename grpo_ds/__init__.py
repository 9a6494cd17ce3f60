"""GRPO for yes/no questions on one small graphics card."""
