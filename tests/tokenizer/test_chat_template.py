"""Chat templates render as transformers renders them, and fail as errors a user can read."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lockstep.core.errors import InvalidRequest, ModelFileError
from lockstep.formats import ModelFiles
from lockstep.tokenizer.chat_template import ChatTemplate
from lockstep.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.suite("cpu")

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": " What is 2+2? 你好 "},
    {
        "role": "assistant",
        "content": "4",
        "tool_calls": [{"name": "add", "arguments": {"a": 2, "é": [1, None]}}],
    },
    {"role": "user", "content": "Thanks"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": "<é>"}}}]

LOOPS = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.last %}
last: {{ message['content'] | trim }}
    {% endif %}
  {{ bos_token + message['role'] }}:
    {%- if message.tool_calls %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
{%- endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
"""
GENERATION = (
    "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}|{{ extra }}"
)
NAMESPACES = """{%- set ns = namespace(found=false, n=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}
{{- ns.n }} {{ messages | map(attribute='role') | join(',') }} {{ dict(a=1) | tojson }} {{ documents is none }}
{%- if add_generation_prompt %}>>{% endif -%}"""


@pytest.mark.parametrize("source", [LOOPS, GENERATION, NAMESPACES])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_like_transformers(source: str, tools: list[Any] | None, add_generation_prompt: bool) -> None:
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "extra": "x"}
    expected, _ = render_jinja_template([MESSAGES], tools, chat_template=source, bos_token="<s>", **options)
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, tools, **options) == expected[0]


def test_the_embedded_template_renders_like_transformers(
    embedded: Tokenizer, embedded_files: ModelFiles
) -> None:
    reference = AutoTokenizer.from_pretrained(embedded_files.path.parent, gguf_file=embedded_files.path.name)
    assert embedded.chat_template is not None
    assert not embedded.chat_template.supports_tools
    for messages in (MESSAGES, MESSAGES[1:]):
        for prompt in (True, False):
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert embedded.chat_template.render(messages, add_generation_prompt=prompt) == expected


def test_the_clock_is_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2024, 7, 26))
    assert template.render([]) == "26 Jul 2024"


def test_tools_are_supported_when_the_template_reads_them() -> None:
    assert ChatTemplate("{% if tools %}x{% endif %}", {}).supports_tools
    assert not ChatTemplate("{# tools #}{% set tools = 1 %}{{ tools }}", {}).supports_tools


def test_variables_of_the_request_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ bos_token }}", {"bos_token": "<s>"})
    assert template.render([], enable_thinking=False) == "False<s>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages[0].absent.deeper }}", "absent"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'other' %}", "cannot render"),
        ("{% for i in range(999999999) %}{% endfor %}", "cannot render"),
    ],
)
def test_messages_a_template_cannot_take_are_invalid_requests(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_messages_cannot_be_changed_by_a_template() -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages.append(1) }}", {}).render(list(MESSAGES))


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% endfor %}", "{{ x | nofilter }}"])
def test_a_broken_template_is_the_model_files_fault(source: str) -> None:
    with pytest.raises(ModelFileError, match="the model's chat template is broken at line 1"):
        ChatTemplate(source, {}).render(MESSAGES)
