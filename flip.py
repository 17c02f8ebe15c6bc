"""FLIP: the two encoders, their momentum copies, the queue and the heads (FLIP paper, figure 2a).

                  student                                   momentum encoder (a slow average of the student)
    image -> ViT -> tokens --+-> projection -> feature          image -> ViT  -> projection -> feature --> queue
    text -> BERT ------------|-> projection -> feature          text  -> BERT -> projection -> feature --> queue
    text + image tokens -> BERT with cross-attention -> matching head

ITC compares student features with momentum features of batch and queue; ITM asks the image-grounded encoder about each
pair of the batch and about two hard negatives per pair. This is BLIP without its caption decoder.

`forward` computes the losses and changes nothing. The training loop changes state, one named call each:
`update_momentum`, `enqueue`, `clamp_temperature`. (The official forward does all of this on the way.)

Several processes: the keys are gathered (they carry no gradient), and each ITM pair is judged by the process that owns
its image, so captions travel, a few bytes each, while image tokens and their gradients stay where they are.

Shapes: B pairs here, A pairs on all processes, Q queue entries, E feature size, L image tokens, P pairs to judge,
I images and T texts of a gallery.
Run `python flip.py --checkpoint out/flip.pt --images DIR "a smiling woman with blond hair"` to search a folder.
"""
import argparse
import copy
import hashlib
import os
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bert import MAX_TOKENS, Bert, BertConfig, Captions, Tokenizer, bert_name, clean_caption
from kernels.attention import Sequences, pad
from kernels.contrastive import contrastive_loss
from losses import matching_loss, negative_probabilities
from vit import CLIP_NAMES, ViT, ViTConfig, copy_weights, open_picture, rename, resize_positions, to_tensor


@dataclass(frozen=True)
class FLIPConfig:
    vit: ViTConfig = field(default_factory=ViTConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    embed_dim: int = 256
    queue_size: int = 61440
    momentum: float = 0.995
    cosine_weight: float = 1.0      # of the cosine beside the matching logit when candidates are scored again


# ---- processes -----------------------------------------------------------------------------------------------------
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
    """Captions of every process. They travel in rectangles, since every process must send equally much."""
    if rank_and_world()[1] == 1:
        return captions
    device = captions.ids.device
    padded = pad(captions.ids[:, None, None], captions.sequences)[:, 0, :, 0]                # (B, longest)
    rectangle = gather(F.pad(padded, (0, MAX_TOKENS - padded.shape[1])))                     # (A, MAX_TOKENS)
    lengths = gather(captions.sequences.lengths.to(device)).cpu()       # (A,); the host waits for the GPU
    sequences = Sequences.of(lengths, device)
    return Captions(rectangle[sequences.sequence_of, sequences.places], sequences)


# ---- the model -----------------------------------------------------------------------------------------------------
class Encoders(nn.Module):
    """Image encoder, text encoder and their projections; the student is one, the momentum encoder another."""

    def __init__(self, config):
        super().__init__()
        self.image = ViT(config.vit)
        self.text = Bert(config.bert, image_width=config.vit.width)
        self.image_projection = nn.Linear(config.vit.width, config.embed_dim)
        self.text_projection = nn.Linear(config.bert.width, config.embed_dim)

    def encode_image(self, images, features_only=False):
        """images (B, 3, S, S) -> tokens (B, L, D), features (B, E) of length 1; with features_only the tokens are None."""
        tokens = self.image(images, first_only=features_only)
        first = tokens if features_only else tokens[:, 0]                                   # (B, D)
        return None if features_only else tokens, F.normalize(self.image_projection(first).float(), dim=-1)

    def encode_text(self, captions):
        """Packed captions -> features (B, E) of length 1."""
        first = self.text(captions, first_only=True)
        return F.normalize(self.text_projection(first).float(), dim=-1)


class Output(NamedTuple):
    itc: torch.Tensor               # the two losses; their sum is what the paper minimises
    itm: torch.Tensor
    image_keys: torch.Tensor        # momentum features of all processes (A, E), to be enqueued
    text_keys: torch.Tensor
    identity: torch.Tensor          # (A,)


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
        # Random unit vectors at first, whose identity nobody has: negatives (the official start).
        self.register_buffer("image_queue", F.normalize(torch.randn(config.queue_size, config.embed_dim), dim=-1))
        self.register_buffer("text_queue", F.normalize(torch.randn(config.queue_size, config.embed_dim), dim=-1))
        self.register_buffer("queue_identity", torch.full((config.queue_size,), -100))
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))

    def use(self, tokenizer):
        """Take this tokenizer; its vocabulary must have as many entries as the model has word embeddings."""
        if tokenizer.vocab_size != self.config.bert.vocab_size:
            raise ValueError(f"the vocabulary has {tokenizer.vocab_size} entries ([DEC] and [ENC] included), the model's word "
                             f"embeddings {self.config.bert.vocab_size}; give the vocabulary that the model was trained with")
        self.tokenizer = tokenizer

    def encode_image(self, images, features_only=False):
        """images (B, 3, S, S) -> tokens (B, L, D), features (B, E) of length 1; with features_only the tokens are None."""
        return self.student.encode_image(images, features_only)

    def encode_text(self, captions):
        """Packed captions -> features (B, E) of length 1."""
        return self.student.encode_text(captions)

    def match(self, image_tokens, captions, image_of=None):
        """ITM logits (P, 2) of P captions with images: caption p with image_tokens[image_of[p]], (I, L, D)."""
        captions = captions.starting_with(self.student.text.enc_token)
        first = self.student.text(captions, image_tokens, image_of, first_only=True)        # (P, D)
        with torch.autocast(first.device.type, enabled=False):      # added to cosines later: half precision is too coarse
            return self.matching_head(first.float())

    def forward(self, images, captions, identity, alpha=0.4, queue_length=None, hardness=1.0, with_momentum=True, with_itm=True,
                generator=None):
        """Both losses for B pairs: images (B, 3, S, S), packed captions, identity (B,).

        alpha: share of the soft targets in ITC. queue_length: how many queue entries to use (None: all).
        hardness: see losses.negative_probabilities. generator: a CPU generator for drawing negatives. with_momentum: False
        while the momentum encoder is a copy of the student (momentum 0), whose features then serve as its own.
        """
        image_tokens, image_features = self.encode_image(images, features_only=not with_itm)
        text_features = self.encode_text(captions)
        image_momentum, text_momentum = image_features.detach(), text_features.detach()
        if with_momentum:
            with torch.no_grad():
                image_momentum = self.momentum_encoder.encode_image(images, features_only=True)[1]
                text_momentum = self.momentum_encoder.encode_text(captions)
        image_keys, text_keys, all_identity = gather(image_momentum), gather(text_momentum), gather(identity)
        image_pool = [image_keys, self.image_queue[:queue_length]]              # batch and queue, two pieces as they lie
        text_pool = [text_keys, self.text_queue[:queue_length]]
        shared = identity, [all_identity, self.queue_identity[:queue_length]], self.temperature, alpha
        image_to_text = contrastive_loss(image_features, image_momentum, text_pool, *shared)
        text_to_image = contrastive_loss(text_features, text_momentum, image_pool, *shared)
        itc = (image_to_text + text_to_image) / 2
        itm = itc.new_zeros(())
        if with_itm:
            negatives = self.draw_negatives(gather(image_features), gather(text_features), all_identity, hardness, generator)
            itm = self.matching(image_tokens, captions, *negatives)
        return Output(itc, itm, image_keys, text_keys, all_identity)

    @torch.no_grad()
    def draw_negatives(self, image_features, text_features, identity, hardness, generator):
        """One negative image for every caption and one negative caption for every image: two (A,) CPU tensors.

        The first process draws for all, since probabilities may differ between processes in their last bit. Here the host
        waits for the GPU: which captions were drawn decides how many tokens there are.
        """
        with torch.autocast(image_features.device.type, enabled=False):
            similarity = text_features @ image_features.T                                   # (A texts, A images)
            images = negative_probabilities(similarity, identity, self.temperature, hardness)
            texts = negative_probabilities(similarity.T, identity, self.temperature, hardness)
        probabilities = torch.cat([images, texts]).cpu()                                    # (2 A, A)
        if not probabilities.isfinite().all():
            raise ValueError("the features are no longer finite numbers: training has diverged; use a smaller --lr")
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        if dist.is_initialized():
            drawn = drawn.to(identity.device)
            dist.broadcast(drawn, src=0)
        return drawn.cpu().squeeze(1).chunk(2)

    def matching(self, image_tokens, captions, negative_image, negative_text):
        """ITM over the 3 A pairs: each pair itself, each caption with its negative image, each image with its negative
        caption. This process judges the pairs whose image it owns; averaged over processes that is the mean over 3 A."""
        (rank, world), B = rank_and_world(), len(captions)
        own = torch.arange(world * B)
        image_index = torch.cat([own, negative_image, own])                                 # (3 A,)
        text_index = torch.cat([own, own, negative_text])
        is_match = (torch.arange(3 * world * B) < world * B).long()
        mine = image_index // B == rank
        device = image_tokens.device
        logits = self.match(image_tokens, gather_captions(captions).select(text_index[mine]),
                            (image_index[mine] - rank * B).to(device, non_blocking=True))
        return matching_loss(logits, is_match[mine].to(device, non_blocking=True), pairs=3 * B)

    # ---- changes of state, called by the training loop ----
    @torch.no_grad()
    def update_momentum(self, momentum=None):
        """momentum encoder = m * momentum encoder + (1 - m) * student."""
        m = self.config.momentum if momentum is None else momentum
        torch._foreach_lerp_(list(self.momentum_encoder.parameters()), list(self.student.parameters()), 1 - m)

    @torch.no_grad()
    def enqueue(self, image_keys, text_keys, identity):
        """Replace the oldest queue entries by these momentum features (A, E); the ring wraps."""
        Q = self.config.queue_size
        image_keys, text_keys, identity = image_keys[-Q:], text_keys[-Q:], identity[-Q:]
        slots = (self.queue_pointer + torch.arange(len(identity), device=identity.device)) % Q
        self.image_queue[slots], self.text_queue[slots], self.queue_identity[slots] = image_keys, text_keys, identity
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
    def from_pretrained(path, config=None):
        """A model from one of our checkpoints or from the official FLIP-base.pth.

        config: needed only where an official file's widths are not multiples of 64, since head counts are not in it. An
        image size other than the file's resizes the position tables. Our checkpoints bring their tokenizer.
        """
        saved = read_checkpoint(path)
        try:
            return from_official(saved["model"], config, path) if "flip" not in saved else from_ours(saved, config, path)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, or written by another version ({type(error).__name__}: {error})") from error


def from_ours(saved, config, path):
    sizes = saved["flip"]
    config = config or FLIPConfig(**sizes | {"vit": ViTConfig(**sizes["vit"]), "bert": BertConfig(**sizes["bert"])})
    model = FLIP(config, saved["tokenizer"] and Tokenizer.from_json(saved["tokenizer"], str(path)))
    weights = dict(saved["model"])
    for name in ("student.image.positions", "momentum_encoder.image.positions"):
        weights[name] = resize_positions(weights[name], config.vit.patches)
    copy_weights(model, weights, lambda name: name, str(path))
    return model


# ---- the official checkpoint ---------------------------------------------------------------------------------------
HEADS = {"image_queue": "image_queue", "text_queue": "text_queue", "queue_identity": "idx_queue", "queue_pointer": "ptr_queue",
         "temperature": "temp", "matching_head.weight": "itm_head.weight", "matching_head.bias": "itm_head.bias"}
IMAGE_TABLE = "vision_model.embeddings.position_embedding.weight"


def official_name(name):
    """Our name of an entry of the state -> its name in FLIP-base.pth."""
    if name in HEADS:
        return HEADS[name]
    encoders, part, rest = name.split(".", 2)
    m = "_m" if encoders == "momentum_encoder" else ""
    if part == "image":
        return f"visual_encoder{m}.vision_model.{rename(rest, CLIP_NAMES).replace('post_layernorm', 'post_layrnorm')}"
    if part == "text":
        return f"text_encoder{m}.{bert_name(rest)}"
    return f"{'vision_proj' if part == 'image_projection' else 'text_proj'}{m}.{rest}"


def official_state(model):
    """The model's state in the official layout: {name: tensor}, ready for torch.save({"model": ...})."""
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    state["image_queue"], state["text_queue"] = state["image_queue"].T.contiguous(), state["text_queue"].T.contiguous()
    state["idx_queue"] = state["idx_queue"][None]                                           # (1, Q)
    for m in ("", "_m"):                                                                    # these carry nothing
        state[f"visual_encoder{m}.vision_model.embeddings.position_ids"] = torch.arange(model.config.vit.patches + 1)[None]
        state[f"text_encoder{m}.embeddings.position_ids"] = torch.arange(model.config.bert.positions)[None]
    return state


def official_config(weights, path):
    """The configuration that an official checkpoint's shapes tell; heads are 64 wide, as in every ViT and BERT of note."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in weights if name.startswith(prefix)})
    width, _, patch, _ = weights["visual_encoder.vision_model.embeddings.patch_embedding.weight"].shape
    vocabulary, text_width = weights["text_encoder.embeddings.word_embeddings.weight"].shape
    if width % 64 or text_width % 64:
        raise ValueError(f"{path}: the widths {width} and {text_width} are not multiples of 64, so the number of heads cannot "
                         f"be read off the shapes; pass config=FLIPConfig(...)")
    grid = round((len(weights["visual_encoder." + IMAGE_TABLE]) - 1) ** 0.5)
    positions = len(weights["text_encoder.embeddings.position_embeddings.weight"])
    embed_dim, queue_size = weights["image_queue"].shape
    return FLIPConfig(ViTConfig(grid * patch, patch, width, depth("visual_encoder.vision_model.encoder.layers."), width // 64),
                      BertConfig(vocabulary, text_width, depth("text_encoder.encoder.layer."), text_width // 64, positions),
                      embed_dim, queue_size)


def from_official(weights, config, path):
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    missing = [name for name in map(official_name, FLIP_NAMES) if name not in weights]
    if missing:
        raise ValueError(f"{path} is neither one of our checkpoints nor an official one: it has no {missing[0]}")
    config = config or official_config(weights, path)
    for table in ("visual_encoder." + IMAGE_TABLE, "visual_encoder_m." + IMAGE_TABLE):
        weights[table] = resize_positions(weights[table], config.vit.patches)
    weights["image_queue"], weights["text_queue"] = weights["image_queue"].T, weights["text_queue"].T
    weights["idx_queue"] = weights["idx_queue"][0]
    model = FLIP(config)
    copy_weights(model, weights, official_name, str(path))
    return model


# Enough of our names to recognise an official checkpoint by.
FLIP_NAMES = (*HEADS, *(f"{encoders}.{name}" for encoders in ("student", "momentum_encoder")
                        for name in ("image.patch_embedding.weight", "image.positions", "text.words.weight", "text.positions")))


def read_checkpoint(path):
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged ({type(error).__name__})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with the weights under 'model', found none")
    return saved


def write_whole(contents, path):
    """torch.save to `path`, completely or not at all: whoever reads it never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(contents, partial)
    os.replace(partial, path)


# ---- retrieval -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def rerank(model, image_tokens, captions, similarity, k, pairs_at_once=1024, progress=False):
    """Score each query's k most similar candidates again with the matching head (BLIP's evaluation; unlike the official
    FLIP, which judges from [CLS] here though it trains on [ENC]).

    image_tokens (I, L, D), T packed captions, similarity (I, T): cosines. Returns (image_to_text (I, T), text_to_image
    (T, I)): matching logit + cosine (times its weight) for the k candidates of a query; the others rank below them in
    order of cosine.
    A pair that both directions ask for is judged once, and the keys and values of an image once per chunk of pairs.
    """
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    for_image = torch.zeros_like(similarity, dtype=torch.bool)
    for_text = for_image.clone()
    for_image.scatter_(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices, True)
    for_text.scatter_(0, similarity.topk(min(k, similarity.shape[0]), dim=0).indices, True)
    pairs = (for_image | for_text).nonzero().cpu()                                          # (P, 2), image by image
    logit = torch.zeros_like(similarity)
    for chunk in tqdm(pairs.split(pairs_at_once)[rank::world], "re-ranking", disable=not progress, leave=False):
        image, text = chunk.T
        first, last = int(image[0]), int(image[-1])
        tokens = image_tokens[first:last + 1].float().to(device)
        judged = model.match(tokens, captions.select(text), (image - first).to(device))[:, 1]
        logit[image, text] = judged.to(logit)
    if world > 1:
        dist.all_reduce(logit)
    scores = model.config.cosine_weight * similarity + logit
    return torch.where(for_image, scores, similarity - 100), torch.where(for_text, scores, similarity - 100).T


def contact_sheet(rows, tile=128, margin=8):
    """A picture of rows (title, [(image, label, framed)]): the title above, the label below each image; framed ones get a
    green frame."""
    font = ImageFont.load_default(max(11, tile // 9))
    columns = max(len(tiles) for _, tiles in rows)
    width = margin + columns * (tile + margin)
    titles = [wrap(title, font, width - 2 * margin) for title, _ in rows]
    line = font.size + 4
    heights = [title.count("\n") * line + 2 * line + tile + line + 2 * margin for title in titles]
    sheet = Image.new("RGB", (width, sum(heights) + margin), "white")
    pen, top = ImageDraw.Draw(sheet), margin
    for title, height, (_, tiles) in zip(titles, heights, rows):
        pen.text((margin, top), title, fill="black", font=font, spacing=4)
        y = top + height - tile - line - 2 * margin                             # where the images of this row begin
        for column, (image, label, framed) in enumerate(tiles):
            x = margin + column * (tile + margin)
            if framed:
                pen.rectangle((x - 4, y - 4, x + tile + 3, y + tile + 3), fill=(40, 160, 70))
            sheet.paste(image.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS), (x, y))
            pen.text((x, y + tile + 4), label, fill=(90, 90, 90), font=font)
        top += height
    return sheet


def wrap(text, font, width):
    """Line breaks where the text would become wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return "\n".join(lines)


# ---- search: python flip.py ----------------------------------------------------------------------------------------
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_features(cache, embed_dim):
    """{key: feature} kept from the last search; nothing where there is none, or a damaged one."""
    try:
        known = torch.load(cache, weights_only=True)
        return known if all(feature.shape == (embed_dim,) for feature in known.values()) else {}
    except Exception:                               # whatever is wrong with it, it is computed again
        return {}


@torch.no_grad()
def folder_features(model, folder, cache, batch_size=64):
    """{path: feature (E,)} for every picture below `folder`. Features of unchanged files come from the file `cache`;
    a picture that cannot be read is named and left out."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"{folder}: no pictures found ({', '.join(PICTURES)}, subfolders included)")
    known = read_features(cache, model.config.embed_dim)
    keys = {path: f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths if path.is_file()}
    new = [path for path in keys if keys[path] not in known]
    for start in tqdm(range(0, len(new), batch_size), "reading pictures", disable=not new):
        pixels = {}
        for path in new[start:start + batch_size]:
            try:
                pixels[path] = to_tensor(open_picture(path), model.config.vit.image_size)
            except ValueError as error:
                tqdm.write(f"left out: {error}")
        if pixels:
            device = model.temperature.device
            features = model.encode_image(torch.stack(list(pixels.values())).to(device), features_only=True)[1].cpu()
            known |= {keys[path]: feature.clone() for path, feature in zip(pixels, features)}
    if new:
        write_whole(known, cache)
    found = {path: known[key] for path, key in keys.items() if key in known}
    if not found:
        raise ValueError(f"{folder}: none of its {len(paths)} pictures can be read")
    return found


@torch.no_grad()
def search(model, features, query, top=8, k=32):
    """The `top` best (path, cosine, matching probability) for a sentence, the k most similar judged by the matching head."""
    device = model.temperature.device
    captions = model.tokenizer([query]).to(device)
    paths = list(features)
    similarity = torch.stack(list(features.values())) @ model.encode_text(captions)[0].cpu()        # (I,)
    best = similarity.topk(min(max(k, top), len(paths))).indices
    pixels = torch.stack([to_tensor(open_picture(paths[i]), model.config.vit.image_size) for i in best])
    tokens = model.encode_image(pixels.to(device))[0]
    logits = model.match(tokens, captions.select(torch.zeros(len(best), dtype=torch.int64)))        # (k, 2)
    order = (logits[:, 1].cpu() + model.config.cosine_weight * similarity[best]).argsort(descending=True)[:top]
    probability = logits.softmax(1)[:, 1].cpu()
    return [(paths[best[i]], similarity[best[i]].item(), probability[i].item()) for i in order]


def main():
    parser = argparse.ArgumentParser(description="Search a folder of face photographs with a sentence.")
    parser.add_argument("query", help='for example "a smiling woman with blond hair"')
    parser.add_argument("--checkpoint", default="out/flip.pt", help="made by train.py, or the official FLIP-base.pth")
    parser.add_argument("--images", required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument("--vocabulary", help="vocab.txt, tokenizer.json, folder or hub name; needed for the official "
                                             "checkpoint, which does not hold one (bert-base-uncased)")
    parser.add_argument("--top", type=int, default=8, help="how many faces to show")
    parser.add_argument("--out", default="out/search.png", help="where to write the contact sheet")
    args = parser.parse_args()
    if not clean_caption(args.query):
        raise ValueError(f"the query {args.query!r} has no words")
    if args.top < 1:
        raise ValueError(f"--top {args.top}: expected at least 1")
    if Path(args.out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {args.out}: expected the name of a picture, such as out/search.png")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    model = FLIP.from_pretrained(args.checkpoint).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if args.vocabulary:
        model.use(Tokenizer.load(args.vocabulary))
    if model.tokenizer is None:
        raise ValueError(f"{args.checkpoint} holds no vocabulary; give one with --vocabulary bert-base-uncased or a vocab.txt")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder")
    state = Path(args.checkpoint).stat()
    name = hashlib.sha256(f"{Path(args.checkpoint).resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    features = folder_features(model, args.images, Path(args.out).parent / f"features-{name}.pt")
    found = search(model, features, args.query, args.top)
    print(f"{'ITC':>6} {'ITM':>6}  best of {len(features)} faces")
    for path, cosine, probability in found:
        print(f"{cosine:6.3f} {probability:6.3f}  {path}")
    tiles = [(open_picture(path), f"{cosine:.2f}  {probability:.2f}", False) for path, cosine, probability in found]
    contact_sheet([(args.query, tiles)]).save(args.out)
    print(f"contact sheet: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
