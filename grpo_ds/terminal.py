"""What a terminal would obey, made visible: texts of users, files and models are printed, never executed."""

import re

# Control characters but for line break and tab (ESC begins colours, titles and links; CR overwrites), the marks that
# turn the direction of text, and halves of surrogate pairs, which cannot be printed at all.
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_control_chars(text: str) -> str:
    r"""The text with every such character spelled out: an escape reads as \x1b."""
    return CONTROL_CHARS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
