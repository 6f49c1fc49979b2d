"""The fields of responses: their values, and how they are handled.

Rule: data only, like the table of chats, whose fields apply here too unless this table overrides them. Members of
``text`` and ``reasoning`` are separate fields, with a dot in their names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmbridge.flask.openai.fields import BOOL, OBJECT, TEXT, Kind
from lmbridge.flask.openai.responses.functions import TOOL, nested_choice, read_flat
from lmbridge.flask.openai.table import CHAT, EFFORT, LOGPROBS, TOKENS, Fate, Field
from lmbridge.tools import MOST_TOOLS

LOGPROBS_INCLUDED = "message.output_text.logprobs"


# --- what fields hold ---


def _is_input(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value))


def _is_format(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    if value.get("type") != "json_schema":
        return value.get("type") in ("text", "json_object")
    told = [(value.get("name"), str), (value.get("schema"), dict)]
    may = [(value.get("strict"), bool), (value.get("description"), str)]
    return all(isinstance(given, kind) for given, kind in [*told, *(each for each in may if each[0] is not None)])


def _nested_format(value: dict[str, Any]) -> dict[str, Any]:
    """Convert a format to the form of chats."""
    if value["type"] != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {name: each for name, each in value.items() if name != "type"}}


def _left_out(hint: str) -> Kind:
    return Kind(lambda value: value in (False, 0, "", [], {}), f"left out ({hint})")


INPUT = Kind(_is_input, "a string or a list of at least one item")
FORMAT = Kind(
    _is_format,
    '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "name": "…", "schema": {…}}',
)
TOOLS = Kind(
    lambda value: isinstance(value, list) and len(value) <= MOST_TOOLS, f"a list of at most {MOST_TOOLS} objects {TOOL}"
)
CHOICE = Kind(
    lambda value: nested_choice(value) is not None,
    'none, auto, required, {"type": "function", "name": …} or {"type": "allowed_tools", "mode": …, "tools": […]}',
)
TEXTS = Kind(
    lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value), "a list of strings"
)
FACTS = Kind(
    lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "an object of strings",
)
SUMMARIES = Kind(lambda value: value in ("auto", "concise", "detailed"), "auto, concise or detailed")
TRUNCATION = Kind(lambda value: value in ("auto", "disabled"), "auto or disabled")

# --- different from chats ---

_SERVED = (
    Field(
        "input", INPUT,
        "a string is a message of the user's. Types of items: message (roles user, assistant, system, developer; "
        "content a string or parts input_text, output_text, text and refusal), function_call, function_call_output, "
        "reasoning, item_reference",
    ),
    Field("instructions", TEXT, "none; a system message put first, before one at the beginning of the input"),
    Field("max_output_tokens", TOKENS, "what fits into the model's context", option="max_new_tokens"),
    Field(
        "include", TEXTS, f"none; {LOGPROBS_INCLUDED} adds log-probabilities. Other members have no effect",
        option="logprobs",
    ),
    Field("top_logprobs", LOGPROBS, f"0; above 0, {LOGPROBS_INCLUDED} is implied", option="logprobs"),
    Field("text", OBJECT, "none; its verbosity has no effect"),
    Field(
        "text.format", FORMAT,
        '{"type": "text"}; otherwise the answer is JSON that follows the schema, if max_output_tokens suffices',
        option="response_format", neutral=({"type": "text"},), convert=_nested_format,
    ),
    Field("reasoning", OBJECT, "none"),
    Field(
        "reasoning.effort", EFFORT, "none; a variable for the chat template, which may ignore it",
        option="chat_template_kwargs",
    ),
    Field(
        "reasoning.summary", SUMMARIES,
        "none; with any of them, reasoning items have their full text, unsummarized, as summary instead of content",
    ),
    Field("reasoning.generate_summary", SUMMARIES, "none; the older name of reasoning.summary"),
    Field("store", BOOL, "true: later requests may refer to the answer's items for a while; false: they may not"),
    Field("include_reasoning", BOOL, "true; false: no reasoning items", option="separate_reasoning"),
    Field(
        "tools", TOOLS, "none; functions that the model may call", option="tools", neutral=([],), convert=read_flat
    ),
    Field(
        "tool_choice", CHOICE, "auto; none hides the tools from the model, required or a function's name forces a call",
        option="tool_choice", neutral=("auto",), convert=nested_choice,
    ),
    Field("metadata", FACTS, "none; returned with the answer"),
    Field("truncation", TRUNCATION, "disabled; auto means the same: input that does not fit is an error"),
    replace(CHAT["min_tokens"], note="0; at most max_output_tokens"),
    replace(CHAT["seed"], note="none"),
)  # fmt: skip


def _other(fate: Fate, kind: Kind, *names: str, note: str = "") -> tuple[Field, ...]:
    return tuple(Field(name, kind, note, fate) for name in names)


_UNKEPT = _left_out("this server stores no conversations: send the whole conversation as input")
_REFUSED = (
    *_other("refused", _UNKEPT, "previous_response_id", "conversation", "previous_input_messages"),
    *_other("refused", _left_out("this server stores no prompts: send instructions and input"), "prompt"),
    *_other(
        "refused",
        _left_out("this server stores no answers: wait for the answer, or stream it"),
        "background",
        note="true",
    ),
    *_other(
        "refused", Kind(lambda value: value == 1, "1 or left out (a request has one answer)"), "n", note="other than 1"
    ),
    *_other("refused", _left_out("send input instead"), "messages"),
    *_other(
        "refused", _left_out("send max_output_tokens instead"), "max_tokens", "max_completion_tokens", "max_new_tokens"
    ),
    *_other("refused", _left_out("send text.format instead"), "response_format"),
    *_other("refused", _left_out("send reasoning.effort instead"), "reasoning_effort"),
    *_other("refused", _left_out(f"send include with {LOGPROBS_INCLUDED} instead"), "logprobs"),
    *_other("refused", _left_out("only chats and completions support it"), "return_token_ids", "prompt_logprobs"),
    *_other("refused", _left_out("it is not supported"), "enable_response_messages"),
)
_IGNORED = _other(
    "ignored", Kind(lambda value: True, "anything"),
    "access_programs", "background_options", "context_management", "image", "max_tool_calls", "stream_options",
)  # fmt: skip

_OWN = {field.name: field for field in (*_SERVED, *_REFUSED, *_IGNORED)}
RESPONSES = {**_OWN, **{name: field for name, field in CHAT.items() if name not in _OWN}}
