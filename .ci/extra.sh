#!/usr/bin/env bash
# Makes .venv-EXTRA with the packages of one extra of pyproject.toml and nothing else: .ci/extra.sh docs
# Such tools stay out of requirements.lock, so that they never move what the tests run on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=$1
packages=$(.venv/bin/python - "$extra" <<'EOF'
import re
import sys
from importlib.metadata import requires

(extra,) = sys.argv[1:]
wanted = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
found = [line.partition(";")[0].strip() for line in requires("qzo-diffusion") or [] if wanted.search(line)]
sys.exit(f"no extra {extra!r} in pyproject.toml") if not found else print("\n".join(found))
EOF
)
place=.venv-$extra
if [ "$(cat "$place/.complete" 2>/dev/null)" != "$packages" ]; then
  rm -rf "$place"
  .venv/bin/python -m venv "$place"
  mapfile -t list <<<"$packages"
  "$place/bin/python" -m pip install --quiet --disable-pip-version-check "${list[@]}"
  echo "$packages" >"$place/.complete"
fi
