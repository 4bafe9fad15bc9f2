#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the tests with other versions than those that CI pins, in a new environment, which is removed afterwards:
#
#   bash tests/versions.sh transformers==5.24.0                 # all others as in the `dev` extra
#   bash tests/versions.sh torch==2.14.1 transformers==5.24.0
#   bash tests/versions.sh oldest                               # the oldest of all that pyproject.toml admits
#   bash tests/versions.sh oldest torch==2.13.0                 # ... but for torch
#   bash tests/versions.sh transformers==5.24.0 -- -n 2 tests/test_step.py
#
# What follows `--` goes to pytest. README.md beside this file has the results.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted=()
while [[ $# -gt 0 && $1 != -- ]]; do
    wanted+=("$1")
    shift
done
[[ ${#wanted[@]} -gt 0 ]] || { sed -n '3,11s/^# \?//p' "$0"; exit 2; }
mapfile -t packages < <(python3 - "${wanted[@]}" <<'PY'
import re
import sys
import tomllib

versions = {}
if "oldest" in sys.argv:
    with open("pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    needs = project["dependencies"] + project["optional-dependencies"]["peft"]
    floors = dict(found.groups() for found in (re.match(r"([\w-]+)>=([\d.]+)", need) for need in needs) if found)
    versions = {name: f"{version}.*" for name, version in floors.items()}  # the first releases may not go with each other
versions |= dict(package.split("==") for package in sys.argv[1:] if package != "oldest")
print("\n".join(f"{name}=={version}" for name, version in versions.items()))
PY
)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
. "$folder/bin/activate"
pip install --quiet -e ".[dev]"
pip install --quiet "${packages[@]}"
status=0
python -m pytest -p no:cacheprovider -q "${@:2}" || status=$?
python --version
pip freeze | grep -E '^(torch|torchvision|transformers|accelerate|datasets|evaluate|peft|kornia|timm|numpy|pillow)=='
exit "$status"
