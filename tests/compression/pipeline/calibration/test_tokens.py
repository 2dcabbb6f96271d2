"""Calibration tokens: deterministic, of the asked shape, and checked before the long job."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import save_model
from svdserve.compression.pipeline.calibration.tokens import calibration_tokens, check_calibration
from svdserve.compression.pipeline.recipe import make_recipe
from svdserve.compression.system.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i % 26) + str(i) for i in range(200))[:500])
    return str(path)


def test_file_sequences_are_distinct_pieces_of_the_text(model: Path, text: str):
    recipe = make_recipe(calibration=text, tokens=200, seq_len=50)
    tokens = calibration_tokens(model, recipe)
    assert tokens.shape == (4, 50)
    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text()).input_ids
    pieces = [ids[start : start + 50] for start in range(0, len(ids), 50)]
    assert all(row in pieces for row in tokens.tolist())
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    assert torch.equal(tokens, calibration_tokens(model, recipe))
    other = calibration_tokens(model, recipe.model_copy(update={"seed": 1}))
    assert not torch.equal(tokens, other)


def test_short_text_gives_what_it_has(model: Path, text: str):
    recipe = make_recipe(calibration=text, tokens=10_000, seq_len=100)
    assert calibration_tokens(model, recipe).shape == (5, 100)


def test_text_below_one_sequence_is_refused(model: Path, tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("ab")
    recipe = make_recipe(calibration=str(path), tokens=64, seq_len=32)
    with pytest.raises(UserError, match="2 tokens are less than one sequence of 32"):
        calibration_tokens(model, recipe)


def test_joined_sources_share_the_sequences(model: Path, text: str):
    fields = {"seq_len": 40, "seed": 5}
    joined = make_recipe(calibration=f"{text}+self", tokens=200, **fields)
    check_calibration(model, joined)
    tokens = calibration_tokens(model, joined)
    parts = [
        calibration_tokens(model, make_recipe(calibration=text, tokens=120, **fields)),
        calibration_tokens(model, make_recipe(calibration="self", tokens=80, **fields)),
    ]
    assert torch.equal(tokens, torch.cat(parts))
    with pytest.raises(UserError, match="3 sources but only 1 sequences"):
        check_calibration(model, make_recipe(calibration="self+self+self", tokens=79, **fields))


def test_a_file_with_a_plus_in_its_name_is_one_source(model: Path, text: str):
    path = Path(text).with_name("a+b.txt")
    path.write_text(Path(text).read_text())
    fields = {"tokens": 200, "seq_len": 50}
    recipes = [make_recipe(calibration=str(name), **fields) for name in (path, text)]
    assert torch.equal(*(calibration_tokens(model, recipe) for recipe in recipes))


def test_self_calibration_is_the_models_own_text(model: Path):
    recipe = make_recipe(calibration="self", tokens=160, seq_len=40)
    tokens = calibration_tokens(model, recipe)
    assert tokens.shape == (4, 40)
    assert torch.equal(tokens, calibration_tokens(model, recipe))
    other = calibration_tokens(model, recipe.model_copy(update={"seed": 1}))
    assert not torch.equal(tokens, other)
    # The text is likelier to the model than random tokens are.
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    noise = torch.randint(4, 500, tokens.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, random = (float(network(ids, labels=ids).loss) for ids in (tokens, noise))
    assert own < random - 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"calibration": "no/such/file.txt", "seq_len": 32},
            "no such file; give a text file, hf:DATASET or self",
        ),
        ({"calibration": "hf:", "seq_len": 32}, "write hf:DATASET"),
        (
            {"calibration": "self+no/such", "seq_len": 32},
            "calibration no/such: no such file; .* or several joined by +",
        ),
        ({"calibration": "self", "seq_len": 4096}, "seq_len is 4096, but .* allows at most 256"),
    ],
)
def test_wrong_calibration_is_found_early(model: Path, fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        check_calibration(model, make_recipe(**fields))
