#!/usr/bin/env bash
# Tries a variant of the method on the toy and compares it with the code as it is, on the same problems:
#   bash ablations/try.sh NAME [--seeds 3] [more flags of grpo.py]
# The patch ablations/NAME.patch is applied in a copy, runs/ablations/NAME/code. Flags that the patch
# asks for ("Flags:" in its head) are given to both; "Baseline:" replaces them for the code as it is.
# What was trained before is reused; python -m tools.viewer and tools.plot take the folders.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?"say which: $(cd ablations && ls *.patch | sed 's/.patch//' | tr '\n' ' ')"}
shift
seeds=1
if [ "${1:-}" = --seeds ]; then seeds=$2; shift 2; fi
patch=$PWD/ablations/$name.patch out=runs/ablations/$name
[ -f "$patch" ] || { echo "there is no $patch" >&2; exit 2; }
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python
flags=$(sed -n 's/^Flags: //p' "$patch") plain=$(sed -n 's/^Baseline: //p' "$patch")
plain=${plain:-$flags}
words=$(echo "$plain $*" | tr -cs '[:alnum:]._' '-')
base=runs/ablations/baseline$words
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# The copy is a repository of its own, so that git applies the patch there.
rm -rf "$out/code" && mkdir -p "$out/code"
cp -r ./*.py nano answers benchmarks toy tools "$out/code"
ln -s "$PWD/runs" "$out/code/runs"
git -C "$out/code" init -q && git -C "$out/code" apply "$patch"

run() {  # folder of the code, folder of the run, seed, flags
    local code=$1 folder=$2 seed=$3 asked
    shift 3
    asked=(--data toy:test-problems --limit "${PROBLEMS:-1000}" --temperature 1 --top_p 1 --max_len 384)
    (cd "$code" && "$python" grpo.py --recipe toy --seed "$seed" --out "$folder" "$@" &&
        "$python" eval.py --model "$folder/final" "${asked[@]}" --out "$folder/eval")
}
a="" b=""
for seed in $(seq 0 $((seeds - 1))); do
    # shellcheck disable=SC2086  (flags are words)
    run . "$base/$seed" "$seed" $plain "$@"
    run "$out/code" "$out/$seed" "$seed" $flags "$@"
    a=$a,$base/$seed/eval b=$b,$out/$seed/eval
done
echo "A: the code as it is, $base; B: $name"
"$python" -m tools.compare "${a#,}" "${b#,}" | tee "$out/compare.md"
