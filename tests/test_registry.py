"""Registries: entries by name."""

from __future__ import annotations

import pytest

from src.errors import ConfigError
from src.registry import Registry


def small() -> Registry[type]:
    registry = Registry[type]("optimizer")
    registry["adamw"], registry["sgd"] = int, float
    return registry


def test_entries_keep_their_order_and_decorated_ones_stay_as_they_are() -> None:
    registry = small()

    @registry.register("lion")
    class Lion:
        pass

    assert list(registry) == ["adamw", "sgd", "lion"]
    assert registry["lion"] is Lion


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="adamw, sgd; did you mean adamw"):
        small()["adam_w"]
    assert small().get("adam_w") is None
    assert small().why_unknown("sgd") == ""


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="optimizer sgd is registered"):
        small().register("sgd")(int)
