"""A server thread polls the queues of two client threads and serves them on a loop of its own, forever."""

import asyncio
from queue import Empty, Queue
from threading import Thread
from typing import Any

from lmdeploy import PytorchEngineConfig, pipeline

QUESTIONS = ["What is the capital of France?", "What is the capital of Japan?"]


async def serve_one(pipe: Any, asked: "Queue[str]", answered: "Queue[Any]") -> None:
    while True:
        try:
            question = asked.get_nowait()
        except Empty:
            await asyncio.sleep(0)
        else:
            answered.put(await pipe.async_batch_infer(question))


def serve(pairs: Any) -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    pipe = pipeline("models/a-chat-model", backend_config=PytorchEngineConfig(thread_safe=True))
    tasks = [loop.create_task(serve_one(pipe, *pair)) for pair in pairs]
    print(f"serving {len(tasks)} clients", flush=True)
    loop.run_forever()


def ask(question: str, asked: "Queue[str]", answered: "Queue[Any]") -> None:
    asked.put(question)
    print(f"{answered.get().text}\n", end="", flush=True)  # in one piece: two clients print


pairs: Any = [(Queue(), Queue()) for _ in QUESTIONS]
Thread(target=serve, args=(pairs,)).start()
clients = [Thread(target=ask, args=(question, *pair)) for question, pair in zip(QUESTIONS, pairs, strict=True)]
for client in clients:
    client.start()
for client in clients:
    client.join()
print("all are answered", flush=True)
