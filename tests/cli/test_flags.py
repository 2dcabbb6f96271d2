"""Options that are made of a model: their names, help, defaults, values and errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from typer.testing import CliRunner

from svdserve.cli import flags
from svdserve.compression.system.errors import UserError


class Inner(BaseModel):
    x: int = 1


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ratio: float = Field(default=0.5, gt=0, le=1, description="The ratio.")
    sizes: tuple[PositiveInt, ...] = Field(default=(1, 8), description="The sizes.")
    rows: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    folder: Path | None = None
    at_most: Annotated[int, Field(ge=0, lt=9)] | None = None
    quick: bool = True
    force: bool = False
    eager: bool = True
    inner: Inner | None = None
    named: dict[str, Any] = Field(default_factory=dict)


class Other(BaseModel):
    ratio: float = Field(default=0.7, description="Another ratio.")
    clients: int = 3


class Command(flags.Command):
    @staticmethod
    def sources() -> Sequence[flags.Source]:
        spellings = {"rows": "--rows", "eager": "--eager/--compiled"}
        return (
            flags.Source(Model, spellings=spellings, variables="FLAGS_TEST_"),
            flags.Source(Other, without=frozenset({"clients"}), when="--other"),
        )


def run(*words: str, **environment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command is given for the two models."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    app = typer.Typer()

    @app.command(cls=Command)
    def command(ctx: typer.Context, out: str = "x") -> None:
        assert out in ("x", "y")
        given = flags.given(ctx)
        found.append((given.of(Model), given.of(Other)))
        given.make(Model)

    done = CliRunner().invoke(app, list(words), env=environment)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if not found:
        raise ValueError(done.output)
    return found[0]


def test_what_is_not_given_is_not_passed_on() -> None:
    assert run() == ({}, {})
    assert run("--out", "y") == ({}, {})


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--ratio 0.25", {"ratio": 0.25}),
        ("--size 2 --size 3", {"sizes": [2, 3]}),
        ("--rows 4", {"rows": [4]}),
        ("--kind b", {"kind": "b"}),
        ("--folder here", {"folder": Path("here")}),
        ("--at-most 3", {"at_most": 3}),
        ("--no-quick --force", {"quick": False, "force": True}),
        ("--quick", {"quick": True}),
        ("--compiled", {"eager": False}),
    ],
)
def test_values_have_the_types_of_the_fields(words: str, given: dict[str, Any]) -> None:
    of_model, of_other = run(*words.split())
    assert of_model == given
    assert of_other == {name: value for name, value in given.items() if name == "ratio"}


@pytest.mark.parametrize(
    "words", ["--inner 1", "--named a", "--clients 3", "--no-force", "--sizes 3", "--ratio x"]
)
def test_other_options_are_none(words: str) -> None:
    with pytest.raises(ValueError, match=r"No such option|Invalid value"):
        run(*words.split())


def test_a_variable_of_the_environment_counts_as_given() -> None:
    assert run(FLAGS_TEST_RATIO="0.25")[0] == {"ratio": 0.25}
    assert run("--ratio", "0.75", FLAGS_TEST_RATIO="0.25")[0] == {"ratio": 0.75}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ratio 2", r"^--ratio: Input should be less than or equal to 1 \(given: 2\.0\)$"),
        ("--size 3 --size 0", r"^--size: Input should be greater than 0 \(given: 0\)$"),
        ("--kind c", r"^--kind: Input should be 'a' or 'b' \(given: 'c'\)$"),
        ("--at-most 9", r"^--at-most: Input should be less than 9 \(given: 9\)$"),
    ],
)
def test_an_error_names_the_option(words: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(*words.split())


def test_the_help_page_says_what_the_fields_say() -> None:
    app = typer.Typer(rich_markup_mode="markdown")

    @app.command(cls=Command)
    def command(ctx: typer.Context) -> None: ...

    page = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    lines = " ".join(page.replace("│", " ").split())
    assert (
        "The ratio. Allowed: above 0 and at most 1. With --other: Another ratio. "
        "[env var: FLAGS_TEST_RATIO] [default: (0.5; 0.7 with --other)]"
    ) in lines
    assert "The sizes. It may be repeated. [env var: FLAGS_TEST_SIZES] [default: (1 8)]" in lines
    assert "Allowed: a, b." in lines
    assert "Allowed: at least 0 and below 9." in lines
    assert "--quick --no-quick" in lines
    assert "[default: (quick)]" in lines


def test_every_option_of_every_command_has_a_help_text_that_is_a_sentence() -> None:
    from svdserve.cli.main import app

    group: Any = typer.main.get_command(app)
    wrong = [
        f"{name} {parameter.name}: {parameter.help}"
        for name, command in group.commands.items()
        for parameter in command.params
        if not parameter.help or not parameter.help[0].isupper() or parameter.help[-1] not in ".)"
    ]
    assert not wrong
