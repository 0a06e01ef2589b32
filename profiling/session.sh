# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
#
# What ncu.sh and nsys.sh, which source this, have in common: -h prints their heading; else $here is this folder, $PYTHON
# the interpreter, $OUT the folder for results, $name what its files are called, and $sass dump_sass.py's options for
# the call's own kernel, or nothing.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python3}
for argument in "$@"; do
  if [[ $argument == -h || $argument == --help ]]; then
    sed -n '/^#!/d; /^# SPDX/d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit 0
  fi
done
names=$("$PYTHON" "$here/profile_call.py" --name "$@")
{ read -r name; read -r sass || true; } <<<"$names"
if [[ -z ${OUT:-} ]]; then
  OUT=$here/out
  mkdir -p "$OUT"
  echo '*' >"$OUT/.gitignore"
fi
mkdir -p "$OUT"
