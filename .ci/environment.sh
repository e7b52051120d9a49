#!/usr/bin/env bash
# Makes .venv/ in this clone, ready to run and editable. Says nothing and does nothing where it is already right.
#
# The locked dependencies weigh gigabytes and are the same for every clone, so they live once per lock file in a base
# environment outside the clone; .venv is a light environment that sees the base's packages and adds this clone.
#
#   PYTHON           interpreter to build with         (python3.11, else python3)
#   QZO_VENV_CACHE   folder that holds the bases       (~/.cache/qzo_diffusion)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "install: $*" >&2; }
sha256() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()[:16])' "$1"; }
site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
packages_run() { [ -f "$1/.complete" ] && "$1/bin/python" -c '' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "no Python of at least 3.11 found (tried: ${PYTHON:-python3.11 python3}); install one or set PYTHON=..."
  return 1
}

# One install at a time for a base. A flock goes with its process; the folder that stands in for it elsewhere may stay behind.
lock() {
  mkdir -p "$(dirname "$1")"
  if command -v flock >/dev/null; then
    exec 9>"$1"
    flock 9
  else
    lock_folder=$1.d
    until mkdir "$lock_folder" 2>/dev/null; do
      say "waiting for another install (if none is running, remove $lock_folder)"
      sleep 5
    done
    trap 'rmdir "$lock_folder"' EXIT
  fi
}

make_base() {
  say "locked dependencies -> $base (once per lock file, some minutes)"
  rm -rf "$base"
  "$python" -m venv "$base"
  "$base/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock
  "$base/bin/python" -m pip check
  touch "$base/.complete"
}

# The commands that the documents name and that packages of the base bring, run by this environment's Python.
commands_of_packages() {
  .venv/bin/python - <<'EOF'
import sys
from importlib.metadata import entry_points
from pathlib import Path

for name in ("hf", "tensorboard", "torchrun", "accelerate"):
    (command,) = {(one.module, one.attr) for one in entry_points(group="console_scripts", name=name)}
    file = Path(sys.executable).with_name(name)
    file.write_text("#!{}\nimport sys\n\nfrom {} import {}\n\nsys.exit({}())\n".format(sys.executable, *command, command[1]))
    file.chmod(0o755)
EOF
}

make_venv() {
  rm -rf .venv
  "$base/bin/python" -m venv --without-pip .venv
  site_packages "$base/bin/python" >"$(site_packages .venv/bin/python)/base.pth"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  commands_of_packages
  echo "$stamp" >.venv/.complete
}

python=$(find_python)
tag=$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
base=${QZO_VENV_CACHE:-$HOME/.cache/qzo_diffusion}/venv-$(sha256 requirements.lock)-$tag
stamp="$base $PWD $(sha256 pyproject.toml)"
venv_is_right() { packages_run "$base" && packages_run .venv && [ "$(cat .venv/.complete)" = "$stamp" ]; }

if ! venv_is_right; then
  lock "$base.lock"
  packages_run "$base" || make_base
  venv_is_right || make_venv
  say "done: .venv"
fi
