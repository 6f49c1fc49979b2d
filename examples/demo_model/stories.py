"""Stories about an animal, put together from sentences.

The rule of this module: a story has one hero, the animal asked for, and names no other animal. Every
animal has its own favourites among the plots and sentences, so that even a model which always takes
the likeliest word tells each animal's story differently.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from world import Animal, capitalised, with_article

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Plot:
    """One trouble and how it ends; each part holds sentences to choose from."""

    trouble: tuple[str, ...]
    attempt: tuple[str, ...]
    advice: tuple[str, ...]
    ending: tuple[str, ...]


ADJECTIVES: tuple[str, ...] = (
    "curious", "cheerful", "clever", "shy", "brave", "gentle", "sleepy", "patient", "proud", "tiny",
    "old", "lonely", "merry", "stubborn", "thoughtful", "quiet",
)
HELPERS: tuple[str, ...] = (
    "gardener", "miller", "baker", "fisherman", "lighthouse keeper", "grandmother", "clockmaker",
    "sailor", "schoolgirl", "carpenter", "painter", "postman",
)
OPENINGS: tuple[str, ...] = (
    "Once upon a time there was {hero} who lived {home}.",
    "Long ago {hero} lived {home}.",
    "There was once {hero}, and it lived all alone {home}.",
    "Far away from here, {home}, there lived {hero}.",
    "Not so very long ago {hero} made its home {home}.",
    "This is the story of {hero} who lived {home}.",
)
HABITS: tuple[str, ...] = (
    "Every morning the {name} ate {food} for breakfast and watched the clouds go by.",
    "The {name} loved {food} more than anything else in the world.",
    "Everybody knew that the {name} would go a whole mile for {food}.",
    "When the day was done, the {name} shared {food} with anyone who came along.",
    "On Sundays the {name} hid some {food} for a rainy day and then forgot where.",
    "Nobody could smell {food} from as far away as the {name}.",
)
FEELINGS: tuple[str, ...] = (
    "The {name} sighed so deeply that the leaves trembled.",
    "For a while the {name} only sat there and wondered what to do.",
    "The {name} did not want to give up, not even for a minute.",
    "A small tear rolled down, but the {name} wiped it away.",
    "The {name} thought about it all afternoon and half the evening.",
)
NIGHTS: tuple[str, ...] = (
    "That night the moon was round and bright, and the {name} could not sleep at all.",
    "When evening came, the {name} counted the stars and felt a little better.",
    "It rained the whole night, and the {name} dreamed of a warm kitchen.",
    "The {name} slept badly and got up long before the sun.",
)
JOURNEYS: tuple[str, ...] = (
    "So the {name} packed a bag full of {food} and set out to look for help.",
    "Early the next day the {name} left a note on the door and started on a long journey.",
    "The {name} travelled past seven hills and seven lakes without stopping once.",
    "With a brave step the {name} went down the road, for somebody had to know what to do.",
)
WEATHERS: tuple[str, ...] = (
    "The air was clear, the road was dusty, and somewhere a church bell was ringing.",
    "A soft rain began to fall, and the whole world smelled of earth and flowers.",
    "The sun was low, and the shadows on the path grew longer and longer.",
    "A cool wind blew from the mountains and carried the smell of fresh bread.",
)
CELEBRATIONS: tuple[str, ...] = (
    "In the evening there was a feast with music, and the {name} danced until midnight.",
    "The whole village clapped, and the children made a crown of flowers for the {name}.",
    "There was {food} for everyone, and nobody went home before the lamps were out.",
    "Somebody played the fiddle, and the {name} had to tell everything three times.",
)
MEETINGS: tuple[str, ...] = (
    "Then an unexpected visitor came along the path: a {helper} with a heavy bag.",
    "Just then a {helper} stopped and asked the {name} what was wrong.",
    "Around the next corner the {name} met a {helper} who had time to listen.",
    "A {helper} heard about it and came to sit down beside the {name}.",
)
THANKS: tuple[str, ...] = (
    "The {name} thanked the {helper} with a big portion of {food}.",
    "The {helper} laughed with joy, and the {name} laughed too.",
    "From then on the {helper} and the {name} were the best of friends.",
    "To say thank you, the {name} gave the {helper} the last of the {food}.",
)
CLOSINGS: tuple[str, ...] = (
    "And if you pass by on a quiet evening, you may still see the {name} smile.",
    "That night the {name} fell asleep with a happy heart.",
    "And so the {name} lived happily for many years.",
    "Since that day the {name} has told this tale to everyone who wants to hear it.",
    "The {name} never forgot how good it is to ask for help.",
    "That is how the {name} learned that small steps lead to great things.",
)
PLOTS: tuple[Plot, ...] = (
    Plot(
        ("One day the {name} forgot its favourite song. The tune was gone, and the valley felt too quiet.",
         "Then the favourite song of the {name} disappeared, as if the wind had taken it away."),
        ("The {name} hummed high and hummed low, but no note sounded right.",
         "It tried to whistle, but only a thin squeak came out."),
        ('"Listen to the water first," said the {helper}, "and the song will follow."',),
        ("So the {name} sat still and listened, and little by little the tune came back.",
         "The {name} listened to the stream, and all at once the whole song was there again."),
    ),
    Plot(
        ("One evening a small star fell from the sky and landed right in front of the {name}.",
         "Late one night the {name} found a fallen star, which was cold and afraid."),
        ("The {name} threw the star up as high as it could, but it always came down again.",
         "The {name} built a tower of stones, but the sky was still much too far away."),
        ('"A star is as light as a wish," said the {helper}. "Tell it your best one."',),
        ("The {name} whispered a wish, and the star rose up and shone brighter than all the others.",
         "So the {name} wished it a good journey, and the star floated home."),
    ),
    Plot(
        ("One autumn day a great storm blew away the roof over its head.",
         "Then a storm came, wilder than any before, and the home of the {name} was broken."),
        ("The {name} held the walls together, but the wind was stronger.",
         "The {name} made a new roof out of leaves, but the rain came through."),
        ('"Let us build with stones this time," said the {helper}, "one after the other."',),
        ("They worked for three days, and the new house of the {name} stood as firm as a castle.",
         "Stone by stone the {name} built a better house, and no storm ever moved it."),
    ),
    Plot(
        ("One morning a thick white fog came down, and the {name} could not find the way home.",
         "The {name} went for a long walk, and suddenly everything was hidden in fog."),
        ("The {name} went left and then right, but every tree looked the same.",
         "It called out loud, but only the echo answered."),
        ('"Follow the sound of my bell," said the {helper}, "and take one step at a time."',),
        ("The {name} followed the bell through the fog until its own front door appeared.",
         "Step by step the {name} went after the sound, and at noon it was home again."),
    ),
    Plot(
        ("There was to be a great race, and the {name} was afraid of coming last.",
         "The {name} wanted to win the summer race, but everyone said it was far too slow."),
        ("It ran up and down the hill until it was out of breath.",
         "The {name} practised in secret, but stumbled over every stone."),
        ('"Do not look at the others," said the {helper}. "Look at the road."',),
        ("On the great day the {name} looked only at the road and was the first to cross the line.",
         "The {name} ran its own race, and when it looked up, everybody was cheering."),
    ),
    Plot(
        ("One day the {name} found a golden key, but nobody knew which door it opened.",
         "Under a stone the {name} discovered a little key that sparkled in the light."),
        ("The {name} tried it on every door in the village, but it fitted none of them.",
         "It turned the key in every lock it could find, but nothing happened."),
        ('"The smallest door is often the right one," said the {helper}.',),
        ("Behind a bush the {name} found a tiny door, and behind the door there was a secret garden.",
         "So the {name} looked for the smallest door of all and found a room full of books."),
    ),
    Plot(
        ("That summer no rain fell for many weeks, and even the deepest well ran dry.",
         "One hot summer all the water disappeared, and the {name} was very thirsty."),
        ("The {name} dug a hole here and a hole there, but found only dust.",
         "It danced for rain, but the sky stayed blue and empty."),
        ('"Dig where the grass is still green," said the {helper}.',),
        ("The {name} dug under the last green patch, and clear water bubbled up for everyone.",
         "There the {name} found a hidden spring, and soon the whole valley was green again."),
    ),
    Plot(
        ("There was only one trouble: the {name} was afraid of the dark.",
         "But as soon as the sun went down, the {name} saw strange shadows everywhere."),
        ("The {name} lit a candle, but then the shadows only danced.",
         "It shut both eyes, but that made the night even darker."),
        ('"Say hello to the shadows," said the {helper}. "They are only shy."',),
        ("The {name} said hello, and the largest shadow turned out to be its own.",
         "So the {name} waved at its shadow, and the shadow waved back like a friend."),
    ),
    Plot(
        ("One day an old woman asked a riddle: what grows when you give it away?",
         "A letter came for the {name} with a riddle in it: what grows when you share it?"),
        ("The {name} guessed a stone, a cloud and a loaf of bread, but all of that was wrong.",
         "The {name} looked for the answer in a thick book, but found only pictures."),
        ('"You have it with you all the time," said the {helper} with a wink.',),
        ('"It is kindness!" cried the {name}, and that was the right answer.',
         "Then the {name} understood that the answer was friendship."),
    ),
    Plot(
        ("But the {name} had nobody to play with, and the days were long.",
         "The {name} had everything it needed except a friend."),
        ("The {name} wrote a letter and sent it down the river, but no answer came.",
         "It set the table for two, but the other chair stayed empty."),
        ('"Open your door and put a lamp in the window," said the {helper}.',),
        ("The {name} did so, and before long its home was full of laughing guests.",
         "The light was seen from far away, and soon the {name} had more friends than chairs."),
    ),
    Plot(
        ("One day the old bridge fell into the river, and nobody could get across.",
         "In spring the flood took the bridge away, and the {name} stood alone on one side."),
        ("The {name} tried to jump, but landed in the cold water with a splash.",
         "It pushed a log into the river, but the log drifted away."),
        ('"Tie the rope to both banks first," said the {helper}.',),
        ("With a long rope the {name} made a new bridge, and the first to cross it was a wedding party.",
         "The {name} held the rope tight, and by sunset a fine new bridge was ready."),
    ),
    Plot(
        ("Tomorrow was a birthday party, and the {name} had no present at all.",
         "The {name} wanted to give the queen a present, but its pockets were empty."),
        ("The {name} made a cake, but it burned as black as coal.",
         "It picked a bunch of flowers, but they faded on the way."),
        ('"Give something that only you can make," said the {helper}.',),
        ("So the {name} made up a poem, and everybody said it was the finest present of all.",
         "The {name} painted a small picture, and it hung on the palace wall for ever."),
    ),
    Plot(
        ("One day the {name} planted a strange blue seed, but nothing came out of the ground.",
         "A traveller had given the {name} a magic seed, but it did not want to grow."),
        ("The {name} poured so much water on it that the whole place turned to mud.",
         "It shouted at the seed to hurry, but the seed slept on."),
        ('"A seed needs time," said the {helper}, "and a little song in the morning."',),
        ("The {name} waited and sang, and in May a flower as tall as a house opened up.",
         "After a hundred mornings the {name} saw a green tip, and then a tree full of lanterns."),
    ),
    Plot(
        ("One windy day the red kite of the {name} flew off and did not come back.",
         "The {name} had a red kite, but the string broke and the kite sailed away."),
        ("The {name} climbed the highest hill, but the kite was only a dot in the sky.",
         "It ran after the kite until the road came to an end."),
        ('"The wind always turns in the evening," said the {helper}. "Wait here with me."',),
        ("In the evening the wind turned, and the kite came down right at the feet of the {name}.",
         "The {name} waited, and with the last light of the day the kite came sailing home."),
    ),
)


def tell_story(animal: Animal, length: str, rng: random.Random) -> str:
    """A story about the animal: ``short``, ``medium`` or ``long``."""
    plot = rng.choice(_favourites(animal, "plot", PLOTS))
    adjective = rng.choice(_favourites(animal, "adjective", ADJECTIVES))
    words = {
        "name": animal.name, "home": animal.home, "food": animal.food,
        "hero": with_article(f"{adjective} {animal.name}"),
        "helper": rng.choice(_favourites(animal, "helper", HELPERS)),
    }
    sentences = (rng.choice(_favourites(animal, "sentence", part)) for part in _parts(plot, length))
    return " ".join(capitalised(sentence.format(**words)) for sentence in sentences)


def _parts(plot: Plot, length: str) -> list[Sequence[str]]:
    """The parts that a story of this length is made of, in order."""
    solution = [MEETINGS, plot.advice, plot.ending]
    if length == "short":
        return [OPENINGS, plot.trouble, *solution, CLOSINGS]
    if length == "medium":
        return [OPENINGS, HABITS, plot.trouble, plot.attempt, *solution, THANKS, CLOSINGS]
    search = [FEELINGS, plot.attempt, NIGHTS, JOURNEYS, WEATHERS]
    return [OPENINGS, HABITS, plot.trouble, *search, *solution, THANKS, CELEBRATIONS, CLOSINGS]


def _favourites(animal: Animal, part: str, choices: Sequence[_Choice]) -> Sequence[_Choice]:
    """The few of these choices that stories about this animal use, the same ones every time."""
    return random.Random(f"{animal.name} {part} {len(choices)}").sample(choices, min(3, len(choices)))
