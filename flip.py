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
import argparse
import contextlib
import copy
import hashlib
import os
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from bert import MAX_TOKENS, Bert, BertConfig, Captions, Tokenizer, bert_name
from kernels.attention import Sequences
from kernels.contrastive import contrastive_loss
from losses import matching_cross_entropy, negative_probabilities
from vit import (CLIP_NAMES, PICTURES, ViT, ViTConfig, check_sizes, check_weights, contact_sheet,
                 copy_weights, find_file, first_line, open_picture, printable, read_batches, rename,
                 resize_positions, run_script, whole_file)


@dataclass(frozen=True)
class FLIPConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    embed_dim: int = 256
    queue_size: int = 61440
    hardness: float | None = None   # of ITM's negatives, if `matching_score` is to make up for it

    def __post_init__(self):
        check_sizes(self, embed_dim=20_000, queue_size=10 ** 8)


class Knobs(NamedTuple):
    """What a schedule may set anew at each step; by default, where the paper's schedules end."""
    alpha: float = 0.4                  # share of the momentum encoder's opinion in ITC's targets
    momentum: float = 0.995             # 0: the momentum encoder is a copy of the student
    queue_length: int | None = None     # so many entries of the queue are keys, the first; None: all
    hardness: float = 1.0               # of ITM's negatives, see losses.negative_probabilities
    with_itm: bool = True               # whether ITM is computed at all


class Output(NamedTuple):
    itc: torch.Tensor                   # the two losses; their sum is what the paper minimises
    itm: torch.Tensor
    image_keys: torch.Tensor            # momentum features of all processes (A, E), to be enqueued
    text_keys: torch.Tensor
    identity: torch.Tensor              # (A,)


# ---- the model ---------------------------------------------------------------------------------
class Encoders(nn.Module):
    """Image encoder, text encoder, their projections: the student is one, the momentum encoder
    another."""

    def __init__(self, config):
        super().__init__()
        self.image = ViT(config.vit)
        self.text = Bert(config.bert, image_width=config.vit.width)
        self.image_projection = nn.Linear(config.vit.width, config.embed_dim)
        self.text_projection = nn.Linear(config.bert.width, config.embed_dim)

    def encode_image(self, images):
        """images (B, 3, S, S) -> tokens (B, L, D), features (B, E) of length 1."""
        tokens = self.image(images)
        return tokens, feature_of(tokens[:, 0], self.image_projection)

    def image_features(self, images):
        """The features alone (B, E), for which the last block computes only the class token."""
        return feature_of(self.image(images, first_only=True), self.image_projection)

    def encode_text(self, captions):
        """Packed captions -> features (B, E) of length 1."""
        return feature_of(self.text(captions, first_only=True), self.text_projection)

    def text_features(self, captions):
        """Any number of packed captions -> features (T, E) of length 1, a part at a time."""
        parts = torch.arange(len(captions)).split(500)
        return torch.cat([self.encode_text(captions.select(part)) for part in parts])


def feature_of(first, projection):
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

    def matching_logits(self, image_tokens, captions, readers=None):
        """ITM logits (P, 2), class 1 = match, of P captions with the images (I, L, D) that they read:
        the first readers[0] captions read image 0, and so on (a CPU tensor); None: one each."""
        captions = captions.starting_with(self.student.text.enc_token)
        first = self.student.text(captions, image_tokens, readers, first_only=True)         # (P, D)
        with torch.autocast(first.device.type, enabled=False):      # half is too coarse beside a cosine
            return self.matching_head(first.float())

    def judge(self, image_tokens, captions, pairs=None, progress=False):
        """ITM logits (P, 2) for any `pairs` (P, 2) of an image and a caption, numbers on the CPU, in the
        order of their images (None: each with each); image_tokens may lie anywhere, in any precision."""
        device = self.temperature.device
        if pairs is None:
            pairs = torch.ones(len(image_tokens), len(captions)).nonzero()
        # A chunk's largest tensors, float32 inside BERT's MLP, stay in a CPU's cache, or fill a GPU.
        bytes_a_pair = 4 * captions.sequences.tokens / len(captions) * 4 * self.config.bert.width
        chunk = 1 + int((2 ** 29 if device.type == "cuda" else 2 ** 23) / bytes_a_pair)
        logits = [torch.empty(0, 2, device=device)]
        for image, text in tqdm([part.T for part in pairs.split(chunk) if len(part)], "re-ranking",
                                disable=not progress, leave=False):
            first, last = int(image[0]), int(image[-1])
            tokens = image_tokens[first:last + 1].float().to(device)
            logits.append(self.matching_logits(tokens, captions.select(text), (image - first).bincount()))
        return torch.cat(logits)

    def matching_score(self, logits, cosine):
        """What candidates are ranked by: matching logits (..., 2) and cosines (...) -> (...).

        The paper takes logit 1 + cosine. But what does the head learn? Wrong pairs come to it with a
        probability q about proportional to p(image) p(text) exp(hardness * cosine / temperature), so
        its log-odds, at best log p(image, text) / q, judge only what ITC has left open. Candidates
        should be ranked by p(image, text) / p(image) p(text), thus by log-odds + hardness * cosine /
        temperature; so they are if the configuration names a hardness (train.py --posterior)."""
        if self.config.hardness is None:
            return logits[..., 1] + cosine
        return logits[..., 1] - logits[..., 0] + self.config.hardness * cosine / self.temperature.to(cosine)

    def forward(self, images, captions, identity, knobs=Knobs(), generator=None):
        """Both losses for B pairs: images (B, 3, S, S), packed captions, identity (B,), equal
        numbers meaning the same person; generator: a CPU generator for drawing negatives."""
        if knobs.with_itm:
            image_tokens, image_features = self.student.encode_image(images)
        else:
            image_features = self.student.image_features(images)
        text_features = self.student.encode_text(captions)
        image_momentum, text_momentum = image_features.detach(), text_features.detach()
        if knobs.momentum > 0:          # else it is a copy: what the student said will do
            with torch.no_grad():
                image_momentum = self.momentum_encoder.image_features(images)
                text_momentum = self.momentum_encoder.encode_text(captions)
        image_keys, text_keys, all_identity = map(gather, (image_momentum, text_momentum, identity))
        used = slice(knobs.queue_length)
        image_pool = [image_keys, self.image_queue[used]]   # keys: batch and queue, two pieces as they lie
        text_pool = [text_keys, self.text_queue[used]]
        shared = identity, [all_identity, self.queue_identity[used]], self.temperature, knobs.alpha
        image_to_text = contrastive_loss(image_features, image_momentum, text_pool, *shared)
        text_to_image = contrastive_loss(text_features, text_momentum, image_pool, *shared)
        itc = (image_to_text + text_to_image) / 2
        itm = itc.new_zeros(())
        if knobs.with_itm:
            negatives = self.draw_negatives(gather(image_features), gather(text_features), all_identity,
                                            knobs.hardness, generator)
            itm = self.itm_loss(image_tokens, captions, *negatives)
        return Output(itc, itm, image_keys, text_keys, all_identity)

    @torch.no_grad()
    def draw_negatives(self, image_features, text_features, identity, hardness=1.0, generator=None):
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
            images = negative_probabilities(similarity, identity, self.temperature, hardness)
            texts = negative_probabilities(similarity.T, identity, self.temperature, hardness)
        probabilities = torch.cat([images, texts]).cpu()                            # (2 A, A)
        if not probabilities.isfinite().all():
            raise ValueError("the features are no longer finite numbers: training has diverged; use a "
                             "smaller --lr")
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        if dist.is_initialized():
            drawn = drawn.to(identity.device)
            dist.broadcast(drawn, src=0)
        return drawn.cpu().squeeze(1).chunk(2)

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
        (rank, world), B = rank_and_world(), len(captions)
        own = torch.arange(world * B)
        image_index = torch.cat([own, negative_image, own])                         # (3 A,)
        text_index = torch.cat([own, own, negative_text])
        mine = (image_index // B == rank).nonzero().squeeze(1)
        mine = mine[image_index[mine].argsort(stable=True)]         # captions of an image side by side
        is_match = (mine < world * B).long().to(image_tokens.device, non_blocking=True)
        logits = self.matching_logits(image_tokens, gather_captions(captions).select(text_index[mine]),
                                      readers=(image_index[mine] - rank * B).bincount())
        return matching_cross_entropy(logits, is_match, pairs=3 * B)

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
        with evaluating(self):
            text_features = self.student.text_features(self.read_texts(texts))
            return torch.cat([self.student.image_features(pixels) @ text_features.T
                              for pixels in self.read_images(images)])

    def match_probability(self, images, texts):
        """(I, T): how likely, from 0 to 1, ITM's head finds it that picture and sentence belong together.
        It reads every pair, so ask `similarity` first where there are many. It was taught to tell apart
        what ITC finds similar: to rank, put the two together (`matching_score`)."""
        with evaluating(self):
            captions = self.read_texts(texts)
            logits = [self.judge(tokens, captions)
                      for tokens, _ in map(self.student.encode_image, self.read_images(images))]
            return torch.cat(logits).softmax(1)[:, 1].unflatten(0, (-1, len(captions)))

    def read_images(self, images):
        """Yield batches of pixels (B, 3, S, S) of pictures (paths or PIL images)."""
        images = listed(images, (str, Path, Image.Image), "paths or PIL images")
        size, device = self.config.vit.image_size, self.temperature.device
        for _, pixels in read_batches(lambda i, size: open_picture(images[i], size=size), len(images), size,
                                      "reading pictures", show=len(images) > 128):
            yield pixels.to(device)

    def read_texts(self, texts):
        """Sentences -> packed captions; a ValueError, or a warning, for words that say nothing."""
        texts, tokenizer = listed(texts, str, "sentences"), self.need_tokenizer()
        for text in texts:
            known, unknown = tokenizer.words(text)
            if not known:
                raise ValueError(f"the model's vocabulary knows no word of {text!r}: nothing can be found")
            if unknown:
                warnings.warn(f"not in the model's vocabulary, so they say nothing: {', '.join(unknown)}")
        captions = tokenizer(texts).to(self.temperature.device)
        if captions.sequences.longest >= MAX_TOKENS:
            warnings.warn(f"the longest of these sentences is read no further than {MAX_TOKENS} tokens")
        return captions

    def need_tokenizer(self):
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
            config = config or (our_config(saved["flip"]) if ours else official_config(weights, path))
            for encoders in ("student", "momentum_encoder"):
                table = name_of(f"{encoders}.image.positions")
                weights[table] = resize_positions(weights[table], config.vit.patches)
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
def evaluating(model):
    """In evaluation mode and without gradients; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def listed(things, kinds, expected):
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
    (I, T), text_to_image (T, I)): `matching_score` for the k candidates of a query; the others rank
    below them in order of cosine. A pair that both directions ask for is judged once. """
    rank, world = rank_and_world()
    for_image = torch.zeros_like(similarity, dtype=torch.bool)
    for_text = for_image.clone()
    for_image.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_text.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    pairs = (for_image | for_text).nonzero().cpu().tensor_split(world)[rank]        # (P, 2), image by image
    image, text = pairs.T
    scores = torch.zeros_like(similarity)
    logits = model.judge(image_tokens, captions, pairs, progress).to(scores)
    scores[image, text] = model.matching_score(logits, similarity[image, text])
    if world > 1:
        dist.all_reduce(scores)
    return torch.where(for_image, scores, similarity - 100), torch.where(for_text, scores, similarity - 100).T


# ==== A first reading may stop here: several processes, checkpoints, search =======================
def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x):
    """x (B, ...) of every process in the order of their ranks, (A, ...); without gradient."""
    _, world = rank_and_world()
    if world == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_captions(captions):
    """Captions of every process."""
    if rank_and_world()[1] == 1:
        return captions
    everyone, device = [None] * rank_and_world()[1], captions.ids.device
    dist.all_gather_object(everyone, (captions.ids.cpu(), captions.sequences.lengths))
    ids, lengths = zip(*everyone)
    return Captions(torch.cat(ids).to(device), Sequences.of(torch.cat(lengths), device))


# ---- checkpoints, ours and the official one ----------------------------------------------------
def load_whole(path):
    """torch.load, of a file whose checksums, at which torch does not look, are right. No code from
    it is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed:
            raise ValueError(f"the bytes of {changed} have changed")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path):
    """What lies in a checkpoint, from its file or its folder, as a dictionary with "model"."""
    path = find_file(path, CHECKPOINTS)
    try:
        saved = load_whole(path)
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged ({first_line(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with the weights under 'model', found none")
    return saved


def write_checkpoint(contents, path):
    try:
        with whole_file(path) as partial:
            torch.save(contents, partial)
    except RuntimeError as error:               # torch's word for a disk that is full
        raise OSError(f"{path} could not be written, is the disk full? ({first_line(error)})") from error


def our_config(sizes):
    return FLIPConfig(**sizes | {"vit": ViTConfig(**sizes["vit"]), "bert": BertConfig(**sizes["bert"])})


CHECKPOINTS = ("flip.pt", "FLIP-base.pth")      # in a folder, or in a repository of the hub
OWN_NAMES = {"image_queue": "image_queue", "text_queue": "text_queue", "queue_identity": "idx_queue",
             "queue_pointer": "ptr_queue", "temperature": "temp", "matching_head.weight": "itm_head.weight",
             "matching_head.bias": "itm_head.bias"}


def official_name(name):
    """Our name of an entry of the state -> its name in FLIP-base.pth."""
    if name in OWN_NAMES:
        return OWN_NAMES[name]
    encoders, part, rest = name.split(".", 2)
    m = "_m" if encoders == "momentum_encoder" else ""
    if part == "image":
        rest = rename(rest, CLIP_NAMES).replace("post_layernorm", "post_layrnorm")
        return f"visual_encoder{m}.vision_model.{rest}"
    if part == "text":
        return f"text_encoder{m}.{bert_name(rest)}"
    return f"{'vision_proj' if part == 'image_projection' else 'text_proj'}{m}.{rest}"


def official_state(model):
    """The state in the official layout: {name: tensor}, ready for torch.save({"model": ...})."""
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    for queue in ("image_queue", "text_queue"):
        state[queue] = state[queue].T.contiguous()                                  # (E, Q)
    state["idx_queue"] = state["idx_queue"][None]                                   # (1, Q)
    for m in ("", "_m"):        # position_ids are 0, 1, 2, ...; nothing is learned in them
        places = {f"visual_encoder{m}.vision_model": model.config.vit.patches + 1,
                  f"text_encoder{m}": model.config.bert.positions}
        state |= {f"{part}.embeddings.position_ids": torch.arange(n)[None] for part, n in places.items()}
    return state


def read_official(weights, path):
    """The entries of the official file as `official_name` asks for them: of its 1,049, all but the
    four position_ids, which are made anew on saving."""
    if "visual_encoder.vision_model.embeddings.class_embedding" not in weights:
        raise ValueError(f"{path} is neither one of our checkpoints nor an official one: it has no "
                         f"visual_encoder.vision_model.embeddings.class_embedding")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    queues = {name: weights[name].T for name in ("image_queue", "text_queue")}      # (Q, E)
    return weights | queues | {"idx_queue": weights["idx_queue"][0]}


def official_config(weights, path):
    """The configuration that an official checkpoint's shapes tell; heads are 64 wide, as in every
    ViT and BERT of note."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in weights if name.startswith(prefix)})
    image, text = "visual_encoder.vision_model.", "text_encoder."
    width, _, patch, _ = weights[image + "embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights[text + "embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"{path}: the widths {width} and {text_width} are not multiples of 64, so the "
                         f"number of heads cannot be read off the shapes; pass config=FLIPConfig(...)")
    grid = round((len(weights[image + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vit = ViTConfig(grid * patch, patch, width, depth(image + "encoder.layers."), heads=width // 64)
    bert = BertConfig(vocabulary, text_width, depth(text + "encoder.layer."), heads=text_width // 64,
                      positions=len(weights[text + "embeddings.position_embeddings.weight"]))
    queue_size, embed_dim = weights["image_queue"].shape
    return FLIPConfig(vit, bert, embed_dim, queue_size)


# ---- search: python flip.py --------------------------------------------------------------------
def read_features(cache, embed_dim):
    """{key: feature} kept from the last search; nothing where there is none, or a damaged one."""
    try:
        known = load_whole(cache)
        fits = (feature.shape == (embed_dim,) and feature.isfinite().all() for feature in known.values())
        return known if all(fits) else {}
    except Exception:                               # whatever is wrong with it, it is computed again
        return {}


@torch.no_grad()
def folder_features(model, folder, cache):
    """{path: feature (E,)} for every picture below `folder`. Features of unchanged files come from
    the file `cache`; a picture that cannot be read is named and left out."""
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
    if not paths:
        raise ValueError(f"{folder}: no pictures found ({', '.join(PICTURES)}, subfolders included)")
    known = read_features(cache, model.config.embed_dim)
    keys = {path: f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths}
    new = [path for path in paths if keys[path] not in known]
    lost = {}
    for numbers, pixels in read_batches(lambda i, size: open_picture(new[i], size=size), len(new),
                                        model.config.vit.image_size, "reading pictures", lost=lost):
        features = model.student.image_features(pixels.to(model.temperature.device)).cpu()
        known |= {keys[new[i]]: feature.clone() for i, feature in zip(numbers, features)}
    for why in lost.values():
        tqdm.write(f"left out: {printable(why)}")
    if new:
        write_checkpoint(known, cache)
    found = {path: known[key] for path, key in keys.items() if key in known}
    if not found:
        raise ValueError(f"{folder}: none of its {len(paths)} pictures can be read")
    return found


class Found(NamedTuple):
    """A picture that was found: what it is ranked by, and both parts of it."""
    path: Path
    score: float            # FLIP.matching_score
    cosine: float
    probability: float      # of a match, by ITM's head

    def picture(self):
        """In a size for looking at."""
        picture = open_picture(self.path)
        picture.thumbnail((512, 512))
        return picture

    def __str__(self):
        return f"{self.score:6.2f} {self.cosine:7.3f} {100 * self.probability:6.1f} %  {printable(self.path)}"


@torch.no_grad()
def search(model, features, query, top=8, k=32):
    """The `top` best of folder_features for a sentence, the k most similar judged by the matching
    head."""
    captions, paths = model.read_texts(query), list(features)
    similarity = torch.stack(list(features.values())) @ model.student.encode_text(captions)[0].cpu()    # (I,)
    cosines, best = similarity.topk(min(max(k, top), len(paths)))
    tokens = torch.cat([model.student.encode_image(pixels)[0]
                        for pixels in model.read_images([paths[i] for i in best])])
    logits = model.judge(tokens, captions).cpu()                                                # (k, 2)
    ranked = zip(best, model.matching_score(logits, cosines), cosines, logits.softmax(1)[:, 1])
    found = [Found(paths[i], *(number.item() for number in numbers)) for i, *numbers in ranked]
    return sorted(found, key=lambda one: -one.score)[:top]


def phrases_of(query, tokenizer):
    """The parts of a sentence that each say one thing, if in known words: "a man with a goatee and a
    tie" -> a man, a goatee, a tie."""
    between = r"(?<![\w-])(?<!not )(?:he|she|and|with|who|has|have|is|are|wears|wearing)(?![\w-])"
    parts = re.split(rf"[,.;]|{between}", query.lower())
    return [part.strip() for part in parts if tokenizer.words(part)[0]]


def relevance(model, images, phrase, steps=8):
    """Where on each picture a phrase was read: what each patch adds to ITM's log-odds, (I, rows,
    columns), in all about as much as the picture has more of them than one in plain grey.

    Integrated gradients (arXiv 1703.01365): pixels times their gradient, averaged while the picture
    emerges from grey, CLIP's mean colour. (At the picture itself the gradient is small where the head
    is certain.)"""
    captions, patch, added = model.read_texts(phrase), model.config.vit.patch_size, []
    with evaluating(model), torch.enable_grad():
        for pixels in torch.cat([*model.read_images(images)]).split(8):
            gradient = torch.zeros_like(pixels)
            for step in range(steps):
                emerging = (pixels * (step + 0.5) / steps).requires_grad_()
                logits = model.judge(model.student.encode_image(emerging)[0], captions)
                log_odds = logits[:, 1] - logits[:, 0]
                gradient += torch.autograd.grad(log_odds.sum(), emerging)[0] / steps
            added.append(patch ** 2 * F.avg_pool2d((pixels * gradient).sum(1), patch).cpu())
    return torch.cat(added)


def spotlight(image, light):
    """A picture, dark but where `light` (rows, columns), from 0 to 1, falls."""
    light = Image.fromarray((255 * light).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, image.point(lambda value: value // 4), light)


def found_rows(model, query, found, explain):
    """For `contact_sheet`: the pictures in a row, or, to explain, a row for each: the picture, and
    lit where on it every phrase of the sentence was read, brighter where it was read more."""
    pictures = [one.picture() for one in found]
    if not explain:
        return [(query, [(picture, f"{one.score:.1f}  {one.cosine:.2f}  {100 * one.probability:.0f} %", False)
                         for picture, one in zip(pictures, found)])]
    rows = [(str(one).strip(), [(picture, "", False)]) for picture, one in zip(pictures, found)]
    for phrase in phrases_of(query, model.tokenizer):
        lights = relevance(model, pictures, phrase).clamp(min=0)
        for (_, row), picture, light in zip(rows, pictures, lights / lights.max().clamp(min=1e-6)):
            row.append((spotlight(picture, light), phrase, False))
    return rows


def serve(model, folder, cache, top, sentence=""):
    """A page on this machine: a sentence in, faces out, and for the one that is clicked where each
    phrase was read."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ValueError("--serve needs gradio for its page: pip install gradio") from None
    features = folder_features(model, folder, cache)

    def ask(query):
        with warnings.catch_warnings(record=True) as caught:
            try:
                found = search(model, features, query, top)
            except ValueError as error:
                raise gradio.Error(str(error)) from None
        for warning in caught:
            gradio.Warning(str(warning.message))
        return [(one.picture(), str(one)) for one in found], (query, found), None

    def show(asked, chosen: gradio.SelectData):
        query, found = asked
        return contact_sheet(found_rows(model, query, [found[chosen.index]], explain=True), tile=192)

    with gradio.Blocks(title="FLIP", delete_cache=(600, 600)) as page:      # its copies of faces do not stay
        gradio.Markdown(f"# Search in {len(features)} faces\nScore, cosine, matching probability below each; "
                        f"click one to see where each phrase was read.")
        query, asked = gradio.Textbox(sentence, label="a sentence", autofocus=True), gradio.State()
        gallery = gradio.Gallery(columns=4, object_fit="contain", allow_preview=False, show_label=False)
        maps = gradio.Image(show_label=False)
        query.submit(ask, query, [gallery, asked, maps])
        gallery.select(show, asked, maps)
    page.launch(server_name="127.0.0.1", inbrowser=True)


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face photographs with a sentence.")
    parser.add_argument("query", nargs="?", help='for example "a smiling woman with blond hair"')
    parser.add_argument("--checkpoint", default="out/flip.pt",
                        help="made by train.py, or the official FLIP-base.pth")
    parser.add_argument("--images", required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument("--vocabulary", help="vocab.txt, tokenizer.json, folder or hub name; the official "
                                             "checkpoint needs bert-base-uncased, ours bring their own")
    parser.add_argument("--top", type=int, default=8, help="how many faces to show")
    parser.add_argument("--out", default="out/search.png", help="where to write the contact sheet")
    parser.add_argument("--explain", action="store_true",
                        help="show beside each face where on it every phrase of the sentence was read")
    parser.add_argument("--serve", action="store_true",
                        help="instead of one query, search on a page in the browser (pip install gradio)")
    args = parser.parse_args()
    out = Path(args.out)
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: expected the name of a picture, such as out/search.png")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder")
    path = find_file(args.checkpoint, CHECKPOINTS)
    model = FLIP.from_pretrained(path, vocabulary=args.vocabulary)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    # What is wrong with words is said before pictures are read.
    model.need_tokenizer() if args.serve else model.read_texts(args.query or "")
    state = path.stat()
    version = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    cache = out.parent / f"features-{hashlib.sha256(version.encode()).hexdigest()[:12]}.pt"
    if args.serve:
        return serve(model, args.images, cache, args.top, args.query or "")
    features = folder_features(model, args.images, cache)
    found = search(model, features, args.query, args.top)
    print(f" score  cosine   match    best of {len(features)} faces")
    print(*found, sep="\n")
    contact_sheet(found_rows(model, args.query, found, args.explain)).save(out)
    print(f"contact sheet: {out}")


if __name__ == "__main__":
    run_script(main)
