#!/usr/bin/env bash
# Compares the schemas with the last commit on main, so that a change never breaks clients unnoticed.
set -euo pipefail
cd "$(dirname "$0")/.."
buf=.venv/bin/buf
# On main itself the last commit is HEAD's parent when the working tree is clean; elsewhere it is main's tip.
base=$(git rev-parse --verify --quiet origin/main || git rev-parse --verify --quiet main || true)
if [ -n "$base" ] && [ "$base" = "$(git rev-parse HEAD)" ] && git diff --quiet HEAD -- proto; then
  base=$(git rev-parse --verify --quiet HEAD~1 || true)
fi
if [ -z "$base" ] && [ "$(git rev-parse --is-shallow-repository)" = true ]; then
  echo "WARNING: the clone is shallow, so buf breaking did NOT run; hint: git fetch --unshallow" >&2
  exit 0
fi
if [ -z "$base" ] || [ -z "$(git ls-tree "$base" -- proto/longshore)" ]; then
  echo "no earlier schemas to compare with: buf breaking had nothing to check"
  exit 0
fi
against=$(mktemp -d)
trap 'rm -rf "$against"' EXIT
git archive "$base" buf.yaml proto | tar -x -C "$against"
"$buf" breaking --against "$against"
echo "schemas are compatible with $(git rev-parse --short "$base")"
