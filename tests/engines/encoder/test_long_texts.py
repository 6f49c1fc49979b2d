"""Texts of any length: they cost as much as the model reads of them, and hold up nobody."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmbridge.engines.encoder.encoding import INLINE_CHARACTERS, TextEncoder, shares
from lmbridge.engines.encoder.settings import Settings
from lmbridge.errors import PromptTooLongError
from lmbridge.messages import Embed, Rerank
from tests.engines.encoder.conftest import WORDS, Brake, alone, apart, driven, tokenizer

ROOM = 300
_SPOKEN = " ".join(WORDS)
_CHINESE = "的一是不了人我在有他这为之大来以个中上们"


def _bytes_in_pairs() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([_SPOKEN, _CHINESE] * 3, trainer)
    return made


def _pieces() -> Any:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=100, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([_SPOKEN, _CHINESE] * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


_TOKENIZERS = {
    "words": lambda: tokenizer().backend_tokenizer,
    "bytes": _bytes_in_pairs,
    "pieces": _pieces,
}


def _texts(kind: str) -> list[str]:
    dice = random.Random(4)
    words = " ".join(dice.choice(WORDS) for _ in range(2_500))
    return [
        words,
        words.replace(" ", "\n"),
        "".join(dice.choice(_CHINESE) for _ in range(10_000)),
        " " * 9_000 + words,
        "the cat" + " " * 12_000,  # few tokens, many characters
        words[:INLINE_CHARACTERS],
        *([words.replace(" ", "")] if kind == "bytes" else []),  # one word, with which the others take for ever
    ]


@pytest.mark.parametrize("kind", _TOKENIZERS)
def test_what_is_read_of_a_long_text_is_its_beginning(kind: str) -> None:
    """Only a beginning is looked at; where that ends, a text would get a token that is not its own."""
    made = _TOKENIZERS[kind]()
    encoder = TextEncoder(made, 10_000, ROOM, Settings(lowercase=True), False)
    cutting = Tokenizer.from_str(made.to_str())
    cutting.enable_truncation(ROOM, strategy="longest_first")
    for text in _texts(kind):
        assert encoder.encode(Embed(text, truncate="end")).ids == cutting.encode(text).ids
    text = _texts(kind)[0]
    for query, document in ((_SPOKEN, text), (text, "the cat"), (text[:9_000], text)):
        assert encoder.encode(Rerank(query, document)).ids == cutting.encode(query, document).ids


def test_both_ends_are_cut_as_tokenizers_do() -> None:
    """A pair would be scored differently from the library that the model comes with."""
    made = tokenizer().backend_tokenizer
    for left in (10, 11):
        made.enable_truncation(left + 3, strategy="longest_first")
        for query in range(1, 15):
            for document in range(1, 15):
                types = made.encode("cat " * query, "dog " * document).type_ids
                assert shares(query, document, left) == (types.count(0) - 2, types.count(1) - 1)


class _CountingTokenizer:
    """The real one, which notes how much it was given."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._backend.encode_batch(texts, **options)


@pytest.mark.parametrize("job", [Embed, lambda text, truncate: Rerank("cat", text, truncate)])
def test_a_text_of_millions_costs_what_the_model_reads(job: Any) -> None:
    """One caller's 20 MB would stop everybody for half a minute, and even to be refused."""
    counting = _CountingTokenizer(tokenizer().backend_tokenizer)
    encoder = TextEncoder(counting, 160, 100, Settings(), False)
    huge = "the cat " * 2_500_000
    assert encoder.encode(job(huge, truncate="end")).size == 100
    with pytest.raises(PromptTooLongError, match="more than 100 tokens"):
        encoder.encode(job(huge, truncate="error"))
    assert counting.characters <= 4 * INLINE_CHARACTERS


def test_long_texts_stand_in_nobodys_way(bert: str) -> None:
    """A list of long texts would become tokens as a whole before anybody's short one is computed, left or not."""
    long = Embed("the cat " * 5_000, truncate="end")

    async def scenario() -> None:
        async with driven(bert) as driver:
            brake = Brake(driver)
            first = driver.add("the cat")
            await brake.arrival()
            core = driver.engine._core
            assert core is not None
            begun: list[Any] = []
            encode = core.encoder.encode

            def noted(job: Any) -> Any:
                begun.append(job)
                return encode(job)

            core.encoder.encode = noted  # type: ignore[method-assign]
            listed = [driver.add(long, "list") for _ in range(100)]
            other = driver.add(Embed("the dog " * 5_000, truncate="end"), "somebody")
            short = driver.add("the dog", "third")
            for answer in listed[50:]:
                driver.abort(answer)
            brake.lift()
            await short.wait()
            await other.wait()
            assert sum(answer.last is not None for answer in listed[:50]) <= 20
            assert len(begun) < 40
            for answer in (first, *listed):
                await answer.wait()
            assert apart(listed[0].value, alone(bert, "the cat " * 200)) <= 1e-5
            assert apart(other.value, alone(bert, "the dog " * 200)) <= 1e-5
            assert len([job for job in begun if job is long]) <= 50 + 16
            assert driver.stat("in_flight") == 0

    asyncio.run(scenario())
