"""A regular-expression matcher with plain backtracking, so that a test can count its steps instead of measuring time.

It supports the part of `re` that the answer parser needs, ignores case, and searches from every position like `re`.
"""

import importlib
import sys

parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def split_counting_steps(pattern, text):
    """Split the text like re.split with one group; return (pieces, number of times that a character was read)."""
    matcher = Matcher(text)
    nodes, pieces, start, place = list(parser.parse(pattern)), [], 0, 0
    while place <= len(text):
        end = matcher.match(nodes, place, lambda at: at)
        if end is None:
            place += 1
        else:
            pieces += [text[start:place], text[place:end]]
            start = place = end
    return [*pieces, text[start:]], matcher.steps


class Matcher:
    """Match nodes of a parsed pattern against `text`. `then(position)` matches the rest; None means no match."""

    def __init__(self, text):
        self.text, self.steps = text, 0

    def match(self, nodes, at, then):
        if not nodes:
            return then(at)
        (op, value), rest = nodes[0], nodes[1:]
        name = str(op)
        if name == "SUBPATTERN":
            return self.match(list(value[-1]) + rest, at, then)
        if name == "BRANCH":
            ends = (self.match(list(branch) + rest, at, then) for branch in value[1])
            return next((end for end in ends if end is not None), None)
        if name == "ASSERT_NOT":
            found = self.match(list(value[1]), at, lambda end: end)
            return self.match(rest, at, then) if found is None else None
        if name == "MAX_REPEAT":
            return self.repeat(*value, rest, at, then)
        return self.match(rest, at + 1, then) if self.fits(op, value, at) else None

    def repeat(self, least, most, inner, rest, at, then):
        """Match a repetition greedily: as many as possible, then one fewer each time."""
        inner = list(inner)
        if most == 1:
            end = self.match(inner + rest, at, then)
            return self.match(rest, at, then) if end is None else end
        assert len(inner) == 1, "only single characters are repeated"
        last = at
        while self.fits(*inner[0], last):
            last += 1
        ends = (self.match(rest, end, then) for end in range(last, at + least - 1, -1))
        return next((end for end in ends if end is not None), None)

    def fits(self, op, value, at):
        self.steps += 1
        return at < len(self.text) and is_one_of(str(op), value, self.text[at])


def is_one_of(name, value, character):
    if name == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return negated != any(is_one_of(str(op), member, character) for op, member in value[negated:])
    if name == "CATEGORY":
        is_space = str(value) == "CATEGORY_SPACE"
        return character.isspace() if is_space else character.isalnum() or character == "_"
    if name == "NOT_LITERAL":
        return character != chr(value)
    assert name == "LITERAL", name
    return character.casefold() == chr(value).casefold()
