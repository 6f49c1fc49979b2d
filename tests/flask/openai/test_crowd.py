"""Many streams at once, over plain sockets' worth of HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.flask.openai.conftest import PATIENCE, Served

STREAMS = 64


def test_64_streams_answer_their_own_question(demo: Served) -> None:
    """64 clients stream at once, each with its own question and settings; none gets another's answer."""

    def ask(number: int) -> str:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"What is {number} + 30?"}],
            "temperature": 0 if number % 2 else 0.2,
            "seed": number,
            "stream": True,
        }
        text, ended = "", False
        with requests.post(f"{demo.url}/chat/completions", json=body, stream=True, timeout=PATIENCE) as response:
            assert response.status_code == 200
            for line in response.iter_lines(chunk_size=1):
                if line == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: "):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert ended
        return text

    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(ask, range(STREAMS)))
    assert all(text.startswith(f"{number} + 30 = ") for number, text in enumerate(answers)), answers
    wrong = [text for number, text in enumerate(answers) if text != f"{number} + 30 = {number + 30}."]
    assert len(wrong) <= 2, wrong  # the model itself errs in one sum of a hundred
    assert demo.bridge.requests() == []
