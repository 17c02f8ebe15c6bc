"""Faces with sentences: the caption grammar, the readers, the augmentation of the recipe and the loader.

FLIP's captions start from a probabilistic context-free grammar over CelebA's 40 attributes (arXiv 2407.08515,
section 3). Ours states each *fact* of a face by chance, then writes the stated facts as sentences; because that chance
is known, so is how well an ideal reader could find the face again (`reference_recalls`): the numbers a training run is
held against.

Where we leave the official code: captions come fresh from the grammar each time instead of from a file; the order of
the samples, their captions and their augmentation depend on (seed, epoch, index) alone, so a run resumed at any step,
with any number of workers, sees what an uninterrupted one sees; bad input is named with file and record.

    python data.py                              # a sheet of drawn faces, sheet.png, and statistics of their captions
    python data.py --data DIR                   # the same for CelebA or for images with a json list of captions

Shapes: N faces, T captions, B pairs in a batch, S pixels a side.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import textwrap
from dataclasses import dataclass
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
@dataclass
class Faces:
    """N pictures, each with its attributes or its captions, checked when made."""
    name: str                               # what to call them in errors: "CelebA train"
    pictures: list | np.ndarray             # paths, or uint8 (N, S, S, 3)
    identity: np.ndarray                    # int64 (N,): equal numbers, same person
    attributes: np.ndarray | None = None    # bool (N, 40)
    captions: list | None = None            # a list of texts for each picture; without it, the grammar writes them

    def __post_init__(self):
        if len(self) == 0:
            raise ValueError(f"{self.name}: no faces")
        if self.attributes is None and self.captions is None:
            raise ValueError(f"{self.name}: expected attributes or captions, found neither")
        for field in ("identity", "attributes", "captions"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{self.name}: {len(self)} pictures, but {len(values)} entries in {field}")
        for i, texts in enumerate(self.captions or ()):
            if not texts or not all(bert.clean_caption(text) for text in texts):
                raise ValueError(f"{self.name}: {self.where(i)} has an empty caption: {texts}")
        if isinstance(self.pictures, list):
            self.check_files()

    def check_files(self):
        """Every path is in the listing of its folder (one listing each: asking file by file is slow on big sets)."""
        folders = {path.parent for path in self.pictures}
        listing = {folder: set(os.listdir(folder)) if folder.is_dir() else () for folder in folders}
        missing = [path for path in self.pictures if path.name not in listing[path.parent]]
        if missing:
            raise FileNotFoundError(f"{self.name}: {len(missing)} of {len(self)} pictures are not there, "
                                    f"the first is {missing[0]}")

    def __len__(self):
        return len(self.pictures)

    def where(self, i):
        return str(self.pictures[i]) if isinstance(self.pictures, list) else f"face {i}"

    def picture(self, i):
        """Face i as a PIL RGB image; ValueError if the file is damaged or no picture."""
        if not isinstance(self.pictures, list):
            return Image.fromarray(self.pictures[i])
        try:
            return vit.open_picture(self.pictures[i])
        except ValueError as error:
            raise ValueError(f"{self.name}, record {i}: {error}") from None

    def caption(self, i, rng):
        """One of the captions of face i, or a new one from the grammar."""
        if self.captions is not None:
            return self.captions[i][rng.integers(len(self.captions[i]))]
        return caption(self.attributes[i], rng)[0]

    def subset(self, indices):
        indices = np.asarray(indices)

        def pick(values):
            return [values[i] for i in indices] if isinstance(values, list) else values[indices]
        return Faces(self.name, pick(self.pictures), self.identity[indices],
                     None if self.attributes is None else self.attributes[indices],
                     None if self.captions is None else pick(self.captions))


def check_pictures(faces):
    """Read every picture once, so that a damaged file is found before training; ValueError names the first ones."""
    def complaint(i):
        try:
            faces.picture(i)
        except ValueError as error:
            return str(error)

    with ThreadPool(os.cpu_count()) as pool:
        results = tqdm(pool.imap(complaint, range(len(faces))), "checking pictures", len(faces))
        bad = [result for result in results if result]
    if bad:
        raise ValueError("\n".join([*bad[:10], f"{len(bad)} of {len(faces)} pictures are bad"]))


# ---- readers -------------------------------------------------------------------------------------------------------
def drawn_faces(count, size, seed, folder):
    """`count` faces drawn by toyfaces.py at size x size pixels, kept in `folder` for the next time."""
    # Part of the name is a digest of the code that draws: a changed face never comes from an old file.
    version = hashlib.sha256(Path(toyfaces.__file__).read_bytes()).hexdigest()[:8]
    stem = Path(folder) / f"drawn-{count}x{size}-seed{seed}-{version}"
    pictures_path, attributes_path = Path(f"{stem}.npy"), Path(f"{stem}.attributes.npy")
    if not pictures_path.exists():
        draw_faces(count, size, seed, pictures_path, attributes_path)
    try:
        pictures, attributes = np.load(pictures_path, mmap_mode="r"), np.load(attributes_path)
        if pictures.shape != (count, size, size, 3) or attributes.shape != (count, len(ATTRIBUTES)):
            raise ValueError("its shape is another")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{pictures_path}: damaged ({error}); delete it, and the faces are drawn again") from None
    return Faces(f"drawn faces (seed {seed})", pictures, np.arange(count), attributes)


def draw_faces(count, size, seed, pictures_path, attributes_path):
    """Draw on all cores into two .npy files: uint8 (count, size, size, 3) and bool (count, 40), whole or not at all."""
    pictures_path.parent.mkdir(parents=True, exist_ok=True)
    pictures_partial, attributes_partial = (path.with_suffix(f".{os.getpid()}.partial")
                                            for path in (pictures_path, attributes_path))
    attributes = np.zeros((count, len(ATTRIBUTES)), dtype=bool)
    try:
        pictures = np.lib.format.open_memmap(pictures_partial, "w+", np.uint8, (count, size, size, 3))
        with multiprocessing.Pool(os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:    # Ctrl-C is ours
            tasks = ((index, seed, size) for index in range(count))
            for i, (picture, row) in enumerate(tqdm(pool.imap(draw_face, tasks, 64), "drawing faces", count)):
                pictures[i], attributes[i] = picture, row
        pictures.flush()
        with open(attributes_partial, "wb") as file:
            np.save(file, attributes)
        os.replace(attributes_partial, attributes_path)
        os.replace(pictures_partial, pictures_path)         # last: with this file, the set is complete
    finally:
        pictures_partial.unlink(missing_ok=True)
        attributes_partial.unlink(missing_ok=True)


def draw_face(task):
    image, attributes = toyfaces.face(*task)
    return np.asarray(image), attributes


def celeba(folder, split):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture counts as a person of its own."""
    folder = Path(folder)
    attributes = celeba_attributes(folder)
    wanted = {"train": "0", "val": "1", "test": "2"}[split]
    names = []
    source, rows = celeba_rows(folder, "list_eval_partition")
    for number, row in rows:
        if row[0] == "image_id":
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise ValueError(f"CelebA: {source} line {number} is {' '.join(row)!r}, expected a picture and 0, 1 or 2")
        if row[0] not in attributes:
            raise ValueError(f"CelebA: {source} line {number} names {row[0]}, which list_attr_celeba does not have")
        if row[1] == wanted:
            names.append(row[0])
    images = folder / "img_align_celeba"
    if (images / "img_align_celeba").is_dir():      # Kaggle's copy has the folder twice
        images = images / "img_align_celeba"
    rows = np.array([attributes[name] for name in names], dtype=bool)
    return Faces(f"CelebA {split}", [images / name for name in names], np.arange(len(names)), rows)


def celeba_attributes(folder):
    """list_attr_celeba -> {picture name: bool (40,)}."""
    source, rows = celeba_rows(folder, "list_attr_celeba")
    count = next(rows, (1, ["?"]))[1][0] if source.endswith(".txt") else None       # the .csv does not say how many
    number, header = next(rows, (1, []))
    names = tuple(name for name in header if name != "image_id")
    if names != ATTRIBUTES:
        raise ValueError(f"CelebA: {source} line {number} should name the 40 attributes in CelebA's order, "
                         f"found {' '.join(names) or 'nothing'}")
    attributes = {}
    for number, (name, *values) in rows:
        if len(values) != len(ATTRIBUTES):
            raise ValueError(f"CelebA: {source} line {number} has {len(values)} values, expected 40 ({name})")
        if not set(values) <= {"1", "-1"}:
            odd = next(value for value in values if value not in ("1", "-1"))
            raise ValueError(f"CelebA: {source} line {number} has the value {odd!r}, expected 1 or -1 ({name})")
        if name in attributes:
            raise ValueError(f"CelebA: {source} line {number} lists {name} a second time")
        attributes[name] = np.array([value == "1" for value in values])
    if count not in (None, str(len(attributes))):
        raise ValueError(f"CelebA: {source} line 1 announces {count} pictures, but {len(attributes)} follow")
    return attributes


def celeba_rows(folder, stem):
    """(file name, iterator of (line number, fields)) for stem.txt (fields between spaces) or stem.csv (commas)."""
    for suffix, separator in ((".txt", None), (".csv", ",")):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return path.name, ((n, line.split(separator)) for n, line in enumerate(lines, 1) if line.strip())
    raise FileNotFoundError(f"CelebA: {stem}.txt (or .csv) is not in {folder}")


def caption_list(json_path):
    """Official / BLIP style: a json list of {"image": path, "image_id": id, "caption": text or list of texts}.

    The paths are below the json's own folder, or `images` in it. Equal ids mean the same person; without
    an id every picture is a person of its own.
    """
    json_path = Path(json_path)
    records = read_json(json_path)
    for number, record in enumerate(records):
        where = f"{json_path.name} record {number} (counted from 0)"
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise ValueError(f"{where} has no \"image\" with a path: {str(record)[:100]}")
        texts = record.get("caption")
        if not (isinstance(texts, str) or isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{where} has no \"caption\" that is a text or a list of texts ({record['image']})")
    folder = json_path.parent
    if records and not (folder / records[0]["image"]).exists() and (folder / "images").is_dir():
        folder = folder / "images"
    ids = [str(record["image"] if record.get("image_id") is None else record["image_id"]) for record in records]
    numbers = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in ids]   # the same in every file
    captions = [[record["caption"]] if isinstance(record["caption"], str) else record["caption"] for record in records]
    return Faces(json_path.name, [folder / record["image"] for record in records],
                 np.array(numbers, dtype=np.int64), captions=captions)


def read_json(path):
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:      # malformed (it says line and column), not UTF-8, a folder
        raise ValueError(f"{path}: not valid json: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of records, found a {type(records).__name__}")
    return records


def open_faces(path, split):
    """The faces of a split ("train", "val", "test") in a folder or json file of one's own, by what is found there.

    A single json list is split 90 : 5 : 5 by a digest of the identity, so that a person is in one part only.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    jsons = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if any(path.glob("list_attr_celeba.*")):
        return celeba(path, split)
    if path / "train.json" in jsons:
        return caption_list(path / f"{split}.json")
    if len(jsons) == 1 and jsons[0].suffix == ".json":
        faces = caption_list(jsons[0])
        part = faces.identity % 100
        low, high = {"train": (0, 90), "val": (90, 95), "test": (95, 100)}[split]
        faces.name = f"{jsons[0].name} ({split})"
        return faces.subset(np.flatnonzero((low <= part) & (part < high)))
    raise ValueError(f"{path}: found neither CelebA (list_attr_celeba.txt or .csv, list_eval_partition.txt or .csv, "
                     f"img_align_celeba/), nor train.json, val.json and test.json, nor one json list of "
                     f"{{\"image\", \"image_id\", \"caption\"}}")


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
    parser.add_argument("--data", help="folder of CelebA, or of images and a json list of captions (default: drawn faces)")
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
    main()
