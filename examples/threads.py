"""A server and two clients: two threads send their prompts to one model at the same time.

Run it with ``python examples/threads.py``. The server thread, with the event loop and the model, is the
bridge's. (The bundled model knows little of lions and giraffes; ``Bridge("Qwen/Qwen3-0.6B")`` knows more.)
"""

from __future__ import annotations

from threading import Thread

from lmbridge import Bridge

PROMPTS = ("Hakuna Matata", "giraffes are heartless creatures")


def client(bridge: Bridge, prompt: str) -> None:
    print(f"{prompt} -> {bridge.infer(prompt).text}\n", end="")


if __name__ == "__main__":
    with Bridge("demo") as bridge:
        clients = [Thread(target=client, args=(bridge, prompt)) for prompt in PROMPTS]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
