"""Calibration text: files of any size, datasets of any column, models that ship anything."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

from models import save_model
from svdserve.cli.main import app
from svdserve.compression.evaluation.perplexity import text_chunks
from svdserve.compression.pipeline.calibration.tokens import (
    calibration_digests,
    calibration_tokens,
    check_calibration,
)
from svdserve.compression.pipeline.recipe import make_recipe
from svdserve.compression.system.errors import UserError

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model("llama", tmp_path_factory.mktemp("model") / "llama")
    (directory / "generation_config.json").unlink()
    return directory


@pytest.fixture(scope="module")
def plain(model: Path) -> torch.Tensor:
    """What the model writes without a generation_config.json."""
    return calibration_tokens(model, make_recipe(tokens=160, seq_len=40))


def variant(model: Path, directory: Path, **files: dict) -> Path:
    shutil.copytree(model, directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "shipped",
    [
        {"max_new_tokens": 20, "repetition_penalty": 1.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"suppress_tokens": list(range(4, 200)), "temperature": 0.1, "top_k": 3},
        {"stop_strings": ["a", "b"], "max_time": 0.001},
        {"eos_token_id": 2, "min_p": 0.5, "no_repeat_ngram_size": 1, "cache_implementation": "x"},
    ],
)
def test_self_samples_plainly_whatever_the_model_ships(
    model: Path, plain: torch.Tensor, tmp_path: Path, shipped: dict
):
    directory = variant(model, tmp_path / "model", generation_config=shipped)
    recipe = make_recipe(tokens=160, seq_len=40)
    assert torch.equal(calibration_tokens(directory, recipe), plain)


def test_ids_without_an_embedding_are_never_drawn_and_text_with_them_is_refused(
    model: Path, tmp_path: Path
):
    directory = variant(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for file in directory.glob("tokenizer*"):
        file.unlink()
    tokenizer.add_tokens(["the ", *(f"<|extra{i}|>" for i in range(4000))])
    tokenizer.save_pretrained(directory)
    tokens = calibration_tokens(directory, make_recipe(tokens=160, seq_len=40))
    assert tokens.shape == (4, 40)
    assert int(tokens.max()) < 512
    text = tmp_path / "text.txt"
    text.write_text("over the hill " * 20)
    with pytest.raises(UserError, match=r"has the token id 512, but .* embeddings for 512 ids"):
        calibration_tokens(directory, make_recipe(calibration=str(text), tokens=40, seq_len=40))
    with pytest.raises(UserError, match="has the token id 512"):
        text_chunks(directory, text, 40, None)


def test_sampling_shows_its_progress(model: Path, capsys: pytest.CaptureFixture[str]):
    recipe = make_recipe(tokens=80, seq_len=40)
    calibration_tokens(model, recipe, progress=False)
    assert "sampling" not in capsys.readouterr().err
    calibration_tokens(model, recipe, progress=True)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert "80/80" in shown


def test_a_large_file_is_sampled_at_its_words(model: Path, tmp_path: Path):
    text = tmp_path / "large.txt"
    words = [f"wörd{i:07d}" for i in range(150_000)]
    text.write_text(" ".join(words))
    recipe = make_recipe(calibration=str(text), tokens=400, seq_len=100)
    tokens = calibration_tokens(model, recipe)
    assert tokens.shape == (4, 100)
    assert torch.equal(tokens, calibration_tokens(model, recipe))
    assert not torch.equal(tokens, calibration_tokens(model, recipe.model_copy(update={"seed": 1})))
    decoded = AutoTokenizer.from_pretrained(model).batch_decode(tokens)
    known = set(words)
    assert all(set(piece.split()[:-1]) <= known for piece in decoded)
    assert len({piece.split()[0] for piece in decoded}) == 4


def test_a_file_of_up_to_a_mebibyte_is_read_whole(model: Path, tmp_path: Path):
    text = tmp_path / "whole.txt"
    text.write_text("".join(chr(97 + i % 26) + str(i) for i in range(170_000))[:1_002_177])
    tokens = calibration_tokens(model, make_recipe(calibration=str(text), tokens=400, seq_len=100))
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids)
    chosen = torch.randperm(len(ids) // 100, generator=torch.Generator().manual_seed(0))[:4].sort()
    assert torch.equal(tokens, ids[: len(ids) // 100 * 100].view(-1, 100)[chosen.values])


def test_memory_does_not_grow_with_the_file(model: Path, tmp_path: Path):
    text = tmp_path / "huge.txt"
    with text.open("wb") as file:
        for _ in range(64):
            file.write(b"sixteen letters " * (1 << 20))
    program = (
        "import sys, resource; from pathlib import Path;"
        "from svdserve.compression.pipeline.calibration.tokens import calibration_tokens;"
        "from svdserve.compression.pipeline.calibration.tokens import calibration_digests;"
        "from svdserve.compression.pipeline.recipe import make_recipe;"
        "recipe = make_recipe(calibration=sys.argv[2], tokens=2048, seq_len=128);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "calibration_digests([recipe]);"
        "print(calibration_tokens(Path(sys.argv[1]), recipe).numel(),"
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    limit = 60  # seconds of the processor; reading and hashing all of it would not fit in memory
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(text)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    numbers, kibibytes = map(int, done.stdout.split())
    assert numbers == 2048
    assert kibibytes < 200 * 1024
    text.unlink()


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_what_is_not_utf8_is_one_line(model: Path, tmp_path: Path, size: int):
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"caf\xe9 " * (size // 5))
    recipe = make_recipe(calibration=str(text), tokens=40, seq_len=20)
    with pytest.raises(UserError, match=r"is not UTF-8 text \(.*at byte \d+\); convert it"):
        calibration_tokens(model, recipe)


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_utf16_without_its_mark_is_one_line(model: Path, tmp_path: Path, size: int):
    text = tmp_path / "utf16.txt"
    text.write_bytes(("plain words " * (size // 12)).encode("utf-16-le"))
    recipe = make_recipe(calibration=str(text), tokens=40, seq_len=20)
    with pytest.raises(UserError, match="has zero bytes, so it is UTF-16 or no text; convert it"):
        calibration_tokens(model, recipe)


def test_a_first_token_without_an_embedding_is_one_line(model: Path, tmp_path: Path):
    directory = variant(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(directory)
    recipe = make_recipe(calibration="self", tokens=40, seq_len=20)
    with pytest.raises(UserError, match=r"calibration self: has the token id .* not resized"):
        calibration_tokens(directory, recipe)


def test_too_few_tokens_in_a_large_file_is_one_line(model: Path, tmp_path: Path):
    directory = variant(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for file in directory.glob("tokenizer*"):
        file.unlink()
    tokenizer.add_tokens("x" * 1024)
    tokenizer.save_pretrained(directory)
    text = tmp_path / "long.txt"
    text.write_bytes(b"x" * 4_000_000)
    recipe = make_recipe(calibration=str(text), tokens=2048, seq_len=256)
    with pytest.raises(UserError, match=r"give \d sequences of 256 tokens, but 8 are needed"):
        calibration_tokens(directory, recipe)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]
    rows = [
        {"text": None if i % 3 == 0 else f"row number {i}", "messages": chat, "n": i, "list": ["a"]}
        for i in range(40)
    ]
    lines = [json.dumps(row) for row in rows]
    (directory / "train.jsonl").write_text("\n".join(lines))
    return directory


def decoded(model: Path, source: str) -> str:
    recipe = make_recipe(calibration=source, tokens=120, seq_len=40)
    check_calibration(model, recipe)
    tokens = calibration_tokens(model, recipe)
    return "".join(AutoTokenizer.from_pretrained(model).batch_decode(tokens))


def test_null_rows_of_a_dataset_are_skipped(model: Path, dataset: Path):
    text = decoded(model, f"hf:{dataset}")
    assert "row number" in text
    assert "None" not in text
    assert decoded(model, f"hf:{dataset / 'train.jsonl'}") == text


def test_a_chat_goes_through_the_models_template(model: Path, dataset: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"row 0 is a chat, but .* has no chat template"):
        decoded(model, f"hf:{dataset}:::messages")
    directory = variant(model, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    assert "[user]hi[assistant]hello there" in decoded(directory, f"hf:{dataset}:::messages")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no such turn') }}")
    with pytest.raises(UserError, match=r"chat template refuses it .no such turn."):
        decoded(directory, f"hf:{dataset}:::messages")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (":::n", "column 'n', row 0 is int, neither text nor a chat"),
        (":::list", "column 'list', row 0 is list of str, neither text nor a chat"),
        (":::no", "row 0 has no column 'no'; it has text, messages, n, list"),
        ("::no", "Bad split"),
        (":no", "'no' not found"),
    ],
)
def test_other_columns_are_one_line(model: Path, dataset: Path, source: str, message: str):
    with pytest.raises(UserError, match=message):
        decoded(model, f"hf:{dataset}{source}")


def test_the_state_of_a_dataset_is_part_of_a_jobs_signature(dataset: Path, tmp_path: Path):
    recipe = make_recipe(calibration=f"hf:{dataset}+self")
    first = calibration_digests([recipe])
    assert list(first) == [f"hf:{dataset}"]
    assert first == calibration_digests([recipe])
    copy = tmp_path / "copy"
    copy.mkdir()
    rows = (dataset / "train.jsonl").read_text()
    (copy / "train.jsonl").write_text(rows)
    named = make_recipe(calibration=f"hf:{copy}")
    assert list(calibration_digests([named]).values()) == list(first.values())
    (copy / "train.jsonl").write_text(rows.replace("number 4", "number 5", 1))
    assert list(calibration_digests([named]).values()) != list(first.values())
    commit = "0123456789abcdef" * 2 + "01234567"
    given = calibration_digests([make_recipe(calibration=f"hf:some/data@{commit}:en")])
    assert given == {f"hf:some/data@{commit}:en": f"revision {commit}, rows in order"}
    with pytest.raises(UserError, match="the Hub does not report its revision"):
        calibration_digests([make_recipe(calibration="hf:some/data")])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("left", ["tokenizer_config.json", None])
def test_a_model_without_tokenizer_is_one_line_everywhere(
    tmp_path: Path, architecture: str, left: str | None
):
    directory = save_model(architecture, tmp_path / "model")
    for file in directory.glob("tokenizer*"):
        if file.name != left:
            file.unlink()
    text, out = tmp_path / "text.txt", str(tmp_path / "out")
    text.write_text("some words " * 100)
    for command in (
        ["compress", str(directory), "--out", out, "--tokens", "64", "--seq-len", "32"],
        ["eval", str(directory), "--text", str(text), "--seq-len", "32"],
        ["compare", str(directory), "--work", out, "--text", str(text), "--method", "svd"],
    ):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, UserError), done.exception
        assert str(directory) in str(done.exception)
        assert "tokenizer" in str(done.exception)
        assert "\n" not in str(done.exception)


def test_a_nested_text_config_says_how_long_a_sequence_may_be(model: Path, tmp_path: Path):
    raw = json.loads((model / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": raw | {"model_type": "gemma3_text"}}
    directory = variant(model, tmp_path / "model", config=config)
    with pytest.raises(UserError, match=r"seq_len is 300, but .* allows at most 256"):
        check_calibration(directory, make_recipe(tokens=600, seq_len=300))


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_that_no_generator_takes_is_one_line(seed: int):
    with pytest.raises(UserError, match=r"seed: .* \(given: "):
        make_recipe(seed=seed)
    with pytest.raises(UserError, match=r"refinement.seed: .* \(given: "):
        make_recipe(refinement={"seed": seed})
