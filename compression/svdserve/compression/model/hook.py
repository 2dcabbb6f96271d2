"""How transformers learns of svdserve's checkpoints, and the opt-in hook for whole environments.

``svdserve install-hook`` writes a .pth file that imports svdserve.compression whenever Python
starts. It is for programs that nobody can add an import to; scanners rightly look at such files, so
no installation writes it by itself.
"""

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

TABLE = "transformers.quantizers.auto"
PLUGIN = "svdserve.compression.model.hf"
PTH_FILE = "svdserve_hook.pth"
# pip does not know of the file and leaves it behind; then it must not print at every start.
_LINE = r'import sys; exec("try: import svdserve.compression\nexcept ImportError: pass")'


class _AfterTable:
    """A finder that finds nothing itself and removes itself after its one use."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)  # type: ignore[arg-type]
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    import importlib

    try:
        importlib.import_module(PLUGIN)
    except Exception as error:
        import warnings

        warnings.warn(f"transformers cannot read svdserve checkpoints: {error}", stacklevel=2)


def register_with_transformers() -> None:
    """Make transformers know svdserve checkpoints: now, or as soon as it loads its quantizers."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())  # type: ignore[arg-type]


def install_hook(folder: Path | None = None) -> Path:
    """Write the .pth file into the environment's site-packages, or ``folder``; returns its path."""
    path = hook_path(folder)
    path.write_text(f"{_LINE}\n")
    return path


def hook_path(folder: Path | None = None) -> Path:
    """Where the .pth file is, or would be."""
    return (folder or Path(sysconfig.get_path("purelib"))) / PTH_FILE
