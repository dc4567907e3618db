#!/bin/sh
# What both images do, as a script of its own: sh docker/install.sh cpu|gpu, in a checkout.
set -eu
case "${1:-}" in
  cpu) python3 -m pip install --no-cache-dir -c constraints.txt ".[cpu,eval,text]" ;;
  # The set that is known to work together was tried on CPUs: torch and ONNX Runtime are free here.
  gpu) grep -vE '^(torch|onnxruntime)==' constraints.txt > gpu-constraints.txt
       python3 -m pip install --no-cache-dir -c gpu-constraints.txt ".[gpu,eval,text]" ;;
  *) echo "install.sh: ${1:-nothing}: give cpu or gpu" >&2; exit 2 ;;
esac
diffprune --help > /dev/null
