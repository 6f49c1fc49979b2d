"""A loop is set, the pipeline is built, and another loop gathers two answers of it."""

import asyncio
from typing import Any

from lmdeploy import PytorchEngineConfig, pipeline

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
pipe = pipeline("models/a-chat-model", backend_config=PytorchEngineConfig())


async def ask_both() -> tuple[Any, Any]:
    return await asyncio.gather(
        pipe.async_batch_infer("What is the capital of France?"),
        pipe.async_batch_infer("What is the capital of Japan?"),
    )


for answer in asyncio.run(ask_both()):
    print(answer.text)
