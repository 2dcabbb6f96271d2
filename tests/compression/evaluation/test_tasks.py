"""Accuracy on local multiple-choice files against log-probabilities summed by hand."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import random_tokens, save_model
from svdserve.compression.evaluation.tasks import TaskAccuracy, check_tasks, task_accuracies
from svdserve.compression.system.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "dense")


def items(count: int = 40) -> list[dict]:
    """Random letters; choices of unequal lengths, so that acc and acc_norm differ."""
    letters = "".join(chr(97 + i % 26) for i in random_tokens(1, 60 * count)[0].tolist())
    found = []
    for index in range(count):
        text = letters[60 * index : 60 * index + 60]
        choices = [text[20:23], text[24:34], text[35:41]]
        found.append({"context": text[:20], "choices": choices, "gold": index % 3})
    return found


def by_hand(directory: Path, item: dict) -> tuple[int, int]:
    """The choices that acc and acc_norm take."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sums = []
    for choice in item["choices"]:
        context = tokenizer(item["context"], add_special_tokens=False).input_ids
        ids = tokenizer(f"{item['context']} {choice}", add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(context)
        sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))))
    normed = [value / len(choice) for value, choice in zip(sums, item["choices"], strict=True)]
    return sums.index(max(sums)), normed.index(max(normed))


def test_equals_sums_by_hand(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "letters.jsonl"
    given = items()
    file.write_text("".join(json.dumps(item) + "\n" for item in given))
    result = task_accuracies(model, [str(file)], dtype="float32")
    (score,) = result.scores
    taken = [by_hand(model, item) for item in given]
    gold = [item["gold"] for item in given]
    assert score.items == len(given)
    right = [sum(pair[i] == g for pair, g in zip(taken, gold, strict=True)) for i in range(2)]
    assert score.acc == pytest.approx(right[0] / len(given))
    assert score.acc_norm == pytest.approx(right[1] / len(given))
    assert score.acc != score.acc_norm
    assert score.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("task", "acc", "acc_norm", "reported"),
    [
        ("hellaswag", 0.25, 0.5, 0.5),
        ("openbookqa_val", 0.25, 0.5, 0.5),
        ("piqa", 0.25, 0.5, 0.25),
        ("arc_easy_val", 0.25, 0.5, 0.25),
        ("copa", 0.25, None, 0.25),
        ("hellaswag", 0.25, None, 0.25),
        ("letters", None, 0.5, 0.5),
        ("letters", None, None, 0.0),
    ],
)
def test_reported_accuracy(
    task: str, acc: float | None, acc_norm: float | None, reported: float
) -> None:
    score = TaskAccuracy(task=task, items=4, acc=acc, acc_norm=acc_norm)
    assert score.accuracy == reported


def test_bad_lines_are_named(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    good = items(1)[0]
    for wrong in ("{", json.dumps(good | {"gold": 3}), json.dumps({"context": "a"})):
        file.write_text(json.dumps(good) + "\n" + wrong + "\n")
        with pytest.raises(UserError, match="line 2 is not a multiple-choice item"):
            task_accuracies(model, [str(file)])
    with pytest.raises(UserError, match="cannot be read"):
        task_accuracies(model, [str(tmp_path / "absent.jsonl")])


@pytest.mark.parametrize("name", ["letters.json", "letters", "absent/letters"])
def test_a_path_that_is_no_jsonl_file_is_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").touch()
    (tmp_path / "letters.json").touch()
    with pytest.raises(
        UserError, match=rf"^{name}: is no task; give a file .* ends in \.jsonl, or"
    ):
        check_tasks([name])


def test_a_folder_may_have_the_name_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    assert check_tasks(["piqa"]) == {}


def test_unknown_task_is_named(model: Path) -> None:
    with pytest.raises(UserError, match="no_such_task"):
        task_accuracies(model, ["no_such_task"])
