"""Values of a record: texts, contexts and ids, checked one by one, and described in errors. No files here."""

import json
import re
from math import isfinite, isnan

NO_CONTEXT = "none"  # as the name of the context field: the questions have no context
LONGEST_QUOTE = 40  # characters of a bad value that an error repeats
LONGEST_ID = 200  # characters: errors and reports name a record by its id, on one line
# Signs of damaged files: control characters that are not layout (text read in the wrong code page, an end-of-file
# mark), half a surrogate pair, which JSON can spell but no tokenizer accepts, U+FFFD instead of unreadable bytes.
BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd-\uffff]")
INVISIBLE = "\ufeff\u200b"  # byte order mark and zero-width space: around a text they count as white space


class Unusable(Exception):
    """A field that cannot be used; the message starts with a verb ("is missing")."""


def describe(value: object) -> str:
    """Name a JSON value for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN (a missing value)" if isnan(value) else "infinity"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def quote(value: str) -> str:
    """Quote a value, on one line and shortened to LONGEST_QUOTE characters."""
    return repr(value if len(value) <= LONGEST_QUOTE else value[: LONGEST_QUOTE - 3] + "...")


def json_value(cell: str) -> object:
    """Return the list of texts or objects, or the object, that a table's cell holds as JSON; else the cell's text."""
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    plain = isinstance(value, list) and not all(isinstance(part, str | dict) for part in value)
    return cell if plain or not value else value


def sound_text(value: object) -> str:
    """Return the text without surrounding white space. Raises Unusable if it is empty, invisible or broken."""
    if not isinstance(value, str):
        raise Unusable(f"is {describe(value)}, not a text")
    if broken := BROKEN.search(value):
        raise Unusable(f"holds a broken character, U+{ord(broken[0]):04X}, at position {broken.start()}")
    if not any(character.isprintable() and character != " " for character in value):
        raise Unusable("is empty")
    return value.strip().strip(INVISIBLE).strip()


def context_text(value: object) -> str:
    """Accept a text, or PubMedQA's list of paragraphs (on the hub: in an object); return one paragraph per line."""
    if isinstance(value, dict) and "contexts" in value:
        value = value["contexts"]
    if not isinstance(value, list):
        return sound_text(value)
    wrong = [describe(part) for part in value if not isinstance(part, str)]
    if wrong:
        raise Unusable(f"is a list that holds {wrong[0]}; every part must be a text")
    return sound_text("\n".join(part.strip() for part in value))


def text_or_integer(value: object) -> str:
    """Accept integers too: PMIDs are numbers on the hub, and so are the answers of many data sets."""
    if isinstance(value, float) and isfinite(value):
        raise Unusable(f"is {value}, but a number here must be an integer (1, not 1.0)")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else sound_text(value)


def sound_id(value: object) -> str:
    record_id = text_or_integer(value)
    if len(record_id) > LONGEST_ID or len(record_id.splitlines()) > 1:
        raise Unusable(f"is {quote(record_id)}; it must be one line of at most {LONGEST_ID} characters")
    return record_id
