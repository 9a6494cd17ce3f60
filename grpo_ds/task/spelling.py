"""Spelling: two texts that Unicode calls equal are one text, however their accents are stored.

"é" is one character or two ("e" and an accent); keyboards, files and tokenizers differ in which. Texts are compared in
the composed form (NFC, Unicode Standard Annex 15); prompts, tokens and the data itself keep theirs.
"""

import re
import unicodedata

# Python's normalize takes quadratic time for marks that are out of order, and no word has so many on one letter: a run
# of them stays as it is (UAX 15 limits them to 30, too). No mark is a \w.
MANY_MARKS = re.compile(r"([^\w\s\x00-\x7f]{32,})")


def nfc(text: str) -> str:
    """Return the text in the composed form, in time linear in its length."""
    if text.isascii():
        return text
    pieces = MANY_MARKS.split(text)
    pieces[::2] = [unicodedata.normalize("NFC", piece) for piece in pieces[::2]]
    return "".join(pieces)


def label_key(label: str) -> str:
    """Return what two spellings of one label share: case and Unicode's form do not matter."""
    return nfc(nfc(label).casefold())
