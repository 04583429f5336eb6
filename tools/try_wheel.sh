#!/usr/bin/env bash
# Builds the wheel, installs it into the active environment, and uses it outside of the source tree:
# tools/try_wheel.sh FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# A copy, since setuptools leaves folders behind.
mkdir "$folder/source"
cp -r "$root"/{dllm_sd,configs,pyproject.toml,README.md,LICENSE} "$folder/source"
python -m pip wheel --quiet --no-deps -w "$folder" "$folder/source"
python -m pip install --quiet "$folder"/dllm_sd-*.whl -c "$root/constraints.txt"

cd "$folder"
unset PYTHONPATH
dllm-sd --help >/dev/null
dllm-sd show quickstart >/dev/null
dllm-sd train quickstart updates=2 method.rollout.problems=8 log.progress=false \
    'eval={every: 2, problems: 16, final_problems: 0, schedules: {}}'
test -s runs/quickstart/report.json
