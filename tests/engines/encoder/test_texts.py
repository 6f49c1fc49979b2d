"""What becomes of one text: its tokens, its vector, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors.torch import save_file

from lmbridge import Bridge
from lmbridge.engines.encoder import EncoderEngine
from lmbridge.engines.encoder.settings import Module, Settings
from lmbridge.engines.encoder.vectors import Tail, finished
from lmbridge.errors import EngineStartError, InvalidRequestError, LMBridgeError, PromptTooLongError
from lmbridge.messages import Embed, Rerank
from tests.engines.encoder.conftest import (
    MIXED,
    ROOM,
    add_modules,
    alone,
    apart,
    driven,
    save_model,
    score_alone,
    tokenizer,
)

_OLDEST = "default_activation_function"
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


@pytest.mark.parametrize("layout", ["packed", "grouped"])
def test_every_kind_of_pooling(bert: str, layout: str) -> None:
    """A model that was trained with one of them would give vectors that mean nothing."""

    async def scenario(pooling: str) -> None:
        async with driven(bert, layout=layout, pooling=pooling) as driver:
            for text, vector in zip(MIXED, await driver.ask_all(MIXED), strict=True):
                assert vector.dtype == numpy.float32
                assert vector.shape == (32,)
                assert apart(vector, alone(bert, text, pooling)) <= 1e-5
            assert pooling in driver.engine.describe()

    for pooling in POOLINGS:
        asyncio.run(scenario(pooling))


@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.dense"])
def test_files_of_sentence_transformers_are_followed(tmp_path: Path, package: str) -> None:
    """Whoever serves a published model would get other vectors than its authors."""
    folder = save_model(tmp_path)
    dense = {
        "in_features": 64,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    add_modules(
        folder,
        ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}),
        ("Dense", dense),
        ("Normalize", {}),
        own={"max_seq_length": 20, "do_lower_case": True},
        general={"prompts": {"query": "query ", "long": "passage " * 30}, "default_prompt_name": "query"},
        package=package,
    )
    torch.manual_seed(1)
    weight, bias = torch.randn(8, 64), torch.randn(8)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")

    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    made: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def expected(text: str) -> Any:
        with torch.no_grad():
            hidden = model(**made(text, return_tensors="pt")).last_hidden_state[0]
        whole = weight @ torch.cat([hidden[0], hidden.max(0).values]) + bias
        return torch.nn.functional.normalize(whole, dim=0).numpy()

    async def scenario() -> None:
        async with driven(folder) as driver:
            assert apart(await driver.ask("The Cat"), expected("query the cat")) <= 1e-5
            assert apart(await driver.ask(Embed("the cat", normalize=False)), expected("query the cat")) <= 1e-5
            assert apart(await driver.ask(Embed("the cat", prompt="document")), expected("the cat")) <= 1e-5
            assert apart(await driver.ask(Embed("the cat", prompt="a dog ")), expected("a dog the cat")) <= 1e-5
            assert "cls + max pooling, 20 tokens" in driver.engine.describe()
            with pytest.raises(PromptTooLongError, match=r"The text has 33 tokens; the model reads at most 20\."):
                await driver.ask(Embed("the", prompt="long"))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("modules", "why"),
    [
        ([("Router", {})], "Router"),
        ([("Normalize", {}), ("Pooling", {})], "order"),
        ([("Pooling", {"include_prompt": False})], "include_prompt"),
        ([("Pooling", {}), ("Dense", {"in_features": 32, "out_features": 4, "use_residual": True})], "Dense"),
        ([("Pooling", {}), ("Normalize", {"module_input_name": "token_embeddings"})], "Normalize"),
        ([("Pooling", {}), ("Dense", {"in_features": 9, "out_features": 4})], "vectors of 9"),
        (
            [("Pooling", {}), ("Dense", {"in_features": 32, "out_features": 4, "activation_function": "os.abort"})],
            "abort",
        ),
        ([("Pooling", {}), ("Dense", {"in_features": 32, "out_features": 4})], "weights"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, modules: Any, why: str) -> None:
    """A step left out would give vectors that look right and are not."""
    folder = save_model(tmp_path)
    add_modules(folder, *modules)
    if why in ("Dense", "vectors of 9", "abort"):
        save_file({"linear.weight": torch.zeros(4, 32)}, next(tmp_path.glob("*_Dense")) / "model.safetensors")

    async def scenario() -> None:
        async with driven(folder):
            pass

    with pytest.raises(EngineStartError, match=why):
        asyncio.run(scenario())


def test_long_texts(bert: str) -> None:
    """A text that is too long would be cut without a word, or stop the engine."""
    long = "the cat " * 50_000

    async def scenario() -> None:
        async with driven(bert, max_length=30) as driver:
            with pytest.raises(
                PromptTooLongError, match=r"more than 30 tokens; the model reads at most 30\. .*truncate='end'"
            ):
                await driver.ask(long)
            with pytest.raises(PromptTooLongError, match=r"The text has 31 tokens"):
                await driver.ask("cat " * 29)
            with pytest.raises(PromptTooLongError, match=r"The text has 31 tokens"):
                await driver.ask(Embed([5] * 31))
            cut = alone(bert, long, length=30)
            assert apart(await driver.ask(Embed(long, truncate="end")), cut) <= 1e-5
            assert apart(await driver.ask(Embed("the " + "cat the " * 40, truncate="end")), cut) <= 1e-5
            assert apart(await driver.ask(Embed("the cat " * 14, truncate="error")), cut) <= 1e-5
            assert driver.stat("in_flight") == 0

    asyncio.run(scenario())


def test_long_documents(reranker: str) -> None:
    """A long document would be refused although its beginning says enough, or push the query out."""
    long = "the cat " * 50_000

    async def scenario() -> None:
        async with driven(reranker) as driver:
            expected = score_alone(reranker, "where did the cat go", long)
            assert abs(await driver.ask(Rerank("where did the cat go", long)) - expected) <= 1e-5
            with pytest.raises(
                PromptTooLongError, match=f"have 1 and {ROOM - 3} tokens; the model reads at most {ROOM}"
            ):
                await driver.ask(Rerank("cat", "cat " * (ROOM - 3), truncate="error"))
            with pytest.raises(PromptTooLongError, match="The query alone is too long") as caught:
                await driver.ask(Rerank("cat " * ROOM, "cat", truncate="error"))
            assert caught.value.param == "query"
            for query, document in (("cat " * ROOM, "dog"), ("cat " * 900, "dog " * 700), ("dog " * 200, "cat " * 250)):
                expected = score_alone(reranker, query, document)
                assert abs(await driver.ask(Rerank(query, document)) - expected) <= 1e-5
                assert abs(await driver.ask(Rerank(query, document)) - expected) <= 1e-5  # the query is remembered
            assert isinstance(await driver.ask(Rerank("", "")), float)

    asyncio.run(scenario())


def test_dimensions_and_length(bert: str) -> None:
    """Vectors for an index of fewer dimensions would have the wrong length, and cosines be off."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            whole = await driver.ask(Embed("the cat", normalize=False))
            assert abs(float(numpy.linalg.norm(whole)) - 1) > 0.1
            few, plain = await driver.ask_all([Embed("the cat", dimensions=8), Embed("the cat", False, 8)])
            assert few.shape == plain.shape == (8,)
            assert apart(plain, whole[:8]) <= 1e-5
            assert apart(few, whole[:8] / numpy.linalg.norm(whole[:8])) <= 1e-5
            assert few.base is None or few.base.size == few.size  # it keeps no batch alive
            few[:] = 0
            with pytest.raises(
                InvalidRequestError, match="dimensions is 33, but the model's vectors have 32"
            ) as caught:
                driver.add(Embed("the cat", dimensions=33))
            assert caught.value.param == "dimensions"

    asyncio.run(scenario())


def test_token_ids_are_taken_as_they_are(bert: str) -> None:
    """Ids that a caller counted would come out as other ones, or as a fault of the device that ends the engine."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            ids = tokenizer()("the cat sat").input_ids
            answer = await driver.add(Embed(ids)).wait()
            assert apart(answer.value, alone(bert, "the cat sat")) <= 1e-5
            assert answer.last is not None
            assert answer.last.usage is not None
            assert answer.last.usage.prompt_tokens == len(ids) == 5
            for wrong in ([160], [-1], [5, 10**30]):
                with pytest.raises(InvalidRequestError, match="token ids range from 0 to 159"):
                    await driver.ask(Embed(wrong))
            with pytest.raises(InvalidRequestError, match="only be put before a string"):
                await driver.ask(Embed(ids, prompt="query"))

    asyncio.run(scenario())


def test_nothing_is_a_text_too(tmp_path: Path, bert: str) -> None:
    """An empty cell of a table would end a job of ten thousand, or give a vector that is no number."""
    bare = save_model(tmp_path)
    tokenizer(specials=False).save_pretrained(bare)

    async def scenario() -> None:
        async with driven(bert) as driver:
            vectors = await driver.ask_all(["", "the cat", "", "  "])
            assert apart(vectors[0], alone(bert, "")) <= 1e-5
            assert apart(vectors[0], vectors[2]) <= 1e-5
        async with driven(bare) as driver:
            assert driver.layout == "packed"
            with pytest.raises(InvalidRequestError, match="produces no token"):
                await driver.ask("")
            assert (await driver.ask("cat")).shape == (32,)

    asyncio.run(scenario())


def test_a_text_of_broken_unicode_is_refused(bert: str) -> None:
    """Half a surrogate pair, as JavaScript sends it, would fail with a trace of the tokenizer."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            for text in ("a \ud800 b", "a \ud800 b" * 4000):
                with pytest.raises(InvalidRequestError, match="Unicode"):
                    await driver.ask(text)
            assert (await driver.ask("cat")).shape == (32,)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("task", "generate"),
        ("pooling", "median"),
        ("max_length", 0),
        ("max_length", True),
        ("max_batch_size", 0),
        ("max_batch_tokens", -1),
        ("max_batch_tokens", "8k"),
        ("batch_timeout", -1),
        ("batch_timeout", float("nan")),
        ("threads", 0),
        ("layout", "padded"),
        ("self_check", 1),
        ("dtype", "int8"),
        ("device", "gpu"),
        ("device", "cuda:one"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(bert: str, option: str, value: Any) -> None:
    """A typing error would show after minutes of loading."""
    with pytest.raises(InvalidRequestError) as caught:
        EncoderEngine(bert, **{option: value})
    assert caught.value.param == option


def test_a_length_that_the_model_does_not_have(tmp_path: Path, bert: str) -> None:
    """The first long text would fail in the model, on a GPU with the whole process."""

    async def scenario(folder: str, length: int) -> None:
        async with driven(folder, max_length=length) as driver:
            assert (await driver.ask(Embed("cat " * 400, truncate="end"))).shape == (32,)

    asyncio.run(scenario(bert, ROOM))
    roberta = save_model(tmp_path, "roberta")
    asyncio.run(scenario(roberta, ROOM))
    for folder in (bert, roberta):
        with pytest.raises(
            EngineStartError, match=f"max_length is {ROOM + 1}, but the model has positions for only {ROOM}"
        ):
            asyncio.run(scenario(folder, ROOM + 1))


def test_a_length_without_room_for_a_text(bert: str, reranker: str) -> None:
    """All texts would be cut to their special tokens, which all have the same vector."""

    async def scenario(folder: str, length: int) -> None:
        async with driven(folder, max_length=length) as driver:
            job = Embed("cat dog", truncate="end") if folder == bert else Rerank("cat dog", "cat dog")
            answer = await driver.add(job).wait()
            assert answer.last is not None
            assert answer.last.usage is not None
            assert answer.last.usage.prompt_tokens == length

    for folder, least in ((bert, 3), (reranker, 5)):
        asyncio.run(scenario(folder, least))
        with pytest.raises(EngineStartError, match=f"max_length={least - 1} is too small: .* needs at least {least}"):
            asyncio.run(scenario(folder, least - 1))


@pytest.mark.parametrize("place", ["config_sentence_transformers.json", "config.json", "oldest"])
def test_a_score_is_made_as_the_files_say(reranker: str, tmp_path: Path, place: str) -> None:
    """A threshold that was found on the model's own scores would mean nothing."""
    folder = tmp_path / "ranker"
    shutil.copytree(reranker, folder)
    name = "torch.nn.modules.linear.Identity"
    said: Any = {"activation_fn": name}
    if place != "config_sentence_transformers.json":
        said = {"sentence_transformers": said} if place == "config.json" else {f"sbert_ce_{_OLDEST}": name}
        said = json.loads((folder / "config.json").read_text()) | said
    (folder / place.replace("oldest", "config.json")).write_text(json.dumps(said))

    async def scenario() -> None:
        async with driven(str(folder)) as driver:
            assert "rerank, packed, identity score" in driver.engine.describe()
            for text in MIXED[:3]:
                score = await driver.ask(Rerank("cat", text))
                assert abs(1 / (1 + math.exp(-score)) - score_alone(reranker, "cat", text)) <= 1e-5

    asyncio.run(scenario())
    path = folder / place.replace("oldest", "config.json")
    path.write_text(path.read_text().replace(name, "mine.Activation"))
    with pytest.raises(EngineStartError, match=r"uses the activation mine\.Activation"):
        asyncio.run(scenario())


def test_of_several_labels_the_last_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody would know which of a model's three labels the documents were put in order by."""
    folder = save_model(tmp_path, head="ForSequenceClassification", num_labels=3)

    async def scenario() -> None:
        with caplog.at_level(logging.INFO, "lmbridge.loading"):
            async with driven(folder) as driver:
                assert "softmax of the last of 3 labels" in driver.engine.describe()
                score = await driver.ask(Rerank("cat", MIXED[1]))
                assert abs(score - score_alone(folder, "cat", MIXED[1])) <= 1e-5
        assert sum("a score is the softmax of the last of 3 labels" in line for line in caplog.messages) == 1
        with pytest.raises(EngineStartError, match="leave pooling='cls' out"):
            async with driven(folder, pooling="cls"):
                pass

    asyncio.run(scenario())


def test_a_prompt_that_may_be_mistyped_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A slip in the name of a prompt would make vectors that are a little wrong, for ever."""
    folder = save_model(tmp_path)
    add_modules(folder, general={"prompts": {"query": "query: ", "passage": "document: "}})

    async def scenario() -> None:
        async with driven(folder) as driver:
            for prompt in ("qeury", "qeury", "query", "passage", "document", "", "a query: ", "the cat."):
                await driver.ask(Embed("the cat", prompt=prompt))

    asyncio.run(scenario())
    told = [line for line in caplog.messages if "is not one of the model's prompts" in line]
    assert len(told) == 1
    assert "prompt='qeury'" in told[0]
    assert "'query', 'passage'" in told[0]


def test_vectors_of_any_size_get_length_one() -> None:
    """A model of large numbers would give zeros, whose cosine with everything is 0."""
    for size in (1e-30, 1e-20, 1.0, 1e20, 1e37):
        row = numpy.array([[3 * size, 4 * size]], numpy.float32)
        (vector,) = finished(row, [(None, True)])
        assert vector.dtype == numpy.float32
        assert apart(vector, [0.6, 0.8]) <= 1e-6
        tail = Tail(Settings(modules=[Module("Normalize", {})]), ("mean",), 2, torch.zeros(1))
        assert apart(tail(torch.from_numpy(row), torch.tensor([1])), [[0.6, 0.8]]) <= 1e-6
    assert finished(numpy.zeros((1, 2), numpy.float32), [(None, True)])[0].tolist() == [0, 0]


def test_task_and_size_are_known(bert: str, reranker: str, tmp_path: Path) -> None:
    """A call for the wrong model would be told late, and the device be promised too little memory."""

    async def scenario() -> None:
        async with driven(bert) as driver:
            assert driver.engine.tasks == {"embed"}
            assert driver.engine.footprint() == sum(4 * p.numel() for p in driver.model.parameters()) + sum(
                b.numel() * b.element_size() for b in driver.model.buffers()
            )
            estimate = driver.engine.estimate()
            assert estimate is not None
            assert 0.5 < estimate / (driver.engine.footprint() or 1) < 2
        async with driven(reranker) as driver:
            assert driver.engine.tasks == {"rerank"}
        async with driven(reranker, task="embed") as driver:  # its trunk
            assert driver.engine.tasks == {"embed"}
            assert (await driver.ask("cat")).shape == (32,)
        with pytest.raises(EngineStartError, match=r"lack 2 of the weights .*classifier"):
            async with driven(bert, task="rerank"):
                pass

    asyncio.run(scenario())
    halved = json.loads((Path(bert) / "config.json").read_text())
    assert halved["dtype"] == "float32"
    assert EncoderEngine(bert, dtype="bfloat16").estimate() == (EncoderEngine(bert).estimate() or 0) // 2
    assert EncoderEngine("nobody/has-this").estimate() is None


def test_half_precision(bert: str) -> None:
    """bfloat16 would be refused for rounding as it does, or come out in a type that numpy does not know."""

    async def scenario() -> None:
        async with driven(bert, dtype="bfloat16") as driver:
            for text, vector in zip(MIXED, await driver.ask_all(MIXED), strict=True):
                assert vector.dtype == numpy.float32
                assert apart(vector, alone(bert, text)) <= 0.05
            assert "bfloat16" in driver.engine.describe()

    asyncio.run(scenario())


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """It would be loaded, and fail at the first text."""
    config = transformers.T5Config(vocab_size=160, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)

    async def scenario() -> None:
        async with driven(str(tmp_path)):
            pass

    with pytest.raises(LMBridgeError, match="encoder-decoder"):
        asyncio.run(scenario())


def test_without_the_engine_name_it_is_told(bert: str, reranker: str) -> None:
    """Whoever leaves ``engine="encoder"`` out would be told to look for another model."""
    for folder in (bert, reranker):
        with pytest.raises(EngineStartError, match="engine='encoder'"), Bridge(folder):
            pass
