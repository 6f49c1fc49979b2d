"""Measures how well a model folder answers the closed world.

The rule of this module: only the folder is judged, loaded as any user would load it, and only by
questions that training never showed in that form. Run it as ``evaluate.py FOLDER``.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import world
from chats import draw_story, training_turn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from world import Question

Message = dict[str, str]
STORY_LIMIT = 300


@dataclass(frozen=True)
class Case:
    """A question behind some earlier messages."""

    history: tuple[Message, ...]
    question: Question


@dataclass(frozen=True)
class Answer:
    """What the model said, how many tokens that took, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Measure:
    """How many answers of one sort were right."""

    name: str
    right: int
    asked: int

    def __str__(self) -> str:
        return f"{self.name}: {self.right} of {self.asked} ({100 * self.right / self.asked:.1f}%)"


class Model:
    """A language model with its tokenizer, asked greedily and in batches."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> Model:
        """The model of a folder, in float32."""
        disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder))

    def answers(self, cases: Sequence[Case], limit: int = STORY_LIMIT, batch: int = 48) -> list[Answer]:
        """The answer to every case, in the same order."""
        prompts = [self._prompt(case) for case in cases]
        order = sorted(range(len(cases)), key=lambda index: len(prompts[index]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            answers.update(zip(chosen, self._generate([prompts[i] for i in chosen], limit), strict=True))
        return [answers[index] for index in range(len(cases))]

    def _prompt(self, case: Case) -> str:
        """The chat of a case, up to where the model is to speak."""
        messages = [*case.history, {"role": "user", "content": case.question.text}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _generate(self, prompts: list[str], limit: int) -> list[Answer]:
        """The greedy answers to a few prompts at once."""
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            rows = self._model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=limit, do_sample=False,
                eos_token_id=self._tokenizer.eos_token_id, pad_token_id=self._tokenizer.pad_token_id,
            )
        return [self._answer(row) for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]

    def _answer(self, tokens: list[int]) -> Answer:
        """The answer that the generated tokens hold."""
        end = self._tokenizer.eos_token_id
        spoken = list(itertools.takewhile(lambda token: token != end, tokens))
        return Answer(self._tokenizer.decode(spoken), len(spoken), end in tokens)


def measure(name: str, model: Model, cases: Sequence[Case]) -> Measure:
    """Ask all the cases and count the right answers; one that does not end by itself is wrong."""
    pairs = zip(cases, model.answers(cases), strict=True)
    right = sum(answer.ended and world.is_right(case.question, answer.text) for case, answer in pairs)
    return Measure(name, right, len(cases))


def all_measures(model: Model, seed: int = 7) -> list[Measure]:
    """Every number of the model card."""
    rng = random.Random(seed)
    questions = held_out_questions(rng)
    measures = [measure(name, model, [Case((), one) for one in asked]) for name, asked in questions.items()]
    for name, history in _HISTORIES.items():
        cases = [Case(history(rng), _any_of(questions, rng)) for _ in range(200)]
        measures.append(measure(name, model, cases))
    hurried = [Case((), hurry(_any_of(questions, rng), rng)) for _ in range(200)]
    return [*measures, measure("Any of these, typed in a hurry", model, hurried)]


def quick_measures(model: Model, seed: int = 7) -> list[Measure]:
    """The same numbers on a part of the questions, for a glance during training."""
    rng = random.Random(seed)
    return [measure(name, model, [Case((), one) for one in rng.sample(asked, min(len(asked), 48))])
            for name, asked in held_out_questions(rng).items()]


def held_out_questions(rng: random.Random) -> dict[str, list[Question]]:
    """Questions that training never shows, by the name of their measure; small talk is known by heart."""
    return {
        "Capitals, held-out ways to ask": list(world.held_out_capitals()),
        "Capitals, each country once": [
            world.capital_question(rng.choice(world.CAPITAL_PHRASINGS), country) for country in world.CAPITALS
        ],
        "Sums, held-out pairs": list(world.held_out_sums(rng)),
        "Colours, held-out ways to ask": list(world.held_out_colours()),
        "Opposites, held-out ways to ask": list(world.held_out_opposites()),
        "Stories, held-out ways to ask": list(world.held_out_stories()),
        "Small talk": [world.small_talk_question(text) for text in world.SMALL_TALK],
        "Other messages, held-out": [world.unknown_question(text) for text in world.HELD_OUT_MESSAGES],
    }


def hurry(question: Question, rng: random.Random) -> Question:
    """The question with the small changes of a hurried user."""
    return replace(question, text=world.with_small_changes(question.text, rng))


def _any_of(questions: dict[str, list[Question]], rng: random.Random) -> Question:
    """A question of any of the measures, each as likely as the other."""
    return rng.choice(rng.choice(tuple(questions.values())))


def _turns_before(rng: random.Random) -> tuple[Message, ...]:
    """One to four earlier turns of any kind."""
    return _messages([training_turn(rng) for _ in range(rng.randint(1, 4))])


def _unseen_system_message(rng: random.Random) -> tuple[Message, ...]:
    """A system message that training never shows."""
    return ({"role": "system", "content": rng.choice(world.HELD_OUT_SYSTEM_MESSAGES)},)


def _stories_before(rng: random.Random) -> tuple[Message, ...]:
    """Two or three earlier stories, so many that a last one still fits the context."""
    return _messages([draw_story(rng) for _ in range(rng.randint(2, 3))])


_HISTORIES: dict[str, Callable[[random.Random], tuple[Message, ...]]] = {
    "Any of these, later in a chat": _turns_before,
    "Any of these, under an unseen system message": _unseen_system_message,
    "Any of these, after two or three stories": _stories_before,
}


def _messages(turns: Sequence[Question]) -> tuple[Message, ...]:
    """The turns as chat messages with their reference answers."""
    pairs = (({"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.answer})
             for turn in turns)
    return tuple(itertools.chain.from_iterable(pairs))


def as_table(measures: Sequence[Measure]) -> str:
    """The measures as a Markdown table."""
    rows = [f"| {one.name} | {one.asked} | {100 * one.right / one.asked:.1f}% |" for one in measures]
    return "\n".join(("| Asked | Questions | Right |", "| --- | ---: | ---: |", *rows))


def main() -> None:
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(description="Measure how well a model folder answers the closed world.")
    parser.add_argument("folder", type=Path, help="a transformers model folder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads to use (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(as_table(all_measures(Model.load(options.folder))))


if __name__ == "__main__":
    main()
