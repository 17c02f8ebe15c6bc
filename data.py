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

    python data.py               # drawn faces with captions, sheet.png; what captions are like
    python data.py --data DIR    # the same for faces of your own; LAYOUTS says what DIR may be
"""
import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import tarfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
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
    """I pictures of people, and what is known of them: any of the last three, or nothing."""
    name: str                               # what to call them in errors: "CelebA train"
    pictures: list | np.ndarray             # paths or Crops (see below), or uint8 (I, S, S, 3)
    identity: np.ndarray                    # int64 (I,): equal numbers, same person
    attributes: np.ndarray | None = None    # bool (I, 40), in the order of ATTRIBUTES
    captions: list | None = None            # texts for each picture; without them, the grammar writes some
    sketches: list | np.ndarray | None = None   # for each picture the paths of its sketch as it grows,
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

    def picture(self, i):
        """Face i as a PIL RGB image; ValueError if its file is damaged or no picture."""
        if isinstance(self.pictures, list):
            return self.opened(i, self.pictures[i])
        return Image.fromarray(self.pictures[i])

    def opened(self, i, picture):
        try:
            return picture.open() if isinstance(picture, Crop) else vit.open_picture(picture)
        except ValueError as error:
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
            return self.captions[i][rng.integers(len(self.captions[i]))]
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
        if not isinstance(self.sketches, list):
            return Image.fromarray(self.sketches[i, t]).convert("RGB")
        image = self.opened(i, self.sketches[i][t]).convert("L")
        if np.asarray(image).mean() > 127:
            image = ImageOps.invert(image)
        return image.convert("RGB")

    def subset(self, indices):
        indices = np.asarray(indices, dtype=np.int64)
        return Faces(self.name, pick(self.pictures, indices), self.identity[indices],
                     pick(self.attributes, indices), pick(self.captions, indices),
                     pick(self.sketches, indices))


def pick(values, indices):
    """The entries of a list or an array; None stays None."""
    if values is None:
        return None
    if isinstance(values, list):
        return [values[i] for i in indices]
    return values[indices]


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

    def to(self, device):
        return Batch(self.images.to(device, non_blocking=True), self.captions.to(device),
                     self.identity.to(device, non_blocking=True))


class Samples(torch.utils.data.Dataset):
    """What (epoch, index) shows: a pure function of it and the seed."""

    def __init__(self, faces, tokenizer, image_size, seed, augmented):
        self.faces, self.tokenizer, self.image_size = faces, tokenizer, image_size
        self.seed, self.augmented = seed, augmented

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index + 1))  # index 0 would give the permutation's
        image = self.faces.picture(index)
        if self.augmented:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            image = augment(image, rng)
        text = self.faces.caption(index, rng)
        return vit.to_pixels(image, self.image_size), text, self.faces.identity[index]

    def collate(self, samples):
        pixels, texts, identity = zip(*samples)
        return Batch(vit.to_tensor(pixels), self.tokenizer(list(texts)), torch.tensor(np.array(identity)))


class Batches:
    """Endless batches of `batch_size` for one of `world` processes; `per_epoch` are an epoch.

    Batch n of an epoch shows the n-th stretch of world * batch_size faces of the epoch's
    permutation; process r takes the r-th part of it, so the parts gathered in order are the batch
    that a single process would see.
    """

    def __init__(self, faces, tokenizer, image_size, batch_size, seed=0, augmented=True, rank=0, world=1,
                 workers=0):
        faces.check_text()
        self.faces, self.seed, self.workers = faces, seed, workers
        self.batch_size, self.rank, self.global_size = batch_size, rank, batch_size * world
        self.samples = Samples(faces, tokenizer, image_size, seed, augmented)
        self.per_epoch = len(faces) // self.global_size   # what is left over waits for another order
        if self.per_epoch == 0:
            raise ValueError(f"{faces.name}: {len(faces)} faces are fewer than a batch of {self.global_size} "
                             f"({world} processes x {batch_size}); use a smaller batch")

    def from_batch(self, number):
        """Iterator over batches from this one (counted from 0 over all epochs) on, without end.

        ValueError, in one sentence, for a picture that cannot be read.
        """
        loader = torch.utils.data.DataLoader(
            self.samples, batch_sampler=self.keys(number), collate_fn=self.samples.collate,
            num_workers=self.workers, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator())        # its own: it must not draw from the model's random numbers
        try:
            yield from loader
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


# ==== A first reading may stop here: the grammar, its ideal reader, the readers of sets, a sheet ==
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

    A reader is a function from a folder to the records of all parts of the set in it. For a set
    that lies otherwise, write one more, and a row of LAYOUTS.
    """
    where: str                      # for errors: "list_attr_celeba.txt line 7"
    picture: object                 # its file's name below the set's pictures; or its Path, or a Crop
    part: str                       # "train", "val" or "test"
    person: str = ""                # equal: the same person; "": nobody that another picture shows
    values: dict | None = None      # of the attributes, as written: {"young": "-1"}
    captions: list | None = None
    sketches: dict | None = None    # {step: path}


def open_faces(path, split):
    """The faces of a part ("train", "val", "test") of a set of one's own: in a folder, by what is
    found there, or in a json list."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    layouts = [layout for layout in LAYOUTS if any(path.glob(layout.sign))]
    if path.is_file() and path.suffix == ".json":
        layouts = LAYOUTS[-1:]
    if not layouts:
        known = ", ".join(f"{layout.sign} ({layout.title})" for layout in LAYOUTS)
        raise ValueError(f"{path}: found none of {known}. (FaceCaption-15M's .parquet has the addresses of "
                         f"its pictures only: fetch them with img2dataset)")
    layout, folder = layouts[0], path if path.is_dir() else path.parent
    name = f"{layout.title} {split}"
    try:
        return Faces(name, **chosen_part(layout.reader(path), split, layout, folder))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error}") from error


def chosen_part(records, split, layout, folder):
    """Of the records of a whole set those of one part, as Faces has them. What may be wrong with a
    record is said here; `open_faces` puts the name of the set before it."""
    part_of, sizes, chosen = {}, Counter(), []
    for record in records:
        if not isinstance(record.picture, (str, Path, Crop)):
            raise ValueError(f"{record.where} names no picture")
        if layout.repeats != "anywhere":
            before, part_of[record.picture] = part_of.get(record.picture), record.part
            if before and (layout.repeats == "never" or before != record.part):
                raise ValueError(f"{record.where} lists {record.picture} a second time, in one part or two")
        if record.part not in ("train", "val", "test"):
            raise ValueError(f"{record.where} has {record.picture} in part {record.part!r}, expected train, "
                             f"val or test")
        sizes[record.part] += 1
        if record.part == split:
            person = digest(record.person or str(record.picture))
            chosen.append((record.picture, person, truth(record), texts(record), record.sketches))
    if not chosen:
        raise ValueError(f"no faces, expected at least one in this part; found {dict(sizes)}")
    pictures, people, attributes, captions, sketches = map(list, zip(*chosen))
    return {"pictures": paths_of(pictures, folder, layout.places) if layout.places else pictures,
            "identity": np.array(people, dtype=np.int64),
            "attributes": None if attributes[0] is None else np.array(attributes),
            "captions": None if captions[0] is None else captions,
            "sketches": None if sketches[0] is None else in_steps(sketches, pictures)}


LOWER_CASE = [name.lower() for name in ATTRIBUTES]
TRUTH = {"1": True, "0": False, "-1": False}


def truth(record):
    """The attributes as bool (40,), in CelebA's order."""
    if record.values is None:
        return None
    with expecting("1, 0 or -1 for every attribute", f"{record.where} ({record.picture})"):
        return np.array([TRUTH[record.values[name]] for name in LOWER_CASE])


def texts(record):
    """The captions. Binary ones are refused, and half characters, which json can write and no
    tokenizer reads."""
    if record.captions is None:
        return None
    with expecting("captions that are text and not empty", f"{record.where} ({record.picture})"):
        for text in record.captions or [""]:
            if re.search("[\0\ud800-\udfff]", text) or not bert.clean_caption(text):
                raise ValueError(f"found {ascii(text)[:100]}")
    return record.captions


def in_steps(sketches, pictures):
    """{step: path} for each picture -> its paths in the order of the steps, which all have."""
    counts = Counter(step for steps in sketches for step in steps)
    usual = {step for step, count in counts.items() if 2 * count > len(sketches)}
    for steps, picture in zip(sketches, pictures):
        for step in sorted(usual ^ steps.keys()):
            raise ValueError(f"{picture} has {'no' if step in usual else 'a'} step {step}, unlike most")
    return [[steps[step] for step in sorted(steps)] for steps in sketches]


def paths_of(names, folder, places):
    """The paths of these pictures, below the first place that has one of the first of them."""
    has_some = [place for place in places if any((folder / place / name).is_file() for name in names[:10])]
    images = folder / (has_some or places)[0]
    paths = [images / name for name in names]
    listing = {parent: set(os.listdir(parent)) if parent.is_dir() else set()    # asking for each is slow
               for parent in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in listing[path.parent]]
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} pictures are not there, the first is {missing[0]}")
    return paths


def check_pictures(faces):
    """Read every picture and sketch once, before training; ValueError names the first bad ones."""
    reads = [functools.partial(faces.picture, i) for i in range(len(faces))]
    reads += [functools.partial(faces.sketch, i, t) for i in range(len(faces)) for t in range(faces.steps)]

    def complaint(read):
        try:
            read()
        except ValueError as error:
            return str(error)

    with ThreadPool() as pool:
        results = tqdm(pool.imap(complaint, reads), "checking pictures", len(reads), leave=False)
        bad = [result for result in results if result]
    if bad:
        raise ValueError("\n".join([*bad[:10], f"{len(bad)} of {len(reads)} pictures are bad"]))


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


def captions_in(record):
    """A text or a list of texts, under the two names that FaceCaption-15M has for it -> list."""
    captions = record.get("caption", record.get("face_caption", []))
    return captions if isinstance(captions, list) else [captions]


# ---- readers: faces with attributes ------------------------------------------------------------
def table(folder, stem):
    """(where, fields) of the lines of stem.txt (fields between spaces) or stem.csv (commas)."""
    path, separator = folder / f"{stem}.txt", None
    if (folder / f"{stem}.csv").is_file():
        path, separator = folder / f"{stem}.csv", ","
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path.name} line {number}", [field.strip(' "') for field in line.split(separator)]


def attribute_records(rows):
    """Records, still without a part, from rows (where, [picture, value, value ...]). The header
    above them names the columns in any order, with spaces or underscores, in any case."""
    found, count, (where, header) = 0, None, next(rows, ("the list", []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of pictures
        count, (where, header) = header[0], next(rows, (where, []))
    names = [name.strip().replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    if sorted(names) != sorted(LOWER_CASE):
        raise ValueError(f"{where} should name the 40 attributes of CelebA, found {' '.join(header)[:1000]}")
    for found, (where, (picture, *values)) in enumerate(rows, 1):
        if len(values) != len(names):
            raise ValueError(f"{where} has {len(values)} values, expected {len(names)} ({picture})")
        yield Record(where, picture.replace("\\", "/"), "", values=dict(zip(names, values)))
    if count not in (None, str(found)):
        raise ValueError(f"{where}: the list announces {count} pictures, but {found} follow")


def celeba(folder):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture is a person of its own."""
    parts = {}                              # {picture: the numbers in its line, which should be one}
    for _, (picture, *numbers) in table(folder, "list_eval_partition"):
        parts.setdefault(picture, []).extend(numbers)
    parts.pop("image_id", None)             # Kaggle's header
    for record in attribute_records(table(folder, "list_attr_celeba")):
        number = " and ".join(parts.pop(record.picture, ["none"]))
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
            identity, captions = record.get("image_id"), captions_in(record)
        person = str(picture if identity is None else identity)
        yield Record(where, picture, part or part_by_digest(person), person, captions=captions)


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
    return hold_out([Record(f"face {number}", f"{number}.jpg", part, captions=captions.get(number, []))
                     for number, part in sorted(listed)], 0.05)


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
    size: int           # in bytes
    box: tuple          # x1, y1, x2, y2 in pixels of the picture

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def open(self):
        """The face as a PIL RGB image; ValueError if the picture is damaged, or the box outside."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = io.BytesIO(file.read(self.size))
        try:
            picture = vit.open_picture(content)
        except ValueError as error:
            raise ValueError(str(error).replace(str(content), str(self))) from None
        x1, y1, x2, y2 = self.box
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, picture.width), min(y2, picture.height)
        if x1 >= x2 or y1 >= y2:
            raise ValueError(f"{self} has {picture.width} x {picture.height} pixels, its box {self.box} is "
                             f"outside")
        return picture.crop((x1, y1, x2, y2))


def facecaption(folder):
    """Tars of N.jpg and N.json, read in place: nothing is unpacked. Every record is a face of its
    own, though several may be in one picture, from one address: the split goes by the address."""
    for tar in tqdm(sorted(folder.glob("*.tar")), "listing tars", leave=False):
        for entry in tar_entries(tar):
            crop = Crop(tar, entry["name"], entry["offset"], entry["size"], tuple(entry["box"]))
            yield Record(tar.name, crop, part_by_digest(entry["url"]), captions=entry["caption"])


def tar_entries(tar):
    """What list_tar finds, kept beside the tar as .index where that can be written."""
    index, now = tar.with_suffix(".index"), [tar.stat().st_size, tar.stat().st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(index.read_bytes())
        if kept["size_and_time"] == now:    # of the tar, which may have been downloaded anew
            return kept["records"]
    entries = list_tar(tar)
    with contextlib.suppress(OSError), vit.whole_file(index) as partial:
        partial.write_text(json.dumps({"size_and_time": now, "records": entries}))
    return entries


def list_tar(tar):
    """The faces that were downloaded: [{"name", "offset", "size", "box", "caption", "url"}]."""
    pictures, records, entries = {}, {}, []
    with expecting("a complete tar; download it anew, or take it away", tar), tarfile.open(tar, "r:") as file:
        for member in filter(tarfile.TarInfo.isfile, file):
            stem, suffix = os.path.splitext(member.name)
            if suffix.lower() in vit.PICTURES:
                pictures[stem] = {"name": member.name, "offset": member.offset_data, "size": member.size}
            elif suffix == ".json":
                records[stem] = file.extractfile(member).read()
        file.fileobj.seek(file.offset)      # tarfile ended here, but takes a damaged header for the end
        if any(file.fileobj.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged at byte {file.offset}")
    for stem, record in records.items():
        where = f"{tar}: {stem}.json"
        with expecting("a picture and img2dataset's json, with the columns box, caption and url kept", where):
            record = read_json(record)
            if record["status"] != "success":
                continue
            box = json.loads(record["box"]) if isinstance(record["box"], str) else record["box"]
            x1, y1, x2, y2 = [round(float(number)) for number in box]
            if x1 >= x2 or y1 >= y2:
                raise ValueError(f"the box {box} is empty")
            entries.append(pictures[stem] | {"box": (x1, y1, x2, y2), "caption": captions_in(record),
                                             "url": str(record.get("url", where))})
    return entries


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
                records.append(Record(where, photos[name], part, sketches={1: sketch}))
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
        records += [Record(f"sketch/{part}", photo, part, sketches=steps) for photo, steps in growing.items()]
    return with_captions(records, folder, photos)


def with_captions(records, folder, photos):
    """The records, the last tenth of those for training, by name, now for validation; with captions
    where lists beside photo/ have them: train.json (for both) and test.json, or captions.json."""
    lists = [folder / f"{name}.json" for name in ("train", "test", "captions")]
    captions = {path.stem: photo_captions(path, photos) for path in lists if path.is_file()}
    for record in hold_out(sorted(records, key=lambda record: record.picture), 0.1):
        known = captions.get("test" if record.part == "test" else "train", captions.get("captions"))
        if known is not None:
            where = f"{record.where} and the captions beside photo/"
            record = record._replace(where=where, captions=known.get(record.picture, []))
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
        captions.setdefault(photo, []).extend(record.captions)
    return captions


# ---- readers: which one ------------------------------------------------------------------------
class Layout(NamedTuple):
    sign: str               # what tells it
    title: str              # of the set
    reader: object          # folder -> records of all its parts
    places: tuple = ()      # where the pictures may be; (): the reader gives whole paths, or Crops
    repeats: str = "never"  # may a picture be listed several times? "in a part", or "anywhere"


LAYOUTS = (
    Layout("sketch/train", "FS2K-SDE", fs2k_sde),
    Layout("anno_*.json", "FS2K", fs2k),
    Layout("list_attr_celeba.*", "CelebA", celeba,
           ("img_align_celeba", "img_align_celeba/img_align_celeba")),      # Kaggle has it twice
    Layout("list_attr_lfwa.csv", "LFWA", lfwa_lists, ("lfw", ".")),
    Layout("lfw_att_40.mat", "LFWA", lfwa_matlab, ("lfw", ".")),
    Layout("captions_hq.json", "CelebA-Dialog", celeba_dialog, ("images", "image", ".")),
    Layout("text/celeba-caption", "MM-CelebA-HQ", mm_celeba, ("images",)),
    Layout("train.json", "json lists", caption_lists, (".", "images"), repeats="in a part"),
    Layout("*.tar", "FaceCaption", facecaption, repeats="anywhere"),
    Layout("*.json", "json list", caption_lists, (".", "images"), repeats="anywhere"),
)


# ---- a sheet of samples ------------------------------------------------------------------------
GROUPS = {      # of attributes, and the share of FLIP's labels that they have, in percent (section 3)
    "beard": (14.8, "5_o_Clock_Shadow Goatee Mustache No_Beard Sideburns"),
    "hairstyle": (14.0, "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline "
                        "Straight_Hair Wavy_Hair"),
    "accessories": (10.6, "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
                          "Wearing_Necktie"),
    "elementary": (26.5, "Male Young Attractive Smiling Chubby Pale_Skin"),
}       # the others are facial features, 34.0


def print_statistics(faces, count=10_000):
    """Words and phrases of `count` captions; for captions of the grammar also what they state."""
    rng, chosen, stated = np.random.default_rng(0), [i % len(faces) for i in range(count)], None
    if faces.captions is None:
        faces.check_text()
        written, stated = zip(*(caption(faces.attributes[i], rng) for i in chosen))
    else:
        written = [faces.caption(i, rng) for i in chosen]
    words = [text.split() for text in written]
    lengths = np.array([len(text) for text in words])
    grams = {gram for text in words for gram in zip(text, text[1:], text[2:], text[3:])}
    print(f"{count:,} captions of {len(faces):,} faces, {faces.name} "
          f"(in brackets: FLIP's captions, from the paper)")
    print(f"  words          mean {lengths.mean():.1f} (30), mode {np.bincount(lengths).argmax()} "
          f"(20 to 22), range {lengths.min()} to {lengths.max()} (10 to 75)")
    print(f"  4-grams        {len(grams):,} distinct")
    if stated is not None:
        print_stated(np.array(stated), faces.attributes)


def print_stated(stated, attributes):
    """The share of each group in the labels that captions state (T, 40), and the references."""
    mentions = dict(zip(ATTRIBUTES, (stated != 0).mean(0)))
    total = sum(mentions.values())
    shares = {group: 100 * sum(mentions.pop(name) for name in names.split()) / total
              for group, (_, names) in GROUPS.items()}
    print(f"  labels stated  {total:.1f} a caption, of which",
          ", ".join(f"{group} {share:.1f} % ({GROUPS[group][0]})" for group, share in shares.items()),
          f"and facial features {100 * sum(mentions.values()) / total:.1f} % (34.0)")
    n = min(1000, len(attributes))
    print(f"  finding the one among {n} faces or captions, for a reader who knows all attributes: "
          f"recall at 1 / 5 / 10")
    for name, recalls in reference_recalls(stated[:n], attributes[:n]).items():
        for direction, recall in recalls.items():
            numbers = " / ".join(f"{share:.3f}" for share in recall.values())
            print(f"    {name:<11} {direction.replace('_', ' '):<13} {numbers}")


def sample_sheet(faces, count, tile=128):
    """Faces as they are and as training sees them, below a caption of each: a PIL image."""
    rows = []
    for n, i in enumerate(np.linspace(0, len(faces) - 1, count).astype(int)):
        rng = np.random.default_rng(n)
        picture = faces.picture(i).resize((tile, tile), Image.Resampling.BICUBIC)
        seen = [(augment(picture, rng), "augmented", False) for _ in range(3)]
        rows.append((faces.caption(i, rng), [(picture, "as it is", False), *seen]))
    return vit.contact_sheet(rows, tile)


def main():
    parser = argparse.ArgumentParser(description="A sheet of faces with captions; what captions are like.")
    parser.add_argument("--data", help="a folder of faces, or a json list of them (default: drawn faces)")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"),
                        help="part of --data (%(default)s)")
    parser.add_argument("--out", default="sheet.png", help="where the sheet goes (%(default)s)")
    parser.add_argument("--count", type=int, default=12, help="faces on the sheet (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder that keeps drawn faces (%(default)s)")
    args = parser.parse_args()
    if args.count < 1:
        raise ValueError(f"--count {args.count}: expected 1 or more faces")
    if args.data:
        faces = open_faces(args.data, args.split)
    else:
        faces = drawn_faces(1000, 192, seed=0, folder=args.cache)
    print_statistics(faces)
    sample_sheet(faces, min(args.count, len(faces))).save(args.out)
    print(f"wrote {args.out}: each face as it is, augmented, and a caption")


if __name__ == "__main__":
    vit.run_script(main)
