"""From captions to tokens: BERT's WordPiece, and captions packed into one tensor (attention.py)."""
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # its threads do not survive a fork

import tokenizers
import torch

from attention import Sequences
from common.script import naming
from pretrained import resolve_file

MAX_WORDS = 65
MAX_TOKENS = 65     # with [CLS] and [SEP]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean_caption(text: str) -> str:
    """Lower-case a caption, replace the punctuation . ! " ( ) * # : ; ~ by spaces and keep the first
    MAX_WORDS words, as BLIP does."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:MAX_WORDS])


@dataclass(frozen=True)
class Captions:
    """P tokenised captions, packed."""
    ids: torch.Tensor       # (N,) int64
    sequences: Sequences    # where each caption starts and ends

    def pin_memory(self):   # called by the DataLoader, so that the copy to a GPU is asynchronous
        return Captions(self.ids.pin_memory(), self.sequences)

    def to(self, device):
        return Captions(self.ids.to(device, non_blocking=True), self.sequences.to(device))

    def __len__(self):
        return len(self.sequences)

    def select(self, indices: torch.Tensor) -> "Captions":
        """Repack the captions at `indices` (a CPU tensor; repeats allowed)."""
        device = self.ids.device
        chosen = Sequences.from_lengths(self.sequences.lengths[indices], device)
        starts = self.sequences.first_token_index[indices.to(device, non_blocking=True)]
        return Captions(self.ids[starts[chosen.sequence_ids] + chosen.position_ids], chosen)

    @staticmethod
    def concatenate(parts) -> "Captions":
        """From pairs of ids and lengths, on the CPU."""
        ids, lengths = map(torch.cat, zip(*parts))
        return Captions(ids, Sequences.from_lengths(lengths))

    def with_first_token(self, token: int) -> "Captions":
        """The same captions with their first token replaced by the id `token`."""
        first = self.sequences.first_token_index.long()
        return Captions(self.ids.index_fill(0, first, token), self.sequences)


class Tokenizer:
    """BERT's WordPiece: lower-case, split at spaces and punctuation, then greedily into the longest
    known pieces. Calling it on a list of captions cleans them, truncates them to MAX_TOKENS and
    returns packed `Captions`: [CLS] pieces [SEP]."""

    def __init__(self, wordpiece: tokenizers.Tokenizer):
        self.wordpiece = wordpiece
        vocabulary = wordpiece.get_vocab()
        missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
        if missing or sorted(vocabulary.values()) != [*range(len(vocabulary))]:
            raise ValueError(f"expected a vocabulary like bert-base-uncased's, without repetitions; missing: "
                             f"{', '.join(missing) or 'some of its ids'}")
        self.cls_id = vocabulary["[CLS]"]
        self.sep_id = vocabulary["[SEP]"]

    @property
    def vocab_size(self):
        """Number of embeddings the model needs: all word pieces, [DEC] and [ENC]."""
        return self.wordpiece.get_vocab_size() + 2

    def __call__(self, texts: list[str]) -> Captions:
        assert not isinstance(texts, str), "expected a list of captions"
        cleaned = [clean_caption(text) for text in texts]
        encoded = self.wordpiece.encode_batch_fast(cleaned, add_special_tokens=False)
        ids = [[self.cls_id, *pieces.ids[:MAX_TOKENS - 2], self.sep_id] for pieces in encoded]
        packed = torch.tensor(list(chain.from_iterable(ids)))
        return Captions(packed, Sequences.from_lengths([*map(len, ids)]))

    def to_json(self):
        return self.wordpiece.to_str()

    @staticmethod
    def from_json(text: str):
        """From the contents of a tokenizer.json. Its padding and truncation are not used: captions are
        packed, and truncated in `__call__`."""
        wordpiece = tokenizers.Tokenizer.from_str(text)
        wordpiece.no_padding()
        wordpiece.no_truncation()
        return Tokenizer(wordpiece)

    @staticmethod
    def from_vocabulary(pieces: list[str]):
        """From the list of word pieces; the index of a piece is its id."""
        model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]",
                                            max_input_chars_per_word=100)
        wordpiece = tokenizers.Tokenizer(model)
        wordpiece.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return Tokenizer(wordpiece)

    @staticmethod
    def load(source: str):
        """From a vocab.txt, a tokenizer.json, a folder containing either, or a hub name."""
        path = resolve_file(source, ("vocab.txt", "tokenizer.json"))
        with naming(path):
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".json":
                return Tokenizer.from_json(text)
            return Tokenizer.from_vocabulary(text.rstrip("\n").split("\n"))

    @staticmethod
    def train(captions: list[str]):
        """Build a vocabulary from captions: their 5,000 most frequent words, and all letters to spell
        the others. (Unlike the library's trainer, it is deterministic.)"""
        empty = Tokenizer.from_vocabulary(SPECIAL).wordpiece
        words = Counter()
        for caption in captions:
            text = empty.normalizer.normalize_str(clean_caption(caption))
            words.update(word for word, _ in empty.pre_tokenizer.pre_tokenize_str(text))
        letters = sorted({letter for word in words for letter in word})
        frequent = sorted(words, key=lambda word: (-words[word], word))[:5000]
        pieces = [*SPECIAL, *letters, *("##" + letter for letter in letters)]
        return Tokenizer.from_vocabulary(pieces + sorted(set(frequent) - set(letters)))
