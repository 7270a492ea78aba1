#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, in stages that each fit into a few minutes:
#   1  (4 min)  versions, engines eager and with full graphs against vanilla, kernels
#   2  (5 min)  tuning, bandwidth, an 8 B pair against vanilla and vLLM's own ways, a step's profile
#   3  (6 min)  engines of all kinds, compute-sanitizer
#   scripts/gpu/check.sh 1                      results in build/gpu: summary.json, log.txt, ...
#   scripts/gpu/check.sh 1 2 3                  one after another
#   OUT=dir PYTHON=python3 scripts/gpu/check.sh 2
# Needs torch with CUDA, Triton, pytest and hypothesis; what lacks a package is skipped and says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "check.sh: no CUDA device: torch of $PYTHON sees none" >&2
    exit 2
fi

# The checkout as an installed package, whether or not (another copy of) it is installed.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/vllm_ouroboros"
ln -s "$PWD"/vllm_ouroboros/* "$site/vllm_ouroboros/"
ln -s "$PWD/kernels" "$site/vllm_ouroboros/kernels"
"$PYTHON" setup.py -q egg_info --egg-base "$site" 2>/dev/null \
    || echo "check.sh: no metadata of the package: vLLM will not load the plugin" >&2
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" scripts/gpu/gpu_steps.py --out "${OUT:-build/gpu}" "$@"
