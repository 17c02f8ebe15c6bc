"""From captions to tokens: BERT's WordPiece, and captions packed into one tensor (attention.py)."""
import os
import re
from collections import Counter
from dataclasses import dataclass

# the library's threads do not survive the fork of a data loading process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch

from attention import Sequences
from common.script import naming
from pretrained import resolve_file

MAX_TOKENS = 65     # with [CLS] and [SEP]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean_caption(text: str) -> str:
    """Lower-case a caption and replace the punctuation . ! " ( ) * # : ; ~ and runs of spaces by
    a single space, as BLIP does. (The official code also keeps at most 65 words, which MAX_TOKENS
    implies.)"""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split())


@dataclass(frozen=True)
class Captions:
    """P tokenised captions, packed."""
    ids: torch.Tensor       # (N,) int64
    sequences: Sequences    # where each caption starts and ends

    def pin_memory(self):
        """Called by the DataLoader, so that ids are copied to a GPU asynchronously."""
        return Captions(self.ids.pin_memory(), self.sequences)

    def to(self, device):
        return Captions(self.ids.to(device, non_blocking=True), self.sequences.to(device))

    def __len__(self):
        return len(self.sequences)

    def select(self, indices: torch.Tensor) -> "Captions":
        """Repack the captions at `indices` (a CPU tensor; repeats allowed)."""
        device = self.ids.device
        chosen = Sequences.from_lengths(self.sequences.lengths[indices], device)
        starts = self.sequences.first_token_indices[indices.to(device, non_blocking=True)]
        return Captions(self.ids[starts[chosen.sequence_ids] + chosen.position_ids], chosen)

    @staticmethod
    def concatenate(parts: list["Captions"]) -> "Captions":
        """Join captions that are on the CPU."""
        lengths = torch.cat([part.sequences.lengths for part in parts])
        return Captions(torch.cat([part.ids for part in parts]), Sequences.from_lengths(lengths))

    def with_first_token(self, token: int) -> "Captions":
        """The same captions with their first token replaced by the id `token`."""
        first = self.sequences.first_token_indices.long()
        return Captions(self.ids.index_fill(0, first, token), self.sequences)


class Tokenizer:
    """BERT's WordPiece: lower-case, split at spaces and punctuation, then split each word greedily
    into the longest known pieces. Calling it on a caption or a list of captions cleans them,
    truncates them to MAX_TOKENS and returns packed `Captions`: [CLS] pieces [SEP]."""

    def __init__(self, wordpiece: tokenizers.Tokenizer):
        self.wordpiece = wordpiece
        vocabulary = wordpiece.get_vocab()
        missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]") if piece not in vocabulary]
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            missing.append("ids without gaps or repetitions")
        if missing:
            raise ValueError("expected a vocabulary like bert-base-uncased's; it lacks "
                             f"{', '.join(missing)}")
        self.cls_id = vocabulary["[CLS]"]
        self.sep_id = vocabulary["[SEP]"]

    @property
    def vocab_size(self):
        """Number of embeddings the model needs: all word pieces, [DEC] (which only BLIP's caption
        decoder uses) and [ENC] (bert.py)."""
        return self.wordpiece.get_vocab_size() + 2

    def __call__(self, texts: str | list[str]) -> Captions:
        if isinstance(texts, str):
            texts = [texts]
        cleaned = [clean_caption(text) for text in texts]
        ids = []
        lengths = []
        for encoding in self.wordpiece.encode_batch_fast(cleaned, add_special_tokens=False):
            caption = [self.cls_id, *encoding.ids[:MAX_TOKENS - 2], self.sep_id]
            ids.extend(caption)
            lengths.append(len(caption))
        return Captions(torch.tensor(ids), Sequences.from_lengths(lengths))

    def to_json(self):
        return self.wordpiece.to_str()

    @staticmethod
    def from_json(text: str):
        """From the contents of a tokenizer.json. Its padding and truncation are not used: captions
        are packed, and truncated in `__call__`."""
        wordpiece = tokenizers.Tokenizer.from_str(text)
        wordpiece.no_padding()
        wordpiece.no_truncation()
        return Tokenizer(wordpiece)

    @staticmethod
    def from_vocabulary(pieces: list[str]):
        """From the list of word pieces; the index of a piece is its id."""
        ids = {piece: i for i, piece in enumerate(pieces)}
        model = tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
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
        """Build a vocabulary from captions: their 5,000 most frequent words, and all characters,
        so that other words can be spelled. (Unlike the library's trainer, it is deterministic.)"""
        empty = Tokenizer.from_vocabulary(SPECIAL).wordpiece
        counts = Counter()
        for caption in captions:
            text = empty.normalizer.normalize_str(clean_caption(caption))
            for word, _ in empty.pre_tokenizer.pre_tokenize_str(text):
                counts[word] += 1
        letters = sorted(set("".join(counts)))
        inside_words = ["##" + letter for letter in letters]
        by_frequency = sorted(sorted(counts), key=counts.get, reverse=True)
        words = set(by_frequency[:5000]) - set(letters)
        return Tokenizer.from_vocabulary([*SPECIAL, *letters, *inside_words, *sorted(words)])
