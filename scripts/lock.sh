#!/usr/bin/env bash
# Rewrite requirements.lock from pyproject.toml, through a new environment.
#
#   scripts/lock.sh                     the newest versions that pyproject.toml allows
#   scripts/lock.sh torch==2.13.0 ...   the same, with some versions fixed
#
# Local version suffixes (+cpu) and torch's own CUDA packages are left out, so that one file serves
# CPU and CUDA builds of torch: each build pins its CUDA packages. triton must be the version
# that torch's CUDA build pins; the tests run its kernels in its interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch" requirements.lock.part' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet --editable ".[bench,dev]" "$@"

{
    echo "# Exact versions of everything \`make\` installs: paceline[bench,dev] and what it needs."
    echo "# Written by scripts/lock.sh; run that again after changing the dependencies in pyproject.toml."
    "${pip[@]}" freeze --all --exclude-editable |
        sed -E 's/\+[A-Za-z0-9.]+$//; s/^(triton==.*)/\1; platform_system == "Linux"/' |
        grep -Eiv '^(pip|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' |
        LC_ALL=C sort --ignore-case
} >requirements.lock.part
"${pip[@]}" check
mv requirements.lock.part requirements.lock
