"""`svdserve install-hook`."""

from typing import Annotated

import typer

from svdserve.compression.system.errors import UserError


def install_hook(
    remove: Annotated[bool, typer.Option("--remove", help="Take the hook out again.")] = False,
) -> None:
    """Let every Python of this environment load compressed models without an import.

    The command writes a .pth file, which Python reads at every start. Without that file,
    `import svdserve.compression` does the same for one program. vLLM and svdserve need neither.
    """
    from svdserve.compression.model.hook import hook_path
    from svdserve.compression.model.hook import install_hook as install

    try:
        if remove:
            hook_path().unlink(missing_ok=True)
            typer.echo(f"{hook_path()}: is removed")
        else:
            typer.echo(f"{install()}: is written; --remove takes it out again")
    except OSError as error:
        raise UserError(
            f"{hook_path()}: cannot be changed ({error.strerror}); take an environment of your own"
        ) from None
