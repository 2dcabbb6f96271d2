"""Makes transformers know svdserve checkpoints without anybody importing svdserve.

transformers has no entry points for quantizers, so the wheel installs svdserve_startup.pth, which
imports this module when Python starts. All it does then is to put one object on sys.meta_path. That
object waits for the first import of the module that holds transformers' table of quantizers and
imports svdserve.compression.hf right after it. Nothing here may fail or take time.
"""

import sys
from types import ModuleType

TABLE = "transformers.quantizers.auto"
PLUGIN = "svdserve.compression.hf"


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


if TABLE not in sys.modules:
    sys.meta_path.insert(0, _AfterTable())  # type: ignore[arg-type]
