"""Calibration text that the model writes itself: a random first token, then plain sampling.

The procedure is that of LLM-QAT (arXiv 2305.17888, section 3.1). From generation_config.json only
the tokens that end a text are read, because temperature, penalties and so on are meant for chats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    set_seed,
)

from svdserve.compression.format.untrusted import read_json
from svdserve.compression.model.building import (
    check_ids,
    load_tokenizer,
    starts_with_bos,
    transformers_says,
)
from svdserve.compression.pipeline.progress import bar
from svdserve.compression.pipeline.recipe import Recipe
from svdserve.compression.system.errors import UserError
from svdserve.compression.system.permissions import remote_code

_CPU_BATCH, _DEVICE_BATCH = 32, 256
_CACHE_SHARE = 0.25  # share of the device's free memory for keys and values


@torch.no_grad()
def sample(model: Path, recipe: Recipe, device: torch.device, progress: bool) -> Tensor:
    """Sampled sequences [N, L], int64 on the CPU; the whole model is loaded meanwhile.

    Args:
        model: the dense model.
        recipe: number and length of the sequences, and the seed.
        device: the device of the model; different devices give different samples.
        progress: whether to show a bar.

    Raises:
        UserError: transformers cannot load the model, or its logits are not finite.
    """
    # On a CPU, sdpa takes twice as long as eager for one bfloat16 query over a long context.
    with transformers_says(model, "load the model"):
        network = AutoModelForCausalLM.from_pretrained(
            model,
            dtype="auto",
            attn_implementation="eager",
            generation_config=GenerationConfig(),
            **remote_code(),
        )
    network = network.eval().to(device)
    network.generation_config = GenerationConfig(eos_token_id=_ends_of_text(model))
    tokenizer = load_tokenizer(model)
    rows = network.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(min(len(tokenizer), rows)) if i not in special])
    bos = torch.tensor(starts_with_bos(tokenizer), dtype=torch.int64)
    if len(bos):
        check_ids(model, network.config, bos, "calibration self")
    batch = _batch(network, recipe, device)
    set_seed(recipe.seed)
    parts: list[Tensor] = []
    with bar(progress) as shown:
        total = recipe.sequences * recipe.length
        task = shown.add_task("sampling", total=total, facts="tokens")
        for start in range(0, recipe.sequences, batch):
            count = min(batch, recipe.sequences - start)
            first = allowed[torch.randint(len(allowed), (count, 1))]
            prompt = torch.cat([bos.expand(count, -1), first], dim=1)[:, : recipe.length].to(device)

            def notify(length: int, before: int = start * recipe.length, rows: int = count) -> None:
                shown.update(task, completed=before + rows * length)

            if prompt.shape[1] < recipe.length:
                prompt = network.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_length=recipe.length,
                    max_length=recipe.length,
                    pad_token_id=tokenizer.pad_token_id or 0,
                    logits_processor=LogitsProcessorList([_Known(model, rows, notify)]),
                )
            parts.append(prompt.cpu())
        shown.update(task, completed=total)
    return torch.cat(parts)


def _batch(network: Any, recipe: Recipe, device: torch.device) -> int:
    """Number of sequences to sample together: a power of two whose keys and values fit."""
    if device.type != "cuda":
        return _CPU_BATCH
    config = network.config.get_text_config(decoder=True)
    # An upper bound: models with fewer key and value heads, or with short windows, need less.
    cache = 2 * config.num_hidden_layers * config.hidden_size * network.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(device)
    fits = int(_CACHE_SHARE * free / (cache * recipe.length))
    return min(_DEVICE_BATCH, 1 << max(fits.bit_length() - 1, 0))


def _ends_of_text(model: Path) -> int | list[int] | None:
    """The ids that end a text, or None; ``min_length`` keeps generate from sampling them."""
    for name in ("generation_config.json", "config.json"):
        if not (model / name).exists():
            continue
        raw = read_json(model / name)
        nested = raw.get("text_config")
        for part in (raw, nested if isinstance(nested, dict) else {}):
            ids = part.get("eos_token_id")
            if isinstance(ids, int) or (
                isinstance(ids, list) and ids and all(isinstance(item, int) for item in ids)
            ):
                return ids
    return None


class _Known(LogitsProcessor):  # type: ignore[misc]
    """Excludes ids that have no embedding, and calls ``notify`` with the length after each step.

    Raises:
        UserError: the logits are not finite.
    """

    def __init__(self, model: Path, rows: int, notify: Callable[[int], None]) -> None:
        self._model, self._rows, self._notify = model, rows, notify

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bool(scores.isnan().any()) or not bool(scores.amax(dim=-1).isfinite().all()):
            raise UserError(
                f"{self._model}: its logits are not finite after {input_ids.shape[1]} tokens; the "
                "weights are broken or overflow in their dtype: repair the model, or give "
                "--calibration FILE"
            )
        self._notify(input_ids.shape[1] + 1)
        scores[:, self._rows :] = -torch.inf
        return scores
