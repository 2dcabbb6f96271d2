"""What to compute (Recipe) and how this machine computes it (Run). Never mixed.

A Recipe fixes the result; it is written into the checkpoint. A Run changes speed, memory and places
only.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from svdserve.compression.allocation.registry import get_allocator
from svdserve.compression.format.factors import Layout
from svdserve.compression.format.int8 import Weights
from svdserve.compression.methods import METHODS, get_method
from svdserve.compression.system.errors import UserError, explain
from svdserve.compression.system.machine import Precision
from svdserve.compression.training.trainer import Training

Grouping = Literal["shared", "separate"]
_NAMED = Path(__file__).parent / "recipes"


class BlockRefinement(Training):
    """Training of the factors of each block towards the teacher's block, before the next one."""


class Refinement(Training):
    """End-to-end training of the factors, on the calibration tokens of the compression.

    ``calibration``, ``tokens`` and ``seq_len`` are for other tokens than those.
    """

    calibration: str | None = Field(
        default=None, description="as in Recipe; `same` stands for the recipe's own"
    )
    tokens: PositiveInt | None = None
    seq_len: PositiveInt | None = None

    def text(self, recipe: "Recipe") -> "Recipe":
        """``recipe`` with the calibration that this refinement of it uses."""
        own = self.model_dump(include={"calibration", "tokens", "seq_len"}, exclude_none=True)
        if self.calibration is not None:
            parts = self.calibration.split("+")
            named = (recipe.calibration if part == "same" else part for part in parts)
            own["calibration"] = "+".join(dict.fromkeys(named))
        return recipe.model_copy(update=own)


class Recipe(BaseModel):
    """The science of a compression: equal recipes on equal inputs give equal factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "saes-kfac"
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters of the method, by name"
    )
    keep: float = Field(default=0.8, gt=0, le=1, description="keep ratio κ of the factored linears")
    allocator: str = Field(default="divergence", description="how modules share the parameters")
    allocator_parameters: dict[str, Any] = Field(
        default_factory=dict, description="hyper-parameters of the allocator, by name"
    )
    rank_multiple: PositiveInt = Field(default=1, description="every rank is a multiple of it")
    layout: Layout = "interpolative"
    grouping: Grouping = "shared"
    calibration: str = Field(
        default="self",
        description="text file, hf:DATASET[@REVISION][:CONFIG[:SPLIT[:COLUMN]]], self, or several",
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
    weights: Weights = Field(
        default="float",
        description="of the blocks' linears, factored or dense: in dtype, or int8 with row scales",
    )
    precision: Precision = Field(
        default="bfloat16", description="of matrix products in the passes over the tokens"
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    block_refinement: BlockRefinement | None = Field(
        default=None, description="training of each block after its closed form"
    )
    refinement: Refinement | None = Field(
        default=None, description="end-to-end training of the finished checkpoint"
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
    def keeps_all(self) -> bool:
        """Whether it stores the dense model as it is."""
        return self.keep == 1 and self.weights == "float" and self.dtype == "auto"

    @property
    def trainings(self) -> list[tuple[Training, "Recipe"]]:
        """Every training, with the recipe whose calibration it uses."""
        block = [] if self.block_refinement is None else [(self.block_refinement, self)]
        whole = [] if self.refinement is None else [(self.refinement, self.refinement.text(self))]
        return [*block, *whole]

    @property
    def calibrated(self) -> bool:
        """Whether the method or a training reads this recipe's calibration tokens."""
        trained = any(text == self for _, text in self.trainings)
        compared = get_allocator(self.allocator).needs_spectra
        method = get_method(self.method)
        return trained or compared or method.learner is not None or bool(method.statistics)

    @property
    def text_files(self) -> list[Path]:
        """Files that the calibration of the compression and of its trainings may read."""
        sources = {text.calibration for text in (self, *(text for _, text in self.trainings))}
        parts = {part for source in sources for part in (source, *source.split("+"))}
        return [Path(part) for part in sorted(parts)]

    @property
    def sequences(self) -> int:
        """Calibration sequences: tokens rounded down to whole ones, at least one."""
        return max(1, self.tokens // self.seq_len)

    def gradient_rows(self, sequences: int) -> list[int]:
        """Which of the calibration sequences have gradients: at least one, evenly spread."""
        count = min(sequences, max(1, self.gradient_tokens // self.length))
        return [index * sequences // count for index in range(count)]

    @property
    def length(self) -> int:
        """Tokens of one sequence; a budget below seq_len makes one short sequence."""
        return min(self.seq_len, self.tokens)


class Run(BaseModel):
    """The machine: changes no number of the result beyond floating-point order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "cpu"
    threads: PositiveInt | None = Field(
        default=None, le=4_096, description="CPU threads; default all"
    )
    batch_size: PositiveInt = Field(default=1, description="sequences per forward step")
    offload: Path | None = Field(default=None, description="folder for the hidden streams")
    cache: Path | None = Field(
        default=None, description="folder for what other compressions of the model can use again"
    )
    resume: bool = False
    resume_anyway: bool = Field(
        default=False,
        description="go on although the number of threads, the batch size, the device or torch's "
        "version is another one, which changes the order of sums",
    )
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
        raise UserError(explain(error)) from None


def make_run(**fields: Any) -> Run:
    """A checked run; UserError like ``make_recipe``."""
    try:
        return Run(**fields)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def recipe_names() -> list[str]:
    """The named recipes; ``default`` sets nothing, the others are files of this package."""
    return ["default", *sorted(path.stem for path in _NAMED.glob("*.yaml"))]


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """The fields that a YAML file or a named recipe sets; check them with ``make_recipe``.

    Raises:
        UserError: no such file or name, no YAML, or no mapping.
    """
    path = Path(recipe)
    if not path.is_file() and str(recipe) in recipe_names():
        if str(recipe) == "default":
            return {}
        path = _NAMED / f"{recipe}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        named = ", ".join(recipe_names())
        raise UserError(
            f"recipe {recipe}: {error.strerror}; give a YAML file or one of: {named}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers too
        first = " ".join(str(error).split())
        raise UserError(f"recipe {recipe}: not YAML ({first}); give a YAML file") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"recipe {recipe}: must map field names to values, as in keep: 0.8")
    return fields


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
