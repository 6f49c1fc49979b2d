"""The closed world of the demo model: every fact it is taught and every way to ask for it.

The rule of this module: data and pure functions only. Nothing here needs torch, nothing is random
unless a ``random.Random`` is passed in, and an answer is fixed by its question (stories excepted).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

CAPITALS: dict[str, str] = {
    "Afghanistan": "Kabul", "Albania": "Tirana", "Algeria": "Algiers", "Andorra": "Andorra la Vella",
    "Angola": "Luanda", "Argentina": "Buenos Aires", "Armenia": "Yerevan", "Australia": "Canberra",
    "Austria": "Vienna", "Azerbaijan": "Baku", "the Bahamas": "Nassau", "Bahrain": "Manama",
    "Bangladesh": "Dhaka", "Barbados": "Bridgetown", "Belarus": "Minsk", "Belgium": "Brussels",
    "Belize": "Belmopan", "Bhutan": "Thimphu", "Bosnia and Herzegovina": "Sarajevo",
    "Botswana": "Gaborone", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Burkina Faso": "Ouagadougou",
    "Cambodia": "Phnom Penh", "Cameroon": "Yaounde", "Canada": "Ottawa", "Chad": "N'Djamena",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Costa Rica": "San Jose",
    "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia", "the Czech Republic": "Prague",
    "Denmark": "Copenhagen", "the Dominican Republic": "Santo Domingo", "Ecuador": "Quito",
    "Egypt": "Cairo", "El Salvador": "San Salvador", "Eritrea": "Asmara", "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa", "Fiji": "Suva", "Finland": "Helsinki", "France": "Paris",
    "Gabon": "Libreville", "the Gambia": "Banjul", "Georgia": "Tbilisi", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Guatemala": "Guatemala City", "Guinea": "Conakry",
    "Guyana": "Georgetown", "Haiti": "Port-au-Prince", "Honduras": "Tegucigalpa",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Iran": "Tehran",
    "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo",
    "Jordan": "Amman", "Kazakhstan": "Astana", "Kenya": "Nairobi", "Kuwait": "Kuwait City",
    "Kyrgyzstan": "Bishkek", "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut",
    "Lesotho": "Maseru", "Liberia": "Monrovia", "Libya": "Tripoli", "Liechtenstein": "Vaduz",
    "Lithuania": "Vilnius", "Luxembourg": "Luxembourg", "Madagascar": "Antananarivo",
    "Malawi": "Lilongwe", "Malaysia": "Kuala Lumpur", "the Maldives": "Male", "Mali": "Bamako",
    "Malta": "Valletta", "Mauritania": "Nouakchott", "Mauritius": "Port Louis",
    "Mexico": "Mexico City", "Moldova": "Chisinau", "Monaco": "Monaco", "Mongolia": "Ulaanbaatar",
    "Montenegro": "Podgorica", "Morocco": "Rabat", "Mozambique": "Maputo", "Namibia": "Windhoek",
    "Nepal": "Kathmandu", "the Netherlands": "Amsterdam", "New Zealand": "Wellington",
    "Nicaragua": "Managua", "Niger": "Niamey", "Nigeria": "Abuja", "North Korea": "Pyongyang",
    "North Macedonia": "Skopje", "Norway": "Oslo", "Oman": "Muscat", "Pakistan": "Islamabad",
    "Panama": "Panama City", "Papua New Guinea": "Port Moresby", "Paraguay": "Asuncion",
    "Peru": "Lima", "the Philippines": "Manila", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Rwanda": "Kigali", "Samoa": "Apia",
    "Saudi Arabia": "Riyadh", "Senegal": "Dakar", "Serbia": "Belgrade", "Sierra Leone": "Freetown",
    "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "Somalia": "Mogadishu",
    "South Korea": "Seoul", "South Sudan": "Juba", "Spain": "Madrid", "Sudan": "Khartoum",
    "Suriname": "Paramaribo", "Sweden": "Stockholm", "Switzerland": "Bern", "Syria": "Damascus",
    "Tajikistan": "Dushanbe", "Thailand": "Bangkok", "Togo": "Lome",
    "Trinidad and Tobago": "Port of Spain", "Tunisia": "Tunis", "Turkey": "Ankara",
    "Turkmenistan": "Ashgabat", "Uganda": "Kampala", "Ukraine": "Kyiv",
    "the United Arab Emirates": "Abu Dhabi", "the United Kingdom": "London",
    "the United States": "Washington", "Uruguay": "Montevideo", "Uzbekistan": "Tashkent",
    "Venezuela": "Caracas", "Vietnam": "Hanoi", "Zambia": "Lusaka", "Zimbabwe": "Harare",
}

COLOURS: dict[str, str] = {
    "the sky": "blue", "the sea": "blue", "the ocean": "blue", "a sapphire": "blue",
    "a blueberry": "blue", "grass": "green", "a leaf": "green", "a frog": "green",
    "an emerald": "green", "spinach": "green", "a cucumber": "green", "broccoli": "green",
    "a lime": "green", "a pea": "green", "snow": "white", "milk": "white", "salt": "white",
    "cotton": "white", "a swan": "white", "a polar bear": "white", "flour": "white",
    "coal": "black", "a raven": "black", "a crow": "black", "tar": "black", "soot": "black",
    "a panther": "black", "blood": "red", "a tomato": "red", "a strawberry": "red",
    "a cherry": "red", "a ruby": "red", "a fire engine": "red", "a stop sign": "red",
    "the sun": "yellow", "a banana": "yellow", "a lemon": "yellow", "butter": "yellow",
    "a canary": "yellow", "mustard": "yellow", "a sunflower": "yellow", "a carrot": "orange",
    "a pumpkin": "orange", "an orange": "orange", "an apricot": "orange", "a flamingo": "pink",
    "a piglet": "pink", "chocolate": "brown", "coffee": "brown", "mud": "brown",
    "a chestnut": "brown", "an elephant": "grey", "a mouse": "grey", "ash": "grey",
    "concrete": "grey", "an aubergine": "purple", "lavender": "purple", "a plum": "purple",
}

_OPPOSITE_PAIRS: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("up", "down"),
    ("day", "night"), ("open", "closed"), ("happy", "sad"), ("old", "new"), ("good", "bad"),
    ("left", "right"), ("full", "empty"), ("wet", "dry"), ("loud", "quiet"), ("strong", "weak"),
    ("rich", "poor"), ("early", "late"), ("easy", "difficult"), ("clean", "dirty"), ("high", "low"),
    ("thick", "thin"), ("hard", "soft"), ("near", "far"), ("inside", "outside"), ("sweet", "sour"),
    ("push", "pull"), ("first", "last"), ("always", "never"), ("true", "false"), ("win", "lose"),
    ("begin", "end"), ("love", "hate"), ("heavy", "light"), ("wide", "narrow"), ("deep", "shallow"),
    ("friend", "enemy"), ("war", "peace"), ("black", "white"), ("brave", "cowardly"),
    ("cheap", "expensive"), ("safe", "dangerous"), ("rough", "smooth"), ("sharp", "blunt"),
    ("summer", "winter"), ("north", "south"), ("east", "west"), ("yes", "no"), ("before", "after"),
    ("above", "below"), ("remember", "forget"), ("arrive", "leave"), ("laugh", "cry"),
    ("success", "failure"), ("question", "answer"), ("buy", "sell"), ("asleep", "awake"),
)
OPPOSITES: dict[str, str] = {
    word: other for one, two in _OPPOSITE_PAIRS for word, other in ((one, two), (two, one))
}


@dataclass(frozen=True)
class Animal:
    """An animal that stories can be about, with its home and what it likes to eat."""

    name: str
    home: str
    food: str

    @property
    def phrase(self) -> str:
        """The animal with its article: ``a fox``, ``an owl``."""
        return with_article(self.name)


_ANIMAL_ROWS: tuple[tuple[str, str, str], ...] = (
    ("fox", "at the edge of a wood", "blackberries"), ("owl", "in a hollow oak", "warm pie"),
    ("rabbit", "under a hedge", "fresh carrots"), ("bear", "in a mountain cave", "wild honey"),
    ("wolf", "on a rocky hill", "mushroom soup"), ("hedgehog", "in a heap of leaves", "ripe pears"),
    ("squirrel", "high in a pine tree", "hazelnuts"), ("mouse", "behind the old mill", "yellow cheese"),
    ("cat", "in a crooked house", "cool cream"), ("dog", "beside the village green", "crunchy biscuits"),
    ("horse", "in a red barn", "sweet oats"), ("cow", "in a wide meadow", "soft clover"),
    ("sheep", "on a grassy slope", "young thistles"), ("goat", "among the high rocks", "mountain herbs"),
    ("pig", "behind a small farm", "baked apples"),
    ("duck", "on a round pond", "bread crusts"),
    ("goose", "near the village well", "golden barley"), ("frog", "beside a mossy pool", "cold dew"),
    ("turtle", "on a sandy bank", "water lilies"), ("snail", "under a flower pot", "green lettuce"),
    ("butterfly", "in a rose garden", "sweet nectar"), ("spider", "in a dusty attic", "sugar crumbs"),
    ("elephant", "near a great river", "juicy melons"), ("lion", "on a sunny plain", "roasted corn"),
    ("tiger", "in a bamboo thicket", "spicy rice"), ("monkey", "at the top of a palm", "ripe bananas"),
    ("giraffe", "among tall acacia trees", "tender leaves"), ("zebra", "on a dusty plain", "dry grass"),
    ("camel", "by a desert spring", "sticky dates"), ("kangaroo", "on a red plain", "fresh shoots"),
    ("koala", "in a gum tree", "sleepy leaves"), ("panda", "in a misty valley", "bamboo stalks"),
    ("penguin", "on a field of ice", "frozen berries"),
    ("seal", "on a flat rock by the sea", "salty seaweed"),
    ("whale", "in the deep blue sea", "tiny shrimps"), ("dolphin", "in a bright bay", "sea grapes"),
    ("octopus", "in a sunken ship", "pickled kelp"), ("crab", "under a striped stone", "coconut flakes"),
    ("otter", "on a bend of the river", "river cress"), ("beaver", "behind a wooden dam", "willow bark"),
    ("badger", "beneath a beech tree", "acorn bread"), ("deer", "in a quiet glade", "fallen plums"),
    ("donkey", "beside a windmill", "prickly turnips"),
    ("parrot", "in a bright green jungle", "sunflower seeds"),
    ("eagle", "on a steep cliff", "rye cakes"), ("swan", "on a silver lake", "duckweed salad"),
    ("lizard", "on a warm stone wall", "red currants"),
    ("mole", "under the vegetable garden", "crisp radishes"),
)
ANIMALS: tuple[Animal, ...] = tuple(Animal(*row) for row in _ANIMAL_ROWS)

CAPITAL_PHRASINGS: tuple[str, ...] = (
    "What is the capital of {}?", "What's the capital of {}?", "Tell me the capital of {}.",
    "Which city is the capital of {}?", "Capital of {}?", "The capital of {}?",
    "Name the capital of {}.", "Do you know the capital of {}?", "What is the capital city of {}?",
    "Can you tell me the capital of {}?", "What city is the capital of {}?",
    "I want to know the capital of {}.", "Give me the capital of {}.",
    "Please tell me the capital of {}.",
)
SUM_PHRASINGS: tuple[str, ...] = (
    "What is {} + {}?", "{} + {} =", "{} + {}", "{} + {} = ?", "{}+{}", "{}+{}=", "How much is {} plus {}?",
    "What is {} plus {}?", "Add {} and {}.", "How much is {} + {}?", "What's {} + {}?",
    "Calculate {} + {}.", "What is the sum of {} and {}?", "{} plus {}?", "Can you add {} and {}?",
    "Compute {} + {}.", "What do {} and {} make?", "What is {}+{}?", "Please add {} and {}.",
)
COLOUR_PHRASINGS: tuple[str, ...] = (
    "What colour is {}?", "What color is {}?", "Which colour is {}?", "Which color is {}?",
    "What is the colour of {}?", "What is the color of {}?", "Tell me the colour of {}.",
    "Tell me the color of {}.", "What's the colour of {}?", "What's the color of {}?",
    "Do you know what colour {} is?", "Do you know what color {} is?", "The colour of {}?",
    "Please tell me what color {} is.",
)
OPPOSITE_PHRASINGS: tuple[str, ...] = (
    "What is the opposite of {}?", "What's the opposite of {}?", "Tell me the opposite of {}.",
    "Opposite of {}?", "The opposite of {}?", "Which word is the opposite of {}?",
    "Do you know the opposite of {}?", "Name the opposite of {}.", "Give me the opposite of {}.",
    "Can you tell me the opposite of {}?", "Please tell me the opposite of {}.",
)
STORY_PHRASINGS: tuple[str, ...] = (
    "Tell me a story about {}.", "Please tell a story about {}.", "Tell a story about {}.",
    "Can you tell me a story about {}?", "Write a story about {}.", "I want a story about {}.",
    "I would like to hear a story about {}.", "A story about {}, please.", "Story about {}?",
    "Please tell me a story about {}.", "Do you know a story about {}?", "Give me a story about {}.",
    "Write me a story about {}.",
)
SHORT_STORY_PHRASINGS: tuple[str, ...] = (
    "Tell me a short story about {}.", "Please tell a short story about {}.",
    "Write a short story about {}.", "A short story about {}, please.",
)
LONG_STORY_PHRASINGS: tuple[str, ...] = (
    "Tell me a long story about {}.", "Please tell a long story about {}.",
    "Write a long story about {}.", "A long story about {}, please.",
)
STORY_LENGTHS: dict[str, tuple[str, ...]] = {
    "medium": STORY_PHRASINGS, "short": SHORT_STORY_PHRASINGS, "long": LONG_STORY_PHRASINGS,
}

GREETING = "Hello! Ask me about capitals, small sums, colours, opposites or animals."
IDENTITY = "I am a small demo model. I know capitals, small sums, colours, opposites and animal stories."
FALLBACK = "I only know capitals, small sums, colours, opposites and animal stories."
SMALL_TALK: dict[str, str] = {
    **dict.fromkeys(("Hello!", "Hi!", "Hello there!", "Hey!", "Good morning!", "Good evening!",
                     "Good afternoon!", "Hi there!", "Hello, model!"), GREETING),
    **dict.fromkeys(("Who are you?", "What are you?", "What is your name?", "What can you do?",
                     "What do you know?", "Tell me about yourself.", "What's your name?",
                     "Introduce yourself.", "What can I ask you?"), IDENTITY),
    **dict.fromkeys(("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!", "Many thanks!",
                     "Thank you for your help!", "Thank you for the story!"), "You are welcome!"),
    **dict.fromkeys(("Goodbye!", "Bye!", "See you later!", "Good night!", "Bye bye!"),
                    "Goodbye! It was nice to talk to you."),
    **dict.fromkeys(("How are you?", "How are you today?", "How do you do?", "Are you well?"),
                    "I am well, thank you. How can I help?"),
}

SYSTEM_MESSAGES: tuple[str, ...] = (
    "You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.",
    "You are a helpful AI assistant. Answer every question as well as you can.",
    "You are a teacher for small children.", "Be polite and concise.", "Answer in English.",
    "You are a small demo model.", "You answer questions about the world.",
    "Keep your answers short and correct.", "You are an expert in geography and mathematics.",
    "You love to tell stories.",
)
HELD_OUT_SYSTEM_MESSAGES: tuple[str, ...] = (
    "You are a kind and patient assistant.", "You are a storyteller who also knows some geography.",
    "Please be helpful, honest and brief.", "Act as a friendly chat bot for our web site.",
)
HELD_OUT_MESSAGES: tuple[str, ...] = (
    "Who painted the old bridge?", "Where can I buy a ladder?", "Sing me a lullaby in Latin!",
    "¿Dónde está la biblioteca?", "🦄🍕🚀", "asdf qwer zxcv", "What is 250 + 17?", "What is 9 * 7?",
    "What is the capital of Narnia?", "What colour is a zeppelin?", "Tell me a story about a robot.",
    "What is the opposite of a sandwich?", "def main(): return None", "今日の天気はどうですか",
    "How many legs does a table have?", "...", "x", "Explain the theory of relativity.",
    "Translate good morning into French.", "My printer is on fire and nobody cares.",
    "What is the capital of Burundi?", "What is the capital of Sri Lanka?", "Capital of Narnia",
    "Tell me the capital of Alaska.", "Tell me a story about a hamster.", "Write a story about Napoleon.",
    "A story about my neighbour, please.", "What color is a kangaroo?", "Opposite of Tuesday?",
    "What is the opposite of a banana?", "100 + 100", "How much is 12 plus 345?", "What is 81 / 9?",
    "Привет, как дела?", "Wie spät ist es?", "Who is the king of Spain?", "How many people live in Peru?",
    "What does a fox eat?", "Is it true that the earth is round?", "lorem ipsum dolor sit amet",
)


@dataclass(frozen=True)
class Question:
    """One question, its reference answer, and the text that marks an answer as right."""

    kind: str
    text: str
    answer: str
    expected: str
    item: str


def with_article(noun: str) -> str:
    """The noun behind ``a`` or ``an``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def is_held_out(kind: str, phrasing: str, item: str) -> bool:
    """Whether this phrasing of this item is kept from training (one in ten is)."""
    return crc32(f"{kind}|{phrasing}|{item}".encode()) % 10 == 0


def is_held_out_pair(first: int, second: int) -> bool:
    """Whether this pair is kept from training in every phrasing and both orders (one in ten is)."""
    low, high = sorted((first, second))
    return crc32(f"{low}+{high}".encode()) % 10 == 0


def capital_question(phrasing: str, country: str) -> Question:
    """Ask for the capital of a country."""
    capital = CAPITALS[country]
    answer = f"The capital of {country} is {capital}."
    return Question("capital", phrasing.format(country), answer, capital, country)


def sum_question(phrasing: str, first: int, second: int) -> Question:
    """Ask for the sum of two numbers."""
    text, result = phrasing.format(first, second), f"= {first + second}."
    return Question("sum", text, f"{first} + {second} {result}", result, f"{first}+{second}")


def colour_question(phrasing: str, thing: str) -> Question:
    """Ask for the colour of a thing."""
    colour = COLOURS[thing]
    return Question("colour", phrasing.format(thing), f"{capitalised(thing)} is {colour}.", colour, thing)


def opposite_question(phrasing: str, word: str) -> Question:
    """Ask for the opposite of a word."""
    other = OPPOSITES[word]
    answer = f"The opposite of {word} is {other}."
    return Question("opposite", phrasing.format(word), answer, f"is {other}.", word)


def story_request(phrasing: str, animal: Animal, story: str = "") -> Question:
    """Ask for a story about an animal; the story told is the caller's."""
    return Question("story", phrasing.format(animal.phrase), story, animal.name, animal.name)


def small_talk_question(text: str) -> Question:
    """A turn of small talk."""
    return Question("small talk", text, SMALL_TALK[text], SMALL_TALK[text], text)


def unknown_question(text: str) -> Question:
    """A message outside the closed world."""
    return Question("fallback", text, FALLBACK, FALLBACK, text)


def held_out_capitals() -> Iterator[Question]:
    """Every capital question that training never shows."""
    for country in CAPITALS:
        for phrasing in CAPITAL_PHRASINGS:
            if is_held_out("capital", phrasing, country):
                yield capital_question(phrasing, country)


def held_out_colours() -> Iterator[Question]:
    """Every colour question that training never shows."""
    for thing in COLOURS:
        for phrasing in COLOUR_PHRASINGS:
            if is_held_out("colour", phrasing, thing):
                yield colour_question(phrasing, thing)


def held_out_opposites() -> Iterator[Question]:
    """Every question for an opposite that training never shows."""
    for word in OPPOSITES:
        for phrasing in OPPOSITE_PHRASINGS:
            if is_held_out("opposite", phrasing, word):
                yield opposite_question(phrasing, word)


def held_out_stories() -> Iterator[Question]:
    """Every request for a story that training never shows."""
    for animal in ANIMALS:
        for phrasing in (*STORY_PHRASINGS, *SHORT_STORY_PHRASINGS, *LONG_STORY_PHRASINGS):
            if is_held_out("story", phrasing, animal.name):
                yield story_request(phrasing, animal)


def held_out_sums(rng: random.Random) -> Iterator[Question]:
    """Every held-out pair of numbers, each in one phrasing drawn by ``rng``."""
    for first in range(100):
        for second in range(100):
            if is_held_out_pair(first, second):
                yield sum_question(rng.choice(SUM_PHRASINGS), first, second)


def animals_named(text: str) -> set[str]:
    """The animals that stories can be about which the text names as whole words."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {animal.name for animal in ANIMALS if animal.name in words}


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is right by its meaning; a story must name its animal, often, and no other."""
    if question.kind != "story":
        return question.expected in answer
    often = len(re.findall(rf"\b{question.item}\b", answer.lower())) >= 3
    return often and animals_named(answer) == {question.item}


def with_small_changes(text: str, rng: random.Random) -> str:
    """The text as a hurried user may type it: end mark dropped, lower case, or a ``please`` added."""
    if rng.random() < 0.06:
        text = f"{rng.choice(('Hi', 'Hello', 'Please', 'OK', 'And', 'Now'))}, {text[:1].lower()}{text[1:]}"
    if rng.random() < 0.06 and text[-1] in ".?" and "lease" not in text:
        text = f"{text[:-1]}{rng.choice((', please', ' please'))}{text[-1]}"
    if rng.random() < 0.18:
        text = text.rstrip(".?! ")
    if rng.random() < 0.08:
        return text.lower()
    if rng.random() < 0.18:
        return text[:1].lower() + text[1:]
    return text


