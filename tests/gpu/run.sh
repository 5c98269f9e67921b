#!/usr/bin/env bash
# All checks that need a CUDA GPU, and one table at the end. Run by hand in a clone: tests/gpu/run.sh [base]
# Without a base only the tiny ones are used; with one, such as unsloth/Qwen2-VL-2B-Instruct-bnb-4bit, that one too (it is downloaded).
set -euo pipefail
cd "$(dirname "$0")/../.."
make install
exec .venv/bin/python tests/gpu/checks.py "$@"
