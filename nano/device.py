"""One place that says which path a computation takes: a GPU's or a CPU's.

A GPU computes in bf16 over float32 master weights, with flash attention. A CPU computes in
float32. Tests force the GPU's path on a CPU to see what they could not see there.
"""

import torch

forced = False  # tests only


def gpu_path(device: torch.device | str) -> bool:
    return forced or torch.device(device).type == "cuda"


def compute_dtype(device: torch.device | str) -> torch.dtype:
    return torch.bfloat16 if gpu_path(device) else torch.float32


def micro_tokens(config, device: torch.device | str) -> int:
    """Tokens of a packed micro-batch: the flag's; 0 means what is fastest and leanest here."""
    return config.micro_tokens or (20480 if gpu_path(device) else 2560)
