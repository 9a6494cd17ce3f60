"""Names of files in a run's folder, for writers and readers.

Named elsewhere: run_status.json (status.py), trainer_state.json (progress.py), checkpoint-N (checkpoints.py),
grpo_config.yaml (settings) and bad_batch.json (training/nonfinite.py).
"""

METRICS_FILE = "metrics.jsonl"  # a line per step, and one per evaluation during training
COMPLETIONS_FILE = "completions.jsonl"  # a line per completion, with --log_completions
HELD_OUT_FILE = "held_out.json"  # held-out questions with the answers before and after training
ENVIRONMENT_FILE = "environment.json"  # versions, machine, command
MEMORY_FILE = "memory.json"  # measured and planned memory by phase
TIMELINE_FILE = "memory.svg"  # the same as a picture
SUMMARY_FILE = "summary.json"  # figures of the complete run
REPORT_FILE = "report.html"
RECIPE_FILE, SEEDS_REPORT_FILE = "recipe.yaml", "report.md"  # of --num_seeds, beside summary.json
CARD_FILE = "README.md"  # the model card
MERGED = "merged"  # subfolder: in one folder, transformers would load the adapter on top of the merged model
