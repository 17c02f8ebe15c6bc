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
search a folder.
"""
import argparse
import copy
import hashlib
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

from bert import Bert, BertConfig, Captions, Tokenizer, bert_name, clean_caption
from kernels.attention import Sequences
from kernels.contrastive import contrastive_loss
from losses import matching_cross_entropy, negative_probabilities
from vit import (CLIP_NAMES, PICTURES, ViT, ViTConfig, check_sizes, check_weights, contact_sheet,
                 copy_weights, find_file, first_line, open_picture, read_batches, rename,
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


def feature_of(first, projection):
    """First tokens (B, D) -> features (B, E) of length 1."""
    return F.normalize(projection(first.to(projection.weight)).float(), dim=-1)


class FLIP(nn.Module):
    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, None
        if tokenizer:
            self.use(tokenizer)
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

    def use(self, tokenizer):
        """Take this tokenizer, whose vocabulary must be as large as the model's word embeddings."""
        if tokenizer.vocab_size != self.config.bert.vocab_size:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} entries, [DEC] and [ENC] included, "
                             f"the model {self.config.bert.vocab_size}; give the one it was trained with")
        self.tokenizer = tokenizer

    def matching_logits(self, image_tokens, captions, readers=None):
        """ITM logits (P, 2), class 1 = match, of P captions with the images (I, L, D) that they read:
        the first readers[0] captions read image 0, and so on (a CPU tensor); None: one each."""
        captions = captions.starting_with(self.student.text.enc_token)
        first = self.student.text(captions, image_tokens, readers, first_only=True)         # (P, D)
        with torch.autocast(first.device.type, enabled=False):      # half is too coarse beside a cosine
            return self.matching_head(first.float())

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

    # ---- checkpoints ----
    def checkpoint(self):
        """All that `from_pretrained` needs: plain tensors, numbers and text."""
        return {"flip": asdict(self.config), "model": self.state_dict(),
                "tokenizer": self.tokenizer.to_json() if self.tokenizer else None}

    @staticmethod
    def from_pretrained(path, config=None, saved=None):
        """A model, in evaluation mode, from one of our checkpoints or from the official
        FLIP-base.pth.

        config: needed only where an official file's widths are not multiples of 64, since head
        counts are not in it. An image size other than the file's resizes the position tables. Our
        checkpoints bring their tokenizer. saved: what `read_checkpoint` found, if it was asked
        before. """
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
            with torch.device("meta"):          # costs no memory
                check_weights(FLIP(config), weights, name_of, str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, or written by another version "
                             f"({type(error).__name__}: {error})") from error
        model = FLIP(config, tokenizer)
        copy_weights(model, weights, name_of, str(path))
        return model.eval()


@torch.no_grad()
def rerank(model, image_tokens, captions, similarity, k, progress=False):
    """Score each query's k most similar candidates again with the matching head (BLIP's evaluation;
    unlike the official FLIP, which judges from [CLS] here though it trains on [ENC]).

    image_tokens (I, L, D), T packed captions, similarity (I, T): cosines. Returns (image_to_text
    (I, T), text_to_image (T, I)): `matching_score` for the k candidates of a query; the others rank
    below them in order of cosine. A pair that both directions ask for is judged once. """
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    for_image = torch.zeros_like(similarity, dtype=torch.bool)
    for_text = for_image.clone()
    for_image.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_text.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    pairs = (for_image | for_text).nonzero().cpu()                                  # (P, 2), image by image
    scores = torch.zeros_like(similarity)
    # A chunk's largest tensors, float32 inside BERT's MLP, stay in a CPU's cache, or fill a GPU.
    bytes_a_pair = 4 * captions.sequences.tokens / len(captions) * 4 * model.config.bert.width
    chunks = pairs.split(1 + int((2 ** 29 if device.type == "cuda" else 2 ** 23) / bytes_a_pair))[rank::world]
    for chunk in tqdm(chunks, "re-ranking", disable=not progress, leave=False):
        image, text = chunk.T
        first, last = int(image[0]), int(image[-1])
        tokens = image_tokens[first:last + 1].float().to(device)
        judged = model.matching_logits(tokens, captions.select(text), readers=(image - first).bincount())
        scores[image, text] = model.matching_score(judged.to(scores), similarity[image, text])
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
    path = find_file(path, ("flip.pt", "FLIP-base.pth"))
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
        tqdm.write(f"left out: {why}")
    if new:
        write_checkpoint(known, cache)
    found = {path: known[key] for path, key in keys.items() if key in known}
    if not found:
        raise ValueError(f"{folder}: none of its {len(paths)} pictures can be read")
    return found


@torch.no_grad()
def search(model, features, query, top=8, k=32):
    """The `top` best (path, cosine, matching probability) for a sentence, the k most similar judged
    by the matching head."""
    device, paths = model.temperature.device, list(features)
    captions = model.tokenizer([query]).to(device)
    similarity = torch.stack(list(features.values())) @ model.student.encode_text(captions)[0].cpu()    # (I,)
    best = similarity.topk(min(max(k, top), len(paths))).indices
    chosen = [paths[i] for i in best]
    (_, pixels), = read_batches(lambda i, size: open_picture(chosen[i], size=size), len(chosen),
                                model.config.vit.image_size, "judging", batch_size=len(chosen))
    tokens, _ = model.student.encode_image(pixels.to(device))
    each = captions.select(torch.zeros(len(chosen), dtype=torch.int64))
    logits = model.matching_logits(tokens, each).cpu()                              # (k, 2)
    order = model.matching_score(logits, similarity[best]).argsort(descending=True)[:top]
    probability = logits.softmax(1)[:, 1]
    return [(chosen[i], similarity[best[i]].item(), probability[i].item()) for i in order]


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face photographs with a sentence.")
    parser.add_argument("query", help='for example "a smiling woman with blond hair"')
    parser.add_argument("--checkpoint", default="out/flip.pt",
                        help="made by train.py, or the official FLIP-base.pth")
    parser.add_argument("--images", required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument("--vocabulary", help="vocab.txt, tokenizer.json, folder or hub name; the official "
                                             "checkpoint, which holds none, needs bert-base-uncased")
    parser.add_argument("--top", type=int, default=8, help="how many faces to show")
    parser.add_argument("--out", default="out/search.png", help="where to write the contact sheet")
    args = parser.parse_args()
    out = Path(args.out)
    if not clean_caption(args.query):
        raise ValueError(f"the query {args.query!r} has no words")
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1")
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: expected the name of a picture, such as out/search.png")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder")
    model = FLIP.from_pretrained(args.checkpoint).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if args.vocabulary:
        model.use(Tokenizer.load(args.vocabulary))
    if model.tokenizer is None:
        raise ValueError(f"{args.checkpoint} holds no vocabulary; give one with --vocabulary "
                         f"bert-base-uncased or a vocab.txt")
    state = Path(args.checkpoint).stat()
    version = f"{Path(args.checkpoint).resolve()} {state.st_size} {state.st_mtime_ns}"
    cache = out.parent / f"features-{hashlib.sha256(version.encode()).hexdigest()[:12]}.pt"
    unknown = model.tokenizer.unknown(args.query)
    if len(unknown) == len(clean_caption(args.query).split()):
        raise ValueError(f"the model's vocabulary knows no word of {args.query!r}: nothing can be found")
    if unknown:
        print(f"not in the model's vocabulary, so that they say nothing: {', '.join(unknown)}")
    features = folder_features(model, args.images, cache)
    found = search(model, features, args.query, args.top)
    print(f"{'ITC':>6} {'ITM':>6}  best of {len(features)} faces")
    for path, cosine, probability in found:
        print(f"{cosine:6.3f} {probability:6.3f}  {path}")
    tiles = [(open_picture(path), f"{cosine:.2f}  {probability:.2f}", False)
             for path, cosine, probability in found]
    contact_sheet([(args.query, tiles)]).save(out)
    print(f"contact sheet: {out}")


if __name__ == "__main__":
    run_script(main)
