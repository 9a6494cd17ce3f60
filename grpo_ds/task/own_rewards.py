"""A user's reward function in TRL's form: the arguments that it takes, and whether it reads texts or messages.

In TRL the data decide: a plain prompt gives completions as texts, a conversation as lists of messages,
`completion[0]["content"]`. Here each function gets what it reads. This is seen from its source; nothing is run.
"""

import ast
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from types import FunctionType
from typing import Any, Literal

from grpo_ds.task.reward_sources import syntax_tree
from grpo_ds.task.rewards import ARGUMENTS, COLUMNS, OwnReward

CompletionFormat = Literal["auto", "text", "messages"]
HELD = {"completions", "prompts"}  # arguments that are texts or lists of messages
MESSAGE_KEYS = {"content", "role"}
# Calls whose items are those of their arguments.
PASSED_ON = {"enumerate", "iter", "list", "reversed", "sorted", "tuple", "zip"}
NAMED = 12  # columns that an error names
Source = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class BadFunction(Exception):
    """A function that cannot be used; the message says why."""


def own_reward(function: Callable[..., Any], columns: Collection[str], form: CompletionFormat = "auto") -> OwnReward:
    """Return the function as it is to be called. columns: of the data, other than COLUMNS. Raises BadFunction."""
    if inspect.isasyncgenfunction(_plain(function)):
        raise BadFunction("it is an async generator; return a list instead of yielding its values")
    messages = {"auto": reads_messages, "text": lambda _: False, "messages": lambda _: True}[form](function)
    return OwnReward(function, _taken(function, (*ARGUMENTS, *COLUMNS, *columns)), messages)


def _taken(function: Callable[..., Any], names: Collection[str]) -> frozenset[str] | None:
    """Return the names among these that the function takes, None for all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return None
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing := [name for name in needed if name not in names]:
        raise BadFunction(_missing(missing, names))
    if by_position := [name for name in needed if name not in by_name]:
        raise BadFunction(f"{', '.join(by_position)} can only be given by position; it is called with keywords")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    if taken := frozenset(names).intersection(by_name):
        return taken
    raise BadFunction("it takes no argument by name; begin it with (completions, **kwargs)")


def columns_read(function: Any) -> frozenset[str] | None:
    """Return the names of the arguments that the function can read; None if this is not seen: it may be any.

    `**kwargs` that its source does not mention, as TRL asks for, reads nothing.
    """
    plain = _plain(function)
    node = _source(plain) if isinstance(plain, FunctionType) and plain is _called(function) else None
    if node is None:
        return None
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    if names & {"locals", "vars", "eval", "exec"} or (node.args.kwarg and node.args.kwarg.arg in names):
        return None
    return frozenset(argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))


def _called(function: Any) -> Any:
    """Return the plain function that a call runs, with its decorators."""
    while isinstance(function, functools.partial):
        function = function.func
    bound = function if inspect.isroutine(function) else type(function).__call__
    return getattr(bound, "__func__", bound)


def _missing(missing: list[str], names: Collection[str]) -> str:
    """Say which columns a function asks for and the data lack, and which there are."""
    like = get_close_matches(missing[0], list(names), 1)
    columns = [name for name in dict.fromkeys(names) if name not in ARGUMENTS]
    shown = ", ".join(columns[:NAMED]) + f" and {len(columns) - NAMED} more" * (len(columns) > NAMED)
    asked = " and ".join(map(repr, missing))
    return f"it asks for {asked}; the data's columns are {shown}{f' (did you mean {like[0]}?)' if like else ''}"


# --- texts or messages ------------------------------------------------------------------------------------------


def reads_messages(function: Any) -> bool:
    """Return True if the function looks up a message's role or content in a completion or a prompt.

    It does if the parameter is annotated with dictionaries, or if its source does so, itself or in a function of the
    same folder that it gives them to. A function whose source cannot be read gets texts.
    """
    plain = _plain(function)
    return _reads_messages(plain, HELD, _folder(plain), set())


def _plain(function: Any) -> Any:
    """Return the function behind partial objects, decorators, methods and objects with `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    if callable(function) and not inspect.isroutine(function):
        function = type(function).__call__
    function = inspect.unwrap(function)
    return getattr(function, "__func__", function)


def _folder(function: Any) -> str:
    return os.path.dirname(function.__code__.co_filename) if isinstance(function, FunctionType) else ""


def _reads_messages(function: Any, names: set[str], folder: str, seen: set[Any]) -> bool:
    """names: variables that hold completions or prompts at the beginning; empty: all parameters."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    annotations = [str(it).lower() for name, it in function.__annotations__.items() if name in HELD]
    if any("dict" in annotation or "mapping" in annotation for annotation in annotations):
        return True
    if _folder(function) != folder or (node := _source(function)) is None:
        return False
    held = _holding(node, names or {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)})
    return any(_looks_up(part, held) for part in ast.walk(node)) or any(
        _reads_messages(_plain(helper), set(), folder, seen) for helper in _helpers(function, node, held)
    )


def _source(function: FunctionType) -> Source | None:
    """Return the syntax tree of the function, found by its line in its file."""
    try:
        lines, _ = inspect.findsource(function)
    except OSError:
        return None
    if (tree := syntax_tree("".join(lines))) is None:
        return None
    first = function.__code__.co_firstlineno
    for node in ast.walk(tree):
        if isinstance(node, Source):
            decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
            if first == min(part.lineno for part in (node, *decorators)):
                return node
    return None


def _holding(node: Source, names: set[str]) -> set[str]:
    """Return these variables and all that get completions, messages or prompts from them."""
    held, before = set(names), 0
    while len(held) > before:
        before = len(held)
        for target, value in _bindings(node):
            if _comes_from(value, held):
                held |= {it.id for it in ast.walk(target) if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store)}
    return held


def _bindings(node: Source) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Yield what is bound in loops, comprehensions and assignments, and to what."""
    for part in ast.walk(node):
        match part:
            case ast.For() | ast.AsyncFor() | ast.comprehension():
                yield part.target, part.iter
            case ast.Assign(value=value) | ast.NamedExpr(value=value) | ast.AnnAssign(value=ast.expr() as value):
                yield part, value
            case ast.Call(args=[ast.Lambda(args=ast.arguments(args=[argument, *_])), given, *_]):  # map, filter
                yield ast.Name(argument.arg, ast.Store()), given


def _comes_from(value: ast.expr, held: Collection[str]) -> bool:
    """True for a held variable, a part of one, or a list or zip of them; not for what another function made of it."""
    match value:
        case ast.Name():
            return value.id in held
        case ast.Subscript():  # also kwargs["completions"]
            key = value.slice.value if isinstance(value.slice, ast.Constant) else None
            return key in HELD or (key not in MESSAGE_KEYS and _comes_from(value.value, held))
        case ast.Starred():
            return _comes_from(value.value, held)
        case ast.Call(func=ast.Name(id=name)) if name in PASSED_ON:
            return any(_comes_from(argument, held) for argument in value.args)
    return False


def _looks_up(part: ast.AST, held: Collection[str]) -> bool:
    """True for completion[0]["content"] and message.get("content")."""
    match part:
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return key in MESSAGE_KEYS and _comes_from(value, held)
        case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[ast.Constant(value=key), *_]):
            return key in MESSAGE_KEYS and _comes_from(value, held)
        case ast.Match() if _comes_from(part.subject, held):  # case [{"content": text}]
            keys = (key for it in ast.walk(part) if isinstance(it, ast.MatchMapping) for key in it.keys)
            return any(isinstance(key, ast.Constant) and key.value in MESSAGE_KEYS for key in keys)
    return False


def _helpers(function: FunctionType, node: Source, held: Collection[str]) -> Iterator[Any]:
    """Functions that get a held variable: called with it, or beside it in a call such as map(helper, completions)."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    scope = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
    owner = scope.get(function.__qualname__.rpartition(".")[0])
    for call in (part for part in ast.walk(node) if isinstance(part, ast.Call)):
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if any(_comes_from(argument, held) for argument in given):
            for callee in (call.func, *given):
                if isinstance(callee, ast.Name):
                    yield scope.get(callee.id)
                elif isinstance(callee, ast.Attribute) and inspect.isclass(owner):
                    yield getattr(owner, callee.attr, None)  # self.helper(completion)
