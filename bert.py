"""The text encoder: BERT, which doubles as an image-grounded encoder (FLIP paper, section 4.1).

    caption -> word pieces -> word + position embeddings -> LayerNorm -> `depth` layers of
        self-attention       text looks at itself
        [cross-attention]    only in image-grounded mode: text looks at the tokens of one image
        MLP                  each step is added, then normalised ("post-norm", unlike the ViT)

This is BLIP's design. Both modes share all weights but those of cross-attention. They differ in the
first token: [CLS] asks "what does this say?", [ENC] asks "does it say that of this image?", and
what comes out at its place is the answer.

Captions differ in length, so they travel packed, all their tokens in one list, and no layer
computes anything for padding. (Inside attention, where no kernel runs, products want
rectangles: there, and nowhere else, they are padded for a moment; see kernels/attention.py.) An
image's keys and values are projected once, and captions that read it lie side by side, so that
cross-attention takes them for one long sequence.

Departures: the official code pads every caption to 65 tokens, projects an image's keys and values
again for each caption, and drops BERT's token-type embedding; here type 0, which BERT adds to every
token, is folded into the positions on loading.

Shapes: see vit.py; N tokens of P captions, which read I images of L tokens.
Run `python bert.py "a smiling woman"` to see what a sentence becomes.
"""
import argparse
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # data workers are forked, its threads are not

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.script import check_ranges, run_script, short_message
from common.weights import load_bert, resolve_file
from kernels.attention import Sequences
from vit import Attention


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30524     # bert-base-uncased's 30,522 word pieces, then [DEC], then [ENC]
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 512
    dropout: float = 0.1

    def __post_init__(self):
        check_ranges(self, vocab_size=10 ** 7, width=20_000, depth=200, heads=1000, positions=10 ** 5)
        if self.width % self.heads:
            raise ValueError(f"BERT: width {self.width} is not a multiple of the {self.heads} heads")


# ---- from text to tokens -------------------------------------------------------------------------
MAX_WORDS = 65
MAX_TOKENS = 65     # with [CLS] and [SEP]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean_caption(text):
    """Lower case, the punctuation . ! " ( ) * # : ; ~ as spaces, the first words (as BLIP does)."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:MAX_WORDS])


@dataclass(frozen=True)
class Captions:
    """P tokenised captions in one list."""
    ids: torch.Tensor       # (N,) int64
    sequences: Sequences    # where each caption lies

    def pin_memory(self):   # torch's loader asks for it, so that the copy to a GPU need not be waited for
        return Captions(self.ids.pin_memory(), self.sequences)

    def to(self, device):
        return Captions(self.ids.to(device, non_blocking=True), self.sequences.to(device))

    def __len__(self):
        return len(self.sequences)

    def select(self, indices):
        """The captions numbered `indices` (a CPU tensor; repeats allowed), packed again."""
        device = self.ids.device
        chosen = Sequences.from_lengths(self.sequences.lengths[indices], device)
        begins = self.sequences.first_index[indices.to(device, non_blocking=True)]  # where they lie now
        return Captions(self.ids[begins[chosen.sequence_ids] + chosen.position_ids], chosen)

    def with_first_token(self, token):
        """The same captions with `token` for their first token."""
        return Captions(self.ids.index_fill(0, self.sequences.first_index.long(), token), self.sequences)


class Tokenizer:
    """WordPiece as BERT has it: lower case, split at spaces and punctuation, then the longest known
    pieces. A callable from a list of captions to packed `Captions`: [CLS] pieces [SEP], cleaned and
    cut to MAX_TOKENS.
    """

    def __init__(self, wordpiece, source="vocabulary"):
        self.wordpiece = wordpiece
        for token in SPECIAL[:4]:
            if wordpiece.token_to_id(token) is None:
                raise ValueError(f"{source}: the vocabulary has no {token}; expected one like "
                                 f"bert-base-uncased's, with {', '.join(SPECIAL[:4])}")
        self.cls_id, self.sep_id = wordpiece.token_to_id("[CLS]"), wordpiece.token_to_id("[SEP]")
        wordpiece.no_padding()              # a tokenizer.json may ask for both: here captions are packed,
        wordpiece.no_truncation()           # and cut below

    @property
    def vocab_size(self):
        """Number of embeddings that the model needs: the word pieces, then [DEC], then [ENC]."""
        return self.wordpiece.get_vocab_size() + 2

    def split_known(self, text):
        """The words of a text that the vocabulary has, and those that it lacks: they are spelled in
        letters, or not even that."""
        known, unknown = [], []
        for word in re.findall(r"\w[\w'-]*", clean_caption(text)):
            pieces = self.wordpiece.encode(word, add_special_tokens=False).tokens
            spelled = len(word) > 1 and all(len(piece.removeprefix("##")) == 1 for piece in pieces)
            (unknown if spelled or "[UNK]" in pieces else known).append(word)
        return known, unknown

    def __call__(self, texts):
        if isinstance(texts, str):
            raise ValueError(f"the tokenizer expects a list of captions, found a text: {texts[:60]!r}")
        cleaned = [clean_caption(text) for text in texts]
        encoded = self.wordpiece.encode_batch(cleaned, add_special_tokens=False)
        ids = [[self.cls_id, *pieces.ids[:MAX_TOKENS - 2], self.sep_id] for pieces in encoded]
        return Captions(torch.tensor(list(chain.from_iterable(ids))), Sequences.from_lengths([*map(len, ids)]))

    def pieces(self, captions):
        """The pieces of packed captions as text, for people to read."""
        return [self.wordpiece.id_to_token(i) for i in captions.ids.tolist()]

    def to_json(self):
        return self.wordpiece.to_str()

    @staticmethod
    def from_json(text, source="vocabulary"):
        try:
            wordpiece = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(f"{source}: not a tokenizer.json: {short_message(error)}") from error
        return Tokenizer(wordpiece, source)

    @staticmethod
    def from_vocabulary(pieces, source="vocabulary"):
        """From the list of word pieces, ids in its order."""
        if len(set(pieces)) < len(pieces):
            piece, count = Counter(pieces).most_common(1)[0]
            raise ValueError(f"{source}: lists {piece!r} {count} times, expected every piece once")
        model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]",
                                            max_input_chars_per_word=100)
        wordpiece = tokenizers.Tokenizer(model)
        wordpiece.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return Tokenizer(wordpiece, source)

    @staticmethod
    def load(source):
        """From a vocab.txt, a tokenizer.json, a folder that holds one of them, or a hub name."""
        path = resolve_file(source, ("vocab.txt", "tokenizer.json"))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a vocabulary (not UTF-8 text)") from error
        if path.suffix == ".json":
            return Tokenizer.from_json(text, str(path))
        return Tokenizer.from_vocabulary(text.splitlines(), str(path))

    @staticmethod
    def train(captions):
        """A vocabulary from captions of one's own: their most frequent words, and the letters to
        spell all others with.

        (The library's WordPiece trainer breaks ties by chance; this one gives the same every time.)
        """
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
    """Self-attention, cross-attention when there are images, MLP; each added, then normalised."""

    def __init__(self, config, image_width):
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
        """text (N, D) packed -> (N, D); with first_token_only -> (P, D), computed for the first token of
        each caption alone (it still looks at the whole caption). image_context: (packed image
        tokens, their Sequences, how many captions read each)."""
        x, x_sequences = text, sequences
        if first_token_only:
            x = text.index_select(0, sequences.first_index)                                 # (P, D)
            x_sequences = Sequences.uniform(len(x), 1, x.device)
        x = self.norm_attention(x + self.dropout(self.attention(x, x_sequences, text, sequences)))
        if image_context is not None:
            image_tokens, image_sequences, captions_per_image = image_context
            # captions that read one image, as one sequence
            grouped = x_sequences if captions_per_image is None else x_sequences.merge_groups(captions_per_image)
            cross = self.cross_attention(x, grouped, image_tokens, image_sequences)
            x = self.norm_cross_attention(x + self.dropout(cross))
        return self.norm_mlp(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    def __init__(self, config, image_width=768):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.positions, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(BertLayer(config, image_width) for _ in range(config.depth))
        self.init_weights()

    def forward(self, captions, image_tokens=None, captions_per_image=None, first_token_only=False):
        """Packed captions -> packed tokens (N, D), or (P, D) with first_token_only: each caption's first
        token, for which the last layer computes nothing else.

        image_tokens (I, L, image_width) switches to image-grounded mode: the first readers[0]
        captions read image 0, the next readers[1] read image 1, and so on; readers: (I,), on the
        CPU (None: one each).
        """
        sequences, image_context = captions.sequences, None
        if sequences.max_length > self.config.positions:
            raise ValueError(f"BERT: a caption of {sequences.max_length} tokens, but there are "
                             f"{self.config.positions} positions")
        if image_tokens is not None:
            I, L, _ = image_tokens.shape
            image_context = image_tokens.flatten(0, 1), Sequences.uniform(I, L, image_tokens.device), captions_per_image
        x = self.words(captions.ids) + self.positions[sequences.position_ids]               # (N, D)
        x = self.dropout(self.norm(x))
        for layer in self.layers[:-1]:
            x = layer(x, sequences, image_context)
        return self.layers[-1](x, sequences, image_context, first_token_only)

    @property
    def enc_id(self):
        """Id of [ENC], the last one; [DEC], which only captioning would use, lies before it."""
        return self.config.vocab_size - 1

    @torch.no_grad()
    def init_weights(self):
        """BERT's initial values."""
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


def main():
    parser = argparse.ArgumentParser(description="Show what tokenizer and text encoder make of a sentence.")
    parser.add_argument("caption", nargs="?", default="She is young, with a hat on, and has pale skin.")
    parser.add_argument("--bert", help="vocabulary and weights: folder or hub name (bert-base-uncased); "
                                       "without it, random weights and the sentence's own words")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.bert) if args.bert else Tokenizer.train([args.caption])
    bert = Bert(BertConfig(vocab_size=tokenizer.vocab_size)).eval()
    if args.bert:
        load_bert(bert, args.bert)
    captions = tokenizer([args.caption])
    with torch.no_grad():
        text = bert(captions)
        joint = bert(captions.with_first_token(bert.enc_id), image_tokens=torch.zeros(1, 197, 768))
    print(f"caption      {args.caption}")
    print(f"cleaned      {clean_caption(args.caption)}")
    print(f"pieces       {' '.join(tokenizer.pieces(captions))}")
    print(f"text tokens  {tuple(text.shape)}   the first, [CLS], speaks for the sentence")
    print(f"joint tokens {tuple(joint.shape)}   the first is now [ENC]; they have looked at a blank image")
    print(f"parameters   {sum(p.numel() for p in bert.parameters()):,}")


if __name__ == "__main__":
    run_script(main)
