"""From prompts to token ids: what fits is never refused, what cannot fit is not tokenised, and no id is made up."""

from __future__ import annotations

import enum
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, NormalizedString, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lmbridge.engines import encoding
from lmbridge.engines.encoding import PromptEncoder, characters
from lmbridge.engines.length import WHITE_SPACE, LengthBound, length_bound
from lmbridge.engines.models import find_model
from lmbridge.errors import InvalidRequestError, PromptTooLongError
from lmbridge.messages import GenerationConfig
from tests.engines.conftest import TEMPLATE, byte_level_tokenizer

MILLIONS = 4_000_000  # characters
PLENTY = 10**6  # ids of a model that has every token
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LONG = ["Ġ" * 2, "Ġ" * 4, "Ġ" * 8, "Ġ" * 16, "aa", "aaaa", "e" + "Ì", "eÌ" + "ģ"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁" * 2, "▁" * 4, "▁" * 8, "aa", "aaaa", "▁a"]


def merges(tokens: list[str]) -> list[tuple[str, str]]:
    """Each token of two halves."""
    return [(token[: (len(token) + 1) // 2], token[(len(token) + 1) // 2 :]) for token in tokens]


def bpe(alphabet: list[str], longer: list[str], **options: Any) -> Tokenizer:
    vocabulary = ["<unk>", "<s>", *alphabet, *longer]
    return Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges(longer), **options))


def of_bytes(**parts: Any) -> Tokenizer:
    """As GPT-2, Llama 3 and the bundled model have it."""
    tokenizer = bpe(ALPHABET, LONG)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def composing() -> Tokenizer:
    """As Qwen and GPT-NeoX have it: letters and accents become one character first."""
    return of_bytes(normalizer=normalizers.NFC())


def composing_unknown() -> Tokenizer:
    """Each composed character is one token, which may stand for four characters."""
    tokenizer = Tokenizer(models.BPE({"?": 0, " ": 1, "a": 2}, [], unk_token="?", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def falling_back() -> Tokenizer:
    """As Llama 2 and Phi-3 have it: spaces as ▁, bytes for what is unknown, and special tokens that take spaces."""
    tokenizer = bpe(["▁", "a", *BYTE_TOKENS], PIECES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True, normalized=False)])
    return tokenizer


def split_at_spaces() -> Tokenizer:
    """As Gemma has it."""
    tokenizer = bpe(["▁", "a", *BYTE_TOKENS], PIECES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


def bytes_in_the_normalizer() -> Tokenizer:
    return of_bytes(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.ByteLevel()]),
        pre_tokenizer=pre_tokenizers.Split(Regex("a+"), "isolated"),
    )


def an_added_token_longer_than_it_looks() -> Tokenizer:
    """The added token is looked for as it reads once normalised."""
    tokenizer = of_bytes(normalizer=normalizers.NFKD())
    tokenizer.add_tokens([AddedToken("\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 3, normalized=True)])
    return tokenizer


def unknown_words() -> Tokenizer:
    """As BERT has it: a word of any length is one token, and spaces are none."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unknown_runs() -> Tokenizer:
    """As T5 has it: a run of unknown characters is one token."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.0), ("▁aa", -2.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def fused() -> Tokenizer:
    return bpe(["a", " "], ["aa"], unk_token="<unk>", fuse_unk=True)


def a_byte_is_missing() -> Tokenizer:
    """What BPE has no token for is left out."""
    tokenizer = bpe(ALPHABET[1:], LONG)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def undone_bytes() -> Tokenizer:
    """What is made of the bytes is not in the vocabulary any more."""
    return of_bytes(normalizer=normalizers.Sequence([normalizers.ByteLevel(), normalizers.NFD()]), pre_tokenizer=None)


def greedy_for_normalized_spaces() -> Tokenizer:
    tokenizer = of_bytes(normalizer=normalizers.Replace("_", " "))
    tokenizer.add_tokens([AddedToken("<end>", rstrip=True, normalized=True)])
    return tokenizer


def collapsing() -> Tokenizer:
    return of_bytes(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]))


def shortening() -> Tokenizer:
    return of_bytes(normalizer=normalizers.Replace("aaa", "a"))


def stripping() -> Tokenizer:
    return of_bytes(normalizer=normalizers.Strip())


def removing() -> Tokenizer:
    return of_bytes(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    )


class Shouting:
    """A normaliser of somebody's own."""

    def normalize(self, text: NormalizedString) -> None:
        text.replace(Regex("a+"), "A")


def written_in_python() -> Tokenizer:
    return of_bytes(normalizer=normalizers.Normalizer.custom(Shouting()))


Kind = Callable[[], Tokenizer]
BOUNDED: list[Kind] = [
    of_bytes,
    composing,
    composing_unknown,
    falling_back,
    split_at_spaces,
    bytes_in_the_normalizer,
    an_added_token_longer_than_it_looks,
]
UNBOUNDED: list[Kind] = [
    unknown_words,
    unknown_runs,
    fused,
    a_byte_is_missing,
    undone_bytes,
    greedy_for_normalized_spaces,
    collapsing,
    shortening,
    stripping,
    removing,
    written_in_python,
]


def wrapped(inner: Tokenizer, chat_template: str | None = None) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZERS = {kind.__name__: wrapped(kind()) for kind in BOUNDED + UNBOUNDED if kind is not written_in_python}
FRAGMENTS = [
    " ",
    "a",
    "e\u0301",
    "\u03b1\u0313\u0300\u0345",
    "\u1112\u1161\u11ab",
    "世",
    "🦊",
    "ab",
    "q",
    "\u3000",
    "\n",
    "\0",
]
FRAGMENTS += ["_", "<end>", "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}", "صلى الله عليه وسلم", "Ġ", "▁", "!"]
TEXTS = st.lists(
    st.tuples(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), st.integers(1, 200)), max_size=8
).map(lambda parts: "".join([fragment * times for fragment, times in parts]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, inline=st.sampled_from([0, 10**6]))
@example(text="<end>" + " " * 3000, inline=0)
@example(text="<end>" + "_" * 3000, inline=0)
@example(text="<end>" + "".join([space * 200 for space in WHITE_SPACE]), inline=0)
@example(text="\u03b1\u0313\u0300\u0345" * 200, inline=0)
@example(text=" " * 3200, inline=0)
@example(text="q" * 3000, inline=0)
@example(text="صلى الله عليه وسلم" * 3, inline=0)
def test_a_prompt_that_fits_is_never_refused(name: str, text: str, inline: int) -> None:
    """A prompt would be refused as too long although its tokens fit, or get other tokens for being long."""
    tokenizer = TOKENIZERS[name]
    try:
        ids = tokenizer.backend_tokenizer.encode(text).ids
    except TypeError:  # a half of a surrogate pair
        ids = []
    if not ids:
        return
    with mock.patch.object(encoding, "INLINE_CHARACTERS", inline):
        fitting = PromptEncoder(tokenizer, PLENTY, len(ids) + 1)
        assert fitting.encode(text) == ids
        assert fitting.at_once(text) in (None, ids)
        with pytest.raises(PromptTooLongError, match=f"room for {len(ids)}, one of them for the answer") as raised:
            PromptEncoder(tokenizer, PLENTY, len(ids)).encode(text)
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_kinds_of_tokenizers_in_use_have_a_bound(kind: Kind) -> None:
    """Millions of characters would be tokenised for seconds only to be refused."""
    assert length_bound(kind()) is not None


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_a_tokenizer_that_may_drop_text_has_no_bound(kind: Kind) -> None:
    """A prompt that is mostly dropped would be refused for what is dropped."""
    assert length_bound(kind()) is None


def test_the_bound_is_the_longest_token() -> None:
    """A bound far too wide would refuse nothing."""
    assert length_bound(of_bytes()) == LengthBound(longest=16)
    assert length_bound(composing()) == LengthBound(longest=16, composed=4)
    assert length_bound(falling_back()) == LengthBound(longest=8, strips=True)


def test_no_character_is_composed_of_more() -> None:
    """With a newer Unicode, a prompt of many accents that fits would be refused."""
    decompose = normalizers.NFD().normalize_str
    every = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    longest = max(len(decompose(character)) for character in every)
    bound = length_bound(composing())
    assert bound is not None
    assert bound.composed >= longest


def test_an_added_token_takes_no_other_white_space() -> None:
    """Characters that a special token swallows would be counted, and a prompt that fits refused."""
    tokenizer = falling_back()
    texts = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    counts = [len(each) for each in tokenizer.encode_batch_fast([f"<end>{text}" for text in texts])]
    swallowed = [text for text, count in zip(texts, counts, strict=True) if count == 1]
    assert "".join(swallowed) == WHITE_SPACE


# ------------------------------------------------------------------------------------------------------- long prompts


class Untokenised:
    """A tokenizer that must not be asked for tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.apply_chat_template = tokenizer.apply_chat_template
        self.backend_tokenizer = self

    def __getattr__(self, name: str) -> Any:
        if "encode" in name and name != "get_added_tokens_decoder":
            raise AssertionError(f"{name} was called")
        return getattr(self._tokenizer.backend_tokenizer, name)


@pytest.fixture(scope="module")
def demo() -> Any:
    return transformers.AutoTokenizer.from_pretrained(find_model("demo"))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("method", ["at_once", "encode"])
@pytest.mark.parametrize(
    "prompt",
    ["a " * (MILLIONS // 2), [{"role": "user", "content": "a " * (MILLIONS // 2)}]],
    ids=["string", "conversation"],
)
def test_millions_of_characters_are_refused_untokenised(demo: Any, prompt: Any, raw: bool, method: str) -> None:
    """Everybody's answers would stand still for seconds while a prompt that cannot fit is tokenised."""
    encoder = PromptEncoder(Untokenised(demo), 3072, 1024)
    with pytest.raises(PromptTooLongError, match=r"400\d{4} characters, so at least 285\d{3} tokens.* room for 1024"):
        getattr(encoder, method)(prompt, raw)


def test_a_template_may_leave_out_what_is_long() -> None:
    """A conversation whose old turns the template drops would be refused for them."""
    last = "{{ messages[-1].content | trim }}"
    encoder = PromptEncoder(byte_level_tokenizer(last), PLENTY, 20)
    messages = [{"role": "user", "content": "a" * 100_000}, {"role": "user", "content": "hello" + " " * 100_000}]
    assert encoder.at_once(messages) is None
    assert encoder.encode(messages) == encoder.encode("hello", raw=True)


def test_what_takes_long_to_render_is_not_rendered_at_once() -> None:
    """Ten thousand turns, or a large tool call, would hold the server thread while the template goes through them."""

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("rendered")

    tokenizer = byte_level_tokenizer()
    encoder = PromptEncoder(tokenizer, PLENTY, 20)
    tokenizer.apply_chat_template = refuse
    conversations: list[Any] = [
        [{"role": "user", "content": "a" * 100}] * 10_000,
        [{"role": "user", "content": "a" * 10_000, "tool_calls": [1] * 10_000}],
        [{"role": "user", "content": "a" * 6_000_000}],
    ]
    for messages in conversations:
        assert encoder.at_once(messages) is None


def test_what_is_short_comes_at_once_and_the_rest_does_not() -> None:
    """A short prompt would wait behind somebody's book, or a book would be tokenised on the server thread."""
    encoder = PromptEncoder(byte_level_tokenizer(), PLENTY, 1_000_000)
    assert encoder.at_once("hello") == encoder.encode("hello")
    assert encoder.at_once([1, 2, 3]) == [1, 2, 3]
    prompts: list[Any] = ["a" * 9000, "世" * 3000, [{"role": "user", "content": "a" * 9000}], [1] * 200_000]
    for long in prompts:
        assert encoder.at_once(long) is None
        assert encoder.at_once(long, raw=True) is None


def test_a_long_list_of_ids_is_refused_at_once() -> None:
    """Millions of ids would be looked at one by one before somebody counts them."""
    encoder = PromptEncoder(byte_level_tokenizer(), PLENTY, 1024)
    with pytest.raises(PromptTooLongError, match="2000000 tokens; there is room for 1024"):
        encoder.at_once([-1] * 2_000_000)


@pytest.fixture
def no_forced_switch() -> Iterator[None]:
    """Another thread runs only when this one gives up the GIL by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", [of_bytes, unknown_words])
def test_others_run_while_a_long_prompt_is_tokenised(kind: Kind, no_forced_switch: None) -> None:
    """One caller's book would hold the GIL, and so every other thread of the process, for seconds."""
    encoder = PromptEncoder(wrapped(kind()), PLENTY)
    inside, ran = threading.Event(), threading.Event()

    def run() -> None:
        inside.wait(60)
        ran.set()

    other = threading.Thread(target=run)
    other.start()
    inside.set()
    encoder.encode("a " * 500_000)
    assert ran.is_set()
    other.join()


def test_both_paths_refuse_what_is_not_unicode() -> None:
    """Half of a surrogate pair, which JSON can carry, would be an error of the engine rather than of the request."""
    encoder = PromptEncoder(byte_level_tokenizer(), PLENTY)
    for text in ("a\ud800", "a" * 10_000 + "\ud800"):
        with pytest.raises(InvalidRequestError, match="not valid Unicode"):
            encoder.encode(text)


# ---------------------------------------------------------------------------------------------------------- token ids


@pytest.fixture(scope="module")
def padded() -> Any:
    """A tokenizer with one token more than the model has rows."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("length", [1, 10_000])
def test_a_token_that_the_model_does_not_have_is_named(padded: Any, raw: bool, length: int) -> None:
    """One text with such a token would end the engine for everybody."""
    encoder = PromptEncoder(padded, 257)
    with pytest.raises(
        InvalidRequestError, match=r"'\[PAD\]' \(id 257\).*end at id 256.*resize_token_embeddings"
    ) as raised:
        encoder.encode("mask [PAD] it" * length, raw)
    assert raised.value.param == "prompt"
    assert encoder.encode("mask it" * length, raw)


def test_a_tokenizer_written_in_python_is_checked_too() -> None:
    """The ids of a tokenizer without a fast form would reach the model unchecked."""
    tokenizer = transformers.ByT5Tokenizer()
    known = tokenizer.encode("abc")
    assert PromptEncoder(tokenizer, len(tokenizer), len(known) + 1).encode("abc") == known
    with pytest.raises(InvalidRequestError, match=r"'c' \(id 102\).*end at id 101"):
        PromptEncoder(tokenizer, 102).encode("abc")
    with pytest.raises(PromptTooLongError, match=f"{len(known)} tokens"):
        PromptEncoder(tokenizer, len(tokenizer), len(known)).encode("abc")


class Number(enum.IntEnum):
    SEVEN = 7


@pytest.mark.parametrize("bad", [-1, 257, True, 1.0, "7", None, 2**70])
def test_ids_of_the_caller_are_checked(padded: Any, bad: object) -> None:
    """An id that the model does not have would end the engine for everybody."""
    encoder = PromptEncoder(padded, 257)
    ids: Any = [1, 2, bad, 256]
    with pytest.raises(InvalidRequestError, match="ints from 0 to 256, not"):
        encoder.encode(ids)
    assert encoder.encode([1, Number.SEVEN, 256]) == [1, 7, 256]


@pytest.mark.parametrize("prompt", [[], ""])
def test_a_prompt_without_tokens_is_refused(prompt: Any) -> None:
    """The model would be given nothing to go on from."""
    with pytest.raises(InvalidRequestError, match="produces no token"):
        PromptEncoder(byte_level_tokenizer(), PLENTY).encode(prompt, raw=True)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "A prompt is a string, a list of messages or a list of token ids, not 5"),
        ([{"role": "user"}], "A message is a dict with 'role' and 'content'"),
        ([{"role": "user", "content": b"x" * 10**6}], "list of text parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "list of text parts"),
        ([{"role": "forbidden", "content": "x"}], "chat template refused the messages: no such role"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompt: Any, message: str) -> None:
    """The caller would get an error from deep inside a template."""
    with pytest.raises(InvalidRequestError, match=message) as raised:
        PromptEncoder(byte_level_tokenizer(), PLENTY).encode(prompt)
    assert len(str(raised.value)) < 200


def test_messages_need_a_template() -> None:
    """A conversation would reach a model that was never told where a turn begins."""
    with pytest.raises(InvalidRequestError, match="no chat template"):
        PromptEncoder(byte_level_tokenizer(None), PLENTY).encode([{"role": "user", "content": "x"}])


def test_a_template_may_be_given_tools_as_a_variable() -> None:
    """LMDeploy's ``tools=`` are shown to the model and no more: they reach the template by its own variables."""
    template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    encoder = PromptEncoder(wrapped(of_bytes(), template), 1000)
    given = GenerationConfig(chat_template_kwargs={"tools": [{"type": "function", "function": {"name": "add"}}]})
    assert encoder.text("a question", config=given) == "add a question"


def test_parts_of_a_message_are_joined() -> None:
    """Clients that send content in parts would get other answers than those that send a string."""
    encoder = PromptEncoder(byte_level_tokenizer(), PLENTY)
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert encoder.text([{"role": "user", "content": parts}]) == encoder.text("hello") == "<user>hello<assistant>"


# --------------------------------------------------------------------------------------------------------- tool calls

CALLS = (
    "{% for message in messages %}{% for call in message.tool_calls or [] %}[CALL]{% endfor %}"
    "{{ message.content }}{% endfor %}"
)
TEMPLATES = {
    "items": ("{% for k, v in call.function.arguments|items %}{{ k }}={{ v }};{% endfor %}", "a=3;b=18;"),
    "mapping": ("{{ call.function.arguments.b }}", "18"),
    "tojson": ("{{ call.function.arguments | tojson }}", '{"a": 3, "b": 18}'),
    "whole": ("{{ call.function | tojson }}", '{"name": "mul", "arguments": {"a": 3, "b": 18}}'),
    "joined": ("{{ '>' + call.function.arguments }}", '>{"a": 3,  "b": 18}'),
}


def history(arguments: Any) -> list[Any]:
    call = {"id": "1", "type": "function", "function": {"name": "mul", "arguments": arguments}}
    return [
        {"role": "user", "content": "3 times 18? "},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": " 54"},
    ]


def tool_encoder(name: str) -> PromptEncoder:
    return PromptEncoder(byte_level_tokenizer(CALLS.replace("[CALL]", TEMPLATES[name][0])), PLENTY)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gets_the_arguments_of_a_tool_call_as_it_wants_them(name: str) -> None:
    """The second turn after a tool call would be refused, or show the model JSON within JSON."""
    messages = history('{"a": 3,  "b": 18}')
    copy = json.loads(json.dumps(messages))
    assert tool_encoder(name).text(messages) == f"3 times 18? {TEMPLATES[name][1]} 54"
    assert messages == copy


def test_arguments_that_are_a_mapping_already_stay_so() -> None:
    """Callers from Python, who need no JSON, would be refused."""
    assert tool_encoder("items").text(history({"a": 3, "b": 18})) == "3 times 18? a=3;b=18; 54"


@pytest.mark.parametrize("arguments", ["", "{'a': 3}", "[1]", "3", '{"a":', None, "[" * 100_000])
def test_arguments_that_are_no_object_are_left_as_they_are(arguments: Any) -> None:
    """What a model wrote as arguments would be lost, or end in an error that is not about the request."""
    assert tool_encoder("tojson").text(history(arguments)) == f"3 times 18? {json.dumps(arguments)} 54"


def test_the_first_fault_of_a_template_is_told() -> None:
    """The caller would read about the type of the arguments rather than about the fault."""
    messages = [*history('{"a": 3}'), {"role": "forbidden", "content": ""}]
    template = CALLS.replace("[CALL]", "{{ call.function.arguments.b.c }}") + TEMPLATE
    with pytest.raises(InvalidRequestError, match="'dict object' has no attribute 'b'"):
        PromptEncoder(byte_level_tokenizer(template), PLENTY).encode(messages)


@pytest.mark.parametrize("calls", ["none", [], [None], [{}], [{"function": None}], {"function": {}}])
def test_odd_tool_calls_are_the_templates_affair(calls: Any) -> None:
    """A malformed tool call would be an error of the engine rather than of the request."""
    messages = [{"role": "assistant", "content": "x", "tool_calls": calls}]
    assert PromptEncoder(byte_level_tokenizer(), PLENTY).text(messages) == "<assistant>x<assistant>"


# ------------------------------------------------------------------------------------------------------------- lengths


def test_everything_that_a_template_may_show_is_counted() -> None:
    """A message that is long in its tool calls only would be taken for short, and tokenised on the server thread."""
    assert characters("a" * 10) == 10
    assert characters("世" * 10) == 30
    assert characters([1, 2, 3]) == characters([]) == 0
    for message in (
        {"role": "user", "content": "a" * 50_000},
        {"role": "user", "content": [{"type": "text", "text": "a" * 50_000}]},
        history("a" * 50_000)[1],
        history({"a": ["a" * 50_000]})[1],
        history({"a": [1] * 50_000})[1],
        {"role": "assistant", "content": "", "reasoning_content": "a" * 50_000},
    ):
        assert 50_000 <= characters([message]) < 50_200


def test_counting_ends_when_it_is_enough() -> None:
    """A conversation of ten thousand turns would hold the server thread while its length is taken."""
    seen = 0

    class Message(dict[str, str]):
        def __len__(self) -> int:
            nonlocal seen
            seen += 1
            return super().__len__()

    class Unread(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("read")

    messages = [Message(role="user", content="a" * 100) for _ in range(10_000)]
    assert characters(messages, 20_000) > 20_000
    assert seen < 200
    assert characters([{"role": "user", "content": Unread([1] * 50_000)}], 20_000) > 20_000
    encoder = PromptEncoder(byte_level_tokenizer(), PLENTY, 1000)
    assert encoder.at_once(messages) is None
    assert seen < 400
