"""Recipes: YAML round trip, defaults of the method, and one clear line for wrong input."""

from pathlib import Path

import pytest

from svdserve.compression.errors import UserError
from svdserve.compression.recipe import dump_recipe, load_recipe, make_recipe, make_run


def test_yaml_round_trip(tmp_path: Path):
    recipe = make_recipe(keep=0.6, parameters={"beta": 0.5}, calibration="text.txt", seed=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert make_recipe(**load_recipe(path)) == recipe


def test_learned_methods_share_by_their_scores(tmp_path: Path):
    recipe = make_recipe(method="soco", parameters={"learning_rate": 0.1})
    assert recipe.allocator == "scores"
    assert recipe.parameters["learning_rate"] == 0.1
    assert recipe.parameters["ridge"] == 1e-6
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert make_recipe(**load_recipe(path)) == recipe


def test_parameters_are_completed_with_the_methods_defaults():
    assert make_recipe(method="svd-llm").parameters == {"ridge": 1e-6}
    assert make_recipe(parameters={"beta": 0.5}).parameters["beta_range"] == (0.25, 0.75)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 1.5}, r"keep: .*less than or equal to 1 \(given: 1.5\)"),
        ({"keep": 0}, r"keep: .*greater than 0"),
        ({"layout": "diagonal"}, r"layout: .*'pair' or 'interpolative' \(given: 'diagonal'\)"),
        (
            {"method": "best"},
            r"unknown method 'best'; allowed: aa-svd, .*saes-svd",
        ),
        ({"parameters": {"gamma": 1}}, r"no parameter 'gamma'; it takes: beta"),
        (
            {"method": "soco", "allocator": "energy"},
            r"allocator 'energy': method soco learns .*; allowed: scores, or leave it out",
        ),
        (
            {"method": "svd-llm", "allocator": "scores"},
            r"allocator 'scores': method svd-llm learns none; take one of acip, soco, or another",
        ),
        (
            {"method": "soco", "parameters": {"exploration": 1.5}},
            r"exploration is 1.5: Input should be less than 1",
        ),
        (
            {"method": "soco", "parameters": {"exploration": 0.5, "refinement": 0.5}},
            r"exploration 0.5 and refinement 0.5 leave no steps",
        ),
        ({"method": "soco", "parameters": {"beta": 1}}, r"it takes: batch_size, epochs"),
        ({"kept": 0.5}, r"kept: Extra inputs are not permitted"),
        ({"tokens": -1}, r"tokens: .*greater than 0"),
    ],
)
def test_wrong_fields_name_what_is_allowed(fields: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        make_recipe(**fields)
    assert "\n" not in str(caught.value)


def test_wrong_run_is_a_user_error():
    with pytest.raises(UserError, match="batch_size"):
        make_run(batch_size=0)


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n", "must map"), ("a: [", "not YAML"), (None, "No such file")]
)
def test_unreadable_recipes(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
