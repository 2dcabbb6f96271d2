"""What to compute (Recipe) and how this machine computes it (Run). Never mixed.

A Recipe fixes the result; it is written into the checkpoint. A Run changes speed, memory and places
only.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from svdserve.compression.allocation import get_allocator
from svdserve.compression.errors import UserError
from svdserve.compression.factors import Layout
from svdserve.compression.methods import METHODS, get_method
from svdserve.compression.training import Training

Grouping = Literal["shared", "separate"]


class Refinement(Training):
    """End-to-end training of the factors, on the calibration tokens of the compression.

    ``calibration``, ``tokens`` and ``seq_len`` are for other tokens than those.
    """

    calibration: str | None = Field(default=None, description="as in Recipe")
    tokens: PositiveInt | None = None
    seq_len: PositiveInt | None = None

    def text(self, recipe: "Recipe") -> "Recipe":
        """``recipe`` with the calibration that this refinement of it uses."""
        own = self.model_dump(include={"calibration", "tokens", "seq_len"}, exclude_none=True)
        return recipe.model_copy(update=own)


class Recipe(BaseModel):
    """The science of a compression: equal recipes on equal inputs give equal factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "saes-kfac"
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters of the method, by name"
    )
    keep: float = Field(default=0.8, gt=0, le=1, description="keep ratio κ of the factored linears")
    allocator: str = Field(default="uniform", description="how modules share the parameters")
    allocator_parameters: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters of the allocator, by name"
    )
    rank_multiple: PositiveInt = Field(default=1, description="every rank is a multiple of it")
    layout: Layout = "interpolative"
    grouping: Grouping = "shared"
    calibration: str = Field(
        default="self",
        description="text file, hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]], self, or several joined by +",
    )
    tokens: PositiveInt = Field(default=65_536, description="calibration tokens")
    seq_len: PositiveInt = Field(default=2_048, description="tokens per calibration sequence")
    gradient_tokens: PositiveInt = Field(
        default=8_192,
        description="calibration tokens with gradients, if the method or the allocator needs them",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="stored dtype of factors and streams; auto is the model's own"
    )
    seed: int = 0
    refinement: Refinement | None = Field(
        default=None, description="end-to-end training after the closed form"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        method = get_method(self.method)
        full = method.schema.check(self.parameters)
        method.make_learner(full)
        object.__setattr__(self, "parameters", full)
        self._share_by_scores()
        full = get_allocator(self.allocator).schema.check(self.allocator_parameters)
        object.__setattr__(self, "allocator_parameters", full)
        return self

    def _share_by_scores(self) -> None:
        """A learned method shares the parameters itself; no other method has scores to share by."""
        learned = get_method(self.method).learner is not None
        if learned and "allocator" not in self.model_fields_set:
            object.__setattr__(self, "allocator", "scores")
        if learned and self.allocator != "scores":
            raise UserError(
                f"allocator {self.allocator!r}: method {self.method} learns which components stay "
                "in the whole model; allowed: scores, or leave it out"
            )
        if not learned and self.allocator == "scores":
            names = ", ".join(sorted(name for name, entry in METHODS.items() if entry.learner))
            raise UserError(
                f"allocator 'scores': method {self.method} learns none; take one of {names}, or "
                "another allocator"
            )

    @property
    def sequences(self) -> int:
        """Calibration sequences: tokens rounded down to whole ones, at least one."""
        return max(1, self.tokens // self.seq_len)

    @property
    def gradient_sequences(self) -> int:
        """Sequences with gradients: the first ones, at least one."""
        return min(self.sequences, max(1, self.gradient_tokens // self.length))

    @property
    def length(self) -> int:
        """Tokens of one sequence; a budget below seq_len makes one short sequence."""
        return min(self.seq_len, self.tokens)


class Run(BaseModel):
    """The machine: changes no number of the result beyond floating-point order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "cpu"
    threads: PositiveInt | None = Field(default=None, description="CPU threads; default all")
    batch_size: PositiveInt = Field(default=1, description="sequences per forward step")
    offload: Path | None = Field(default=None, description="folder for the hidden streams")
    resume: bool = False
    force: bool = Field(default=False, description="replace a non-empty output directory")
    checkpointing: bool = Field(
        default=True, description="compute activations again in the backward pass of a refinement"
    )
    progress: bool = True


def make_recipe(**fields: Any) -> Recipe:
    """A checked recipe; UserError names the wrong field, what was given and what is allowed."""
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def make_run(**fields: Any) -> Run:
    """A checked run; UserError like ``make_recipe``."""
    try:
        return Run(**fields)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
        return str(cause)
    given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
    return f"{name}: {first['msg']}{given}" if name else str(first["msg"])


def load_recipe(path: Path) -> dict[str, Any]:
    """The fields that a YAML recipe sets; check them with ``make_recipe``.

    Raises:
        UserError: no such file, no YAML, or no mapping.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path}: must map field names to values")
    return fields


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
