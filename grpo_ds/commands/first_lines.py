"""The first lines of a run: what was chosen and why, said before the model is loaded."""

from pathlib import Path
from shutil import disk_usage

from grpo_ds.commands.settle import Settled
from grpo_ds.memory.plan import GIB
from grpo_ds.settings.ds_config import DsConfig
from grpo_ds.system.hardware import Precision
from grpo_ds.task.questions import QuestionSet

PRECISIONS: dict[Precision, str] = {  # for the line of the model
    "bf16": "bf16",
    "fp16": "fp16 with a loss scale",
    "fp32": "fp32, as bf16 is off in the JSON or not native to this CPU",
}


def first_lines(
    settled: Settled, questions: QuestionSet, train: int, asked: int, held_out: int, folder: Path
) -> list[str]:
    """Return the lines of a run. train, asked, held_out: numbers of questions; of those held out, `asked` are asked."""
    from grpo_ds.report.memory_plan import plan_line  # rich

    choice, config, ds = settled.choice, settled.config, settled.job.ds
    left_out = ", ".join(f"{count} {label!r} left out" for label, count in questions.left_out.items())
    left_out = f" ({left_out})" if left_out else ""
    some = "" if asked == held_out else f", {asked} of them asked (--eval_limit)"
    per_step = f"{config.batch_size} questions x {config.num_generations} completions of at most"
    return [
        *settled.warnings,
        f"Model: {config.model} ({choice.why}), in {PRECISIONS[ds.precision]}{adapter_line(settled)}",
        f"Data: {questions.source}{left_out}; {train} to train on, {held_out} held out{some}",
        f"Read as: {questions.form}",
        f"Plan: {config.total_steps} steps of {per_step} {config.max_completion_length} tokens; "
        f"learning rate {ds.learning_rate:g}{schedule_words(ds)}, beta {config.beta:g}, seed {config.seed}",
        plan_line(settled.job, settled.plan, settled.gpu_gib, settled.ram_gib),
        *checkpoint_lines(settled, folder),
        f"Output folder: {folder}",
    ]


def schedule_words(ds: DsConfig) -> str:
    """Describe the flags' schedule behind the learning rate; "" for a constant rate or the JSON's schedule."""
    if not ds.schedule:
        return ""
    if ds.warmup_steps >= ds.total_steps:
        return f" (only rising towards it: {ds.warmup_steps} updates of warm-up, and the run has {ds.total_steps})"
    rising = f", after {ds.warmup_steps} updates of warm-up" if ds.warmup_steps else ""
    return f" ({ds.schedule.removesuffix('_with_warmup')}{rising})"


def checkpoint_lines(settled: Settled, folder: Path) -> list[str]:
    """Return a line with the size of the checkpoints, and a warning if the disk is too full for them."""
    config, size = settled.config, settled.plan.checkpoint / GIB
    if not config.save_steps:
        return []
    kept = config.save_total_limit or -(-config.total_steps // config.save_steps)
    free = disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.is_dir())).free / GIB
    each = f"{size:.1f} GiB" if size >= 0.1 else f"{1024 * size:.0f} MiB"
    line = f"Checkpoints: every {config.save_steps} steps and at the end, {each} each, {kept} kept"
    short = f"Warning: during a save they take {(kept + 1) * size:.1f} GiB, but {free:.1f} GiB are free in {folder}."
    return [line, short] if (kept + 1) * size > free else [line]


def adapter_line(settled: Settled) -> str:
    """Describe the adapter for the line of the model: rank, base and number of parameters."""
    config, shape = settled.config, settled.job.shape
    if not config.lora_r:
        return ""
    trained = shape.lora_parameters(config.lora_r, config.lora_targets)
    base = f"a base in {config.base_bits} bits" if config.base_bits < 16 else "a frozen base"
    share = f"{trained / 1e6:.1f} M beside {shape.parameters / 1e6:.0f} M parameters"
    return f"; a LoRA adapter of rank {config.lora_r} on {base}, {share}"
