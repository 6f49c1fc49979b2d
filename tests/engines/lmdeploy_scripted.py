"""LMDeploy with its GPU executor, and nothing else, replaced by a scripted one; and how an engine over it is made.

Pipeline of a request here: LMDeploy's real AsyncEngine, sessions, Engine, scheduler, block manager, inputs maker and
loop. What they send to the GPU arrives at ``ScriptedExecutor``, whose model answers a prompt with the prompt's own
tokens and ends, or begins again where it is not allowed to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.engine.executor.base import ExecutorBase
from lmdeploy.pytorch.engine.model_agent.agent import BatchedLogProbs, BatchedOutputs

from lmbridge.engines.lmdeploy import LMDeployEngine
from tests.engines import conftest
from tests.engines.conftest import EOS


@dataclass
class Cues:
    """What a test tells the executor, from any thread, and what the executor has seen.

    Attributes:
        step_time: seconds a step takes.
        crash: raised by the next step.
        hang: steps end no more.
        block: the next step blocks the loop itself until this event is set.
        prefills: the sampling inputs of each request that arrived.
        steps: steps made.
        tokens: tokens made, the ending ones included.
    """

    step_time: float = 0.001
    crash: BaseException | None = None
    hang: bool = False
    block: Any = None
    prefills: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    released: int = 0
    _stepped: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def step(self, tokens: int) -> None:
        with self._stepped:
            self.steps += 1
            self.tokens += tokens
            self._stepped.notify_all()

    def wait_for(self, holds: Callable[[Cues], bool]) -> None:
        """Block until ``holds`` is true of what the executor has seen; any thread but the engine's."""
        with self._stepped:
            assert self._stepped.wait_for(lambda: holds(self), 60), f"it does not come to that: {self}"


@dataclass
class Row:
    """One sequence of the batch."""

    prompt: list[int]
    stop: set[int]
    bad: set[int]
    room: int
    said: int = 0

    def next_token(self) -> int:
        turn = self.said % (len(self.prompt) + 1)
        self.said += 1
        token = EOS if turn == len(self.prompt) else self.prompt[turn]
        return self.prompt[0] if token in self.bad else token


class ScriptedExecutor(ExecutorBase):  # type: ignore[misc]
    """Steps in the order they were sent, as a GPU would."""

    def __init__(self, cues: Cues, num_blocks: int, **parts: Any) -> None:
        super().__init__(device_type="cpu", **parts)
        self._cues = cues
        self._rows: list[Row] = []
        self.cache_config.num_gpu_blocks = self.cache_config.num_gpu_blocks or num_blocks
        self.cache_config.num_cpu_blocks = 0

    def init(self) -> None:
        pass

    def get_input_processor(self) -> None:
        return None

    def start(self, forward_event: asyncio.Event) -> None:
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def wait_tasks(self) -> None:
        await asyncio.Event().wait()

    def stop(self) -> None:
        pass

    def release(self) -> None:
        self._cues.released += 1

    async def forward_async(self, inputs: dict[str, Any]) -> None:
        self._sent.put_nowait(dict(inputs))

    async def get_output_async(self) -> BatchedOutputs:
        sent = await self._sent.get()
        await asyncio.sleep(self._cues.step_time)
        if self._cues.block is not None:
            self._cues.block.wait(30)
        if self._cues.crash is not None:
            raise self._cues.crash
        if self._cues.hang:
            await asyncio.Event().wait()
        return self._step(sent)

    def _step(self, sent: dict[str, Any]) -> BatchedOutputs:
        if sent["delta"] is not None:
            self._rows = [self._rows[place] for place in sent["delta"].indice_cpu.tolist()]
        rows = self._rows
        if sent["inputs"] is not None:
            rows = self._arrivals(sent)
            self._rows = self._rows + rows
        tokens = [row.next_token() for row in rows]
        self._cues.step(len(tokens))
        stopped = [token in row.stop or row.said >= row.room for token, row in zip(tokens, rows, strict=True)]
        ids = torch.tensor(tokens)
        ends = torch.tensor([0 if ends else -1 for ends in stopped])  # 0.16 and 0.17 look at it always
        losses = torch.tensor([float(sum(row.prompt[1:])) for row in rows])  # of a prompt: one that its tokens tell
        return BatchedOutputs(
            ids, torch.tensor(stopped), ends, logprobs=_logprobs(ids, sent), ce_loss=losses, new_token_timestamp=0
        )

    def _arrivals(self, sent: dict[str, Any]) -> list[Row]:
        inputs, sampling = sent["inputs"], sent["sampling_inputs"]
        rows = []
        prompts = inputs.input_ids[0].split(inputs.seq_length.tolist())
        for place, prompt in enumerate(prompts):
            room = int(sent["stopping_criteria"].num_appendable_ids[place])
            stop = _words(sampling.stop_words, place)
            bad = _words(sampling.bad_words, place)
            rows.append(Row(prompt.tolist(), stop, bad, room))
            self._cues.prefills.append(_seen(sampling, place))
        return rows


def _words(words: torch.Tensor | None, place: int) -> set[int]:
    return set() if words is None else {int(word) for word in words[place] if word >= 0}


def _seen(sampling: Any, place: int) -> dict[str, Any]:
    """What of the request's sampling fields has come through; None where the whole batch needs none."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "random_seeds", "top_k")
    seen: dict[str, Any] = {}
    for name in names:
        values = getattr(sampling, name)
        seen[name] = None if values is None else values[place].item()
    return {**seen, "max_top_k": sampling.max_top_k}


def _logprobs(ids: torch.Tensor, sent: dict[str, Any]) -> BatchedLogProbs | None:
    """The token itself at -1, then the most likely ones: the token again, and those after it."""
    count = sent["sampling_inputs"].max_num_logprobs
    if not count or count < 0:
        return None
    indices = torch.stack([ids, *[(ids + shift) % 256 for shift in range(count)]], dim=1)
    vals = torch.tensor([[-1.0, *[-1.0 - shift for shift in range(count)]]] * len(ids))
    return BatchedLogProbs(vals, indices)


@contextlib.contextmanager
def scripted_gpu(num_blocks: int = 256) -> Iterator[Cues]:
    """While open, LMDeploy builds the scripted executor, and neither looks for a GPU nor asks how large it is."""
    cues = Cues()

    def build(model_path: str, **parts: Any) -> ScriptedExecutor:
        model_config = ModelConfig.from_pretrained(
            model_path, dtype=parts.pop("dtype"), dist_config=parts["dist_config"], device_type="cuda"
        )
        parts.pop("distributed_executor_backend")
        parts.pop("device_type")
        return ScriptedExecutor(cues, num_blocks, model_path=model_path, model_config=model_config, **parts)

    with (
        mock.patch("lmdeploy.pytorch.engine.engine.build_executor", build),
        mock.patch("lmdeploy.pytorch.envs.enable_check_env", False),
        mock.patch("lmdeploy.pytorch.engine.config_builder.get_max_batch_size", return_value=128),
    ):
        yield cues


class Driver(conftest.Driver):
    """Calls an LMDeploy engine as the server would."""

    engine: Any  # LMDeployEngine

    def __init__(self, engine: LMDeployEngine) -> None:
        super().__init__(cast(Any, engine))


@contextlib.asynccontextmanager
async def driven(model: str, **options: Any) -> AsyncIterator[Driver]:
    """A started engine, closed in the end."""
    engine = LMDeployEngine(model, **{"backend": "pytorch", "max_batch_size": 4, **options})
    driver = Driver(engine)
    try:
        await engine.start()
        yield driver
    finally:
        await engine.close()
