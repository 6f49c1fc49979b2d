"""Incremental detokenisation and stop words."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lmbridge.engines.text import Detokenizer, StopWords, TextStream, Vocabulary
from tests.engines.conftest import EOS, byte_level_tokenizer

SAMPLE = "Grüße, 世界! 🦊👩‍👩‍👧 naïve — it's  two  spaces.\n\tÅ"


def byte_level() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["wholly", "�"])
    return tokenizer


def byte_level_merged() -> Any:
    """Tokens of several bytes, whose ends lie anywhere in a character."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    inner.train_from_iterator([SAMPLE * 3, "🦊🦊🦝🐢 世界世界"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def sentencepiece() -> Any:
    """As Llama 2 has it: spaces as ▁, and a byte token for each byte of what is in no piece."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁▁", "▁Hello", "Hello", "▁world", "world", "!", "é", "▁世", "界", "a", "▁b", "�"]
    inner = Tokenizer(
        models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", special=True)]})
    return tokenizer


def metaspace() -> Any:
    inner = Tokenizer(models.Unigram([(piece, -1.0) for piece in ("<unk>", "▁", "▁the", "the", "▁▁cat", "s", ".")], 0))
    inner.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def wordpiece() -> Any:
    words = ["[UNK]", "[SEP]", "he", "##llo", "world", ".", ",", "##s", "do", "not", "'", "n", "##'t", "n't", "世"]
    inner = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", sep_token="[SEP]")


def suffixed() -> Any:
    """As CLIP and GPT-1 have it: the last piece of a word carries its space, except at the end of the text."""
    words = ["<unk>", "he", "llo</w>", "world</w>", "s", "!</w>"]
    inner = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    inner.decoder = decoders.BPEDecoder(suffix="</w>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


KINDS = [byte_level, byte_level_merged, sentencepiece, metaspace, wordpiece, suffixed]
TOKENIZERS = {kind.__name__: kind() for kind in KINDS}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def whole(name: str, ids: list[int], skip: bool) -> str:
    text: str = TOKENIZERS[name].decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text


def joined(name: str, ids: list[int], skip: bool) -> str:
    detokenizer = Detokenizer(VOCABULARIES[name], skip)
    return "".join([detokenizer.push(token) for token in ids]) + detokenizer.finish()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_joined_deltas_are_the_whole_text(name: str, data: st.DataObject, skip: bool) -> None:
    """A user who joins the pieces of a stream would read another text than the Response holds."""
    size = len(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(0, size + 2), max_size=30))
    assert joined(name, ids, skip) == whole(name, ids, skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_level_merged", "sentencepiece"])
def test_long_random_answers_too(name: str) -> None:
    """Windows that slide many times would lose their place."""
    source = random.Random(1)
    size = len(TOKENIZERS[name])
    for length in (300, 1000):
        ids = [source.randrange(size) for _ in range(length)]
        assert joined(name, ids, True) == whole(name, ids, True)


@pytest.mark.parametrize("name", ["byte_level", "byte_level_merged"])
def test_characters_come_out_whole(name: str) -> None:
    """An emoji would appear as question marks until its last byte arrives."""
    detokenizer = Detokenizer(VOCABULARIES[name])
    pieces = [detokenizer.push(token) for token in TOKENIZERS[name].encode(SAMPLE, add_special_tokens=False)]
    assert "".join(pieces) == SAMPLE
    assert not any("�" in piece for piece in pieces)


def test_broken_bytes_at_the_end_are_not_lost() -> None:
    """An answer cut off inside a character would miss its end."""
    ids = TOKENIZERS["byte_level"].encode("ab🦊", add_special_tokens=False)[:-1]
    assert joined("byte_level", ids, True) == whole("byte_level", ids, True) == "ab�"


def test_text_is_not_held_back_without_need() -> None:
    """A stream would lag behind the model."""
    detokenizer = Detokenizer(VOCABULARIES["byte_level"])
    pieces = [detokenizer.push(token) for token in TOKENIZERS["byte_level"].encode("fox", add_special_tokens=False)]
    assert pieces == ["f", "o", "x"]


def test_endless_broken_bytes_neither_wait_nor_slow_down() -> None:
    """A model that has gone astray would make each token dearer than the one before."""
    token = TOKENIZERS["byte_level"].convert_tokens_to_ids("ÿ")  # the byte 0xFF
    seen: list[int] = []

    class Watched(Vocabulary):
        def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
            seen.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    detokenizer = Detokenizer(Watched(TOKENIZERS["byte_level"]))
    text = "".join([detokenizer.push(token) for _ in range(500)])
    assert len(text) == 499
    assert max(seen) < 12


def test_cost_per_token_does_not_grow() -> None:
    """A long answer would slow down the loop for everybody, a token at a time."""
    seen: list[int] = []

    class Watched(Vocabulary):
        def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
            seen.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    detokenizer = Detokenizer(Watched(TOKENIZERS["sentencepiece"]))
    for token in TOKENIZERS["sentencepiece"].convert_tokens_to_ids(["▁Hello", "▁world", "!"] * 200):
        detokenizer.push(token)
    assert max(seen) <= 3


@pytest.mark.parametrize(
    ("words", "pieces", "shown"),
    [
        (["STOP"], ["go ", "on ST", "OP never"], "go on "),
        (["STOP"], ["a STOP b STOP"], "a "),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo"),
        (["abc", "b"], ["xabc"], "xa"),
        (["abc", "c"], ["xabc"], "x"),
        (["abcd", "bc"], ["a", "b", "c", "d"], "a"),
        (["aab"], ["aaaab"], "aa"),
        (["aab"], ["a", "a", "a", "a", "b"], "aa"),
        (["x"], ["x"], ""),
        (["never"], ["nev", "er"], ""),
    ],
)
def test_nothing_of_a_stop_word_is_shown(words: list[str], pieces: list[str], shown: str) -> None:
    """A chat would show the beginning of the marker that ends the turn."""
    scanner = StopWords(words)
    assert "".join([scanner.push(piece) for piece in pieces]) == shown
    assert scanner.stopped


@settings(max_examples=500, deadline=None)
@given(
    words=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=6), max_size=8),
)
def test_how_the_text_arrives_does_not_matter(words: list[str], pieces: list[str]) -> None:
    """The same answer would end elsewhere when its tokens arrive two at a time."""

    def shown(parts: list[str]) -> tuple[str, bool]:
        scanner = StopWords(words)
        text = "".join([scanner.push(part) for part in parts])
        return text + scanner.finish(), scanner.stopped

    text = "".join(pieces)
    assert shown(pieces) == shown([text]) == shown(list(text))
    assert shown(pieces)[1] == any(word in text for word in words)


def test_what_did_not_become_a_stop_word_is_shown_in_the_end() -> None:
    """An answer would lose its last characters when they look like the beginning of a stop word."""
    scanner = StopWords(["</s>"])
    assert scanner.push("2 </") == "2 "
    assert scanner.finish() == "</"


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZERS["byte_level"].encode(text, add_special_tokens=False)
    return ids


def test_tokens_are_those_of_the_text_before_the_stop_word() -> None:
    """A user who decodes token_ids would find the stop word the text does not have."""
    stream = TextStream(VOCABULARIES["byte_level"], ["END"])
    pieces = [stream.push([token]) for token in encode("a Exit END b")]
    assert "".join(piece.text for piece in pieces) == "a Exit "
    assert sum(piece.tokens for piece in pieces) == len(encode("a Exit "))
    assert pieces[-3].stopped


def test_tokens_held_back_come_with_their_text() -> None:
    """Token ids would be told twice or never when a stop word did not come about."""
    stream = TextStream(VOCABULARIES["byte_level"], ["END"])
    pieces = [stream.push(encode("a EN"))]
    pieces.append(stream.finish())
    assert [(piece.text, piece.tokens, piece.stopped) for piece in pieces] == [("a ", 2, False), ("EN", 2, False)]


def test_a_stop_word_may_come_with_the_last_held_character() -> None:
    """A stop word that ends in a broken character would be shown at the end of an answer."""
    stream = TextStream(VOCABULARIES["byte_level"], ["�"])
    pieces = [stream.push(encode("a🦊")[:3]), stream.finish()]
    assert "".join(piece.text for piece in pieces) == "a"
    assert pieces[-1].stopped


def test_special_tokens_are_text_only_when_asked_for() -> None:
    """skip_special_tokens would have no effect on a stream."""
    ids = [*encode("a"), EOS, *encode("b")]
    assert joined("byte_level", ids, True) == "ab"
    assert joined("byte_level", ids, False) == "a<eos>b"


def test_a_tokenizer_without_a_fast_backend_will_do() -> None:
    """A model with a tokenizer written in Python could not stream."""

    class Slow:
        def convert_ids_to_tokens(self, token: int) -> str:
            return "ab"[token]

        def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            return "".join("ab"[token] for token in ids)

    detokenizer = Detokenizer(Vocabulary(Slow()))
    assert [detokenizer.push(token) for token in (0, 1, 7, 1)] == ["a", "b", "", "b"]
