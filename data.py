"""Faces with sentences: the caption grammar, the readers, the augmentation of the recipe and the loader.

FLIP's captions start from a probabilistic context-free grammar over CelebA's 40 attributes (arXiv 2407.08515,
section 3). Ours states each *fact* of a face by chance, then writes the stated facts as sentences; because that chance
is known, so is how well an ideal reader could find the face again (`reference_recalls`): the numbers a training run is
held against.

Where we leave the official code: captions come fresh from the grammar each time instead of from a file; the order of
the samples, their captions and their augmentation depend on (seed, epoch, index) alone, so a run resumed at any step,
with any number of workers, sees what an uninterrupted one sees; bad input is named with file and record.

    python data.py                              # a sheet of drawn faces, sheet.png, and statistics of their captions
    python data.py --data DIR                   # the same for faces of your own

Your own faces (open_faces) may be CelebA, LFWA, MM-CelebA-HQ, CelebA-Dialog, FaceCaption-15M as img2dataset downloads
it, or images with a json list of captions; photos with sketches (open_episodes) FS2K-SDE or FS2K. Each reader says in
its docstring how its files lie, and which part of a set without a validation part becomes one.

Shapes: N faces, T captions or steps of a sketch, B pairs in a batch, S pixels a side.
"""
import argparse
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import bert
import toyfaces
import vit
from toyfaces import ATTRIBUTES

# ---- the caption grammar ------------------------------------------------------------------------------------------
# A fact of a face is an attribute that is true, or "not Male", or "not Young". Its row: how often it is stated, and the
# ways to say it, each opened by its kind: what one `is`, `has` or `wears`, the `noun` for the person, the `photo`, or
# else the part of the face that the words describe. {his} becomes his, her or their.
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
STATE_PROBABILITY = {fact: GRAMMAR[fact][0] for fact in FACTS}
PROBABILITIES = np.array(list(STATE_PROBABILITY.values()))      # (42,)
PHRASES = [[phrase.split(" ", 1) for phrase in GRAMMAR[fact][1].split(" | ")] for fact in FACTS]  # [kind, words]
MAN, WOMAN = FACTS.index("Male"), FACTS.index("not Male")
NEGATED = [ATTRIBUTES.index("Male"), ATTRIBUTES.index("Young")]
MIN_FACTS = 3       # a caption states at least so many, where the face has them
SHORTEST, LONGEST = 10, 75      # words of a caption; the tokenizer keeps 65, which cuts 2 captions in 1,000

PARTS = {       # of the face: whether one says "a nose", and "the nose is" or "are"
    "cheekbones": (False, "are"), "cheeks": (False, "are"), "eyebrows": (False, "are"), "eyes": (False, "are"),
    "face": (True, "is"), "hair": (False, "is"), "hairline": (True, "is"), "lips": (False, "are"),
    "mouth": (True, "is"), "nose": (True, "is"), "skin": (False, "is"),
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
            "In this {photo} there is {x}.", "The {photo} shows the face of {x}.", "{x} looks out of this {photo}.")
LEADS = (("In this picture, ", "In the photo, ", "Here, ", "As can be seen, "), ("",),
         ("In addition, ", "Also, ", "Moreover, ", "Besides, "))     # of the first sentence, the second, the others
NEUTRAL = ("Only the face can be seen.", "The face fills most of the picture.", "Nothing else is shown here.")


class Voice(NamedTuple):
    """How one caption is written."""
    noun: str           # for the person: "man", "lady", "individual" ...
    he: str             # or "she" or "they"
    his: str            # or "her" or "their"
    talkative: float    # 0: long lists in few sentences; 1: a sentence for everything


def facts_of(attributes):
    """Attributes bool (..., 40) -> which facts hold, bool (..., 42)."""
    return np.concatenate([attributes, ~attributes[..., NEGATED]], axis=-1)


def caption(attributes, rng):
    """A caption for a face: (text, stated).

    attributes bool (40,); rng a numpy Generator. stated int8 (40,): +1 the text says the attribute is true, -1 false
    (of Male and Young only), 0 it says nothing. Facts are stated independently, with STATE_PROBABILITY, and drawn again
    until there are MIN_FACTS of them or all: `log_likelihood` relies on exactly this.
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
    """The text that says these facts (numbers into FACTS) and no other, of SHORTEST to LONGEST words.

    Too long a text is written anew, never cut; only for a face with more facts than real ones have it may stay longer.
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
    # Most writers are brief and a few are not, as in FLIP's captions; who has much to tell is brief.
    talkative = dice.random()**1.5 * min(1, 10 / len(facts))
    said = choose_words(facts, talkative, dice)
    he, his = ("he", "his") if MAN in facts else ("she", "her") if WOMAN in facts else ("they", "their")
    voice = Voice(dice.choice(said["noun"] or NOUNS), he, his, talkative)

    sentences = []
    nothing_to_tell = not any(said[kind] for kind in ("is", "has", "wears", "part"))
    if nothing_to_tell or dice.random() < 0.4 + 0.4 * talkative:
        sentences.append(opening(said, voice, dice))
    units = [(kind, chunk) for kind in ("is", "has", "wears", "part") for chunk in chunks(said[kind], talkative, dice)]
    dice.shuffle(units)
    while units:
        sentences.append(sentence(units, voice, len(sentences), dice))
    if said["photo"]:
        sentences.append(f"The {dice.choice(('photo', 'picture', 'image'))} is {said['photo'][0]}.")
    sentences = [text.replace("{his}", his) for text in sentences]
    return [text[0].upper() + text[1:] for text in sentences]


def choose_words(facts, talkative, dice):
    """Facts -> {kind: [phrase]} in random order.

    What is said of one part of the face becomes one phrase: either something that one has ("arched, thick eyebrows") or
    a clause of its own, of kind "part" ("{his} eyebrows are arched and thick").
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


def opening(said, voice, dice):
    """A first sentence about the photo, with up to two adjectives and some features, which it takes out of `said`."""
    adjectives = [said["is"].pop() for _ in range(min(dice.randrange(3), len(said["is"])))]
    x = with_article(" ".join([", ".join(adjectives), voice.noun]).strip())
    if said["has"] and dice.random() < 0.4:
        features = [said["has"].pop() for _ in range(min(dice.randrange(1, 4), len(said["has"])))]
        x += " with " + listed(features, dice)
    photo = dice.choice(("photo", "picture", "portrait", "photograph"))
    if said["photo"] and dice.random() < 0.5:
        photo = f"{said['photo'].pop()} {photo}"
    return dice.choice(OPENINGS).format(photo=photo, x=x)


def sentence(units, voice, position, dice):
    """Sentence number `position`; it takes one or two of the units (kind, phrases) off the end of the list."""
    kind, phrases = units.pop()
    lead = dice.choice(LEADS[min(position, 2)]) if dice.random() < voice.talkative else ""
    if kind == "part":
        return f"{lead}{listed(phrases, dice)}."
    named = dice.random() < (0.75 if position == 0 else 0.2)
    subject = f"{dice.choice(('the', 'this'))} {voice.noun}" if named else voice.he
    verbs = PLURAL if subject == "they" else SINGULAR
    text = f"{subject} {predicate(kind, phrases, verbs, dice)}"
    if units and units[-1][0] != "part" and dice.random() < 0.5:
        kind, phrases = units.pop()
        if kind == "has" and dice.random() < 0.5:
            text = dice.choice(("{text}, with {x}", "with {x}, {text}")).format(text=text, x=listed(phrases, dice))
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


# ---- what a reader who knows every attribute could find ------------------------------------------------------------
def facts_said(stated):
    """stated int8 (T, 40) -> which facts each caption says, bool (T, 42)."""
    return np.concatenate([stated > 0, stated[..., NEGATED] < 0], axis=-1)


def consistent(stated, attributes):
    """Which faces satisfy all that is said: stated int8 (T, 40), attributes bool (N, 40) -> bool (T, N)."""
    return facts_said(stated).astype(float) @ ~facts_of(attributes).T == 0


def log_likelihood(stated, attributes):
    """log P(a caption states exactly this | face), natural logarithm: int8 (T, 40), bool (N, 40) -> float (T, N).

    With F the facts of the face and p their probabilities, a caption states the set S with probability
        prod_{i in S} p_i * prod_{i in F - S} (1 - p_i) / P(at least min(MIN_FACTS, |F|) are stated)
    or 0 if S is not within F. A fact that goes unsaid counts against a face; so this knows more than `consistent`.
    """
    said, facts = facts_said(stated).astype(float), facts_of(attributes)
    said_instead = np.log(PROBABILITIES) - np.log1p(-PROBABILITIES)
    unsaid = facts @ np.log1p(-PROBABILITIES)                                                   # (N,)
    log_p = (said @ said_instead)[:, None] + unsaid - np.log(enough_facts(facts))               # (T, N)
    return np.where(consistent(stated, attributes), log_p, -np.inf)


def enough_facts(facts):
    """P(one independent draw states at least min(MIN_FACTS, |F|) of the facts), bool (N, 42) -> float (N,)."""
    count = np.zeros((len(facts), MIN_FACTS))       # P(exactly k stated so far), k < MIN_FACTS
    count[:, 0] = 1
    for p in (facts * PROBABILITIES).T:             # (N,), one fact after another
        count[:, 1:] = count[:, 1:] * (1 - p)[:, None] + count[:, :-1] * p[:, None]
        count[:, 0] *= 1 - p
    needed = np.minimum(facts.sum(1), MIN_FACTS)
    return 1 - (count * (np.arange(MIN_FACTS) < needed[:, None])).sum(1)


def expected_recall(scores, k):
    """Recall at each K of queries (rows) whose answer is on the diagonal: float (Q, Q) -> {K: recall}.

    Ties are broken by chance: with `better` answers above and `tied` at the score of the true one (itself included),
    the true one is among the first K with probability (K - better) / tied, within [0, 1].
    """
    true = np.diag(scores)[:, None]
    better = (scores > true + 1e-9).sum(1)          # the tolerance absorbs rounding: ties here are exact
    tied = (scores >= true - 1e-9).sum(1) - better
    return {K: float(np.clip((K - better) / tied, 0, 1).mean()) for K in k}


def reference_recalls(stated, attributes, k=(1, 5, 10)):
    """What a reader finds who knows every attribute: {reference: {direction: {K: recall}}}, the references being
    "consistency" and "ceiling", the directions "text_to_image" and "image_to_text".

    stated int8 (N, 40), attributes bool (N, 40); caption i was written for face i.
    Consistency: all answers that fit what is said are equally good. Ceiling: the Bayes ranking under the grammar.
    Text to image, each face being as likely as any other, that is by P(stated | face). Image to text, a caption is
    ranked by the probability that it was written for this face and not for another of the gallery,
    P(stated | face) / sum over faces of P(stated | face): a long caption that fits only this face has a tiny likelihood
    and still beats a short one that fits all. (It looks at one caption at a time; that each face has exactly one
    caption is not used, and neither can a model use it that scores pairs.)
    """
    fits = np.where(consistent(stated, attributes), 0.0, -np.inf)
    log_p = log_likelihood(stated, attributes)
    posterior = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    return {"consistency": {"text_to_image": expected_recall(fits, k), "image_to_text": expected_recall(fits.T, k)},
            "ceiling": {"text_to_image": expected_recall(log_p, k), "image_to_text": expected_recall(posterior.T, k)}}


# ---- faces and their captions --------------------------------------------------------------------------------------
class Crop(NamedTuple):
    """A face in a picture that lies in a tar; read from there, and cut out, whenever it is opened."""
    tar: Path
    name: str           # of the picture in the tar
    offset: int         # in bytes, where its file begins there
    size: int           # in bytes
    box: tuple          # x1, y1, x2, y2 in pixels of the picture

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def open(self):
        """The face as a PIL RGB image; ValueError if the picture is damaged or the box lies outside of it."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = io.BytesIO(file.read(self.size))
        try:
            picture = vit.open_picture(content)
        except ValueError as error:
            raise ValueError(str(error).replace(str(content), str(self))) from None
        x1, y1, x2, y2 = self.box
        inside = max(x1, 0), max(y1, 0), min(x2, picture.width), min(y2, picture.height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise ValueError(f"{self} has {picture.width} x {picture.height} pixels, its box {list(self.box)} is outside")
        return picture.crop(inside)


def open_file(name, i, picture):
    """Entry i of the set `name`, a path or a Crop, as a PIL RGB image; ValueError if it is damaged or no picture."""
    try:
        return picture.open() if isinstance(picture, Crop) else vit.open_picture(picture)
    except ValueError as error:
        raise ValueError(f"{name}, record {i}: {error}") from None


def check_files(name, paths):
    """Every path is in the listing of its folder (one listing each: asking file by file is slow on big sets)."""
    folders = {path.parent for path in paths}
    listing = {folder: set(os.listdir(folder)) if folder.is_dir() else () for folder in folders}
    missing = [path for path in paths if path.name not in listing[path.parent]]
    if missing:
        raise FileNotFoundError(f"{name}: {len(missing)} of {len(paths)} pictures are not there, the first is {missing[0]}")


def pick(values, indices):
    """The entries of a list or an array; None stays None."""
    return [values[i] for i in indices] if isinstance(values, list) else None if values is None else values[indices]


def is_text(text):
    """No binary data, nor half a character, which json can write and no tokenizer reads."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


@dataclass
class Faces:
    """N pictures, with their attributes, their captions, both or neither, checked when made."""
    name: str                               # what to call them in errors: "CelebA train"
    pictures: list | np.ndarray             # paths or Crops, or uint8 (N, S, S, 3)
    identity: np.ndarray                    # int64 (N,): equal numbers, same person
    attributes: np.ndarray | None = None    # bool (N, 40)
    captions: list | None = None            # a list of texts for each picture; without it, the grammar writes them

    def __post_init__(self):
        if len(self) == 0:
            raise ValueError(f"{self.name}: no faces, expected at least one in this part")
        for field in ("identity", "attributes", "captions"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{self.name}: {len(self)} pictures, but {len(values)} entries in {field}")
        for i, texts in enumerate(self.captions or ()):
            if not texts or not all(bert.clean_caption(text) for text in texts):
                raise ValueError(f"{self.name}: {self.where(i)} has an empty caption: {str(texts)[:100]}")
            if not all(is_text(text) for text in texts):
                raise ValueError(f"{self.name}: {self.where(i)} has a caption that is no text: {ascii(texts)[:100]}")
        if isinstance(self.pictures, list):
            check_files(self.name, [picture for picture in self.pictures if isinstance(picture, Path)])

    def __len__(self):
        return len(self.pictures)

    def where(self, i):
        return str(self.pictures[i]) if isinstance(self.pictures, list) else f"face {i}"

    def picture(self, i):
        """Face i as a PIL RGB image; ValueError if the file is damaged or no picture."""
        if isinstance(self.pictures, list):
            return open_file(self.name, i, self.pictures[i])
        return Image.fromarray(self.pictures[i])

    @property
    def has_text(self):
        return self.captions is not None or self.attributes is not None

    def check_text(self):
        """ValueError where nothing can be said of the faces; whoever needs text asks before the work begins."""
        if not self.has_text:
            raise ValueError(f"{self.name}: expected captions, or attributes to write them from, found neither")

    def caption(self, i, rng):
        """One of the captions of face i, or a new one from the grammar."""
        self.check_text()
        if self.captions is not None:
            return self.captions[i][rng.integers(len(self.captions[i]))]
        return caption(self.attributes[i], rng)[0]

    def subset(self, indices):
        indices = np.asarray(indices, dtype=np.int64)
        return Faces(self.name, pick(self.pictures, indices), self.identity[indices],
                     pick(self.attributes, indices), pick(self.captions, indices))


@dataclass
class Episodes:
    """N photos, each with T sketches of it that grow from the first strokes to the finished one, checked when made."""
    photos: Faces
    sketches: list | np.ndarray             # for each photo the list of its T paths, or uint8 (N, T, S, S), white on black

    def __post_init__(self):
        name = self.photos.name
        if len(self.sketches) != len(self):
            raise ValueError(f"{name}: {len(self)} photos, but sketches of {len(self.sketches)}")
        if isinstance(self.sketches, list):
            usual = Counter(len(paths) for paths in self.sketches).most_common(1)[0][0]
            for i, paths in enumerate(self.sketches):
                if len(paths) != usual:
                    raise ValueError(f"{name}: {self.photos.where(i)} has {len(paths)} sketches, the others have {usual}")
            check_files(name, [path for paths in self.sketches for path in paths])
        if self.steps == 0:
            raise ValueError(f"{name}: no sketches")

    def __len__(self):
        return len(self.photos)

    @property
    def steps(self):
        return len(self.sketches[0])

    def sketch(self, i, t):
        """The sketch of photo i after step t (counted from 0) as a PIL RGB image, white on black.

        A file that is light on the whole has dark strokes on paper, as FS2K's finished sketches do, and is inverted.
        """
        if not isinstance(self.sketches, list):
            return Image.fromarray(self.sketches[i, t]).convert("RGB")
        image = open_file(f"{self.photos.name} sketches", i, self.sketches[i][t]).convert("L")
        if np.asarray(image).mean() > 127:
            image = ImageOps.invert(image)
        return image.convert("RGB")

    def subset(self, indices):
        indices = np.asarray(indices, dtype=np.int64)
        return Episodes(self.photos.subset(indices), pick(self.sketches, indices))


def check_pictures(part):
    """Read every picture of Faces or Episodes once, so that a damaged file is found before training; ValueError names the
    first ones."""
    photos = part.photos if isinstance(part, Episodes) else part
    reads = [partial(photos.picture, i) for i in range(len(photos))]
    if isinstance(part, Episodes):
        reads += [partial(part.sketch, i, t) for i in range(len(part)) for t in range(part.steps)]

    def complaint(read):
        try:
            read()
        except ValueError as error:
            return str(error)

    with ThreadPool(os.cpu_count()) as pool:
        results = tqdm(pool.imap(complaint, reads), "checking pictures", len(reads), leave=False)
        bad = [result for result in results if result]
    if bad:
        raise ValueError("\n".join([*bad[:10], f"{len(bad)} of {len(reads)} pictures are bad"]))


# ---- readers: drawn faces ------------------------------------------------------------------------------------------
def drawn_faces(count, size, seed, folder):
    """`count` faces drawn by toyfaces.py at size x size pixels, kept in `folder` for the next time."""
    stem = drawn_stem(count, size, seed, folder)
    attributes, pictures = drawn(draw_face, [(index, seed, size) for index in range(count)], {
        Path(f"{stem}.attributes.npy"): (bool, (count, len(ATTRIBUTES))),
        Path(f"{stem}.npy"): (np.uint8, (count, size, size, 3))})
    return Faces(f"drawn faces (seed {seed})", pictures, np.arange(count), np.array(attributes))


def drawn_episodes(count, size, seed, folder, steps=70):
    """The drawn faces as photos, each with a sketch that grows in `steps` steps; kept in `folder` for the next time."""
    path = Path(f"{drawn_stem(count, size, seed, folder)}-{steps}steps.npy")
    sketches, = drawn(draw_sketch, [(index, seed, size, steps) for index in range(count)],
                      {path: (np.uint8, (count, steps, size, size))})
    return Episodes(drawn_faces(count, size, seed, folder), sketches)


def drawn_stem(count, size, seed, folder):
    # Part of the name is a digest of the code that draws: a changed face never comes from an old file.
    version = hashlib.sha256(Path(toyfaces.__file__).read_bytes()).hexdigest()[:8]
    return Path(folder) / f"drawn-{count}x{size}-seed{seed}-{version}"


def draw_face(task):
    image, attributes = toyfaces.face(*task)
    return attributes, np.asarray(image)


def draw_sketch(task):
    return toyfaces.sketch(*task),


def drawn(draw, tasks, files):
    """The arrays in the .npy files {path: (type, shape)}; where the last of them is not there, all are drawn first."""
    if not list(files)[-1].exists():
        draw_files(draw, tasks, files)
    arrays = []
    for path, (_, shape) in files.items():
        try:
            arrays.append(np.load(path, mmap_mode="r"))
            if arrays[-1].shape != shape:
                raise ValueError("its shape is another")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete {list(files)[-1].name}, and it is drawn again") from None
    return arrays


def draw_files(draw, tasks, files):
    """Draw on all cores: draw(task i) gives entry i of every file. The files appear whole or not at all."""
    partials = [path.with_suffix(f".{os.getpid()}.partial") for path in files]
    partials[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        arrays = [np.lib.format.open_memmap(partial, "w+", *kind) for partial, kind in zip(partials, files.values())]
        with multiprocessing.Pool(os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:    # Ctrl-C is ours
            for i, entries in enumerate(tqdm(pool.imap(draw, tasks, 16), "drawing faces", len(tasks))):
                for array, entry in zip(arrays, entries):
                    array[i] = entry
        for array, partial, path in zip(arrays, partials, files):
            array.flush()
            os.replace(partial, path)       # the last one comes last: with it, the set is complete
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


# ---- readers: what they share --------------------------------------------------------------------------------------
SHARES = {"train": range(0, 90), "val": range(90, 95), "test": range(95, 100)}  # percent, for sets without a split of their own
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def digest(text):
    """A text -> a number of 56 bits, the same in every process and every file."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def hold_out(items, share, split):
    """What is left of a training list for "train", or the last `share` of it (one at least) for "val"."""
    count = max(1, round(share * len(items)))
    return items[-count:] if split == "val" else items[:-count]


def keep_apart(title, train, test):
    """Nothing stands twice in what is for training and for testing, be it in one of them or in both."""
    twice = [name for name, count in Counter([*train, *test]).items() if count > 1]
    if twice:
        raise ValueError(f"{title}: {len(twice)} faces are listed more than once, in one part or in both; the first is {twice[0]}")


def folder_of(folder, places, names):
    """The first of these places in the folder that has one of the first pictures; or else the first of all."""
    has_some = (folder / place for place in places if any((folder / place / name).is_file() for name in names[:10]))
    return next(has_some, folder / places[0])


def read_json(path, kind=list):
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:      # malformed (it says line and column), not UTF-8, a folder
        raise ValueError(f"{path}: not valid json: {error}") from None
    if not isinstance(records, kind):
        expected = {list: "a list of records", dict: "records by name"}[kind]
        raise ValueError(f"{path}: expected {expected}, found a {type(records).__name__}")
    return records


def table_rows(title, folder, stem):
    """(file name, iterator of (line number, fields)) for stem.txt (fields between spaces) or stem.csv (commas)."""
    for suffix, separator in ((".txt", None), (".csv", ",")):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return path.name, ((n, [field.strip(' "') for field in line.split(separator)])
                               for n, line in enumerate(lines, 1) if line.strip())
    raise FileNotFoundError(f"{title}: {stem}.txt (or .csv) is not in {folder}")


def attribute_table(header_at, header, rows):
    """Rows (where, picture, its 40 values as text) -> {picture: bool (40,)}, the columns in CelebA's order.

    The header names the columns, in any order, with spaces or underscores, in any case. 1 is true, -1 and 0 are false.
    """
    found = [name.strip().replace(" ", "_").lower() for name in header]
    wanted = [name.lower() for name in ATTRIBUTES]
    if sorted(found) != sorted(wanted):
        raise ValueError(f"{header_at} should name the 40 attributes of CelebA, found {' '.join(header)[:1000] or 'nothing'}")
    columns = [found.index(name) for name in wanted]
    truth = {"1": True, "-1": False, "0": False}
    attributes = {}
    for where, name, values in rows:
        if len(values) != len(ATTRIBUTES):
            raise ValueError(f"{where} has {len(values)} values, expected 40 ({name})")
        if not truth.keys() >= set(values):
            odd = next(value for value in values if value not in truth)
            raise ValueError(f"{where} has the value {odd!r}, expected 1, 0 or -1 ({name})")
        if name in attributes:
            raise ValueError(f"{where} lists {name} a second time")
        attributes[name] = np.array([truth[value] for value in values])[columns]
    return attributes


def with_attributes(name, folder, attributes, people):
    """Faces from {picture: bool (40,)}."""
    rows = np.array(list(attributes.values()), dtype=bool).reshape(-1, len(ATTRIBUTES))
    return Faces(name, [folder / picture for picture in attributes], np.array(people, dtype=np.int64), rows)


# ---- readers: faces with attributes --------------------------------------------------------------------------------
def celeba(folder, split):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture counts as a person of its own."""
    folder = Path(folder)
    attributes = celeba_attributes(folder)
    wanted = {"train": "0", "val": "1", "test": "2"}[split]
    part_of = {}                            # {picture: its part's number}
    source, rows = table_rows("CelebA", folder, "list_eval_partition")
    for number, row in rows:
        if row[0] == "image_id":
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise ValueError(f"CelebA: {source} line {number} is {' '.join(row)!r}, expected a picture and 0, 1 or 2")
        if row[0] not in attributes:
            raise ValueError(f"CelebA: {source} line {number} names {row[0]}, which list_attr_celeba does not have")
        if row[0] in part_of:
            raise ValueError(f"CelebA: {source} line {number} lists {row[0]} a second time")
        part_of[row[0]] = row[1]
    names = [name for name, part in part_of.items() if part == wanted]
    images = folder_of(folder, ("img_align_celeba", "img_align_celeba/img_align_celeba"), names)    # Kaggle's has it twice
    return with_attributes(f"CelebA {split}", images, {name: attributes[name] for name in names}, range(len(names)))


def celeba_attributes(folder):
    """list_attr_celeba -> {picture name: bool (40,)}."""
    source, rows = table_rows("CelebA", folder, "list_attr_celeba")
    count = next(rows, (1, ["?"]))[1][0] if source.endswith(".txt") else None       # the .csv does not say how many
    number, header = next(rows, (1, []))
    attributes = attribute_table(f"CelebA: {source} line {number}", [name for name in header if name != "image_id"],
                                 ((f"CelebA: {source} line {n}", name, values) for n, (name, *values) in rows))
    if count not in (None, str(len(attributes))):
        raise ValueError(f"CelebA: {source} line 1 announces {count} pictures, but {len(attributes)} follow")
    return attributes


def lfwa(folder, split):
    """LFWA, from the official lists (list_attr_lfwa.csv, list_attr_lfwa_test.csv) or its authors' MATLAB files.

    The identity is the person, that is the folder of the picture. Five percent of the persons for training are "val".
    The official training list may hold the test's pictures too: they are left out of it. Without a list for the test,
    half of the persons are kept for it, which is LFWA's own proportion.
    """
    folder = Path(folder)
    train, test = (lfwa_lists if (folder / "list_attr_lfwa.csv").is_file() else lfwa_matlab)(folder)
    person = {name: digest(Path(name).parent.name) for name in (*train, *test)}
    if not test:
        test = {name: row for name, row in train.items() if person[name] % 2 == 0}
    train = {name: row for name, row in train.items() if name not in test}
    chosen = test if split == "test" else {
        name: row for name, row in train.items() if (person[name] // 2 % 20 == 0) == (split == "val")}
    images = folder_of(folder, ("lfw", "."), list(chosen))
    return with_attributes(f"LFWA {split}", images, chosen, [person[name] for name in chosen])


def lfwa_lists(folder):
    """(train, test), each {picture: bool (40,)}, of the lists; test is empty without one."""
    tables = []
    for stem in ("list_attr_lfwa", "list_attr_lfwa_test"):
        if tables and not (folder / f"{stem}.csv").is_file():
            return tables[0], {}
        source, rows = table_rows("LFWA", folder, stem)
        number, header = next(rows, (1, []))
        tables.append(attribute_table(
            f"LFWA: {source} line {number}", header[-len(ATTRIBUTES):],         # before them the path's column, if named
            ((f"LFWA: {source} line {n}", name.replace("\\", "/"), values) for n, (name, *values) in rows)))
    return tables


def lfwa_matlab(folder):
    """(train, test), each {picture: bool (40,)}, of lfw_att_40.mat and indices_train_test.mat."""
    names, header, labels = read_matlab(folder / "lfw_att_40.mat", "name", "AttrName", "label")
    labels = labels if len(labels) == len(names) else labels.T
    if labels.shape != (len(names), len(ATTRIBUTES)):
        raise ValueError(f"LFWA: lfw_att_40.mat has labels of shape {labels.shape}, expected {len(names)} names x 40")
    rows = ((f"LFWA: lfw_att_40.mat row {n} (counted from 1)", name.replace("\\", "/"), [f"{value:g}" for value in row])
            for n, (name, row) in enumerate(zip(names, labels), 1))
    attributes = list(attribute_table("LFWA: lfw_att_40.mat's AttrName", header, rows).items())
    parts = []
    for variable in ("indices_img_train", "indices_img_test"):
        [indices] = read_matlab(folder / "indices_train_test.mat", variable)
        indices = indices.ravel().astype(int)       # MATLAB counts from 1
        if len(indices) and not 1 <= indices.min() <= indices.max() <= len(names):
            raise ValueError(f"LFWA: indices_train_test.mat has {variable} from {indices.min()} to {indices.max()}, "
                             f"expected 1 to {len(names)}, the number of names in lfw_att_40.mat")
        parts.append(dict(attributes[i - 1] for i in indices))
    return parts


def read_matlab(path, *variables):
    """Variables of a MATLAB 7.3 file: arrays, or lists of texts.

    Such a file is HDF5, which only h5py reads: nothing else here needs that package. HDF5 has a matrix's axes the other
    way round, a text as character codes, and a cell array of texts as references to them.
    """
    import h5py
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in variables if name not in file]
            if missing:
                raise ValueError(f"LFWA: {path.name} has no {missing[0]}, only {', '.join(file)}")
            return [matlab_value(file, file[name]) for name in variables]
    except FileNotFoundError:
        raise FileNotFoundError(f"LFWA: {path.name} is not in {path.parent}") from None
    except (OSError, AttributeError, KeyError, TypeError) as error:         # no HDF5, damaged, or with other kinds of variables
        raise ValueError(f"{path}: not a complete MATLAB 7.3 file (HDF5; MATLAB writes one with -v7.3) with "
                         f"{', '.join(variables)} as LFWA has them: {error}") from None


def matlab_value(file, variable):
    values = variable[()]
    if values.dtype == object:              # a cell array
        return ["".join(map(chr, file[reference][()].ravel())) for reference in values.ravel()]
    if values.dtype == np.uint16:           # a matrix of characters, one text a row
        return ["".join(map(chr, row)).rstrip() for row in values.T]
    return values.T


# ---- readers: faces with captions ----------------------------------------------------------------------------------
def caption_list(json_path):
    """Official / BLIP style: a json list of {"image": path, "image_id": id, "caption": text or list of texts}.

    The paths are below the json's own folder, or `images` in it. Equal ids mean the same person; without
    an id every picture is a person of its own.
    """
    json_path = Path(json_path)
    records = list(caption_records(json_path))
    folder = folder_of(json_path.parent, (".", "images"), [image for image, _, _ in records])
    return Faces(json_path.name, [folder / image for image, _, _ in records],
                 np.array([digest(identity) for _, identity, _ in records], dtype=np.int64),
                 captions=[texts for _, _, texts in records])


def caption_records(json_path):
    """(image, identity, list of captions) for each record of a json list."""
    for number, record in enumerate(read_json(json_path)):
        where = f"{json_path.name} record {number} (counted from 0)"
        image = record.get("image", record.get("photo")) if isinstance(record, dict) else None  # "photo": FS2K-SDE's lists
        if not isinstance(image, str):
            raise ValueError(f"{where} has no \"image\" with a path: {str(record)[:100]}")
        texts = record.get("caption")
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{where} has no \"caption\" that is a text or a list of texts ({image})")
        identity = record.get("image_id")
        yield image, image if identity is None else str(identity), texts


def mm_celeba(folder, split):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, a caption a line.

    Split by train/filenames.pickle and test/filenames.pickle; where these are absent, by number, as celeba_hq_part does.
    The last five percent of the training part, by number, are "val".
    """
    folder = Path(folder)
    texts, lists = folder / "text" / "celeba-caption", [folder / part / "filenames.pickle" for part in ("train", "test")]
    if any(path.exists() for path in lists):
        train, test = (pickled_numbers(path) for path in lists)
        keep_apart("MM-CelebA-HQ (filenames.pickle)", train, test)
        numbers = sorted(test) if split == "test" else hold_out(sorted(train), 0.05, split)
    else:
        numbers = celeba_hq_part([int(path.stem) for path in texts.glob("*.txt") if path.stem.isdecimal()], split)
    return Faces(f"MM-CelebA-HQ {split}", [folder / "images" / f"{number}.jpg" for number in numbers],
                 np.array(numbers, dtype=np.int64), captions=[text_lines(texts / f"{number}.txt") for number in numbers])


def text_lines(path):
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"MM-CelebA-HQ: {path} is not there, expected its face's captions, one a line") from None
    return [line.strip() for line in lines if line.strip()]


def celeba_hq_part(numbers, split):
    """The numbers of a part of CelebA-HQ: those below 24,000 are for training, the last 5 % of them "val"; the rest "test"."""
    if split == "test":
        return sorted(number for number in numbers if number >= 24_000)
    return hold_out(sorted(number for number in numbers if number < 24_000), 0.05, split)


class NamesOnly(pickle.Unpickler):
    """Reads lists, texts and numbers. Anything else in a pickle names code to be run, which this refuses."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def pickled_numbers(path):
    """A pickled list of "123", "123.jpg", b"123" or 123 -> [123, ...], without running what a pickle can bring along."""
    try:
        with open(path, "rb") as file:
            names = NamesOnly(file).load()
    except FileNotFoundError:
        raise FileNotFoundError(f"MM-CelebA-HQ: {path} is not there, only the other part's; "
                                f"without that one, too, faces are split by number") from None
    except Exception as error:      # a damaged pickle raises what it likes
        raise ValueError(f"{path}: not a plain pickled list of names ({error}); delete both to split by number") from None
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"{path}: expected a pickled list of names, found a {type(names).__name__}")
    for i, name in enumerate(names):
        if not isinstance(name, (str, bytes, int)):
            raise ValueError(f"{path}: record {i} (counted from 0) is a {type(name).__name__}, expected a name such as '123.jpg'")
    stems = [Path(name.decode(errors="replace") if isinstance(name, bytes) else str(name)).stem for name in names]
    for i, stem in enumerate(stems):
        if not (stem.isdecimal() and len(stem) < 10):
            raise ValueError(f"{path}: record {i} (counted from 0) is {names[i]!r:.100}, expected a number such as '123.jpg'")
    return [int(stem) for stem in stems]


def celeba_dialog(folder, split):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, in image/ or beside it; split as celeba_hq_part does.

    A face has one caption: the overall one, or, where that is empty, the attribute-wise ones joined.
    5380.jpg, which has captions but was never part of the pictures, is left out if it is not there.
    """
    folder = Path(folder)
    captions = {}
    for name, record in read_json(folder / "captions_hq.json", dict).items():
        where = f"CelebA-Dialog: captions_hq.json record {name!r}"
        if not Path(name).stem.isdecimal():
            raise ValueError(f"{where}: expected a name such as '0.jpg'")
        captions[int(Path(name).stem)] = [dialog_caption(record, where)]
    images = folder_of(folder, ("images", "image", "."), [f"{number}.jpg" for number in sorted(captions)])
    if not (images / "5380.jpg").exists():
        captions.pop(5380, None)
    numbers = celeba_hq_part(captions, split)
    return Faces(f"CelebA-Dialog {split}", [images / f"{number}.jpg" for number in numbers],
                 np.array(numbers, dtype=np.int64), captions=[captions[number] for number in numbers])


def dialog_caption(record, where):
    """The caption of one record {"attribute_wise_captions": {name: text}, "overall_caption": text}."""
    if isinstance(record, dict):
        overall, parts = record.get("overall_caption") or "", record.get("attribute_wise_captions") or {}
        if isinstance(parts, dict) and all(isinstance(text, str) for text in (overall, *parts.values())):
            text = overall.strip() or " ".join(parts.values()).strip()
            if text:
                return text
    raise ValueError(f"{where} has neither \"overall_caption\" nor \"attribute_wise_captions\" with text: {str(record)[:100]}")


# ---- readers: FaceCaption-15M as img2dataset downloads it ----------------------------------------------------------
def facecaption(folder, split):
    """Tars of N.jpg and N.json (FaceCaption-15M by img2dataset), read in place: nothing is unpacked.

    Every record is a face of its own, though several may be in one picture, from one address; so the split, 90 : 5 : 5,
    goes by a digest of the address. A face takes about 2 KB of memory, its captions included.
    """
    tars = tqdm(sorted(Path(folder).glob("*.tar")), "listing tars", leave=False)
    records = [record for tar in tars for record in tar_records(tar) if digest(record["url"]) % 100 in SHARES[split]]
    crops = [Crop(Path(folder) / record["tar"], record["name"], record["offset"], record["size"], tuple(record["box"]))
             for record in records]
    return Faces(f"FaceCaption {split}", crops, np.arange(len(crops)), captions=[record["caption"] for record in records])


def tar_records(tar):
    """What list_tar finds, kept beside the tar as .index for the next time (where the folder can be written to)."""
    index, now = tar.with_suffix(".index"), [tar.stat().st_size, tar.stat().st_mtime_ns]
    try:
        kept = json.loads(index.read_text(encoding="utf-8"))
        if kept["size_and_time"] == now:    # of the tar, which may have been downloaded anew
            return kept["records"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    records = list_tar(tar)
    try:
        partial = tar.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"size_and_time": now, "records": records}), encoding="utf-8")
        os.replace(partial, index)
    except OSError:
        pass
    return records


def list_tar(tar):
    """The faces in a tar that were downloaded: [{"tar", "name", "offset", "size", "box", "caption", "url"}]."""
    pictures, texts = {}, {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in filter(tarfile.TarInfo.isfile, file):
                stem, suffix = os.path.splitext(member.name)
                if suffix.lower() in PICTURES:
                    pictures[stem] = {"tar": tar.name, "name": member.name, "offset": member.offset_data, "size": member.size}
                elif suffix == ".json":
                    texts[stem] = file.extractfile(member).read()
            file.fileobj.seek(file.offset)                  # where tarfile stopped, for it takes a damaged header for the end
            if any(file.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"damaged at byte {file.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar}: not a complete tar ({error}); download it again, or take it away") from None
    return [pictures.get(stem, {}) | record for stem, text in texts.items()
            if (record := tar_record(text, f"{tar}: {stem}.json", stem in pictures))]


def tar_record(text, where, has_picture):
    """The json beside a picture -> {"box", "caption", "url"}, or None where the download failed."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid json: {error}") from None
    if not isinstance(record, dict) or "status" not in record:
        raise ValueError(f"{where} has no \"status\", expected what img2dataset writes with output_format webdataset")
    if record["status"] != "success":
        return None
    if not has_picture:
        raise ValueError(f"{where} says \"success\", but its picture is not in the tar")
    captions = [record["caption"]] if isinstance(record.get("caption"), str) else record.get("caption")
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise ValueError(f"{where} has no \"caption\"; download again with the columns kept (save_additional_columns)")
    return {"box": parse_box(record.get("box"), where), "caption": captions, "url": str(record.get("url", where))}


def parse_box(box, where):
    """The text "[43, 0, 299, 320]", which is x1, y1, x2, y2 in pixels -> list of int."""
    try:
        x1, y1, x2, y2 = [round(float(value)) for value in (json.loads(box) if isinstance(box, str) else box)]
        if x1 < x2 and y1 < y2:
            return [x1, y1, x2, y2]
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass
    raise ValueError(f"{where} has the box {box!r:.100}, expected [x1, y1, x2, y2] in pixels, x1 < x2 and y1 < y2")


# ---- readers: photos with sketches ---------------------------------------------------------------------------------
def fs2k(folder, split):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*; by anno_train/test.json."""
    folder = Path(folder)
    photos, sketches = named_pictures(folder / "photo"), named_pictures(folder / "sketch")
    train, test = (fs2k_pairs(folder / f"anno_{part}.json", photos, sketches) for part in ("train", "test"))
    return episodes("FS2K", folder, split, photos, train, test)


def fs2k_pairs(source, photos, sketches):
    """[(photo, [its sketch])] of a list."""
    pairs = []
    for number, record in enumerate(read_json(source)):
        where = f"FS2K: {source.name} record {number} (counted from 0)"
        name = record.get("image_name") if isinstance(record, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{where} has no \"image_name\" such as \"photo1/image0110\": {str(record)[:100]}")
        photo_name = name.replace("/", "_")
        sketch_name = photo_name.replace("photo", "sketch").replace("image", "sketch")
        pairs.append((only(photos, photo_name, where), [only(sketches, sketch_name, where)]))
    return pairs


def fs2k_sde(folder, split):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, the photos anywhere below photo/.

    <photo> is the photo's file name without its ending, or, where several folders have that name, "photo1_image0110"
    or "photo1/image0110".
    """
    folder = Path(folder)
    photos = named_pictures(folder / "photo")
    train, test = (fs2k_sde_pairs(folder / "sketch" / part, photos) for part in ("train", "test"))
    return episodes("FS2K-SDE", folder, split, photos, train, test)


def fs2k_sde_pairs(folder, photos):
    """[(photo, [its sketches in the order of their steps])] of the sketches in a folder."""
    growing = {}                            # {photo: {step: sketch}}
    for sketch, parts in pictures_below(folder):
        name, _, step = "_".join(parts).rpartition("_")
        if not name or not step.isdecimal():
            raise ValueError(f"FS2K-SDE: {sketch}: expected a name such as image0110_7.png, with the step at its end")
        steps = growing.setdefault(only(photos, name, f"FS2K-SDE: {sketch}"), {})
        if int(step) in steps:
            raise ValueError(f"FS2K-SDE: {sketch} and {steps[int(step)]} are the same step of one photo")
        steps[int(step)] = sketch
    counts = Counter(step for steps in growing.values() for step in steps)
    usual = {step for step, count in counts.items() if 2 * count > len(growing)}
    for photo, steps in growing.items():
        odd = sorted(usual ^ steps.keys())
        if odd:
            raise ValueError(f"FS2K-SDE: {photo} has {'no' if odd[0] in usual else 'a'} step {odd[0]}, unlike most photos")
    return [(photo, [steps[step] for step in sorted(steps)]) for photo, steps in growing.items()]


def pictures_below(folder):
    """(path, its parts below the folder, the last without ending) of every picture, by name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            yield path, path.relative_to(folder).with_suffix("").parts


def named_pictures(folder):
    """{name: [path]}: photo1/image0110.jpg answers to "image0110" and to "photo1_image0110"."""
    names = {}
    for path, parts in pictures_below(folder):
        for first in range(len(parts)):
            names.setdefault("_".join(parts[first:]), []).append(path)
    return names


def only(names, name, where):
    """The one picture of this name."""
    found = names.get(name, [])
    if len(found) > 1:
        raise ValueError(f"{where}: {name} may be {found[0]} or {found[1]}; name the folder too, as in photo1_image0110")
    if not found:
        raise FileNotFoundError(f"{where}: there is no picture named {name}")
    return found[0]


def episodes(title, folder, split, names, train, test):
    """Episodes of pairs (photo, its sketches); the last tenth of the training photos, by name, is "val"."""
    keep_apart(title, *([photo for photo, _ in pairs] for pairs in (train, test)))
    pairs = sorted(test) if split == "test" else hold_out(sorted(train), 0.1, split)
    photos = [photo for photo, _ in pairs]
    faces = Faces(f"{title} {split}", photos, np.arange(len(photos)), captions=photo_captions(folder, split, names, photos))
    return Episodes(faces, [sketches for _, sketches in pairs])


def photo_captions(folder, split, names, photos):
    """A list of captions for each photo, by train.json or test.json (or captions.json) beside them; None without.

    These are lists as caption_list reads; a record's "image" may be in any folder, its name says which photo is meant.
    """
    files = [folder / f"{'test' if split == 'test' else 'train'}.json", folder / "captions.json"]
    source = next((path for path in files if path.is_file()), None)
    if source is None:
        return None
    captions = {}                           # {photo: (image, texts)}
    for image, _, texts in caption_records(source):
        *_, folder_name, name = ("", *Path(image).with_suffix("").parts)
        full_name = f"{folder_name}_{name}"
        if full_name not in names and name not in names:
            continue                        # a photo of another part or set
        photo = only(names, full_name if full_name in names else name, f"{source.name}: {image}")
        first_image, known = captions.setdefault(photo, (image, []))
        if first_image != image:
            raise ValueError(f"{source}: {first_image} and {image} may both mean {photo}; keep the folders photo1, photo2, ...")
        known.extend(texts)
    missing = [photo for photo in photos if photo not in captions]
    if missing:
        raise ValueError(f"{source}: no caption for {len(missing)} of {len(photos)} photos, the first is {missing[0]}; "
                         f"add them, or take the file away to do without captions")
    return [captions[photo][1] for photo in photos]


# ---- readers: which one --------------------------------------------------------------------------------------------
FACES = (       # what tells a layout, its reader, the layout in words
    ("list_attr_celeba.*", celeba, "CelebA (list_attr_celeba.txt or .csv, list_eval_partition.txt or .csv, img_align_celeba/)"),
    ("list_attr_lfwa.csv", lfwa, "LFWA (list_attr_lfwa.csv, list_attr_lfwa_test.csv, lfw/)"),
    ("lfw_att_40.mat", lfwa, "LFWA in MATLAB's files (lfw_att_40.mat, indices_train_test.mat, lfw/)"),
    ("captions_hq.json", celeba_dialog, "CelebA-Dialog (captions_hq.json, images/ or image/)"),
    ("text/celeba-caption", mm_celeba, "MM-CelebA-HQ (text/celeba-caption/, images/, train/ and test/filenames.pickle)"),
    ("train.json", lambda folder, split: caption_list(folder / f"{split}.json"), "train.json, val.json and test.json"),
    ("*.tar", facecaption, "FaceCaption-15M as img2dataset downloads it (00000.tar, ...)"),
)
ADDRESSES = "; FaceCaption-15M's holds the pictures' addresses only: fetch them with img2dataset and give the folder of its tars"
EPISODES = (
    ("sketch/train", fs2k_sde, "FS2K-SDE (sketch/train/, sketch/test/, photo/)"),
    ("anno_train.json", fs2k, "FS2K (anno_train.json, anno_test.json, photo/, sketch/)"),
)


def open_faces(path, split):
    """The faces of a split ("train", "val", "test") in a folder or json file of one's own, by what is found there.

    A single json list is split 90 : 5 : 5 by a digest of the identity, so that a person is in one part only.
    """
    path = existing(path)
    for sign, reader, _ in FACES:
        if any(path.glob(sign)):
            return reader(path, split)
    jsons = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if path.is_file() and path.suffix != ".json":
        raise ValueError(f"{path}: expected a folder or a json list, found another file" + ADDRESSES * (path.suffix == ".parquet"))
    if len(jsons) == 1 and jsons[0].suffix == ".json":
        faces = caption_list(jsons[0])
        faces.name = f"{jsons[0].name} ({split})"
        return faces.subset([i for i, number in enumerate(faces.identity.tolist()) if number % 100 in SHARES[split]])
    raise ValueError(f"{path}: found neither {', nor '.join(words for _, _, words in FACES)}, nor one json list of "
                     f"{{\"image\", \"image_id\", \"caption\"}}")


def open_episodes(path, split):
    """The photos of a split ("train", "val", "test") with their sketches, by what is found in the folder."""
    path = existing(path)
    for sign, reader, _ in EPISODES:
        if any(path.glob(sign)):
            return reader(path, split)
    raise ValueError(f"{path}: found neither {', nor '.join(words for _, _, words in EPISODES)}")


def existing(path):
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    return path


# ---- augmentation --------------------------------------------------------------------------------------------------
GREY = (128, 128, 128)      # fills what a moved picture leaves open


def affine(image, a, b, c, d, e, f):
    """The picture whose pixel (x, y) is the given one's (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR,
                           fillcolor=GREY)


# FLIP's nine operations (BLIP's without AutoContrast) at strength 5 of 10; sign is +1 or -1. Brightness and sharpness are
# multiplied by 0.1 + 1.8 * strength / 10, which at this strength is 1: they change nothing, here as there.
AUGMENTATIONS = {
    "identity": lambda image, sign: image,
    "brightness": lambda image, sign: image,
    "sharpness": lambda image, sign: image,
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "shear x": lambda image, sign: affine(image, 1, sign * 0.15, 0, 0, 1, 0),
    "shear y": lambda image, sign: affine(image, 1, 0, 0, sign * 0.15, 1, 0),
    "translate x": lambda image, sign: affine(image, 1, 0, sign * 5 / 224 * image.width, 0, 1, 0),  # 5 of 224 pixels
    "translate y": lambda image, sign: affine(image, 1, 0, 0, 0, 1, sign * 5 / 224 * image.height),
    "rotate": lambda image, sign: image.rotate(sign * 15, Image.Resampling.BILINEAR, fillcolor=GREY),   # degrees
}


def augment(image, rng):
    """The recipe's augmentation of a picture that has the model's size, RGB to RGB."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for name in rng.choice(list(AUGMENTATIONS), 2):
        if rng.random() < 0.5:
            image = AUGMENTATIONS[name](image, rng.choice((-1, 1)))
    return image


# ---- the loader ----------------------------------------------------------------------------------------------------
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
        return vit.to_tensor(image, self.image_size), self.faces.caption(index, rng), self.faces.identity[index]

    def collate(self, samples):
        images, texts, identity = zip(*samples)
        return Batch(torch.stack(images), self.tokenizer(list(texts)), torch.tensor(np.array(identity)))


class Batches:
    """Endless batches of `batch_size` for one of `world` processes; `steps_per_epoch` of them are an epoch.

    Step s of an epoch shows the s-th stretch of world * batch_size faces of the epoch's permutation; process r takes the
    r-th part of it, so the parts gathered in order are the batch that a single process would see.
    """

    def __init__(self, faces, tokenizer, image_size, batch_size, seed=0, augmented=True, rank=0, world=1, workers=0):
        faces.check_text()
        self.faces, self.seed, self.workers = faces, seed, workers
        self.batch_size, self.rank, self.global_size = batch_size, rank, batch_size * world
        self.samples = Samples(faces, tokenizer, image_size, seed, augmented)
        self.steps_per_epoch = len(faces) // self.global_size       # what is left over waits for another epoch's order
        if self.steps_per_epoch == 0:
            raise ValueError(f"{faces.name}: {len(faces)} faces are fewer than a batch of {self.global_size} "
                             f"({world} processes x {batch_size}); use a smaller batch")

    def from_step(self, step):
        """Iterator over batches from this step (counted from 0 over all epochs) on, without end.

        ValueError, in one sentence, for a picture that cannot be read and for a batch without negatives.
        """
        loader = torch.utils.data.DataLoader(
            self.samples, batch_sampler=self.keys(step), collate_fn=self.samples.collate, num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator())        # its own: the loader must not draw from the model's random numbers
        try:
            yield from loader
        except ValueError as error:             # from a worker it comes with a traceback as text: keep the sentence
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def keys(self, step):
        """For each step on from this one, the list of (epoch, index) that this process shows."""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.faces))
            for begin in range(first * self.global_size, self.steps_per_epoch * self.global_size, self.global_size):
                batch = order[begin:begin + self.global_size]
                people = set(self.faces.identity[batch].tolist())
                if len(people) == 1:
                    raise ValueError(f"{self.faces.name}: batch {step} shows only one person (identity "
                                     f"{people.pop()}), so it has no negatives; use larger batches or more people")
                yield [(epoch, index) for index in batch[self.rank * self.batch_size:][:self.batch_size].tolist()]
                step += 1


# ---- a sheet of samples --------------------------------------------------------------------------------------------
GROUPS = {      # of attributes, and the share of FLIP's labels that they have, in percent (paper, section 3)
    "beard": (14.8, "5_o_Clock_Shadow Goatee Mustache No_Beard Sideburns"),
    "hairstyle": (14.0, "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline Straight_Hair Wavy_Hair"),
    "accessories": (10.6, "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie"),
    "elementary": (26.5, "Male Young Attractive Smiling Chubby Pale_Skin"),
}       # the others are facial features, 34.0


def print_statistics(faces, count=10_000):
    """Words and phrases of `count` captions; for captions of the grammar also what they state, and the references."""
    rng = np.random.default_rng(0)
    drawn = [i % len(faces) for i in range(count)]
    if faces.captions is None:
        texts, stated = zip(*(caption(faces.attributes[i], rng) for i in drawn))
        stated = np.array(stated)                                                               # (T, 40)
    else:
        texts, stated = [faces.caption(i, rng) for i in drawn], None
    words = [text.split() for text in texts]
    lengths = np.array([len(text) for text in words])
    grams = {gram for text in words for gram in zip(text, text[1:], text[2:], text[3:])}
    print(f"{count:,} captions of {len(faces):,} faces, {faces.name} (in brackets: FLIP's captions, from the paper)")
    print(f"  words          mean {lengths.mean():.1f} (30), mode {np.bincount(lengths).argmax()} (20 to 22), "
          f"range {lengths.min()} to {lengths.max()} (10 to 75)")
    print(f"  4-grams        {len(grams):,} distinct")
    if stated is not None:
        print_stated(stated, faces.attributes)


def print_stated(stated, attributes):
    """The share of each group in the labels that captions state, int8 (T, 40), and the reference recalls."""
    mentions = dict(zip(ATTRIBUTES, (stated != 0).mean(0)))
    total = sum(mentions.values())
    shares = {group: 100 * sum(mentions.pop(name) for name in names.split()) / total
              for group, (_, names) in GROUPS.items()}
    print(f"  labels stated  {total:.1f} a caption, of which",
          ", ".join(f"{group} {share:.1f} % ({GROUPS[group][0]})" for group, share in shares.items()),
          f"and facial features {100 * sum(mentions.values()) / total:.1f} % (34.0)")
    n = min(1000, len(attributes))
    print(f"  finding the one among {n} faces or captions, for a reader who knows all attributes: recall at 1 / 5 / 10")
    for name, recalls in reference_recalls(stated[:n], attributes[:n]).items():
        for direction, recall in recalls.items():
            print(f"    {name:<11} {direction.replace('_', ' '):<13}", " / ".join(f"{r:.3f}" for r in recall.values()))


def draw_sheet(faces, count, side=192, columns=2):
    """Faces as they are and as training sees them, with one caption each: a PIL image."""
    font, pad, text_width = ImageFont.load_default(15), 16, 300
    cell_width, cell_height = 2 * side + text_width + 4 * pad, side + pad
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for n, i in enumerate(np.linspace(0, len(faces) - 1, count).astype(int)):
        rng = np.random.default_rng(n)
        picture = faces.picture(i).resize((side, side), Image.Resampling.BICUBIC)
        x, y = n % columns * cell_width + pad, n // columns * cell_height + pad
        sheet.paste(picture, (x, y))
        sheet.paste(augment(picture, rng), (x + side + pad // 2, y))
        text = textwrap.fill(faces.caption(i, rng), 40)
        pen.multiline_text((x + 2 * side + 2 * pad, y), text, "black", font, spacing=5)
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Draw a sheet of faces with captions; print what the captions are like.")
    parser.add_argument("--data", help="folder of CelebA, LFWA, MM-CelebA-HQ, CelebA-Dialog, FaceCaption-15M's tars, "
                                       "or images and a json list of captions (default: drawn faces)")
    parser.add_argument("--split", default="train", choices=("train", "val", "test"), help="part of --data (%(default)s)")
    parser.add_argument("--out", default="sheet.png", help="where the sheet goes (%(default)s)")
    parser.add_argument("--count", type=int, default=12, help="faces on the sheet (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder that keeps drawn faces (%(default)s)")
    args = parser.parse_args()
    faces = open_faces(args.data, args.split) if args.data else drawn_faces(1000, 192, seed=0, folder=args.cache)
    print_statistics(faces)
    draw_sheet(faces, min(args.count, len(faces))).save(args.out)
    print(f"wrote {args.out}: each face as it is, augmented, and a caption")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
