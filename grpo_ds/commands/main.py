"""`grpo-ds COMMAND ...`: one door to all commands, which imports the one that was asked for and no other."""

import difflib
from importlib import import_module, metadata

from grpo_ds.errors import UsageError, run_script
from grpo_ds.system.invocation import LOCAL_RANK

COMMANDS = {  # name -> its module, what it does
    "train": ("train", "fine-tune a model by GRPO"),
    "eval": ("evaluate", "grade a model's answers"),
    "select": ("select", "which model fits this card and this RAM"),
    "profile": ("profile", "where a run's memory goes"),
    "ask": ("ask", "put questions to a model: one, a file of them, or as you type"),
    "report": ("report", "a run's folder as one page to read"),
    "completion": ("completion", 'what TAB completes: eval "$(grpo-ds completion bash)", or zsh'),
}
USAGE = """\
usage: grpo-ds COMMAND [--flags]

{commands}

grpo-ds COMMAND --help lists a command's flags; grpo-ds --version.
On several cards: deepspeed --module grpo_ds train [--flags]"""


def main() -> None:
    """The console script."""
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
    return UsageError(f"{name} is no command{guess}\nThere are: {', '.join(COMMANDS)}; --help says what they do.")
