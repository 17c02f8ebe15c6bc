"""Words that a model's vocabulary lacks: they are named, so that no part of a query is ignored silently."""
import difflib
import functools
import re
import warnings


@functools.cache
def only_spells(tokenizer) -> bool:
    """True for vocabularies built by `Tokenizer.train`: pieces that continue a word are single letters."""
    return all(len(piece) == 3 for piece in tokenizer.wordpiece.get_vocab() if piece.startswith("##"))


def known_and_unknown_words(text: str, tokenizer) -> tuple[list[str], list[str]]:
    """The words of a text that are in the vocabulary, articles aside, and those that are not: they become
    [UNK] or spelled out letter by letter, even if only their ending is ("with ##o ##u ##t")."""
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


def vocabulary(tokenizer) -> list[str]:
    """The words of two or more letters that a model knows."""
    return sorted(piece for piece in tokenizer.wordpiece.get_vocab() if piece.isalpha() and len(piece) > 1)


def check_words(texts: list[str], tokenizer):
    """Warn about words that are not in the vocabulary, and suggest similar ones, such as the singular. Raises
    ValueError if a text has no others."""
    for text in texts:
        known, unknown = known_and_unknown_words(text, tokenizer)
        similar = [difflib.get_close_matches(word, vocabulary(tokenizer), 1, 0.66) for word in unknown]
        named = ", ".join(f"{word} (try {others[0]})" if others else word
                          for word, others in zip(unknown, similar))
        if not known:
            raise ValueError(f"no word of {text!r} is in the model's vocabulary: {named or 'no words'}")
        if unknown:
            warnings.warn(f"not in the model's vocabulary: {named}")
