"""Recipes: YAML round trip, defaults of the method, and one clear line for wrong input."""

from pathlib import Path

import pytest

from svdserve.compression.pipeline.recipe import (
    dump_recipe,
    load_recipe,
    make_recipe,
    make_run,
    recipe_names,
)
from svdserve.compression.system.errors import UserError


def test_a_refinement_may_mix_the_recipes_own_text_with_others():
    recipe = make_recipe(calibration="mine.txt", refinement={"calibration": "same+self"})
    assert recipe.refinement.text(recipe).calibration == "mine.txt+self"
    own = make_recipe(refinement={"calibration": "same+self", "tokens": 64})
    assert own.refinement.text(own).calibration == "self"
    assert own.refinement.text(own).tokens == 64


def test_yaml_round_trip(tmp_path: Path):
    recipe = make_recipe(
        keep=0.6,
        parameters={"beta": 0.5},
        calibration="text.txt",
        seed=3,
        block_refinement={"epochs": 7},
        refinement={"learning_rate": 1e-5, "tokens": 4096},
    )
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
        ({"layout": "diagonal"}, r"unknown layout 'diagonal'; allowed: interpolative, pair"),
        (
            {"method": "best"},
            r"unknown method 'best'; allowed: aa-svd, .*saes-svd",
        ),
        ({"parameters": {"gamma": 1}}, r"no hyper-parameter 'gamma'; it takes: beta"),
        (
            {"method": "soco", "allocator": "energy"},
            r"allocator 'energy': method soco learns .*; allowed: scores, or leave it out",
        ),
        (
            {"method": "svd-llm", "allocator": "scores"},
            r"allocator 'scores': method svd-llm learns none; give one of the methods acip, soco",
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
        ({"refinement": {"epochs": 0}}, r"refinement.epochs: .*greater than 0 \(given: 0\)"),
        ({"block_refinement": {"tokens": 9}}, r"block_refinement.tokens: Extra inputs"),
    ],
)
def test_wrong_fields_name_what_is_allowed(fields: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        make_recipe(**fields)
    assert "\n" not in str(caught.value)


def test_wrong_run_is_a_user_error():
    with pytest.raises(UserError, match="batch_size"):
        make_run(batch_size=0)


def test_named_recipes_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_names() == ["default", "best"]
    assert make_recipe(**load_recipe("default")) == make_recipe()
    best = make_recipe(**load_recipe("best"))
    assert best.refinement is not None
    (tmp_path / "best").mkdir()
    assert make_recipe(**load_recipe("best")) == best
    (tmp_path / "best").rmdir()
    (tmp_path / "best").write_text("keep: 0.3")  # a file of that name is what its owner means
    assert load_recipe("best") == {"keep": 0.3}


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n", "must map"), ("a: [", "not YAML"), (None, "No such file .* one of: default, best")],
)
def test_unreadable_recipes(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
