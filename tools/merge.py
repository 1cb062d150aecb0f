"""Merge adapters in peft's format into their model: `python -m tools.merge ADAPTER OUT`.

ADAPTER is a folder of peft's, or RUN/adapter. Every stage, transformers and vLLM can read OUT.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

import model
from nano import lora, run


def load(folder: Path, policy):
    """Reads adapters into a policy that `lora.add` has prepared; a layer may have none."""
    state = load_file(folder / "adapter_model.safetensors")
    for name, p in policy.hf.named_parameters():
        if (
            whole := state.pop(f"base_model.model.{model.clean_name(name)}.weight", None)
        ) is not None:
            lora.fill(p, whole)
    if state:
        raise ValueError(f"{folder}: no layer of the model takes {', '.join(list(state)[:3])}")


def main(folder: Path, out: Path):
    config = json.loads((folder / "adapter_config.json").read_text())
    policy, processor = model.load(config["base_model_name_or_path"])
    lora.add(policy, config["r"], config["lora_alpha"], vision=True)
    lora.reset(policy)
    load(folder, policy)
    policy.hf.save_pretrained(out, state_dict=dict(policy.full_weights()))
    processor.save(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with run.for_people():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
