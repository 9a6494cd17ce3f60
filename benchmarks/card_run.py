"""Whole runs of a tiny model: launch/train.py under DeepSpeed's launcher, and again from the checkpoint in the middle.

Prints the steps, seconds and peaks of a combination, and whether the resumed run has the metrics and weights of the
first bit for bit. Ends with 1 if it has not.

    python benchmarks/card_run.py NAME       a name of COMBINATIONS
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, MIDDLE = 4, 2
COMBINATIONS = {
    "zero2.json, int8": ("--reference", "int8"),
    "zero2_gpu.json, bf16-cpu": ("--reference", "bf16-cpu"),
    "zero2_lowram.json, llm.int8": ("--reference", "llm.int8"),
    "zero2.json, LoRA on 4 bits": ("--lora_r", "4", "--load_in_4bit"),
    "zero2_gpu.json, LoRA merged": ("--lora_r", "4", "--merge_adapter"),
    "zero2_lowram.json, LoRA on 8 bits": ("--lora_r", "4", "--load_in_8bit"),
}
SIZES = (
    *("--data", "sample", "--num_steps", f"{STEPS}", "--save_steps", f"{MIDDLE}", "--batch_size", "2"),
    *("--num_generations", "4", "--max_prompt_length", "480", "--max_completion_length", "8", "--eval_limit", "2"),
    *("--learning_rate", "5e-3", "--beta", "0.1", "--reward_funcs", f"{ROOT}/benchmarks/uneven_reward.py:spread"),
)
CLOCKS = ("seconds/", "memory/", "tokens_per_second", "step_time")  # metrics that differ from run to run


def main() -> None:
    figures = run(sys.argv[1])
    print(json.dumps(figures))
    sys.exit(not figures["resumed_bit_for_bit"])


def run(name: str) -> dict[str, Any]:
    from tests.tiny import save_tiny

    json_file = name.partition(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        model, first, resumed = (Path(folder) / part for part in ("model", "first", "resumed"))
        save_tiny(model)
        flags = ["--ds", f"ds_configs/{json_file}", "--model", str(model), *SIZES, *COMBINATIONS[name]]
        seconds = [
            launch([*flags, "--output_dir", str(first)]),
            launch(["--resume_from_checkpoint", str(first / f"checkpoint-{MIDDLE}"), "--output_dir", str(resumed)]),
        ]
        lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {
            "steps": len(lines),
            "seconds": [round(s, 1) for s in seconds],
            "gpu_gib": max(line.get("memory/gpu_peak_gib", 0) for line in lines),
            "ram_gib": max(line["memory/ram_gib"] for line in lines),
            "gradient_norms": [line["grad_norm"] for line in lines],
            **differences(result(first), result(resumed)),
        }


def launch(flags: list[str]) -> float:
    """Run the launcher as a module, as its script may not be installed; return the seconds."""
    from grpo_ds.system.ranks import _free_port

    launcher = ["-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
    started = time.monotonic()
    done = subprocess.run([sys.executable, *launcher, "launch/train.py", *flags], cwd=ROOT, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - started


def result(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the metrics of a run without times and memory, and a hash of each file of its weights."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("merged/*.safetensors"))
    hashes = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in history], hashes


def differences(first: tuple[list[dict], dict], resumed: tuple[list[dict], dict]) -> dict[str, Any]:
    """Return whether two results are equal, and the first step, the metrics and the files that are not."""
    unequal = [(one, two) for one, two in zip(first[0], resumed[0], strict=True) if one != two]
    names = sorted({key for one, two in unequal for key in one.keys() | two.keys() if one.get(key) != two.get(key)})
    files = [name for name in first[1] if first[1][name] != resumed[1].get(name)]
    if not (unequal or files):
        return {"resumed_bit_for_bit": True}
    return {"resumed_bit_for_bit": False, "steps_that_differ": len(unequal), "metrics": names[:8], "files": files}


if __name__ == "__main__":
    main()
