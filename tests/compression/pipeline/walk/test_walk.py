"""The two-stream walk against the models' own forward passes."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from models import ARCHITECTURES, build_model, hidden_states, random_tokens, save_model
from svdserve.compression.format.codecs import FLOAT
from svdserve.compression.format.layouts import INTERPOLATIVE, Factors
from svdserve.compression.format.schema import ModuleSpec
from svdserve.compression.format.stored import store
from svdserve.compression.model.architecture import Trace, find_groups
from svdserve.compression.model.containers import learn_containers
from svdserve.compression.model.skeleton import Skeleton
from svdserve.compression.pipeline.walk.measure import measured_rows
from svdserve.compression.pipeline.walk.walk import Walk
from svdserve.compression.system.errors import UserError

CPU = torch.device("cpu")
ALL = frozenset({"gram", "shift", "teacher_gram"})
TEACHER = frozenset({"teacher_gram", "teacher_magnitude"})
ROWS, LENGTH = 5, 40  # longer than the sliding window, and a last batch that is smaller


def walk_of(directory: Path, tokens: Tensor, wanted=ALL, **options) -> Walk:
    return Walk(Skeleton(directory), tokens, wanted, torch.float32, CPU, batch_size=2, **options)


def linear_inputs(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(tokens)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_walk_is_the_models_own_forward(architecture: str, tmp_path: Path):
    directory = save_model(architecture, tmp_path / "model")
    tokens = random_tokens(ROWS, LENGTH)
    walk = walk_of(directory, tokens)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = hidden_states(model, walk.skeleton.layers_name, tokens)
    for index in range(walk.skeleton.blocks):
        block = walk.block(index)
        for group in block.groups:
            statistics = block.statistics(group)
            assert statistics.tokens == tokens.numel()
            assert statistics.shift is not None
            assert not statistics.shift.any()
        block.finish()
        student = walk.streams.read("student", slice(None))
        assert torch.equal(student, walk.streams.read("teacher", slice(None)))
        torch.testing.assert_close(student, expected[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_alone_is_the_models_own_forward(architecture: str, tmp_path: Path):
    directory = save_model(architecture, tmp_path / "model")
    tokens = random_tokens(ROWS, LENGTH)
    walk = walk_of(directory, tokens, TEACHER)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = hidden_states(model, walk.skeleton.layers_name, tokens)
    for index in range(walk.skeleton.blocks):
        block = walk.block(index)
        collect = index != 1  # as of a resumed block, whose factors are known
        for group in block.groups:
            got = block.statistics(group, collect=collect)
            if not collect:
                continue
            name = f"{walk.skeleton.block_name(index)}.{group.parent}.{group.members[0]}"
            x = linear_inputs(model, [name], tokens)[name].reshape(tokens.numel(), -1).double()
            torch.testing.assert_close(got.teacher_gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                got.teacher_magnitude, x.abs().mean(dim=0), rtol=1e-4, atol=1e-5
            )
            assert (got.tokens, got.gram) == (len(x), None)
        block.finish()
        teacher = walk.streams.read("teacher", slice(None))
        torch.testing.assert_close(teacher, expected[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [ALL, TEACHER])
def test_bfloat16_passes_change_little_and_do_not_round_the_sums(wanted, tmp_path: Path):
    directory = save_model("llama", tmp_path / "model")
    found = []
    for precision in ("float32", "bfloat16"):
        walk = walk_of(directory, random_tokens(2, LENGTH), wanted, precision=precision)
        block = walk.block(0)
        found.append([block.statistics(group) for group in block.groups])
        block.finish()
    for exact, rounded in zip(*found, strict=True):
        gram = rounded.teacher_gram
        assert float((gram - exact.teacher_gram).norm() / gram.norm()) < 0.02
        assert float(gram.sub(gram.bfloat16()).count_nonzero()) > 0.5 * gram.numel()
        assert torch.equal(gram, gram.T)
        if wanted == ALL:
            assert not rounded.shift.any()


def test_held_out_sequences_are_apart_and_complete(tmp_path: Path):
    directory = save_model("llama", tmp_path / "model")
    tokens = random_tokens(9, LENGTH)
    found = []
    for wanted in ({"gram", "shift"}, {"gram", "shift", "held_out"}):
        walk = Walk(Skeleton(directory), tokens, frozenset(wanted), torch.float32, CPU)
        block = walk.block(0)
        found.append(block.statistics(block.groups[0]))
    whole, parted = found
    assert whole.held_out is None
    assert parted.held_out is not None
    assert (parted.tokens, parted.held_out.tokens) == (8 * LENGTH, LENGTH)
    total = (8 * parted.gram + parted.held_out.gram) / 9
    torch.testing.assert_close(total, whole.gram, rtol=1e-5, atol=1e-6)
    alone = Walk(Skeleton(directory), tokens[7:8], frozenset({"gram"}), torch.float32, CPU)
    block = alone.block(0)
    torch.testing.assert_close(parted.held_out.gram, block.statistics(block.groups[0]).gram)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("offload", [False, True])
def test_replaced_groups_act_on_all_later_statistics(
    architecture: str, offload: bool, tmp_path: Path
):
    """Brute force: put the same factors into a whole model and take every input from there."""
    directory = save_model(architecture, tmp_path / "model")
    tokens = random_tokens(ROWS, LENGTH)
    walk = walk_of(directory, tokens, offload=tmp_path / "streams" if offload else None)
    teacher = build_model(architecture)
    student = build_model(architecture)
    generator = torch.Generator().manual_seed(1)
    for index in range(walk.skeleton.blocks):
        block = walk.block(index)
        for group in block.groups:
            prefix = f"{walk.skeleton.block_name(index)}.{group.parent}"
            first = f"{prefix}.{group.members[0]}"
            x = linear_inputs(student, [first], tokens)[first].reshape(tokens.numel(), -1).double()
            x_f = linear_inputs(teacher, [first], tokens)[first].reshape(x.shape).double()
            got = block.statistics(group)
            close = {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(got.gram, x.T @ x / len(x), **close)
            torch.testing.assert_close(got.shift, (x_f - x).T @ x / len(x), **close)
            torch.testing.assert_close(got.teacher_gram, x_f.T @ x_f / len(x), **close)
            sizes = [block.weight(group, member).shape for member in group.members]
            pair = Factors(
                torch.randn(9, sizes[0][1], generator=generator) * sizes[0][1] ** -0.5,
                torch.randn(sum(s[0] for s in sizes), 9, generator=generator) / 3,
            )
            factors = store(pair, INTERPOLATIVE, FLOAT, torch.float32)
            spec = ModuleSpec(
                members=group.members,
                layout="interpolative",
                rank=9,
                **{"in": sizes[0][1]},
                out=[s[0] for s in sizes],
            )
            block.replace(group, group.name, spec, factors)
            parts = pair.dense().split([s[0] for s in sizes])
            for member, part in zip(group.members, parts, strict=True):
                student.get_submodule(f"{prefix}.{member}").weight.data.copy_(part)
        block.finish()
    expected = hidden_states(student, walk.skeleton.layers_name, tokens)[-1]
    torch.testing.assert_close(
        walk.streams.read("student", slice(None)), expected, rtol=1e-3, atol=1e-4
    )
    if offload:
        # Mapped, and without a name that a kill could leave behind.
        assert not list((tmp_path / "streams").iterdir())
        assert f"{tmp_path / 'streams'}/teacher-" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("wanted", [ALL, TEACHER])
def test_each_linear_and_attention_runs_once_per_stream(wanted, tmp_path: Path, monkeypatch):
    """The cost claim of walk.py: one pass each, and only the student's gate and up again.

    The sequences that the error is measured on run once more in either.
    """
    directory = save_model("llama", tmp_path / "model")
    tokens = random_tokens(4, 16)
    walk = walk_of(directory, tokens, wanted)
    calls: dict[str, int] = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls["attention"] = calls.get("attention", 0) + 1
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    block = walk.block(0)
    for stream in (block.teacher, block.student):
        for name, module in stream.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _m, _a, _o, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
                )
    for group in block.groups:
        block.statistics(group)
    block.finish()
    passes = dict.fromkeys(calls, 1)
    if walk.uses_student:
        passes = {name: 2 + (name in {"mlp.gate_proj", "mlp.up_proj"}) for name in calls}
    again = 2 * len(measured_rows(*tokens.shape)) if walk.uses_student else 0
    assert calls == {name: times * len(walk.batches) + again for name, times in passes.items()}
    assert len(calls) == 8


def test_blocks_hold_memory_only_while_they_are_walked(tmp_path: Path):
    walk = walk_of(save_model("llama", tmp_path / "model"), random_tokens(2, 8))
    assert all(p.device.type == "meta" for p in walk.skeleton.model.parameters())
    block = walk.block(1)
    assert all(p.device.type == "cpu" for p in block.teacher.parameters())
    shared = zip(block.teacher.parameters(), block.student.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared)
    assert all(p.device.type == "meta" for p in walk.skeleton.model.parameters())


def test_a_finished_block_is_freed_at_once(tmp_path: Path):
    """Not by the garbage collector: the peak would then grow with the depth."""
    walk = walk_of(save_model("gemma3", tmp_path / "model"), random_tokens(2, 8))
    gc.disable()
    try:
        block = walk.block(0)
        for group in block.groups:
            block.statistics(group)
        block.finish()
        modules = [weakref.ref(block.teacher), weakref.ref(block.student), weakref.ref(block)]
        del block
        assert [ref() for ref in modules] == [None, None, None]
    finally:
        gc.enable()


def test_unknown_architecture_lists_the_supported_ones(tmp_path: Path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'gpt2' is not supported.*llama, mistral, qwen2, qwen3"):
        Skeleton(tmp_path)


class _Scaled(nn.Module):
    """An attention that does something after its last linear."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x)) * 2


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = _Scaled(), _Gated()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


def test_a_container_that_changes_its_last_output_is_refused():
    trace = Trace(_Block(), ((), {}), torch.Size((1, 2, 8)), "block")
    with pytest.raises(UserError, match="attn does more than return"):
        learn_containers(trace, find_groups(trace))


def test_missing_and_misshapen_weights_are_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is missing"):
        Skeleton(tmp_path)
    save_file({**tensors, name: tensors[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        walk_of(tmp_path, random_tokens(1, 8)).block(1)
