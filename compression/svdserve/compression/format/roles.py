"""Roles: what a group of linears does in its block, found by its place and never by its name."""

from typing import Literal, get_args

Role = Literal[
    "attention_in", "attention_out", "mlp_in", "mlp_out", "expert_in", "expert_out", "other"
]
ROLES: tuple[Role, ...] = get_args(Role)
"""All roles, in the order of a block's forward pass."""
