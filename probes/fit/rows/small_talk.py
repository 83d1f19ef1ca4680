"""Friendly words around a request, whatever its label: what people write before and after what they want.

A statistic that weighs the newest tokens learns from requests that end with the request itself, and a harmless sentence
behind a harmful request then hides it. Rows of both labels get the same words here, so that they say nothing about it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from probes.fit.rows.example import Example

__all__ = ["UNSEEN_ENDINGS", "add_small_talk"]

_OPENINGS = (
    "Hi!",
    "Hello there.",
    "Good morning!",
    "Hey, how are you doing?",
    "Hi, I hope you are having a nice day.",
    "Hello, thank you for being here.",
    "Good evening, I have a question for you.",
    "I could use some help today.",
    "It has been a long day, so please bear with me.",
    "You helped me very well last time.",
    "I just came back from a walk with my dog.",
    "The weather is wonderful here today.",
    "My sister told me that you know a lot.",
    "I am new to this, so excuse me if it is a simple thing.",
    "Sorry to bother you.",
    "I have been wondering about something.",
    "First of all, I really like talking to you.",
    "We had pancakes for breakfast and now I have some time.",
    "I am on the train at the moment.",
    "Quick question.",
    "Before I forget it again:",
    "A friend and I were talking about this yesterday.",
)
_MESSAGES = 0.4
_ENDINGS = (
    "Thanks!",
    "Thanks a lot for your help.",
    "Thank you so much in advance.",
    "I really appreciate it.",
    "Have a great day!",
    "Best wishes",
    "Take your time, there is no hurry.",
    "Please keep it short.",
    "Please answer in full sentences.",
    "That would be very kind of you.",
    "Any help is welcome.",
    "I am looking forward to your answer.",
    "You are the best.",
    "Also, I hope that your day is going well.",
    "By the way, it is raining here.",
    "Afterwards I am going to bake a cake with my daughter.",
    "I love learning new things.",
    "My cat is sleeping next to me while I write this.",
    "Please use simple words.",
    "A list with bullet points would be nice.",
    "No rush at all.",
    "Tell me if anything is unclear.",
    "It is for a project that I work on.",
    "I will share it with my friends.",
    "What a lovely evening it is.",
    "I hope that this is not too much to ask.",
    "Greetings from the seaside",
    "Cheers",
    "I would be so happy about a good answer.",
    "Later I will cook soup for the whole family.",
)
UNSEEN_ENDINGS = (
    "Thank you!",
    "Many thanks and kind regards.",
    "I wish you a beautiful weekend.",
    "You have always been so patient with me.",
    "In the afternoon we will visit my grandmother in the country.",
    "Please number the steps.",
    "The flowers in our garden are blooming.",
    "Hope to hear from you soon!",
    "I am grateful for every hint.",
    "Let me know what you think.",
    "My son has just learned to ride a bicycle, we are so proud.",
    "Music is playing in the kitchen and the coffee is ready.",
)
"""Endings that ``add_small_talk`` never uses: for tests of what it brings."""


def add_small_talk(
    examples: Sequence[Example], share: float, rng: random.Random, *, messages: Sequence[str] = ()
) -> list[Example]:
    """Put friendly words before or behind a share of the rows, by the same rules whatever their label.

    Most get an ending, some an opening, some both, some two endings. Rows with several messages or with a response
    stay as they are.

    Args:
        examples: both labels.
        share: of the rows, 0 to 1; with 0 nothing is drawn.
        rng: what it is drawn with.
        messages: harmless ones; if there are any, one of them stands in the place of the friendly words in two of five
            of these rows.
    """
    if share == 0:
        return list(examples)
    return [
        replace(example, text=_surrounded(example.text, rng, messages))
        if not example.turns and not example.response and rng.random() < share
        else example
        for example in examples
    ]


def _surrounded(text: str, rng: random.Random, messages: Sequence[str]) -> str:
    request = text if text.endswith((".", "?", "!")) or rng.random() < 0.5 else f"{text}."  # noqa: PLR2004 - a coin
    if messages and rng.random() < _MESSAGES:
        message = rng.choice(messages)
        return rng.choice((f"{request} {message}", f"{message} {request}"))
    opening, first, second = rng.choice(_OPENINGS), *rng.sample(_ENDINGS, 2)
    forms = (
        f"{request} {first}",
        f"{request} {first}",
        f"{request} {first} {second}",
        f"{opening} {request}",
        f"{opening} {request} {first}",
    )
    return rng.choice(forms)
