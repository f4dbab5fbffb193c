#!/bin/sh
# Explores the schedules of all models, or of MODEL: SCHEDULES of each, or as many as fit into MODEL_SECONDS (5). SEED repeats
# one of them.
set -eu
cd "$(dirname "$0")"
export RUSTFLAGS='--cfg shuttle' CARGO_TARGET_DIR="${MODEL_TARGET:-$PWD/../../target/model}"
exec cargo test --quiet --lib model:: -- --test-threads=1 --nocapture
