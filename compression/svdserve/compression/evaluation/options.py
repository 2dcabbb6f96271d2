"""The options of an evaluation, for `svdserve compare` and `svdserve eval`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

CHUNKS_OF_A_STEP = 1
REQUESTS_OF_A_STEP = 8


class Evaluation(BaseModel):
    """Texts, tasks and settings on which every model is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[Path, ...] = Field(
        default=(), description="A UTF-8 text file for perplexity, which is taken verbatim."
    )
    tasks: tuple[str, ...] = Field(
        default=(),
        description="A multiple-choice task: a file `*.jsonl`, or a name that "
        "lm-evaluation-harness knows.",
    )
    limit: PositiveInt | None = Field(
        default=None,
        description="The number of items to use from the start of each task. The default is all.",
    )
    seq_len: int = Field(
        default=2048, ge=2, description="The number of tokens in a chunk of a text."
    )
    max_chunks: PositiveInt | None = Field(
        default=None,
        description="The number of chunks to use from the start of each text. The default is all.",
    )
    device: str = Field(
        default="cpu", description="The device that computes, such as `cpu`, `cuda` or `cuda:1`."
    )

    @property
    def files(self) -> list[Path]:
        """The texts and the local task files that exist."""
        return [file for file in (*self.texts, *map(Path, self.tasks)) if file.is_file()]


class SingleEvaluation(Evaluation):
    """The options of `svdserve eval`, which also sets batch size and dtype."""

    batch_size: PositiveInt | None = Field(
        default=None,
        description="The number of chunks or of requests in a forward step. The default is "
        f"{CHUNKS_OF_A_STEP} for chunks and {REQUESTS_OF_A_STEP} for requests.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="The dtype of weights and activations. `auto` is the model's own dtype.",
    )
