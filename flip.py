"""FLIP: two encoders, their momentum copies, the queue and the heads (FLIP paper, figure 2a).

                     student                           momentum encoder, a moving average of it
    image -> ViT, class token -> projection -> feature    image -> ViT  -> projection -> feature
    text -> BERT, [CLS] -> projection -> feature          text  -> BERT -> projection -> feature
    text + all image tokens -> BERT with cross-attention, [ENC] -> matching head

ITC compares student features with momentum features: those of the batch, and those of earlier
batches in the queue. ITM classifies each pair of the batch and two hard negatives per pair with the
image-grounded encoder. This is BLIP without its caption decoder.

Why a momentum encoder? Contrastive learning needs more negatives than fit in a batch, so features
of earlier batches are kept in a queue. They were computed with older weights and stay comparable
only if the encoder changes slowly; so keys come from a moving average of the student. It also
provides soft targets: another face's caption may be true of this face too, so a fraction alpha of
the target follows the momentum encoder's softmax over all keys, and the rest is placed on the true
pairs.

The paper trains all of this from the first step on. `python train.py` trains the tiny model from
random weights in minutes, and in two phases (train.py):

    1  ITC within the batch     CLIP's loss: the keys are the student's own features
    2  complete FLIP            also with ITM, momentum encoder, queue and soft targets

Phase 2 starts with a copy of the student as momentum encoder, and with a queue of the features of
phase 1's last batches.

`forward` computes the losses and changes no state. In each step, after the backward pass, the
training loop calls `enqueue`, steps the optimisers, and calls `clamp_temperature`. If the next step
is in phase 2, it also calls `update_momentum`: steps of phase 1 do not use the momentum encoder.
(The official forward does all but the optimisers' part; it begins with the momentum encoder.)

Shapes: see attention.py. Run `python flip.py` to trace a batch.
"""
import copy
import hashlib
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import losses
from bert import Bert, BertConfig
from common.distributed import all_gather, all_gather_objects, choose_device, rank_and_world_size
from common.images import pixel_batches
from common.script import naming, run_script
from common.words import check_words
from pretrained import load_flip, read_checkpoint, write_folder
from tokenizer import Captions, Tokenizer
from vit import ViT, ViTConfig


@dataclass(frozen=True)
class FLIPConfig:
    vit: ViTConfig = ViTConfig()
    bert: BertConfig = BertConfig()
    embed_dim: int = 256
    queue_size: int = 61440
    # re-rank by pointwise mutual information, see `FLIP.rerank_score`; False: by the paper's score
    rerank_by_pmi: bool = False


class StepParams(NamedTuple):
    """What `train.schedule` changes from step to step; the defaults are the final values of the
    paper."""
    alpha: float = 0.4              # weight of the soft targets in ITC
    within_batch: bool = False      # True: ITC is CLIP's loss, without momentum encoder, queue and
                                    # soft targets
    with_itm: bool = True           # False: skip ITM in this step (finetune.py has steps with both
                                    # ITM and CLIP's loss)


class FLIPOutput(NamedTuple):
    itc: torch.Tensor                   # scalar; the paper minimises itc + itm
    itm: torch.Tensor                   # scalar, 0 if `StepParams` skips it
    image_keys: torch.Tensor            # keys from all processes (A, E), for `enqueue`
    text_keys: torch.Tensor
    identity: torch.Tensor              # (A,)


# ---- the model -----------------------------------------------------------------------------------
class Encoders(nn.Module):
    """Image encoder, text encoder and their projections. FLIP has two of these: student and
    momentum encoder."""

    def __init__(self, config: FLIPConfig):
        super().__init__()
        self.image = ViT(config.vit)
        self.text = Bert(config.bert, image_width=config.vit.width)
        self.image_projection = nn.Linear(config.vit.width, config.embed_dim)
        self.text_projection = nn.Linear(config.bert.width, config.embed_dim)

    def image_tokens_and_features(self, images: torch.Tensor):
        """images (B, 3, S, S) -> tokens (B, L, D), features (B, E) of unit norm."""
        tokens = self.image(images)
        return tokens, project(tokens[:, 0], self.image_projection)

    def image_features(self, images: torch.Tensor):
        """Features (B, E) alone: the last block computes only the class tokens."""
        return project(self.image(images, first_token_only=True), self.image_projection)

    def text_features(self, captions: Captions):
        """Captions -> features (P, E) of unit norm."""
        return project(self.cls_tokens(captions), self.text_projection)

    def cls_tokens(self, captions: Captions, batch_size: int = 500):
        """Captions -> [CLS] tokens (P, D), computed for at most batch_size captions at a time."""
        if len(captions) <= batch_size:
            return self.text(captions, first_token_only=True)
        first_tokens = []
        for indices in torch.arange(len(captions)).split(batch_size):
            first_tokens.append(self.text(captions.select(indices), first_token_only=True))
        return torch.cat(first_tokens)


def project(first_tokens, projection: nn.Linear):
    """First tokens (B, D) -> features (B, E) of unit norm."""
    features = projection(first_tokens.to(projection.weight))       # its dtype and device
    return F.normalize(features.float(), dim=-1)


class FLIP(nn.Module):
    def __init__(self, config: FLIPConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        vocab_size = config.bert.vocab_size
        if tokenizer and tokenizer.vocab_size != vocab_size:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} entries with [DEC] and "
                             f"[ENC], but the model has {vocab_size}; use the one it was trained "
                             "with")
        self.student = Encoders(config)
        self.matching_head = nn.Linear(config.bert.width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.momentum_encoder = copy.deepcopy(self.student).requires_grad_(False)

        self.init_queue()

    def init_queue(self):
        """As in the official code, the queue starts with random unit vectors of identity -100. They
        are never positives, but soft targets give them some weight."""
        Q = self.config.queue_size
        for name in ("image_queue", "text_queue"):
            features = torch.randn(Q, self.config.embed_dim)
            self.register_buffer(name, F.normalize(features, dim=-1))
        self.register_buffer("queue_identity", torch.full((Q,), -100))
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))

    @property
    def device(self):
        return self.temperature.device

    @property
    def dtype(self):
        return self.temperature.dtype

    # ---- training: the losses, without a change of state ----
    def forward(self, images, captions: Captions, identity, params=StepParams(), generator=None):
        """Both losses of B pairs, a `FLIPOutput`: images (B, 3, S, S), packed captions, identity
        (B,), where equal numbers mean the same person. generator: a CPU generator for sampling
        negatives."""
        if params.with_itm:
            image_tokens, image_features = self.student.image_tokens_and_features(images)
        else:
            image_features = self.student.image_features(images)
        text_features = self.student.text_features(captions)

        # ITC: within the batch, or against the momentum encoder's keys and those in the queue
        all_identity = all_gather(identity)                                     # (A,)
        if params.within_batch:
            image_keys = all_gather(image_features)                             # (A, E)
            text_keys = all_gather(text_features)
            itc = losses.clip_loss(image_features, text_features, image_keys, text_keys, identity,
                                   all_identity, self.temperature)
        else:
            momentum_image, momentum_text = self.momentum_features(images, captions)
            image_keys = all_gather(momentum_image)
            text_keys = all_gather(momentum_text)
            key_identity = torch.cat([all_identity, self.queue_identity])               # (K,)
            shared = identity, key_identity, self.temperature, params.alpha
            keys = torch.cat([text_keys, self.text_queue])                              # (K, E)
            image_to_text = losses.contrastive_loss(image_features, momentum_image, keys, *shared)
            keys = torch.cat([image_keys, self.image_queue])
            text_to_image = losses.contrastive_loss(text_features, momentum_text, keys, *shared)
            itc = (image_to_text + text_to_image) / 2

        # ITM: the true pairs, and two wrong ones for each
        itm = itc.new_zeros(())
        if params.with_itm:
            negatives = self.sample_negatives(all_gather(image_features), all_gather(text_features),
                                              all_identity, generator)
            itm = self.itm_loss(image_tokens, captions, *negatives)
        return FLIPOutput(itc, itm, image_keys.detach(), text_keys.detach(), all_identity)

    @torch.no_grad()
    def momentum_features(self, images, captions):
        """Features (B, E) of images and of captions, from the momentum encoder."""
        encoder = self.momentum_encoder
        return encoder.image_features(images), encoder.text_features(captions)

    @torch.no_grad()
    def sample_negatives(self, image_features, text_features, identity, generator=None):
        """Sample a negative image for every caption and a negative caption for every image: two CPU
        tensors (A,). Raises ValueError if all pairs show one person or features are not finite.

        Rank 0 samples for all ranks, because rounding differs between ranks. The CPU must wait
        here, since the sampled captions determine the number of tokens."""
        if (identity == identity[0]).all():
            raise ValueError("all pairs of a batch show one person, so none of them is a negative; "
                             "use a larger --batch_size, or faces of more people")
        with torch.autocast(image_features.device.type, enabled=False):
            text_to_image = text_features @ image_features.T            # cosines (A, A)
        shared = identity, self.temperature
        image_probabilities = losses.hard_negative_probabilities(text_to_image, *shared)
        text_probabilities = losses.hard_negative_probabilities(text_to_image.T, *shared)
        probabilities = torch.cat([image_probabilities, text_probabilities]).cpu()      # (2 A, A)
        if not probabilities.isfinite().all():
            raise ValueError("the features of a batch are NaN or infinite: training has diverged; "
                             "start a new run with a smaller --lr")
        sampled = torch.multinomial(probabilities, 1, generator=generator)
        _, world_size = rank_and_world_size()
        if world_size > 1:
            sampled = sampled.to(identity.device)
            dist.broadcast(sampled, src=0)
        return sampled.cpu().squeeze(1).chunk(2)

    def itm_loss(self, image_tokens, captions, negative_image, negative_text):
        """ITM over 3 A pairs: the true pairs, each caption with its negative image, each image with
        its negative caption. With several processes, each rank scores the pairs whose image is in
        its batch: captions are gathered, a few bytes each, while image tokens and their gradients
        stay on their rank. (With one process, `own` is all pairs, sorted by image.)

        Two processes with B = 2; rank 0 owns the pairs 0 and 1, rank 1 the pairs 2 and 3; with
        negative_image = [1, 2, 0, 0] and negative_text = [3, 0, 1, 2]:

            image  0 1 2 3 | 1 2 0 0 | 0 1 2 3      rank 0 scores the seven columns with image
            text   0 1 2 3 | 0 1 2 3 | 3 0 1 2      0 or 1, rank 1 the five with image 2 or 3"""
        rank, world_size = rank_and_world_size()
        B = len(captions)
        if world_size > 1:
            everyone = all_gather_objects(captions.to("cpu"))
            captions = Captions.concatenate(everyone).to(image_tokens.device)           # A of them
        true = torch.arange(world_size * B)
        image_index = torch.cat([true, negative_image, true])           # (3 A,)
        text_index = torch.cat([true, true, negative_text])

        own = (image_index // B == rank).nonzero().squeeze(1)           # this rank's columns
        own = own[image_index[own].argsort(stable=True)]                # sorted by image
        captions_per_image = (image_index[own] - rank * B).bincount()
        logits = self.itm_logits(image_tokens, captions.select(text_index[own]), captions_per_image)
        is_match = (own < world_size * B).long()                        # the true pairs come first
        is_match = is_match.to(image_tokens.device, non_blocking=True)
        return losses.matching_loss(logits, is_match, denominator=3 * B)

    def itm_logits(self, image_tokens, captions: Captions, captions_per_image=None):
        """ITM logits (P, 2), class 1 = match, of P captions with the images (I, L, D) they attend
        to: the first captions_per_image[0] captions with image 0, and so on (on the CPU; None: one
        each)."""
        captions = captions.with_first_token(self.student.text.enc_id)
        first = self.student.text(captions, image_tokens, captions_per_image, first_token_only=True)
        head = self.matching_head
        with torch.autocast(first.device.type, enabled=False):      # in float32, for ranking
            return F.linear(first.float(), head.weight.float(), head.bias.float())

    # ---- state changes, called by the training loop ----
    @torch.no_grad()
    def update_momentum(self, momentum: float):
        """momentum encoder = momentum * itself + (1 - momentum) * student; 0 makes it a copy."""
        averages = list(self.momentum_encoder.parameters())
        weights = list(self.student.parameters())
        torch._foreach_lerp_(averages, weights, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, image_keys, text_keys, identity):
        """Overwrite the oldest entries of the queue, a ring buffer, with keys (A, E): the momentum
        encoder's or, in phase 1, the student's."""
        Q = self.config.queue_size
        image_keys = image_keys[-Q:]
        text_keys = text_keys[-Q:]
        identity = identity[-Q:]
        slots = (self.queue_pointer + torch.arange(len(identity), device=identity.device)) % Q
        self.image_queue[slots] = image_keys
        self.text_queue[slots] = text_keys
        self.queue_identity[slots] = identity
        self.queue_pointer.copy_((self.queue_pointer + len(identity)) % Q)

    @torch.no_grad()
    def clamp_temperature(self):
        self.temperature.clamp_(0.001, 0.5)

    # ---- re-ranking, see `rerank` ----
    def pair_logits(self, image_tokens, captions: Captions, pairs=None):
        """ITM logits (P, 2) of pairs (P, 2), indices of image and caption, a CPU tensor sorted by
        image (None: all combinations). image_tokens may be on any device, in any dtype."""
        if pairs is None:
            images = torch.arange(len(image_tokens))
            pairs = torch.cartesian_prod(images, torch.arange(len(captions)))
        # chunks whose activations in the MLP, in float32, fit a CPU's cache or occupy a GPU
        tokens_per_caption = captions.sequences.num_tokens / len(captions)
        bytes_per_pair = tokens_per_caption * 4 * self.config.bert.width * 4
        chunk_bytes = 2 ** 29 if self.device.type == "cuda" else 2 ** 23
        chunks = pairs.split(1 + int(chunk_bytes / bytes_per_pair))

        logits = []
        rank, _ = rank_and_world_size()
        hide_bar = True if rank > 0 else None       # None: only shown on a terminal
        for chunk in tqdm(chunks, "re-ranking", disable=hide_bar, leave=False):
            image_index, text_index = chunk.T
            start = int(image_index[0])
            stop = int(image_index[-1]) + 1
            tokens = image_tokens[start:stop].to(self.device, self.dtype)
            captions_per_image = (image_index - start).bincount()
            logits.append(self.itm_logits(tokens, captions.select(text_index), captions_per_image))
        return torch.cat(logits)

    def rerank_score(self, logits, cosine):
        """The score that re-ranks candidates: ITM logits (..., 2) and cosines (...) -> (...).

        The paper uses logit 1 + cosine. With `rerank_by_pmi`, the score is

            cosine / tau + (logit 1 - logit 0) / 2

        It estimates the pointwise mutual information (PMI) of image i and text t. Let p(i, t) be
        the probability of a true pair, p(i) and p(t) its marginals, and n(i, t) the probability of
        a sampled negative pair. Up to constants:

            ITC learns               log p(i, t) / (p(i) p(t))  ~  cosine / tau
            negatives are sampled    log n(i, t) / (p(i) p(t))  =  cosine / tau
            ITM learns               log p(i, t) / n(i, t)      ~  logit 1 - logit 0

        The left side of the first line is the PMI, so cosine / tau is one estimate of it. The other
        two lines add up to another one, cosine / tau + logit 1 - logit 0. The score is their mean.
        (An approximation: negatives are sampled in both directions, normalised per row.)"""
        if not self.config.rerank_by_pmi:
            return logits[..., 1] + cosine
        pmi_of_itc = cosine / self.temperature.to(cosine)
        return pmi_of_itc + (logits[..., 1] - logits[..., 0]) / 2

    # ---- use from Python: computes no gradients, leaves the mode (train or eval) unchanged ----
    def preprocess(self, image) -> torch.Tensor:
        """An image (path, PIL image or uint8 array (H, W, 3)) -> pixels (3, S, S), resized to a
        square and normalised, for `encode_image`."""
        return next(pixel_batches([image], self.config.vit.image_size))[0]

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the checkpoint contains no vocabulary; pass --vocabulary "
                             "bert-base-uncased, a vocab.txt or its folder (in Python: "
                             "from_pretrained(vocabulary=...))")
        return self.tokenizer

    def tokenize(self, texts) -> Captions:
        """A text, a list of texts or `Captions` -> captions on the model's device. Warns about
        words that are not in the vocabulary; raises ValueError if there is no vocabulary or a text
        has no known word."""
        if isinstance(texts, Captions):
            return texts.to(self.device)
        check_words(texts, self.require_tokenizer())
        return self.tokenizer(texts).to(self.device)

    @torch.no_grad()
    def encode_image(self, images, batch_size: int = 128):
        """Pixels (3, S, S) or (I, 3, S, S) from `preprocess`, or what `preprocess` takes, or a list
        of either -> features (I, E), float32, of unit norm."""
        features = []
        for pixels in pixel_batches(images, self.config.vit.image_size, batch_size):
            pixels = pixels.to(self.device, self.dtype)
            features.append(self.student.image_features(pixels))
        return torch.cat(features)

    @torch.no_grad()
    def encode_text(self, texts):
        """What `tokenize` takes -> features (T, E), float32, of unit norm."""
        return self.student.text_features(self.tokenize(texts))

    @torch.no_grad()
    def match_logits(self, images, texts):
        """ITM logits (I, T, 2) and cosines (I, T). Every pair costs a pass of the text encoder."""
        captions = self.tokenize(texts)
        text_features = self.student.text_features(captions)
        T = len(captions)
        logits = []
        cosines = []
        for pixels in pixel_batches(images, self.config.vit.image_size):
            pixels = pixels.to(self.device, self.dtype)
            tokens, features = self.student.image_tokens_and_features(pixels)
            logits.append(self.pair_logits(tokens, captions).unflatten(0, (-1, T)))
            cosines.append(features @ text_features.T)
        return torch.cat(logits), torch.cat(cosines)

    def match_probability(self, images, texts):
        """P(match) of each pair (I, T), if one in three pairs is true and the others are hard
        negatives, as in training. To rank, use `score`."""
        logits, _ = self.match_logits(images, texts)
        return logits.softmax(-1)[..., 1]

    def classify(self, images, texts):
        """Zero-shot classification: probabilities (I, T) of T texts, one of which is true of an
        image: their softmax of cosine / temperature. (CLIP's logit_scale is the logarithm of 1 /
        temperature.)"""
        cosines = self.encode_image(images) @ self.encode_text(texts).T
        return (cosines / self.temperature).softmax(-1).detach()

    def score(self, images, texts):
        """The scores (I, T) that re-ranking sorts by."""
        logits, cosines = self.match_logits(images, texts)
        return self.rerank_score(logits, cosines).detach()

    # ---- checkpoints ----
    def image_encoder_hash(self) -> str:
        """Hash of the weights that compute the features of images."""
        digest = hashlib.sha256()
        for module in (self.student.image, self.student.image_projection):
            for p in module.parameters():
                digest.update(p.detach().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()

    def checkpoint(self):
        """Everything `from_pretrained` needs, as plain tensors, numbers and text."""
        tokenizer = self.tokenizer.to_json() if self.tokenizer else None
        return {"flip": asdict(self.config), "model": self.state_dict(), "tokenizer": tokenizer}

    def save_pretrained(self, folder: str):
        """Write model.safetensors, config.json and tokenizer.json, usable wherever a checkpoint
        is."""
        self.require_tokenizer()
        write_folder(self.checkpoint(), folder)

    @staticmethod
    def from_pretrained(path, config=None, vocabulary=None, image_size=0, device="cpu",
                        dtype=torch.float32):
        """Load a model, in evaluation mode, from one of our checkpoints or the official
        FLIP-base.pth: a file, a folder containing it, or a hub name. Raises ValueError if the
        file is damaged or incompatible.

        config: a FLIPConfig for an official checkpoint, which does not store its sizes; the default
        is base. vocabulary (file, folder or hub name): for checkpoints without one, such as the
        official one. image_size: a size other than the checkpoint's, to which the position
        embeddings are resized."""
        saved = read_checkpoint(path)
        with naming(path):
            if config is None:
                config = saved_config(saved)
            if image_size:
                config = replace(config, vit=replace(config.vit, image_size=image_size))
            tokenizer = None
            if saved.get("tokenizer"):
                tokenizer = Tokenizer.from_json(saved["tokenizer"])
            if vocabulary and tokenizer:
                raise ValueError(f"the checkpoint has a vocabulary of its own; omit {vocabulary}")
            if vocabulary:
                tokenizer = Tokenizer.load(vocabulary)
            model = FLIP(config, tokenizer)
        load_flip(model, saved, path)
        return model.to(choose_device(device), dtype).eval()


def saved_config(saved: dict) -> FLIPConfig:
    """The configuration in the contents of a checkpoint; base for an official one, which has
    none."""
    sizes = saved.get("flip")
    if not sizes:
        return FLIPConfig()
    vit = ViTConfig(**sizes["vit"])
    bert = BertConfig(**sizes["bert"])
    return FLIPConfig(**{**sizes, "vit": vit, "bert": bert})


# ---- re-ranking ----------------------------------------------------------------------------------
@torch.no_grad()
def rerank(model: FLIP, image_tokens, captions: Captions, similarity, k: int):
    """Re-rank each query's k most similar candidates with the matching head (BLIP's evaluation; the
    official FLIP uses [CLS] here although it trains [ENC]).

    image_tokens (I, L, D), T packed captions, similarity (I, T): cosines. Returns image_to_text (I,
    T) and text_to_image (T, I): `rerank_score` for the k candidates of a query; all others rank
    below them by cosine. A pair needed in both directions is scored once; processes divide up the
    pairs."""
    rank, world_size = rank_and_world_size()
    if world_size > 1:
        similarity = similarity.clone()
        dist.broadcast(similarity, src=0)               # rounding differs between ranks
    I, T = similarity.shape
    for_image = torch.zeros_like(similarity, dtype=torch.bool)
    for_image.scatter_(1, similarity.topk(min(k, T), dim=1).indices, True)
    for_text = torch.zeros_like(for_image)
    for_text.scatter_(0, similarity.topk(min(k, I), dim=0).indices, True)
    pairs = (for_image | for_text).nonzero()                            # (P, 2), image by image
    image_index, text_index = pairs.T

    own = torch.arange(len(pairs)).tensor_split(world_size)[rank]       # those of this process
    scores = similarity.new_zeros(len(pairs))
    if len(own):
        logits = model.pair_logits(image_tokens, captions, pairs[own].cpu()).to(similarity)
        scores[own] = model.rerank_score(logits, similarity[image_index[own], text_index[own]])
    if world_size > 1:
        dist.all_reduce(scores)

    reranked = torch.zeros_like(similarity)
    reranked[image_index, text_index] = scores
    others = similarity + (scores.min() - 2)            # below the worst candidate, by cosine
    image_to_text = torch.where(for_image, reranked, others)
    text_to_image = torch.where(for_text, reranked, others)
    return image_to_text, text_to_image.T


# ---- a small example -----------------------------------------------------------------------------
@torch.no_grad()
def main():
    """Trace a batch of four pairs through the forward pass and the queue: shapes and values."""
    torch.manual_seed(0)
    texts = ["a smiling woman with blond hair", "a bald man", "she has blond hair", "a bearded man"]
    identity = torch.tensor([7, 8, 7, 9])               # images 0 and 2 show the same person
    images = torch.randn(4, 3, 32, 32)
    tokenizer = Tokenizer.train(texts)
    vit = ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=4)
    bert = BertConfig(tokenizer.vocab_size, width=64, depth=2, heads=4, dropout=0.0)
    model = FLIP(FLIPConfig(vit, bert, embed_dim=16, queue_size=6), tokenizer)

    captions = tokenizer(texts)
    pieces = [tokenizer.wordpiece.id_to_token(i) for i in captions.ids.tolist()]
    print(f"captions of {captions.sequences.lengths.tolist()} tokens, packed:", *pieces)
    tokens, image = model.student.image_tokens_and_features(images)
    print(f"images {list(images.shape)} -> tokens {list(tokens.shape)}")
    print(f"the first tokens -> features {list(image.shape)}")
    text = model.student.text_features(captions)
    print(f"captions -> features {list(text.shape)}")
    print("cosines, images x captions:", image @ text.T, sep="\n")

    wrong_images, wrong_texts = model.sample_negatives(image, text, identity)
    print(f"negatives of ITM: the captions with images {wrong_images.tolist()},")
    print(f"and the images with captions {wrong_texts.tolist()}")
    out = model(images, captions, identity)
    print(f"ITC {out.itc:.4f}, ITM {out.itm:.4f} (0.6365 if P(match) is always 1/3)")
    before = model.queue_identity.tolist()
    model.enqueue(out.image_keys, out.text_keys, out.identity)
    print(f"identities in the queue: {before} -> {model.queue_identity.tolist()}")


if __name__ == "__main__":
    run_script(main)
