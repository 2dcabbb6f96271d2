"""KL to the teacher's logits against the plain formula on whole logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import build_model, random_tokens, save_model
from svdserve.compression.model.loading import head_logits, load_model
from svdserve.compression.training import distillation
from svdserve.compression.training.distillation import Distillation, Targets, divergence
from svdserve.compression.training.trainer import Training

EXACT = Training(precision="float32")


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """From the definition: Σ p (ln p − ln q), mean over positions."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize(("architecture", "capping"), [("llama", None), ("gemma3", 3.0)])
def test_the_head_is_the_models_own(architecture: str, capping: float | None) -> None:
    changes = {} if capping is None else {"final_logit_softcapping": capping}
    model = build_model(architecture, **changes)
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        logits = model(tokens).logits
        torch.testing.assert_close(head_logits(model, hidden), logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=0)
    assert capping is None or logits.abs().max() < capping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_give_the_plain_formula_and_its_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_SLICE", 50)
    model = build_model("gemma3", final_logit_softcapping=5.0).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 117, 128, dtype=dtype, generator=generator)
    student.requires_grad_(True)
    expected = plain(head_logits(model, student[None]), head_logits(model, teacher[None]))
    (slope,) = torch.autograd.grad(expected, student)
    assert expected.item() > 0.1
    loss, gradient = divergence(lambda hidden: head_logits(model, hidden), student, teacher)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss == pytest.approx(expected.item(), rel=tolerance)
    scale = float(slope.abs().max())
    torch.testing.assert_close(gradient, slope, rtol=0, atol=tolerance * scale)
    assert divergence(lambda h: head_logits(model, h), student.detach(), teacher)[1] is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_model_are_those_of_the_plain_formula(
    checkpointing: bool, tmp_path: Path
) -> None:
    """Another model as teacher; both share the head, as a compressed model and its teacher do."""
    directory = save_model("llama", tmp_path / "teacher")
    teacher, student = load_model(directory, "float32"), load_model(directory, "float32")
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in student.named_parameters() if name.endswith("_proj.weight")]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, rows = random_tokens(5, 24), torch.tensor([3, 0])
    folder = tmp_path / "targets"
    Targets(folder).compute(directory, tokens, torch.device("cpu"), EXACT)
    objective = Distillation(student, tokens, Targets(folder), EXACT)
    objective.backward(rows, step=0)
    found = {name: student.get_parameter(name).grad for name in names}
    student.zero_grad()
    with torch.no_grad():
        target = teacher(tokens[rows]).logits
    loss = plain(student(tokens[rows]).logits, target)
    loss.backward()
    for name in names:
        slope = student.get_parameter(name).grad
        torch.testing.assert_close(found[name], slope, rtol=0, atol=1e-5 * float(slope.abs().max()))
    assert objective.evaluate(rows) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_targets_are_computed_once(tmp_path: Path) -> None:
    directory = save_model("qwen3", tmp_path / "teacher")
    tokens = random_tokens(5, 16)
    targets, cpu, half = Targets(tmp_path / "targets"), torch.device("cpu"), Training()
    targets.compute(directory, tokens, cpu, half)
    hidden = targets.read(torch.arange(5))
    assert hidden.dtype == torch.bfloat16
    with torch.no_grad():
        expected = load_model(directory, "float32").base_model(tokens).last_hidden_state
    torch.testing.assert_close(hidden.float(), expected, rtol=0.1, atol=0.1)
    removed = tmp_path / "targets" / "000003.safetensors"
    before = removed.read_bytes()
    removed.unlink()
    done: list[int] = []
    targets.compute(directory, tokens, cpu, half, done.append)
    assert done == [3]  # the others are there
    assert removed.read_bytes() == before
    targets.compute(tmp_path / "nowhere", tokens, cpu, half)  # no teacher is needed any more


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    directory = save_model("llama", tmp_path / "teacher")
    tokens = random_tokens(2, 32)
    losses = []
    for settings in (EXACT, Training()):
        student = load_model(directory, "float32")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in student.named_parameters():
            if "mlp" in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        targets = Targets(tmp_path / settings.precision)
        targets.compute(directory, tokens, torch.device("cpu"), settings)
        losses.append(Distillation(student, tokens, targets, settings).evaluate(torch.arange(2)))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]
