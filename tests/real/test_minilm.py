"""A real embedding model: the vectors are those of sentence-transformers, whatever the batch, and mean something.

sentence-transformers is installed by whoever runs these tests, not by an extra: it brings scikit-learn and SciPy, and
lmbridge reads its files without it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers

from lmbridge import Bridge
from tests.real.minilm import minilm_folder
from tests.real.model import NoRealModelError

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

TOPICS = {
    "cooking soup": ("Simmer the broth with carrots for an hour", "Add salt and herbs before the pot boils"),
    "the stock market": ("Shares fell as investors feared higher rates", "The index closed two percent lower"),
    "football": ("The striker scored twice in the second half", "The goalkeeper saved a penalty in the final"),
    "astronomy": ("The telescope found a planet around a distant star", "Galaxies drift apart as space expands"),
    "gardening": ("Water the roses early and prune the dead branches", "Seedlings need light and loose soil"),
    "medicine": ("The doctor prescribed antibiotics for the infection", "Patients recover faster after this surgery"),
    "programming": (
        "The function returns a list and raises an exception",
        "A compiler turns source code into programs",
    ),
    "music": ("The orchestra rehearsed the symphony", "Her guitar solo ended the concert"),
    "weather": ("Heavy rain and wind are expected tomorrow", "Snow will fall in the mountains overnight"),
    "law": ("The judge dismissed the case for lack of evidence", "The contract was signed before witnesses"),
    "trains": ("The express to the coast departs from platform four", "The railway line is closed for repairs"),
    "painting": ("He mixed oil colours on the canvas", "The gallery shows portraits by old masters"),
    "school": ("Pupils sit an exam in the classroom", "The teacher marked the homework"),
    "fishing": ("They cast their nets and caught herring", "Trout hide under the stones of the river"),
    "history": ("The king was crowned after the battle", "The empire collapsed in the fifth century"),
    "cars": ("The engine needs new oil and brakes", "She parked the van in the garage"),
    "chess": ("White sacrifices a bishop to open the king's side", "The rook and the pawn decide the endgame"),
    "dogs": ("The puppy chased its tail and barked", "Terriers were bred for hunting"),
    "baking bread": ("Knead the dough and let it rise", "The loaf is done when the crust is brown"),
    "insurance": ("The policy covers damage by fire", "They filed a claim after the accident"),
}


@pytest.fixture(scope="module")
def folder() -> str:
    """The model's folder; without it these tests are skipped, and say why."""
    try:
        return str(minilm_folder())
    except NoRealModelError as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be had. {error}")


@pytest.fixture(scope="module")
def bridge(folder: str) -> Iterator[Bridge]:
    with Bridge(folder, engine="encoder") as bridge:
        yield bridge


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """From one word to more than the model reads."""
    generator = random.Random(3)
    words = " ".join(itertools.chain.from_iterable(TOPICS.values())).split()
    counts = [1, 2, 3, 400, *(generator.randint(3, 150) for _ in range(200))]
    return ["", *(" ".join(generator.choices(words, k=count)) for count in counts), "Größe 日本語 🙂"]


def test_it_is_packed(bridge: Bridge) -> None:
    """The most popular architecture would be served slower than it can be."""
    assert "embed, packed, mean pooling, 256 tokens" in bridge.describe()


@pytest.mark.parametrize("given", ["folder", "object"])
def test_vectors_are_those_of_sentence_transformers(folder: str, texts: list[str], given: str) -> None:
    """An index built with one of the two could not be searched with the other."""
    library = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    theirs = library.SentenceTransformer(folder, device="cpu")
    expected = theirs.encode(texts, show_progress_bar=False)
    model: Any = folder if given == "folder" else theirs
    with Bridge(model, engine="encoder") as bridge, ThreadPoolExecutor(32) as pool:
        assert "packed" in bridge.describe()
        listed = bridge.embed(texts, truncate="end")
        single = list(pool.map(lambda text: bridge.embed(text, truncate="end"), texts))
    assert numpy.abs(listed - expected).max() <= 1e-5
    assert numpy.abs(numpy.stack(single) - expected).max() <= 1e-5
    assert numpy.abs(theirs.encode(texts, show_progress_bar=False) - expected).max() == 0


def test_near_means_similar(bridge: Bridge) -> None:
    """The vectors would have the right shape and say nothing."""
    names, sentences = list(TOPICS), list(TOPICS.values())
    queries = bridge.embed([f"a text about {name}" for name in names])
    documents = bridge.embed([second for _, second in sentences])
    nearest = (queries @ documents.T).argmax(1)
    assert (nearest == numpy.arange(len(names))).mean() >= 0.8
    dimensions = bridge.embed("a text", dimensions=64)
    assert dimensions.shape == (64,)
    assert abs(float(dimensions @ dimensions) - 1) <= 1e-5


def test_a_reranker_ranks(folder: str, tmp_path: Path) -> None:
    """Scores would come out in the order of anything but relevance."""
    held_out = _train(folder, tmp_path)
    with Bridge(str(tmp_path), engine="encoder") as bridge:
        assert "rerank, packed" in bridge.describe()
        documents = [first for first, _ in held_out.values()]
        ranks = []
        for number, name in enumerate(held_out):
            ranked = bridge.rerank(f"a text about {name}", documents)
            assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)
            ranks.append([one.index for one in ranked].index(number))
    by_chance = (len(documents) - 1) / 2
    assert sum(ranks) / len(ranks) <= by_chance / 2


def _train(folder: str, target: Path) -> dict[str, tuple[str, str]]:
    """Save a reranker that was trained on some of the topics; the others."""
    torch.manual_seed(0)
    generator = random.Random(0)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    learned, held_out = dict(list(TOPICS.items())[8:]), dict(list(TOPICS.items())[:8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for _ in range(60):
        names = generator.sample(list(learned), 8)
        pairs = [(f"a text about {name}", generator.choice(learned[name])) for name in names]
        crossed = [(query, pairs[place - 1][1]) for place, (query, _) in enumerate(pairs)]
        given = tokenizer(*zip(*(pairs + crossed), strict=True), padding=True, return_tensors="pt")
        labels = torch.tensor([1.0] * len(pairs) + [0.0] * len(crossed))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(**given).logits[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return held_out
