"""Generate captions from CelebA's 40 attributes with a probabilistic grammar (arXiv 2407.08515,
section 3). For a smiling young woman with black hair, glasses and arched eyebrows, `sample_caption`
returns texts such as

    With curved eyebrows and a smile, she is wearing a pair of glasses. Her hair is black.
"""
import random
from collections import defaultdict

import numpy as np

# ---- the grammar ---------------------------------------------------------------------------------
# A fact is an attribute that is true (the first 40 rows, in CelebA's order), or one of three that
# are false ("not Male" and so on). So every face has at least three facts. A row contains the
# probability of stating the fact, and its phrases. Each phrase begins with its kind: the verb `is`,
# `has` or `wears`, `noun` for the person, `photo`, or the part of the face that the adjective
# describes. {his} becomes his, her or their.
GRAMMAR = {
    "5_o_Clock_Shadow": (.70, "has a 5 o'clock shadow | has stubble | is unshaven"),
    "Arched_Eyebrows": (.55, "eyebrows arched | eyebrows curved"),
    "Attractive": (.40, "is attractive | is good-looking | has an attractive look | is beautiful"),
    "Bags_Under_Eyes": (.65, "has bags under {his} eyes | has dark circles under {his} eyes"),
    "Bald": (.85, "is bald | has a bald head | is hairless"),
    "Bangs": (.75, "has bangs | has a fringe | has bangs over {his} forehead"),
    "Big_Lips": (.65, "lips full | lips big | lips large"),
    "Big_Nose": (.65, "nose big | nose large"),
    "Black_Hair": (.70, "hair black | hair jet-black | is black-haired"),
    "Blond_Hair": (.75, "hair blond | hair blonde | hair golden | is blond | is blonde"),
    "Blurry": (.65, "photo blurry | photo blurred"),
    "Brown_Hair": (.65, "hair brown | hair chestnut | is brown-haired"),
    "Bushy_Eyebrows": (.65, "eyebrows bushy | eyebrows thick"),
    "Chubby": (.65, "is chubby | is plump | has a chubby face"),
    "Double_Chin": (.70, "has a double chin | has a second chin below the first"),
    "Eyeglasses": (.90, "wears glasses | wears eyeglasses | wears a pair of glasses | has glasses"),
    "Goatee": (.80, "has a goatee | has a small goatee | wears a goatee"),
    "Gray_Hair": (.75, "hair gray | hair grey | is gray-haired | is grey-haired"),
    "Heavy_Makeup": (.55, "wears heavy makeup | wears a lot of makeup | has heavy makeup"),
    "High_Cheekbones": (.55, "cheekbones high | cheekbones prominent"),
    "Male": (.80, "noun man | noun man | noun guy | noun gentleman"),
    "Mouth_Slightly_Open": (.65, "mouth slightly open | mouth partly open | mouth open"),
    "Mustache": (.80, "has a mustache | has a moustache | wears a mustache"),
    "Narrow_Eyes": (.65, "eyes narrow | eyes small"),
    "No_Beard": (.50, "is beardless | has a beardless face"),
    "Oval_Face": (.60, "face oval | face oval-shaped"),
    "Pale_Skin": (.70, "skin pale | skin fair | is pale | has a pale face"),
    "Pointy_Nose": (.60, "nose pointy | nose pointed"),
    "Receding_Hairline": (.70, "hairline receding | has hair that is receding at the front"),
    "Rosy_Cheeks": (.65, "cheeks rosy | cheeks flushed | is rosy-cheeked"),
    "Sideburns": (.70, "has sideburns | has sideburns beside {his} ears | wears sideburns"),
    "Smiling": (.65, "is smiling | has a smile | has a smile on {his} face | is happy"),
    "Straight_Hair": (.55, "hair straight | hair smooth | is straight-haired"),
    "Wavy_Hair": (.60, "hair wavy | hair curly | is curly-haired"),
    "Wearing_Earrings": (.65, "wears earrings | wears a pair of earrings | has earrings"),
    "Wearing_Hat": (.90, "wears a hat | wears a hat on {his} head | has a hat"),
    "Wearing_Lipstick": (.55, "wears lipstick | wears lipstick on {his} lips | has lipstick"),
    "Wearing_Necklace": (.65, "wears a necklace | wears a necklace around {his} neck | has a necklace"),
    "Wearing_Necktie": (.80, "wears a tie | wears a necktie | has a tie"),
    "Young": (.40, "is young | is youthful | has a young face"),
    "not Male": (.80, "noun woman | noun woman | noun lady"),
    "not Young": (.60, "is old | is older | is elderly | has an old face"),
    "not No_Beard": (.60, "has a beard | has a full beard | is bearded"),
}
FACTS = tuple(GRAMMAR)
ATTRIBUTES = FACTS[:40]
NEGATABLE = [FACTS.index(name) for name in ("Male", "Young", "No_Beard")]
PROBABILITIES = np.array([GRAMMAR[fact][0] for fact in FACTS])      # (43,), of being stated
MIN_FACTS = 3               # minimum number of facts per caption
SHORTEST, LONGEST = 10, 75  # words per caption; the tokenizer truncates the longest captions
FACE_PARTS = {  # part of the face: its verb
    "cheekbones": "are", "cheeks": "are", "eyebrows": "are", "eyes": "are", "face": "is",
    "hair": "is", "hairline": "is", "lips": "are", "mouth": "is", "nose": "is", "skin": "is",
}
PARTS_WITH_ARTICLE = ("face", "hairline", "mouth", "nose")
NEUTRAL_NOUNS = ("person", "person", "individual")  # if the sex is not stated
YOUNG_NOUNS = {"he": "boy", "she": "girl"}          # may be used if Young and the sex are stated
SINGULAR = {"is": "is", "has": "has", "wears": "wears"}
PLURAL = {"is": "are", "has": "have", "wears": "wear"}  # after "they"
PREDICATES = {
    "is": ("{is} {x}",),
    "has": ("{has} {x}", "{has} {x}", "{has} {x}", "can be seen with {x}", "{is} shown with {x}"),
    "wears": ("{is} wearing {x}", "{wears} {x}", "{is} seen wearing {x}"),
}
OPENING_TEMPLATES = (
    "This is a {photo} of {x}.", "The {photo} shows {x}.", "Here is a {photo} of {x}.",
    "In this {photo} there is {x}.", "The {photo} shows the face of {x}.",
    "{x} looks out of this {photo}.")
CONNECTIVES = (
    ("In this picture, ", "In the photo, ", "Here, ", "As can be seen, "),  # of the first sentence
    ("",),                                                                  # of the second
    ("In addition, ", "Also, ", "Moreover, ", "Besides, "))                 # of later sentences
NEUTRAL = ("Only the face can be seen.", "The face fills most of the picture.",
           "Nothing else is shown here.")
SENTENCE_KINDS = ("is", "has", "wears", "part")     # kinds of phrases that can form a sentence


def facts_of(attributes: np.ndarray) -> np.ndarray:
    """Which FACTS hold, bool (..., 43), given attributes bool (..., 40)."""
    return np.concatenate([attributes, ~attributes[..., NEGATABLE]], axis=-1)


def sample_caption(attributes: np.ndarray, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Sample a caption of a face with attributes bool (40,); return the text and which FACTS it
    states, bool (43,). Facts are sampled independently with PROBABILITIES, and resampled until at
    least MIN_FACTS are stated; optimum.py assumes exactly this."""
    facts = np.flatnonzero(facts_of(attributes))
    chosen = []
    while len(chosen) < MIN_FACTS:
        chosen = facts[rng.random(len(facts)) < PROBABILITIES[facts]]
    stated = np.zeros(len(FACTS), dtype=bool)
    stated[chosen] = True
    names = [FACTS[fact] for fact in chosen]
    text = verbalize(names, random.Random(int(rng.integers(2**62))))
    return text, stated


def verbalize(facts: list[str], rng: random.Random) -> str:
    """A text of SHORTEST to LONGEST words that states exactly these FACTS. Longer texts are
    generated again, not truncated."""
    for _ in range(20):         # enough for every realistic face
        sentences = compose_sentences(facts, rng)
        while len(" ".join(sentences).split()) < SHORTEST:
            sentences.append(rng.choice([text for text in NEUTRAL if text not in sentences]))
        text = " ".join(sentences)
        if text.count(" ") < LONGEST:
            break
    return text


def compose_sentences(facts, rng):
    """List of sentences that state these facts."""
    # 0: few sentences with long lists; 1: a sentence per phrase. Skewed towards 0, as in FLIP's
    # captions
    verbosity = rng.random()**1.5 * min(1, 10 / len(facts))
    phrases = choose_phrases(facts, verbosity, rng)
    if "Male" in facts:
        he, his = "he", "his"
    elif "not Male" in facts:
        he, his = "she", "her"
    else:
        he, his = "they", "their"
    noun = rng.choice(phrases["noun"] or NEUTRAL_NOUNS)
    if "Young" in facts and rng.random() < 0.3:
        noun = YOUNG_NOUNS.get(he, noun)

    sentences = []
    needs_opening = not any(phrases[kind] for kind in SENTENCE_KINDS)
    if needs_opening or rng.random() < 0.4 + 0.4 * verbosity:
        sentences.append(opening_sentence(phrases, noun, rng))
    units = []
    for kind in SENTENCE_KINDS:
        units += [(kind, chunk) for chunk in chunks(phrases[kind], verbosity, rng)]
    rng.shuffle(units)
    while units:
        sentences.append(next_sentence(units, noun, he, verbosity, len(sentences), rng))
    if phrases["photo"]:
        photo = rng.choice(("photo", "picture", "image"))
        sentences.append(f"The {photo} is {phrases['photo'][0]}.")
    sentences = [text.replace("{his}", his) for text in sentences]
    return [text[0].upper() + text[1:] for text in sentences]


def choose_phrases(facts, verbosity, rng):
    """Phrases that state the facts, {kind: [phrase]}, in random order. All adjectives of one part
    of the face form one phrase, either of kind "has" ("arched, thick eyebrows") or a clause of kind
    "part" ("{his} eyebrows are arched and thick")."""
    phrases = defaultdict(list)
    adjectives = defaultdict(list)          # {part of the face: [adjective]}
    for fact in rng.sample(facts, len(facts)):
        _, choices = GRAMMAR[fact]
        kind, words = rng.choice(choices.split(" | ")).split(" ", 1)
        group = adjectives if kind in FACE_PARTS else phrases
        group[kind].append(words)
    for part, words in adjectives.items():
        if rng.random() < 0.15 + 0.5 * verbosity:
            phrases["part"].append(f"{{his}} {part} {FACE_PARTS[part]} {' and '.join(words)}")
        else:
            phrase = f"{', '.join(words)} {part}"
            if part in PARTS_WITH_ARTICLE:
                phrase = with_article(phrase)
            phrases["has"].append(phrase)
    rng.shuffle(phrases["has"])
    return phrases


def opening_sentence(phrases, noun, rng):
    """The first sentence, with up to two adjectives and three features, which are removed from
    `phrases`."""
    adjectives = ", ".join(pop_last(phrases["is"], rng.randrange(3)))
    x = with_article(f"{adjectives} {noun}".strip())
    if phrases["has"] and rng.random() < 0.4:
        features = pop_last(phrases["has"], rng.randrange(1, 4))
        x += " with " + join_phrases(features, rng)
    photo = rng.choice(("photo", "picture", "portrait", "photograph"))
    if phrases["photo"] and rng.random() < 0.5:
        photo = f"{phrases['photo'].pop()} {photo}"
    return rng.choice(OPENING_TEMPLATES).format(photo=photo, x=x)


def pop_last(phrases, count):
    """Remove the last `count` phrases, or all if there are fewer, and return them."""
    return [phrases.pop() for _ in range(min(count, len(phrases)))]


def next_sentence(units, noun, he, verbosity, position, rng):
    """Sentence number `position`, made of one or two units (kind, phrases), which are removed from
    `units`."""
    kind, phrases = units.pop()
    connective = ""
    if rng.random() < verbosity:
        connective = rng.choice(CONNECTIVES[min(position, 2)])
    if kind == "part":
        return f"{connective}{join_phrases(phrases, rng)}."

    subject = he
    if rng.random() < (0.75 if position == 0 else 0.2):
        subject = f"{rng.choice(('the', 'this'))} {noun}"
    verbs = PLURAL if subject == "they" else SINGULAR
    text = f"{subject} {predicate(kind, phrases, verbs, rng)}"
    if units and units[-1][0] != "part" and rng.random() < 0.5:
        kind, phrases = units.pop()
        if kind == "has" and rng.random() < 0.5:
            pattern = rng.choice(("{text}, with {x}", "with {x}, {text}"))
            text = pattern.format(text=text, x=join_phrases(phrases, rng))
        else:
            text += rng.choice((" and ", ", and ")) + predicate(kind, phrases, verbs, rng)
    return f"{connective}{text}."


def predicate(kind, phrases, verbs, rng):
    return rng.choice(PREDICATES[kind]).format(x=join_phrases(phrases, rng), **verbs)


def chunks(phrases, verbosity, rng):
    """Split a list of phrases into runs of one to four."""
    while phrases:
        size = 1 if rng.random() < verbosity else rng.choice((2, 3, 3, 4))
        yield phrases[:size]
        phrases = phrases[size:]


def join_phrases(phrases, rng):
    """One, two or more phrases as "a", "a and b", or "a, b, and c" with or without the last
    comma."""
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + rng.choice((", and ", " and ")) + phrases[-1]


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words
