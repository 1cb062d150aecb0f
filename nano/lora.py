"""LoRA (arXiv 2106.09685): W x + alpha / rank * B A x, where only A and B are trained. On disk they
have peft's format. peft itself would rename each `weight`, and all that reads, shards and writes a
model would have to know it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear


class LoRALinear(nn.Linear):
    """A linear layer with lora_A (rank, in) and lora_B (out, rank); both have float32 masters."""

    enabled = True  # of all layers at once

    def forward(self, x):
        out = linear(x, self.weight, self.bias)
        if self.enabled:
            out = out + self.scale * linear(linear(x, self.lora_A), self.lora_B)
        return out


def layers(policy) -> dict[str, LoRALinear]:
    return {n: m for n, m in policy.hf.named_modules() if isinstance(m, LoRALinear)}


def add(policy, rank: int, alpha: float, vision: bool = False):
    """Freezes all, and gives adapters to the linear layers of the text model, and of the vision
    tower with `vision`. `reset` or `load` fills them."""
    policy.requires_grad_(False)
    parts = [policy.hf.get_decoder(), policy.visual] if vision else [policy.hf.get_decoder()]
    for layer in [m for part in parts for m in part.modules() if type(m) is nn.Linear]:
        layer.__class__, layer.scale = LoRALinear, alpha / rank
        how = dict(device=layer.weight.device, dtype=torch.float32)
        layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **how))
        layer.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, **how))


def fill(p: torch.Tensor, whole: torch.Tensor):
    """Copies a whole tensor into a parameter, of which this rank may keep a shard."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
        p = p.to_local()
    p.detach().copy_(whole)


def reset(policy):
    """A is drawn as peft draws it, and B is zero: the policy begins exactly as the base model."""
    for number, layer in enumerate(layers(policy).values()):
        whole, draws = torch.empty(layer.lora_A.shape), torch.Generator().manual_seed(number)
        fill(layer.lora_A, nn.init.kaiming_uniform_(whole, a=5**0.5, generator=draws))
        fill(layer.lora_B, torch.zeros(layer.lora_B.shape))


def without(policy):
    """The policy with its adapters off, as a function: GRPO's reference needs no second model."""

    def base(*args):
        LoRALinear.enabled = False
        try:
            return policy(*args)
        finally:
            LoRALinear.enabled = True

    return base


def save(folder: Path, policy, adapters: dict[str, torch.Tensor]):
    """Writes whole adapters, named as the parameters of policy.hf, in peft's format."""
    some, names = next(iter(layers(policy).values())), {n.rpartition(".")[0] for n in adapters}
    config = dict(peft_type="LORA", r=len(some.lora_A), lora_alpha=some.scale * len(some.lora_A))
    config |= dict(base_model_name_or_path=policy.hf.name_or_path, target_modules=sorted(names))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {f"base_model.model.{name}.weight": x.contiguous() for name, x in adapters.items()}
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
