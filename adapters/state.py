"""The state that a model is in: as its class made it, or masked, or hooked by NNCF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffprune_plugin.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

HOOKS = "__nncf_hooks"  # where NNCF keeps its hooks; a child module of the model
KEPT = "kept"  # the buffer that layers of a masked model carry: their kept channels
# What to do about attention processors that no adapter covers, by the beginning of their names; the first that fits.
REMEDIES = (
    ("Fused", "load the model again without fuse_qkv_projections() (unfusing keeps the fused layers)"),
    ("IPAdapter", "call pipeline.unload_ip_adapter() first"),
    ("CustomDiffusion", "load the model again without the custom diffusion weights"),
    ("", "call unet.set_default_attn_processor() first"),
)

# Where torch.nn.utils keeps what a weight is computed from.
COMPUTED = ("parametrizations", "weight_orig", "bias_orig", "weight_g")
PARALLEL = ("DataParallel", "DistributedDataParallel")
QUANTIZERS = ("bitsandbytes", "nunchaku", "torchao", "optimum")  # packages whose layers or tensors hold no weights
ORDER = "load it unquantized, fuse what LoRA is to stay, prune, compensate and fine-tune it, and quantize last"


def check_unquantized(model: nn.Module) -> None:
    """Raises BadInput, by layer, for a model that bitsandbytes, torchao, quanto, GGUF or Nunchaku quantized."""
    for name, module in model.named_modules():
        kinds = [type(module), *(type(p.data) for p in module.parameters(recurse=False))]
        for kind in kinds:
            package = "gguf" if ".gguf" in kind.__module__ else kind.__module__.partition(".")[0]
            if package in (*QUANTIZERS, "gguf"):
                raise BadInput(f"{name}: quantized ({kind.__name__} of {package}), its channels cannot be cut: {ORDER}")


def check_loaded(model: nn.Module) -> None:
    """Raises BadInput for a model with parameters on torch's meta device, which hold no numbers."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise not_loaded(name)


def check_plain(model: nn.Module) -> None:
    """Raises BadInput for layers that are compiled or wrapped, or whose weights are computed or shared: the
    trace would not see them, or a directory not hold them."""
    for name, module in model.named_modules():
        here = name or type(model).__name__
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise BadInput(f"{here} is compiled: load the model without compile(), and compile the pruned one")
        if type(module).__name__ in PARALLEL:
            raise BadInput(f"{here} is a {type(module).__name__}: give the model without it, and wrap the pruned one")
        if computed := [key for key in COMPUTED if key in module._parameters or key in module._modules]:
            raise BadInput(
                f"{here}: its weight is computed ({computed[0]}) by torch.nn.utils.prune, a norm or parametrize: make "
                "it permanent first (prune.remove, remove_parametrizations ...)"
            )
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_inference():
            raise BadInput(
                f"{name} was made in torch.inference_mode(), where nothing is traced: load the model outside of it"
            )
        if first.setdefault(id(parameter), name) != name:
            raise BadInput(f"{name} is {first[id(parameter)]} too: give each a tensor of its own, which loads as one")


def check_own_forwards(model: nn.Module) -> None:
    """Raises BadInput for a module whose forward another library replaced: a copy's would go on with the original."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module and not hasattr(module, HOOKS):
            here = name or type(model).__name__
            raise BadInput(f"{here}: its forward was replaced; take off what did that, and put it on the pruned model")


def check_own_layers(model: nn.Module) -> None:
    """Raises BadInput for layers that a class does not make of its config: LoRA's, fused projections, processors with
    weights. Who loads the model again does not know of them."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            adapters = ", ".join(getattr(model, "peft_config", {})) or type(module).__name__
            raise BadInput(
                f"{name} carries a loaded LoRA or other adapter ({adapters}); "
                "call pipeline.unload_lora_weights() first, and before that pipeline.fuse_lora() to keep its effect"
            )
        processor: Any = getattr(module, "processor", None)
        if getattr(module, "fused_projections", False):
            raise BadInput(f"{name} has fused projections; {remedy_of('Fused')}")
        if hasattr(processor, "parameters") and any(True for _ in processor.parameters()):
            kind = type(processor).__name__
            raise BadInput(f"{name} uses {kind}, which has weights of its own; {remedy_of(kind)}")


def remedy_of(processor: str) -> str:
    return next(remedy for start, remedy in REMEDIES if processor.startswith(start))


def check_unhooked(model: nn.Module) -> None:
    """Raises BadInput for a model that Accelerate or diffusers moves, casts or skips parts of: a copy would not run."""
    for name, module in model.named_modules():
        here = name or type(model).__name__
        if hasattr(module, "_hf_hook"):
            raise BadInput(
                f"{here} carries Accelerate's {type(module._hf_hook).__name__}, of offloading or a device_map: call "
                "pipeline.remove_all_hooks() first, and offload again afterwards"
            )
        if hooks := getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            raise BadInput(
                f"{here} carries diffusers' {', '.join(hooks)}: load the model without it (enable_layerwise_casting, "
                "enable_group_offload, enable_cache), and enable it again afterwards"
            )


def not_loaded(name: str) -> BadInput:
    return BadInput(
        f"{name} is on torch's meta device, without its numbers: load the weights first (of an offloaded pipeline: "
        "pipeline.remove_all_hooks())"
    )


def check_stock(model: nn.Module) -> None:
    """Raises BadInput for a model that is masked, or that was and still has masked layers."""
    check_hooks(model)
    if any(KEPT in layer._buffers for layer in model.modules()):
        raise BadInput("the UNet was masked and then folded; call remove_(unet, plan) first")


def check_hooks(model: nn.Module) -> None:
    """Raises BadInput for a model that carries NNCF's hooks."""
    storage = model._modules.get(HOOKS)
    if storage is not None and any(True for kind in storage.children() for _ in kind.children()):
        raise BadInput(
            "the UNet carries NNCF's hooks: if they are masks, call fold_(unet) first; if they are quantizers, start "
            "from the model before nncf.quantize"
        )
