#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
#
# Records a timeline of some calls with Nsight Systems or, where that is missing, with torch.profiler.
#
#   profiling/nsys.sh --provider decode|cublas|... [--shape v4-pro] [--tokens 16] [--cold] [--graph]
#
# The arguments are profile_call.py's. Environment: PYTHON (python3), NSYS (nsys), OUT, the folder for results (out/
# beside this script, which git ignores): NAME.nsys-rep for Nsight Systems' window, or NAME.trace.json, a Chrome trace
# for ui.perfetto.dev.
set -euo pipefail

# shellcheck source=profiling/session.sh
. "$(dirname "${BASH_SOURCE[0]}")/session.sh"
tool=${NSYS:-$(command -v nsys || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nsys")}

if ! command -v "$tool" >/dev/null; then
  echo "nsys.sh: Nsight Systems is missing: no nsys on PATH, nor $tool; torch.profiler takes its place" >&2
  "$PYTHON" "$here/profile_call.py" "$@" --trace "$OUT/$name.trace.json"
  echo "$OUT/$name.trace.json: open it in ui.perfetto.dev"
  exit 0
fi
report=$OUT/$name.nsys-rep
"$tool" profile --trace cuda,nvtx --sample none --cpuctxsw none --cuda-graph-trace node \
  --capture-range cudaProfilerApi --capture-range-end stop --force-overwrite true --output "$report" \
  "$PYTHON" "$here/profile_call.py" "$@"
"$tool" stats --force-export true --report nvtx_kern_sum --report cuda_gpu_kern_sum "$report"
echo "$report: open it in Nsight Systems"
