"""FLIP: the two encoders, their momentum copies, the queue and the heads (FLIP paper, figure 2a).

                     student                           momentum encoder, a slow average of it
    image -> ViT -> tokens -+-> projection -> feature     image -> ViT  -> projection -> feature
    text -> BERT -----------|-> projection -> feature     text  -> BERT -> projection -> feature
    text + image tokens -> BERT with cross-attention -> matching head

ITC compares student features with momentum features, those of the batch and those that earlier
batches left in the queue (while the momentum encoder is only a copy, with the student's own,
without gradient). ITM asks the image-grounded encoder about each pair of the batch and about two
wrong ones, drawn more often the more similar they are. This is BLIP without its caption decoder.

Why a momentum encoder? Contrast wants many negatives, more than fit into a batch, so features of
earlier batches are kept in a queue. They were computed with older weights; if these changed as fast
as the student's, old and new features could not be compared. So keys come from an average that
changes slowly. It has a second use: another face's caption may well be true of this face too, so
part of the target (alpha) is not "this caption and no other" but what the momentum encoder thinks
of all of them. Only its features leave it, and no gradient enters; ITM uses the student alone.

`forward` computes the losses and changes nothing, so it can be called twice, or held against
recorded numbers. The training loop changes state, one named call each: `update_momentum`,
`enqueue`, `clamp_temperature`. (The official forward does all of this on the way.)

Shapes: see vit.py; A pairs on all processes together (A = B on one).
Run `python flip.py --checkpoint out/flip.pt --images DIR "a smiling woman with blond hair"` to
search a folder; from Python, call `FLIP.from_pretrained`, `similarity`, `match_probability`.
"""
import contextlib
import copy
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from bert import MAX_TOKENS, Bert, BertConfig, Captions, Tokenizer
from common.distributed import all_gather, all_gather_objects, rank_and_world_size
from common.images import iterate_images, load_image
from common.script import check_ranges
from common.weights import (
    check_weights,
    copy_weights,
    official_name,
    official_sizes,
    read_checkpoint,
    read_official,
    resize_position_embedding,
)
from common.weights import official_state as official_state
from kernels.attention import Sequences
from kernels.contrastive import contrastive_loss
from losses import hard_negative_probabilities, matching_loss
from vit import ViT, ViTConfig


@dataclass(frozen=True)
class FLIPConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    embed_dim: int = 256
    queue_size: int = 61440
    hardness: float | None = None   # of ITM's negatives, if `rerank_score` is to make up for it

    def __post_init__(self):
        check_ranges(self, embed_dim=20_000, queue_size=10 ** 8)

    @staticmethod
    def from_dict(sizes):
        return FLIPConfig(**sizes | {"vit": ViTConfig(**sizes["vit"]), "bert": BertConfig(**sizes["bert"])})


class StepParams(NamedTuple):
    """What a schedule may set anew at each step; by default, where the paper's schedules end."""
    alpha: float = 0.4                  # share of the momentum encoder's opinion in ITC's targets
    momentum: float = 0.995             # 0: the momentum encoder is a copy of the student
    queue_length: int | None = None     # so many entries of the queue are keys, the first; None: all
    hardness: float = 1.0               # of ITM's negatives, see losses.hard_negative_probabilities
    with_itm: bool = True               # whether ITM is computed at all


class FLIPOutput(NamedTuple):
    itc: torch.Tensor                   # the two losses; their sum is what the paper minimises
    itm: torch.Tensor
    image_keys: torch.Tensor            # momentum features of all processes (A, E), to be enqueued
    text_keys: torch.Tensor
    identity: torch.Tensor              # (A,)


# ---- the model -----------------------------------------------------------------------------------
class Encoders(nn.Module):
    """Image encoder, text encoder, their projections: the student is one, the momentum encoder
    another."""

    def __init__(self, config):
        super().__init__()
        self.image = ViT(config.vit)
        self.text = Bert(config.bert, image_width=config.vit.width)
        self.image_projection = nn.Linear(config.vit.width, config.embed_dim)
        self.text_projection = nn.Linear(config.bert.width, config.embed_dim)

    def image_tokens_and_features(self, images):
        """images (B, 3, S, S) -> tokens (B, L, D), features (B, E) of length 1."""
        tokens = self.image(images)
        return tokens, project(tokens[:, 0], self.image_projection)

    def image_features(self, images):
        """The features alone (B, E), for which the last block computes only the class token."""
        return project(self.image(images, first_token_only=True), self.image_projection)

    def text_features(self, captions):
        """Packed captions -> features (B, E) of length 1."""
        return project(self.text(captions, first_token_only=True), self.text_projection)

    def text_features_chunked(self, captions):
        """Any number of packed captions -> features (T, E) of length 1, a part at a time."""
        parts = torch.arange(len(captions)).split(500)
        return torch.cat([self.text_features(captions.select(part)) for part in parts])


def project(first, projection):
    """First tokens (B, D) -> features (B, E) of length 1."""
    return F.normalize(projection(first.to(projection.weight)).float(), dim=-1)


class FLIP(nn.Module):
    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        if tokenizer and tokenizer.vocab_size != config.bert.vocab_size:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} entries, [DEC] and [ENC] included, "
                             f"the model {config.bert.vocab_size}; give the one it was trained with")
        self.student = Encoders(config)
        self.matching_head = nn.Linear(config.bert.width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.momentum_encoder = copy.deepcopy(self.student).requires_grad_(False)
        # The official start: random unit vectors, whose identity nobody has, so they are negatives.
        # A schedule that starts to use the queue later counts only what was written by then.
        for name in ("image_queue", "text_queue"):
            features = torch.randn(config.queue_size, config.embed_dim)
            self.register_buffer(name, F.normalize(features, dim=-1))
        self.register_buffer("queue_identity", torch.full((config.queue_size,), -100))
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))

    def itm_logits(self, image_tokens, captions, captions_per_image=None):
        """ITM logits (P, 2), class 1 = match, of P captions with the images (I, L, D) that they read:
        the first readers[0] captions read image 0, and so on (a CPU tensor); None: one each."""
        captions = captions.with_first_token(self.student.text.enc_id)
        first = self.student.text(captions, image_tokens, captions_per_image, first_token_only=True)  # (P, D)
        with torch.autocast(first.device.type, enabled=False):      # half is too coarse beside a cosine
            return self.matching_head(first.float())

    def score_pairs(self, image_tokens, captions, pairs=None, progress=False):
        """ITM logits (P, 2) for any `pairs` (P, 2) of an image and a caption, numbers on the CPU, in the
        order of their images (None: each with each); image_tokens may lie anywhere, in any precision."""
        device = self.temperature.device
        if pairs is None:
            pairs = torch.ones(len(image_tokens), len(captions)).nonzero()
        # A chunk's largest tensors, float32 inside BERT's MLP, stay in a CPU's cache, or fill a GPU.
        bytes_a_pair = 4 * captions.sequences.num_tokens / len(captions) * 4 * self.config.bert.width
        chunk = 1 + int((2 ** 29 if device.type == "cuda" else 2 ** 23) / bytes_a_pair)
        logits = [torch.empty(0, 2, device=device)]
        for image, text in tqdm([part.T for part in pairs.split(chunk) if len(part)], "re-ranking",
                                disable=not progress, leave=False):
            first, last = int(image[0]), int(image[-1])
            tokens = image_tokens[first:last + 1].float().to(device)
            logits.append(self.itm_logits(tokens, captions.select(text), (image - first).bincount()))
        return torch.cat(logits)

    def rerank_score(self, logits, cosine):
        """What candidates are ranked by: matching logits (..., 2) and cosines (...) -> (...).

        The paper takes logit 1 + cosine. But what does the head learn? Wrong pairs come to it with a
        probability q about proportional to p(image) p(text) exp(hardness * cosine / temperature), so
        its log-odds, at best log p(image, text) / q, judge only what ITC has left open. Candidates
        should be ranked by p(image, text) / p(image) p(text), thus by log-odds + hardness * cosine /
        temperature; so they are if the configuration names a hardness (train.py --posterior)."""
        if self.config.hardness is None:
            return logits[..., 1] + cosine
        return logits[..., 1] - logits[..., 0] + self.config.hardness * cosine / self.temperature.to(cosine)

    def forward(self, images, captions, identity, params=StepParams(), generator=None):
        """Both losses for B pairs: images (B, 3, S, S), packed captions, identity (B,), equal
        numbers meaning the same person; generator: a CPU generator for drawing negatives."""
        if params.with_itm:
            image_tokens, image_features = self.student.image_tokens_and_features(images)
        else:
            image_features = self.student.image_features(images)
        text_features = self.student.text_features(captions)
        image_momentum, text_momentum = image_features.detach(), text_features.detach()
        if params.momentum > 0:         # else it is a copy: what the student said will do
            with torch.no_grad():
                image_momentum = self.momentum_encoder.image_features(images)
                text_momentum = self.momentum_encoder.text_features(captions)
        image_keys, text_keys, all_identity = map(all_gather, (image_momentum, text_momentum, identity))
        queue_part = slice(params.queue_length)
        image_keys_and_queue = [image_keys, self.image_queue[queue_part]]  # keys: batch and queue, two pieces as they lie
        text_keys_and_queue = [text_keys, self.text_queue[queue_part]]
        shared = identity, [all_identity, self.queue_identity[queue_part]], self.temperature, params.alpha
        image_to_text = contrastive_loss(image_features, image_momentum, text_keys_and_queue, *shared)
        text_to_image = contrastive_loss(text_features, text_momentum, image_keys_and_queue, *shared)
        itc = (image_to_text + text_to_image) / 2
        itm = itc.new_zeros(())
        if params.with_itm:
            negatives = self.sample_negatives(all_gather(image_features), all_gather(text_features), all_identity,
                                              params.hardness, generator)
            itm = self.itm_loss(image_tokens, captions, *negatives)
        return FLIPOutput(itc, itm, image_keys, text_keys, all_identity)

    @torch.no_grad()
    def sample_negatives(self, image_features, text_features, identity, hardness=1.0, generator=None):
        """One negative image for every caption and one negative caption for every image: two (A,)
        CPU tensors.

        The first process draws for all, since probabilities may differ between processes in their
        last bit. The host waits for the GPU: which captions were drawn decides how many tokens
        there are. """
        if (identity == identity[0]).all():
            raise ValueError("every pair of this batch shows the same person, so nothing in it is a wrong "
                             "answer; use larger batches or more people")
        with torch.autocast(image_features.device.type, enabled=False):
            similarity = text_features @ image_features.T                           # (A texts, A images)
            image_probs = hard_negative_probabilities(similarity, identity, self.temperature, hardness)
            text_probs = hard_negative_probabilities(similarity.T, identity, self.temperature, hardness)
        probabilities = torch.cat([image_probs, text_probs]).cpu()                  # (2 A, A)
        if not probabilities.isfinite().all():
            raise ValueError("the features are no longer finite numbers: training has diverged; use a "
                             "smaller --lr")
        sampled = torch.multinomial(probabilities, 1, generator=generator)
        if dist.is_initialized():
            sampled = sampled.to(identity.device)
            dist.broadcast(sampled, src=0)
        return sampled.cpu().squeeze(1).chunk(2)

    def itm_loss(self, image_tokens, captions, negative_image, negative_text):
        """ITM over 3 A pairs: each pair itself, each caption with its negative image, each image
        with its negative caption. Captions travel between processes, a few bytes each, while image
        tokens and their gradients stay where they are: a process judges the pairs whose image it
        owns.

        Two processes with B = 2, of which rank 0 owns the pairs 0 and 1, rank 1 the pairs 2 and 3;
        with negative_image = [1, 2, 0, 0] and negative_text = [3, 0, 1, 2]:

            image  0 1 2 3 | 1 2 0 0 | 0 1 2 3      rank 0 judges the seven columns with image
            text   0 1 2 3 | 0 1 2 3 | 3 0 1 2      0 or 1, rank 1 the five with image 2 or 3
        """
        (rank, world_size), B = rank_and_world_size(), len(captions)
        own = torch.arange(world_size * B)
        image_index = torch.cat([own, negative_image, own])                         # (3 A,)
        text_index = torch.cat([own, own, negative_text])
        mine = (image_index // B == rank).nonzero().squeeze(1)
        mine = mine[image_index[mine].argsort(stable=True)]         # captions of an image side by side
        is_match = (mine < world_size * B).long().to(image_tokens.device, non_blocking=True)
        logits = self.itm_logits(image_tokens, all_gather_captions(captions).select(text_index[mine]),
                                 captions_per_image=(image_index[mine] - rank * B).bincount())
        return matching_loss(logits, is_match, denominator=3 * B)

    # ---- changes of state, called by the training loop ----
    @torch.no_grad()
    def update_momentum(self, momentum):
        """momentum encoder = momentum * itself + (1 - momentum) * student; so 0 makes it a copy."""
        ours, theirs = list(self.momentum_encoder.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, image_keys, text_keys, identity):
        """Replace the oldest queue entries by these momentum features (A, E); the ring wraps."""
        Q = self.config.queue_size
        image_keys, text_keys, identity = image_keys[-Q:], text_keys[-Q:], identity[-Q:]
        slots = (self.queue_pointer + torch.arange(len(identity), device=identity.device)) % Q
        self.image_queue[slots], self.text_queue[slots] = image_keys, text_keys
        self.queue_identity[slots] = identity
        self.queue_pointer.copy_((self.queue_pointer + len(identity)) % Q)

    @torch.no_grad()
    def clamp_temperature(self):
        self.temperature.clamp_(0.001, 0.5)

    # ---- for those who have pictures and sentences ----
    def similarity(self, images, texts):
        """Cosines (I, T), on the model's device, of pictures (paths or PIL images) and sentences: ITC's
        measure, from -1 to 1. One of either may come without a list."""
        with eval_mode(self):
            text_features = self.student.text_features_chunked(self.tokenize(texts))
            return torch.cat([self.student.image_features(pixels) @ text_features.T
                              for pixels in self.load_images(images)])

    def match_probability(self, images, texts):
        """(I, T): how likely, from 0 to 1, ITM's head finds it that picture and sentence belong together.
        It reads every pair, so ask `similarity` first where there are many. It was taught to tell apart
        what ITC finds similar: to rank, put the two together (`rerank_score`)."""
        with eval_mode(self):
            captions = self.tokenize(texts)
            logits = [self.score_pairs(tokens, captions)
                      for tokens, _ in map(self.student.image_tokens_and_features, self.load_images(images))]
            return torch.cat(logits).softmax(1)[:, 1].unflatten(0, (-1, len(captions)))

    def load_images(self, images):
        """Yield batches of pixels (B, 3, S, S) of pictures (paths or PIL images)."""
        images = as_list(images, (str, Path, Image.Image), "paths or PIL images")
        size, device = self.config.vit.image_size, self.temperature.device
        for _, pixels in iterate_images(lambda i, size: load_image(images[i], size=size), len(images), size,
                                        "reading pictures", show=len(images) > 128):
            yield pixels.to(device)

    def tokenize(self, texts):
        """Sentences -> packed captions; a ValueError, or a warning, for words that say nothing."""
        texts, tokenizer = as_list(texts, str, "sentences"), self.require_tokenizer()
        for text in texts:
            known, unknown = tokenizer.split_known(text)
            if not known:
                raise ValueError(f"the model's vocabulary knows no word of {text!r}: nothing can be found")
            if unknown:
                warnings.warn(f"not in the model's vocabulary, so they say nothing: {', '.join(unknown)}")
        captions = tokenizer(texts).to(self.temperature.device)
        if captions.sequences.max_length >= MAX_TOKENS:
            warnings.warn(f"the longest of these sentences is read no further than {MAX_TOKENS} tokens")
        return captions

    def require_tokenizer(self):
        """The tokenizer, which an official checkpoint does not bring."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint holds no vocabulary; give one with --vocabulary (in Python "
                             "from_pretrained(vocabulary=...)): bert-base-uncased or a vocab.txt")
        return self.tokenizer

    # ---- checkpoints ----
    def checkpoint(self):
        """All that `from_pretrained` needs: plain tensors, numbers and text."""
        return {"flip": asdict(self.config), "model": self.state_dict(),
                "tokenizer": self.tokenizer.to_json() if self.tokenizer else None}

    @staticmethod
    def from_pretrained(path, config=None, saved=None, vocabulary=None):
        """A model, in evaluation mode, from one of our checkpoints or from the official
        FLIP-base.pth: a file, a folder that holds it, or a hub name.

        config: needed only where an official file's widths are not multiples of 64, since head
        counts are not in it. An image size other than the file's resizes the position tables. Our
        checkpoints bring their tokenizer; for others, vocabulary: file, folder or hub name. saved: what
        `read_checkpoint` found, if it was asked before. """
        saved = saved or read_checkpoint(path)
        weights, ours = dict(saved["model"]), "flip" in saved
        name_of = str if ours else official_name
        try:
            if not ours:
                weights = read_official(weights, path)
            config = config or FLIPConfig.from_dict(saved["flip"] if ours else official_sizes(weights, path))
            for encoders in ("student", "momentum_encoder"):
                table = name_of(f"{encoders}.image.positions")
                weights[table] = resize_position_embedding(weights[table], config.vit.num_patches)
            tokenizer = saved.get("tokenizer") and Tokenizer.from_json(saved["tokenizer"], str(path))
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise ValueError(f"{path}: some weights are not finite numbers: its training had diverged")
            if tokenizer is None and vocabulary:
                tokenizer = Tokenizer.load(vocabulary)
            with torch.device("meta"):          # costs no memory
                check_weights(FLIP(config), weights, name_of, str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, or written by another version "
                             f"({type(error).__name__}: {error})") from error
        model = FLIP(config, tokenizer)
        copy_weights(model, weights, name_of, str(path))
        return model.eval()


@contextlib.contextmanager
def eval_mode(model):
    """In evaluation mode and without gradients; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def as_list(things, kinds, expected):
    """A list of what is of these kinds, or one such thing alone, as a list; TypeError for others."""
    alone = isinstance(things, kinds) or not hasattr(things, "__iter__")
    things = [things] if alone else list(things)
    for i, thing in enumerate(things):
        if not isinstance(thing, kinds):
            raise TypeError(f"expected {expected}, found {type(thing).__name__} in place {i}")
    if not things:
        raise ValueError(f"expected {expected}, found an empty list")
    return things


@torch.no_grad()
def rerank(model, image_tokens, captions, similarity, k, progress=False):
    """Score each query's k most similar candidates again with the matching head (BLIP's evaluation;
    unlike the official FLIP, which judges from [CLS] here though it trains on [ENC]).

    image_tokens (I, L, D), T packed captions, similarity (I, T): cosines. Returns (image_to_text
    (I, T), text_to_image (T, I)): `rerank_score` for the k candidates of a query; the others rank
    below them in order of cosine. A pair that both directions ask for is judged once. """
    rank, world_size = rank_and_world_size()
    for_image = torch.zeros_like(similarity, dtype=torch.bool)
    for_text = for_image.clone()
    for_image.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_text.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    pairs = (for_image | for_text).nonzero().cpu().tensor_split(world_size)[rank]   # (P, 2), image by image
    image, text = pairs.T
    scores = torch.zeros_like(similarity)
    logits = model.score_pairs(image_tokens, captions, pairs, progress).to(scores)
    scores[image, text] = model.rerank_score(logits, similarity[image, text])
    if world_size > 1:
        dist.all_reduce(scores)
    return torch.where(for_image, scores, similarity - 100), torch.where(for_text, scores, similarity - 100).T


def all_gather_captions(captions):
    """Captions of every process."""
    if rank_and_world_size()[1] == 1:
        return captions
    device = captions.ids.device
    ids, lengths = zip(*all_gather_objects((captions.ids.cpu(), captions.sequences.lengths)))
    return Captions(torch.cat(ids).to(device), Sequences.from_lengths(torch.cat(lengths), device))




if __name__ == "__main__":
    raise SystemExit("error: python flip.py --images ... is now python search.py --images ...")
