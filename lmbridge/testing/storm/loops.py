"""The event loops that ask: each in a thread of its own, with several tasks.

Rule: a task's calls are judged like a thread's; a loop lasts one round, and may end with its tasks in the middle.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from lmbridge.messages import Response
from lmbridge.testing.storm.judge import Judge
from lmbridge.testing.storm.question import Question
from lmbridge.testing.storm.watch import Post, Watch

TASKS = 6  # on each loop


async def crowd(judge: Judge, watch: Watch, chance: Random, more: Callable[[], bool]) -> None:
    """Several tasks that ask until the round is over; in some rounds the loop ends before they do."""
    tasks = [asyncio.ensure_future(_work(judge, watch, Random(chance.random()), more)) for _ in range(TASKS)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED if chance.random() < 0.3 else asyncio.ALL_COMPLETED)


async def _work(judge: Judge, watch: Watch, chance: Random, more: Callable[[], bool]) -> None:
    scene = judge.scene
    post = watch.add(Post(watch, f"a task of {threading.current_thread().name}", lambda: scene.closed_at))
    post.task = asyncio.current_task()
    asker = AsyncCaller(judge, chance, post)
    try:
        while not scene.over.is_set() and not asker.leaves and more():
            await asker.ask()
    finally:
        post.leave()


class AsyncCaller:
    """One task of another loop that asks."""

    def __init__(self, judge: Judge, chance: Random, post: Post) -> None:
        self.leaves = False  # it was told that nobody is served here any more
        self._judge = judge
        self._scene = judge.scene
        self._chance = chance
        self._post = post

    async def ask(self) -> None:
        (way,) = self._chance.choices(list(_WAYS), list(_WAYS.values()))
        await way(self)
        await asyncio.sleep(0)  # a refusal at once must not hold the loop

    async def _failed(self, question: Question, error: BaseException, slots: int = 1, count: bool = True) -> None:
        self._judge.failed(question, error, slots, count)
        if self._scene.ends_with(error):
            self.leaves = True
        elif self._scene.plan.reject:
            await asyncio.sleep(self._chance.uniform(0.0, 0.01))

    async def _await(self, what: str, question: Question, coroutine: Coroutine[Any, Any, Any], slots: int = 1) -> Any:
        """What the coroutine returns; None when it raised. A cancelled task of one's own counts as a question left."""
        try:
            with self._post.waits(what, question.deadline):
                return await coroutine
        except asyncio.CancelledError:
            self._judge.made(0, slots)
            if not question.left:
                raise
        except BaseException as error:
            await self._failed(question, error, slots)
        return None

    async def infer(self) -> None:
        question = Question(self._chance)
        options = question.options()
        response = await self._await("ainfer", question, self._scene.bridge.ainfer(question.prompt, **options))
        if response is not None:
            self._judge.answered(question, response)

    async def infer_list(self) -> None:
        questions = [Question(self._chance) for _ in range(self._chance.randint(2, 9))]
        questions[0].request_id = None
        options, keep = questions[0].options(), self._chance.random() < 0.5
        prompts = [question.prompt for question in questions]
        coroutine = self._scene.bridge.ainfer(prompts, return_exceptions=keep, **options)
        answers = await self._await("a list on a loop", questions[0], coroutine, len(prompts))
        for question, answer in zip(questions, answers or (), strict=False):
            question.same_terms(questions[0])
            if isinstance(answer, Response):
                self._judge.answered(question, answer)
            else:
                await self._failed(question, answer, count=False)
                self._judge.made(0, 1)  # it may have ended before there was room to send it

    async def job(self) -> None:
        """One item or a list of them, for no text."""
        questions = [Question(self._chance) for _ in range(self._chance.randint(1, 5))]
        questions[0].request_id = questions[0].limit = None
        bridge, texts, options = self._scene.bridge, [one.text for one in questions], questions[0].options()
        coroutine = bridge.amap(texts, **options) if len(texts) > 1 else bridge.acall(texts[0], **options)
        found = await self._await("a job on a loop", questions[0], coroutine, len(texts))
        values = found if len(texts) > 1 else [found]
        for question, value in zip(questions, values if found is not None else (), strict=False):
            self._judge.did(question, value == ("done", question.text))

    async def cancel(self) -> None:
        """Ask in a task that is cancelled at some moment, perhaps before it has begun."""
        question = Question(self._chance)
        question.left = True
        options = question.options()
        task = asyncio.ensure_future(self._scene.bridge.ainfer(question.prompt, **options))
        try:
            if self._chance.random() < 0.5:
                await asyncio.sleep(self._chance.choice((0.0, 0.001, 0.01)))
            task.cancel()
            with self._post.waits("a cancelled task", time.monotonic()):
                await asyncio.wait([task])
        except asyncio.CancelledError:  # the loop ends, and with it whoever would have counted it
            self._judge.made(0, 1)
            raise
        if task.cancelled():
            self._judge.made(0, 1)
        elif task.exception() is not None:
            await self._failed(question, task.exception())
        else:
            self._judge.answered(question, task.result())

    async def stream(self) -> None:
        question = Question(self._chance)
        options = question.options()
        leaves = question.left = self._chance.random() < 0.3
        heard = ""
        try:
            stream = self._scene.bridge.astream(question.prompt, **options)
            if self._chance.random() < 0.5:
                with self._post.waits("the sending of a stream", question.deadline):
                    await stream
            with self._post.waits("a stream on a loop", question.deadline):
                async for delta in stream:
                    heard += delta.text
                    if leaves:
                        break
            await stream.aclose()
            response = stream.response
        except asyncio.CancelledError:
            self._judge.made(0, 1)
            raise
        except BaseException as error:
            await self._failed(question, error)
            return
        self._judge.answered(question, response)
        if not leaves and response.text != heard:
            self._judge.fault("mixed", f"a stream said {heard!r} and then answered {response.text!r}")

    async def read_twice(self) -> None:
        """Two tasks wait for the whole of one answer; both get it, or its error."""
        question = Question(self._chance)
        options = question.options()
        try:
            stream = self._scene.bridge.astream(question.prompt, **options)
            with self._post.waits("the whole of a stream, twice", question.deadline):
                ends = await asyncio.gather(stream.whole(), stream.whole(), return_exceptions=True)
        except asyncio.CancelledError:
            self._judge.made(0, 1)
            raise
        except BaseException as error:
            await self._failed(question, error)
            return
        self._judge.made(0, 1)  # the bridge may be closed, and then it was never sent
        for end in ends:
            if isinstance(end, BaseException):
                await self._failed(question, end, count=False)
            else:
                self._judge.answered(question, end, count=False)


_WAYS: dict[Callable[[AsyncCaller], Coroutine[Any, Any, None]], int] = {
    AsyncCaller.infer: 8, AsyncCaller.infer_list: 1, AsyncCaller.job: 2, AsyncCaller.cancel: 2,
    AsyncCaller.stream: 4, AsyncCaller.read_twice: 1,
}  # fmt: skip
