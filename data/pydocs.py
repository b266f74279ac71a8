"""Python's own manual as a text: the topics of `help()`, which come with every Python. No network needed.

Topics quote each other ("compound" repeats "if", "while", "for", ...): a fifth of some 465,000 characters is
repetition. Repeated paragraphs would be on both sides of the split between training and held-out text. The manual
differs a little between versions of Python; the text's checksum is written to the run's config.json.
"""

import pydoc_data.topics

from data import first_tenths


def text(folder=None):
    """(all topics in alphabetical order, each paragraph once; number of training characters). folder: not needed."""
    seen, kept = set(), []
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        for paragraph in topic.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    whole = "\n\n".join(kept) + "\n"
    return whole, first_tenths(whole)
