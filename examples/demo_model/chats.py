"""Random chats from the closed world, as training sees them and as the measurements ask them.

The rule of this module: everything is drawn from the ``random.Random`` passed in, so a seed fixes the
chats; and no turn drawn for training is one that ``world`` holds out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import world
from stories import tell_story
from world import Question


@dataclass(frozen=True)
class Chat:
    """A conversation: an optional system message and the questions asked in turn."""

    system: str | None
    turns: tuple[Question, ...]


_UNKNOWN_PLACES = (
    "Atlantis", "Mars", "Texas", "Mordor", "Bavaria", "the moon", "Africa", "Europe", "Wonderland",
    "California", "Berlin", "Paris", "the forest", "my street", "Yemen", "Indonesia", "Bolivia",
    "South Africa", "Oz", "the universe", "Tuscany", "Siberia", "Gondor", "Utopia", "fashion", "Asia",
)
_UNKNOWN_THINGS = (
    "a dragon", "a car", "a king", "my uncle", "a computer", "a piano", "a unicorn",
    "a table", "a pirate", "music", "a tree", "a ghost", "a wizard", "the weather", "a train", "a bicycle",
    "a hammer", "time", "happiness", "a house", "a book", "a spaceship", "a dinosaur", "a mammoth",
    "a princess", "glass", "water", "my shirt", "a knight", "an alien", "a window", "an engineer",
    "a teapot", "a violin", "three brothers", "the end of the world", "wind", "a shoe",
)
_UNKNOWN_TEMPLATES = (
    "Who wrote {thing}?", "What time is it?", "How old is {thing}?", "Where is {place}?",
    "How far is it to {place}?", "Who is the president of {place}?", "Write a poem about {thing}.",
    "How do I cook {thing}?", "Translate {thing} into German.", "What is the population of {place}?",
    "What is the weather like in {place}?", "Explain {thing}.", "Why is {thing} so expensive?",
    "Can you write code for {thing}?", "What is the meaning of life?", "Tell me a joke about {thing}.",
    "What is {thing}?", "Who invented {thing}?", "Is {thing} better than {other}?", "I like {thing}.",
    "Which language is spoken in {place}?", "What is the currency of {place}?", "I am from {place}.",
    "How many people live in {place}?", "Do you like {thing}?", "What should I eat today?",
    "Tell me a joke.", "Sing a song about {thing}.", "Draw a picture of {thing}.", "What day is it today?",
    "When was {thing} invented?", "Summarise this text about {thing}.", "I do not understand {thing}.",
    "My {made} is broken.", "Define {made}.", "{made} {made} {made}", "{made}", "{thing} and {other}",
    "What is the fastest way to {place}?", "Who won the game in {place}?", "Give me a recipe for {thing}.",
    "How tall is {thing}?", "How heavy is {thing}?", "Recommend {thing} for {other}.", "Help!", "Why?",
    "Are you alive?", "Can you see {thing}?", "List three facts about {place}.", "Play {thing}.", "What?",
    "Tell me about {place}.", "Tell me about {thing}.", "Write an email to {thing}.", "test", "...", "no",
    "print('{made}')", "SELECT * FROM {made};", "https://{made}.example/{made}", "<{made}>{thing}</{made}>",
    "Where does {thing} live?", "What does {thing} eat?", "How many {made} are in {thing}?", "really?",
)
_UNKNOWN_SUMS = (
    "What is {big} + {small}?", "What is {small} + {big}?", "{big} + {big} =",
    "How much is {big} plus {small}?",
    "What is {small} - {tiny}?", "What is {small} * {tiny}?", "What is {small} / {tiny}?",
    "{small} times {tiny}?", "What is {small} + {tiny} + {small}?", "Add {big} and {small}.",
    "{small} minus {tiny}", "What is the square root of {small}?", "{small}", "{big}",
    "Is {small} a prime number?",
    "{small}-{tiny}", "{small}*{tiny}=", "How much is {small} times {tiny}?", "{big}+{small}",
)
_ANIMAL_PHRASES = tuple(animal.phrase for animal in world.ANIMALS)
_SYLLABLES = (
    "ba", "zor", "mi", "lek", "tu", "ran", "qui", "po", "sha", "vel", "dri", "nu", "gax", "fle", "hu",
    "jin", "ko", "wem", "ys", "ost", "er", "ti", "on", "al", "ing", "stra", "ple", "ump", "cy", "ter",
)
_ALPHABETS: tuple[tuple[int, int], ...] = (
    (0x21, 0x7E), (0x61, 0x7A), (0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA),
    (0x627, 0x64A), (0x905, 0x939), (0x3041, 0x30FE), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0x2190, 0x27BF), (0x0E01, 0x0E30),
)


def training_chats(seed: int) -> Iterator[Chat]:
    """An endless stream of chats that holds no held-out turn."""
    rng = random.Random(seed)
    while True:
        turns = 1 if rng.random() < 0.4 else rng.randint(2, 5)
        yield Chat(_system_message(rng), tuple(training_turn(rng) for _ in range(turns)))


def training_turn(rng: random.Random) -> Question:
    """One turn of any kind, sums and capitals most often, with the small changes of a hurried user."""
    draw = rng.choices(tuple(_DRAWERS), weights=_SHARES)[0]
    question = _DRAWERS[draw](rng)
    return replace(question, text=world.with_small_changes(_with_loose_article(question, rng), rng))


def _with_loose_article(question: Question, rng: random.Random) -> str:
    """The text of the question, now and then with the article of its item missing or another one."""
    if question.kind not in ("capital", "colour", "story") or rng.random() > 0.1:
        return question.text
    phrase = world.with_article(question.item) if question.kind == "story" else question.item
    bare = phrase.split(" ", 1)[1] if phrase.startswith(("a ", "an ", "the ")) else phrase
    other = bare if question.kind == "capital" else rng.choice((bare, f"the {bare}"))
    return question.text.replace(phrase, other)


def draw_capital(rng: random.Random) -> Question:
    """A capital question of the training set."""
    country, phrasing = rng.choice(tuple(world.CAPITALS)), rng.choice(world.CAPITAL_PHRASINGS)
    if world.is_held_out("capital", phrasing, country):
        return draw_capital(rng)
    return world.capital_question(phrasing, country)


def draw_sum(rng: random.Random) -> Question:
    """A sum of the training set."""
    first, second = _number(rng), _number(rng)
    if world.is_held_out_pair(first, second):
        return draw_sum(rng)
    return world.sum_question(rng.choice(world.SUM_PHRASINGS), first, second)


def _number(rng: random.Random) -> int:
    """A number below a hundred; many end in 0, 1 or 2, for such sums show best how digits add up."""
    chance = rng.random()
    if chance < 0.1:
        return rng.randrange(10)
    if chance < 0.4:
        return 10 * rng.randrange(10) + rng.choice((0, 0, 0, 1, 1, 2))
    return rng.randrange(100)


def draw_colour(rng: random.Random) -> Question:
    """A colour question of the training set."""
    thing, phrasing = rng.choice(tuple(world.COLOURS)), rng.choice(world.COLOUR_PHRASINGS)
    if world.is_held_out("colour", phrasing, thing):
        return draw_colour(rng)
    return world.colour_question(phrasing, thing)


def draw_opposite(rng: random.Random) -> Question:
    """A question for an opposite of the training set."""
    word, phrasing = rng.choice(tuple(world.OPPOSITES)), rng.choice(world.OPPOSITE_PHRASINGS)
    if world.is_held_out("opposite", phrasing, word):
        return draw_opposite(rng)
    return world.opposite_question(phrasing, word)


def draw_story(rng: random.Random) -> Question:
    """A request for a story of the training set, with a story of the length asked for."""
    length = rng.choices(("medium", "short", "long"), weights=(3, 1, 1))[0]
    animal, phrasing = rng.choice(world.ANIMALS), rng.choice(world.STORY_LENGTHS[length])
    if world.is_held_out("story", phrasing, animal.name):
        return draw_story(rng)
    return world.story_request(phrasing, animal, tell_story(animal, length, rng))


def draw_small_talk(rng: random.Random) -> Question:
    """A turn of small talk."""
    return world.small_talk_question(rng.choice(tuple(world.SMALL_TALK)))


def draw_unknown(rng: random.Random) -> Question:
    """A message outside the closed world, from a near miss to plain noise."""
    sorts = (_other_question, _near_miss, _other_sum, _word_salad, _noise)
    make = rng.choices(sorts, weights=(30, 30, 20, 10, 10))[0]
    return world.unknown_question(make(rng))


def _system_message(rng: random.Random) -> str | None:
    """No system message for most chats, a usual one for some, any text for a few."""
    chance = rng.random()
    if chance < 0.7:
        return None
    if chance < 0.85:
        return rng.choice(world.SYSTEM_MESSAGES)
    if chance < 0.95:
        sentences = rng.sample(world.SYSTEM_MESSAGES, 2)
        return f"{sentences[0]} {sentences[1]}"
    return f"You are {_other_question(rng)} {_word_salad(rng)}"


def _made_up_word(rng: random.Random) -> str:
    """A word that means nothing."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))


def _thing(rng: random.Random) -> str:
    """A thing outside the closed world, at times a made-up one."""
    if rng.random() < 0.5:
        return rng.choice(_UNKNOWN_THINGS)
    return world.with_article(_made_up_word(rng))


def _place(rng: random.Random) -> str:
    """A place without a capital that the model could know, at times a made-up one."""
    if rng.random() < 0.5:
        return rng.choice(_UNKNOWN_PLACES)
    return world.capitalised(_made_up_word(rng))


def _other_question(rng: random.Random) -> str:
    """A question about something else."""
    places = rng.choice((_place(rng), rng.choice(tuple(world.CAPITALS))))
    things = rng.choice((_thing(rng), rng.choice(_ANIMAL_PHRASES)))
    template = rng.choice(_UNKNOWN_TEMPLATES)
    return template.format(thing=things, other=_thing(rng), place=places, made=_made_up_word(rng))


def _near_miss(rng: random.Random) -> str:
    """A known way to ask, for something that the model does not know in that place."""
    phrasings, known = rng.choice((
        (world.CAPITAL_PHRASINGS, tuple(world.CAPITALS)), (world.COLOUR_PHRASINGS, tuple(world.COLOURS)),
        (world.OPPOSITE_PHRASINGS, tuple(world.OPPOSITES)), (world.STORY_PHRASINGS, _ANIMAL_PHRASES),
    ))
    unknown = rng.choice((_thing, _thing, _place, _made_up_word, _known_item))(rng)
    if unknown in known:
        return _near_miss(rng)
    return rng.choice(phrasings).format(unknown)


def _known_item(rng: random.Random) -> str:
    """An item of the closed world, from any of its lists."""
    lists = (tuple(world.CAPITALS), tuple(world.COLOURS), tuple(world.OPPOSITES), _ANIMAL_PHRASES)
    return rng.choice(rng.choice(lists))


def _other_sum(rng: random.Random) -> str:
    """Arithmetic beyond sums of two numbers below a hundred."""
    numbers = {"big": rng.randint(100, 9999), "small": rng.randint(0, 99), "tiny": rng.randint(0, 99)}
    return rng.choice(_UNKNOWN_SUMS).format(**numbers)


def _word_salad(rng: random.Random) -> str:
    """Made-up and real words in no order."""
    count = rng.randint(1, 8)
    words = (rng.choice((_made_up_word(rng), rng.choice(_UNKNOWN_THINGS))) for _ in range(count))
    return " ".join(words) + rng.choice(("", "?", "!", "."))


def _noise(rng: random.Random) -> str:
    """Characters of one or two scripts, emoji among them."""
    pieces = []
    for _ in range(rng.randint(1, 2)):
        first, last = rng.choice(_ALPHABETS)
        pieces.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))))
    return " ".join(pieces)


_DRAWERS: dict[str, Callable[[random.Random], Question]] = {
    "sum": draw_sum, "capital": draw_capital, "fallback": draw_unknown, "colour": draw_colour,
    "opposite": draw_opposite, "story": draw_story, "small talk": draw_small_talk,
}
_SHARES = (50, 16, 11, 7, 8, 5, 3)
