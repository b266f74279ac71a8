"""Python's own manual as a text: the topics of `help()`, which every Python carries along. No network needed.

Topics quote each other ("compound" repeats "if", "while", "for", ...): of some 465,000 characters a fifth is said
twice. Left in, such paragraphs would stand on both sides of the split between training and held-out text. The manual
differs a little between versions of Python; the text's checksum is written in the run's config.json.
"""

import pydoc_data.topics

from data import first_tenths


def text(folder=None):
    """(all topics in alphabetical order, each paragraph once; how many characters train). folder: not needed."""
    seen, kept = set(), []
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        for paragraph in topic.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    whole = "\n\n".join(kept) + "\n"
    return whole, first_tenths(whole)
