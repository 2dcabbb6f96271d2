"""What a group of linears is in its block."""

from typing import Literal

Role = Literal[
    "attention_in",
    "attention_out",
    "mlp_in",
    "mlp_out",
    "expert_in",
    "expert_out",
    "other",
]
