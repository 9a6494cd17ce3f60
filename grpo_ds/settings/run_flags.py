"""Flags of the run: adapter, memory, output, safety."""

from dataclasses import dataclass
from typing import ClassVar

from grpo_ds.settings.flags import Flags, failed, flag, list_flag, path_flag
from grpo_ds.settings.paths import absolute_unless

TRACKERS = ("none", "wandb", "tensorboard", "trackio")


@dataclass(frozen=True, kw_only=True)
class AdapterFlags(Flags):
    """A LoRA adapter and its base: docs/lora.md."""

    heading: ClassVar[str] = "adapter"

    lora_r: int = flag(0, "rank of a LoRA adapter on a frozen base; 0: train all parameters")
    lora_alpha: int = flag(32, "the adapter's update is scaled by lora_alpha / lora_r")
    lora_target: str = list_flag("all-linear", "layers with an adapter: all-linear, or names such as q_proj,v_proj")
    load_in_4bit: bool = flag(False, "QLoRA: the frozen base in 4 bits (NF4), about a quarter of its memory")
    load_in_8bit: bool = flag(False, "the frozen base in 8 bits (LLM.int8), about half of its memory")
    merge_adapter: bool = flag(False, "also save base and adapter as one ordinary model, in output_dir/merged")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_target.split(","))

    @property
    def base_bits(self) -> int:
        """Bits per weight of the frozen layers; 16 means the run's own precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    def problems(self) -> list[str]:
        return [
            *failed(
                (self.lora_r < 0, f"lora_r is {self.lora_r}; it must be 0 (no adapter) or more"),
                (self.lora_alpha <= 0, f"lora_alpha is {self.lora_alpha}; it must be more than 0"),
                (not all(self.lora_targets), "lora_target is all-linear or names without spaces: q_proj,v_proj"),
                (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit exclude each other"),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """The memory flag that evaluation needs as well."""

    heading: ClassVar[str] = "memory"

    generation_batch_size: int | None = flag(
        None,
        "completions sampled at once, also in evaluation; default: the most that add nothing to the planned peak",
    )

    def problems(self) -> list[str]:
        rows = self.generation_batch_size
        wrong = f"generation_batch_size is {rows}; it must be 1 or more, or left out: the memory plan chooses"
        return [*failed((rows is not None and rows < 1, wrong)), *super().problems()]


@dataclass(frozen=True, kw_only=True)
class MemoryFlags(SamplingFlags):
    """Memory and speed: docs/memory.md."""

    heading: ClassVar[str] = "memory"

    gradient_checkpointing: bool | None = flag(
        None, "recompute activations in the backward pass; default: on if they do not fit the memory plan"
    )
    pack_tokens: int = flag(0, "tokens per backward; 0: the complete step in one backward, which is fastest")
    logprob_chunk_mib: float = flag(64.0, "MiB that a block of logits and its temporaries may take")
    cuda_graphs: bool = flag(True, "on a GPU, launch all kernels of a sampled token at once")
    plan: bool = flag(False, "print the memory this run would take, phase by phase, and stop")
    gpu_gib: float | None = flag(None, "with plan: GPU memory of another machine in GiB; 0: no GPU, all on the CPU")
    ram_gib: float | None = flag(None, "with plan: RAM of another machine in GiB")
    dry_run_worst_case: bool = flag(False, "first try a step of the longest prompts and completions; changes nothing")
    oom_retry: bool = flag(False, "on one rank, repeat a phase that runs out of memory in smaller parts; same results")

    def problems(self) -> list[str]:
        gpu, ram = self.gpu_gib, self.ram_gib
        return [
            *failed(
                (gpu is not None and gpu < 0, f"gpu_gib is {gpu}; it must be 0 GiB (no GPU) or more"),
                (ram is not None and ram <= 0, f"ram_gib is {ram}; it must be more than 0 GiB"),
                (self.logprob_chunk_mib <= 0, "logprob_chunk_mib must be more than 0"),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class OutputFlags(Flags):
    """Files that a run writes, and the checkpoint that it resumes from."""

    heading: ClassVar[str] = "output"

    output_dir: str | None = path_flag(
        None, "folder of the trained model and its metrics; default: outputs/MODEL-DATE-TIME"
    )
    num_seeds: int = flag(
        1,
        "runs one after another with seed, seed + 1, ..., in output_dir/seed-S, and median and range of their figures",
    )
    save_steps: int = flag(50, "steps between checkpoints (output_dir/checkpoint-N), and one at the end; 0: none")
    save_total_limit: int | None = flag(2, "newest checkpoints to keep, besides the best by eval_steps; null: all")
    eval_steps: int = flag(0, "steps between evaluations during training; 0: only before and after it")
    resume_from_checkpoint: str | None = path_flag(
        None,
        "a checkpoint-N folder, or auto: the newest complete one of output_dir; flags come from it",
        path=absolute_unless("auto"),
    )
    resume_changed_inputs: bool = flag(
        False, "resume although questions, columns, reward files or prompts have changed"
    )
    log_completions: bool = flag(False, "write every completion with its rewards to completions.jsonl and the trackers")
    report_to: str = list_flag(
        "none", f"{TRACKERS[0]}, or some of {','.join(TRACKERS[1:])}; keys are read from the environment only"
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names in report_to, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.report_to.split(",")))

    def problems(self) -> list[str]:
        limit, save, evaluate = self.save_total_limit, self.save_steps, self.eval_steps
        unknown = [name for name in self.trackers if name not in TRACKERS]
        return [
            *failed(
                (self.num_seeds < 1, f"num_seeds is {self.num_seeds}; it must be 1 or more"),
                (save < 0, f"save_steps is {save}; it must be 0 (none) or more"),
                (evaluate < 0, f"eval_steps is {evaluate}; it must be 0 (never) or more"),
                (limit is not None and limit < 1, f"save_total_limit is {limit}; it must be 1 or more, or null: all"),
                (
                    save > 0 and evaluate > 0 and save % evaluate != 0,
                    f"save_steps is {save}; make it a multiple of eval_steps, {evaluate}: "
                    "the best checkpoint must be one that was evaluated",
                ),
                (
                    self.resume_changed_inputs and not self.resume_from_checkpoint,
                    "resume_changed_inputs is for a resumed run: add --resume_from_checkpoint FOLDER",
                ),
                (bool(unknown), f"report_to names {', '.join(unknown)}; available: {', '.join(TRACKERS)}"),
                (
                    "none" in self.trackers and len(self.trackers) > 1,
                    f"report_to is {self.report_to}: none cannot be combined with others",
                ),
            ),
            *super().problems(),
        ]


@dataclass(frozen=True, kw_only=True)
class SafetyFlags(Flags):
    """Checks before and during training."""

    heading: ClassVar[str] = "safety"

    preflight: bool = flag(True, "before the first step, check gradients, log-probs and versions; takes seconds")
    max_bad_steps: int = flag(3, "steps in a row that may be skipped for a number that is not finite; one more stops")
    full_determinism: bool = flag(
        True, "on a GPU, backward passes add in a fixed order; slower, and bit-exact to resume"
    )

    def problems(self) -> list[str]:
        return [*failed((self.max_bad_steps < 0, "max_bad_steps must be 0 or more")), *super().problems()]
