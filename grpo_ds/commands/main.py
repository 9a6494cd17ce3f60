"""`grpo-ds COMMAND ...`: entry point of all commands; imports only the typed command."""

import difflib
from importlib import import_module, metadata

from grpo_ds.errors import UsageError
from grpo_ds.system.invocation import LOCAL_RANK
from grpo_ds.system.script import run_script

COMMANDS = {  # name -> module, meaning
    "train": ("train", "fine-tune a model by GRPO"),
    "eval": ("evaluate", "grade a model's answers"),
    "data": ("data", "show how a data file is understood, and its prompts"),
    "select": ("select", "find the model that fits this card and this RAM"),
    "profile": ("profile", "measure a run's memory, phase by phase"),
    "ask": ("ask", "ask a model: one question, a file of questions, or typed questions"),
    "report": ("report", "write one page about a run, from its folder"),
    "completion": ("completion", 'complete flags at TAB: eval "$(grpo-ds completion bash)", or zsh'),
}
USAGE = """\
usage: grpo-ds COMMAND [options]

{commands}

grpo-ds COMMAND --help lists a command's flags; grpo-ds --version.
On several cards: deepspeed --module grpo_ds train [options]"""


def main() -> None:
    """Run as the console script `grpo-ds`."""
    run_script(dispatch)


def dispatch(argv: list[str]) -> None:
    ours = [word for word in argv if word.startswith(LOCAL_RANK)]
    name, *rest = [word for word in argv if word not in ours] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"grpo-ds {metadata.version('grpo_ds')}")
    elif name in COMMANDS:
        import_module(f"grpo_ds.commands.{COMMANDS[name][0]}").main([*ours, *rest])
    else:
        raise unknown(name)


def usage() -> str:
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()))


def unknown(name: str) -> UsageError:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return UsageError(f"{name} is not a command{guess}\nCommands: {', '.join(COMMANDS)}; --help describes them.")
