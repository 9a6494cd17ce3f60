"""A trained model in other programs' hands: its prompt as messages, code for transformers alone, Ollama's Modelfile.

All are made from the settings beside the model, without torch. docs/deploy.md says how they are used.
"""

import json
from dataclasses import fields
from pathlib import Path

from grpo_ds.settings.config import EvaluateConfig
from grpo_ds.settings.saved_config import prompt_recipe
from grpo_ds.task.chat import Messages
from grpo_ds.task.prompts import build_messages
from grpo_ds.task.questions import Question
from grpo_ds.task.records import NO_CONTEXT

CONTEXT, QUESTION = "{context}", "{question}"  # in place of the texts of a question
WITHOUT_PEFT = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
WITH_PEFT = (
    "AutoPeftModelForCausalLM",
    "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
)
ASK = """import torch
{imports}

{texts}
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = {auto}.from_pretrained("THIS_FOLDER")
messages = [
{turns}
]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False){begun}
ids = []  # in pieces, as in training: nothing in your texts is read as a control token
for place, text in [{places}]:
    before, _, prompt = prompt.rpartition(place)
    ids += tokenizer.encode(before, add_special_tokens=False)
    ids += tokenizer.encode(place.partition("{{")[0] + text, add_special_tokens=False, split_special_tokens=True)
ids = torch.tensor([ids + tokenizer.encode(prompt, add_special_tokens=False)])
output = model.generate(ids, attention_mask=torch.ones_like(ids), {options})
print({printed}tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))"""


def transformers_code(folder: Path, *, is_adapter: bool) -> str:
    """Return code that asks the model without this package, and prints the text that `ask` gets."""
    config = _config(folder)
    messages = _messages(config, QUESTION, CONTEXT)
    asked, stop = messages[-1]["content"], config.answer_format.stop
    names = [name for name in (CONTEXT, QUESTION) if name in asked]
    # Tokenizers join a word with the space before it.
    places = [(f" {name}" if f" {name}" in asked else name, name[1:-1]) for name in names]
    opening = json.dumps(config.answer_format.opening, ensure_ascii=False) if config.prefill else ""
    stopped = f", stop_strings=[{json.dumps(stop, ensure_ascii=False)}], tokenizer=tokenizer" if stop else ""
    auto, imports = WITH_PEFT if is_adapter else WITHOUT_PEFT
    turns = [
        f'    {{"role": "{turn["role"]}", "content": {json.dumps(turn["content"], ensure_ascii=False)}}},'
        for turn in messages
    ]
    return ASK.format(
        imports=imports,
        texts="\n".join(f'{name[1:-1]} = "..."' for name in names),
        auto=auto,
        turns="\n".join(turns),
        begun=f" + {opening}" if opening else "",
        places=", ".join(f'("{place}", {name})' for place, name in places),
        options=f"max_new_tokens={config.max_completion_length}, do_sample=False{stopped}",
        printed=f"{opening} + " if opening else "",
    )


def messages_of(folder: Path | str, question: str, context: str = "") -> Messages:
    """Return the chat that asks a question as in training, for a server's `messages`.

    With `prefill` its last turn is the assistant's, which the server must continue.
    """
    config = _config(Path(folder))
    begun = [{"role": "assistant", "content": config.answer_format.opening}] if config.prefill else []
    return [*_messages(config, question, context), *begun]


def modelfile(folder: Path | str, gguf: str = "./run.gguf") -> str:
    """Return Ollama's Modelfile: greedy answers, the prompt's system text and examples, and the text that ends one."""
    config = _config(Path(folder))
    stop = config.answer_format.stop
    *turns, _ = _messages(config, QUESTION, CONTEXT)
    lines = [
        f"FROM {gguf}",
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {config.max_prompt_length + config.max_completion_length}",
        f"PARAMETER num_predict {config.max_completion_length}",
        *([f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}"] if stop else []),
    ]
    for turn in turns:
        text = turn["content"].replace('"""', "'''")
        command = "SYSTEM" if turn["role"] == "system" else f"MESSAGE {turn['role']}"
        lines.append(f'{command} """{text}"""')
    return "\n".join(lines)


def _config(folder: Path) -> EvaluateConfig:
    recipe = prompt_recipe(folder)
    return EvaluateConfig(**{flag.name: recipe[flag.name] for flag in fields(EvaluateConfig) if flag.name in recipe})


def _messages(config: EvaluateConfig, question: str, context: str) -> Messages:
    asked = Question(id="", text=question, context="" if config.context_field == NO_CONTEXT else context, label="")
    return build_messages(
        asked,
        answer_format=config.answer_format,
        few_shot=config.few_shot,
        system_prompt=config.system_prompt_text,
        subject=config.subject or "",
    )
