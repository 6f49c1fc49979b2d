"""The fields of chats and completions: their values, and how they are handled.

Rule: data only, one table for each of the two routes. Bodies are read by it, and the table in the documentation is
generated from it. An unsupported field that would change the answer is refused by name; any other, known or unknown,
is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lmbridge.flask.openai.fields import BOOL, LARGEST_ID, OBJECT, TEXT, Kind, are_ids, integer, number, plain_ids
from lmbridge.flask.openai.functions import read_functions
from lmbridge.tools import MOST_TOOLS, read_choice

Fate = Literal["served", "refused", "ignored"]

MAX_CHOICES = 128  # answers per request: prompts times n
MAX_LOGPROBS = 20
MAX_STOPS = 32  # the server thread searches every new piece of text for each
MAX_STOP_LENGTH = 1000  # characters
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
LONGEST = 10**9  # seconds
GREEDY = 1e-5  # lower temperatures count as 0: dividing scores by them would overflow

_TOKEN_ID = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        name: its name in the client's JSON.
        kind: its valid values; for a refused field, the values without effect.
        note: its default, and other remarks.
        option: the field of GenerationConfig that it sets; None if it does not depend on the engine.
        neutral: values without effect.
        convert: converts the client's value to GenerationConfig's; None if other fields are involved.
    """

    name: str
    kind: Kind
    note: str = ""
    fate: Fate = "served"
    option: str | None = None
    neutral: tuple[Any, ...] = ()
    convert: Callable[[Any], Any] | None = None


# --- what fields hold ---


def _is_stop(value: object) -> bool:
    words = [value] if isinstance(value, str) else value
    return (
        isinstance(words, list)
        and len(words) <= MAX_STOPS
        and all(isinstance(word, str) and 0 < len(word) <= MAX_STOP_LENGTH for word in words)
    )


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_BIASES
        and all(_TOKEN_ID.fullmatch(token) and int(token) <= LARGEST_ID for token in value)
        and all(map(number(-100, 100).holds, value.values()))
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _are_prompts(value: object) -> bool:
    if _is_text(value) or are_ids(value):
        return True
    return isinstance(value, list) and bool(value) and (all(map(_is_text, value)) or all(map(are_ids, value)))


def _is_format(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") in ("text", "json_object", "json_schema")


_FORMS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "json": lambda schema: {"json": schema},
    "json_object": lambda wanted: {"json": {"type": "object"}},
    "regex": lambda pattern: {"regex": pattern},
    "choice": lambda texts: {"choice": texts},
    "grammar": lambda text: {"lark": text},
}
"""vLLM's names for the form of an answer, and their conversion to GenerationConfig's ``grammar``."""


def _forms(value: dict[str, Any]) -> list[str]:
    return [name for name in _FORMS if value.get(name) not in (None, False)]


def _is_one_form(value: object) -> bool:
    return isinstance(value, dict) and len(_forms(value)) == 1 and not value.get("structural_tag")


def _form_of(value: dict[str, Any]) -> dict[str, Any]:
    (name,) = _forms(value)
    return _FORMS[name](value[name])


FORMAT = Kind(_is_format, 'an object of type "text", "json_object" or "json_schema"')
ONE_FORM = Kind(_is_one_form, f"an object with one of {', '.join(_FORMS)}")
TOOLS = Kind(
    lambda value: isinstance(value, list) and len(value) <= MOST_TOOLS,
    f'a list of at most {MOST_TOOLS} objects {{"type": "function", "function": …}}',
)
CHOICE = Kind(
    lambda value: read_choice(value) is not None,
    'none, auto, required, {"type": "function", "function": {"name": …}}, or an object of type allowed_tools',
)
GIVEN = Kind(lambda value: True, "a grammar")  # the engine checks it
STOP = Kind(_is_stop, f"a string or a list of at most {MAX_STOPS} strings, each of 1 to {MAX_STOP_LENGTH:,} characters")
STOP_IDS = Kind(
    lambda value: value == [] or (are_ids(value) and len(value) <= MAX_STOP_TOKENS),
    f"a list of at most {MAX_STOP_TOKENS} token ids",
    plain_ids,
)
BIAS = Kind(_is_bias, f'an object of at most {MAX_BIASES:,} token ids to numbers from -100 to 100: {{"50256": -100}}')
PROMPTS = Kind(
    _are_prompts,
    "a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
    plain_ids,
)
MESSAGES = Kind(lambda value: isinstance(value, list) and bool(value), "a list of at least one message")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
EFFORT = Kind(lambda value: value in EFFORTS, f"one of {', '.join(EFFORTS)}")
COUNT = integer(1, MAX_CHOICES)
TOKENS = integer(1, LARGEST_ID)
TOKENS_OR_NONE = integer(0, LARGEST_ID)
LOGPROBS = integer(0, MAX_LOGPROBS)
PENALTY = number(-2, 2)
SECONDS = number(0, LONGEST)


def _nothing(hint: str) -> Kind:
    return Kind(lambda value: value in (False, 0, "", [], {}), f"left out ({hint})")


def _only(value: object, expected: str) -> Kind:
    """Exactly that value: to Python 1 equals True, so also compare whether both are bools."""
    return Kind(lambda given: given == value and isinstance(given, bool) == isinstance(value, bool), expected)


_NOTHING = _nothing("it is not supported")
_NO_CHOICE = Kind(lambda value: value in ("none", "auto"), '"none" or left out (there are no functions to call)')
_ONLY_TEXT = _only(["text"], 'left out or ["text"] (this server generates text only)')

# --- what is served ---


def _in_engine(
    name: str, kind: Kind, option: str, note: str, *neutral: Any, convert: Callable[[Any], Any] = lambda value: value
) -> Field:
    return Field(name, kind, note, option=option, neutral=neutral, convert=convert)


_SAMPLING = (
    _in_engine(
        "temperature", number(0, 2), "temperature", "1; values below 0.00001 are 0, the most likely token", 1,
        convert=lambda value: 0 if value < GREEDY else value,
    ),
    _in_engine("top_p", number(0, 1), "top_p", "1", 1, convert=lambda value: max(value, 1e-9)),
    _in_engine("top_k", integer(-1, LARGEST_ID), "top_k", "-1; -1 and 0 mean all", -1, 0),
    _in_engine("min_p", number(0, 1), "min_p", "0", 0),
    _in_engine("repetition_penalty", number(0.01, 100), "repetition_penalty", "1", 1),
    _in_engine("frequency_penalty", PENALTY, "frequency_penalty", "0", 0),
    _in_engine("presence_penalty", PENALTY, "presence_penalty", "0", 0),
    _in_engine(
        "logit_bias", BIAS, "logit_bias", "none", {},
        convert=lambda value: {int(token): float(bias) for token, bias in value.items()},
    ),
    _in_engine(
        "seed", integer(-(2**63), 2**63 - 1), "random_seed",
        "none. The answers of one request use seed, seed + 1, …", convert=lambda value: value % 2**63,
    ),
    _in_engine(
        "stop", STOP, "stop_words", "none", [],
        convert=lambda value: [value] if isinstance(value, str) else value,
    ),
    _in_engine("stop_token_ids", STOP_IDS, "stop_token_ids", "none", []),
    _in_engine("include_stop_str_in_output", BOOL, "include_stop_str_in_output", "false", False),
    _in_engine("ignore_eos", BOOL, "ignore_eos", "false", False),
    _in_engine("min_tokens", TOKENS_OR_NONE, "min_new_tokens", "0; at most max_tokens", 0),
    _in_engine("skip_special_tokens", BOOL, "skip_special_tokens", "true", True),
    _in_engine("truncate_prompt_tokens", TOKENS, "truncate_prompt_tokens", "none; keeps the prompt's last tokens"),
    _in_engine(
        "response_format", FORMAT, "response_format",
        '{"type": "text"}. With {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": …}} the '
        "answer is JSON that follows the schema, if max_tokens suffices", {"type": "text"},
    ),
    _in_engine(
        "structured_outputs", ONE_FORM, "grammar",
        "none; as in vLLM, one of json (a schema), regex, choice (a list), grammar (Lark or GBNF), json_object",
        convert=_form_of,
    ),
    *(
        _in_engine(f"guided_{name}", GIVEN, "grammar", f"none; as {name} in structured_outputs", convert=_FORMS[name])
        for name in ("json", "regex", "choice", "grammar")
    ),
    _in_engine(
        "return_token_ids", BOOL, "return_prompt_token_ids",
        "false; adds prompt_token_ids to the answer (completions: to each choice) and token_ids, without the ending "
        "token, to each choice. In streams, prompt_token_ids comes with a choice's first chunk", False,
    ),
)  # fmt: skip
_MANNERS = (
    Field("n", COUNT, f"1; prompts times n is at most {MAX_CHOICES}"),
    Field("stream", BOOL, "false"),
    Field(
        "stream_options", OBJECT,
        "none; with include_usage, a last chunk without choices has the token counts. Other members have no effect",
    ),
    Field("return_tokens_as_token_ids", BOOL, "false; writes the tokens of log-probabilities as token_id:7"),
    Field("timeout", SECONDS, "LMBRIDGE_TIMEOUT, which is also its maximum"),
)  # fmt: skip
_CHAT = (
    Field("model", TEXT, "the app's first model that generates text"),
    Field(
        "messages", MESSAGES,
        "roles: system, developer (= system), user, assistant, tool, function; the model's template decides which it "
        "accepts. Content is a string or a list of text parts, which are joined without a separator",
    ),
    Field("max_tokens", TOKENS, "what fits into the model's context", option="max_new_tokens"),
    Field("max_completion_tokens", TOKENS, "as max_tokens, and takes precedence over it", option="max_new_tokens"),
    *_SAMPLING,
    Field("logprobs", BOOL, "false", option="logprobs"),
    Field("top_logprobs", LOGPROBS, "0; requires logprobs", option="logprobs"),
    Field("chat_template_kwargs", OBJECT, "none; variables for the chat template", option="chat_template_kwargs"),
    Field(
        "reasoning_effort", EFFORT, "none; a variable for the chat template, which may ignore it",
        option="chat_template_kwargs",
    ),
    Field(
        "include_reasoning", BOOL,
        "true; the answer has a model's reasoning as reasoning_content, unless this is false",
        option="separate_reasoning",
    ),
    _in_engine(
        "tools", TOOLS, "tools", "none; functions that the model may call", [], convert=read_functions
    ),
    _in_engine(
        "tool_choice", CHOICE, "tool_choice",
        "auto; none hides the tools from the model, required or a function's name forces a call", "auto",
    ),
    _in_engine(
        "parallel_tool_calls", BOOL, "parallel_tool_calls", "true; false: at most one call per answer", True
    ),
    _in_engine(
        "add_generation_prompt", BOOL, "add_generation_prompt", "true, and false with continue_final_message", True
    ),
    _in_engine(
        "continue_final_message", BOOL, "continue_final_message",
        "false; the answer continues the last message. Not with add_generation_prompt", False,
    ),
    *_MANNERS,
)  # fmt: skip
_COMPLETIONS = (
    _CHAT[0],
    Field("prompt", PROMPTS, "the model gets it unchanged, without a chat template"),
    Field("max_tokens", TOKENS_OR_NONE, "16; 0 only with echo", option="max_new_tokens"),
    Field(
        "max_completion_tokens", TOKENS_OR_NONE, "as max_tokens, and takes precedence over it", option="max_new_tokens"
    ),
    *_SAMPLING,
    Field("logprobs", LOGPROBS, "none", option="logprobs"),
    Field(
        "echo", BOOL,
        "false; any engine without logprobs. With logprobs, the prompt's tokens but the first have theirs too; with "
        "max_tokens 1, a token that would end the answer is also listed. max_tokens 0 returns only the prompt. Not "
        "with truncate_prompt_tokens",
        option="prompt_logprobs",
    ),
    *_MANNERS,
)  # fmt: skip

# --- refused: ignoring these would give a wrong answer ---


def _refused(kind: Kind, *names: str, note: str = "") -> tuple[Field, ...]:
    return tuple(Field(name, kind, note, "refused") for name in names)


_REFUSED = (
    *_refused(_nothing("send tools instead"), "functions", note="unless function_call is none"),
    *_refused(_NO_CHOICE, "function_call", note="other than none and auto"),
    *_refused(_ONLY_TEXT, "modalities", note='other than ["text"]'),
    *_refused(_nothing("inserting text is not supported"), "suffix"),
    *_refused(_nothing("ranking answers is not supported"), "best_of", note="other than n"),
    *_refused(_NOTHING, "audio", "moderation", "web_search_options"),
    *_refused(
        _NOTHING,
        "allowed_token_ids", "bad_words", "cache_salt", "chat_template", "documents", "ec_transfer_params",
        "kv_transfer_params", "logits_processors",
        "logprob_token_ids", "prompt_embeds", "repetition_detection", "return_prompt_text",
        "use_beam_search", "vllm_xargs", "watermarking",
    ),
    *_refused(
        _only(True, "true or left out (false is not supported)"), "spaces_between_special_tokens", note="false"
    ),
    *_refused(_only("left", '"left" or left out (this server keeps the last tokens)'), "truncation_side", note="right"),
    *_refused(_only(-1, "-1 or left out (it is not supported)"), "thinking_token_budget", note="other than -1"),
    *_refused(Kind(lambda value: False, "left out (use echo with logprobs)"), "prompt_logprobs"),
    # other servers' names of fields that we serve
    *_refused(_nothing('send chat_template_kwargs {"enable_thinking": …} instead'), "enable_thinking"),
    *_refused(_nothing("send max_tokens instead"), "max_new_tokens"),
    *_refused(_nothing("send min_tokens instead"), "min_new_tokens"),
    *_refused(_nothing("send repetition_penalty instead"), "repeat_penalty"),
)  # fmt: skip
_REFUSED_IN_CHATS = (
    *_refused(_nothing("only completions support it"), "echo"),
    *_refused(_only(False, "false or left out (the chat template adds them)"), "add_special_tokens", note="true"),
)
_FOR_CHATS = _nothing("only chats support it")
_REFUSED_IN_COMPLETIONS = (
    *_refused(_FOR_CHATS, "chat_template_kwargs", "reasoning_effort", "add_generation_prompt"),
    *_refused(_FOR_CHATS, "continue_final_message", "top_logprobs", "tools"),
    *_refused(_NO_CHOICE, "tool_choice", note="other than none and auto"),
    *_refused(_only(True, "true or left out (the tokenizer decides)"), "add_special_tokens", note="false"),
)

# --- ignored: these change no answer ---

_ANYTHING = Kind(lambda value: True, "anything")


def _ignored(*names: str) -> tuple[Field, ...]:
    return tuple(Field(name, _ANYTHING, "", "ignored") for name in names)


_IGNORED = (
    Field("user", TEXT, "checked; a request counts towards the account of its API key or address", "ignored"),
    *_ignored(
        "metadata", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "verbosity",
        # vLLM's
        "guided_decoding_backend", "length_penalty", "media_io_kwargs", "mm_processor_kwargs", "priority",
        "request_id", "return_mm_kwargs", "return_token_offsets", "routed_experts_prompt_start", "session_id",
        "stream_interval",
    ),
)  # fmt: skip
_IGNORED_IN_COMPLETIONS = _ignored("include_reasoning", "parallel_tool_calls")


def _table(fields: Iterable[Field]) -> dict[str, Field]:
    return {field.name: field for field in fields}


CHAT = _table([*_CHAT, *_REFUSED, *_REFUSED_IN_CHATS, *_IGNORED])
COMPLETIONS = _table([*_COMPLETIONS, *_REFUSED, *_REFUSED_IN_COMPLETIONS, *_IGNORED, *_IGNORED_IN_COMPLETIONS])
