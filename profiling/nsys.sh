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

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
for argument in "$@"; do
  if [[ $argument == -h || $argument == --help ]]; then
    sed -n '/^#!/d; /^# SPDX/d; /^#/!q; s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
  fi
done

names=$("$PYTHON" "$here/profile_call.py" --name "$@")
read -r name <<<"$names"
tool=${NSYS:-$(command -v nsys || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nsys")}
if [[ -z ${OUT:-} ]]; then
  OUT=$here/out
  mkdir -p "$OUT"
  echo '*' >"$OUT/.gitignore"
fi
mkdir -p "$OUT"

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
