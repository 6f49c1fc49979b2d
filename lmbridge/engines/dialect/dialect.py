"""How one model's chat template handles tools and thinking.

Rule: built on a worker thread, because it renders the template; used on the server thread and that worker thread, and
never changes. The call format is the one that can read what the template writes for a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmbridge.engines.dialect.formats import FORMATS, HERMES, LLAMA, Format, response_template
from lmbridge.engines.dialect.reader import Reader
from lmbridge.engines.dialect.spelling import calls_grammar, calls_schema
from lmbridge.engines.dialect.telling import told, written_out
from lmbridge.errors import InvalidRequestError
from lmbridge.grammar import Grammar
from lmbridge.messages import GenerationConfig, Message, ToolCall
from lmbridge.tools import Tool

_NAME, _KEY, _VALUE = "lmbridge_asks", "lmbridge_key", "lmbridge_value"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Asks.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "A key."}}},
    },
}
_QUESTION: Message = {"role": "user", "content": "lmbridge_question"}
_TAIL = 512  # last tokens of a prompt searched for a started answer
_BEGIN, _END = "<think>", "</think>"


class Dialect:
    """The formats of tools and answers for one model.

    Args:
        tokenizer: a tokenizer of transformers.
        spells: the engine follows grammars; if False, only JSON schemas.

    Attributes:
        knows_tools: the template describes tools to the model.
        knows_calls: it shows the model its earlier calls.
        shown: special tokens to keep in the text, unless all are kept.
    """

    def __init__(self, tokenizer: Any, spells: bool = True) -> None:
        self._tokenizer = tokenizer
        self._spells = spells
        self._own = getattr(tokenizer, "response_template", None)
        self.knows_tools = self._tells_of_tools()
        self.knows_calls = "tool_calls" in str(tokenizer.chat_template)
        self._format = None if self._own is not None else self._format_of_calls()
        self._thinks = self._own is not None or any(mark in str(tokenizer.chat_template) for mark in (_BEGIN, _END))
        self._thought_ends = self._token(_END) if self._thinks else None
        marks = (*(HERMES.marks if self._format is None else self._format.marks), _BEGIN, _END)
        self._tokens = {mark: token for mark in marks if (token := self._token(mark)) is not None}
        self.shown = frozenset(self._tokens.values())

    def reads(self, config: GenerationConfig) -> bool:
        """Whether the request's answer must be parsed."""
        return config.calling is not None or (config.separate_reasoning and self._thinks)

    def reader(self, config: GenerationConfig, prompt: Sequence[int]) -> Reader:
        """The parser for the answer to this prompt."""
        format = self._format_for(config)
        calling = config.calling
        if self._own is not None and (calling is None or format is None):
            fields = {name: part for name, part in self._own["fields"].items() if calling or name != "tool_calls"}
            template, tail = {**self._own, "fields": fields}, self._tail(prompt)
        else:
            template = response_template(format if calling is not None else None)
            tail = _BEGIN if self._opens_thought(prompt) else ""
        tools = None if calling is None else calling.tools
        return Reader(self._tokenizer.get_response_parser(template, prefix=tail, tools=tools), format)

    def wants_all_tokens(self, config: GenerationConfig) -> bool:
        """Whether the parsed text must contain all special tokens."""
        return self._own is not None and (config.calling is None or self._format_for(config) is None)

    def holds(self, config: GenerationConfig) -> bool:
        """Whether the answer is constrained; cheap."""
        calling = config.calling
        return config.form is not None or (calling is not None and calling.required)

    def form(self, config: GenerationConfig) -> Grammar | None:
        """The form of the answer, calls included.

        Raises:
            InvalidRequestError: the answer may be calls or another form, and these cannot be combined.
        """
        calling, form = config.calling, config.form
        if calling is None or not self.holds(config):
            return form
        if form is not None and form.kind == "lark":
            raise InvalidRequestError("A Lark grammar cannot be combined with tools; leave one out.", form.param)
        if not self._spells:
            return calls_schema(calling, form)
        format = self._format_for(config)
        assert format is not None
        assert format.spelled is not None
        return calls_grammar(calling, format.spelled, self._tokens, form)

    def thought_end(self, config: GenerationConfig, prompt: Sequence[int]) -> int | None:
        """The token after which the form applies, if the model thinks first."""
        return self._thought_ends if self.reads(config) and self._opens_thought(prompt) else None

    def tools(self, config: GenerationConfig) -> list[Tool] | None:
        """The tools to give to the template."""
        return config.calling.tools if config.calling is not None and self.knows_tools else None

    def told(self, messages: list[Message], config: GenerationConfig) -> list[Message]:
        """The conversation, with tools and calls that the template cannot render written out.

        Raises:
            InvalidRequestError: the model would have to choose among tools that it does not see.
        """
        self.refuse_unknown_tools(config)
        if not self.knows_calls:
            messages = written_out(messages)
        if config.calling is not None and not self.knows_tools:
            messages = told(messages, config.calling.tools)
        return messages

    def refuse_unknown_tools(self, config: GenerationConfig) -> None:
        """Raise InvalidRequestError if the model would have to choose among tools that it cannot see."""
        calling = config.calling
        if calling is not None and not calling.required and not self.knows_tools:
            raise InvalidRequestError(
                "The model's chat template does not support tools, so the model cannot choose whether to call one. Use "
                'tool_choice "required", or name the function: its arguments will follow their schema.',
                "tools",
            )

    # --- parts ---

    def _format_for(self, config: GenerationConfig) -> Format | None:
        """The format of the request's calls; required calls need a format that we can write."""
        calling = config.calling
        if calling is None or not self.holds(config):
            return self._format
        if not self._spells:
            return LLAMA
        return HERMES if self._format is None or self._format.spelled is None else self._format

    def _token(self, text: str) -> int | None:
        """The id of a text added to the tokenizer as one token."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return next((token for token, content in added.items() if content.content == text), None)

    def _tail(self, prompt: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False))

    def _opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends inside the model's thoughts."""
        return self._thinks and self._tail(prompt).rstrip().endswith(_BEGIN)

    def _render(self, messages: list[Message], **more: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **more))
        except Exception:  # a template is the model author's program, and may raise anything
            return ""

    def _tells_of_tools(self) -> bool:
        return bool(self._tokenizer.chat_template) and _NAME in self._render([_QUESTION], tools=[_TOOL])

    def _format_of_calls(self) -> Format:
        """The first format that can read a call written by the template; otherwise Hermes."""
        written = self._written_call() if self.knows_calls else ""
        for format in FORMATS if written else ():
            reader = Reader(self._tokenizer.get_response_parser(response_template(format), prefix=""), format)
            calls = [*reader.push(written).calls, *reader.finish().calls]
            if calls and calls[0].name == _NAME and _VALUE in "".join(call.arguments for call in calls):
                return format
        return HERMES

    def _written_call(self) -> str:
        """How the template writes an answer that is a call."""
        call = ToolCall(0, "abcdefghi", _NAME, "").message()
        call["function"]["arguments"] = {_KEY: _VALUE}
        tools = [_TOOL] if self.knows_tools else None
        asked = self._render([_QUESTION], tools=tools, add_generation_prompt=True)
        answered = self._render([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=tools)
        text = answered[len(asked) :] if answered.startswith(asked) else answered.rpartition(_QUESTION["content"])[2]
        return self._without_end(text)

    def _without_end(self, text: str) -> str:
        """The text without the special tokens that end an answer."""
        ends = [token for token in self._tokenizer.all_special_tokens if token]
        while end := next((end for end in ends if text.rstrip().endswith(end)), ""):
            text = text.rstrip().removesuffix(end)
        return text
