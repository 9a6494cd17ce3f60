"""Text only: questions, prompts, answers, rewards, grading. Standard library, no tensors."""
