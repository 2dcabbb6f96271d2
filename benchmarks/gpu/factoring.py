"""Measures the linear algebra of compression at 8B shapes, and compresses blocks of that shape."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def primitives(device: torch.device, dry: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """Seconds, peak memory and errors of the operations that a factorisation uses."""
    found: list[dict[str, Any]] = []
    hidden, intermediate = (64, 160) if dry else (4096, 14336)
    generator = torch.Generator(device).manual_seed(0)

    def gram(n: int, dtype: torch.dtype) -> Tensor:
        """The Gram matrix [n, n] of inputs whose spectrum decays, as a model's does."""
        x = torch.randn(n, 2 * n, generator=generator, device=device, dtype=torch.float32)
        x *= torch.logspace(0, -3, n, device=device)[:, None]
        mixed = x[torch.randperm(n, generator=generator, device=device)]
        mixed += 0.05 * mixed.roll(1, 0)
        return (mixed @ mixed.T).to(dtype) / (2 * n)

    def timed(name: str, n: int, dtype: torch.dtype, run: Callable[[], Any]) -> Any:
        if left() < 0:
            return None
        _sync(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = run()
        _sync(device)
        one = {
            "name": name,
            "n": n,
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - start, 4),
        }
        if device.type == "cuda":
            one["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        found.append(one)
        print(f"  {one}", flush=True)
        return result

    for n in (hidden, intermediate):
        for dtype in (torch.float32, torch.float64):
            matrix = gram(n, dtype)
            matrix.diagonal().add_(1e-3 * float(matrix.diagonal().mean()))
            timed("warm-up", n, dtype, lambda m=matrix: m[:256, :256].inverse())
            timed("product", n, dtype, lambda m=matrix: m @ m)
            timed("cholesky", n, dtype, lambda m=matrix: torch.linalg.cholesky(m))
            if n == hidden or dtype == torch.float32:
                vectors = timed("eigh", n, dtype, lambda m=matrix: torch.linalg.eigh(m))
                if vectors is not None:
                    v = vectors.eigenvectors
                    found[-1]["orthogonality"] = float(
                        (v.T @ v - torch.eye(n, device=device)).abs().max()
                    )
            del matrix
    found += _pivots(device, hidden, intermediate, timed, generator)
    return found


def _pivots(
    device: torch.device,
    hidden: int,
    intermediate: int,
    timed: Callable[..., Any],
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Time LU with partial pivoting of Vᵀ at the shapes of o_proj and down_proj; sizes of Z."""
    results = []
    for n, rank in ((hidden, hidden * 9 // 16), (intermediate, hidden * 3 // 4)):
        v = torch.randn(rank, n, generator=generator, device=device, dtype=torch.float64)
        v *= torch.logspace(0, -2, n, device=device, dtype=torch.float64)
        v = torch.linalg.qr(v.T).Q.T.contiguous()
        found = timed("lu of V^T", n, v.dtype, lambda v=v: torch.linalg.lu_factor(v.T))
        if found is None:
            break
        lu, swaps = found
        order = list(range(n))
        for index, other in enumerate(swaps.tolist()):
            order[index], order[other - 1] = order[other - 1], order[index]
        chosen = torch.tensor(order, device=device)
        # Vᵀ[order] = L U: Z = R1⁻¹ R2 with [R1 R2] = V[:, order], so Zᵀ = L2 L1⁻¹.
        lower = lu.tril(-1)
        unit = lower[:rank] + torch.eye(rank, device=device, dtype=lu.dtype)
        z = timed(
            "Z",
            n,
            v.dtype,
            lambda u=unit, lo=lower[rank:]: (
                torch.linalg.solve_triangular(u, lo, upper=False, left=False, unitriangular=True).T
            ),
        )
        if z is None:
            break
        rest = v[:, chosen[rank:]] - v[:, chosen[:rank]] @ z
        results.append(
            {
                "name": "pivots by LU",
                "n": n,
                "rank": rank,
                "largest_of_z": float(z.abs().max()),
                "norm_of_z": float(z.norm()),
                "residual": float(rest.abs().max()),
            }
        )
    return results


def compression(root: Path, work: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """``svdserve compress --device cuda`` on two blocks of 8B shape with random weights."""
    model = work / "model"
    make_model(model, dry)
    text = work / "text.txt"
    words = [
        f"{a}{b}" for a in ["the", "one", "some", "any"] for b in (" cat", " dog", " tree", " sea")
    ]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (60_000 if not dry else 2_000,), generator=generator)
    text.write_text(" ".join(words[i] for i in picks.tolist()))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [*(str(root / part) for part in ("compression", "kernels", "server")),
             os.environ.get("PYTHONPATH", "")]
        ),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "svdserve.cli.main", "compress", str(model),
        "--out", str(work / "out"), "--calibration", str(text), "--layout", "pair",
        "--tokens", "2048" if dry else "65536", "--seq-len", "256" if dry else "2048",
        "--gradient-tokens", "1024" if dry else "8192",
        "--device", "cpu" if dry else "cuda",
    ]  # fmt: skip
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = (
            None,
            "".join(
                part.decode() if isinstance(part, bytes) else part or ""
                for part in (error.stdout, error.stderr)
            ),
        )
    log = next(work.glob("out*/**/*.jsonl"), None)
    return {
        "command": " ".join(command[3:]).replace(str(work), "WORK"),
        "exit_code": code,
        "seconds": round(time.perf_counter() - start, 2),
        "log": log.read_text().splitlines()[-200:] if log else [],
        "output": output.replace(str(work), "WORK").splitlines()[-40:],
    }


def make_model(directory: Path, dry: bool) -> None:
    """Write two random blocks of the shape of Llama-3-8B, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    sizes = (64, 160, 4, 2) if dry else (4096, 14336, 32, 8)
    config = LlamaConfig(
        hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=sizes[2],
        num_key_value_heads=sizes[3], num_hidden_layers=2, vocab_size=512,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu" if dry else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    words = ["<pad>", "<s>", "</s>", "<unk>", *pre_tokenizers.ByteLevel.alphabet()]
    words += [f"<unused{i}>" for i in range(len(words), 512)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
