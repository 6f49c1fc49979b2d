"""Converts LMDeploy's GenerationConfig to ours, for the chosen engine.

Rule: the caller's thread. Configs are read by field name, so LMDeploy's own objects work like ours. An invalid or
unsupported value fails only its own prompt, when that is sent, as in LMDeploy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmbridge import messages
from lmbridge.compat.lmdeploy.convert import changed_fields, has_fields
from lmbridge.compat.lmdeploy.keywords import Keywords, told_once
from lmbridge.compat.lmdeploy.messages import GenerationConfig
from lmbridge.engines.lmdeploy.own import GENERATION, OWN_FIELDS, LMDeployRequestConfig
from lmbridge.errors import InvalidRequestError, LMBridgeError, UnsupportedOptionError

_PLAIN = (
    "max_new_tokens", "min_new_tokens", "ignore_eos", "skip_special_tokens", "stop_words", "stop_token_ids", "logprobs",
    "include_stop_str_in_output",
)  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "random_seed")
_READ = frozenset({"n", "do_sample", "response_format", *_PLAIN, *_SAMPLING, *GENERATION})
_WITHOUT_EFFECT = frozenset({"return_ppl", "spaces_between_special_tokens"})
"""Fields without effect on the Responses of LMDeploy's pipeline with a fast tokenizer."""
_NO_LIMIT = 2**31 - 1  # only the model's context limits the answer
_BAN = -100.0  # the strongest possible bias

WordIds = Callable[[str], Sequence[int]]
"""The tokens of a bad word; raises LMBridgeError if there are none."""


@dataclass(frozen=True)
class Ability:
    """What the underlying engine can do.

    Attributes:
        supports: the names of the fields that it supports.
        word_ids: finds the tokens of bad words, if the engine cannot.
    """

    supports: frozenset[str]
    word_ids: WordIds

    @property
    def own(self) -> bool:
        """Whether it is LMDeploy's engine."""
        return self.supports >= OWN_FIELDS


class RefusedConfig(messages.GenerationConfig):
    """An invalid config: its prompt fails when its request is made, and the list's others run."""

    def __init__(self, error: LMBridgeError) -> None:
        super().__init__()
        self._error = error

    def merged(self, overrides: messages.Overrides) -> messages.GenerationConfig:
        raise self._error


def generation_config(config: Any, ability: Ability, keywords: Keywords) -> messages.GenerationConfig:
    """Our config for LMDeploy's and the call's keywords; its values are checked when it is sent.

    As in LMDeploy, without ``do_sample`` decoding is greedy and has no repetition penalty.

    Raises:
        InvalidRequestError: ``config`` is not a GenerationConfig.
    """
    if config is None:
        config = GenerationConfig()
    if type(config).__name__ != "GenerationConfig" or not has_fields(config, _READ):
        raise InvalidRequestError(
            f"gen_config must be a GenerationConfig (or a list of one per prompt), not {type(config).__name__}.",
            "gen_config",
        )
    try:
        _look_through(config)
        fields = {
            **_plain(config),
            **_form(config.response_format),
            **_of_lmdeploy(config, ability),
            **keywords.own,
        }
    except LMBridgeError as error:
        return RefusedConfig(error)
    if keywords.template:
        fields["chat_template_kwargs"] = keywords.template
    if "return_prompt_token_ids" in ability.supports:  # LMDeploy reports the prompt's length from the first part on
        fields["return_prompt_token_ids"] = True
    if not OWN_FIELDS.isdisjoint(fields):
        return LMDeployRequestConfig(**fields)
    return messages.GenerationConfig(**fields)


def _look_through(config: Any) -> None:
    """Warn about what is ignored, as in LMDeploy, and refuse unknown fields."""
    if config.n != 1:
        told_once("GenerationConfig.n=%s is treated as 1, as in LMDeploy", config.n)
    for name in changed_fields(config):
        if name in _WITHOUT_EFFECT:
            told_once("GenerationConfig.%s has no effect, as in LMDeploy", name)
        elif name not in _READ:
            raise UnsupportedOptionError(f"GenerationConfig.{name} is not supported; leave it out.", param=name)


def _plain(config: Any) -> dict[str, Any]:
    fields = {name: getattr(config, name) for name in _PLAIN}
    if config.max_new_tokens is None:
        fields["max_new_tokens"] = _NO_LIMIT
    elif config.min_new_tokens and not 0 <= config.min_new_tokens <= config.max_new_tokens:
        told_once("GenerationConfig.min_new_tokens=%s has no effect, as in LMDeploy", config.min_new_tokens)
        fields["min_new_tokens"] = None
    if config.do_sample:  # otherwise greedy: engines without sampling fields work too
        fields.update(do_sample=True, **{name: getattr(config, name) for name in _SAMPLING})
        if config.top_p == 0:  # the smallest set of all is the most likely token
            fields.update(top_p=None, top_k=1)
    return fields


def _form(asked: Any) -> dict[str, Any]:
    """The form of the answer; LMDeploy also accepts a bare schema, and regular expressions as a format."""
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind == "regex_schema":
        return {"grammar": {"regex": asked.get("regex_schema")}}
    if kind == "structural_tag":
        return {"structural_tag": asked}
    if kind == "json_schema":
        schema = asked.get("json_schema")
        if isinstance(schema, Mapping):
            schema = next((schema[name] for name in ("json_schema", "schema") if name in schema), schema)
        return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    return {"response_format": asked}


def _of_lmdeploy(config: Any, ability: Ability) -> dict[str, Any]:
    """Options for LMDeploy's own engine; other engines take what they support and refuse the rest."""
    own = {name: value for name in GENERATION if (value := getattr(config, name)) not in (None, 0, False)}
    if ability.own:
        return {**own, "keep_ending_token": True} if config.include_stop_str_in_output else own
    words, ids = own.get("bad_words"), own.get("bad_token_ids")
    if (words or ids) and "logit_bias" in ability.supports:
        bans = [*(ids or ()), *(token for word in words or () for token in ability.word_ids(word))]
        own = {name: value for name, value in own.items() if name not in ("bad_words", "bad_token_ids")}
        own["logit_bias"] = dict.fromkeys(bans, _BAN)
    return own
