# ruff: noqa: RUF001  DeepSeek writes its marks with a wide bar
"""Chat templates that write calls as models' authors do, and answers of such models to read."""

from __future__ import annotations

from typing import Any, NamedTuple

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look out of a window.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "floor": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def template(calls: str, begin: str = "<assistant>") -> str:
    """One that knows tools.

    Args:
        calls: how it writes ``m.tool_calls``.
        begin: what begins the model's answer.
    """
    return (
        "{%- if tools %}<tools>{{ tools | tojson }}{% endif %}"
        "{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{%- if m.tool_calls %}" + calls + "{% endif %}{% endfor %}"
        "{%- if add_generation_prompt %}" + begin + "{% endif %}"
    )


class Form(NamedTuple):
    """One of them, with an answer of two calls; ``said`` is what stands before the calls."""

    template: str
    answer: str
    said: str = ""


_EACH, _NAME, _ARGUMENTS = (
    "{%- for c in m.tool_calls %}",
    "{{ c.function.name }}",
    "{{ c.function.arguments | tojson }}",
)

FORMS = {
    "hermes": Form(
        template(
            _EACH + '{{ "\\n" }}<tool_call>\n{"name": "' + _NAME + '", "arguments": ' + _ARGUMENTS
            + "}\n</tool_call>{% endfor %}"
        ),
        'I look.\n<tool_call>\n{"name": "look", "arguments": {"city": "a \\"b\\" }", "floor": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>',
        "I look.",
    ),
    "qwen-xml": Form(
        template(
            _EACH + "<tool_call>\n<function=" + _NAME + ">\n{% for k, v in c.function.arguments.items() %}<parameter="
            "{{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
        ),
        "I look.\n\n<tool_call>\n<function=look>\n<parameter=city>\na \"b\" }\n</parameter>\n<parameter=floor>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=look>\n<parameter=city>\nRome\n</parameter>\n"
        "</function>\n</tool_call>",
        "I look.",
    ),
    "llama": Form(
        template(_EACH + '{"name": "' + _NAME + '", "parameters": ' + _ARGUMENTS + "}{% endfor %}"),
        '{"name": "look", "parameters": {"city": "a \\"b\\" }", "floor": 2}}; '
        '{"name": "look", "parameters": {"city": "Rome"}}',
    ),
    "mistral-list": Form(
        template(
            "[TOOL_CALLS] [" + _EACH + '{"name": "' + _NAME + '", "arguments": ' + _ARGUMENTS
            + ', "id": "{{ c.id }}"}{% endfor %}]'
        ),
        'I look.[TOOL_CALLS] [{"name": "look", "arguments": {"city": "a \\"b\\" }", "floor": 2}}, '
        '{"name": "look", "arguments": {"city": "Rome"}}]',
        "I look.",
    ),
    "mistral": Form(
        template(_EACH + "[TOOL_CALLS]" + _NAME + "[ARGS]" + _ARGUMENTS + "{% endfor %}"),
        'I look.[TOOL_CALLS]look[ARGS]{"city": "a \\"b\\" }", "floor": 2}[TOOL_CALLS]look[ARGS]{"city": "Rome"}',
        "I look.",
    ),
    "deepseek-fenced": Form(
        template(
            "<｜tool▁calls▁begin｜>" + _EACH + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + _NAME
            + "\n```json\n" + _ARGUMENTS + "\n```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
        ),
        "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
        '{"city": "a \\"b\\" }", "floor": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n'
        '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "I look.",
    ),
    "deepseek": Form(
        template(
            "<｜tool▁calls▁begin｜>" + _EACH + "<｜tool▁call▁begin｜>" + _NAME + "<｜tool▁sep｜>" + _ARGUMENTS
            + "<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
        ),
        'I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"city": "a \\"b\\" }", "floor": 2}'
        '<｜tool▁call▁end｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"city": "Rome"}'
        '<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "I look.",
    ),
}  # fmt: skip
THINKING = template(_EACH + _ARGUMENTS + "{% endfor %}", begin="<assistant><think>\n") + "{# </think> #}"
"""One that opens a thought, and writes calls in no known form."""
