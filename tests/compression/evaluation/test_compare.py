"""A grid of recipes on a pico model: one table, resumable, nothing measured twice."""

import hashlib
import json
import math
from pathlib import Path

import pytest

from models import save_model
from svdserve.compression.evaluation import compare as module
from svdserve.compression.evaluation.compare import Comparison, compare, markdown, plot
from svdserve.compression.evaluation.options import Evaluation
from svdserve.compression.evaluation.perplexity import perplexity
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.pipeline.card import add_results
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Run, make_recipe
from svdserve.compression.pipeline.walk.passage import Passage
from svdserve.compression.system.errors import UserError

RUN = Run(progress=False, threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(900)))
    return path


def recipes(text: Path):
    calibration = {"calibration": str(text), "tokens": 256, "seq_len": 32}
    plain = {"layout": "pair", "grouping": "separate", "allocator": "uniform"}
    return {
        "ours": make_recipe(**calibration),
        "plain": make_recipe(method="svd", **plain, **calibration),
    }


@pytest.fixture(scope="module")
def found(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path, Path]:
    root = tmp_path_factory.mktemp("compare")
    model = save_model("llama", root / "model")
    evaluation = Evaluation(texts=(text,), seq_len=64)
    result = compare(str(model), root / "work", recipes(text), [0.7, 0.5], evaluation, RUN)
    return result, model, root


def test_every_cell_is_what_its_checkpoint_measures(found, text: Path) -> None:
    result, model, root = found
    names = [(cell.name, cell.keep) for cell in result.cells]
    grid = [(name, keep) for keep in (0.7, 0.5) for name in ("ours", "plain")]
    assert names == [("dense", 1.0), *grid]
    dense = perplexity(model, text, seq_len=64, progress=False)
    for cell in result.cells[1:]:
        out = root / "work" / f"{cell.name}-keep{cell.keep:g}"
        own = perplexity(out, text, seq_len=64, progress=False)
        assert cell.perplexities[0].perplexity == pytest.approx(own.perplexity)
        excess = math.log(own.perplexity / dense.perplexity)
        assert cell.excess(result.cells[0], 0) == pytest.approx(excess, abs=1e-9)
        assert make_recipe(**cell.perplexities[0].recipe) == cell.recipe
        assert cell.stored_bytes == sum(i.nbytes for i in TensorFiles(out).info.values())
    assert str(root) not in json.dumps(result.portable())
    assert result.portable()["cells"][1]["recipe"]["calibration"] == text.name
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert result.portable()["inputs"] == {
        "model": TensorFiles(model).fingerprint,
        text.name: digest,
    }
    table = markdown(result)
    assert len(table.splitlines()) == 2 + 5
    assert f"{dense.perplexity:.2f} (0.000)" in table


def test_at_keep_one_only_what_changes_the_model_has_a_row(text: Path, tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    plain = recipes(text)["ours"]
    rows = {"plain": plain, "int8": plain.model_copy(update={"weights": "int8"})}
    found = compare(str(model), tmp_path, rows, [1.0], Evaluation(texts=(text,), seq_len=64), RUN)
    dense, rounded = found.cells
    assert (rounded.name, rounded.keep) == ("int8", 1.0)
    assert rounded.stored_bytes < dense.stored_bytes


def test_perplexities_of_broken_models_are_short(found) -> None:
    result, *_ = found
    dense, cell, *_ = result.cells
    broken = cell.perplexities[0].model_copy(update={"perplexity": 366_274_588.378})
    broken_cell = cell.model_copy(update={"perplexities": (broken,)})
    table = markdown(Comparison(model=result.model, cells=[dense, broken_cell]))
    assert "| 3.7e+08 (" in table


def test_cards_show_the_results_beside_the_dense_model(found) -> None:
    result, _, root = found
    dense, *cells = result.cells
    for cell in cells:
        out = root / "work" / f"{cell.name}-keep{cell.keep:g}"
        card = (out / "README.md").read_text()
        table = markdown(Comparison(model=result.model, cells=[dense, cell]))
        assert card.count("## Results") == card.count("## Recipe") == 1
        assert f"## Results\n\n{table}\n## Recipe" in card
        whole = open_checkpoint(out).stored_bytes()["dense_equivalent"]
        assert f"{cell.stored_bytes / 2**20:,.1f} MiB instead of\n{whole / 2**20:,.1f} MiB" in card
        add_results(out, "other")  # in place of the first
        assert (out / "README.md").read_text() == card.replace(table, "other")


def test_finished_cells_are_not_measured_again(
    found, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, model, root = found
    calls: list[Path] = []

    def counted(directory: Path, *args, **kwargs):
        calls.append(directory)
        return perplexity(directory, *args, **kwargs)

    monkeypatch.setattr(module, "perplexity", counted)
    evaluation = Evaluation(texts=(text,), seq_len=64)
    work = root / "work"
    again = compare(str(model), work, recipes(text), [0.7, 0.5], evaluation, RUN)
    assert again == result
    assert calls == []
    (work / "ours-keep0.5.json").unlink()
    assert len(compare(str(model), work, recipes(text), [0.7, 0.5], evaluation, RUN).cells) == 5
    assert calls == [work / "ours-keep0.5"]


def test_methods_share_the_teachers_pass_and_change_nothing(
    found, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """κ and layout differ, the teacher's statistics and gradients do not: no second pass."""
    _, model, _ = found
    fields = {"calibration": str(text), "tokens": 256, "seq_len": 32, "keep": 0.6}
    chosen = [
        make_recipe(method="kfac-svd", **fields),
        make_recipe(method="kfac-svd", layout="pair", **fields),
    ]
    passes: list[int] = []
    forward = Passage.run

    def counted(passage: Passage, *args):
        passes.append(len(passes))
        return forward(passage, *args)

    monkeypatch.setattr(Passage, "run", counted)
    shared = RUN.model_copy(update={"cache": tmp_path / "teacher"})
    counts = []
    for index, recipe in enumerate(chosen):
        compress(str(model), tmp_path / f"alone{index}", recipe, RUN)
        passes.clear()
        compress(str(model), tmp_path / f"shared{index}", recipe, shared)
        counts.append(len(passes))
        for name in ("model.safetensors", "config.json"):
            own, other = (tmp_path / f"{kind}{index}" / name for kind in ("alone", "shared"))
            assert own.read_bytes() == other.read_bytes()
    assert counts[0] > 0
    assert counts[1] == 0
    # Another seed draws other tokens: nothing of the cache fits.
    compress(str(model), tmp_path / "other", make_recipe(**fields, seed=1), shared)
    assert len(list((tmp_path / "teacher").iterdir())) == 2


@pytest.mark.parametrize("own", [True, False])
def test_a_cache_of_the_user_is_kept(found, text: Path, tmp_path: Path, *, own: bool) -> None:
    _, model, _ = found
    cache, work = tmp_path / "cache", tmp_path / "work"
    run = RUN.model_copy(update={"cache": cache}) if own else RUN
    rows = {"kfac": make_recipe(method="kfac-svd", calibration=str(text), tokens=256, seq_len=32)}
    compare(str(model), work, rows, [0.6], Evaluation(texts=(text,), seq_len=64), run)
    used, unused = (cache, work / "teacher") if own else (work / "teacher", cache)
    assert len(list(used.iterdir())) == 1
    assert not unused.exists()


def test_another_recipe_under_the_same_name_is_refused(found, text: Path) -> None:
    _, model, root = found
    other = {"ours": make_recipe(method="svd", calibration=str(text), tokens=256, seq_len=32)}
    evaluation = Evaluation(texts=(text,), seq_len=64)
    with pytest.raises(UserError, match=r"cannot resume, recipe\.method was"):
        compare(str(model), root / "work", other, [0.7], evaluation, RUN)
    with pytest.raises(UserError, match="nothing to compare on"):
        compare(str(model), root / "work", other, [0.7], Evaluation(), RUN)


def test_other_inputs_than_those_of_the_folder_are_refused(
    found, text: Path, tmp_path: Path
) -> None:
    _, model, root = found
    evaluation = Evaluation(texts=(text,), seq_len=64)
    other = save_model("llama", tmp_path / model.name, num_hidden_layers=1)
    with pytest.raises(UserError, match="results of another model; use another folder"):
        compare(str(other), root / "work", recipes(text), [0.7], evaluation, RUN)
    before = text.read_text()
    try:
        text.write_text(before + "more")
        with pytest.raises(UserError, match=r"results of another .*\.txt; use another folder"):
            compare(str(model), root / "work", recipes(text), [0.7], evaluation, RUN)
    finally:
        text.write_text(before)


def test_plot_is_a_drawing(found, tmp_path: Path) -> None:
    result, *_ = found
    plot(result, tmp_path / "picture.svg")
    drawing = (tmp_path / "picture.svg").read_text()
    assert drawing.startswith("<?xml")
    assert drawing.count("<path") > 10
