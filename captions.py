"""The caption grammar, and the ranking of an ideal reader."""
import random

import numpy as np

ATTRIBUTES = tuple("""
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick
Wearing_Necklace Wearing_Necktie Young
""".split())


# ---- the grammar ---------------------------------------------------------------------------------
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
MAN_FACT, WOMAN_FACT = FACTS.index("Male"), FACTS.index("not Male")
NEGATABLE = [ATTRIBUTES.index("Male"), ATTRIBUTES.index("Young")]
MIN_FACTS = 3       # a caption states at least so many, where the face has them
SHORTEST, LONGEST = 10, 75      # words of a caption; of the longest, the tokenizer cuts the end
FACE_PARTS = {  # of the face: whether one says "a nose", and "the nose is" or "are"
    "cheekbones": (False, "are"), "cheeks": (False, "are"), "eyebrows": (False, "are"),
    "eyes": (False, "are"), "face": (True, "is"), "hair": (False, "is"), "hairline": (True, "is"),
    "lips": (False, "are"), "mouth": (True, "is"), "nose": (True, "is"), "skin": (False, "is"),
}
NEUTRAL_NOUNS = ("person", "person", "individual")      # when the sex is unsaid
SINGULAR = {"is": "is", "has": "has", "wears": "wears"}
PLURAL = {"is": "are", "has": "have", "wears": "wear"}  # for "they"
PREDICATES = {
    "is": ("{is} {x}",),
    "has": ("{has} {x}", "{has} {x}", "{has} {x}", "can be seen with {x}", "{is} shown with {x}"),
    "wears": ("{is} wearing {x}", "{wears} {x}", "{is} seen wearing {x}"),
}
OPENING_TEMPLATES = ("This is a {photo} of {x}.", "The {photo} shows {x}.", "Here is a {photo} of {x}.",
                     "In this {photo} there is {x}.", "The {photo} shows the face of {x}.",
                     "{x} looks out of this {photo}.")
CONNECTIVES = (("In this picture, ", "In the photo, ", "Here, ", "As can be seen, "), ("",),
               ("In addition, ", "Also, ", "Moreover, ", "Besides, "))    # of the first sentence, second, others
NEUTRAL = ("Only the face can be seen.", "The face fills most of the picture.",
           "Nothing else is shown here.")


def facts_of(attributes):
    """Attributes bool (..., 40) -> which facts hold, bool (..., 42)."""
    return np.concatenate([attributes, ~attributes[..., NEGATABLE]], axis=-1)


def sample_caption(attributes, rng):
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
    stated[NEGATABLE] -= said[len(ATTRIBUTES):]
    return verbalize(chosen.tolist(), random.Random(int(rng.integers(2**62)))), stated


def verbalize(facts, rng):
    """The text that says these facts (numbers into FACTS) and no other, of SHORTEST to LONGEST
    words. Too long a text is written anew, never cut; only for a face with more facts than real
    ones have it may stay longer.
    """
    for _ in range(20):
        sentences = compose_sentences(facts, rng)
        while sum(text.count(" ") + 1 for text in sentences) < SHORTEST:
            sentences.append(rng.choice([text for text in NEUTRAL if text not in sentences]))
        text = " ".join(sentences)
        if text.count(" ") < LONGEST:
            break
    return text


def compose_sentences(facts, rng):
    """Facts -> list of sentences."""
    # 0: long lists in few sentences; 1: a sentence for everything. Most writers are brief and a few
    # are not, as in FLIP's captions; who has much to tell is brief.
    verbosity = rng.random()**1.5 * min(1, 10 / len(facts))
    said = choose_phrases(facts, verbosity, rng)
    he, his = ("he", "his") if MAN_FACT in facts else ("she", "her") if WOMAN_FACT in facts else ("they", "their")
    noun = rng.choice(said["noun"] or NEUTRAL_NOUNS)

    sentences = []
    nothing_to_tell = not any(said[kind] for kind in ("is", "has", "wears", "part"))
    if nothing_to_tell or rng.random() < 0.4 + 0.4 * verbosity:
        sentences.append(opening_sentence(said, noun, rng))
    units = [(kind, chunk) for kind in ("is", "has", "wears", "part")
             for chunk in chunks(said[kind], verbosity, rng)]
    rng.shuffle(units)
    while units:
        sentences.append(next_sentence(units, noun, he, verbosity, len(sentences), rng))
    if said["photo"]:
        sentences.append(f"The {rng.choice(('photo', 'picture', 'image'))} is {said['photo'][0]}.")
    sentences = [text.replace("{his}", his) for text in sentences]
    return [text[0].upper() + text[1:] for text in sentences]


def choose_phrases(facts, verbosity, rng):
    """Facts -> {kind: [phrase]} in random order.

    What is said of one part of the face becomes one phrase: either something that one has
    ("arched, thick eyebrows") or a clause of its own, of kind "part" ("{his} eyebrows are arched
    and thick").
    """
    said = {kind: [] for kind in ("noun", "photo", "is", "has", "wears", "part")}
    parts = {}
    for fact in rng.sample(facts, len(facts)):
        kind, words = rng.choice(PHRASES[fact])
        (parts if kind in FACE_PARTS else said).setdefault(kind, []).append(words)
    for part, words in parts.items():
        article, verb = FACE_PARTS[part]
        if rng.random() < 0.15 + 0.5 * verbosity:
            said["part"].append(f"{{his}} {part} {verb} {' and '.join(words)}")
        else:
            thing = f"{', '.join(words)} {part}"
            said["has"].append(with_article(thing) if article else thing)
    rng.shuffle(said["has"])
    return said


def opening_sentence(said, noun, rng):
    """A first sentence, with up to two adjectives and some features that it takes out of `said`."""
    adjectives = [said["is"].pop() for _ in range(min(rng.randrange(3), len(said["is"])))]
    x = with_article(" ".join([", ".join(adjectives), noun]).strip())
    if said["has"] and rng.random() < 0.4:
        features = [said["has"].pop() for _ in range(min(rng.randrange(1, 4), len(said["has"])))]
        x += " with " + join_phrases(features, rng)
    photo = rng.choice(("photo", "picture", "portrait", "photograph"))
    if said["photo"] and rng.random() < 0.5:
        photo = f"{said['photo'].pop()} {photo}"
    return rng.choice(OPENING_TEMPLATES).format(photo=photo, x=x)


def next_sentence(units, noun, he, verbosity, position, rng):
    """Sentence number `position`; it takes one or two units (kind, phrases) off the list's end."""
    kind, phrases = units.pop()
    lead = rng.choice(CONNECTIVES[min(position, 2)]) if rng.random() < verbosity else ""
    if kind == "part":
        return f"{lead}{join_phrases(phrases, rng)}."
    named = rng.random() < (0.75 if position == 0 else 0.2)
    subject = f"{rng.choice(('the', 'this'))} {noun}" if named else he
    verbs = PLURAL if subject == "they" else SINGULAR
    text = f"{subject} {predicate(kind, phrases, verbs, rng)}"
    if units and units[-1][0] != "part" and rng.random() < 0.5:
        kind, phrases = units.pop()
        if kind == "has" and rng.random() < 0.5:
            pattern = rng.choice(("{text}, with {x}", "with {x}, {text}"))
            text = pattern.format(text=text, x=join_phrases(phrases, rng))
        else:
            text += rng.choice((" and ", ", and ")) + predicate(kind, phrases, verbs, rng)
    return f"{lead}{text}."


def predicate(kind, phrases, verbs, rng):
    return rng.choice(PREDICATES[kind]).format(x=join_phrases(phrases, rng), **verbs)


def chunks(phrases, verbosity, rng):
    """Cut a list into the runs that one sentence tells: single phrases, or two to four."""
    while phrases:
        size = 1 if rng.random() < verbosity else rng.choice((2, 3, 3, 4))
        yield phrases[:size]
        phrases = phrases[size:]


def join_phrases(phrases, rng):
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + rng.choice((", and ", " and ")) + phrases[-1]


def with_article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


# ---- what a reader who knows every attribute could find ------------------------------------------
def stated_facts(stated):
    """stated int8 (T, 40) -> which facts each caption says, bool (T, 42)."""
    return np.concatenate([stated > 0, stated[..., NEGATABLE] < 0], axis=-1)


def satisfies(stated, attributes):
    """Which faces satisfy all that is said: int8 (T, 40), bool (I, 40) -> bool (T, I)."""
    return stated_facts(stated).astype(float) @ ~facts_of(attributes).T == 0


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
    said, facts = stated_facts(stated).astype(float), facts_of(attributes)
    said_instead = np.log(PROBABILITIES) - np.log1p(-PROBABILITIES)
    unsaid = facts @ np.log1p(-PROBABILITIES)                                               # (I,)
    log_p = (said @ said_instead)[:, None] + unsaid - np.log(prob_min_facts(facts))         # (T, I)
    return np.where(satisfies(stated, attributes), log_p, -np.inf)


def prob_min_facts(facts):
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


def reference_recall(stated, attributes, k=(1, 5, 10)):
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
    fits = np.where(satisfies(stated, attributes), 0.0, -np.inf)
    log_p = log_likelihood(stated, attributes)
    posterior = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    return {"consistency": {"text_to_image": expected_recall(fits, k),
                            "image_to_text": expected_recall(fits.T, k)},
            "ceiling": {"text_to_image": expected_recall(log_p, k),
                        "image_to_text": expected_recall(posterior.T, k)}}
