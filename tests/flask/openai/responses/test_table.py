"""The table of fields: complete, as the documentation has it, and true of the route."""

from __future__ import annotations

import typing

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from lmbridge import GenerationConfig, InvalidRequestError
from lmbridge.flask.openai.responses.reading import read_response
from lmbridge.flask.openai.responses.table import RESPONSES
from tests.flask.openai import fields_table
from tests.flask.openai.responses.conftest import nobody_knows

VLLM = [
    "cache_salt", "chat_template", "chat_template_kwargs", "enable_response_messages", "ignore_eos",
    "include_stop_str_in_output", "kv_transfer_params", "media_io_kwargs", "mm_processor_kwargs",
    "previous_input_messages", "priority", "repetition_penalty", "request_id", "seed", "skip_special_tokens", "stop",
    "structured_outputs", "top_k", "vllm_xargs",
]  # fmt: skip
_ALL = frozenset(vars(GenerationConfig()))


def test_every_field_of_the_clients_is_known() -> None:
    """What a new version of a client may send is looked at before it is ignored."""
    assert {*typing.get_type_hints(ResponseCreateParamsNonStreaming), *VLLM, "stream"} - set(RESPONSES) == set()


def test_the_documentation_has_the_table() -> None:
    """Readers see what is served by which engine, as the code has it today."""
    path = fields_table.RESPONSES_PATH
    assert path.read_text() == fields_table.written_responses(), "run python -m tests.flask.openai.fields_table"
    assert f".. include:: {path.name}" in path.with_name("responses.rst").read_text()


def test_what_the_table_refuses_is_refused() -> None:
    """A field that is listed as refused never comes through, and one without effect always does."""
    for name, field in RESPONSES.items():
        if field.fate == "refused":
            with pytest.raises(InvalidRequestError) as caught:
                read_response({"input": "x", name: "something"}, _ALL, nobody_knows)
            assert caught.value.param == name
        elif field.fate == "ignored":
            config = read_response({"input": "x", name: "something"}, _ALL, nobody_knows).config
            assert config.given() == read_response({"input": "x"}, _ALL, nobody_knows).config.given()


def test_options_are_fields_of_the_config() -> None:
    """A field that is misspelt here would reach no engine."""
    assert {field.option for field in RESPONSES.values() if field.option} <= set(vars(GenerationConfig()))
