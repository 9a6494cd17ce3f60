"""`train --plan`: the memory that a run would take, on this machine or another, printed before anything is loaded."""

from dataclasses import replace

from grpo_ds.commands.settle import Settled, check_local, subject_of, tokenizer_is_here
from grpo_ds.memory.plan import MemoryKind
from grpo_ds.task.questions import read_questions
from grpo_ds.terminal import escape_control_chars

WITHOUT_BF16 = "Planned for a card with bf16; a T4, a V100 or an RTX 20xx computes in fp16"
MEASURED_PROMPTS = 200  # of the most characters: among them is the one of the most tokens
PLAN_WIDTH = 120  # columns if the output is not a terminal


def print_plan(settled: Settled, *, of_data: bool = False) -> None:
    """Print the planned memory of each phase, and if it fits: --plan.

    of_data: read --data, and plan for its longest prompt.
    """
    check_local(settled.config, settled.resume_from)
    if of_data:
        settled = planned_for_data(settled)
    from rich.console import Console
    from rich.text import Text

    from grpo_ds.report.memory_plan import component_table, plan_line

    console = Console(width=None if Console().is_terminal else PLAN_WIDTH, highlight=False, soft_wrap=True)
    refuses = f" and refuses {settled.config.ds}, whose masters are bf16" if settled.job.ds.bf16_masters else ""
    another_card = [f"{WITHOUT_BF16}{refuses}."] if settled.config.gpu_gib else []
    for warning in [*settled.warnings, *another_card]:
        console.print(Text(escape_control_chars(warning)))
    kinds: tuple[MemoryKind, ...] = ("gpu", "ram") if settled.gpu_gib else ("ram",)
    for kind in kinds:
        console.print(component_table(settled.plan, f"{settled.config.model}, {settled.config.ds}", kind))
    console.print(Text(escape_control_chars(plan_line(settled.job, settled.plan, settled.gpu_gib, settled.ram_gib))))


def planned_for_data(settled: Settled) -> Settled:
    """Plan for the longest prompt of --data in place of --max_prompt_length, if the tokenizer is on this machine.

    Raises DataError for data that cannot be used.
    """
    config = settled.config
    questions = read_questions(config.data, **config.reading)
    config = replace(config, subject=subject_of(config.subject, config.data, questions))
    if not tokenizer_is_here(config.model):
        line = (
            f"Data: {questions.source}; planned for prompts of {config.max_prompt_length} tokens (--max_prompt_length) "
            f"as the tokenizer of {config.model} is not on this machine."
        )
        return replace(settled, warnings=[*settled.warnings, line])
    from grpo_ds.models.policy import load_tokenizer  # heavy
    from grpo_ds.training.prompt_style import prompt_style

    longest_texts = sorted(questions.questions, key=lambda it: len(it.context) + len(it.text))[-MEASURED_PROMPTS:]
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    longest = max(map(len, prompt_style(config).encode(tokenizer, longest_texts)))
    line = (
        f"Data: {questions.source}; planned for its longest prompt, {longest} tokens "
        f"(--max_prompt_length {config.max_prompt_length})."
    )
    job = replace(settled.job, config=replace(config, max_prompt_length=longest))
    return replace(settled, job=job, plan=job.plan(), warnings=[*settled.warnings, line])
