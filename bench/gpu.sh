#!/bin/sh
# Every figure of a GPU in doc/speed.md, in less than 15 minutes:
#
#     bench/gpu.sh                                 # on the GPU of this machine
#     LLAMA2C=FOLDER bench/gpu.sh                  # with llama2.c's train.py beside pretraining
#     bench/gpu.sh --quick                         # tiny shapes, in a minute
#
# Where there is no GPU, --quick runs on the simulated device of the tests: it shows that every
# section runs, and its figures mean nothing. A section that fails or takes longer than LIMIT
# seconds (90) leaves a line in the table, and the others run. PYTHON names the interpreter.

[ "$LLAMA2C" ] && LLAMA2C=$(cd "$LLAMA2C" && pwd) && export LLAMA2C
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${LIMIT:-90}
QUICK=
run() { timeout "$LIMIT" "$PYTHON" "$@"; }
if [ "$1" = --quick ]; then
    QUICK=--quick
elif [ $# -gt 0 ]; then
    echo "usage: [LLAMA2C=FOLDER] bench/gpu.sh [--quick]" >&2
    exit 2
fi

if "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)'
elif [ "$QUICK" ]; then
    echo "no GPU: the simulated device, whose figures mean nothing"
    run() { timeout "$LIMIT" "$PYTHON" tests/simulated_cuda.py "$@" --compile=False; }
    LLAMA2C=  # another project's train.py does not run on the simulated device
    export LLAMA2C
else
    echo "error: there is no GPU here; bench/gpu.sh --quick tries the script without one" >&2
    exit 1
fi

failed=0
section() {
    run bench/gpu.py "$@" $QUICK 2>build/gpu.log && return
    failed=$((failed + 1))
    echo "$*: failed: $(grep -v '^ ' build/gpu.log | tail -1)"
}

mkdir -p build
for shape in 260K 15M 110M; do section pretraining --shape=$shape; done
section ppo
for shape in 260K 15M 110M 1.1B; do section rollouts --shape=$shape; done
section lora
if [ -z "$QUICK" ]; then
    timeout 180 "$PYTHON" -m pytest -q -m gpu tests || failed=$((failed + 1))
fi
[ $failed = 0 ] || echo "$failed sections failed; the last output is in build/gpu.log"
exit $((failed > 0))
