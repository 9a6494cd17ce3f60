"""Words of the page that not every reader knows, each explained in a line where it stands."""

import re

from markupsafe import Markup, escape

WORDS = {
    "McNemar": "McNemar's test: of the questions whose answer became right or wrong, did more become right than a coin "
    "toss would give? p is the chance of such a difference, or a larger one, if nothing has changed.",
    "KL": "Kullback-Leibler divergence: how far the model has moved away from the one that it began as. 0: not at all.",
    "nats": "Natural units of information: 1 nat is 1.44 bits. A choice between two equally likely words has 0.69.",
    "p(right)": "The probability that the model gives to the right label, whatever it answers in the end.",
    "well-formed": "In the asked form from end to end: reasoning in its tags, one answer in its tags, nothing else.",
    "AUC": "Area under the ROC curve: how often a question of one class has the higher probability of it than one of "
    "another class. A coin toss has 50%.",
}
ANY = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, WORDS))})(?!\w)")


def explained(text: str) -> Markup:
    """Return the text, escaped, with a title on the first occurrence of each of these words.

    Example:
        >>> print(explained("the AUC < 1"))  # doctest: +ELLIPSIS
        the <abbr title="Area under the ROC curve: ...">AUC</abbr> &lt; 1
    """
    seen = set[str]()

    def marked(found: re.Match[str]) -> str:
        word = found[0]
        if word in seen:
            return word
        seen.add(word)
        return f'<abbr title="{escape(WORDS[word])}">{word}</abbr>'

    return Markup(ANY.sub(marked, str(escape(text))))
