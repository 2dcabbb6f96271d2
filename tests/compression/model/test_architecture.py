"""Groups and roles as they are found in blocks, whatever their linears are called."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from svdserve.compression.model.architecture import Group, Trace, find_groups, merged_name, taken
from svdserve.compression.system.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = [("attention_in", "self_attn", QKV), ("attention_out", "self_attn", ("o_proj",))]
MLP = [("mlp_in", "mlp", ("gate_proj", "up_proj")), ("mlp_out", "mlp", ("down_proj",))]
FOUND: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "llama": [*ATTENTION, *MLP],
    "cohere": [*ATTENTION, *MLP],  # side by side, on one norm
    "doge": [ATTENTION[0], ("other", "self_attn", ("dt_proj",)), ATTENTION[1], *MLP],
    "phi3": [
        ("attention_in", "self_attn", ("qkv_proj",)),
        ("attention_out", "self_attn", ("o_proj",)),
        ("mlp_in", "mlp", ("gate_up_proj",)),
        ("mlp_out", "mlp", ("down_proj",)),
    ],
    "starcoder2": [
        *ATTENTION,
        ("mlp_in", "mlp", ("c_fc",)),
        ("mlp_out", "mlp", ("c_proj",)),
    ],
    "gpt_neox": [
        ("attention_in", "attention", ("query_key_value",)),
        ("attention_out", "attention", ("dense",)),
        ("mlp_in", "mlp", ("dense_h_to_4h",)),
        ("mlp_out", "mlp", ("dense_4h_to_h",)),
    ],
    # Its MLP scales what its last linear gives, and calls up before gate.
    "falcon_h1": [
        *ATTENTION,
        ("mlp_in", "feed_forward", ("up_proj", "gate_proj")),
        ("mlp_out", "feed_forward", ("down_proj",)),
    ],
}


def first_block(kind: str) -> tuple[nn.Module, tuple[Any, ...], torch.Size]:
    """A block on meta, and how its model calls it."""
    known = CONFIG_MAPPING[kind]
    fields = {name: value for name, value in SIZES.items() if name in known().to_dict()}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(known(**fields)).eval()
    (layers,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 1)
    calls: list[Any] = []
    layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]), use_cache=False)
    (args, kwargs) = calls[0]
    return layers[0], (args[1:], kwargs), args[0].shape


@pytest.mark.parametrize("kind", FOUND)
def test_groups_and_roles(kind: str) -> None:
    block, call, shape = first_block(kind)
    groups = find_groups(Trace(block, call, shape, "block"))
    # Falcon-H1 has a recurrent mixer beside its attention.
    attending = [group for group in groups if group.parent != "mamba"]
    assert [(group.role, group.parent, group.members) for group in attending] == FOUND[kind]


@pytest.mark.parametrize("kind", ["llama", "doge", "falcon_h1"])
def test_what_is_taken_of_a_block_has_the_names_of_checkpoints(kind: str) -> None:
    block, call, shape = first_block(kind)
    groups = taken(find_groups(Trace(block, call, shape, "block")), "block")
    assert [group.name for group in groups] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (("o_proj",), "o_proj"),
        (QKV, "qkv_proj"),
        (("gate_proj", "up_proj"), "gate_up_proj"),
        (("query", "key", "value"), "query_key_value"),
        (("w1", "w3"), "w1_w3"),
        (("q", "k", "v"), "qkv"),
        (("q_proj", "kv_proj"), "q_kv_proj"),
        (("_proj", "up_proj"), "_proj_up_proj"),
        (("left.in_proj", "right.in_proj"), "left_in_right_in_proj"),
    ],
)
def test_merged_names_follow_a_rule(members: tuple[str, ...], name: str) -> None:
    assert merged_name(members) == name
    assert Group("other", "a.b", members).path == f"a.b.{name}"
    assert Group("other", "", members).path == name


class _Two(nn.Module):
    """Queries and keys read another tensor than values."""

    def __init__(self) -> None:
        super().__init__()
        for name in (*QKV, "o_proj"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x + 1))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = _Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def test_a_block_whose_code_fails_is_named() -> None:
    with torch.device("meta"):
        block = _Block()
    with pytest.raises(UserError, match=r"^block model\.layers\.3 is not supported: its own code"):
        Trace(block, ((), {}), torch.Size((1, 2, 5)), "model.layers.3")  # the linears read 4


def test_members_of_two_inputs_are_refused() -> None:
    with torch.device("meta"):
        block = _Block()
    groups = find_groups(Trace(block, ((), {}), torch.Size((1, 2, 4)), "block"))
    assert [(group.role, group.name) for group in groups] == [
        ("attention_in", "qk_proj"),
        ("other", "v_proj"),
        ("attention_out", "o_proj"),
    ]
    with pytest.raises(UserError, match="block: q_proj, k_proj, v_proj do not read the same input"):
        taken(groups, "block")
