"""Versions 1 and 2: checkpoints that commit a2295fd wrote, in ``data``, and every malformed block.

``versionN.logits.safetensors`` has what a2295fd's own plug-in for transformers gave for them.
"""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdserve.compression  # noqa: F401 (registers the plug-in)
from models import random_tokens, save_tokenizer
from svdserve.compression.evaluation.inspection import inspect_checkpoint
from svdserve.compression.format.legacy import role_of, upgraded
from svdserve.compression.format.reader import check_finite, open_checkpoint
from svdserve.compression.format.roles import Role
from svdserve.compression.format.schema import linears_of, parse_config
from svdserve.compression.format.tensors import SINGLE_FILE
from svdserve.compression.system.errors import UserError
from vllm_run import Served, run

DATA = Path(__file__).with_name("data")
VERSIONS = pytest.mark.parametrize("version", [1, 2])
ROLES: dict[str, Role] = {
    "qkv_proj": "attention_in",
    "q_proj": "attention_in",
    "k_proj": "attention_in",
    "v_proj": "attention_in",
    "o_proj": "attention_out",
    "gate_up_proj": "mlp_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_out",
}
LINEARS = {
    f"model.layers.{index}.{parent}.{member}"
    for index in range(2)
    for parent, members in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
    for member in (f"{letters}_proj" for letters in members)
}
PAIR = "model.layers.1.mlp.up_proj"  # of version 2
WHOLE = "model.layers.0.self_attn.o_proj"  # of version 2, int8
SHARED = "model.layers.1.self_attn.qkv_proj"  # of version 1


def block_of(directory: Path) -> dict[str, Any]:
    block: dict[str, Any] = json.loads((directory / "config.json").read_text())[
        "quantization_config"
    ]
    return block


def old(version: int) -> Path:
    return DATA / f"version{version}"


@VERSIONS
def test_an_old_block_becomes_one_of_version_3(version: int) -> None:
    block, config = block_of(old(version)), open_checkpoint(old(version)).config
    assert (block["format_version"], config.format_version) == (version, 3)
    assert (config.base_model, config.keep) == (block["base_model"], block["keep"])
    assert config.recipe == block["recipe"]
    assert list(config.modules) == list(block["modules"])
    for name, spec in config.modules.items():
        was = block["modules"][name]
        assert spec.codec == was.get("weights", "float") == ("float", "int8")[version - 1]
        assert spec.role == ROLES[name.rpartition(".")[2]]
        assert (spec.layout, spec.rank) == (was["layout"], was["rank"])
        assert (list(spec.members), spec.in_features) == (was["members"], was["in"])
        assert list(spec.out_features) == was["out"]
    assert list(config.linears) == block.get("int8_linears", [])
    assert config.encoded_linears == config.linears
    for name, linear in config.linears.items():
        assert (linear.role, linear.codec) == (ROLES[name.rpartition(".")[2]], "int8")
    assert parse_config(json.loads(json.dumps(config.dump()))) == config
    assert config.dump()["format_version"] == 3


@VERSIONS
def test_the_tensors_are_those_of_the_files(version: int) -> None:
    checkpoint, stored = open_checkpoint(old(version)), load_file(old(version) / SINGLE_FILE)
    check_finite(checkpoint)
    seen: set[str] = set()
    for name, spec in checkpoint.config.modules.items():
        factors = checkpoint.factors(name)
        assert (factors.layout.name, factors.codec.name) == (spec.layout, spec.codec)
        for suffix, tensor in factors.tensors.items():
            assert torch.equal(tensor, stored[f"{name}.{suffix}"])
            seen.add(f"{name}.{suffix}")
    assert seen == {n for n in stored if re.search(r"\.(factor_\w+|pivots)$", n)}
    scales = {f"{name}.weight_scale" for name in checkpoint.config.linears}
    assert scales == {name for name in stored if name.endswith("weight_scale")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_tokens(1, 12)).logits
    return found


@VERSIONS
def test_transformers_computes_what_it_did_and_saves_version_3(
    version: int, tmp_path: Path
) -> None:
    want = load_file(DATA / f"version{version}.logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(old(version), dtype=torch.float32)
    found = logits(model)
    torch.testing.assert_close(found, want["logits"], rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "new")
    assert block_of(tmp_path / "new")["format_version"] == 3
    new, before = open_checkpoint(tmp_path / "new"), open_checkpoint(old(version))
    check_finite(new)
    assert new.config == before.config
    assert new.files.info.keys() == before.files.info.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert torch.equal(logits(again), found)


@VERSIONS
def test_every_linear_is_listed(version: int) -> None:
    facts, config = inspect_checkpoint(old(version)), open_checkpoint(old(version)).config
    owned = {name: linears_of(name, spec) for name, spec in config.modules.items()}
    listed = [li for row in facts.modules for li in owned.get(row.module, [row.module])]
    assert sorted(listed) == sorted(LINEARS)
    for row in facts.modules:
        assert row.role == ROLES[row.module.rpartition(".")[2]]
        assert row.dtype == ("bfloat16", "int8")[version - 1]
        if row.module in owned:
            spec = config.modules[row.module]
            assert (row.layout, row.rank) == (spec.layout, spec.rank)
        else:
            assert (row.module in config.linears) == (version == 2)
            assert (row.layout, row.rank) == ("dense", None)
        assert row.error is None or row.error > 0
    tensors = load_file(old(version) / SINGLE_FILE).values()
    assert facts.factored_nbytes + facts.other_nbytes == sum(t.nbytes for t in tensors)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Served]:
    """Both in one process, with a tokenizer beside them."""
    root = tmp_path_factory.mktemp("old")
    for version in (1, 2):
        shutil.copytree(old(version), root / str(version))
        save_tokenizer(root / str(version))
    engines = [{"model": str(root / str(version))} for version in (1, 2)]
    prompts = [random_tokens(1, 12)[0].tolist()]
    return dict(zip((1, 2), run(root / "run", engines, prompts), strict=True))


@pytest.mark.vllm
@pytest.mark.parametrize(("version", "limit"), [(1, 1e-4), (2, 0.06)])
def test_vllm_serves_them(version: int, limit: float, served: dict[int, Served]) -> None:
    """Int8 products round their inputs too, which transformers does not; see test_served_int8."""
    got = served[version]
    assert got.error == ""
    (report,) = got.reports
    assert report is not None
    model = AutoModelForCausalLM.from_pretrained(old(version), dtype=torch.float32)
    tokens = torch.tensor([random_tokens(1, 12)[0].tolist() + got.tokens[0][:-1]])
    with torch.no_grad():
        want = model(tokens).logits[0].log_softmax(-1)
    first = load_file(DATA / f"version{version}.logits.safetensors")["logits"][0].log_softmax(-1)
    for ours, theirs in ((got.logprobs[0], want), (got.logprobs[0][:11], first[:11])):
        assert float((ours - theirs).square().mean().sqrt()) < limit


# Malformed blocks


@pytest.mark.parametrize(
    ("version", "changes", "message"),
    [
        (1, {"quant_method": "gptq"}, "quant_method is 'gptq', not 'svdserve'"),
        (1, {"format_version": "1"}, "format_version '1' is not supported .*reads 1, 2, 3"),
        (1, {"format_version": 0}, "format_version 0 is not supported"),
        (1, {"keep": 0}, "keep: .*greater than 0"),
        (2, {"keep": 1.5}, "keep: .*less than or equal to 1"),
        (1, {"keep": "x"}, "keep: .*number"),
        (1, {"base_model": None}, "base_model: .*string"),
        (1, {"surprise": 1}, "surprise: Extra inputs"),
        (1, {"linears": {}}, "linears: Extra inputs"),
        (2, {"recipe": []}, "recipe: .*dict"),
        (1, {"modules": {}}, r"model.layers.0.*factor_in belongs to no module"),
        (2, {"modules": {}}, r"model.layers.0.*factor_in belongs to no module"),
        (1, {"modules": {"../a.up_proj": {}}}, r"modules.*"),
        (2, {"format_version": 3}, "Extra inputs"),
        (2, {"format_version": 1}, "int8 weights need format_version 2"),
        (2, {"int8_linears": "all"}, "int8_linears: .*tuple"),
        (2, {"int8_linears": [1]}, "int8_linears.0: .*string"),
        (2, {"int8_linears": ["../x"]}, r"linears.*pattern"),
    ],
)
def test_broken_blocks(version: int, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path, version, message, lambda block: block.update(changes))


@pytest.mark.parametrize(
    ("version", "name", "changes", "message"),
    [
        (1, SHARED, {"rank": 0}, f"{SHARED}.rank: .*greater than 0"),
        (1, SHARED, {"rank": 4000}, f"{SHARED}.*rank 4000 is above min"),
        (1, SHARED, {"rank": None}, f"{SHARED}.rank: .*integer"),
        (1, SHARED, {"layout": "cube"}, f"{SHARED}.layout: .*'pair' or 'interpolative'"),
        (1, SHARED, {"members": []}, f"{SHARED}.members: .*at least 1"),
        (1, SHARED, {"members": ["q_proj", "k_proj"]}, f"{SHARED}: members .*expected .*'v_proj'"),
        (1, SHARED, {"members": ["q_proj", "k_proj", "w_proj"]}, r"expected .*'v_proj'"),
        (1, SHARED, {"members": ["k_proj", "q_proj", "v_proj"]}, r"members .*expected"),
        (1, SHARED, {"out": [64, 64]}, "3 members but 2 sizes"),
        (1, SHARED, {"in": 31}, f"module {SHARED}: factor_in is"),
        (1, SHARED, {"rank": 5}, rf"module {SHARED}: factor_in is .* expected \[5, 27\]"),
        (1, SHARED, {"weights": "int8"}, f"{SHARED}: int8 weights need format_version 2"),
        (1, SHARED, {"weights": "int3"}, f"{SHARED}.weights: .*'float' or 'int8'"),
        (1, SHARED, {"role": "attention_in"}, f"{SHARED}.role: Extra inputs"),
        (1, SHARED, {"codec": "float"}, f"{SHARED}.codec: Extra inputs"),
        (2, PAIR, {"weights": "float"}, f"module {PAIR}: factor_in is torch.int8, allowed"),
        (2, PAIR, {"members": ["gate_proj"]}, rf"{PAIR}: members .*expected \['up_proj'\]"),
        (2, PAIR, {"layout": "interpolative"}, f"module {PAIR}: factor_in is"),
    ],
)
def test_broken_modules(
    version: int, name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(tmp_path, version, message, lambda block: block["modules"][name].update(changes))


def test_broken_lists_of_int8_linears(tmp_path: Path) -> None:
    linears = block_of(old(2))["int8_linears"]
    for number, (changed, message) in enumerate(
        [
            ([*linears, PAIR], f"linears: {PAIR} belongs to {PAIR}"),
            ([*linears, WHOLE], f"int8_linears: {WHOLE} is listed twice"),
            ([n for n in linears if n != WHOLE], f"{WHOLE}.weight_scale belongs to no module"),
            ([*linears, "model.side_proj"], "int8 linear model.side_proj: tensor .* is missing"),
        ]
    ):
        refused(
            tmp_path / str(number),
            2,
            message,
            lambda block, changed=changed: block.update(int8_linears=changed),
        )


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{PAIR}.factor_in_scale", None, f"module {PAIR}: tensor .*scale is missing"),
        (f"{PAIR}.factor_out_scale", lambda t: t.half(), "factor_out_scale is torch.float16, al"),
        (f"{PAIR}.factor_out", lambda t: t.float(), r"factor_out is torch.float32, .*int8"),
        (f"{WHOLE}.weight_scale", None, f"int8 linear {WHOLE}: tensor .*weight_scale is missing"),
        (f"{WHOLE}.weight", lambda t: t.float(), f"int8 linear {WHOLE}: .* is torch.float32, al"),
        (f"{WHOLE}.weight_scale", lambda t: t[1:], f"{WHOLE}: weight_scale is .* expected"),
        (f"{PAIR}.factor_in_scale", lambda t: t * 0, f"{PAIR}: factor_in_scale must be positive"),
        (f"{WHOLE}.weight_scale", lambda t: -t, f"{WHOLE}: weight_scale must be positive"),
        (f"{WHOLE}.weight_scale", lambda t: t / 0, f"{WHOLE}: weight_scale is not finite"),
    ],
)
def test_broken_tensors(tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(old(2), tmp_path / "broken"))
    tensors = load_file(directory / SINGLE_FILE)
    given = tensors.pop(tensor)
    if change is not None:
        tensors[tensor] = change(given).contiguous()
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        check_finite(open_checkpoint(directory))


def test_upgrading_changes_nothing_of_what_was_given() -> None:
    block = block_of(old(2))
    before = copy.deepcopy(block)
    upgraded(block)
    assert block == before


def test_names_that_the_old_versions_did_not_know_have_no_role() -> None:
    assert role_of("a.b.fc1") == role_of("weight") == role_of("") == "other"
    assert {last: role_of(f"a.b.{last}") for last in ROLES} == ROLES


def refused(target: Path, version: int, message: str, change: Any) -> None:
    """Refused in one line, by the reader and by transformers."""
    shutil.copytree(old(version), target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(target)
    assert "\n" not in str(caught.value)
    if config["quantization_config"]["quant_method"] == "svdserve":
        with pytest.raises(UserError):
            AutoModelForCausalLM.from_pretrained(target)
