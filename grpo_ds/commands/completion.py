"""Print a shell script for TAB completion of grpo-ds: commands, their flags, and values of flags with fixed choices.

The script is made once, from the flags of the command line, so TAB runs no Python. Elsewhere it offers files.
"""

from dataclasses import Field
from typing import Any, Literal, get_args, get_origin

from grpo_ds.commands.ask import QuestionConfig
from grpo_ds.commands.data import DataConfig
from grpo_ds.commands.evaluate import GradingConfig
from grpo_ds.commands.main import COMMANDS
from grpo_ds.commands.select import SelectConfig
from grpo_ds.errors import UsageError
from grpo_ds.models.presets import PRESETS
from grpo_ds.settings.config import AskConfig, TrainConfig
from grpo_ds.settings.flags import all_flags
from grpo_ds.settings.run_flags import TRACKERS
from grpo_ds.settings.shipped import DS_JSONS
from grpo_ds.task.sources import SAMPLE

CONFIGS: dict[str, type[AskConfig]] = {
    "train": TrainConfig,
    "eval": GradingConfig,
    "data": DataConfig,
    "select": SelectConfig,
    "profile": TrainConfig,
    "ask": QuestionConfig,
}
SHELLS = {
    "bash": "",
    # bashcompinit lets zsh use a bash script; it needs zsh's own completion.
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
        raise UsageError(f"grpo-ds completion {shells} prints a script for that shell to eval, e.g. in ~/.bashrc.")
    names = {
        name: ["help", "config", "print_config", *(flag.name for flag in all_flags(CONFIGS[name]))] for name in CONFIGS
    }
    names["report"] = ["help", "output"]
    lines = {command: " ".join(f"--{name}" for name in its) for command, its in names.items()}
    flags = {flag.name: flag for config in CONFIGS.values() for flag in all_flags(config)}
    values = {f"--{name}": " ".join(choices(flag)) for name, flag in flags.items() if choices(flag)}
    script = SCRIPT.format(
        commands=" ".join(COMMANDS), flags=cases(lines), values=cases({**values, "completion": " ".join(SHELLS)})
    )
    print(SHELLS[argv[0]] + script)


def choices(flag: "Field[Any]") -> list[str]:
    """Return the values of the flag, if they can be listed."""
    if get_origin(flag.type) is Literal:
        return list(get_args(flag.type))
    listed = {
        "model": [*PRESETS, "auto"],
        "data": [SAMPLE],
        "ds": DS_JSONS.names(),
        "report_to": list(TRACKERS),
    }
    return listed.get(flag.name, ["true", "false"] if flag.type in (bool, bool | None) else [])


def cases(words: dict[str, str]) -> str:
    """Return the branches of a shell's `case`: pattern -> words."""
    return "\n".join(f'            {pattern}) words="{its}" ;;' for pattern, its in words.items())
