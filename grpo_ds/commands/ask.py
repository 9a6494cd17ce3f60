"""Ask a model one question: --model DIR --question TEXT --context TEXT."""

from grpo_ds.command_line import parse
from grpo_ds.config import AskConfig
from grpo_ds.errors import UsageError, one_error
from grpo_ds.machine import check_torch, cpu_has_bf16, gpu_memory_gib, ram_gib
from grpo_ds.models.presets import choose_model
from grpo_ds.task.questions import Question
from grpo_ds.task.records import NO_CONTEXT, Unusable, sound_text
from grpo_ds.terminal import harmless

TEXTS = {"question": "a question that one of the labels answers", "context": "the text to answer it from"}


def main(argv: list[str]) -> None:
    check_torch()
    first = parse(AskConfig, argv, about=__doc__, extra=TEXTS)
    gpu_gib = gpu_memory_gib()
    choice = choose_model(first.config.model, gpu_gib=gpu_gib, ram_gib=ram_gib())
    config = parse(AskConfig, [*argv, "--model", choice.model], about=__doc__, recipe=choice.recipe, extra=TEXTS).config
    needed = TEXTS if config.context_field != NO_CONTEXT else ["question"]
    texts, problems = dict.fromkeys(TEXTS, ""), []
    for name in [name for name in TEXTS if name in needed or first.extra[name]]:
        try:
            texts[name] = sound_text(first.extra[name] or "")
        except Unusable as fault:
            problems.append(f"--{name} {fault}")
    if problems:
        raise one_error(UsageError, "Nothing to answer:", problems)

    from grpo_ds.inference import load_for_asking  # from here on heavy libraries are loaded

    sampler, style = load_for_asking(config, bf16=gpu_gib is not None or cpu_has_bf16())
    question = Question(id="asked", text=texts["question"], context=texts["context"], label="")
    completions = sampler(style.encode(sampler.tokenizer, [question]), group_size=1, temperature=0.0)
    text = style.texts(sampler.tokenizer, completions)[0]
    answer = style.answer_format.parse(text).answer
    reasoning, rest = style.answer_format.split(text)
    answered = answer or f"none in the asked form; the model wrote {rest!r}"
    print(harmless(f"Reasoning: {reasoning}\nAnswer: {answered}"))
