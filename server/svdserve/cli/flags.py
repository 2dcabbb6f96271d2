"""Options of a command that are made from the fields of pydantic models.

A field gives its option the name, the type, the help text, the bounds and the default. An option
that is not given is not passed on, so that the model's own default applies. The models are imported
when a command runs or shows its help page, not when the commands are listed.
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
        model: its fields become options.
        only: the fields that become options; all of them if it is empty.
        without: the fields that do not become options.
        spellings: the option of a field that is not named by the usual rule, such as
            ``--on/--off`` for a switch, or ``--rows`` for several values that keep the plural.
        when: the option that makes the command use this model; empty if it always does.
        panel: the heading of these options on the help page.
        variables: what precedes a field's name in capitals in the name of its environment variable;
            empty if the fields have no variables.
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
    """The values that the user gave to the options of a command."""

    def __init__(self, values: Mapping[str, Any], sources: Sequence[Source]) -> None:
        self._values = {name: value for name, value in values.items() if value not in (None, ())}
        self._sources = {source.model: source for source in sources}

    def of(self, model: type[BaseModel]) -> dict[str, Any]:
        """The values for a model, by the names of its fields."""
        flags = self._sources[model].flags
        return {name: value for name, value in self._values.items() if name in flags}

    def require_only(self, model: type[BaseModel]) -> None:
        """Refuse options that belong to other models alone, which the command would ignore.

        Raises:
            UserError: the message names the first such option, and the option that decides.
        """
        chosen = self._sources[model]
        for source in self._sources.values():
            for name, flag in source.flags.items():
                if name not in self._values or name in chosen.flags:
                    continue
                if chosen.when:
                    raise not_with(flag.spelling, chosen.when)
                raise UserError(
                    f"{flag.spelling}: is read with {source.when} only; give both or neither"
                )

    def make(self, model: type[Model], **others: Any) -> Model:
        """The model with the values that the user gave, and with ``others``.

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


def not_with(option: str, other: str) -> UserError:
    """The error of an option that would be ignored because another one is given."""
    return UserError(f"{option}: is not read with {other}; leave one of them out")


class Command(TyperCommand):
    """A command with the options of its function, and then those of its ``sources``.

    The function gets the values of the latter from its context by ``given``.
    """

    _params: list[Any]
    _complete: bool

    @staticmethod
    def sources() -> Sequence[Source]:
        """The models of the options; a subclass names them and imports them here."""
        raise NotImplementedError

    @property
    def params(self) -> list[Any]:
        """All parameters; the first access imports the models."""
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
    """The values that the user gave to the options that a Command made from models."""
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
        """The option as the user types it."""
        return self.spelling.partition("/")[0]

    @property
    def spelling(self) -> str:
        """The option as typer declares it; the option of several values may be repeated."""
        if self.field in self.source.spellings:
            return self.source.spellings[self.field]
        word = (self.field.removesuffix("s") if self.kind.several else self.field).replace("_", "-")
        return f"--{word}/--no-{word}" if self.default is True else f"--{word}"

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def shown_default(self) -> str:
        """The default on the help page; empty if there is none or the switch is off."""
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
    """The parameters that typer makes from a function whose arguments are these fields."""
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
    """One option for all models that have the field, with the help and default of each."""
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
    """Each text once; all but the first name the option that selects their model."""
    seen = set[str]()
    for flag in flags:
        text, when = text_of(flag), flag.source.when
        if text and text not in seen:
            yield form.format(text=text, when=when) if when and seen else text
            seen.add(text)
