"""Faces with sentences, in batches: what the model is trained on.

    Faces      the pictures of one part of a set, with captions, attributes or growing sketches
    augment    the recipe's random changes of a picture
    Batches    an endless stream of batches of them

Below stand what makes them: the grammar that writes captions, an ideal reader of these, and the
readers of sets as they lie on disk (open_faces, drawn_faces).

FLIP's captions start from a probabilistic context-free grammar over CelebA's 40 attributes (arXiv
2407.08515, section 3). Ours states each *fact* of a face by chance, then writes the stated facts as
sentences; because that chance is known, so is how well an ideal reader could find the face again
(`reference_recalls`): the numbers a training run is held against.

Where we leave the official code: captions come fresh from the grammar each time instead of from a
file; the order of the samples, their captions and their augmentation depend on (seed, epoch, index)
and the flags alone, so a run resumed at any step, with any number of workers, sees what an
uninterrupted one sees; bad input is named with file and record. (Capital letters are sizes, see
vit.py.)

    python data.py               # what the drawn faces and their captions are like: report.png
    python data.py --data DIR    # the same of faces of your own; LAYOUTS says what DIR may be
"""
import argparse
import bisect
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import random
import re
import signal
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import bert
import toyfaces
import vit
from toyfaces import ATTRIBUTES


@dataclass
class Faces:
    """I pictures of people, and what is known of them: any of the last three, or nothing. Of a set
    on disk all this lies in a mapped index (see below), which costs a process no memory."""
    name: str                               # what to call them in errors: "CelebA train"
    pictures: object                        # uint8 (I, S, S, 3), or Paths and Crops: where they lie
    identity: np.ndarray                    # int64 (I,): equal numbers, same person
    attributes: np.ndarray | None = None    # bool (I, 40), in the order of ATTRIBUTES
    captions: object = None                 # texts for each picture; without them, the grammar writes some
    sketches: object = None                 # for each picture the paths of its sketch as it grows,
                                            # or uint8 (I, steps, S, S), white on black

    def __post_init__(self):
        if len(self) == 0:
            raise ValueError(f"{self.name}: no faces, expected at least one in this part")
        for field in ("identity", "attributes", "captions", "sketches"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{self.name}: {len(self)} pictures, but {len(values)} entries in {field}")

    def __len__(self):
        return len(self.pictures)

    def picture(self, i, size=None):
        """Face i as a PIL RGB image, whole or size x size; ValueError if its file is damaged or no
        picture."""
        return self.opened(i, self.pictures[i], size)

    def opened(self, i, picture, size=None):
        if isinstance(picture, np.ndarray):
            image = Image.fromarray(picture).convert("RGB")
            return image.resize((size, size), Image.Resampling.BICUBIC) if size else image
        try:
            return picture.open(size) if isinstance(picture, Crop) else vit.open_picture(picture, size=size)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name}, record {i}: {error}") from None

    @property
    def has_text(self):
        return self.captions is not None or self.attributes is not None

    def check_text(self):
        """ValueError where nothing can be said of the faces: ask before the work begins."""
        if not self.has_text:
            raise ValueError(f"{self.name}: expected captions, or attributes to write them from, found none")

    def caption(self, i, rng):
        """One of the captions of face i, or a new one from the grammar."""
        self.check_text()
        if self.captions is not None:
            captions = self.captions[i]
            return captions[rng.integers(len(captions))]
        return caption(self.attributes[i], rng)[0]

    @property
    def steps(self):
        """In how many steps a sketch grows; 0 without sketches."""
        return 0 if self.sketches is None else len(self.sketches[0])

    def sketch(self, i, t):
        """The sketch of face i after step t (counted from 0) as a PIL RGB image, white on black.

        A file that is light on the whole has dark strokes on paper, as FS2K's finished sketches do,
        and is inverted.
        """
        image = self.opened(i, self.sketches[i][t]).convert("L")
        if np.asarray(image).mean() > 127:
            image = ImageOps.invert(image)
        return image.convert("RGB")

    def subset(self, indices):
        fields = (self.pictures, self.identity, self.attributes, self.captions, self.sketches)
        chosen = np.asarray(indices, dtype=np.int64)
        return Faces(self.name, *(None if values is None else values[chosen] for values in fields))


# ---- augmentation ------------------------------------------------------------------------------
GREY = (128, 128, 128)      # fills what a moved picture leaves open


def affine(image, a, b, c, d, e, f):
    """The picture whose pixel (x, y) is the given one's (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR,
                           fillcolor=GREY)


# FLIP's nine operations (BLIP's without AutoContrast) at strength 5 of 10; sign is +1 or -1.
# Brightness and sharpness are multiplied by 0.1 + 1.8 * strength / 10, which at this strength is 1:
# they change nothing, here as there.
AUGMENTATIONS = {
    "identity": lambda image, sign: image,
    "brightness": lambda image, sign: image,
    "sharpness": lambda image, sign: image,
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "shear x": lambda image, sign: affine(image, 1, sign * 0.15, 0, 0, 1, 0),
    "shear y": lambda image, sign: affine(image, 1, 0, 0, sign * 0.15, 1, 0),
    "translate x": lambda image, sign: affine(image, 1, 0, sign * 5 / 224 * image.width, 0, 1, 0),  # 5 of 224
    "translate y": lambda image, sign: affine(image, 1, 0, 0, 0, 1, sign * 5 / 224 * image.height),
    "rotate": lambda image, sign: image.rotate(sign * 15, Image.Resampling.BILINEAR, fillcolor=GREY),
}


def augment(image, rng):
    """The recipe's augmentation of a picture that has the model's size, RGB to RGB."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for name in rng.choice(list(AUGMENTATIONS), 2):
        if rng.random() < 0.5:
            image = AUGMENTATIONS[name](image, rng.choice((-1, 1)))
    return image


# ---- batches -----------------------------------------------------------------------------------
class Batch(NamedTuple):
    images: torch.Tensor        # (B, 3, S, S) float32
    captions: bert.Captions     # B of them, packed
    identity: torch.Tensor      # (B,) int64
    lost: dict                  # {number of a face: why it cannot be read}; others stand in for these

    def to(self, device):
        return Batch(self.images.to(device, non_blocking=True), self.captions.to(device),
                     self.identity.to(device, non_blocking=True), self.lost)


class Samples(torch.utils.data.Dataset):
    """What (epoch, index) shows: a pure function of it and the seed (and of what can be read: for a
    damaged picture another face stands in)."""

    def __init__(self, faces, tokenizer, image_size, seed, augmented):
        self.faces, self.tokenizer, self.image_size = faces, tokenizer, image_size
        self.seed, self.augmented = seed, augmented

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index + 1))  # index 0 would give the permutation's
        lost, image = {}, None
        while image is None:
            try:
                image = self.faces.picture(index, self.image_size)
            except ValueError as error:
                lost[index] = str(error)
                if len(lost) == min(100, len(self.faces)):
                    raise ValueError(f"{error} (and {len(lost) - 1} others in its place)") from None
                index = int(rng.integers(len(self.faces)))
        if self.augmented:
            image = augment(image, rng)
        text = self.faces.caption(index, rng)
        return vit.to_pixels(image, self.image_size), text, self.faces.identity[index], lost

    def collate(self, samples):
        pixels, texts, identity, lost = zip(*samples)
        return Batch(vit.to_tensor(pixels), self.tokenizer(list(texts)), torch.tensor(np.array(identity)),
                     dict(itertools.chain.from_iterable(found.items() for found in lost)))


class Batches:
    """Endless batches of `batch_size` for one of `world` processes; `per_epoch` are an epoch.

    Batch n of an epoch shows the n-th stretch of world * batch_size faces of the epoch's
    permutation; process r takes the r-th part of it, so the parts gathered in order are the batch
    that a single process would see.
    """

    def __init__(self, faces, tokenizer, image_size, batch_size, seed=0, augmented=True, rank=0, world=1,
                 workers=0, max_lost=0.0):
        faces.check_text()
        self.faces, self.seed, self.workers = faces, seed, workers
        self.lost, self.max_lost = {}, max_lost     # met in this epoch; at most how many, in percent
        self.batch_size, self.rank, self.global_size = batch_size, rank, batch_size * world
        self.samples = Samples(faces, tokenizer, image_size, seed, augmented)
        self.per_epoch = len(faces) // self.global_size   # what is left over waits for another order
        if self.per_epoch == 0:
            raise ValueError(f"{faces.name}: {len(faces)} faces are fewer than a batch of {self.global_size} "
                             f"({world} processes x {batch_size}); use a smaller batch")

    def from_batch(self, number):
        """Iterator over batches from this one (counted from 0 over all epochs) on, without end.

        ValueError, in one sentence, when more than max_lost percent of the faces of an epoch cannot be
        read.
        """
        loader = torch.utils.data.DataLoader(
            self.samples, batch_sampler=self.keys(number), collate_fn=self.samples.collate,
            num_workers=self.workers, pin_memory=torch.cuda.is_available(),
            # forked workers share what is mapped; others would be sent a copy
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
            generator=torch.Generator())        # its own: it must not draw from the model's random numbers
        try:
            for number, batch in enumerate(loader, number):
                if number % self.per_epoch == 0:
                    self.lost = {}
                for i in sorted(batch.lost.keys() - self.lost.keys()):
                    self.lost[i] = batch.lost[i]
                    check_lost([*self.lost.values()], self.per_epoch * self.batch_size, self.max_lost)
                    tqdm.write(f"{batch.lost[i]} (another face stands in)")
                yield batch
        except ValueError as error:             # a worker's comes with a traceback as text: keep the sentence
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def keys(self, number):
        """For each batch from this one on, the list of (epoch, index) that this process shows."""
        for epoch in itertools.count(number // self.per_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.faces))
            for n in range(number % self.per_epoch, self.per_epoch):
                own = order[n * self.global_size + self.rank * self.batch_size:][:self.batch_size]
                yield [(epoch, index) for index in own.tolist()]
            number = 0                          # the epochs that follow begin at their beginning


# ==== A first reading may stop here: the grammar, its ideal reader, the readers of sets, a report =
# ---- the caption grammar -----------------------------------------------------------------------
# A fact of a face is an attribute that is true, or "not Male", or "not Young". Its row: how often
# it is stated, and the ways to say it, each opened by its kind: what one `is`, `has` or `wears`,
# the `noun` for the person, the `photo`, or else the part of the face that the words describe.
# {his} becomes his, her or their.
GRAMMAR = {
    "5_o_Clock_Shadow": (.70, "has a 5 o'clock shadow | has stubble | has some stubble on {his} chin"),
    "Arched_Eyebrows": (.55, "eyebrows arched | eyebrows curved"),
    "Attractive": (.40, "is attractive | is good-looking | has an attractive look"),
    "Bags_Under_Eyes": (.65, "has bags under {his} eyes | has dark circles under {his} eyes"),
    "Bald": (.85, "is bald | has a bald head | has no hair left"),
    "Bangs": (.75, "has bangs | has a fringe | has bangs over {his} forehead"),
    "Big_Lips": (.65, "lips full | lips big | lips large"),
    "Big_Nose": (.65, "nose big | nose large"),
    "Black_Hair": (.70, "hair black | hair jet-black"),
    "Blond_Hair": (.75, "hair blond | hair blonde | hair golden"),
    "Blurry": (.65, "photo blurry | photo blurred"),
    "Brown_Hair": (.65, "hair brown | hair chestnut"),
    "Bushy_Eyebrows": (.65, "eyebrows bushy | eyebrows thick"),
    "Chubby": (.65, "is chubby | is plump"),
    "Double_Chin": (.70, "has a double chin | has a second chin below the first"),
    "Eyeglasses": (.90, "wears glasses | wears eyeglasses | wears a pair of glasses"),
    "Goatee": (.80, "has a goatee | has a small goatee"),
    "Gray_Hair": (.75, "hair gray | hair grey"),
    "Heavy_Makeup": (.55, "wears heavy makeup | wears a lot of makeup"),
    "High_Cheekbones": (.55, "cheekbones high | cheekbones prominent"),
    "Male": (.80, "noun man | noun man | noun guy | noun gentleman"),
    "Mouth_Slightly_Open": (.65, "mouth slightly open | mouth partly open"),
    "Mustache": (.80, "has a mustache | has a moustache"),
    "Narrow_Eyes": (.65, "eyes narrow | eyes small"),
    "No_Beard": (.50, "has no beard | has no beard at all"),
    "Oval_Face": (.60, "face oval | face oval-shaped"),
    "Pale_Skin": (.70, "skin pale | skin fair"),
    "Pointy_Nose": (.60, "nose pointy | nose pointed"),
    "Receding_Hairline": (.70, "hairline receding | has hair that is receding at the front"),
    "Rosy_Cheeks": (.65, "cheeks rosy | cheeks flushed"),
    "Sideburns": (.70, "has sideburns | has sideburns beside {his} ears"),
    "Smiling": (.65, "is smiling | has a smile | has a smile on {his} face"),
    "Straight_Hair": (.55, "hair straight | hair smooth"),
    "Wavy_Hair": (.60, "hair wavy | hair curly"),
    "Wearing_Earrings": (.65, "wears earrings | wears a pair of earrings"),
    "Wearing_Hat": (.90, "wears a hat | wears a hat on {his} head"),
    "Wearing_Lipstick": (.55, "wears lipstick | wears lipstick on {his} lips"),
    "Wearing_Necklace": (.65, "wears a necklace | wears a necklace around {his} neck"),
    "Wearing_Necktie": (.80, "wears a tie | wears a necktie"),
    "Young": (.40, "is young | is youthful"),
    "not Male": (.80, "noun woman | noun woman | noun lady"),
    "not Young": (.60, "is old | is older | is elderly"),
}
FACTS = ATTRIBUTES + ("not Male", "not Young")
PROBABILITIES = np.array([GRAMMAR[fact][0] for fact in FACTS])      # (42,), of being stated
PHRASES = [[phrase.split(" ", 1) for phrase in GRAMMAR[fact][1].split(" | ")]       # [kind, words]
           for fact in FACTS]
MAN, WOMAN = FACTS.index("Male"), FACTS.index("not Male")
NEGATED = [ATTRIBUTES.index("Male"), ATTRIBUTES.index("Young")]
MIN_FACTS = 3       # a caption states at least so many, where the face has them
SHORTEST, LONGEST = 10, 75      # words of a caption; of the longest, the tokenizer cuts the end

PARTS = {       # of the face: whether one says "a nose", and "the nose is" or "are"
    "cheekbones": (False, "are"), "cheeks": (False, "are"), "eyebrows": (False, "are"),
    "eyes": (False, "are"), "face": (True, "is"), "hair": (False, "is"), "hairline": (True, "is"),
    "lips": (False, "are"), "mouth": (True, "is"), "nose": (True, "is"), "skin": (False, "is"),
}
NOUNS = ("person", "person", "individual")              # when the sex is unsaid
SINGULAR = {"is": "is", "has": "has", "wears": "wears"}
PLURAL = {"is": "are", "has": "have", "wears": "wear"}  # for "they"
PREDICATES = {
    "is": ("{is} {x}",),
    "has": ("{has} {x}", "{has} {x}", "{has} {x}", "can be seen with {x}", "{is} shown with {x}"),
    "wears": ("{is} wearing {x}", "{wears} {x}", "{is} seen wearing {x}"),
}
OPENINGS = ("This is a {photo} of {x}.", "The {photo} shows {x}.", "Here is a {photo} of {x}.",
            "In this {photo} there is {x}.", "The {photo} shows the face of {x}.",
            "{x} looks out of this {photo}.")
LEADS = (("In this picture, ", "In the photo, ", "Here, ", "As can be seen, "), ("",),
         ("In addition, ", "Also, ", "Moreover, ", "Besides, "))    # of the first sentence, second, others
NEUTRAL = ("Only the face can be seen.", "The face fills most of the picture.",
           "Nothing else is shown here.")


def facts_of(attributes):
    """Attributes bool (..., 40) -> which facts hold, bool (..., 42)."""
    return np.concatenate([attributes, ~attributes[..., NEGATED]], axis=-1)


def caption(attributes, rng):
    """A caption for a face: (text, stated).

    attributes bool (40,); rng a numpy Generator. stated int8 (40,): +1 the text says the attribute
    is true, -1 false (of Male and Young only), 0 it says nothing. Facts are stated independently,
    with PROBABILITIES, and drawn again until there are MIN_FACTS of them or all:
    `log_likelihood` relies on exactly this.
    """
    facts = np.flatnonzero(facts_of(attributes))
    chosen = facts[:0]
    while len(chosen) < min(MIN_FACTS, len(facts)):
        chosen = facts[rng.random(len(facts)) < PROBABILITIES[facts]]
    said = np.zeros(len(FACTS), dtype=np.int8)
    said[chosen] = 1
    stated = said[:len(ATTRIBUTES)]
    stated[NEGATED] -= said[len(ATTRIBUTES):]
    return write(chosen.tolist(), random.Random(int(rng.integers(2**62)))), stated


def write(facts, dice):
    """The text that says these facts (numbers into FACTS) and no other, of SHORTEST to LONGEST
    words. Too long a text is written anew, never cut; only for a face with more facts than real
    ones have it may stay longer.
    """
    for _ in range(20):
        sentences = compose(facts, dice)
        while sum(text.count(" ") + 1 for text in sentences) < SHORTEST:
            sentences.append(dice.choice([text for text in NEUTRAL if text not in sentences]))
        text = " ".join(sentences)
        if text.count(" ") < LONGEST:
            break
    return text


def compose(facts, dice):
    """Facts -> list of sentences."""
    # 0: long lists in few sentences; 1: a sentence for everything. Most writers are brief and a few
    # are not, as in FLIP's captions; who has much to tell is brief.
    talkative = dice.random()**1.5 * min(1, 10 / len(facts))
    said = choose_words(facts, talkative, dice)
    he, his = ("he", "his") if MAN in facts else ("she", "her") if WOMAN in facts else ("they", "their")
    noun = dice.choice(said["noun"] or NOUNS)

    sentences = []
    nothing_to_tell = not any(said[kind] for kind in ("is", "has", "wears", "part"))
    if nothing_to_tell or dice.random() < 0.4 + 0.4 * talkative:
        sentences.append(opening(said, noun, dice))
    units = [(kind, chunk) for kind in ("is", "has", "wears", "part")
             for chunk in chunks(said[kind], talkative, dice)]
    dice.shuffle(units)
    while units:
        sentences.append(sentence(units, noun, he, talkative, len(sentences), dice))
    if said["photo"]:
        sentences.append(f"The {dice.choice(('photo', 'picture', 'image'))} is {said['photo'][0]}.")
    sentences = [text.replace("{his}", his) for text in sentences]
    return [text[0].upper() + text[1:] for text in sentences]


def choose_words(facts, talkative, dice):
    """Facts -> {kind: [phrase]} in random order.

    What is said of one part of the face becomes one phrase: either something that one has
    ("arched, thick eyebrows") or a clause of its own, of kind "part" ("{his} eyebrows are arched
    and thick").
    """
    said = {kind: [] for kind in ("noun", "photo", "is", "has", "wears", "part")}
    parts = {}
    for fact in dice.sample(facts, len(facts)):
        kind, words = dice.choice(PHRASES[fact])
        (parts if kind in PARTS else said).setdefault(kind, []).append(words)
    for part, words in parts.items():
        article, verb = PARTS[part]
        if dice.random() < 0.15 + 0.5 * talkative:
            said["part"].append(f"{{his}} {part} {verb} {' and '.join(words)}")
        else:
            thing = f"{', '.join(words)} {part}"
            said["has"].append(with_article(thing) if article else thing)
    dice.shuffle(said["has"])
    return said


def opening(said, noun, dice):
    """A first sentence, with up to two adjectives and some features that it takes out of `said`."""
    adjectives = [said["is"].pop() for _ in range(min(dice.randrange(3), len(said["is"])))]
    x = with_article(" ".join([", ".join(adjectives), noun]).strip())
    if said["has"] and dice.random() < 0.4:
        features = [said["has"].pop() for _ in range(min(dice.randrange(1, 4), len(said["has"])))]
        x += " with " + listed(features, dice)
    photo = dice.choice(("photo", "picture", "portrait", "photograph"))
    if said["photo"] and dice.random() < 0.5:
        photo = f"{said['photo'].pop()} {photo}"
    return dice.choice(OPENINGS).format(photo=photo, x=x)


def sentence(units, noun, he, talkative, position, dice):
    """Sentence number `position`; it takes one or two units (kind, phrases) off the list's end."""
    kind, phrases = units.pop()
    lead = dice.choice(LEADS[min(position, 2)]) if dice.random() < talkative else ""
    if kind == "part":
        return f"{lead}{listed(phrases, dice)}."
    named = dice.random() < (0.75 if position == 0 else 0.2)
    subject = f"{dice.choice(('the', 'this'))} {noun}" if named else he
    verbs = PLURAL if subject == "they" else SINGULAR
    text = f"{subject} {predicate(kind, phrases, verbs, dice)}"
    if units and units[-1][0] != "part" and dice.random() < 0.5:
        kind, phrases = units.pop()
        if kind == "has" and dice.random() < 0.5:
            pattern = dice.choice(("{text}, with {x}", "with {x}, {text}"))
            text = pattern.format(text=text, x=listed(phrases, dice))
        else:
            text += dice.choice((" and ", ", and ")) + predicate(kind, phrases, verbs, dice)
    return f"{lead}{text}."


def predicate(kind, phrases, verbs, dice):
    return dice.choice(PREDICATES[kind]).format(x=listed(phrases, dice), **verbs)


def chunks(phrases, talkative, dice):
    """Cut a list into the runs that one sentence tells: single phrases, or two to four."""
    while phrases:
        size = 1 if dice.random() < talkative else dice.choice((2, 3, 3, 4))
        yield phrases[:size]
        phrases = phrases[size:]


def listed(phrases, dice):
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + dice.choice((", and ", " and ")) + phrases[-1]


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


# ---- what a reader who knows every attribute could find ----------------------------------------
def facts_said(stated):
    """stated int8 (T, 40) -> which facts each caption says, bool (T, 42)."""
    return np.concatenate([stated > 0, stated[..., NEGATED] < 0], axis=-1)


def consistent(stated, attributes):
    """Which faces satisfy all that is said: int8 (T, 40), bool (I, 40) -> bool (T, I)."""
    return facts_said(stated).astype(float) @ ~facts_of(attributes).T == 0


def log_likelihood(stated, attributes):
    """log P(a caption states exactly this | face), natural logarithm: int8 (T, 40), bool (I, 40) ->
    float (T, I).

    With `facts` those of the face and p their probabilities, a caption says the set `said` with
    probability
        prod_{i in said} p_i * prod_{i in facts - said} (1 - p_i)
            / P(at least min(MIN_FACTS, |facts|) are stated)
    or 0 if it is not within `facts`. A fact that goes unsaid counts against a face; so this knows
    more than `consistent`.
    """
    said, facts = facts_said(stated).astype(float), facts_of(attributes)
    said_instead = np.log(PROBABILITIES) - np.log1p(-PROBABILITIES)
    unsaid = facts @ np.log1p(-PROBABILITIES)                                               # (I,)
    log_p = (said @ said_instead)[:, None] + unsaid - np.log(enough_facts(facts))           # (T, I)
    return np.where(consistent(stated, attributes), log_p, -np.inf)


def enough_facts(facts):
    """P(one draw states at least min(MIN_FACTS, |facts|) of the facts), bool (I, 42) -> (I,)."""
    count = np.zeros((len(facts), MIN_FACTS))       # P(exactly k stated so far), k < MIN_FACTS
    count[:, 0] = 1
    for p in (facts * PROBABILITIES).T:             # (I,), one fact after another
        count[:, 1:] = count[:, 1:] * (1 - p)[:, None] + count[:, :-1] * p[:, None]
        count[:, 0] *= 1 - p
    needed = np.minimum(facts.sum(1), MIN_FACTS)
    return 1 - (count * (np.arange(MIN_FACTS) < needed[:, None])).sum(1)


def expected_recall(scores, k):
    """Recall at each n in k of the queries (rows) whose answer is on the diagonal: float (I, I) ->
    {n: recall}.

    Ties are broken by chance: with `better` answers above and `tied` at the score of the true one
    (itself included), it is among the first n with probability (n - better) / tied, within [0, 1].
    """
    true = np.diag(scores)[:, None]
    better = (scores > true + 1e-9).sum(1)          # the tolerance absorbs rounding: ties here are exact
    tied = (scores >= true - 1e-9).sum(1) - better
    return {n: float(np.clip((n - better) / tied, 0, 1).mean()) for n in k}


def reference_recalls(stated, attributes, k=(1, 5, 10)):
    """What a reader finds who knows every attribute: {reference: {direction: {n: recall}}}, the
    references being "consistency" and "ceiling", the directions "text_to_image" and
    "image_to_text".

    stated int8 (I, 40), attributes bool (I, 40); caption i was written for face i.
    Consistency: all answers that fit what is said are equally good. Ceiling: the Bayes ranking
    under the grammar. Text to image, each face being as likely as any other, that is by
    P(stated | face). Image to text, a caption is ranked by the probability that it was written for
    this face and not for another of the gallery, P(stated | face) / sum over faces of
    P(stated | face): a long caption that fits only this face has a tiny likelihood and still beats
    a short one that fits all. (It looks at one caption at a time; that each face has exactly one
    caption is not used, and neither can a model use it that scores pairs.)
    """
    fits = np.where(consistent(stated, attributes), 0.0, -np.inf)
    log_p = log_likelihood(stated, attributes)
    posterior = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    return {"consistency": {"text_to_image": expected_recall(fits, k),
                            "image_to_text": expected_recall(fits.T, k)},
            "ceiling": {"text_to_image": expected_recall(log_p, k),
                        "image_to_text": expected_recall(posterior.T, k)}}


# ---- drawn faces -------------------------------------------------------------------------------
def drawn_faces(count, size, seed, folder, steps=0):
    """`count` faces drawn by toyfaces.py at size x size pixels, with `steps` steps of a growing
    sketch each; kept in `folder` for the next time."""
    # A digest of the code that draws is in the name: a changed face never comes from an old file.
    version = hashlib.sha256(Path(toyfaces.__file__).read_bytes()).hexdigest()[:8]
    path = Path(folder) / f"faces-{count}x{size}-{steps}steps-seed{seed}-{version}.npy"
    if not path.exists():
        kind = np.dtype([("attributes", bool, len(ATTRIBUTES)), ("picture", np.uint8, (size, size, 3)),
                         ("sketches", np.uint8, (steps, size, size))])
        tasks = [(index, seed, size, steps) for index in range(count)]
        with vit.whole_file(path) as partial:
            kept = np.lib.format.open_memmap(partial, "w+", kind, (count,))
            # All cores draw; Ctrl-C is for this process alone.
            with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                for i, face in enumerate(tqdm(pool.imap(draw_face, tasks, 16), "drawing faces", count)):
                    kept[i] = face
            kept.flush()
    with expecting("faces drawn here; delete it, and they are drawn again", path):
        kept = np.load(path, mmap_mode="r")
    return Faces(f"drawn faces (seed {seed})", kept["picture"], np.arange(count),
                 np.array(kept["attributes"]), sketches=kept["sketches"] if steps else None)


def draw_face(task):
    index, seed, size, steps = task
    image, attributes = toyfaces.face(index, seed, size)
    sketches = toyfaces.sketch(index, seed, size, steps) if steps else np.empty((0, size, size))
    return attributes, np.asarray(image), sketches


# ---- sets on disk: readers translate, one validator checks -------------------------------------
class Record(NamedTuple):
    """One face as the lists of a set tell of it; nothing of this has been checked.

    A reader is a function from a folder to the records of all parts of the set in it (or, of a set
    in many files, to a function for each, which gives some of the records and adds what it lost to
    the list that it is handed). For a set that lies otherwise, write one more, and a row of LAYOUTS.
    """
    where: str                      # for errors: "list_attr_celeba.txt line 7"
    picture: object                 # its file's name below the set's pictures; or its Path, or a Crop
    part: str                       # one of SPLITS
    person: str = ""                # equal: the same person; "": nobody that another picture shows
    values: tuple | None = None     # of the 40 attributes in CelebA's order, as written: "-1"
    captions: dict | None = None    # {column: a text or a list of texts}, and other columns
    sketches: list | None = None    # Paths, as it grows


SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # that FaceCaption-15M has for texts


def open_faces(path, split, cache="cache", columns=COLUMNS[:2], max_lost=1.0):
    """The faces of a part ("train", "val", "test") of a set of one's own: in a folder, by what is
    found there, or in a json list.

    All that the set's lists say is read and checked once, and kept in the folder `cache` as an
    index which every process maps instead of having its own: index-*.npy has a row for each face,
    part after part, index-*.txt a line, which the row points to. A record with which something is
    wrong is left out, and listed in index-*.lost; more than max_lost percent of these are an error,
    and so is what makes a list doubtful as a whole. Captions are taken from all `columns` that a
    record has.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    path = Path(path).absolute()
    layouts = [layout for layout in LAYOUTS if any(path.glob(layout.sign))]
    if path.is_file() and path.suffix == ".json":
        layouts = LAYOUTS[-1:]
    if not layouts:
        known = ", ".join(f"{layout.sign} ({layout.title})" for layout in LAYOUTS)
        raise ValueError(f"{path}: found none of {known}. (FaceCaption-15M's .parquet has the addresses of "
                         f"its pictures only: fetch them with img2dataset)")
    layout, name, folder = layouts[0], f"{layouts[0].title} {split}", path if path.is_dir() else path.parent
    index = Path(cache) / f"index-{state_of(folder, path, columns, Path(cache).resolve())}.npy"
    try:
        if not index.exists():
            write_index(index, layout, path, folder, columns)
        rows = np.load(index, mmap_mode="r")
        lost = index.with_suffix(".lost").read_text(encoding="utf-8").splitlines()
        check_lost(lost, len(rows) + len(lost), max_lost)
        begin, end = (bisect.bisect_left(rows["part"], SPLITS.index(split) + n) for n in (0, 1))
        if begin == end:
            found = dict(zip(SPLITS, np.bincount(rows["part"], minlength=len(SPLITS)).tolist()))
            raise ValueError(f"no faces, expected at least one in this part; found {found}")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error}") from error
    rows, text = rows[begin:end], np.memmap(index.with_suffix(".txt"), np.uint8, "r")
    first = Lines(text, rows, folder).line(0)
    return Faces(name, identity=rows["identity"],
                 attributes=rows["attributes"] if rows["attributes"].size else None,
                 **{field: Lines(text, rows, folder, field) for field in first})


class Lines:
    """What the lines of an index say of one field, as a list that takes no memory."""

    def __init__(self, text, rows, folder, field=""):
        self.text, self.rows, self.folder, self.field = text, rows, folder, field

    def __len__(self):
        return len(self.rows)

    def line(self, i):
        begin, length = self.rows["start"][i], self.rows["length"][i]
        return json.loads(self.text[begin:begin + length].tobytes())

    def __getitem__(self, i):
        if np.ndim(i):
            return Lines(self.text, self.rows[i], self.folder, self.field)
        found = self.line(i)[self.field]
        if self.field == "sketches":
            return [self.folder / path for path in found]
        if self.field == "pictures":
            return self.folder / found if isinstance(found, str) else Crop(self.folder / found[0], *found[1:])
        return found


def state_of(folder, path, columns, cache):
    """A digest of what an index depends on: what is asked for, this code, and of all files in the
    folder, but for a cache in it, the names, sizes and times; of pictures the names only."""
    state = hashlib.sha256(Path(__file__).read_bytes() + repr((path, columns)).encode())
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if Path(root, name).resolve() != cache)
        for name in sorted(name for name in names if not name.startswith("index-")):
            file = os.path.join(root, name)
            state.update(os.fsencode(file))
            if name.lower().endswith((".tar", ".json", ".txt", ".csv", ".mat", ".pickle")):
                state.update(repr((os.stat(file).st_size, os.stat(file).st_mtime_ns)).encode())
    return state.hexdigest()[:16]


def write_index(index, layout, path, folder, columns):
    """Read and check a whole set. The files appear when all are complete, the rows last."""
    rows, size, kinds = [], 0, Counter()
    with (vit.whole_file(index) as to_rows, vit.whole_file(index.with_suffix(".txt")) as to_text,
          vit.whole_file(index.with_suffix(".lost")) as to_lost):
        with open(to_text, "wb") as text, open(to_lost, "w", encoding="utf-8", errors="replace") as left_out:
            for some, lines, lost in examined(layout.reader(path), layout, folder, columns):
                some["start"] += size
                size += text.write(lines)
                rows.append(some)
                left_out.writelines(" ".join(sentence.split()) + "\n" for sentence in lost)
                kinds.update(sentence.split(":")[0] for sentence in lost)
        rows = np.concatenate(rows)
        with open(to_rows, "wb") as file:
            np.save(file, rows[rows["part"].argsort(kind="stable")])
    if kinds:
        found = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        print(f"{path}: {len(rows):,} faces; left out, and listed in {index.with_suffix('.lost')}: {found}")


def examined(found, layout, folder, columns):
    """What `examine` makes of a reader's records, or, on all cores, of functions that give some."""
    if layout.apart:
        with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            work = pool.imap(functools.partial(examine, columns=columns), found)
            yield from tqdm(work, "reading the set", len(found))
    else:
        records = tqdm(found, "reading the set", leave=False)
        yield examine(functools.partial(whole_set, records, layout, folder), columns)


def examine(read, columns):
    """Check the records that read(lost) gives -> (rows, lines, lost), as they are to be written."""
    kept, lost = [], []
    for record in read(lost):
        with noting(lost):
            kept.append(checked(record, columns))
    parts, people, attributes, lines = zip(*kept) if kept else ((), (), (b"",), ())
    rows = np.zeros(len(kept), np.dtype([
        ("identity", np.int64), ("start", np.int64), ("length", np.int32), ("part", np.uint8),
        ("attributes", bool, len(attributes[0]))], align=True))
    rows["identity"], rows["part"], rows["length"] = people, parts, [len(line) for line in lines]
    rows["start"] = rows["length"].cumsum(dtype=np.int64) - rows["length"]
    rows["attributes"] = np.frombuffer(b"".join(attributes), bool).reshape(rows["attributes"].shape)
    return rows, b"".join(lines), lost


@contextlib.contextmanager
def noting(lost):
    """What is wrong inside becomes an entry of `lost`, "kind: a sentence", and is passed over."""
    try:
        yield
    except ValueError as error:
        lost.append(str(error))


def whole_set(records, layout, folder, lost):
    """Records with what one alone does not tell: whether another has the same picture, and whether
    that is there, below the first place that has one of the first of them."""
    records, part_of, inside = iter(records), {}, os.path.join(folder, "")
    first = list(itertools.islice(records, 10))
    has_some = [place for place in layout.places
                if any(os.path.isfile(os.path.join(folder, place, str(record.picture))) for record in first)]
    place = [*has_some, *layout.places, ""][0]
    below = lambda path: os.path.join(place, str(path).removeprefix(inside))
    names_in = functools.cache(lambda at: set(os.listdir(folder / at) if os.path.isdir(folder / at) else ()))
    for record in itertools.chain(first, records):
        with noting(lost):
            if not isinstance(record.picture, (str, Path)):
                raise ValueError(f"no name: {record.where} names no picture")
            picture, before = below(record.picture), part_of.get(record.picture)
            if before and (before != record.part or not layout.repeats):
                raise ValueError(f"listed twice: {record.where} lists {picture} a second time, in one part "
                                 f"or two")
            part_of[record.picture] = record.part
            directory, name = os.path.split(picture)
            if name not in names_in(directory):
                raise ValueError(f"no file: {record.where} lists {folder / picture}, which is not there")
            sketches = record.sketches and [below(path) for path in record.sketches]
            yield record._replace(picture=picture, sketches=sketches)


def checked(record, columns):
    """(part, person, attributes, line) of a record in which nothing is wrong."""
    line, where = {"pictures": record.picture}, f"{record.where} ({record.picture})"
    if record.part not in SPLITS:
        raise ValueError(f"part: {where} is in part {record.part!r}, expected train, val or test")
    attributes = b""
    if record.values is not None:
        with expecting("1, 0 or -1 for every attribute", f"attributes: {where}"):
            attributes = bytes(map(TRUTH.__getitem__, record.values))
    if record.captions is not None:
        with expecting("captions that are text and not empty", f"captions: {where}"):
            line["captions"] = captions_in(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person = digest(record.person or str(record.picture))
    return SPLITS.index(record.part), person, attributes, json.dumps(line).encode() + b"\n"


LOWER_CASE = [name.lower() for name in ATTRIBUTES]
TRUTH = {"1": True, "0": False, "-1": False}


def captions_in(record, columns):
    """The texts in these columns. Binary ones are refused, and half characters, which json can write
    and no tokenizer reads."""
    found = [record[column] for column in columns if record.get(column)]
    found = [text for some in found for text in (some if isinstance(some, list) else [some])]
    for text in found or [""]:
        if re.search("[\0\ud800-\udfff]", text) or not bert.clean_caption(text):
            raise ValueError(f"found {ascii(text)[:100]}")
    return found


def readable(faces, max_lost, size):
    """The faces whose pictures can be read at this size."""
    lost = {}
    for _ in vit.read_batches(faces.picture, len(faces), size, "checking pictures", lost=lost):
        pass
    return without(faces, lost, max_lost)


def without(faces, lost, max_lost):
    """The faces but for {number: why it cannot be read}, which are told."""
    sentences = [lost[i] for i in sorted(lost)]
    check_lost(sentences, len(faces), max_lost)
    for sentence in sentences:
        tqdm.write(f"left out: {sentence}")
    return faces.subset([i for i in range(len(faces)) if i not in lost]) if lost else faces


def check_lost(lost, count, max_lost):
    """ValueError where more than max_lost percent of `count` are lost, of which `lost` has a sentence
    each."""
    if len(lost) > count * max_lost / 100:
        raise ValueError(f"{lost[0]} ({len(lost):,} of {count:,} are lost, which is more than --max_lost "
                         f"{max_lost:g} percent)")


# ---- readers: what they share ------------------------------------------------------------------
@contextlib.contextmanager
def expecting(what, where):
    """Whatever goes wrong inside becomes one sentence, which ends with what Python says of it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: expected {what} ({kind}{vit.first_line(error)})") from error


def read_json(content):
    """json whose records name everything once: in a damaged list two of them may have become
    one."""
    def record_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a record has a name twice: {str(pairs)[:100]}")
        return dict(pairs)
    return json.loads(content, object_pairs_hook=record_of)


def digest(text):
    """A text -> a number of 56 bits, the same in every process and every file."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def part_by_digest(text):
    """90, 5 and 5 percent, where a set has no parts of its own."""
    percent = digest(text) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"


def hold_out(records, share):
    """The last `share` of the records for training, one at least, are for validation instead."""
    training = [i for i, record in enumerate(records) if record.part == "train"]
    for i in training[-max(1, round(share * len(training))):]:
        records[i] = records[i]._replace(part="val")
    return records


def json_records(path):
    with expecting("a json list", path):
        records = read_json(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"found a {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{path.name} record {number} (counted from 0)", record


# ---- readers: faces with attributes ------------------------------------------------------------
def table(folder, stem):
    """(where, fields) of the lines of stem.txt (fields between spaces) or stem.csv (commas)."""
    path, separator = folder / f"{stem}.txt", None
    if (folder / f"{stem}.csv").is_file():
        path, separator = folder / f"{stem}.csv", ","
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.replace('"', " ").split(separator)
            yield f"{path.name} line {number}", [field.strip() for field in fields] if separator else fields


def attribute_records(rows):
    """Records, still without a part, from rows (where, [picture, value, value ...]). The header
    above them names the columns in any order, with spaces or underscores, in any case."""
    found, count, (where, header) = 0, None, next(rows, ("the list", []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of pictures
        count, (where, header) = header[0], next(rows, (where, []))
    names = [name.strip().replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    if sorted(names) != sorted(LOWER_CASE):
        raise ValueError(f"{where} should name the 40 attributes of CelebA, found {' '.join(header)[:1000]}")
    in_order = operator.itemgetter(*(names.index(name) for name in LOWER_CASE))
    for found, (where, (picture, *values)) in enumerate(rows, 1):
        if len(values) != len(names):
            raise ValueError(f"{where} has {len(values)} values, expected {len(names)} ({picture})")
        yield Record(where, picture.replace("\\", "/"), "", values=in_order(values))
    if count not in (None, str(found)):
        raise ValueError(f"{where}: the list announces {count} pictures, but {found} follow")


def celeba(folder):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture is a person of its own."""
    parts = {}                              # {picture: the numbers in its line, which should be one}
    for _, (picture, *numbers) in table(folder, "list_eval_partition"):
        number = " and ".join(numbers)
        parts[picture] = f"{parts[picture]} and {number}" if picture in parts else number
    parts.pop("image_id", None)             # Kaggle's header
    for record in attribute_records(table(folder, "list_attr_celeba")):
        number = parts.pop(record.picture, "none")
        part = {"0": "train", "1": "val", "2": "test"}.get(number, f"{number} of list_eval_partition")
        yield record._replace(part=part)
    if parts:
        raise ValueError(f"list_eval_partition names {len(parts)} pictures that list_attr_celeba does not "
                         f"have, the first is {next(iter(parts))}")


def lfwa(train, test):
    """LFWA's records with their parts and persons. The person is the folder of the picture.

    Five percent of the persons for training are "val". The training list may hold the test's
    pictures too, as the official one does: they are left out of it. Without a list for the test,
    half of the persons are kept for it, which is LFWA's own proportion.
    """
    tested = {record.picture for record in test}
    for record in [*test, *(record for record in train if record.picture not in tested)]:
        person = Path(record.picture).parent.name
        number = digest(person)
        if record.picture in tested or (not test and number % 2 == 0):
            part = "test"
        else:
            part = "val" if number // 2 % 20 == 0 else "train"
        yield record._replace(part=part, person=person)


def lfwa_lists(folder):
    test = []
    if (folder / "list_attr_lfwa_test.csv").is_file():
        test = list(attribute_records(table(folder, "list_attr_lfwa_test")))
    return lfwa(attribute_records(table(folder, "list_attr_lfwa")), test)


def lfwa_matlab(folder):
    """LFWA from its authors' MATLAB 7.3 files: the faces in one, the numbers of each part's in the
    other. They are HDF5, which only h5py reads: nothing else here needs that package. HDF5 has a
    matrix's axes the other way round, and for a text a reference to its character codes."""
    import h5py
    faces, parts = folder / "lfw_att_40.mat", folder / "indices_train_test.mat"
    kind = "a complete MATLAB 7.3 file (HDF5, which MATLAB writes with -v7.3)"
    with expecting(f"{kind} with name, AttrName and label", faces):
        file = h5py.File(faces)
        names, header = (["".join(map(chr, file[text][()].flat)) for text in file[variable][()].flat]
                         for variable in ("name", "AttrName"))
        labels = file["label"][()].T
        labels = labels if len(labels) == len(names) else labels.T
        rows = [(f"{faces.name} row {n} (counted from 1)", [name, *(f"{value:g}" for value in row)])
                for n, (name, row) in enumerate(zip(names, labels, strict=True), 1)]
    records = dict(enumerate(attribute_records(iter([(f"{faces.name} AttrName", header), *rows])), 1))
    with expecting(f"{kind} with indices_img_train and indices_img_test, from 1 to {len(names)}", parts):
        file = h5py.File(parts)
        train, test = ([records[int(n)] for n in file[variable][()].flat]
                       for variable in ("indices_img_train", "indices_img_test"))
    return lfwa(train, test)


# ---- readers: faces with captions --------------------------------------------------------------
def caption_list(path, part=None):
    """A json list of {"image": path, "image_id": id, "caption": text or list of texts}, as BLIP and
    the official code have it. Equal ids mean the same person; without an id every picture is a
    person of its own. A list that is of no part is split by a digest of the person."""
    for where, record in json_records(path):
        with expecting('{"image": path, "image_id": id, "caption": text or list of texts}', where):
            picture = record.get("image", record.get("photo"))          # "photo": FS2K-SDE's lists
            identity = record.get("image_id")
        person = str(picture if identity is None else identity)
        yield Record(where, picture, part or part_by_digest(person), person, captions=record)


def caption_lists(path):
    """train.json, val.json and test.json, or the only list there is, or the one that was given."""
    if (path / "train.json").is_file():
        for part in ("train", "val", "test"):
            if (path / f"{part}.json").is_file():
                yield from caption_list(path / f"{part}.json", part)
    else:
        lists = [path] if path.is_file() else sorted(path.glob("*.json"))
        if len(lists) > 1:
            raise ValueError(f"{len(lists)} json lists, of which none is train.json; give one by its name")
        yield from caption_list(lists[0])


class NamesOnly(pickle.Unpickler):
    """Reads lists, texts and numbers. Anything else in a pickle names code to be run: refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def celeba_hq(folder, captions):
    """Records of {number: captions}. train/filenames.pickle and test/filenames.pickle tell the
    parts or, where both are absent, the number; the last 5 % of the training part are "val"."""
    lists, listed = {part: folder / part / "filenames.pickle" for part in ("train", "test")}, []
    if any(path.exists() for path in lists.values()):
        for part, path in lists.items():
            with expecting("a plain pickled list, of names such as '123.jpg', in each of both folders", path):
                for name in NamesOnly(io.BytesIO(path.read_bytes())).load():
                    text = name.decode() if isinstance(name, bytes) else str(name)
                    listed.append((int(Path(text).stem), part))
    else:
        listed = [(number, "train" if number < 24_000 else "test") for number in captions]
    return hold_out([Record(f"face {n}", f"{n}.jpg", part, captions={"caption": captions.get(n, [])})
                     for n, part in sorted(listed)], 0.05)


def mm_celeba(folder):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, a caption a line."""
    captions = {}
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            own = captions.setdefault(int(path.stem), [])       # 3.txt and 003.txt are of one face
            own += [line.strip() for line in lines if line.strip()]
    return celeba_hq(folder, captions)


def celeba_dialog(folder):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, in image/ or beside it. A face has one
    caption: the overall one, or, where that is empty, the attribute-wise ones joined."""
    path, captions = folder / "captions_hq.json", {}
    with expecting("a json dictionary", path):
        records = read_json(path.read_bytes()).items()
    for name, record in records:
        where = f"{path.name} record {name!r}"
        with expecting('"0.jpg": {"overall_caption": text, "attribute_wise_captions": texts}', where):
            overall, parts = record.get("overall_caption") or "", record.get("attribute_wise_captions") or {}
            own = captions.setdefault(int(Path(name).stem), [])
            own.append(overall.strip() or " ".join(parts.values()).strip())
    if not any((folder / place / "5380.jpg").is_file() for place in ("images", "image", ".")):
        captions.pop(5380, None)            # it has captions, but was never part of the pictures
    return celeba_hq(folder, captions)


# ---- readers: FaceCaption-15M as img2dataset downloads it --------------------------------------
class Crop(NamedTuple):
    """A face in a picture in a tar; read from there, and cut out, whenever it is opened."""
    tar: Path
    name: str           # of the picture in the tar
    offset: int         # in bytes, where its file begins there
    length: int         # in bytes
    box: tuple = ()     # x1, y1, x2, y2 in pixels of the picture; (): all of it

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def content(self, most=2**27):              # no photograph of a face has 128 MB
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(min(self.length, most)))

    def open(self, size=None):
        """The face as a PIL RGB image, whole or size x size; ValueError if the picture is damaged."""
        return vit.open_picture(self.content(), self, self.box, size)


def facecaption(folder):
    """Tars of N.jpg and N.json, read in place: nothing is unpacked. Beside each lies a file that
    tells how many faces it should have, also where the tar itself is missing."""
    found = [*folder.glob("*.tar"), *folder.glob("*_stats.json")]
    stems = sorted({path.stem.removesuffix("_stats") for path in found})
    return [functools.partial(list_tar, folder / f"{stem}.tar") for stem in stems]


def list_tar(tar, lost):
    """Records of the faces in a tar. Every one is a face of its own, though several may be in one
    picture, from one address: the split goes by the address."""
    pictures, jsons, downloads = {}, {}, []
    for member in members_of(tar, lost) if tar.exists() else ():
        stem, suffix = os.path.splitext(member.name)
        of_its_kind = pictures if suffix.lower() in vit.PICTURES else jsons if suffix == ".json" else {}
        if of_its_kind.setdefault(stem, member) is not member:
            lost.append(f"named twice: {member}")
    for stem in pictures | jsons:
        with noting(lost):
            downloads.append(download(f"{tar}: {stem}", pictures.get(stem), jsons.get(stem)))
    padded = are_padded(downloads)
    for crop, record, stored, original in downloads:
        with noting(lost):
            box = box_within(crop, stored, original, padded)
            yield Record(str(crop), crop._replace(tar=tar.name, box=box), part_by_digest(str(record["url"])),
                         captions=record)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # what img2dataset counted
        count = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())["successes"]
        lost += [f"missing: a face of {tar}"] * min(count - len(pictures | jsons), 10**6)


def members_of(tar, lost):
    """The files in a tar, as Crops. (tarfile alone takes the first damaged header for the end; here
    the next good one is looked for.)"""
    at = expected = 0                           # where to look for a header, and where one should be
    size, block = tar.stat().st_size, tarfile.BLOCKSIZE
    with open(tar, "rb") as file:
        while at + block <= size:
            file.seek(at)
            try:
                member = tarfile.TarInfo.frombuf(file.read(block), "utf-8", "surrogateescape")
                end = at + block + -(-member.size // block) * block
                if not at < end <= size:
                    raise tarfile.TruncatedHeaderError("more than there is")
            except tarfile.HeaderError:
                at += block
                continue
            if at > expected:
                lost.append(f"damaged tar: {tar}, bytes {expected} to {at}")
            if member.isreg():
                yield Crop(tar, member.name, at + block, member.size)
            at = expected = end
        file.seek(expected)
        rest = file.read(2 * tarfile.RECORDSIZE)
    if any(rest) or not 2 * block <= len(rest) < 2 * tarfile.RECORDSIZE:    # two empty ones are its end
        lost.append(f"damaged tar: {tar}, bytes {expected} to {size}, or the end is missing")


def download(where, picture, text):
    """(crop, record, stored, original) of one face, from its picture and its json: the crop with a
    box in pixels of the original, and the sizes of the picture as it is and as it was before."""
    if not (picture and text):
        raise ValueError(f"half a face: {where} has no {'json' if picture else 'picture'}")
    with expecting("img2dataset's json, with the columns box, caption and url kept", f"json: {text}"):
        record = read_json(text.content().read())
        if record["status"] != "success":
            raise ValueError(f"the status is {record['status']}")
        box = json.loads(record["box"]) if isinstance(record["box"], str) else record["box"]
        x1, y1, x2, y2 = box = tuple(map(float, box))
        if not (x1 < x2 and y1 < y2 and record["url"]):
            raise ValueError(f"the box is {box} and the url {record['url']!r}")
        original = [int(record.get(f"original_{side}") or 0) for side in ("width", "height")]
    try:
        stored = vit.picture_size(picture.content(2**13))           # most headers are short
    except ValueError:
        stored = vit.picture_size(picture.content(), f"picture: {picture}")
    return picture._replace(box=box), record, stored, original if all(original) else stored


def box_within(crop, stored, original, padded):
    """The box of a download in pixels of the picture as it is stored; ValueError where less than half
    of it is left.

    Boxes are of pictures as img2dataset reads them, not turned as the camera noted. It may have
    resized the picture as it was (--resize_mode keep_ratio), or to a square: all of it, with white
    on both sides (border, its default), or the middle (center_crop)."""
    scale, margin, box = np.divide(stored, original), 0, np.reshape(crop.box, (2, 2))   # (corner, x or y)
    if abs(scale[0] - scale[1]) * max(original) > 1:            # more than rounding: a square was made
        scale = scale.min() if padded else scale.max()
        margin = np.fix((stored - np.round(np.multiply(original, scale))) / 2)
    box = box * scale + margin
    inside = box.clip(0, stored)
    if not np.prod(inside[1] - inside[0]) >= np.prod(box[1] - box[0]) / 2:
        raise ValueError(f"box: {crop} had {original} pixels and has {stored}; of the box {crop.box} less "
                         f"than half is inside")
    return inside.ravel().round(2).tolist()


def are_padded(downloads):
    """Do white margins make squares of these pictures? A vote of some that were none."""
    votes = []
    for crop, _, stored, original in downloads:
        scale = min(np.divide(stored, original))
        x, y = ((have - round(scale * had)) // 2 for have, had in zip(stored, original))
        if max(x, y) >= 4 and len(votes) < 32:
            with contextlib.suppress(ValueError):
                pixels = np.asarray(crop._replace(box=()).open())
                votes.append((pixels[:y - 1] if y > x else pixels[:, :x - 1]).mean() > 250)
    return 2 * sum(votes) >= len(votes)


# ---- readers: photos with sketches -------------------------------------------------------------
def pictures_below(folder):
    """(path, its parts below the folder, the last without ending) of every picture, by name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in vit.PICTURES:
            yield path, path.relative_to(folder).with_suffix("").parts


class ByName(dict):
    def __missing__(self, name):
        raise ValueError(f"{name} is the name of no picture, or of several: then name the folder, too, as in "
                         f"photo1_image0110")


def pictures_by_name(folder):
    """{name: path}: photo1/image0110.jpg answers to "photo1_image0110" and, if no other picture
    does, to "image0110"."""
    paths = {}
    for path, parts in pictures_below(folder):
        for first in range(len(parts)):
            paths.setdefault("_".join(parts[first:]), []).append(path)
    return ByName({name: found[0] for name, found in paths.items() if len(found) == 1})


def fs2k(folder):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*, by
    anno_train.json and anno_test.json."""
    photos, sketches = pictures_by_name(folder / "photo"), pictures_by_name(folder / "sketch")
    records = []
    for part in ("train", "test"):
        for where, record in json_records(folder / f"anno_{part}.json"):
            with expecting('"image_name" such as "photo1/image0110", of a photo and a sketch', where):
                name = record["image_name"].replace("/", "_")
                sketch = sketches[name.replace("photo", "sketch").replace("image", "sketch")]
                records.append(Record(where, photos[name], part, sketches=[sketch]))
    return with_captions(records, folder, photos)


def fs2k_sde(folder):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, the photos anywhere below photo/.

    <photo> is the photo's file name without its ending, or, where several folders have that name,
    "photo1_image0110" or "photo1/image0110".
    """
    photos, records = pictures_by_name(folder / "photo"), []
    for part in ("train", "test"):
        growing = {}                        # {photo: {step: sketch}}
        for sketch, parts in pictures_below(folder / "sketch" / part):
            with expecting("a name such as image0110_7.png, of one photo and ending with a step", sketch):
                photo, step = "_".join(parts).rsplit("_", 1)
                steps = growing.setdefault(photos[photo], {})
                if steps.setdefault(int(step), sketch) != sketch:
                    raise ValueError(f"{steps[int(step)]} is the same step")
        records += in_steps(growing, part)
    return with_captions(records, folder, photos)


def in_steps(growing, part):
    """{photo: {step: sketch}} -> records with the sketches in the order of the steps, of which all
    photos of a part have the same."""
    counts = Counter(step for steps in growing.values() for step in steps)
    usual = {step for step, count in counts.items() if 2 * count > len(growing)}
    for photo, steps in growing.items():
        for step in sorted(usual ^ steps.keys()):
            raise ValueError(f"{photo} has {'no' if step in usual else 'a'} step {step}, unlike most")
        yield Record(f"sketch/{part}", photo, part, sketches=[steps[step] for step in sorted(steps)])


def with_captions(records, folder, photos):
    """The records, the last tenth of those for training, by name, now for validation; with captions
    where lists beside photo/ have them: train.json (for both) and test.json, or captions.json."""
    lists = [folder / f"{name}.json" for name in ("train", "test", "captions")]
    captions = {path.stem: photo_captions(path, photos) for path in lists if path.is_file()}
    for record in hold_out(sorted(records, key=lambda record: record.picture), 0.1):
        known = captions.get("test" if record.part == "test" else "train", captions.get("captions"))
        if known is not None:
            where = f"{record.where} and the captions beside photo/"
            record = record._replace(where=where, captions={"caption": known.get(record.picture, [])})
        yield record


def photo_captions(path, photos):
    """{photo: its captions}. A record's "image" may be in any folder: its name tells the photo."""
    captions, meant = {}, {}
    for record in caption_list(path):
        parts = Path(str(record.picture)).with_suffix("").parts
        photo = photos.get("_".join(parts[-2:]), photos.get(parts[-1]))
        if photo is None:
            continue                        # of another part or set
        if meant.setdefault(photo, record.picture) != record.picture:
            raise ValueError(f"{record.where}: {meant[photo]} and {record.picture} may both mean {photo}; "
                             f"keep the folders photo1, photo2, ...")
        for column in COLUMNS[:2]:
            found = record.captions.get(column, [])
            captions.setdefault(photo, []).extend(found if isinstance(found, list) else [found])
    return captions


# ---- readers: which one ------------------------------------------------------------------------
class Layout(NamedTuple):
    sign: str               # what tells it
    title: str              # of the set
    reader: object          # folder -> records of all its parts
    places: tuple = ()      # where the pictures may be; (): the reader gives whole paths, or Crops
    repeats: bool = False   # may a picture be listed several times in a part?
    apart: bool = False     # does the reader give a function for each file?


LAYOUTS = (
    Layout("sketch/train", "FS2K-SDE", fs2k_sde),
    Layout("anno_*.json", "FS2K", fs2k),
    Layout("list_attr_celeba.*", "CelebA", celeba,
           ("img_align_celeba", "img_align_celeba/img_align_celeba")),      # Kaggle has it twice
    Layout("list_attr_lfwa.csv", "LFWA", lfwa_lists, ("lfw", ".")),
    Layout("lfw_att_40.mat", "LFWA", lfwa_matlab, ("lfw", ".")),
    Layout("captions_hq.json", "CelebA-Dialog", celeba_dialog, ("images", "image", ".")),
    Layout("text/celeba-caption", "MM-CelebA-HQ", mm_celeba, ("images",)),
    Layout("train.json", "json lists", caption_lists, (".", "images"), repeats=True),
    Layout("*.tar", "FaceCaption", facecaption, apart=True),
    Layout("*.json", "json list", caption_lists, (".", "images"), repeats=True),
)


# ---- a report of any set -----------------------------------------------------------------------
GROUPS = {      # of attributes, and the share of FLIP's labels that they have, in percent (section 3)
    "facial features": (34.0, ""),          # all that no other group has
    "elementary": (26.5, "Male Young Attractive Smiling Chubby Pale_Skin"),
    "beard": (14.8, "5_o_Clock_Shadow Goatee Mustache No_Beard Sideburns"),
    "hairstyle": (14.0, "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline "
                        "Straight_Hair Wavy_Hair"),
    "accessories": (10.6, "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
                          "Wearing_Necktie"),
}


@functools.cache
def patterns():
    """For each fact a pattern of the ways to say it: the grammar read backwards."""
    said_of, found = {}, []                 # {part of the face: what can be said of it}
    for kind, words in itertools.chain(*PHRASES):
        said_of.setdefault(kind, []).append(words)
    for fact, phrases in zip(FACTS, PHRASES):
        ways = {"Male": ["he", "his"], "not Male": ["she", "her"]}.get(fact, [])
        for kind, words in phrases:
            words, others = words.replace("{his}", "(?:his|her|their)"), "|".join(said_of[kind])
            ways += [words] if kind not in PARTS else [rf"{words},? (?:(?:{others}),? )*{kind}",
                                                       rf"{kind} (?:is|are) (?:(?:{others}) and )*{words}"]
        found.append(re.compile(rf"\b(?:{'|'.join(ways)})\b"))
    return found


def facts_in(text):
    """The facts that a text states in the grammar's words, bool (42,); what is said otherwise goes
    unseen."""
    return np.array([pattern.search(text.lower()) is not None for pattern in patterns()])


def sharpness(picture):
    """How much a face of 128 x 128 pixels differs from its neighbouring pixels, relative to its
    contrast: low for what is blurred or was enlarged. It needs no download, and is worth as much:
    noise counts as sharp, and nothing is said of the light or the pose."""
    grey = np.asarray(picture.convert("L").resize((128, 128), Image.Resampling.BICUBIC), float)
    steps = np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()])
    return steps.std() / max(grey.std(), 1.0)


def outline(picture):
    """256 bits: is a pixel of 17 x 16 lighter than the one to its left? Mostly equal for copies of
    one picture, also at another size or quality."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def report(parts, count, rng):
    """Figures of a set {split: Faces}, ready for json; all but its size are of `count` faces of the
    first part, of whose pictures at most 2,000 are looked at."""
    faces = next(iter(parts.values()))
    chosen = rng.choice(len(faces), min(count, len(faces)), replace=False).tolist()
    seen, sizes, sharp, outlines, lost = [], [], [], Counter(), []
    for i in tqdm(sorted(chosen[:2000]), "looking at pictures", leave=False):
        with noting(lost):
            picture = faces.picture(i)
            seen.append(i)
            sizes.append(picture.size)
            sharp.append(sharpness(picture))
            outlines[outline(picture)] += 1
    found = {"set": faces.name, "faces": {split: len(part) for split, part in parts.items()},
             "captions looked at": len(chosen) * faces.has_text, "pictures looked at": len(sizes),
             "unreadable": len(lost), "like another": len(sizes) - len(outlines),
             "shown": seen[::len(seen) // 4 + 1], "sizes": sizes, "sharpness": np.round(sharp, 3).tolist()}
    if not faces.has_text:
        return found
    texts = [faces.caption(i, rng) for i in tqdm(chosen, "reading captions", leave=False)]
    words, grams, four_grams = [text.split() for text in texts], set(), []
    for tenth in np.array_split(np.arange(len(words)), 10):
        grams.update(gram for n in tenth for gram in zip(words[n], words[n][1:], words[n][2:], words[n][3:]))
        four_grams.append(len(grams))
    stated = np.mean([facts_in(text) for text in tqdm(texts, "reading facts", leave=False)], axis=0)
    stated[NEGATED] += stated[len(ATTRIBUTES):]         # a label is stated where it is said not to hold, too
    labels = dict(zip(ATTRIBUTES, stated.tolist()))
    total = max(sum(labels.values()), 1e-9)
    shares = {group: 100 * sum(labels[name] for name in names.split()) / total
              for group, (_, names) in GROUPS.items()}
    shares["facial features"] = 100 - sum(shares.values())
    own = len(faces.captions[chosen[0]]) if faces.captions is not None else "by the grammar"
    return found | {"captions of the first face": own, "equal captions": len(texts) - len(set(texts)),
                    "words": [len(text) for text in words], "four-grams": four_grams,
                    "labels in a caption": total, "shares of groups": shares, "labels": labels}


def summary(found):
    """What a report says, in lines; FLIP's figures (section 3) in brackets."""
    lines = [f"{split}: {count:,} faces" for split, count in found["faces"].items()]
    lines += [f"{found['pictures looked at']:,} pictures seen: {found['like another']} look like another; "
              f"{found['unreadable']} unreadable"]
    if found["sizes"]:
        width, height = np.mean(found["sizes"], axis=0)
        lines += [f"size {width:.0f} x {height:.0f} in the mean (285 x 285)",
                  f"sharpness {np.median(found['sharpness']):.2f} in the median"]
    if found["captions looked at"]:
        words = np.array(found["words"])
        lines += [f"{found['captions looked at']:,} captions read: {found['equal captions']} equal another",
                  f"captions of the first face: {found['captions of the first face']}",
                  f"words: mean {words.mean():.1f} (30), mode {np.bincount(words).argmax()} (20 to 22), "
                  f"{words.min()} to {words.max()} (10 to 75)",
                  f"{found['four-grams'][-1]:,} distinct 4-grams",
                  f"{found['labels in a caption']:.1f} labels in a caption, in the grammar's words"]
    return lines


def draw_report(found, faces, path):
    """The summary, histograms and some faces on a page."""
    from matplotlib.figure import Figure
    page, rows = Figure(figsize=(15, 9), layout="constrained"), []
    for i in found["shown"]:
        rng, picture = np.random.default_rng(i), faces.picture(i, 128)
        rows.append((faces.caption(i, rng) if faces.has_text else "", [(picture, "as it is", False), *(
            (augment(picture, rng), "augmented", False) for _ in range(3))]))
    plots = page.subplot_mosaic([["faces", "text", "words"], ["faces", "sizes", "grams"],
                                 ["faces", "sharp", "groups"]], width_ratios=(1.3, 1, 1))
    if rows:
        plots["faces"].imshow(vit.contact_sheet(rows))
        plots["sizes"].hist(np.prod(found["sizes"], axis=1) ** 0.5, 40)
        plots["sharp"].hist(found["sharpness"], 40)
    plots["sizes"].set(title="pixels of a face, root of width x height (285)")
    plots["sharp"].set(title="sharpness (noise counts as sharp)")
    plots["text"].text(0, 1, "\n".join(summary(found)), va="top", fontsize=9)
    if found["captions looked at"]:
        plots["words"].hist(found["words"], np.arange(80))
        plots["words"].set(title="words in a caption (mode 20 to 22)")
        plots["grams"].plot(range(10, 101, 10), found["four-grams"], "o-")
        plots["grams"].set(title="distinct 4-grams over % of the captions", ylim=0)
        places = np.arange(len(GROUPS))
        plots["groups"].barh(places + 0.2, found["shares of groups"].values(), 0.4, label="here")
        plots["groups"].barh(places - 0.2, [share for share, _ in GROUPS.values()], 0.4, label="FLIP",
                             color="lightgrey")
        plots["groups"].set(yticks=places, yticklabels=list(GROUPS), title="% of the labels stated")
        plots["groups"].legend()
    plots["faces"].axis("off")
    plots["text"].axis("off")
    page.suptitle(found["set"])
    page.savefig(path, dpi=90)


def print_references(attributes):
    """How well an ideal reader finds one face, or caption, among these."""
    rng = np.random.default_rng(0)
    stated = np.stack([caption(row, rng)[1] for row in attributes])
    print(f"recall at 1 / 5 / 10 among {len(attributes)} in %, for a reader who knows all attributes:")
    for name, recalls in reference_recalls(stated, attributes).items():
        for direction, recall in recalls.items():
            numbers = " / ".join(f"{100 * share:.1f}" for share in recall.values())
            print(f"  {name:<11} {direction.replace('_', ' '):<13} {numbers}")


def print_times(faces, tokenizer, size=224, count=300):
    """Milliseconds that a picture takes on one core, stage by stage. Decoding reads the file again,
    by then from memory."""
    clock, samples = Counter(), Samples(faces, tokenizer, size, 0, True)

    def timed(stage, work):
        begin = time.perf_counter()
        result = work()
        clock[stage] += 1000 * (time.perf_counter() - begin)
        return result

    for n in tqdm(range(count), "timing", leave=False):
        i, rng = n * len(faces) // count, np.random.default_rng(n)
        stored = faces.pictures[i]
        with noting([]):
            if not isinstance(stored, np.ndarray):
                timed("read the file", stored.content if isinstance(stored, Crop) else stored.read_bytes)
            image = timed("decode, cut, resize", lambda: faces.picture(i, size))
            timed("augment", lambda: augment(image, rng))
            text = timed("choose or write a caption", lambda: faces.caption(i, rng))
            timed("batch", lambda: samples.collate([(vit.to_pixels(image, size), text, 0, {})]))
    for stage, total in clock.items():
        print(f"  {stage:<26} {total / count:6.2f} ms")
    print(f"  {1000 * count / sum(clock.values()):.0f} pictures of {size} x {size} a second on one core")


def main():
    parser = argparse.ArgumentParser(description="What is in a set of faces: figures, a page of histograms.")
    parser.add_argument("--data", help="a folder of faces, or a json list of them (default: drawn faces)")
    parser.add_argument("--out", default="report.png", help="the page; the figures go beside it as .json "
                                                            "(%(default)s)")
    parser.add_argument("--sample", type=int, default=10_000, help="how many captions to read (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder for drawn faces, or the index (%(default)s)")
    parser.add_argument("--columns", nargs="+", default=COLUMNS[:2], choices=COLUMNS,
                        help="FaceCaption-15M's columns that the captions are from (caption, face_caption)")
    parser.add_argument("--time", action="store_true", help="time reading a picture, stage by stage, instead")
    args = parser.parse_args()
    if args.sample < 10:
        raise ValueError(f"--sample {args.sample}: expected 10 or more faces")
    parts, missing = {}, ""
    for split in SPLITS if args.data else ():
        try:
            parts[split] = open_faces(args.data, split, args.cache, tuple(args.columns), max_lost=100)
        except ValueError as error:
            missing = error
    if missing and not parts:
        raise missing
    parts = parts or {"train": drawn_faces(1000, 192, seed=0, folder=args.cache)}
    faces = next(iter(parts.values()))
    if args.time:
        captions = [faces.caption(i, np.random.default_rng(i)) for i in range(min(100, len(faces)))]
        return print_times(faces, bert.Tokenizer.train(captions))
    found = report(parts, args.sample, np.random.default_rng(0))
    draw_report(found, faces, args.out)
    Path(args.out).with_suffix(".json").write_text(json.dumps(found, indent=1))
    print("\n".join([found["set"], *(f"  {line}" for line in summary(found))]))
    if faces.attributes is not None and faces.captions is None:
        print_references(np.array(faces.attributes[:1000]))
    print(f"{args.out}: these figures beside FLIP's, and some faces")


if __name__ == "__main__":
    vit.run_script(main)
