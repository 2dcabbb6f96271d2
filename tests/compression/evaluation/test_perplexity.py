"""Perplexity against the model's own loss, and its refusals."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import random_tokens, save_model
from svdserve.compression.evaluation import perplexity as evaluate
from svdserve.compression.evaluation.perplexity import perplexity, text_chunks
from svdserve.compression.format.reader import open_checkpoint
from svdserve.compression.format.tensors import TensorFiles
from svdserve.compression.system.errors import UserError

SEQ_LEN = 24


LETTERS = "".join(chr(97 + i % 26) for i in random_tokens(1, 3 * SEQ_LEN + 7)[0].tolist())


def tokens() -> torch.Tensor:
    """LETTERS as the pico models' tokenizer of bytes counts them: three chunks and a rest."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return torch.tensor([4 + alphabet.index(letter) for letter in LETTERS])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(LETTERS)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "dense")


def test_equals_the_models_own_loss(
    dense: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "LOSS_SLICE", 5)  # slices that do not divide a chunk
    result = perplexity(dense, text, seq_len=SEQ_LEN, batch_size=2, progress=False)
    model = AutoModelForCausalLM.from_pretrained(dense)
    chunks = tokens()[: 3 * SEQ_LEN].view(3, SEQ_LEN)
    with torch.no_grad():
        losses = [model(chunk[None], labels=chunk[None]).loss.item() for chunk in chunks]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (result.chunks, result.tokens, result.dtype) == (3, 3 * (SEQ_LEN - 1), "float32")
    assert result.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_compressed_equals_its_dense_twin(dense: Path, text: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    small = write_checkpoint(
        dense, tmp_path / "small", layout="interpolative", shared=True, reference=twin
    )
    values = [
        perplexity(path, text, seq_len=SEQ_LEN, max_chunks=2, progress=False)
        for path in (dense, twin, small)
    ]
    assert values[2].mean_loss == pytest.approx(values[1].mean_loss, abs=1e-4)
    assert abs(values[2].mean_loss - values[0].mean_loss) > 1e-2
    assert values[0].chunks == 2
    assert [value.fingerprint for value in values] == [
        TensorFiles(path).fingerprint for path in (dense, twin, small)
    ]
    assert values[0].recipe is None
    assert values[2].recipe == open_checkpoint(small).config.recipe


def test_the_first_chunks_of_a_long_text_are_those_of_the_whole(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, read = tmp_path / "long.txt", []
    text.write_text(" ".join(LETTERS[i % 70 :][: i % 7 + 1] for i in range(20_000)))
    whole = text_chunks(dense, text, SEQ_LEN, None)
    real = evaluate.read_file

    def noted(path: Path, called: str, characters: int) -> str:
        found = real(path, called, characters)
        read.append(len(found))
        return found

    monkeypatch.setattr(evaluate, "read_file", noted)
    first = text_chunks(dense, text, SEQ_LEN, 3)
    assert torch.equal(first, whole[:3])
    assert sum(read) < 20 * 3 * SEQ_LEN
    assert torch.equal(text_chunks(dense, text, SEQ_LEN, len(whole) + 5), whole)


def test_non_finite_logits_fail(dense: Path, text: Path, tmp_path: Path) -> None:
    broken = write_checkpoint(dense, tmp_path / "broken", layout="pair", shared=True)
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="chunk 0: the logits of positions 0 to 22 are not finite"):
        perplexity(broken, text, seq_len=SEQ_LEN, progress=False)


def test_bad_input_is_named(dense: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="79 tokens, less than one chunk of seq_len 2048"):
        perplexity(dense, text, progress=False)
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        perplexity(dense, tmp_path / "nowhere.txt", progress=False)
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        perplexity(tmp_path, text, progress=False)
    with pytest.raises(UserError, match="unknown dtype 'int4'; allowed: auto, float32"):
        perplexity(dense, text, dtype="int4", progress=False)
