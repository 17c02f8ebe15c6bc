"""Find words that are not in a model's vocabulary, so that no part of a query is silently
ignored."""
import functools
import re
import warnings


@functools.cache
def only_spells(tokenizer) -> bool:
    """True for vocabularies built by `Tokenizer.train`, in which all pieces that continue a word
    are single letters."""
    pieces = tokenizer.wordpiece.get_vocab()
    return all(len(piece) == 3 for piece in pieces if piece.startswith("##"))


def known_and_unknown_words(text: str, tokenizer) -> tuple[list[str], list[str]]:
    """The words of a text that are in the vocabulary, without articles, and the words that are not.
    An unknown word becomes [UNK] or is spelled letter by letter, at least its ending ("with ##o ##u
    ##t")."""
    known = []
    unknown = []
    for word in re.findall(r"\w[\w'-]*", text.lower()):
        pieces = tokenizer.wordpiece.encode(word, add_special_tokens=False).tokens
        spelled = len(word) > 1 and all(len(piece.removeprefix("##")) == 1 for piece in pieces)
        ending_spelled = only_spells(tokenizer) and any(piece.startswith("##") for piece in pieces)
        if spelled or ending_spelled or "[UNK]" in pieces:
            unknown.append(word)
        elif word not in ("a", "an", "the"):
            known.append(word)
    return known, unknown


def check_words(texts: str | list[str], tokenizer):
    """Warn about words that are not in the vocabulary. Raises ValueError if a text has no known
    words."""
    if isinstance(texts, str):
        texts = [texts]
    for text in texts:
        known, unknown = known_and_unknown_words(text, tokenizer)
        if not known:
            raise ValueError(f"no word of {text!r} is in the model's vocabulary")
        if unknown:
            warnings.warn(f"not in the model's vocabulary: {', '.join(unknown)}")
