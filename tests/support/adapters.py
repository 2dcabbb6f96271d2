"""LoRA adapters of pico models."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_adapter(adapter: Path, dense: Path, merged: Path, rank: int = 4) -> Path:
    """Random LoRA of every MLP as PEFT stores it, and the dense model with it added."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(dense / "model.safetensors")
    lora = {}
    for name in [name for name in weights if ".mlp." in name]:
        m, n = weights[name].shape
        inner = (torch.randn(rank, n, generator=generator) * n**-0.5).to(weights[name].dtype)
        outer = torch.randn(m, rank, generator=generator) * rank**-0.5
        outer = outer.to(weights[name].dtype)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        lora |= {f"{stem}.lora_A.weight": inner, f"{stem}.lora_B.weight": outer}
        weights[name] += outer @ inner
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors")
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(dense, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return merged
