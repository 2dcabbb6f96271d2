"""Options of a command that are made of the fields of pydantic models.

A field gives its option the name, the type, the help text, the bounds and the default. An option
that is not given is not passed on, so that the model's own default applies. Models are imported
when the options of the command are needed first: to show or to run it, not to list the commands.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from svdserve.cli.fields import Kind, kind_of
from svdserve.compression.system.errors import UserError, explain

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """A model whose plain fields become options; those that hold other models do not.

    Args:
        model: gives the options.
        only: the fields that become options; all of them when it is empty.
        without: fields that do not.
        spellings: by field, where the name alone does not give it: ``--on/--off`` for one that is
            true or false, ``--rows`` for several values whose singular is not a shorter word.
        when: the option that makes the command use this model, where it does not always.
        panel: the heading of these options on the help page.
        variables: the environment variable of a field is its name in capitals after this.
    """

    model: type[BaseModel]
    only: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    spellings: Mapping[str, str] = field(default_factory=dict)
    when: str = ""
    panel: str | None = None
    variables: str = ""

    @cached_property
    def flags(self) -> dict[str, "_Flag"]:
        """The options by the names of their fields."""
        return {
            name: _Flag(name, info, kind, self)
            for name, info in self.model.model_fields.items()
            if (not self.only or name in self.only) and name not in self.without
            if (kind := kind_of(info)) is not None
        }


class Given:
    """The values that the user has given to the options of a command."""

    def __init__(self, values: Mapping[str, Any], sources: Sequence[Source]) -> None:
        self._values = {name: value for name, value in values.items() if value not in (None, ())}
        self._sources = {source.model: source for source in sources}

    def of(self, model: type[BaseModel]) -> dict[str, Any]:
        """Those that belong to a model, by the names of its fields."""
        flags = self._sources[model].flags
        return {name: value for name, value in self._values.items() if name in flags}

    def make(self, model: type[Model], **others: Any) -> Model:
        """The model with what is given.

        Raises:
            UserError: a value is out of range; the message names the option.
        """
        try:
            return model(**self.of(model), **others)
        except ValidationError as error:
            place, said = error.errors()[0]["loc"], explain(error)
            name = ".".join(map(str, place))
            flag = self._sources[model].flags.get(name.partition(".")[0])
            if flag is not None and said.startswith(name):
                said = f"{flag.name}{said.removeprefix(name)}"
            raise UserError(said) from None


class Command(TyperCommand):
    """A command with the options of its function, and then those of its ``sources``.

    The function takes the latter by ``given`` from its context.
    """

    _params: list[Any]
    _complete: bool

    @staticmethod
    def sources() -> Sequence[Source]:
        """The models of the options; a subclass names them and imports them here."""
        raise NotImplementedError

    @property
    def params(self) -> list[Any]:
        """All parameters; the first look at them imports the models."""
        if not self._complete:
            self._complete = True
            self._params += _options(self._all_sources)
        return self._params

    @params.setter
    def params(self, own: list[Any]) -> None:
        self._params, self._complete = own, False

    @cached_property
    def _all_sources(self) -> Sequence[Source]:
        return self.sources()

    def invoke(self, ctx: Any) -> Any:
        names = {name for source in self._all_sources for name in source.flags}
        ctx.obj = Given({name: ctx.params.pop(name) for name in names}, self._all_sources)
        return super().invoke(ctx)


def given(ctx: typer.Context) -> Given:
    """What the user has given to the options that a Command has made of models."""
    assert isinstance(ctx.obj, Given)
    return ctx.obj


@dataclass(frozen=True)
class _Flag:
    """One option of one model."""

    field: str
    info: FieldInfo
    kind: Kind
    source: Source

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.spelling.partition("/")[0]

    @property
    def spelling(self) -> str:
        """As typer has it: a field of several values is an option that may be repeated."""
        if self.field in self.source.spellings:
            return self.source.spellings[self.field]
        word = (self.field.removesuffix("s") if self.kind.several else self.field).replace("_", "-")
        return f"--{word}/--no-{word}" if self.default is True else f"--{word}"

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def shown_default(self) -> str:
        """On the help page; nothing for what has none and for a switch that is off."""
        value = self.default
        if value is None or value is False or value == ():
            return ""
        if value is True:
            return self.name.removeprefix("--")
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    @property
    def help(self) -> str:
        text = self.info.description or ""
        if self.kind.several:
            text += " It may be repeated."
        return f"{text} Allowed: {self.kind.allowed}." if self.kind.allowed else text


def _options(sources: Sequence[Source]) -> list[Any]:
    """Parameters as typer makes them of a function whose arguments these are."""
    names = dict.fromkeys(name for source in sources for name in source.flags)

    def command() -> None: ...

    parameters = [
        _parameter([source.flags[name] for source in sources if name in source.flags])
        for name in names
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(command)
    made: Any = typer.main.get_command(app)
    return list(made.params)


def _parameter(flags: Sequence[_Flag]) -> inspect.Parameter:
    """One option of all models that have it, with what each says of it."""
    first = flags[0]
    default = "; ".join(_differing(flags, lambda flag: flag.shown_default, "{text} with {when}"))
    info = typer.Option(
        first.spelling,
        help=" ".join(_differing(flags, lambda flag: flag.help, "With `{when}`: {text}")),
        show_default=default or False,
        envvar=f"{first.source.variables}{first.field.upper()}" if first.source.variables else None,
        rich_help_panel=first.source.panel if len({f.source.panel for f in flags}) == 1 else None,
    )
    plain: Any = first.kind.value
    value: Any = list[plain] if first.kind.several else plain
    kind = inspect.Parameter.KEYWORD_ONLY
    annotation = Annotated[value | None, info]
    return inspect.Parameter(first.field, kind, default=None, annotation=annotation)


def _differing(flags: Sequence[_Flag], text_of: Callable[[_Flag], str], form: str) -> Iterator[str]:
    """Each text once; all but the first say which option asks for their model."""
    seen = set[str]()
    for flag in flags:
        text, when = text_of(flag), flag.source.when
        if text and text not in seen:
            yield form.format(text=text, when=when) if when and seen else text
            seen.add(text)
