"""What the calls of a Pipeline give: LMDeploy's own and the drop-in, by the same calls.

Run: ``python -m tests.compat.calling {lmdeploy,lmbridge} MODEL``; it prints as JSON what was seen of each call, in the
words of the table in docs/moving/from-lmdeploy.rst. LMDeploy is all there; only the executor that drives the GPU is
scripted: it answers a prompt with the prompt.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from tests.engines.lmdeploy_scripted import Cues, scripted_gpu

CALLS: dict[str, Callable[[Caller], str]] = {}
TEMPLATE = (
    "{{ tools | length if tools else '' }}{{ reasoning_effort or '' }}{{ '' if enable_thinking is not defined else "
    "enable_thinking }}{% for message in messages %}{{ message.content }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


class Caller:
    """One pipeline, with all that a call needs."""

    def __init__(self, library: Any, model: str, cues: Cues) -> None:
        self.library = library
        self.cues = cues
        self._model = model
        fields = {"session_len": 200, "max_batch_size": 2, "enable_metrics": False}
        self.pipe = library.pipeline(
            model, backend_config=library.PytorchEngineConfig(**fields), log_level="CRITICAL", vision_config=None
        )

    def config(self, **fields: Any) -> Any:
        return self.library.GenerationConfig(**fields)

    def ask(self, prompt: Any = "abc", **more: Any) -> Any:
        """The prompt as it is, and its answer."""
        return self.pipe(prompt, do_preprocess=False, **more)


def call(name: str) -> Callable[[Callable[[Caller], str]], Callable[[Caller], str]]:
    def register(scenario: Callable[[Caller], str]) -> Callable[[Caller], str]:
        def told(caller: Caller) -> str:
            try:
                return scenario(caller)
            except BaseException as error:
                return _name(error)

        CALLS[name] = told
        return scenario

    return register


def _name(error: BaseException) -> str:
    """The kinds of errors that it may be caught as, the most telling first."""
    kinds = [kind for kind in (AssertionError, ValueError, AttributeError) if isinstance(error, kind)]
    return ", ".join(kind.__name__ for kind in kinds) or type(error).__name__


def said(response: Any) -> str:
    """An answer's text, or what it failed of."""
    if isinstance(response, list):
        return "; ".join(map(said, response))
    if response.finish_reason == "error":
        return f"failed: ``{response.error_code}``"
    return f"``{response.text}``"


# ------------------------------------------------------------------------------------------ arguments of the template


def templated(name: str, **arguments: Any) -> None:
    @call(name)
    def scenario(caller: Caller) -> str:
        return said(caller.pipe("abc", **arguments))


templated("``enable_thinking=False``", enable_thinking=False)
templated("``chat_template_kwargs={…}``", chat_template_kwargs={"enable_thinking": True})
templated('``reasoning_effort="low"``', reasoning_effort="low")
templated("``tools=[…]``", tools=[TOOL])
templated("``max_new_tokens=1`` as keyword", max_new_tokens=1)
templated("``session_ids=[3]``", session_ids=[3])
templated('``adapter_name="none such"``', adapter_name="none such")


# ---------------------------------------------------------------------------------------------------------- configs


def configured(name: str, prompt: str = "abc", **fields: Any) -> None:
    @call(name)
    def scenario(caller: Caller) -> str:
        return said(caller.ask(prompt, gen_config=caller.config(**fields)))


configured("``max_new_tokens=0``", max_new_tokens=0)
configured("``min_new_tokens=9``, ``max_new_tokens=9``", min_new_tokens=9, max_new_tokens=9)
configured("``min_new_tokens=9``, ``max_new_tokens=2``", min_new_tokens=9, max_new_tokens=2)
configured('``bad_words=["b"]``', bad_words=["b"])
configured("``bad_token_ids=[65]``", bad_token_ids=[65])
configured('``stop_words=["b"]``', stop_words=["b"])
configured('``stop_words=["bc"]``', "abcd", stop_words=["bc"])
configured("``include_stop_str_in_output``", include_stop_str_in_output=True)
configured("the same with a stop word", stop_words=["b"], include_stop_str_in_output=True)
configured("a ``response_format`` that is none", response_format={"type": "poem"})
configured('``output_logits="all"``', output_logits="all")
configured("``n=2``", n=2)


@call("``GenerationConfig(top_p=2)``")
def wrong_value(caller: Caller) -> str:
    return str(caller.config(top_p=2))


@call("one bad config of two")
def bad_in_list(caller: Caller) -> str:
    configs = [caller.config(max_new_tokens=0), caller.config()]
    return said(caller.ask(["abc", "xyz"], gen_config=configs))


@call("``gen_config={}``")
def no_config(caller: Caller) -> str:
    return said(caller.ask(gen_config={"top_k": 1}))


# ---------------------------------------------------------------------------------------------------------- streams


@call("``input_token_len`` of a stream's parts")
def prompt_length(caller: Caller) -> str:
    parts = list(caller.pipe.stream_infer("abc", do_preprocess=False))
    return str(sorted({part.input_token_len for part in parts}))


@call("parts without text, ended by ``stop``")
def empty_parts(caller: Caller) -> str:
    return str(sum(not part.text for part in slow(caller)))


@call("parts without text, ended by ``length``")
def empty_parts_of_length(caller: Caller) -> str:
    return str(sum(not part.text for part in slow(caller, gen_config=caller.config(max_new_tokens=2))))


def slow(caller: Caller, **more: Any) -> list[Any]:
    caller.cues.step_time = 0.02  # each step is a part of its own
    parts = list(caller.pipe.stream_infer("abc", do_preprocess=False, **more))
    caller.cues.step_time = 0.001
    return parts


@call("a second ``for`` over a stream")
def second_loop(caller: Caller) -> str:
    stream = caller.pipe.stream_infer("abc", do_preprocess=False)
    first = ""
    for part in stream:
        first += part.text
        break
    rest = "".join(part.text for part in stream)
    return "goes on where the first stopped" if first + rest == "abc" else f"gives {rest!r}"


@call("``stream_response=False``")
def whole(caller: Caller) -> str:
    parts = list(caller.pipe.stream_infer("abc", do_preprocess=False, stream_response=False))
    return "one part" if len(parts) == 1 else "parts as they come"


@call("``stream_infer(…, sessions=3)``")
def by_number(caller: Caller) -> str:
    return f"``{''.join(part.text for part in caller.pipe.stream_infer('abc', 3, do_preprocess=False))}``"


# ----------------------------------------------------------------------------------------------------------- scores


@call("``get_ppl([…])``")
def perplexity(caller: Caller) -> str:
    return str(caller.pipe.get_ppl([[1, 2, 3], [4, 6]]))


@call("``get_ppl([1])``")
def perplexity_of_one(caller: Caller) -> str:
    return str(caller.pipe.get_ppl([1]))


@call("``get_reward_score``, no reward model")
def reward(caller: Caller) -> str:
    return str(caller.pipe.get_reward_score([1, 2]))


# ----------------------------------------------------------------------------------------------------------- images


def pictured(name: str, prompt: Callable[[], Any]) -> None:
    @call(name)
    def scenario(caller: Caller) -> str:
        with seen_by_preprocess() as seen:
            answered = caller.pipe(prompt())  # a model without eyes refuses what has reached it
        return shapes(seen[0]) if seen else said(answered)


@contextlib.contextmanager
def seen_by_preprocess() -> Iterator[list[Any]]:
    """The messages that reach LMDeploy's own preprocessing."""
    from lmdeploy.serve.processors import MultimodalProcessor

    seen: list[Any] = []
    asked = MultimodalProcessor.get_prompt_input

    async def get_prompt_input(self: Any, prompt: Any, *rest: Any, **more: Any) -> Any:
        seen.append(prompt)
        return await asked(self, prompt, *rest, **more)

    with mock.patch.object(MultimodalProcessor, "get_prompt_input", get_prompt_input):
        yield seen


def shapes(messages: Any) -> str:
    """The types of a message's parts, in order."""
    [message] = messages
    return ", ".join(part["type"] for part in message["content"])


def image() -> Any:
    from PIL import Image

    return Image.new("RGB", (2, 2))


pictured("a pair of text and URL: parts", lambda: ("what?", "http://localhost/a.png"))
pictured("a pair of image and text: parts", lambda: (image(), "what?"))
pictured("a pair of text and images: parts", lambda: ("what?", [image(), image()]))
pictured("a pair of text and path", lambda: ("what?", "/a.png"))
pictured(
    "a message with a path: parts",
    lambda: [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/a.png"}}]}],
)


@call("a pair of text and numpy array")
def array(caller: Caller) -> str:
    import numpy as np

    return said(caller.pipe(("what?", np.zeros((2, 2, 3)))))


# ------------------------------------------------------------------------------------------------- what else there is


@call("``pipe.backend_config``")
def resolved(caller: Caller) -> str:
    config = caller.pipe.backend_config
    return f"{config.num_gpu_blocks} blocks of the cache"


def attributes(names: Sequence[str]) -> None:
    for name in names:

        @call(f"``pipe.{name}``")
        def scenario(caller: Caller, name: str = name) -> str:
            return "is there" if getattr(caller.pipe, name) else ""


attributes(["async_engine", "session_mgr", "generate"])


@call("``version_info``, ``Tokenizer``, ``vl``")
def names(caller: Caller) -> str:
    import importlib

    root = caller.library.__name__
    load_image = importlib.import_module(f"{root}.vl").load_image
    response_types = importlib.import_module(f"{root}.messages").ResponseType
    tokenizer = caller.library.Tokenizer(caller._model)
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert callable(load_image)
    return f"{caller.library.version_info}, {len(response_types)} ResponseTypes"


def main(side: str, model: str) -> None:
    if side == "lmdeploy":
        import lmdeploy as library
    else:
        from lmbridge.compat import lmdeploy as library
    with scripted_gpu() as cues:
        caller = Caller(library, model, cues)
        for name, seen in CALLS.items():
            print(json.dumps([name, seen(caller)]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
