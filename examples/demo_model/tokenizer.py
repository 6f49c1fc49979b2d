"""The tokenizer of the demo model: byte-level BPE with single digits and four chat marks.

The rule of this module: every text comes back from its tokens unchanged, whatever bytes it holds, and
a word of the closed world is one token wherever the vocabulary has room for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import world
from chats import training_chats
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
ROLES = (SYSTEM, USER, ASSISTANT)
SPECIAL_TOKENS = (PAD, *ROLES, END)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('The roles of this model are system, user and assistant.') }}"
    "{%- endif -%}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def train_tokenizer(seed: int, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on chats of the closed world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(mark, special=True, normalized=False) for mark in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=context,
        additional_special_tokens=[*ROLES],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _corpus(seed: int) -> Iterator[str]:
    """Chats, then the facts many times over, so that rare words become whole tokens too."""
    for chat in itertools.islice(training_chats(seed), 3000):
        for turn in chat.turns:
            if turn.kind != "fallback":
                yield turn.text
                yield turn.answer
    for _ in range(20):
        yield from _facts()


def _facts() -> Iterator[str]:
    """Every fact of the closed world and every chat message known by heart, once."""
    for country, capital in world.CAPITALS.items():
        yield f"The capital of {country} is {capital}."
    for thing, colour in world.COLOURS.items():
        yield f"{world.capitalised(thing)} {thing} is {colour}."
    for word, other in world.OPPOSITES.items():
        yield f"The opposite of {word} is {other}."
    for animal in world.ANIMALS:
        yield f"A story about {animal.phrase} {animal.home} with {animal.food}."
    yield from world.SMALL_TALK
    yield from world.SYSTEM_MESSAGES
    yield world.FALLBACK
