#!/usr/bin/env bash
# Vision-R1 in miniature on a laptop: makes a virtual environment, installs, and runs the toy recipe
# of all four stages. It needs Python 3.10 or newer with venv and pip, and nothing else.
#   bash speedrun.sh                 finished stages are reused
#   bash speedrun.sh --fresh         starts the stages over
#   bash speedrun.sh --install-only  makes only the environment (tests/run.sh uses it)
# PYTHON=python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"

fresh=0 install_only=0
for arg in "$@"; do
    case $arg in
        --fresh) fresh=1 ;;
        --install-only) install_only=1 ;;
        *) echo "speedrun.sh: unknown argument $arg (known: --fresh, --install-only)" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "no $python here: install Python 3.10 or newer, or say PYTHON=/path/to/python" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$("$python" --version) is too old: Python 3.10 or newer is needed; PYTHON=python3.12 bash $0 chooses another" >&2; exit 1; }

stamp=.venv/installed wanted=$(cat requirements.txt; "$python" --version)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "== installing requirements.txt into .venv"
    "$python" -m venv --clear .venv || { echo "could not make .venv: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || {
        echo "the installation failed: see pip's message above (network? disk space? a proxy in PIP_INDEX_URL?), then run this again" >&2; exit 1; }
    echo "$wanted" > $stamp
fi
[ $install_only = 1 ] && exit 0

[ $fresh = 1 ] && rm -rf runs/toy
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false  # the toy needs no hub
count='import os, torch; print(min(2, torch.cuda.device_count() or os.cpu_count() or 1))'
ranks=${RANKS:-$(.venv/bin/python -c "$count")}
torchrun() { OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node="$ranks" "$@"; }
began=$SECONDS
stage() { echo; echo "== $1 ($((SECONDS - began)) s so far)"; }

stage "1/4 cold start: modality bridging with scripted teachers behind a local server"
.venv/bin/python cold_start.py --recipe toy
[ -d runs/toy/sft/final ] || { stage "2/4 SFT -> CI"; torchrun sft.py --recipe toy; }
[ -d runs/toy/grpo/final ] || { stage "3/4 GRPO under PTST -> Vision-R1"; torchrun grpo.py --recipe toy; }
.venv/bin/python -m tools.plot runs/toy/grpo
stage "4/4 evaluation on held-out problems"
torchrun eval.py --recipe toy
echo; echo "all four stages: $((SECONDS - began)) s; curves: runs/toy/grpo/curves.png; table: runs/toy/eval/table.md"
