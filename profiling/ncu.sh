#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
#
# Profiles one call with Nsight Compute, prints its main figures and where its time goes, and keeps the report.
#
#   profiling/ncu.sh --provider decode|cublas|... [--shape v4-pro] [--tokens 16] [--cold]
#
# The arguments are profile_call.py's; --cold empties the caches before the kernel, otherwise it finds its weight in L2.
# Environment: PYTHON (python3), NCU (ncu), OUT, the folder for results (out/ beside this script, which git ignores):
#   NAME.ncu-rep  for Nsight Compute's window, with sources   NAME.txt     its tables as text
#   NAME.sass.csv  samples of each instruction                NAME.sass    the listing with them, of own kernels
set -euo pipefail

# shellcheck source=profiling/session.sh
. "$(dirname "${BASH_SOURCE[0]}")/session.sh"

fail() {
  echo "ncu.sh: $*" >&2
  exit 1
}

tool=${NCU:-$(command -v ncu || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ncu")}
command -v "$tool" >/dev/null || fail "Nsight Compute is missing: no ncu on PATH, nor $tool; NCU may name it"
report=$OUT/$name.ncu-rep
rm -f "$report"
case $name in *-cold*) cache=all ;; *) cache=none ;; esac

# The smallest sampling interval, because a kernel takes microseconds.
"$tool" --clock-control none --cache-control "$cache" --profile-from-start off --nvtx --set full \
  --warp-sampling-interval 0 --import-source yes --source-folders "$here/../kernels" --force-overwrite \
  --export "$report" "$PYTHON" "$here/profile_call.py" --calls 1 "$@"
[[ -s $report ]] || fail "no report; with ERR_NVGPUCTRPERM above, counters are for administrators: run as root"

"$tool" --import "$report" --page details >"$OUT/$name.txt"
echo
figures='Duration|SM Frequency|DRAM Throughput|L2 Cache Throughput|Memory Throughput|L2 Hit Rate|Registers Per Thread'
figures+='|Dynamic Shared Memory Per Block|Achieved Occupancy|Warp Cycles Per Issued Instruction|No Eligible'
grep -E "Context [0-9]+, Stream|^ *($figures) " "$OUT/$name.txt" || true

"$tool" --import "$report" --page source --csv --print-source sass >"$OUT/$name.sass.csv"
if [[ -n $sass ]]; then
  echo
  # shellcheck disable=SC2086 # several words
  "$PYTHON" "$here/dump_sass.py" $sass --samples "$OUT/$name.sass.csv" --out "$OUT/$name.sass"
fi
echo
echo "$report: open it in Nsight Compute; $OUT/$name.txt has all tables"
