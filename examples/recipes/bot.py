"""A chat bot on an event loop, which goes on reading while it answers; users take turns.

Run it with ``python examples/recipes/bot.py``. The gateway is a fake, with three users who all write at once; Discord's
libraries call ``on_message`` in the same way.
"""

import asyncio

from lmbridge import Bridge, LMBridgeError


class Bot:
    def __init__(self, bridge):
        self.bridge = bridge

    async def on_message(self, author, text, send):
        try:
            answer = await self.bridge.ainfer(text, client=author, timeout=60)  # clients take turns
        except LMBridgeError as error:
            await send(author, f"Sorry, that did not work: {error}")
        else:
            await send(author, answer.text)


class FakeGateway:
    """Delivers what users wrote; the answers to several messages may be under way at once."""

    def __init__(self, written):
        self.written = written

    async def run(self, bot):
        async with asyncio.TaskGroup() as answering:
            for author, text in self.written:
                answering.create_task(bot.on_message(author, text, self.send))

    async def send(self, author, text):
        print(f"@{author}: {text}", flush=True)


if __name__ == "__main__":
    stories = [("ann", f"Tell me a story about {animal}.") for animal in ("a fox", "an owl", "a whale")]
    with Bridge("demo") as bridge:
        asyncio.run(FakeGateway([*stories, ("bob", "What is 2 + 3?"), ("cy", "")]).run(Bot(bridge)))
