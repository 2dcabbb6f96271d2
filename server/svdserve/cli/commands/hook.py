"""`svdserve install-hook`."""

from typing import Annotated

import typer

from svdserve.compression.system.errors import UserError


def install_hook(
    remove: Annotated[bool, typer.Option("--remove", help="Remove the hook.")] = False,
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
            typer.echo(f"{hook_path()}: removed")
        else:
            typer.echo(f"{install()}: written; `svdserve install-hook --remove` removes it")
    except OSError as error:
        raise UserError(
            f"{hook_path()}: cannot be changed ({error.strerror}); use a Python environment that "
            "you may write to"
        ) from None
