"""The model loader: checks an svdserve checkpoint, then streams it into the model.

How it is chosen. vLLM picks the loader by ``--load-format`` alone, before it looks at the
checkpoint, and gives a quantization config no hook that sees the load configuration early enough to
change it. So the loader takes the place of vLLM's DefaultModelLoader, of which it is a subclass,
for the formats that read plain safetensors ("auto", "hf", "safetensors"), and does what its parent
does for every model that is not quantized with svdserve. ``--load-format svdserve`` names it
explicitly. The other formats are refused.

A dense model in bfloat16 on CPU whose load format is named explicitly is loaded as vLLM does, and
then gets what compressed models get beside their factors: svdserve's kernel for its linears and
head (whole.py), joined activations (mlp.py) and norms (norms.py), each where it can run.
"""

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import vllm
from torch import Tensor, nn
from vllm.config import (
    CompilationMode,
    LoadConfig,
    ModelConfig,
    VllmConfig,
    get_current_vllm_config,
)
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from svdserve.compression import __version__
from svdserve.compression.format.reader import Checkpoint, open_checkpoint
from svdserve.compression.format.schema import QUANT_METHOD
from svdserve.compression.system.errors import UserError
from svdserve.kernels.registry import what_decides
from svdserve.server.layer_checks import LayerCheck, wanted
from svdserve.server.plugin.linear import LowRankLinearMethod, StoredBytes
from svdserve.server.plugin.mlp import join_activations, join_layers
from svdserve.server.plugin.norms import prefer_norms
from svdserve.server.plugin.twin import Twin, kind_of
from svdserve.server.plugin.verify import verify_layers
from svdserve.server.plugin.whole import use_kernel
from svdserve.server.worker import LOAD_FORMAT

logger = init_logger("vllm.svdserve")

REPLACED_FORMATS = ("auto", "hf", "safetensors")


@dataclass(frozen=True)
class LoadReport:
    """What one worker loaded, kept for metrics.

    Attributes:
        seconds: from the first check of the files to the last packed weight.
        layers: the number of factored vLLM layers, 0 for a dense model.
        stored: bytes of weights on this worker, in the dtype that is served.
        read: bytes of factored layers that this worker has read from the files.
        checks: one for each factored layer if the layers were to be verified, else none.
    """

    seconds: float
    layers: int
    stored: StoredBytes
    read: int = 0
    checks: tuple[LayerCheck, ...] = ()


_reports: WeakKeyDictionary[nn.Module, LoadReport] = WeakKeyDictionary()


def load_report(model: nn.Module) -> LoadReport | None:
    """The report of a model that this process loaded; None if another loader did."""
    return _reports.get(model)


def register_loader() -> None:
    """Register the loader for its own name and in place of vLLM's default loader."""
    # vLLM's public function would log a warning for each replaced format, whatever the model.
    registry = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    model_loader.register_model_loader(LOAD_FORMAT)(SvdserveModelLoader)
    for load_format in REPLACED_FORMATS:
        owner = registry.get(load_format)
        if owner is DefaultModelLoader:
            registry[load_format] = SvdserveModelLoader
        elif owner is not None:
            logger.warning(
                "Load format %r is taken by %s; serve svdserve checkpoints with --load-format %s",
                load_format,
                owner.__name__,
                LOAD_FORMAT,
            )


def require_supported_load_format() -> None:
    """Refuse a load format whose loader cannot load factors.

    Such a loader would pass the factors to the model's own weight mapping, or load no weights.

    Raises:
        UserError: names the load formats that work.
    """
    chosen = get_current_vllm_config().load_config.load_format
    allowed = (LOAD_FORMAT, *REPLACED_FORMATS)
    if chosen not in allowed:
        raise UserError(
            f"--load-format {chosen} cannot load an svdserve checkpoint; allowed: "
            + ", ".join(allowed)
        )


def lowrank_layers(model: nn.Module) -> list[tuple[LinearBase, LowRankLinearMethod]]:
    """The factored layers of a vLLM model, each with its method, in the order of the model."""
    return [
        (module, method)
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), LowRankLinearMethod)
    ]


class SvdserveModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's default loader, extended by the loading of factored layers."""

    def __init__(self, load_config: LoadConfig) -> None:
        self._stored: StoredBytes | None = None
        self._ours = False  # whether a dense model gets svdserve's kernels
        self.explicit = load_config.load_format == LOAD_FORMAT
        if self.explicit:
            load_config = replace(load_config, load_format="auto")
        super().__init__(load_config)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Check the checkpoint, then create the model and load its weights.

        Raises:
            UserError: the checkpoint is invalid, or the configuration cannot serve it. Almost all
                faults are found before the model takes memory.
        """
        started = time.perf_counter()
        if model_config.quantization != QUANT_METHOD:
            return self._load_other(vllm_config, model_config, prefix)
        if prefix:  # vLLM gives a prefix to the layers of a draft model only
            raise UserError(
                f"{model_config.model}: a compressed model is not supported as the draft of "
                "speculative decoding; give its dense model as the draft"
            )
        _require_compiled_pipeline(vllm_config)
        self._checkpoint = self._open(model_config)
        self._adapters = vllm_config.lora_config is not None
        self._config, self._prefix = vllm_config, prefix
        _name_kernels(vllm_config)
        prefer_norms(vllm_config)
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        seconds, layers = time.perf_counter() - started, len(lowrank_layers(model))
        assert self._stored is not None
        read = self._checkpoint.files.bytes_read
        checks: tuple[LayerCheck, ...] = ()
        if wanted():
            joined = self._joined
            checks = tuple(verify_layers(model, vllm_config, self._checkpoint, joined, prefix))
        _reports[model] = LoadReport(seconds, layers, self._stored, read, checks)
        logger.info(
            "Loaded %d factored layers in %.2f s: %.1f MiB low rank, %.1f MiB dense "
            "(all dense: %.1f MiB)",
            layers,
            seconds,
            self._stored.lowrank / 2**20,
            self._stored.dense / 2**20,
            self._stored.dense_equivalent / 2**20,
        )
        return model

    def _load_other(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> nn.Module:
        """Load a model that svdserve did not compress as vLLM does, and keep a report of it.

        With ``--load-format svdserve`` it gets svdserve's kernels, if it is dense in bfloat16 and
        on CPU: nothing was measured for others, and quantized weights have products of their own.
        """
        started = time.perf_counter()
        unquantized = model_config.quantization is None and model_config.dtype == torch.bfloat16
        self._ours = self.explicit and unquantized and current_platform.is_cpu()
        if self._ours:
            self._adapters = vllm_config.lora_config is not None
            _name_kernels(vllm_config)
            prefer_norms(vllm_config)
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        if self._stored is not None:
            _reports[model] = LoadReport(time.perf_counter() - started, 0, self._stored)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load everything but the factored layers as vLLM does, then these layers one by one.

        Raises:
            UserError: names a weight that the checkpoint lacks, or a factored module that the
                model does not have.
        """
        if model_config.quantization != QUANT_METHOD:
            super().load_weights(model, model_config)
            # This comes before vLLM packs the layers, which empties their parameters. In some
            # quantized formats parameters have no size yet; such a model gets no report.
            with suppress(Exception):
                nbytes = sum(p.nbytes for p in model.parameters())
                self._stored = StoredBytes(dense=nbytes, dense_equivalent=nbytes)
            if self._ours:
                self._serve_whole(model)
            return
        layers = lowrank_layers(model)
        methods = [method for _, method in layers]
        _require_all_used(self._checkpoint, methods, model)
        # The model's mapping of stacked names must not see the names of factors: it replaces
        # substrings, and "v_proj" is a substring of "qkv_proj".
        ours = set[str]().union(*(method.checkpoint_names() for method in methods))
        weights = super().get_all_weights(model_config, model)
        expected = {name: p for name, p in model.named_parameters() if p.numel()}
        _mark_unloaded(model)
        stream = ((name, weight) for name, weight in weights if name not in ours)
        loaded = model.load_weights(stream)  # type: ignore[operator]
        _require_all_loaded(self._checkpoint, model, expected, loaded)
        rest = sum(p.nbytes for p in expected.values())
        stored = StoredBytes(dense=rest, dense_equivalent=rest)
        self._map_rows(model)
        self._serve_whole(model)
        self._joined = {} if self._adapters else join_layers(model, self._checkpoint)
        for layer, method in layers:
            stored += method.load(layer, self._checkpoint, **self._joined.get(layer, {}))
        self._stored = stored

    def _serve_whole(self, model: nn.Module) -> None:
        """Give the layers that are not factored svdserve's kernel, before vLLM packs them."""
        layers = use_kernel(model)
        joined = 0 if self._adapters else join_activations(model)
        if layers:
            logger.info(
                "Layers that are not factored: svdserve's kernel computes %d, %d of them with "
                "their activation",
                layers,
                joined,
            )

    def _map_rows(self, model: nn.Module) -> None:
        """Tell every factored layer which rows the model's own loading would give it.

        One layer of each kind is tried, because a model class treats the layers of all blocks the
        same way.

        Raises:
            UserError: the model does more to a weight than rearrange its rows.
        """
        twin = Twin(self._config, self._prefix)
        known: dict[str, list[Tensor] | None] = {}
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, LowRankLinearMethod):
                kind = kind_of(name, method)
                if kind not in known:
                    known[kind] = twin.row_map(name, method, self._checkpoint)
                method.row_map = known[kind]

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Refuse to reload an svdserve checkpoint in place; vLLM calls this for reloads only.

        Raises:
            UserError: the model is an svdserve checkpoint; packed factors cannot be overwritten.
        """
        if model_config.quantization == QUANT_METHOD:
            raise UserError("svdserve models cannot reload weights in place; restart the server")
        return super().get_all_weights(model_config, model)  # type: ignore[no-any-return]

    def _open(self, model_config: ModelConfig) -> Checkpoint:
        """Download the checkpoint if needed and check its files; reading it checks its values."""
        model, revision = model_config.model, model_config.revision
        directory, *_ = self._prepare_weights(model, None, revision, False, None)
        if not (Path(directory) / "config.json").exists():
            # With --download-dir vLLM keeps the weights apart from the configuration.
            from huggingface_hub import hf_hub_download

            cache = self.load_config.download_dir
            hf_hub_download(model, "config.json", revision=revision, cache_dir=cache)
        return open_checkpoint(Path(directory))


def _require_compiled_pipeline(vllm_config: VllmConfig) -> None:
    """Refuse pipeline stages in eager mode on CPU, which crash vLLM at the first request.

    Dense models crash as well: the CPU engine of vLLM 0.32 allocates the buffers that a later
    pipeline stage receives only while it warms up compiled code
    (CPUModelRunner.warming_up_model in vllm/v1/worker/cpu_model_runner.py).
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    eager = vllm_config.compilation_config.mode == CompilationMode.NONE
    if current_platform.is_cpu() and eager and stages > 1:
        raise UserError(
            f"--enforce-eager with {stages} pipeline stages does not run on the CPU engine of "
            f"vLLM {vllm.__version__}; leave out --enforce-eager, or use --tensor-parallel-size"
        )


def _name_kernels(vllm_config: VllmConfig) -> None:
    """Add what the compiled graphs of factored layers depend on to the key of vLLM's graph cache.

    The worker does this before it builds the model, because the worker's environment and processor
    choose the kernels.

    Raises:
        UserError: ``additional_config`` is no dict, so nothing can be added to it.
    """
    config = vllm_config.additional_config
    if not isinstance(config, dict):
        raise UserError(
            f"additional_config is {type(config).__name__}; give a dict, because svdserve adds to "
            "it what its compiled graphs depend on"
        )
    device, dtype = current_platform.device_type, vllm_config.model_config.dtype
    facts = {"version": __version__, **what_decides(device, dtype)}
    vllm_config.additional_config = config | {f"{QUANT_METHOD}_graphs": facts}


def _require_all_used(
    checkpoint: Checkpoint, methods: list[LowRankLinearMethod], model: nn.Module
) -> None:
    used = {name for method in methods for part in method.parts for name in part.names}
    for name in (*checkpoint.config.modules, *checkpoint.config.encoded_linears):
        if name not in used and not is_pp_missing_parameter(name, model):
            spec = checkpoint.config.modules.get(name)
            kind = checkpoint.config.linears[name].codec if spec is None else "factored"
            remedy = "serve the dense model, or load this one with transformers"
            if spec is not None and len(spec.members) > 1:
                remedy = "compress the model with --grouping separate"
            raise UserError(
                f"{checkpoint.directory}: module {name} is {kind}, but {type(model).__name__} of "
                f"vLLM has no such layer; {remedy}"
            )


def _mark_unloaded(model: nn.Module) -> None:
    """Fill the parameters of vLLM's linear layers with NaN, so that missing weights are found.

    vLLM reports a merged parameter as loaded as soon as one member has arrived, so a missing
    k_proj would stay uninitialised memory. NaN that remain after loading show it.
    """
    for module in model.modules():
        if isinstance(module, LinearBase):
            for parameter in module.parameters(recurse=False):
                parameter.data.fill_(torch.nan)


def _require_all_loaded(
    checkpoint: Checkpoint,
    model: nn.Module,
    expected: dict[str, nn.Parameter],
    loaded: set[str] | None,
) -> None:
    linear = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
        for key, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in expected.items():
        if name in linear:
            missing = bool(parameter.isnan().any())
        else:
            missing = loaded is not None and name not in loaded
        if missing:
            raise UserError(
                f"{checkpoint.directory}: the weights of {name} are missing, incomplete or NaN"
            )
