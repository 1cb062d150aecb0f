#!/usr/bin/env bash
# Tries a variant of the method on the toy and compares it with the code as it is, on the same problems:
#   bash ablations/try.sh NAME [--seeds 3] [more flags of grpo.py]
# The patch ablations/NAME.patch is applied in a copy, runs/ablations/NAME.../code. Flags that the patch
# asks for ("Flags:" in its head) are given to both; "Baseline:" replaces them for the code as it is.
# What was trained before is reused; python -m tools.viewer and tools.plot take the folders.
set -euo pipefail
cd "$(dirname "$0")/.."
known=$(cd ablations && ls ./*.patch | sed 's/..\(.*\).patch/\1/' | tr '\n' ' ')
[ $# -gt 0 ] || { echo "say which: bash ablations/try.sh NAME, with NAME one of: $known" >&2; exit 2; }
name=$1
shift
seeds=1
if [ "${1:-}" = --seeds ]; then seeds=$2; shift 2; fi
patch=$PWD/ablations/$name.patch
[ -f "$patch" ] || { echo "there is no $patch; there are: $known" >&2; exit 2; }
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python
flags=$(sed -n 's/^Flags: //p' "$patch") plain=$(sed -n 's/^Baseline: //p' "$patch")
plain=${plain:-$flags}
words() { echo "$*" | tr -cs '[:alnum:]._\n' '-' | sed 's/-*$//'; }  # Flags as a part of a name.
# Other flags are another experiment, so they have folders of their own.
out=runs/ablations/$(words "$name" "$@") base=runs/ablations/$(words baseline "$plain" "$@")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# A folder must not mix what two versions of a patch have trained.
if [ -f "$out/$name.patch" ] && ! cmp -s "$patch" "$out/$name.patch"; then
    echo "$patch has changed since $out was trained with it: move that folder away, then try again" >&2
    exit 2
fi
# The copy is a repository of its own, so that git applies the patch there.
rm -rf "$out/code" && mkdir -p "$out/code"
cp -r ./*.py nano answers benchmarks toy tools "$out/code"
ln -s "$PWD/runs" "$out/code/runs"
git -C "$out/code" init -q && git -C "$out/code" apply "$patch"
cp "$patch" "$out"

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
