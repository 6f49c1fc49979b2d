"""Gradio: a chat whose answers grow on the page; all visitors share one model.

Run it with ``python examples/recipes/gradio_app.py`` and open http://127.0.0.1:7860.
"""

import gradio

from lmbridge import Bridge

bridge = Bridge("demo")


def reply(message, history, request: gradio.Request):
    messages = [{"role": turn["role"], "content": text_of(turn)} for turn in history]
    messages.append({"role": "user", "content": message})
    text = ""
    for delta in bridge.stream(messages, client=request.session_hash, timeout=120):
        text += delta.text
        yield text


def text_of(turn):
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


page = gradio.ChatInterface(reply, concurrency_limit=64)  # without it, one answer at a time

if __name__ == "__main__":
    with bridge:  # loads before the page is served
        page.launch()
