"""The options that the benchmarks share, each defined once."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class RoundOptions(BaseModel):
    """What every benchmark in interleaved rounds can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: PositiveInt = Field(
        default=5,
        description="The number of rounds that count. One more round comes first to warm up.",
    )


class ModelOptions(RoundOptions):
    """How vLLM runs the models that are measured."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="The dtype of weights and activations. `auto` is the model's own dtype.",
    )
    eager: bool = Field(
        default=True, description="Run without compilation and CUDA graphs, or compiled."
    )
    kv_cache_bytes: PositiveInt = Field(
        default=512 << 20, description="The size of the KV cache of each model, in bytes."
    )
