"""Loading a model: what it holds, what its author recommends, and what is refused with which words."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from lmbridge.engines.models import find_model
from lmbridge.engines.transformers import hub
from lmbridge.engines.transformers.loading import load, with_defaults
from lmbridge.engines.transformers.options import ModelOptions
from lmbridge.errors import EngineStartError, InvalidRequestError, MissingDependencyError, ModelNotFoundError
from lmbridge.messages import GenerationConfig

from .conftest import EOS, TEMPLATE, byte_level_tokenizer, save_model

IDS = torch.tensor([[7, 77, 17, 71]])


@pytest.fixture
def copy(llama: str, tmp_path: Path) -> Path:
    """A model's folder that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def save(model: Any, folder: Path, tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        byte_level_tokenizer().save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


# ---------------------------------------------------------------------------------------------------- what is loaded


def test_the_model_is_ready_to_run(llama: str, reference: Any) -> None:
    """Dropout, another arithmetic or other end tokens would change every answer."""
    loaded = load(ModelOptions(llama))
    assert not loaded.model.training
    assert str(loaded.model.device) == "cpu"
    assert loaded.model.dtype == torch.float32
    assert loaded.eos == {EOS}
    assert torch.equal(logits(loaded.model), logits(reference))


def test_dtype_and_attention_are_as_asked(llama: str) -> None:
    """The options would be taken and ignored."""
    loaded = load(ModelOptions(llama, dtype="bfloat16", attn_implementation="eager"))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.attention == loaded.model.config._attn_implementation == "eager"


def test_a_model_without_sdpa_gets_another_attention(tmp_path: Path) -> None:
    """Models for which transformers has one attention only could not be loaded."""
    shape = {"vocab_size": 264, "hidden_size": 32, "n_layer": 1, "n_head": 2}
    folder = save(transformers.BloomForCausalLM(transformers.BloomConfig(**shape)), tmp_path)
    assert load(ModelOptions(folder)).attention == "eager"


def test_an_attention_that_does_not_exist_is_refused(llama: str) -> None:
    """A misspelt option would silently run something else."""
    with pytest.raises(EngineStartError, match="quick"):
        load(ModelOptions(llama, attn_implementation="quick"))


def test_several_end_tokens_all_count(copy: Path) -> None:
    """A chat model would run past the end of its turn."""
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load(ModelOptions(str(copy))).eos == {3, 5, EOS}


def test_a_python_tokenizer_serves(copy: Path) -> None:
    """Models whose tokenizer transformers keeps in Python would be lost."""
    for file in copy.glob("*token*"):
        file.unlink()
    transformers.ByT5Tokenizer().save_pretrained(copy)
    tokenizer = load(ModelOptions(str(copy))).tokenizer
    assert not tokenizer.is_fast
    assert tokenizer.decode(tokenizer.encode("héllo", add_special_tokens=False)) == "héllo"


# ----------------------------------------------------------------------------------------- what its author recommends


@pytest.mark.parametrize(
    ("stated", "recommended"),
    [
        ({}, {}),
        ({"do_sample": True, "max_new_tokens": 9}, {}),
        ({"top_k": 50}, {"top_k": 50}),  # also where it is what transformers would assume
        ({"temperature": 1.0, "top_p": 1, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}, {}),
        ({"temperature": 0.0, "top_k": -1}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
        ),
        ({"temperature": "hot", "top_p": 1.5, "top_k": 20}, {"top_k": 20}),
    ],
)
def test_defaults_are_what_the_file_states(copy: Path, stated: dict[str, Any], recommended: dict[str, Any]) -> None:
    """Numbers that the author never gave would shape every sampled answer, or a broken file would end the loading."""
    (copy / "generation_config.json").write_text(json.dumps(stated))
    assert load(ModelOptions(str(copy))).defaults == recommended


def test_no_defaults_without_a_file_or_when_not_wanted(copy: Path) -> None:
    """Nobody could sample from the plain distribution of a model whose author recommends another."""
    (copy / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load(ModelOptions(str(copy), generation_defaults="none")).defaults == {}
    (copy / "generation_config.json").unlink()
    assert load(ModelOptions(str(copy))).defaults == {}


def test_the_model_itself_generates_neutrally(copy: Path) -> None:
    """``generate`` would add the file's settings to requests that did not ask, or end one that ignores ends."""
    (copy / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "repetition_penalty": 9.0}))
    settings = load(ModelOptions(str(copy))).model.generation_config
    assert (settings.temperature, settings.repetition_penalty, settings.eos_token_id) == (None, None, None)


RECOMMENDED = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        ({"do_sample": False}, {}),
        ({"temperature": 0}, {}),
        ({"repetition_penalty": 1.3}, {}),
        ({"do_sample": False, "top_p": 0.9}, {}),
        ({"do_sample": True}, RECOMMENDED),
        ({"random_seed": 1}, RECOMMENDED),
        ({"top_p": 0.9}, RECOMMENDED),
        ({"temperature": 0.9}, {"top_k": 20, "repetition_penalty": 1.1}),
        ({"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.0}, {}),
    ],
)
def test_defaults_hold_where_a_sampling_request_gives_none(given: dict[str, Any], changed: dict[str, Any]) -> None:
    """Greedy answers would change with a file, or a caller's own setting would lose against the file's."""
    config = GenerationConfig(**given)
    before = dict(config.__dict__)
    with_those = with_defaults(config, RECOMMENDED)
    assert with_those.__dict__ == {**before, **changed}
    assert config.__dict__ == before


# ----------------------------------------------------------------------------------------------- what is no such model


def bert(**settings: Any) -> Any:
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertConfig(**shape, intermediate_size=32, **settings)


def roberta() -> Any:
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.RobertaConfig(**shape, intermediate_size=32)


def t5() -> Any:
    return transformers.T5Config(vocab_size=264, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16)


def bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return transformers.BartConfig(vocab_size=264, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)


def small_llama() -> Any:
    shape = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaConfig(**shape, intermediate_size=32)


def vit() -> Any:
    return transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


@pytest.mark.parametrize(
    ("model_class", "config", "words"),
    [
        ("T5ForConditionalGeneration", t5, r"t5 model \(T5ForConditionalGeneration\), an encoder-decoder"),
        ("BartForConditionalGeneration", bart, "bart model .* an encoder-decoder"),
        ("BertForMaskedLM", bert, r"bert model \(BertForMaskedLM\), an encoder, which does not generate text"),
        ("BertForSequenceClassification", bert, "bert model .* an encoder"),
        ("BertModel", bert, "bert model .* an encoder"),
        ("RobertaForMaskedLM", roberta, "roberta model .* an encoder"),
        ("LlamaForSequenceClassification", small_llama, "which does not generate text"),
        ("ViTModel", vit, r"vit model \(ViTModel\), for which transformers has no causal language model"),
    ],
)
def test_what_is_no_causal_model_is_named(
    tmp_path: Path, model_class: str, config: Callable[[], Any], words: str
) -> None:
    """A page of class names would be the answer, or worse, noise in the place of text."""
    folder = save(getattr(transformers, model_class)(config()), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(EngineStartError, match=words) as caught:
        load(ModelOptions(folder))
    assert "ForCausalLM" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(folder)


def test_a_bert_set_up_as_decoder_is_a_causal_model(tmp_path: Path) -> None:
    """A real causal model would be refused for its family."""
    folder = save(transformers.BertLMHeadModel(bert(is_decoder=True)), tmp_path)
    assert type(load(ModelOptions(folder)).model).__name__ == "BertLMHeadModel"


def test_a_bart_decoder_by_itself_is_a_causal_model(tmp_path: Path) -> None:
    """A real causal model would be refused for its family."""
    folder = save(transformers.BartForCausalLM(bart()), tmp_path)
    assert type(load(ModelOptions(folder)).model).__name__ == "BartForCausalLM"


def test_a_multimodal_model_with_a_causal_text_part_is_allowed(tmp_path: Path) -> None:
    """Models that read images too would be refused, though they write text."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 264, "head_dim": 16, "num_key_value_heads": 1}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**shape, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=263,
        boi_token_index=262,
        eoi_token_index=261,
    )
    folder = save(transformers.Gemma3ForConditionalGeneration(config), tmp_path)
    assert load(ModelOptions(folder)).model.config.get_text_config().vocab_size == 264


def test_missing_weights_are_no_model(tmp_path: Path) -> None:
    """transformers fills what a file lacks with random numbers, and the answers would be noise."""
    folder = save(transformers.LlamaModel(small_llama()), tmp_path)
    with pytest.raises(EngineStartError, match=r"lack 1 of the weights .*LlamaForCausalLM.*lm_head\.weight"):
        load(ModelOptions(folder))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """Models that store their embeddings once would be refused."""
    config = small_llama()
    config.tie_word_embeddings = True
    folder = save(transformers.LlamaForCausalLM(config), tmp_path)
    assert load(ModelOptions(folder)).model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "zorgon"}', "model type `zorgon`.*newer lmbridge"),
        ("{}", "model_type"),
        ("{", "not a valid JSON file"),
        (
            '{"model_type": "zorgon", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}',
            "trust_remote_code=True",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path, config: str, words: str) -> None:
    """The reason would be lost in pages of advice, or the command would wait for an answer on the terminal."""
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(EngineStartError, match=words) as caught:
        load(ModelOptions(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_says_so(copy: Path) -> None:
    """A copy that was cut short would be told in a traceback."""
    (copy / "model.safetensors").unlink()
    with pytest.raises(EngineStartError, match=r"its weights cannot be read \(.*model\.safetensors"):
        load(ModelOptions(str(copy)))


def test_weights_that_are_cut_short_say_so(copy: Path) -> None:
    """The file at fault would not be named."""
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineStartError, match="its weights cannot be read"):
        load(ModelOptions(str(copy)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # of which transformers raises, and makes up an empty one
def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path, family: str) -> None:
    """A prompt would become no tokens, or the error would speak of conversions."""
    save_model(tmp_path, family=family)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(EngineStartError, match=r"holds no tokenizer .*AutoTokenizer"):
        load(ModelOptions(str(tmp_path)))


def test_a_broken_tokenizer_says_so(copy: Path) -> None:
    """It would look as if there were none."""
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(EngineStartError, match="its tokenizer cannot be read"):
        load(ModelOptions(str(copy)))


def test_a_tokenizer_that_needs_a_package_names_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older models bring a tokenizer.model, and the error would speak of conversions."""
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    with pytest.raises(MissingDependencyError, match="pip install sentencepiece"):
        load(ModelOptions(str(copy)))


# ---------------------------------------------------------------------------------------------------------------- GGUF


MERGED = ["he", "ll"]


def write_gguf(path: Path, model: Any) -> None:
    """The model in llama.cpp's form: its names, its order of the rotary dimensions, and a byte-level tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        count = next((count for part, count in heads.items() if part in name), None)
        if count:  # both halves of a head interleaved
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        writer.add_tensor(theirs, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: Any, size: int) -> None:
    vocabulary = byte_level_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *MERGED]
    unused = [f"<unused{number}>" for number in range(size - len(tokens))]
    kinds = [gguf.TokenType.NORMAL] * EOS + [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * len(MERGED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges([" ".join(word) for word in MERGED])
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(TEMPLATE)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, reference: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, reference)
    return path


def test_a_gguf_file_is_the_same_model(gguf_file: Path, reference: Any) -> None:
    """The commonest files of models could not be used, or would answer otherwise."""
    loaded = load(ModelOptions(find_model(str(gguf_file))))
    assert loaded.model.dtype == torch.float32
    assert torch.equal(logits(loaded.model), logits(reference))
    assert loaded.eos == {EOS}
    assert loaded.tokenizer.chat_template == TEMPLATE
    tokens = loaded.tokenizer.encode("hello", add_special_tokens=False)
    assert tokens[:2] == [EOS + 1, EOS + 2]
    assert loaded.tokenizer.decode(tokens) == "hello"


def test_a_folder_with_one_gguf_file_is_that_file(gguf_file: Path) -> None:
    """Whoever downloaded a folder would have to look up the file's name."""
    loaded = load(ModelOptions(find_model(gguf_file.parent), dtype="bfloat16"))
    assert loaded.model.dtype == torch.bfloat16


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_packages_the_error_names_the_extra(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """The user would not know what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'{package}\. .*pip install "lmbridge\[gguf\]"'):
        load(ModelOptions(str(gguf_file)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda whole: b"<!DOCTYPE html>", "is not a GGUF file"),
        (lambda whole: b"", "is not a GGUF file"),
        (lambda whole: whole[:200], "truncated"),
        (lambda whole: whole[: len(whole) // 2], "truncated"),
        (lambda whole: whole.replace(b"llama", b"zorgo"), "zorgo"),
    ],
)
def test_a_broken_gguf_file_says_so(
    gguf_file: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], words: str
) -> None:
    """A download that broke off would end in an error about the shape of an array."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(spoil(gguf_file.read_bytes()))
    with pytest.raises(EngineStartError, match=words) as caught:
        load(ModelOptions(str(broken)))
    assert str(broken) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- the hub


class Hub(http.server.ThreadingHTTPServer):
    """A hub on this machine: one model under one name, and the hub's own words for what it does not have."""

    daemon_threads = True

    def __init__(self, folder: str = "") -> None:
        self.folder = folder
        self.status = 0  # to answer with, whatever is asked
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):  # what huggingface_hub asks for itself, once per process
            self.server.asked.append(self.path)
        status, headers, body = self._answer(self.path.strip("/").split("/"))
        self.send_response(self.server.status or status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _answer(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        if parts[:2] == ["org", "gated"]:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if parts[:4] == ["api", "models", "org", "tiny"]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if parts[:3] != ["org", "tiny", "resolve"]:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[3] not in ("main", "c" * 40):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = Path(self.server.folder, parts[4])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c" * 40}, b""
        return 200, {"ETag": f'"{file.name}"', "X-Repo-Commit": "c" * 40}, file.read_bytes()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def a_hub(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that huggingface_hub asks, with an empty cache."""
    server = Hub(llama)
    use(server.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def put_into_cache(model: str, folder: str) -> None:
    root = Path(huggingface_hub.constants.HF_HUB_CACHE, "models--" + model.replace("/", "--"))
    shutil.copytree(folder, root / "snapshots" / ("c" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c" * 40)


def test_the_hub_is_asked_once_and_quickly(a_hub: Hub) -> None:
    """A model that is there would not be loaded, or be asked for twice before anything comes."""
    assert hub.only_from_cache("org/tiny") is False
    assert a_hub.asked == ["/org/tiny/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("dmo", None, r"no folder 'dmo' here \(did you mean 'demo'\?\), and the hub has no model of that name"),
        ("org/none", None, r"has no model of that name \(for a private one"),
        ("org/gated", None, "accepted its conditions"),
        ("org/tiny", "v9", "has no revision 'v9'"),
        ("no name", None, "not a valid name on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_told(a_hub: Hub, model: str, revision: str | None, words: str) -> None:
    """A mistyped name would end in advice about tokens and offline modes."""
    with pytest.raises(ModelNotFoundError, match=words):
        hub.only_from_cache(model, revision)


def test_a_folder_with_a_similar_name_is_suggested(
    a_hub: Hub, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user would look for the mistake in the network."""
    shutil.copytree(llama, tmp_path / "models" / "Llama-Tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="did you mean 'models/Llama-Tiny'"):
        hub.only_from_cache("models/lama-tiny")


def test_a_repository_without_configuration_is_left_to_transformers(a_hub: Hub, tmp_path: Path) -> None:
    """Models in a form that transformers knows without config.json would be refused."""
    a_hub.folder = str(tmp_path)
    assert hub.only_from_cache("org/tiny") is False


def test_an_adapter_on_the_hub_is_told_to_be_merged(a_hub: Hub, tmp_path: Path) -> None:
    """The user would look for a config.json that an adapter never has."""
    (tmp_path / "adapter_config.json").write_text("{}")
    a_hub.folder = str(tmp_path)
    with pytest.raises(EngineStartError, match=r"config\.json.*if it is an adapter \(LoRA\), merge it"):
        load(ModelOptions("org/tiny"))


def test_a_hub_that_is_out_of_order_is_left_to_the_library(a_hub: Hub) -> None:
    """One failed answer would end a loading that the library's repetition saves."""
    a_hub.status = 503
    assert hub.only_from_cache("org/tiny") is False


def test_a_hub_that_cannot_be_reached_is_told_at_once(a_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, the command would try for half a minute and then speak of something else."""
    use("http://127.0.0.1:9", monkeypatch)
    began = time.monotonic()
    with pytest.raises(
        ModelNotFoundError, match=r"did you mean 'demo'.*the hub cannot be reached \(.*check the network"
    ):
        hub.only_from_cache("dmo")
    assert time.monotonic() - began < 10


def test_a_hub_that_never_answers_is_given_up(a_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a firewall that drops packets, the command would hang for minutes."""
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as silent:  # it takes the connection and never serves it
        use(f"http://127.0.0.1:{silent.server_port}", monkeypatch)
        began = time.monotonic()
        with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
            hub.only_from_cache("org/tiny")
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("trouble", ["unreachable", "removed", "gated", "out of order", "offline mode"])
def test_a_cached_model_needs_no_hub(
    a_hub: Hub, llama: str, reference: Any, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A model that was loaded yesterday would not load on the train."""
    name = "org/gated" if trouble == "gated" else "org/old"
    put_into_cache(name, llama)
    if trouble == "unreachable":
        use("http://127.0.0.1:9", monkeypatch)
    elif trouble == "out of order":
        a_hub.status = 503
    elif trouble == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = load(ModelOptions(name))
    assert torch.equal(logits(loaded.model), logits(reference))
    assert len(a_hub.asked) == (0 if trouble in ("unreachable", "offline mode") else 1)


def test_offline_mode_asks_nobody(a_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has forbidden the network would see it used, or be told to check it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set and the hub's cache does not hold it"):
        hub.only_from_cache("org/tiny")
    assert a_hub.asked == []


def test_half_a_model_in_the_cache_says_so(a_hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that broke off would be told as a network's problem only."""
    (copy / "model.safetensors").unlink()
    put_into_cache("org/half", str(copy))
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelNotFoundError, match="the cache does not hold the complete model"):
        load(ModelOptions("org/half"))


LOAD = """
import sys
from lmbridge.engines.transformers.loading import load
from lmbridge.engines.transformers.options import ModelOptions
loaded = load(ModelOptions("org/tiny", revision="main"))
print(type(loaded.model).__name__, len(loaded.tokenizer))
"""


def test_a_model_comes_from_the_hub(a_hub: Hub, tmp_path: Path) -> None:
    """The look-up would be right and the download would not follow, or not from the hub that was looked at."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": a_hub.url}
    child = subprocess.run(
        [sys.executable, "-c", LOAD], env={**os.environ, **home}, capture_output=True, text=True, timeout=100
    )
    assert child.stdout.split() == ["LlamaForCausalLM", "257"], child.stderr
    assert any(path.endswith("model.safetensors") for path in a_hub.asked)


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("runner", "fast"),
        ("runner", None),
        ("generation_defaults", True),
        ("self_check", "no"),
        ("cuda_graphs", 1),
        ("trust_remote_code", "yes"),
        ("revision", 3),
    ],
)
def test_an_invalid_option_is_named(option: str, value: object) -> None:
    """``self_check="no"`` would be true, and a misspelt runner the default one."""
    options: Any = {option: value}
    with pytest.raises(InvalidRequestError, match=option) as caught:
        ModelOptions("demo", **options)
    assert caught.value.param == option
