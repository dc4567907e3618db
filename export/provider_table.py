"""The execution providers as rows: all that sets one apart from the others. Needs neither torch nor ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diffprune_plugin.errors import BadInput, nearest

SWITCH = {"0": 0, "false": 0, "1": 1, "true": 1}  # what a user may say for no and yes


@dataclass(frozen=True)
class Provider:
    """An execution provider as a row: all that sets it apart from the others.

    names: ONNX Runtime's for it; a second one is the same provider as a plug-in. memory: that it computes in.
    install: what brings it. options: what it is opened with; in_fp32: what else for a file without halves, unless it is
        among them, in_halves: for one with; threads_option: the one for its own threads; takes: those that a user may
        set. switches: those that are on or off, words: what it reads for off and for on. graph_option, nhwc_option:
        those that replay a captured graph, and that lay channels last. tuned: those that are worth trying, with their
        values. caches: folders of what is built for one file.
    environment: variables set before it is loaded. preload: modules that bring libraries it needs.
    dtypes: what it computes in their own type.
    rounds: of a benchmark, at least; warm_up: runs before them, at least. kernels: file with its table of kernels.
    fallback: whether every build has it, and gives it what another provider leaves.
    """

    names: tuple[str, ...]
    memory: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    in_fp32: Mapping[str, str] = field(default_factory=dict)
    in_halves: Mapping[str, str] = field(default_factory=dict)
    threads_option: str = ""
    takes: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    words: tuple[str, str] = ("0", "1")
    graph_option: str = ""
    nhwc_option: str = ""
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32",)
    rounds: int = 30
    warm_up: int = 3
    kernels: str = ""
    fallback: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_gpu(self) -> bool:
        return self.memory != "cpu"

    @property
    def replays(self) -> bool:
        """Whether its runs replay a captured graph, on the buffers that it was captured with."""
        return self.is_on(self.graph_option)

    def is_on(self, switch: str) -> bool:
        return self.options.get(switch) == self.words[1]

    def with_options(self, given: Mapping[str, str]) -> Provider:
        """With options of a user's; raises BadInput for one that it does not take, or a switch that is neither."""
        for key, value in given.items():
            if key not in self.takes:
                known = f"it takes {', '.join(self.takes)}" if self.takes else "it takes none"
                raise BadInput(f"--provider-option {key}={value}{nearest(key, self.takes)}: {self.name}: {known}")
            if key in self.switches and value.lower() not in SWITCH:
                raise BadInput(f"--provider-option {key}={value}: {self.name}: neither off (0) nor on (1)")
        read = {k: self.words[SWITCH[v.lower()]] if k in self.switches else v for k, v in given.items()}
        row = replace(self, options={**self.options, **read})
        # The variable would take TF32 back on both sides of the comparison.
        return replace(row, environment={}) if row.is_on(TF32) else row


TF32, NO_TF32 = "use_tf32", "NVIDIA_TF32_OVERRIDE"
GPU_INSTALL = (
    "on a machine with an NVIDIA GPU and its driver: pip uninstall onnxruntime; "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
)
# TF32 off, so that a GPU's fp32 is fp32 in the check and in the timing alike; TensorRT has no option for it and reads
# the variable once, when it is loaded. CUDA's option, switched off, takes the tensor cores from convolutions in halves
# too (ONNX Runtime 1.31, core/providers/cuda/nn/conv.cc), so that it is said of fp32 files alone.
CUDA = Provider(
    ("CUDAExecutionProvider", "CudaPluginExecutionProvider"),
    "cuda",
    GPU_INSTALL,
    options={"device_id": "0"},
    in_fp32={TF32: "0"},
    takes=(
        "arena_extend_strategy",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "cudnn_conv1d_pad_to_nc1d",
        "enable_cuda_graph",
        "fuse_conv_bias",
        "gpu_mem_limit",
        "prefer_nhwc",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_tuning_enable",
        TF32,
    ),
    switches=(
        "cudnn_conv_use_max_workspace",
        "cudnn_conv1d_pad_to_nc1d",
        "enable_cuda_graph",
        "fuse_conv_bias",
        "prefer_nhwc",
        "tunable_op_enable",
        "tunable_op_tuning_enable",
        TF32,
    ),
    graph_option="enable_cuda_graph",
    nhwc_option="prefer_nhwc",
    tuned={
        "prefer_nhwc": ("0", "1"),
        "enable_cuda_graph": ("0", "1"),
        "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC"),
    },
    environment={NO_TF32: "0"},
    dtypes=("fp32", "fp16"),
    rounds=100,
    warm_up=10,
    kernels="cuda_kernels.json",
)
TENSORRT = replace(
    CUDA,
    names=("TensorrtExecutionProvider",),
    install=GPU_INSTALL + " 'tensorrt-cu13<11'",  # libnvinfer.so.10 is what ONNX Runtime 1.31 loads
    options={},
    in_fp32={},
    in_halves={"trt_fp16_enable": "True"},  # without it the builder refuses layers of halves (NVIDIA/TensorRT 3277)
    takes=(
        "trt_auxiliary_streams",
        "trt_builder_optimization_level",
        "trt_cuda_graph_enable",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_max_workspace_size",
        "trt_min_subgraph_size",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    ),
    switches=("trt_cuda_graph_enable", "trt_engine_cache_enable", "trt_timing_cache_enable"),
    words=("False", "True"),  # its binding refuses 0 and 1
    graph_option="trt_cuda_graph_enable",
    nhwc_option="",
    tuned={"trt_cuda_graph_enable": ("0", "1"), "trt_builder_optimization_level": ("3", "5")},
    caches=("trt_engine_cache_path",),  # timings of kernels are no file's own
    preload=("tensorrt",),
    kernels="",
)
CPU = Provider(("CPUExecutionProvider",), "cpu", "pip install onnxruntime", fallback=True)
OPENVINO = replace(
    CPU,
    names=("OpenVINOExecutionProvider",),
    install="pip uninstall onnxruntime; pip install onnxruntime-openvino openvino",
    options={"device_type": "CPU"},
    threads_option="num_of_threads",
    tuned={"num_streams": ("1", "2"), "disable_dynamic_shapes": ("false", "true")},
    takes=(
        "cache_dir",
        "disable_dynamic_shapes",
        "enable_opencl_throttling",
        "model_priority",
        "num_streams",
        "precision",
    ),
    switches=("disable_dynamic_shapes", "enable_opencl_throttling"),
    words=("false", "true"),
    fallback=False,
)
PROVIDERS = {"tensorrt": TENSORRT, "cuda": CUDA, "openvino": OPENVINO, "cpu": CPU}  # best first
