"""What to compute (Recipe) and how this machine computes it (Run).

A Recipe determines the result and is written into the checkpoint. A Run affects only speed, memory
and paths.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from svdserve.compression.allocation import get_allocator
from svdserve.compression.format.codecs import get_codec
from svdserve.compression.format.layouts import get_layout
from svdserve.compression.methods import METHODS, get_method
from svdserve.compression.system.errors import UserError, explain
from svdserve.compression.system.precision import Precision
from svdserve.compression.training.trainer import Training

Grouping = Literal["shared", "separate"]
_NAMED = Path(__file__).parent / "recipes"


class BlockRefinement(Training):
    """Training of each block's factors towards the teacher's block, before the next block."""


class Refinement(Training):
    """End-to-end training of the factors.

    By default it uses the calibration tokens of the compression; ``calibration``, ``tokens`` and
    ``seq_len`` select other tokens.
    """

    calibration: str | None = Field(
        default=None,
        description="The text of the training, as for a compression: a text FILE, hf:DATASET, "
        "`self`, or several of them joined by `+`. `same` is the text of the compression, which "
        "is the default.",
    )
    tokens: PositiveInt | None = Field(
        default=None,
        description="The number of tokens to train on. The default is the compression's number.",
    )
    seq_len: PositiveInt | None = Field(
        default=None,
        description="The number of tokens in a sequence. The default is the compression's number.",
    )

    def text(self, recipe: "Recipe") -> "Recipe":
        """``recipe`` with the calibration fields that this refinement uses."""
        own = self.model_dump(include={"calibration", "tokens", "seq_len"}, exclude_none=True)
        if self.calibration is not None:
            parts = self.calibration.split("+")
            named = (recipe.calibration if part == "same" else part for part in parts)
            own["calibration"] = "+".join(dict.fromkeys(named))
        return recipe.model_copy(update=own)


class Recipe(BaseModel):
    """What a compression computes: equal recipes on equal inputs give equal factors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        default="saes-kfac",
        description="The method that factors the linears; `svdserve methods` lists all methods.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The hyper-parameters of the method, by name."
    )
    keep: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="The keep ratio κ: stored parameters over dense parameters of the factored "
        "linears.",
    )
    allocator: str = Field(
        default="divergence",
        description="The rule by which the linears share the parameters that κ leaves, such as "
        "`uniform`, `energy`, `sensitivity`, `divergence` or `last-blocks`.",
    )
    allocator_parameters: dict[str, Any] = Field(
        default_factory=dict, description="The hyper-parameters of the allocator, by name."
    )
    rank_multiple: PositiveInt = Field(
        default=1, description="Every rank is a multiple of this number."
    )
    layout: str = Field(
        default="interpolative",
        description="How a low-rank weight is stored. For a rank r, `interpolative` stores r² "
        "parameters fewer than `pair`.",
    )
    grouping: Grouping = Field(
        default="shared",
        description="Whether the linears that read the same input share one input factor, or each "
        "linear has a separate one.",
    )
    calibration: str = Field(
        default="self",
        description="The text that the compression fits: a text FILE, "
        "`hf:DATASET[@REVISION][:CONFIG[:SPLIT[:COLUMN]]]`, `self` (text that the model writes "
        "itself), or several of them joined by `+`.",
    )
    tokens: PositiveInt = Field(default=65_536, description="The number of calibration tokens.")
    seq_len: PositiveInt = Field(
        default=2_048, description="The number of tokens in a calibration sequence."
    )
    gradient_tokens: PositiveInt = Field(
        default=8_192,
        description="The number of calibration tokens for which gradients are taken, if the method "
        "or the allocator needs gradients.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="The dtype in which factors and hidden streams are stored. `auto` is the "
        "model's own dtype.",
    )
    weights: str = Field(
        default="float",
        description="How the blocks' linears are stored, whether factored or dense: `float` "
        "keeps the stored dtype, and `int8` stores 8-bit integers with one scale for each row.",
    )
    precision: Precision = Field(
        default="bfloat16",
        description="The precision of the matrix products in the passes over the tokens.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="The seed that decides which calibration tokens are drawn.",
    )
    block_refinement: BlockRefinement | None = Field(
        default=None, description="The training of each block after its closed form."
    )
    refinement: Refinement | None = Field(
        default=None, description="The end-to-end training of the finished checkpoint."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        get_layout(self.layout)
        get_codec(self.weights)
        method = get_method(self.method)
        full = method.schema.check(self.parameters)
        method.make_learner(full)
        object.__setattr__(self, "parameters", full)
        self._share_by_scores()
        full = get_allocator(self.allocator).schema.check(self.allocator_parameters)
        object.__setattr__(self, "allocator_parameters", full)
        return self

    def _share_by_scores(self) -> None:
        """Require the allocator ``scores`` for learned methods, and only for those."""
        learned = get_method(self.method).learner is not None
        if learned and "allocator" not in self.model_fields_set:
            object.__setattr__(self, "allocator", "scores")
        if learned and self.allocator != "scores":
            raise UserError(
                f"allocator {self.allocator!r}: method {self.method} learns which components the "
                "whole model keeps; allowed: scores, or leave it out"
            )
        if not learned and self.allocator == "scores":
            names = ", ".join(sorted(name for name, entry in METHODS.items() if entry.learner))
            raise UserError(
                f"allocator 'scores': method {self.method} learns none; give one of the methods "
                f"{names}, or another allocator"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether the result is the dense model unchanged."""
        return self.keep == 1 and get_codec(self.weights).plain and self.dtype == "auto"

    @property
    def trainings(self) -> list[tuple[Training, "Recipe"]]:
        """Every training of the recipe, with a recipe that has the training's calibration."""
        block = [] if self.block_refinement is None else [(self.block_refinement, self)]
        whole = [] if self.refinement is None else [(self.refinement, self.refinement.text(self))]
        return [*block, *whole]

    @property
    def calibrated(self) -> bool:
        """Whether method, allocator or a training reads this recipe's calibration tokens."""
        trained = any(text == self for _, text in self.trainings)
        compared = get_allocator(self.allocator).needs_spectra
        method = get_method(self.method)
        return trained or compared or method.learner is not None or bool(method.statistics)

    @property
    def text_files(self) -> list[Path]:
        """Paths that the calibration of the compression and of its trainings may refer to."""
        sources = {text.calibration for text in (self, *(text for _, text in self.trainings))}
        parts = {part for source in sources for part in (source, *source.split("+"))}
        return [Path(part) for part in sorted(parts)]

    @property
    def sequences(self) -> int:
        """Number of calibration sequences: ``tokens / seq_len`` rounded down, at least one."""
        return max(1, self.tokens // self.seq_len)

    def gradient_rows(self, sequences: int) -> list[int]:
        """Indices of the calibration sequences with gradients: at least one, evenly spaced."""
        count = min(sequences, max(1, self.gradient_tokens // self.length))
        return [index * sequences // count for index in range(count)]

    @property
    def length(self) -> int:
        """Number of tokens in a sequence; fewer ``tokens`` than seq_len make one short sequence."""
        return min(self.seq_len, self.tokens)


class Run(BaseModel):
    """How this machine computes; affects the result only through the order of sums."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = Field(
        default="cpu", description="The device that computes, such as `cpu`, `cuda` or `cuda:1`."
    )
    threads: PositiveInt | None = Field(
        default=None,
        le=4_096,
        description="The number of CPU threads. By default torch chooses it.",
    )
    batch_size: PositiveInt = Field(
        default=1, description="The number of sequences in a forward step."
    )
    offload: Path | None = Field(
        default=None,
        description="A folder for the hidden streams. Without one they stay in memory.",
    )
    cache: Path | None = Field(
        default=None,
        description="A folder for results that other compressions of the same model can use again.",
    )
    resume: bool = Field(default=False, description="Go on with an interrupted run.")
    resume_anyway: bool = Field(
        default=False,
        description="Go on with an interrupted run even if the number of threads, the batch size, "
        "the device or torch's version has changed. Sums are then computed in another order.",
    )
    force: bool = Field(default=False, description="Replace an output directory that is not empty.")
    checkpointing: bool = Field(
        default=True,
        description="Compute activations again in the backward pass of a training, which takes "
        "less memory and more time.",
    )
    progress: bool = Field(default=True, description="Show progress bars.")


def make_recipe(**fields: Any) -> Recipe:
    """A validated recipe; UserError names the wrong field, its value and what is allowed."""
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def make_run(**fields: Any) -> Run:
    """A validated run; UserError as for ``make_recipe``."""
    try:
        return Run(**fields)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def recipe_names() -> list[str]:
    """Names of the named recipes; ``default`` sets no field, the others are YAML files."""
    return ["default", *sorted(path.stem for path in _NAMED.glob("*.yaml"))]


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """The fields that a YAML file or a named recipe sets; check them with ``make_recipe``.

    Raises:
        UserError: there is no such file or name, or the file is no YAML mapping.
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also for dates and numbers
        first = " ".join(str(error).split())
        raise UserError(f"recipe {recipe}: not YAML ({first}); give a YAML file") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise UserError(f"recipe {recipe}: must map field names to values, as in keep: 0.8")
    return fields


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that ``load_recipe`` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
