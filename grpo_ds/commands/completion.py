"""What TAB completes after grpo-ds: commands, the flags of each, and the values of flags that have a choice.

Made from the same fields as the command line, once: at a TAB no Python runs. Where nothing fits, files do.
"""

from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

from grpo_ds.commands.ask import QuestionConfig
from grpo_ds.commands.main import COMMANDS
from grpo_ds.commands.select import SelectConfig
from grpo_ds.errors import UsageError
from grpo_ds.models.presets import PRESETS
from grpo_ds.settings.config import TRACKERS, AskConfig, EvaluateConfig, TrainConfig
from grpo_ds.settings.ds_json import SHIPPED
from grpo_ds.task.sources import SAMPLE

CONFIGS: dict[str, type[AskConfig]] = {
    "train": TrainConfig,
    "eval": EvaluateConfig,
    "select": SelectConfig,
    "profile": TrainConfig,
    "ask": QuestionConfig,
}
SHELLS = {
    "bash": "",
    # zsh has bash's way of completing as well, once it is asked for, and upon its own.
    "zsh": "whence compdef > /dev/null || { autoload -U compinit && compinit; }\n"
    "autoload -U +X bashcompinit && bashcompinit\n",
}
SCRIPT = """\
_grpo_ds() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" = 1 ]; then
        words="{commands} --help --version"
    elif [[ $word == -* ]]; then
        case ${{COMP_WORDS[1]}} in
{flags}
        esac
    else
        case $before in
{values}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _grpo_ds grpo-ds"""


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in SHELLS:
        shells = " or ".join(SHELLS)
        raise UsageError(f"grpo-ds completion {shells} prints what that shell evals when it starts, in ~/.bashrc say.")
    flags = {name: ["help", "config", *(knob.name for knob in fields(CONFIGS[name]))] for name in CONFIGS}
    flags["report"] = ["help", "output"]
    lines = {name: " ".join(f"--{flag}" for flag in its) for name, its in flags.items()}
    knobs = {knob.name: knob for config in CONFIGS.values() for knob in fields(config)}
    values = {f"--{name}": " ".join(choices(knob)) for name, knob in knobs.items() if choices(knob)}
    script = SCRIPT.format(
        commands=" ".join(COMMANDS), flags=cases(lines), values=cases({**values, "completion": " ".join(SHELLS)})
    )
    print(SHELLS[argv[0]] + script)


def choices(knob: "Field[Any]") -> list[str]:
    """What the flag may be, as far as that can be listed."""
    if get_origin(knob.type) is Literal:
        return list(get_args(knob.type))
    listed = {
        "model": [*PRESETS, "auto"],
        "data": [SAMPLE],
        "ds": sorted(f"{SHIPPED.name}/{file.name}" for file in SHIPPED.glob("*.json")),
        "report_to": list(TRACKERS),
    }
    return listed.get(knob.name, ["true", "false"] if knob.type in (bool, bool | None) else [])


def cases(words: dict[str, str]) -> str:
    return "\n".join(f'            {pattern}) words="{its}" ;;' for pattern, its in words.items())
