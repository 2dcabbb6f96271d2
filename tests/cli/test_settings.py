"""What `--set` makes of a recipe's fields."""

from typing import Any

import pytest

from svdserve.cli.settings import with_settings
from svdserve.compression.system.errors import UserError


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("method.beta=aces", "parameters", {"beta": "aces"}),
        ("method.beta=0.5", "parameters", {"beta": 0.5}),
        ("method.ridge=1e-4", "parameters", {"ridge": 1e-4}),  # to YAML alone a word
        ("method.epochs=3", "parameters", {"epochs": 3}),
        ("method.beta_range=[0.25,0.5]", "parameters", {"beta_range": [0.25, 0.5]}),
        ("allocator.floor=0.2", "allocator_parameters", {"floor": 0.2}),
        ("refinement.calibration=same+self", "refinement", {"calibration": "same+self"}),
        ("refinement.calibration=a=b.txt", "refinement", {"calibration": "a=b.txt"}),
        ("block_refinement.epochs=2", "block_refinement", {"epochs": 2}),
    ],
)
def test_a_setting_is_one_value_of_a_part(setting: str, field: str, value: Any) -> None:
    assert with_settings({}, [setting]) == {field: value}


def test_settings_win_over_the_recipe_and_the_last_one_over_all() -> None:
    recipe = {"keep": 0.5, "parameters": {"beta": 0.1, "ridge": 0.2}, "refinement": None}
    settings = ["method.beta=0.3", "method.beta=0.4", "refinement.epochs=1"]
    assert with_settings(recipe, settings) == {
        "keep": 0.5,
        "parameters": {"beta": 0.4, "ridge": 0.2},
        "refinement": {"epochs": 1},
    }
    assert recipe["parameters"] == {"beta": 0.1, "ridge": 0.2}


@pytest.mark.parametrize(
    "setting", ["beta=1", "method=1", "method.=1", "=1", "", "method.beta", "recipe.keep=0.5"]
)
def test_anything_else_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=r"give PART\.NAME=VALUE .* for example --set method\."):
        with_settings({}, [setting])


@pytest.mark.parametrize("value", ["[", "{a", "2020-99-99", "[" * 3000])
def test_a_value_that_is_not_yaml_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="the value is not YAML"):
        with_settings({}, [f"method.beta={value}"])


def test_a_part_that_is_no_mapping_in_the_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="parameters must map names to values"):
        with_settings({"parameters": 3}, ["method.beta=1"])
