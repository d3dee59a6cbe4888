"""Generated data: stories about animals, and raters who prefer the cheerful ones.

The true reward of a story is known, so that the demo can tell whether a model became better.
"""

import random
import re

ANIMALS = ["fox", "cat", "dog", "bear", "owl", "hen", "duck", "goat", "mouse", "frog", "horse", "wolf"]
THINGS = ["house", "tree", "river", "garden", "road", "stone", "boat", "cake", "song", "hat", "lamp", "door"]
CHEERFUL = ["happy", "kind", "bright", "warm", "sweet", "brave", "gentle", "lovely"]
GLOOMY = ["sad", "cruel", "dark", "cold", "bitter", "angry", "lonely", "broken"]
PLAIN = ["big", "small", "old", "green", "quiet", "tall", "round", "plain"]
FRAMES = (
    "The {animal} was {word}.",
    "It lived in a {word} {thing}.",
    "One day it saw a {word} {other}.",
    "It made a {word} {thing}.",
    "They sat by the {word} {thing}.",
    "In the end it felt {word}.",
)
SENTENCES = 3


def prompt(generator: random.Random) -> str:
    return f"Tell me about the {generator.choice(ANIMALS)}.\n"


def story(generator: random.Random, asked: str, cheerful: float, gloomy: float) -> str:
    """A story that answers the prompt `asked`. A word is cheerful or gloomy with these probabilities, else plain."""
    animal = asked.removeprefix("Tell me about the ").split(".")[0]
    frames = [FRAMES[0], *generator.sample(FRAMES[1:-1], SENTENCES - 2), FRAMES[-1]]
    return " ".join(
        frame.format(
            animal=animal,
            word=generator.choice(
                generator.choices((CHEERFUL, GLOOMY, PLAIN), (cheerful, gloomy, 1 - cheerful - gloomy))[0]
            ),
            thing=generator.choice(THINGS),
            other=generator.choice(ANIMALS),
        )
        for frame in frames
    )


def reward(text: str) -> int:
    """The true reward of a story: its cheerful words minus its gloomy words."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in CHEERFUL for word in words) - sum(word in GLOOMY for word in words)


def corpus(count: int, seed: int) -> list[dict[str, str]]:
    """Text for pretraining, more gloomy than cheerful."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        question = prompt(generator)
        rows.append({"text": question + story(generator, question, cheerful=0.2, gloomy=0.5)})
    return rows


def demonstrations(count: int, seed: int) -> list[dict[str, str]]:
    """Demonstrations for SFT, somewhat more cheerful than the corpus."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        question = prompt(generator)
        rows.append({"prompt": question, "completion": story(generator, question, cheerful=0.4, gloomy=0.3)})
    return rows


def preferences(count: int, seed: int, swap: bool = False) -> list[dict[str, str]]:
    """Pairs of answers. The one with the higher true reward is chosen; `swap` reverses that."""
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        question = prompt(generator)
        answers = sorted((story(generator, question, 0.4, 0.3) for _ in range(2)), key=reward)
        if reward(answers[0]) != reward(answers[1]):
            rejected, chosen = reversed(answers) if swap else answers
            rows.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    return rows
