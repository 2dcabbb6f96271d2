"""vLLM's own command line: the flags of its `vllm serve`, and running it.

Importing this module imports vLLM, which is heavy and reads the environment.
"""

from vllm.entrypoints.cli.main import main as run
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["flags_of_serve", "run"]


def flags_of_serve() -> dict[str, int | str | None]:
    """Each flag of `vllm serve`, with argparse's ``nargs``: the number of values that it takes."""
    parser = cmd_init()[0].subparser_init(FlexibleArgumentParser().add_subparsers())
    return {flag: action.nargs for action in parser._actions for flag in action.option_strings}
