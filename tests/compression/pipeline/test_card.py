"""What a published directory says and carries beside its weights."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from models import save_model
from svdserve.compression.format.integrity import SUMS_FILE, verify
from svdserve.compression.model.companions import DOWNLOADED, NOT_DOWNLOADED
from svdserve.compression.model.hub import hub_name
from svdserve.compression.pipeline.card import add_results
from svdserve.compression.pipeline.job import compress
from svdserve.compression.pipeline.recipe import Refinement, Run, make_recipe
from svdserve.compression.pipeline.stages.refine import refine

SOURCE_CARD = """---
license: other
license_name: community
license_link: LICENSE
language: [en, no]
base_model: org/ancestor
tags: [chat]
---
# A model
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model("llama", tmp_path_factory.mktemp("dense") / "local-folder")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "RAG {{ messages }}"}
    tokenizer.save_pretrained(directory)
    for name in ("LICENSE", "Licence.md", "NOTICE.txt", "USE_POLICY.md", "vocab.bpe", "x.tiktoken"):
        (directory / name).write_text(name)
    for name in ("modeling_x.py", "tokenizer.py", "pytorch_model.bin", "tokenizer.bin"):
        (directory / name).write_text(name)
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    (directory / "README.md").write_text(SOURCE_CARD)
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(0o444)
    return directory


def compressed(dense: Path, out: Path) -> Path:
    recipe = make_recipe(method="svd", allocator="uniform", keep=0.5, tokens=128, seq_len=32)
    compress(str(dense), out, recipe, Run(progress=False))
    return out


@pytest.fixture(scope="module")
def small(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(dense, tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="module")
def refined(dense: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "refined"
    settings = Refinement(epochs=1, calibration="self", tokens=128, seq_len=32)
    refine(str(dense), small, out, settings, Run(progress=False))
    return out


@pytest.mark.parametrize("made", ["small", "refined"])
def test_what_belongs_to_the_model_is_copied_and_nothing_else(
    made: str, request: pytest.FixtureRequest
):
    directory: Path = request.getfixturevalue(made)
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert {"LICENSE", "Licence.md", "NOTICE.txt", "USE_POLICY.md"} <= names
    assert {"vocab.bpe", "x.tiktoken", "chat_template.jinja"} <= names
    assert "additional_chat_templates/rag.jinja" in names
    assert not [name for name in names if name.endswith((".py", ".bin", "bin.index.json"))]
    assert AutoTokenizer.from_pretrained(directory).chat_template["rag"] == "RAG {{ messages }}"
    assert all((directory / name).stat().st_mode & 0o200 for name in names)
    assert "additional_chat_templates/rag.jinja" in (directory / SUMS_FILE).read_text()
    assert verify(directory) == len((directory / SUMS_FILE).read_text().splitlines())


@pytest.mark.parametrize("made", ["small", "refined"])
def test_the_card_of_a_local_model_carries_its_licence_and_no_folder(
    made: str, request: pytest.FixtureRequest
):
    card = ModelCard.load(request.getfixturevalue(made) / "README.md")
    assert card.data.license == "other"
    assert (card.data.license_name, card.data.license_link) == ("community", "LICENSE")
    assert card.data.language == ["en", "no"]
    assert card.data.base_model == "org/ancestor"
    assert card.data.library_name == "transformers"
    assert "chat" not in card.data.tags


def test_a_snapshot_of_the_hub_is_named_as_base_model(dense: Path, tmp_path: Path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(dense, snapshot)
    assert hub_name(snapshot) == "org/name"
    out = compressed(snapshot, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/name", "quantized")
    assert card.text.lstrip().startswith("# org/name, compressed with")
    add_results(out, "| model |\n|---|\n")
    again = ModelCard.load(out / "README.md")
    assert again.data.to_dict() == card.data.to_dict()
    assert "## Results\n\n| model |" in again.text
    settings = Refinement(epochs=1, calibration="self", tokens=128, seq_len=32)
    refine(str(snapshot), out, tmp_path / "refined", settings, Run(progress=False))
    assert ModelCard.load(tmp_path / "refined" / "README.md").data.base_model == "org/name"


@pytest.mark.parametrize(
    "front", ["license: [", "- a list", "base_model: ./folder\nlicense: {a: 1}", "a: 1\na: 2"]
)
def test_a_card_that_cannot_be_read_is_passed_over(dense: Path, tmp_path: Path, front: str):
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    (model / "README.md").unlink()
    (model / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    data = ModelCard.load(compressed(model, tmp_path / "out") / "README.md").data
    assert data.get("base_model") is None
    assert data.get("license") is None


def test_what_is_downloaded_of_a_hub_model():
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "vocab.bpe"]
    wanted += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "README.md"]
    wanted += [
        "LICENSE.txt",
        "NOTICE",
        "license.md",
        "qwen.tiktoken",
        "merges.txt",
        "modeling_x.py",
    ]
    others = ["pytorch_model.bin", "original/consolidated.00.pth", "a.gguf"]
    others += ["original/tokenizer.model", "onnx/model.onnx", "onnx/config.json", "x/a.safetensors"]
    found = filter_repo_objects(
        [*wanted, *others],
        allow_patterns=list(DOWNLOADED),
        ignore_patterns=list(NOT_DOWNLOADED),
    )
    assert list(found) == wanted
