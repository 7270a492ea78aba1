"""Options: defaults, bounds, and messages that say what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from vllm_ouroboros.config import (
    PROPOSER,
    ConfigError,
    OuroborosConfig,
    RequestOptions,
    is_ours,
    is_selected,
)

BOUNDS = {
    "draft_tokens": (1, 64),
    "num_suffixes": (0, 32),
    "phrase_len": (1, 32),
    "window_size": (0, 64),
    "guess_set_size": (1, 64),
    "pool_capacity": (64, 2**22),
}


def test_the_defaults_work_alone() -> None:
    for options in (None, {}):
        config = OuroborosConfig.parse(options)
        assert config == OuroborosConfig()
    assert config.draft_model is None
    assert config.pool_path is None
    assert config.pool_scope == "global"
    assert config.adaptive is True
    config.check_budget(26)  # what the README passes
    for key, (low, high) in BOUNDS.items():
        assert low <= getattr(config, key) <= high


def test_every_option_is_covered_here() -> None:
    others = {"draft_model", "pool_scope", "pool_path", "adaptive"}
    assert set(OuroborosConfig.model_fields) == set(BOUNDS) | others
    assert all(f.description for k, f in OuroborosConfig.model_fields.items())


@pytest.mark.parametrize("key", BOUNDS)
def test_bounds(key) -> None:
    low, high = BOUNDS[key]
    for value in (low, high):
        assert getattr(OuroborosConfig.parse({key: value}), key) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ConfigError) as error:
            OuroborosConfig.parse({key: value})
        message = str(error.value)
        assert f"ouroboros.{key} = {value}" in message
        assert f"{low} to {high}" in message
        assert "\n" not in message


@pytest.mark.parametrize("value", ["eight", 2.5, None, [3], {}])
@pytest.mark.parametrize("key", BOUNDS)
def test_wrong_types_of_numbers(key, value) -> None:
    low, high = BOUNDS[key]
    with pytest.raises(ConfigError) as error:
        OuroborosConfig.parse({key: value})
    assert f"ouroboros.{key} = {value!r}" in str(error.value)
    assert f"{low} to {high}" in str(error.value)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("draft_model", 3, "string"),
        ("pool_scope", "engine", "'global' or 'request'"),
        ("pool_scope", None, "'global' or 'request'"),
        ("adaptive", "perhaps", "boolean"),
        ("pool_path", 1, "string"),
    ],
)
def test_other_wrong_values(key, value, allowed) -> None:
    with pytest.raises(ConfigError) as error:
        OuroborosConfig.parse({key: value})
    assert f"ouroboros.{key} = {value!r}" in str(error.value)
    assert allowed in str(error.value)


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as error:
        OuroborosConfig.parse({"drat_tokens": 3})
    message = str(error.value)
    assert "ouroboros.drat_tokens: unknown key" in message
    assert all(key in message for key in OuroborosConfig.model_fields)


def test_every_wrong_key_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        OuroborosConfig.parse({"draft_tokens": 0, "phrase_len": 99, "nonsense": 1})
    for part in ("draft_tokens = 0", "phrase_len = 99", "nonsense"):
        assert part in str(error.value)


@pytest.mark.parametrize("options", ["{}", 3, [1], True, [("draft_tokens", 3)]])
def test_options_must_be_an_object(options) -> None:
    with pytest.raises(ConfigError, match="pass a JSON object") as error:
        OuroborosConfig.parse(options)
    assert repr(options) in str(error.value)


def test_a_pool_that_nobody_shares_is_not_kept() -> None:
    path = {"pool_path": "pool.bin"}
    for scope in ({}, {"pool_scope": "global"}):
        assert OuroborosConfig.parse({**path, **scope}).pool_path == "pool.bin"
    with pytest.raises(ConfigError, match=r"ouroboros\.pool_path = 'pool\.bin'.*'request'"):
        OuroborosConfig.parse({**path, "pool_scope": "request"})
    assert OuroborosConfig.parse({"pool_scope": "request"}).pool_path is None


def test_the_budget_must_hold_the_chain() -> None:
    OuroborosConfig(draft_tokens=9).check_budget(1)  # the policy takes what there is
    config = OuroborosConfig(draft_tokens=9, adaptive=False)
    config.check_budget(9)
    with pytest.raises(ConfigError) as error:
        config.check_budget(8)
    assert "num_speculative_tokens = 8" in str(error.value)
    assert "ouroboros.draft_tokens = 9" in str(error.value)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"ouroboros": None}])
def test_from_vllm_without_options(additional) -> None:
    vllm_config = SimpleNamespace(additional_config=additional, num_speculative_tokens=26)
    assert OuroborosConfig.from_vllm(vllm_config) == OuroborosConfig()


def test_from_vllm_reads_and_checks() -> None:
    vllm_config = SimpleNamespace(
        additional_config={"ouroboros": {"draft_tokens": 5, "draft_model": "x", "adaptive": False}},
        num_speculative_tokens=5,
    )
    config = OuroborosConfig.from_vllm(vllm_config)
    assert (config.draft_tokens, config.draft_model) == (5, "x")
    vllm_config.num_speculative_tokens = 4
    with pytest.raises(ConfigError, match="num_speculative_tokens = 4"):
        OuroborosConfig.from_vllm(vllm_config)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        OuroborosConfig().draft_tokens = 3


@pytest.mark.parametrize(
    "method, model, selected",
    [
        ("custom_class", PROPOSER, True),
        ("custom_class", "other.Proposer", False),
        ("ngram", PROPOSER, False),
        ("draft_model", "some/model", False),
    ],
)
def test_is_selected(method, model, selected) -> None:
    speculative = SimpleNamespace(method=method, model=model)
    assert is_ours(speculative) is selected
    assert is_selected(SimpleNamespace(speculative_config=speculative)) is selected
    assert not is_ours(None)
    assert not is_selected(SimpleNamespace(speculative_config=None))


def test_the_proposer_can_be_imported_by_its_public_name() -> None:
    package, _, name = PROPOSER.rpartition(".")
    module = __import__(package)
    assert getattr(module, name).__name__ == "OuroborosProposer"
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


REQUESTS = [
    {"speculate": False},
    {"learn": False, "scope": "team"},
    {"prediction": "x = 1\n"},
    {"prediction": [1, 2, 3]},
]


def test_a_request_without_options() -> None:
    for extra in (None, {}, {"other": 1}, {"ouroboros": {}}, {"ouroboros": "{}"}):
        assert RequestOptions.of(extra) == RequestOptions()
    assert all(f.description for f in RequestOptions.model_fields.values())


@pytest.mark.parametrize("options", REQUESTS, ids=str)
def test_options_of_a_request_as_an_object_or_as_text(options) -> None:
    as_object = RequestOptions.of({"ouroboros": options})
    assert as_object == RequestOptions.of({"ouroboros": json.dumps(options)})
    assert as_object.model_dump(exclude_defaults=True) == options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculat": False}, "ouroboros.speculat: unknown key"),
        ({"speculate": 0}, "ouroboros.speculate = 0"),
        ({"learn": "no"}, "ouroboros.learn = 'no'"),
        ({"scope": ""}, "ouroboros.scope = ''"),
        ({"scope": 3}, "ouroboros.scope = 3"),
        ({"scope": "x" * 300}, "ouroboros.scope"),
        ({"prediction": 3}, "ouroboros.prediction"),
        ({"prediction": [1, -1]}, "ouroboros.prediction"),
        ({"prediction": ["a"]}, "ouroboros.prediction"),
        ([], "ouroboros = []"),
        ("{", "ouroboros = '{': no JSON"),
        ("3", "ouroboros = '3'"),
        ("[" * 100_000, "no JSON"),
        ({"prediction": {"x": "y" * 100_000}}, "ouroboros.prediction"),
        (3, "ouroboros = 3"),
    ],
    ids=str,
)
def test_wrong_options_of_a_request(options, named) -> None:
    with pytest.raises(ConfigError) as error:
        RequestOptions.of({"ouroboros": options})
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
