"""A chat as the question of a record (TRL's `prompt`, `messages`): its turns, the last one the user's."""

from collections.abc import Mapping

from grpo_ds.task.records import Unusable, describe, sound_text

ROLES = ("system", "user", "assistant")


def is_chat(value: object) -> bool:
    """Return True for a list of objects: turns, or what was meant as such."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def chat_turns(value: list[Mapping[str, object]]) -> tuple[Mapping[str, str], ...]:
    """Return the turns, each a role and a text. Raises Unusable if no model could answer them."""
    turns = tuple(_turn(number, turn) for number, turn in enumerate(value, start=1))
    late = [number for number, turn in enumerate(turns, start=1) if turn["role"] == "system" and number > 1]
    if late:
        raise Unusable(f"has a system prompt as turn {late[0]}; it must be the first")
    if turns[-1]["role"] != "user":
        raise Unusable(f"ends with the turn of the {turns[-1]['role']}; the last must be the user's, which is answered")
    return turns


def _turn(number: int, turn: Mapping[str, object]) -> Mapping[str, str]:
    role = turn.get("role")
    if role not in ROLES:
        shown = f"the role {role!r}"[:60] if isinstance(role, str) else f"{describe(role)} as role"
        raise Unusable(f"has {shown} in turn {number}; roles are {', '.join(ROLES)}")
    try:
        return {"role": str(role), "content": sound_text(turn.get("content"))}
    except Unusable as problem:
        raise Unusable(f"has a turn {number} whose content {problem}") from None
