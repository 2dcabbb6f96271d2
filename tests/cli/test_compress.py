"""`svdserve compress` as a user types it, and what its checkpoint then tells."""

import json
from pathlib import Path

import pytest
import yaml

from commands import svdserve
from models import random_tokens, save_model
from svdserve.compression.pipeline.recipe import Recipe, Run


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("compress") / "dense")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [f"w{400 + i}" for i in (random_tokens(1, 600)[0] % 100).tolist()]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(words))
    return file


def test_compress_help_shows_the_defaults_of_the_recipe() -> None:
    done = svdserve("compress", "--help")
    assert done.returncode == 0
    recipe = Recipe()
    for value in (recipe.keep, recipe.method, recipe.layout, recipe.tokens):
        assert f"({value})" in done.stdout


def test_compress_eval_and_inspect(dense: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: saes-svd\nkeep: 0.9\nlayout: pair\ntokens: 256\nseq_len: 64\n"
        "refinement:\n  epochs: 2\n"
    )
    small = tmp_path / "small"
    options = ("--recipe", recipe, "--keep", "0.6", "--beta", "0.5", "--calibration", text)
    done = svdserve("compress", dense, "--out", small, *options)
    assert done.returncode == 0, done.stderr
    assert "held-out KL" in done.stdout
    block = json.loads((small / "config.json").read_text())["quantization_config"]
    assert block["keep"] == 0.6  # the command line wins over the file
    assert block["recipe"]["layout"] == "pair"
    assert block["recipe"]["refinement"]["epochs"] == 2
    assert block["recipe"]["parameters"]["beta"] == 0.5

    record = tmp_path / "results" / "eval.json"
    done = svdserve("eval", dense, small, "--text", text, "--seq-len", "64", "--json", record)
    assert done.returncode == 0, done.stderr
    results = json.loads(record.read_text())
    assert [entry["model"] for entry in results] == [str(dense), str(small)]
    assert results[0]["perplexity"] != results[1]["perplexity"]

    done = svdserve("inspect", small, "--json")
    rows = json.loads(done.stdout)["modules"]
    # The first group of the model sees no shift between the streams, so its β is 0.
    assert {row["beta"] for row in rows if row["rank"]} == {0.0, 0.5}


def test_the_help_page_has_every_plain_field_of_recipe_and_run() -> None:
    page = svdserve("compress", "--help").stdout
    nested = {"parameters", "allocator_parameters", "block_refinement", "refinement"}
    for name in (set(Recipe.model_fields) | set(Run.model_fields)) - nested:
        assert f"--{name.replace('_', '-')} " in page, name


def test_settings_reach_method_allocator_and_refinement(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: saes-svd\nparameters: {beta: 0.75, ridge: 1.0e-3}\n"
        "allocator: energy\nallocator_parameters: {floor: 0.5}\n"
        f"calibration: {text}\ntokens: 256\nseq_len: 64\n"
    )
    small = tmp_path / "small"
    settings = (
        "method.beta=aces",
        "method.beta_range=[0.25,0.5]",
        "allocator.floor=0.2",
        "refinement.epochs=1",
        "refinement.learning_rate=1e-5",
    )
    repeated = [word for setting in settings for word in ("--set", setting)]
    done = svdserve(
        "compress", dense, "--out", small, "--recipe", recipe, "--no-progress", *repeated
    )
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((small / "recipe.yaml").read_text())
    assert written["parameters"]["beta"] == "aces"  # instead of the file's
    assert written["parameters"]["ridge"] == 1e-3  # still the file's
    assert written["parameters"]["beta_range"] == [0.25, 0.5]
    assert written["allocator_parameters"] == {"floor": 0.2}
    assert written["refinement"]["epochs"] == 1
    assert written["refinement"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--set", "x.beta=1"), "--set x.beta=1: give PART.NAME=VALUE with one of these parts:"),
        (("--set", "method.beta"), "--set method.beta: give PART.NAME=VALUE"),
        (("--set", "method.beta=["), "--set method.beta=[: the value is not YAML"),
        (
            ("--set", "method.nothing=1"),
            "has no hyper-parameter 'nothing'; it takes: beta, beta_range",
        ),
        (("--set", "method.beta=2"), "beta is 2: Input should be less than or equal to 1"),
        (("--set", "allocator.floor=2"), "floor is 2: Input should be less than or equal to 1"),
        (("--set", "refinement.epochs=0"), "refinement.epochs: Input should be greater than 0"),
        (("--set", "block_refinement.x=1"), "block_refinement.x: Extra inputs are not permitted"),
        (("--beta", "2"), "beta is 2: Input should be less than or equal to 1"),
        (("--layout", "x"), "unknown layout 'x'; allowed: interpolative, pair"),
        (("--precision", "int4"), "precision: Input should be 'float32' or 'bfloat16'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_setting_is_one_line(
    words: tuple[str, ...], says: str, dense: Path, tmp_path: Path
) -> None:
    done = svdserve("compress", dense, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "out").exists()
