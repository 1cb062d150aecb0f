"""Merge adapters in peft's format into their model: `python -m tools.merge ADAPTER OUT`.

ADAPTER is what a run with --lora_rank left (RUN/adapter), or one of peft's for a model that
model.py reads. OUT can be read by every stage, by transformers and by vLLM.
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
    for name, layer in lora.layers(policy).items():
        name = f"base_model.model.{model.clean_name(name)}"
        for kind in ("lora_A", "lora_B"):
            if (whole := state.pop(f"{name}.{kind}.weight", None)) is not None:
                lora.fill(getattr(layer, kind), whole)
    if state:
        raise ValueError(f"{folder}: no layer of the model takes {', '.join(list(state)[:3])}")


def main(folder: Path, out: Path):
    config = json.loads((folder / "adapter_config.json").read_text())
    if other := [key for key in ("use_dora", "use_rslora", "rank_pattern") if config.get(key)]:
        raise ValueError(f"{folder}: {', '.join(other)} in adapter_config.json is not known here")
    policy, processor = model.load(config["base_model_name_or_path"])
    lora.add(policy, config["r"], config["lora_alpha"], vision=True)
    lora.reset(policy)
    load(folder, policy)
    policy.hf.save_pretrained(out, state_dict=dict(policy.full_weights()))
    processor.save(out)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with run.for_people():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
