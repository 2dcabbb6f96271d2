"""from_pretrained of svdserve checkpoints, after one import."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from checkpoints import write_checkpoint
from models import ARCHITECTURES, random_tokens, save_model
from svdserve.compression.model.modules import LowRankLinear
from svdserve.compression.system.errors import UserError

PLAIN_USER = """
import sys, torch
import svdserve.compression
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.save(model(tokens).logits, directory + "/logits.pt")
    steps = model.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    torch.save(steps, directory + "/steps.pt")
"""


Variant = tuple[str, str, bool]
VARIANTS: list[Variant] = [("llama", layout, True) for layout in ("pair", "interpolative")]
VARIANTS += [(name, "interpolative", name != "qwen2") for name in ARCHITECTURES[1:]]
VARIANTS += [("qwen2", "pair", True)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, tuple[Path, Path]]:
    """Checkpoint and multiplied-out twin of every variant, run by one fresh interpreter."""
    root = tmp_path_factory.mktemp("hf")
    dense = {name: save_model(name, root / name) for name in ARCHITECTURES}
    pairs: dict[Variant, tuple[Path, Path]] = {}
    for name, layout, shared in VARIANTS:
        target = root / f"{name}-{layout}-{shared}"
        twin = target.with_name(f"{target.name}-twin")
        write_checkpoint(
            dense[name],
            target,
            layout=layout,
            shared=shared,
            keep_dense=frozenset({"o_proj"}),
            reference=twin,
        )
        pairs[name, layout, shared] = target, twin
    tokens = root / "tokens.pt"
    torch.save(random_tokens(2, 40), tokens)
    directories = [str(directory) for pair in pairs.values() for directory in pair]
    subprocess.run([sys.executable, "-c", PLAIN_USER, str(tokens), *directories], check=True)
    return pairs


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_plain_transformers_equals_multiplied_out(
    variant: Variant, outputs: dict[Variant, tuple[Path, Path]]
) -> None:
    got, expected = (torch.load(path / "logits.pt") for path in outputs[variant])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    steps, expected_steps = (torch.load(path / "steps.pt") for path in outputs[variant])
    assert steps.tolist() == expected_steps.tolist()


def test_importing_the_package_loads_nothing_heavy_and_starts_nothing() -> None:
    code = (
        "import sys; assert 'svdserve.compression' not in sys.modules; import svdserve.compression;"
        "assert not {'torch', 'transformers', 'svdserve.compression.model.hf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["svdserve.compression", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first: str, checkpoint: Path) -> None:
    code = (
        f"import {first}; import svdserve.compression; from transformers import AutoModel;"
        f"print(type(AutoModel.from_pretrained({str(checkpoint)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Qwen2Model\n"


def test_the_hook_is_for_every_program_of_an_environment(tmp_path: Path) -> None:
    """In an environment of its own, with the packages of this one but not their .pth files."""
    venv.create(tmp_path, symlinks=True, with_pip=False)
    python = tmp_path / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [python, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert not done.stderr, done.stderr
        return done.stdout

    folder = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    packages = folder / "packages.pth"
    packages.write_text("\n".join(path for path in sys.path if Path(path).is_dir()))
    table = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as t; "
    assert run("-c", f"{table} print('svdserve' in t)") == "False\n"

    hook = folder / "svdserve_hook.pth"
    command = ("-m", "svdserve.cli.main", "install-hook")
    assert run(*command).startswith(f"{hook}: ")
    assert run("-c", f"{table} print('svdserve' in t)") == "True\n"
    loaded = "import sys; print(bool({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert run("-c", loaded) == "False\n"
    line = hook.read_text()
    assert run(*command, "--remove").startswith(f"{hook}: ")
    assert run("-c", "import sys; print('svdserve.compression' in sys.modules)") == "False\n"

    hook.write_text(line)
    packages.unlink()  # as after pip uninstall
    assert run("-c", "print('quiet')") == "quiet\n"


def test_the_base_model_gives_the_hidden_states_of_the_whole(checkpoint: Path) -> None:
    tokens = random_tokens(1, 16)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens, output_hidden_states=True)
    base = AutoModel.from_pretrained(checkpoint)(tokens)
    assert torch.equal(base.last_hidden_state, whole.hidden_states[-1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dense = save_model("qwen2", tmp_path / "dense")
    return write_checkpoint(dense, tmp_path / "small", layout="interpolative", shared=True)


def test_save_pretrained_round_trips(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    blocks = [
        json.loads((d / "config.json").read_text())["quantization_config"]
        for d in (checkpoint, tmp_path / "again")
    ]
    assert blocks[0] == blocks[1]


def test_dtype_is_the_users_choice(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, LowRankLinear)
    assert down.pivots is not None
    assert down.pivots.dtype == torch.int32


def test_device_map_loads_the_same_model(checkpoint: Path) -> None:
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
        mapped = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu")(tokens).logits
    assert torch.equal(plain, mapped)


def test_factors_train(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = random_tokens(1, 12)
    model(tokens, labels=tokens).loss.backward()
    named = dict(model.named_parameters())
    for name in (
        "self_attn.qkv_proj.factor_in",
        "self_attn.k_proj.bias",
        "mlp.down_proj.factor_out",
    ):
        gradient = named[f"model.layers.1.{name}"].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_broken_tensor_is_refused_by_name(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.factor_out"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj: factor_out is"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj: factor_out is not finite"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    config["num_hidden_layers"] = 2
    config["layer_types"] = config["layer_types"][:2]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"module model\.layers\.2\."):
        AutoModelForCausalLM.from_pretrained(other)


def test_unknown_version_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 4
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"format_version 4 is not supported .*reads 1, 2, 3"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_compressing_while_loading_is_refused(tmp_path: Path) -> None:
    from svdserve.compression.model.hf import SvdserveConfig

    dense = save_model("llama", tmp_path / "dense")
    config = SvdserveConfig(format_version=3, base_model="dense", keep=0.5, modules={})
    with pytest.raises(UserError, match="svdserve compress MODEL"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
