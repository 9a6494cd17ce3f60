"""Spelling: two texts that Unicode calls equal are one text, however their accents are stored.

"é" is one character or two ("e" and an accent); keyboards, files and tokenizers differ in which. Texts are compared in
the composed form (NFC, Unicode Standard Annex 15); prompts, tokens and the data itself keep theirs.
"""

import re
import unicodedata

# Python's normalize takes quadratic time for marks that are out of order, and no word has so many on one letter: a run
# of them stays as it is (UAX 15 limits them to 30, too). No mark is a \w.
MANY_MARKS = re.compile(r"([^\w\s\x00-\x7f]{32,})")
# A sign of a number, unless a word goes before it: 3.5 is not 35, and -5 is not 5, but COVID-19 is COVID 19.
IN_NUMBER = r"(?<![^\W\d])[.,:/\-\u2013](?=[0-9])"
SIGN = re.compile(rf"(?P<kept>{IN_NUMBER})|(?P<dropped>[.'\u2018\u2019])|[^\w\s]")
MEANT = frozenset("%&#@*\\\u2030\u00a7")  # punctuation to Unicode, and yet C# is not C, nor 50% 50


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


def text_key(text: str) -> str:
    """Return what two spellings of one answer share: case, punctuation and white space do not matter either.

    Full stops and apostrophes vanish, other punctuation parts words: "U.S.A." is "USA", "well-known" is "well known".
    """
    return " ".join(SIGN.sub(_without_punctuation, label_key(text)).split())


def _without_punctuation(sign: re.Match[str]) -> str:
    if sign["kept"] or sign["dropped"]:
        return sign["kept"] or ""
    is_punctuation = unicodedata.category(sign[0]).startswith("P") and sign[0] not in MEANT
    return " " if is_punctuation else sign[0]
