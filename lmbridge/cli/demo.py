"""Watch threads share one model.

Eight threads ask eight different questions at once, and each streams its own
answer. For comparison, they then ask one at a time behind a lock. Finally a
thread leaves its stream halfway, and the engine stops working on that answer.
The exit status is 0 only if every answer reached the thread that asked for it.

For the bundled model, the demo knows the right answers. For another model, it
compares the beginning of each answer with those that the questions got one at a
time: an answer must be most like that of its own question.
"""

from __future__ import annotations

import argparse
import re
import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmbridge.cli import values
from lmbridge.cli.demo_view import Screen, View, choose_view
from lmbridge.cli.faults import in_words
from lmbridge.cli.model import add_model_arguments, loaded
from lmbridge.cli.terminal import one_line, program
from lmbridge.messages import GenerationConfig, Response

if TYPE_CHECKING:
    from lmbridge.bridge import Bridge

SUMMARY = "watch eight threads share one model"
USAGE = "[OPTION ...] [MODEL]"
EXAMPLES = """\
  lmbridge demo
  lmbridge demo --threads 16
  lmbridge demo ./my-model --option device=cpu
"""
TOKENS, OTHER_TOKENS = 400, 64  # most tokens per answer: of the bundled model, and of others, which are larger
BREAK_AFTER = 10  # tokens read of the stream that is left halfway
SETTLED = 0.2  # seconds for which the engine's token count must stand still to be final
PATIENCE = 10.0  # seconds to wait for that

# Each thread's question, and a word that occurs in the bundled model's right answer and in no other answer here.
QUESTIONS = (
    ("Write a long story about a fox.", "fox"),
    ("What is the capital of France?", "Paris"),
    ("Write a long story about an owl.", "owl"),
    ("What is 37 + 48?", "85"),
    ("Write a long story about a bear.", "bear"),
    ("What colour is a flamingo?", "pink"),
    ("Write a long story about a wolf.", "wolf"),
    ("What is the opposite of friend?", "enemy"),
    ("Write a long story about a penguin.", "penguin"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Write a long story about a tiger.", "tiger"),
    ("What is 21 + 72?", "93"),
    ("Write a long story about a hedgehog.", "hedgehog"),
    ("What colour is lavender?", "purple"),
    ("Write a long story about a dolphin.", "dolphin"),
    ("What is the opposite of success?", "failure"),
)


@dataclass
class Turn:
    """One question and its outcome. Written by its own thread only; the view reads it at any time."""

    thread: str
    prompt: str
    word: str | None  # occurs in the right answer only; None if that is not known
    state: str = "waiting"
    text: str = ""
    response: Response | None = None
    error: Exception | None = None

    @property
    def right(self) -> bool:
        """Whether the answer is right, as far as it shows without the other answers."""
        return self.response is not None and (self.word is None or says(self.response.text, self.word))

    @property
    def tokens(self) -> int:
        return 0 if self.response is None else self.response.usage.completion_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    group = parser.add_argument_group("the demo")
    group.add_argument(
        "--threads",
        metavar="N",
        type=values.between(1, len(QUESTIONS)),
        default=8,
        help=f"threads that ask, 1 to {len(QUESTIONS)} (default: 8)",
    )
    group.add_argument(
        "--tokens",
        metavar="N",
        type=values.between(BREAK_AFTER + 1),
        help=f"most tokens per answer (default: {TOKENS}, or {OTHER_TOKENS} for a model other than demo)",
    )


def run(arguments: argparse.Namespace) -> int:
    bundled = arguments.model == "demo"
    tokens = arguments.tokens or (TOKENS if bundled else OTHER_TOKENS)
    with loaded(arguments) as bridge:
        view = choose_view()
        good = show(bridge, arguments.threads, view, tokens=tokens, words=bundled)
    view.say(what_next("" if bundled else f" {shlex.quote(arguments.model)}"))
    return 0 if good else 1


def what_next(model: str) -> str:
    """The commands to try after this one."""
    steps = {
        f"{program()} chat{model}": "chat with this model",
        f"{program()} serve{model}": "serve it: a web page and OpenAI's API",
        f"{program()} --help": "list all commands",
    }
    width = max(map(len, steps))
    return "\n".join(["\nNext:", *(f"  {command:{width}}  {what}" for command, what in steps.items())])


def show(bridge: Bridge, threads: int, view: View, *, tokens: int = TOKENS, words: bool = True) -> bool:
    """Run the whole demo on a ready bridge; return whether every answer reached its own thread.

    Args:
        tokens: most tokens per answer.
        words: check answers by the words in ``QUESTIONS``.
    """
    config = GenerationConfig(max_new_tokens=tokens)  # greedy: the same prompt gets the same answer every time
    bridge.infer("Hello!", max_new_tokens=4)  # an engine's first request is slower than the others
    at_once, together = new_turns(threads, words), 0.0
    with view.screen(f"{threads} threads ask one model at once", at_once) as screen:
        together = run_threads(at_once, lambda turn: stream_answer(bridge, turn, config, screen))
    in_turn, one_by_one = new_turns(threads, words), 0.0
    lock = threading.Lock()
    with view.screen("The same, one at a time behind a lock", in_turn, passing=True) as screen:
        one_by_one = run_threads(in_turn, lambda turn: infer_behind(lock, bridge, turn, config, screen))
    view.say(comparison(at_once, together, in_turn, one_by_one))
    view.say(leave_by_break(bridge, max(at_once, key=lambda turn: turn.tokens), config))
    return verdict(at_once, in_turn, view)


# --- asking ---


def new_turns(count: int, words: bool = True) -> list[Turn]:
    return [
        Turn(f"thread {number}", prompt, word if words else None)
        for number, (prompt, word) in enumerate(QUESTIONS[:count], start=1)
    ]


def run_threads(turns: list[Turn], work: Callable[[Turn], None]) -> float:
    """Run ``work`` for each turn in its own thread, all at once; return the seconds until the last one ended."""

    def worker(turn: Turn) -> None:
        try:
            work(turn)
        except Exception as error:
            turn.error = error
        turn.state = "done" if turn.right else "failed"

    threads = [threading.Thread(target=worker, args=(turn,), name=turn.thread) for turn in turns]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - began


def stream_answer(bridge: Bridge, turn: Turn, config: GenerationConfig, screen: Screen) -> None:
    """Ask, and show the answer as it arrives."""
    turn.state = "answering"
    stream = bridge.stream(turn.prompt, config)
    for delta in stream:
        turn.text += delta.text
        screen.grew(turn, delta.text)
    turn.response = stream.response
    screen.grew(turn, "\n")


def infer_behind(lock: threading.Lock, bridge: Bridge, turn: Turn, config: GenerationConfig, screen: Screen) -> None:
    """Ask with the lock held, as threads must if they cannot share the model."""
    with lock:
        turn.state = "answering"
        turn.response = bridge.infer(turn.prompt, config)
    turn.text = turn.response.text


# --- results ---


def comparison(at_once: list[Turn], together: float, in_turn: list[Turn], one_by_one: float) -> str:
    """The measured ratio."""
    tokens, tokens_in_turn = (sum(turn.tokens for turn in turns) for turns in (at_once, in_turn))
    same = f"{tokens} tokens each" if tokens == tokens_in_turn else f"{tokens} and {tokens_in_turn} tokens"
    return (
        f"All at once: {together:.1f} s. One at a time behind a lock: {one_by_one:.1f} s ({same}).\n"
        f"Sharing the model was {one_by_one / together:.1f} times as fast here."
    )


def leave_by_break(bridge: Bridge, turn: Turn, config: GenerationConfig) -> str:
    """Leave the longest answer's stream halfway, and say how many tokens the engine generated for it."""
    before = engine_count(bridge)
    seen = 0
    for delta in bridge.stream(turn.prompt, config):
        seen += len(delta.token_ids)
        if seen >= BREAK_AFTER:
            break
    made = engine_count(bridge) - before
    return (
        f"One thread left its stream after {seen} of {turn.tokens} tokens: the engine generated {made}\n"
        f"of them, and saved {turn.tokens - made}."
    )


def engine_count(bridge: Bridge) -> int:
    """The tokens that the engine has generated since it started, once that number stands still.

    If the engine counts no tokens, its steps: a request that is alone gets one token per step.
    """
    count, since, began = -1.0, 0.0, time.monotonic()
    while (now := time.monotonic()) - began < PATIENCE:
        stats = bridge.stats()
        latest = stats.get("tokens", stats.get("steps", 0.0))
        if latest != count or stats.get("in_flight", 0.0):
            count, since = latest, now
        elif now - since >= SETTLED:
            break
        time.sleep(SETTLED / 10)
    return int(count)


def verdict(at_once: list[Turn], in_turn: list[Turn], view: View) -> bool:
    """Say whether every answer reached its own thread, and which did not."""
    turns = at_once + in_turn
    lost = [turn for turn in turns if not turn.right or turn.thread not in owners(turn, in_turn)]
    for line in dict.fromkeys(_what_came(turn, in_turn) for turn in lost):
        view.say(line)
    if lost:
        view.say(f"{len(lost)} of {len(turns)} answers did not reach their own thread.")
    else:
        view.say(f"Every one of the {len(turns)} answers reached its own thread.")
    return not lost


def owners(turn: Turn, in_turn: list[Turn]) -> list[str]:
    """The threads whose answer this may be, judged by the words or by the answers that came one at a time."""
    if turn.response is None:
        return []
    text = turn.response.text
    if turn.word is not None:
        return sorted({other.thread for other in in_turn if other.word and says(text, other.word)})
    alone = {other.thread: other.response.text for other in in_turn if other.response is not None}
    shared = {thread: _shared_length(text, other) for thread, other in alone.items()}
    return sorted(thread for thread, length in shared.items() if length == max(shared.values()))


def _shared_length(one: str, other: str) -> int:
    """The length of the common beginning of two strings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))


def _what_came(turn: Turn, in_turn: list[Turn]) -> str:
    asked = f"{turn.thread} asked {turn.prompt!r} and got"
    if turn.response is None:
        return f"{asked} an error: {in_words(turn.error) if turn.error else ''}"
    others = owners(turn, in_turn)
    whose = f", the answer of {' or '.join(others)}" if others else ""
    return f"{asked} {one_line(turn.response.text)[:60]!r}{whose}"


def says(text: str, word: str) -> bool:
    """Whether ``text`` contains ``word`` as a whole word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
