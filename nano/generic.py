"""Placeholder until the generic path is merged."""


def packed_refusal(config) -> str:
    known = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    return "" if config.model_type in known else f"{config.model_type} cannot be packed"
