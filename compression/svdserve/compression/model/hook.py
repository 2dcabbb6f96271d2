"""Registration with transformers, and the opt-in hook that registers in a whole environment.

``svdserve install-hook`` writes a .pth file that imports svdserve.compression whenever Python
starts, for programs to which the user cannot add an import. Security scanners flag such files, so
installing svdserve does not write one.
"""

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

TABLE = "transformers.quantizers.auto"
PLUGIN = "svdserve.compression.model.hf"
PTH_FILE = "svdserve_hook.pth"
# Uninstalling svdserve leaves the file behind, which must then not print an error at every start.
_LINE = r'import sys; exec("try: import svdserve.compression\nexcept ImportError: pass")'


class _AfterTable:
    """A finder that registers the plug-in after ``TABLE`` is imported, and then removes itself."""

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
    """Register the plug-in now if transformers' quantizers are loaded, else when they are."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())  # type: ignore[arg-type]


def install_hook(folder: Path | None = None) -> Path:
    """Write the .pth file into ``folder`` or the environment's site-packages; returns its path."""
    path = hook_path(folder)
    path.write_text(f"{_LINE}\n")
    return path


def hook_path(folder: Path | None = None) -> Path:
    """Path of the .pth file, whether or not it exists."""
    return (folder or Path(sysconfig.get_path("purelib"))) / PTH_FILE
