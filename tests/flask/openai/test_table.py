"""The table of fields: complete, as the documentation has it, and true of the routes."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats

from lmbridge import GenerationConfig, InvalidRequestError
from lmbridge.flask.openai.reading import read_chat, read_completion
from lmbridge.flask.openai.table import CHAT, COMPLETIONS, Field
from tests.flask.openai import fields_table

VLLM = [
    "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "ec_transfer_params", "ignore_eos",
    "include_stop_str_in_output", "kv_transfer_params", "length_penalty", "logprob_token_ids", "min_p",
    "min_tokens", "priority", "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id",
    "response_format", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids",
    "routed_experts_prompt_start", "session_id", "skip_special_tokens", "spaces_between_special_tokens",
    "stop_token_ids", "stream_interval", "structured_outputs", "thinking_token_budget", "top_k",
    "truncate_prompt_tokens", "truncation_side", "use_beam_search", "vllm_xargs", "watermarking",
]  # fmt: skip
VLLM_CHATS = [
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo",
    "include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "reasoning_effort", "return_mm_kwargs",
    "return_prompt_text",
]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "params", "others"),
    [
        (CHAT, of_chats.CompletionCreateParamsNonStreaming, [*VLLM, *VLLM_CHATS, "stream"]),
        (COMPLETIONS, of_completions.CompletionCreateParamsNonStreaming, [*VLLM, "prompt_embeds", "stream"]),
    ],
    ids=["chat", "completions"],
)
def test_every_field_of_the_clients_is_known(table: Mapping[str, Field], params: Any, others: list[str]) -> None:
    """What a new version of a client may send is looked at before it is ignored."""
    assert {*typing.get_type_hints(params), *others} - set(table) == set()


def test_the_documentation_has_the_table() -> None:
    """Readers see what is served by which engine, as the code has it today."""
    assert fields_table.PATH.read_text() == fields_table.written(), "run python -m tests.flask.openai.fields_table"
    assert ".. include:: fields.inc" in fields_table.PATH.with_name("fields.rst").read_text()


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_what_the_table_refuses_is_refused(route: str) -> None:
    """A field that is listed as refused never comes through, and one without effect always does."""
    table, read = {"chat": (CHAT, read_chat), "completions": (COMPLETIONS, read_completion)}[route]
    least: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    for name, field in table.items():
        if field.fate == "refused":
            with pytest.raises(InvalidRequestError) as caught:
                read({**least, name: "something"}, frozenset(vars(GenerationConfig())))
            assert caught.value.param == name
        elif field.fate == "ignored":
            config = read({**least, name: "something"}, frozenset(vars(GenerationConfig()))).config
            assert config.given() == read(least, frozenset(vars(GenerationConfig()))).config.given()


def test_options_are_fields_of_the_config() -> None:
    """A field that is misspelt here would reach no engine."""
    options = {field.option for table in (CHAT, COMPLETIONS) for field in table.values() if field.option}
    assert options <= set(vars(GenerationConfig()))
