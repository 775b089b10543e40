#!/usr/bin/env bash
# Make the environments of the other systems: .venv-horovod and .venv-torch. Each that can't be made says so in build.log in it.
set -eu -o pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$(command -v python3.11)}

# Runs a function once, with its output in the environment's own log; a failure of one does not keep the other from being made.
environment() {
  local folder=.venv-$1
  test -e "$folder/.ready" && return
  test -x "$folder/bin/python" || "$PYTHON" -m venv "$folder"
  (set -e; "$1" "$folder/bin") >"$folder/build.log" 2>&1 &  # in a condition, bash would not heed -e
  if wait $!; then touch "$folder/.ready"; echo "$folder is ready"
  else echo "$folder could not be made: $folder/build.log"; tail -3 "$folder/build.log"; fi
}

# Horovod is built here: with Gloo, without MPI, against TensorFlow 2.13.1, the last one that its 0.28.1 compiles with.
horovod() {
  "$1/pip" install -q 'setuptools<70' wheel 'cmake<4' packaging 'numpy<2' tensorflow-cpu==2.13.1 psutil cloudpickle pyyaml cffi
  PATH="$PWD/$1:$PATH" HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
    HOROVOD_WITHOUT_MXNET=1 HOROVOD_CPU_OPERATIONS=GLOO MAKEFLAGS="-j${JOBS:-2}" \
    "$1/pip" install -v --no-build-isolation --no-cache-dir horovod==0.28.1
  "$1/python" -c 'import horovod.tensorflow.elastic; import horovod.tensorflow as h; assert h.gloo_built()'
}

# From PyPI, torch comes with NVIDIA's libraries, gigabytes of them, unless a build for the CPU is at hand.
torch() {
  "$1/pip" install -q torch==2.13.0 numpy
  "$1/python" -c 'import torch.distributed.run, torch; assert torch.distributed.is_gloo_available()'
}

environment horovod
environment torch
