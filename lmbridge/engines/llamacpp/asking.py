"""Translates a request to the JSON of llama.cpp's server.

Rule: pure functions of a request and a loaded model; any thread. Every sampling field is always given, since
llama.cpp's defaults sample (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmbridge.engines.dialect.spelling import calls_schema
from lmbridge.engines.dialect.telling import told, written_out
from lmbridge.engines.llamacpp.forms import Form
from lmbridge.engines.llamacpp.loading import Model
from lmbridge.errors import InvalidRequestError
from lmbridge.messages import GenerationConfig, Message, Request
from lmbridge.tools import Calling

_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")  # in the order of the other engines
_SEEDS = (1 << 32) - 1  # the highest means a seed of llama.cpp's choice


@dataclass(frozen=True)
class Asked:
    """A request for llama.cpp.

    Attributes:
        body: JSON.
        chat: it is a conversation.
        form: the form of the answer.
    """

    body: str = field(repr=False)
    chat: bool
    form: Form | None


def asked_of(request: Request, model: Model) -> Asked:
    """The request for llama.cpp.

    Raises:
        InvalidRequestError: the prompt is empty or of an unknown kind, or options contradict each other.
    """
    config, prompt = request.config, request.prompt
    fields = {**_usual(config, model), **_sampling(config, model)}
    if config.form is not None and config.calling is not None:
        raise InvalidRequestError(f"llama.cpp cannot combine {config.form.param} with tools; give only one.", "tools")
    form = _form(config)
    if form is not None:
        fields["grammar"] = form.grammar
    bare = isinstance(prompt, str) and (request.raw or not model.header.has_template)
    chat = not bare and (isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping)))
    if chat:
        fields.update(_chat(prompt, config, model))
    else:
        _refuse_chat_fields(config)
        fields["prompt"] = prompt if isinstance(prompt, str) else _ids(prompt, model)
    try:
        body = json.dumps(fields, allow_nan=False, ensure_ascii=False)
        body.encode()  # unpaired surrogates are not text; two that meet would become one character
        return Asked(body, chat, form)
    except (TypeError, ValueError, RecursionError) as cause:
        raise InvalidRequestError(f"The prompt cannot be written as JSON: {cause}.", "prompt") from None


def _form(config: GenerationConfig) -> Form | None:
    """The form of the answer; a required call is a form too."""
    if config.calling is not None and config.calling.required:
        return Form(calls_schema(config.calling, None))
    return None if config.form is None else Form(config.form)


def _usual(config: GenerationConfig, model: Model) -> dict[str, Any]:
    counts = bool(config.stop_words or config.stop_token_ids)  # an answer that we stop gets no final count
    return {
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,  # a message before each chunk of a prompt, at which it can be stopped
        "timings_per_token": counts,
        "max_tokens": min(config.max_new_tokens, model.room),  # it counts in 32 bits
        "n_probs": max(1, config.logprobs or 0),  # with it come the token ids
        "post_sampling_probs": config.logprobs is None,  # free, while the others need the vocabulary sorted
    }


def _sampling(config: GenerationConfig, model: Model) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "samplers": _SAMPLERS,
        "temperature": 0.0,
        "repeat_penalty": 1.0 if config.repetition_penalty is None else config.repetition_penalty,
        "repeat_last_n": model.room,
        "ignore_eos": config.ignore_eos,
    }
    if config.samples:
        fields |= {
            "temperature": 1.0 if config.temperature is None else config.temperature,
            "top_k": min(config.top_k or 0, model.header.vocabulary),
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "min_p": config.min_p or 0.0,
        }
        if config.random_seed is not None:
            fields["seed"] = config.random_seed % _SEEDS
    if config.logit_bias:
        _known(config.logit_bias, model, "logit_bias")
        fields["logit_bias"] = [[token, bias] for token, bias in config.logit_bias.items()]
    return fields


def _chat(prompt: Any, config: GenerationConfig, model: Model) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [_message(each) for each in prompt]
    if not model.header.has_template:
        raise InvalidRequestError(
            "The model has no chat template, so it cannot take messages; give a string.", "prompt"
        )
    begins = config.add_generation_prompt
    fields: dict[str, Any] = {
        "add_generation_prompt": not config.continue_final_message if begins is None else begins,
        "continue_final_message": config.continue_final_message,
        "chat_template_kwargs": dict(config.chat_template_kwargs or {}),
        # without it, the mark of a thought opened by the prompt would precede the constrained text
        "reasoning_format": "auto" if config.separate_reasoning or config.calling or config.form else "none",
    }
    if not model.knows_tools:
        messages = written_out(messages)
    if config.calling is not None:
        messages, more = _told(messages, config.calling, model)
        fields.update(more)
    return {**fields, "messages": messages}


def _told(messages: list[Message], calling: Calling, model: Model) -> tuple[list[Message], dict[str, Any]]:
    """The conversation and the fields for a model that may or must call functions.

    We write and read a required call ourselves: llama.cpp 11549 does not constrain the answer for most templates
    (``tool_choice`` "required" with those of Qwen, Llama, Mistral and DeepSeek), and detects no call if the template
    has no tools.
    """
    if not calling.required and not model.knows_tools:
        raise InvalidRequestError(
            "The model's chat template does not support tools, so the model cannot choose whether to call one. Use "
            'tool_choice "required", or name the function: its arguments will follow their schema.',
            "tools",
        )
    tools = {"tools": calling.tools} if model.knows_tools else {}
    if not calling.required:
        return messages, {**tools, "tool_choice": "auto", "parallel_tool_calls": calling.parallel}
    if not model.knows_tools:
        messages = told(messages, calling.tools)
    return messages, {**tools, "tool_choice": "none"}


def _refuse_chat_fields(config: GenerationConfig) -> None:
    for name in ("tools", "chat_template_kwargs"):
        if getattr(config, name):
            raise InvalidRequestError(f"{name} need a chat template, which this prompt does not use.", name)


def _message(message: Any) -> Message:
    spoken = isinstance(message, Mapping) and isinstance(message.get("role"), str)
    if not spoken or ("content" not in message and "tool_calls" not in message):
        raise InvalidRequestError(f"A message is a dict with 'role' and 'content', not {message!r:.80}.", "prompt")
    return dict(message)


def _ids(prompt: Any, model: Model) -> list[int]:
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidRequestError("A prompt is a non-empty string, list of messages or list of token ids.", "prompt")
    _known(prompt, model, "prompt")
    return list(prompt)


def _known(tokens: Any, model: Model, param: str) -> None:
    """Refuse invalid ids, which llama.cpp would misinterpret."""
    size = model.header.vocabulary
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
            raise InvalidRequestError(f"Token ids are ints from 0 to {size - 1}, not {token!r:.80}.", param)
