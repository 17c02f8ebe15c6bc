"""From a caption to tokens, and the text encoder: BERT, which doubles as an image-grounded encoder
(FLIP paper, section 4.1; the design is BLIP's).

    caption -> word pieces -> word + position embeddings -> LayerNorm -> `depth` layers of
        self-attention       each caption attends to itself
        [cross-attention]    in image-grounded mode: the caption attends to one image's tokens
        MLP
    Each sublayer has a residual connection followed by LayerNorm (post-norm; the ViT is pre-norm).

Image-grounded mode is used if image tokens are passed. Both modes share all weights but those of
cross-attention; the first token tells the model its role. The contrastive loss trains [CLS] to
summarise the caption, the matching loss [ENC] to tell whether it fits the image. The two inputs differ
only in the embedding of this first token, and the output at its position is the result.

Captions are packed (attention.py). In each layer an image's keys and values are projected once; the
captions that attend to it are stored contiguously and form one long query sequence.

Departures: the official code pads every caption to 65 tokens, projects an image's keys and values
again for each caption, and drops BERT's token-type embedding. (When loading BERT, the constant type-0
embedding is added to the positions.)

Shapes: see vit.py; N tokens of P captions, which attend to I images of L tokens.
"""
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # its threads do not survive a fork

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention, Sequences
from common.script import naming
from common.weights import resolve_file


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30524     # bert-base-uncased's 30,522 word pieces, then [DEC], then [ENC]
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 512        # max_position_embeddings
    dropout: float = 0.1


# ---- from text to tokens -------------------------------------------------------------------------
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
        self.wordpiece, vocabulary = wordpiece, wordpiece.get_vocab()
        missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
        if missing or sorted(vocabulary.values()) != [*range(len(vocabulary))]:
            raise ValueError(f"expected a vocabulary like bert-base-uncased's, without repetitions; missing: "
                             f"{', '.join(missing) or 'some of its ids'}")
        self.cls_id, self.sep_id = vocabulary["[CLS]"], vocabulary["[SEP]"]

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
        empty, words = Tokenizer.from_vocabulary(SPECIAL).wordpiece, Counter()
        for caption in captions:
            text = empty.normalizer.normalize_str(clean_caption(caption))
            words.update(word for word, _ in empty.pre_tokenizer.pre_tokenize_str(text))
        letters = sorted({letter for word in words for letter in word})
        frequent = sorted(words, key=lambda word: (-words[word], word))[:5000]
        pieces = [*SPECIAL, *letters, *("##" + letter for letter in letters)]
        return Tokenizer.from_vocabulary(pieces + sorted(set(frequent) - set(letters)))


# ---- the encoder ---------------------------------------------------------------------------------
class BertLayer(nn.Module):
    """Self-attention, cross-attention if there are images, and MLP, post-norm."""

    def __init__(self, config: BertConfig, image_width: int):
        super().__init__()
        D = config.width
        self.attention = Attention(D, config.heads, dropout=config.dropout)
        self.norm_attention = nn.LayerNorm(D, eps=1e-12)
        self.cross_attention = Attention(D, config.heads, key_width=image_width, dropout=config.dropout)
        self.norm_cross_attention = nn.LayerNorm(D, eps=1e-12)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)
        self.norm_mlp = nn.LayerNorm(D, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, text, sequences, image_context=None, first_token_only=False):
        """text (N, D) packed -> (N, D); with first_token_only -> (P, D): computes only first tokens; they
        still attend to their whole caption. image_context: (packed image tokens, their Sequences,
        captions_per_image)."""
        x, x_sequences = text, sequences
        if first_token_only:
            x = text.index_select(0, sequences.first_token_index)                           # (P, D)
            x_sequences = Sequences.uniform(len(x), 1, x.device)
        x = self.norm_attention(x + self.dropout(self.attention(x, x_sequences, text, sequences)))
        if image_context is not None:
            image_tokens, image_sequences, captions_per_image = image_context
            grouped = x_sequences       # the captions that attend to one image form one query sequence
            if captions_per_image is not None:
                grouped = x_sequences.merge_groups(captions_per_image)
            cross = self.cross_attention(x, grouped, image_tokens, image_sequences)
            x = self.norm_cross_attention(x + self.dropout(cross))
        return self.norm_mlp(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    def __init__(self, config: BertConfig, image_width: int = 768):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.positions, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BertLayer(config, image_width) for _ in range(config.depth))
        self.init_weights()

    def forward(self, captions: Captions, image_tokens: torch.Tensor | None = None,
                captions_per_image: torch.Tensor | None = None, first_token_only: bool = False):
        """Packed captions -> packed tokens (N, D); with first_token_only, the first token of each
        caption (P, D), and the last layer skips all others.

        image_tokens (I, L, image_width) select image-grounded mode: the first captions_per_image[0]
        captions attend to image 0, the next captions_per_image[1] to image 1, and so on;
        captions_per_image (I,) is a CPU tensor; None means one caption per image."""
        sequences, image_context = captions.sequences, None
        if sequences.max_length > self.config.positions:
            raise ValueError(f"BERT: a caption has {sequences.max_length} tokens, but there are "
                             f"{self.config.positions} positions")
        if image_tokens is not None:
            I, L, _ = image_tokens.shape
            image_sequences = Sequences.uniform(I, L, image_tokens.device)
            image_context = image_tokens.flatten(0, 1), image_sequences, captions_per_image
        x = self.words(captions.ids) + self.positions[sequences.position_ids]               # (N, D)
        x = self.dropout(self.norm(x))
        for layer in self.layers[:-1]:
            x = layer(x, sequences, image_context)
        return self.layers[-1](x, sequences, image_context, first_token_only)

    @property
    def enc_id(self):
        """Id of [ENC], the last embedding. ([DEC], the one before, is for BLIP's caption decoder.)"""
        return self.config.vocab_size - 1

    @torch.no_grad()
    def init_weights(self):
        """Initialise like BERT."""
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
