"""Escape characters that control a terminal, in texts of users, files and models."""

import re

# Control characters except line break and tab (ESC starts colours, titles and links; CR overwrites), the marks that
# change the direction of text, and halves of surrogate pairs, which cannot be printed.
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control_chars(text: str) -> str:
    r"""Replace each of these characters by its code: an escape becomes \x1b."""
    return CONTROL_CHARS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
